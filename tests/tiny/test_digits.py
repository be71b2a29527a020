"""The digits: the command runs whole, evaluating on the way changes nothing, and a batch of one cannot be assigned."""

import json
from itertools import islice
from statistics import fmean

import pytest
import torch
from PIL import Image
from support import files_of

import dansm
from dansm.tiny import digits


@pytest.fixture
def train(run, monkeypatch, tmp_path):
    """Runs `dansm digits` on a hundred digits into a folder, and returns digits.json and what was printed."""
    few = digits.load_digits()[:100]
    monkeypatch.setattr(digits, "load_digits", lambda: few)

    def train(out, *options):
        code, said, err = run("digits", "--seeds", 1, "--match-size", 70, "--device", "cpu", *options,
                              "--out", tmp_path / out)
        assert (code, err) == (0, "")
        return json.loads((tmp_path / out / "digits.json").read_text()), said

    return train


def test_a_run_writes_numbers_and_a_picture(train, tmp_path):
    described, said = train("out", "--steps", 2)
    out = tmp_path / "out"
    assert files_of(out) == ["digits.json", "digits.png"]
    assert all(str(out / name) in said for name in files_of(out))
    assert (described["steps"], described["match_size"]) == (2, 70)
    assert [run["method"] for run in described["runs"]] == ["random", "greedy"]
    assert described["runs"][1]["path_length"] < described["runs"][0]["path_length"]
    assert all(value > described["real_half_against_half"] for run in described["runs"]
               for value in run["distance"].values())
    assert Image.open(out / "digits.png").width > 500


@pytest.mark.slow
def test_evaluating_on_the_way_changes_nothing(train, tmp_path):
    runs = {}
    whole = 4, "--evaluate-at", "2,4,1", "--pairs", ",".join(digits.LOOKS)
    for name, options in (("whole", whole), ("two", (2,)), ("four", (4,))):
        described, _ = train(name, "--steps", *options)
        runs[name] = {(run["method"], run["trained_steps"]): run["distance"] for run in described["runs"]}
    assert runs["whole"].keys() == {(way, step) for way in digits.LOOKS for step in (1, 2, 4)}
    assert runs["two"].items() <= runs["whole"].items() and runs["four"].items() <= runs["whole"].items()
    assert files_of(tmp_path / "whole") == ["curve.png", "digits.json", "digits.png"]
    train("whole", "--steps", 4)
    assert files_of(tmp_path / "whole") == ["digits.json", "digits.png"]  # the curve was from the earlier call


@pytest.mark.parametrize("option, value", [("--pairs", "best"), ("--evaluate-at", "2,x"), ("--evaluate-at", "9,1"),
                                           ("--match-size", 1)])
def test_what_cannot_be_run_is_named(refused, tmp_path, option, value):
    said = refused("digits", "--steps", 4, option, value, "--out", tmp_path / "out")
    assert option in said and str(value).split(",")[0] in said
    assert files_of(tmp_path / "out") == []


def test_stopping_keeps_the_seeds_that_are_done(train, run, tmp_path, monkeypatch):
    evaluate = digits.train_and_evaluate

    def stop_in_second_seed(images, settings, way, seed):
        if (way, seed) == ("greedy", 1):
            raise KeyboardInterrupt
        return evaluate(images, settings, way, seed)

    monkeypatch.setattr(digits, "train_and_evaluate", stop_in_second_seed)
    code, _, err = run("digits", "--steps", 1, "--seeds", 2, "--match-size", 70, "--device", "cpu", "--out", tmp_path)
    assert code == 130 and "1 of 2 seeds" in err and str(tmp_path / "digits.json") in err
    runs = json.loads((tmp_path / "digits.json").read_text())["runs"]
    assert [(run["method"], run["seed"]) for run in runs] == [("random", 0), ("greedy", 0)]


def test_in_batches_of_one_nothing_can_be_assigned_but_the_pool_matches():
    """Paths assigned within batches of one are as long as those of random pairs."""
    images = digits.load_digits()[:100]
    always = {"greedy", "priced", "semidiscrete"}
    for batch, shorter in ((1, always), (16, always | {"optimal"})):
        settings = digits.Settings(70, batch, list(digits.LOOKS), 1, [1], [5])
        lengths = {}
        for way in digits.LOOKS:
            stream = islice(digits.paired(images, way, settings, 5), 560 // batch)
            lengths[way] = fmean(dansm.path_length(x, z) for x, z in stream)
        assert {way for way, length in lengths.items() if length < 0.97 * lengths["random"]} == shorter
        assert all(length < 1.03 * lengths["random"] for length in lengths.values())


def test_every_way_but_the_plan_sees_the_same_images_and_greedy_is_the_pool():
    images = digits.load_digits()[:100]
    settings = digits.Settings(70, 16, list(digits.LOOKS), 1, [1], [5])
    first = {way: next(digits.paired(images, way, settings, 5)) for way in digits.LOOKS}
    assert [way for way, (x, _) in first.items() if not x.equal(first["random"][0])] == ["semidiscrete"]
    x, z = first["greedy"]
    assert torch.equal(z, dansm.NoisePool(70, (1, 8, 8), seed=5)(x))
