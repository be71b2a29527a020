"""A run evaluated while it trains: nothing of the run changes, and the measures are those of dansm evaluate."""

import itertools
import json
import types

import numpy as np
import pytest
import torch
from PIL import Image
from runs import awake_with_own_cache, losses_of, wake_networks
from support import FAST, in_processes, log_of, make_images, needs_gloo, same, state_of

from dansm.scale.evaluate import measures
from dansm.scale.model import checkpoint
from dansm.scale.train import evaluation, watch

pytest.importorskip("torch_fidelity")

SEEN = ("--evaluate-features", "features:seen", "--evaluate-count", 40, "--evaluate-steps", "2,3")
MEASURES = {"frechet_distance", "kernel_distance", "kernel_distance_std", "precision", "recall"}


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    monkeypatch.setattr(measures, "SUBSETS", 3)
    monkeypatch.setattr(evaluation, "CACHE", tmp_path / "cache")


@pytest.fixture
def images(tmp_path):
    return make_images(tmp_path / "images", count=60, width=8, height=8)


def evaluations(out):
    """The lines of evaluations, without the times."""
    return [{name: value for name, value in line.items() if "seconds" not in name} for line in log_of(out)
            if "frechet_distance/real" in line]


def test_evaluations_change_nothing_of_the_run_and_stand_in_its_log(run, images, tmp_path):
    command = ["train", images, "--steps", 6, "--log-steps", 1, *FAST]
    plain, evaluated = tmp_path / "plain", tmp_path / "evaluated"
    assert run(*command, "--out", plain)[0] == 0
    code, said, err = run(*command, "--out", evaluated, *SEEN, "--evaluate-every", 2)
    assert (code, err) == (0, "")
    assert losses_of(plain) == losses_of(evaluated) and not evaluations(plain)
    assert same(*(state_of(out)["training"] for out in (plain, evaluated)))
    lines = evaluations(evaluated)
    assert [line["step"] for line in lines] == [2, 4, 6] and [line["images"] for line in lines] == [16, 32, 48]
    for line in lines:
        assert {name for name in line if "/" in name} == {f"{name}/{of}" for name in MEASURES for of in (2, 3, "real")}
    assert len({line["frechet_distance/2"] for line in lines}) == 3  # of three networks
    assert len({line["frechet_distance/real"] for line in lines}) == 1
    assert said.count("Fréchet distance (features:seen)") == 3


def test_the_measures_of_a_checkpoint_are_those_of_the_command(run, images, tmp_path):
    out = tmp_path / "out"
    assert run("train", images, "--steps", 4, "--out", out, *FAST, *SEEN, "--evaluate-every", 4)[0] == 0
    command = ["evaluate", out, "--features", "features:seen", "--count", 40, "--steps", "2,3", "--device", "cpu"]
    assert run(*command, "--cache", tmp_path / "cache", "--out", tmp_path / "evaluated")[0] == 0
    rows = json.loads((tmp_path / "evaluated" / "evaluate.json").read_text())["rows"]
    line, = evaluations(out)
    for row, of in zip(rows, ("real", 2, 3), strict=True):
        for name in MEASURES:
            assert line[f"{name}/{of}"] == pytest.approx(row[name], rel=1e-4, abs=1e-5)


@pytest.fixture
def by_class(tmp_path, monkeypatch):
    """Images of two classes, of which four are enough to measure one."""
    monkeypatch.setattr("dansm.scale.evaluate.by_class.LEAST", 4)
    for name, count in (("cat", 40), ("dog", 20)):
        make_images(tmp_path / "animals" / name, count, width=8, height=8)
    return tmp_path / "animals"


def test_classes_are_measured_as_the_command_measures_them(run, by_class, tmp_path, monkeypatch):
    wake_networks(monkeypatch)
    out, evaluated = tmp_path / "out", tmp_path / "evaluated"
    command = ["train", by_class, "--labels", "folders", "--steps", 4, *FAST, *SEEN, "--evaluate-every", 4]
    assert run(*command, "--out", out)[0] == 0
    command = ["evaluate", out, "--features", "features:seen", "--count", 40, "--steps", "2,3", "--device", "cpu"]
    assert run(*command, "--cache", tmp_path / "cache", "--out", evaluated)[0] == 0
    line, = evaluations(out)
    names = MEASURES | {"frechet_distance_class_mean", "label_accuracy"}
    assert {name for name in line if "/" in name} == {f"{name}/{of}" for name in names for of in (2, 3, "real")}
    for row, of in zip(json.loads((evaluated / "evaluate.json").read_text())["rows"], ("real", 2, 3), strict=True):
        for name in names:
            assert line[f"{name}/{of}"] == pytest.approx(row[name], rel=1e-4, abs=1e-5)


def test_evaluations_at_given_steps_of_the_distance_alone(run, images, tmp_path):
    """They are those of the same step of the run that measures all."""
    command = ["train", images, "--steps", 5, *FAST, *SEEN]
    assert run(*command, "--out", tmp_path / "every", "--evaluate-every", 2)[0] == 0
    assert run(*command, "--out", tmp_path / "at", "--evaluate-at", "2,5,9", "--evaluate-measures", "distance")[0] == 0
    at, every = ({line["step"]: line for line in evaluations(tmp_path / name)} for name in ("at", "every"))
    assert list(at) == [2, 5] and list(every) == [2, 4]
    names = {f"frechet_distance/{of}" for of in (2, 3, "real")}
    assert {name for name in at[2] if "/" in name} == names
    assert {name: at[2][name] for name in names} == {name: every[2][name] for name in names}


def test_a_run_cut_off_and_resumed_has_each_evaluation_once(run, images, tmp_path):
    once, twice = tmp_path / "once", tmp_path / "twice"
    command = ["train", images, *FAST, *SEEN, "--evaluate-every", 3]
    assert run(*command, "--steps", 9, "--out", once)[0] == 0
    assert run(*command, "--steps", 4, "--out", twice)[0] == 0
    torch.save(torch.zeros(1), twice / "checkpoint-00000004.pt")  # damaged: that of the evaluation is resumed
    assert run(*command, "--steps", 9, "--out", twice)[0] == 0
    assert same(*(state_of(out)["training"] for out in (once, twice)))
    assert evaluations(once) == evaluations(twice) and [line["step"] for line in evaluations(once)] == [3, 6, 9]


def test_an_evaluation_that_a_kill_cut_off_is_made_up_for_even_at_the_end(run, images, tmp_path, monkeypatch):
    """The checkpoint of the last step is there, its evaluation is not: the same command makes no step, and that."""
    command = ["train", images, "--steps", 4, *FAST, *SEEN, "--evaluate-at", "2,4"]
    cut, once = tmp_path / "cut", tmp_path / "once"
    evaluate = evaluation.Evaluation.__call__

    def killed(self, *arguments):
        if self.run.step == 4:
            raise KeyboardInterrupt
        return evaluate(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation.Evaluation, "__call__", killed)
        assert run(*command, "--out", cut)[0] == 130
    assert [line["step"] for line in evaluations(cut)] == [2]
    code, said, _ = run(*command, "--out", cut)
    assert code == 0 and "nothing to do" in said
    assert run(*command, "--out", once)[0] == 0
    assert evaluations(cut) == evaluations(once) and len(evaluations(cut)) == 2
    assert same(*(state_of(out)["training"] for out in (cut, once)))
    assert run(*command, "--out", cut)[0] == 0 and len(evaluations(cut)) == 2


def test_evaluations_do_not_count_as_training(run, images, tmp_path, monkeypatch):
    """By a clock that each look at it moves on by a second, and each evaluation by a thousand."""
    now = itertools.count()
    evaluate = evaluation.Evaluation.__call__

    def slow(*arguments):
        for _ in range(1000):
            next(now)
        return evaluate(*arguments)

    monkeypatch.setattr(watch, "time", types.SimpleNamespace(monotonic=lambda: next(now), perf_counter=lambda: 0.0))
    monkeypatch.setattr(evaluation.Evaluation, "__call__", slow)
    out = tmp_path / "out"
    assert run("train", images, "--steps", 4, "--out", out, *FAST, *SEEN, "--evaluate-every", 2)[0] == 0
    summary = json.loads((out / "train.json").read_text())
    assert len(evaluations(out)) == 2
    assert max(log_of(out)[-1]["seconds"], summary["seconds"], summary["this_call"]["seconds"]) < 1000


def test_grey_images_are_evaluated_as_grey_ones(run, tmp_path):
    (tmp_path / "grey").mkdir()
    for i in range(12):
        Image.new("L", (8, 8), 20 * i).save(tmp_path / "grey" / f"{i}.png")
    out = tmp_path / "out"
    assert run("train", tmp_path / "grey", "--steps", 1, "--out", out, *FAST, *SEEN, "--evaluate-every", 1)[0] == 0
    assert len(evaluations(out)) == 1


@pytest.mark.parametrize(("option", "value", "more"), [
    ("--evaluate-features", "features:none_such", ()), ("--evaluate-features", "features:of_three", ()),
    ("--inception-weights", "x.pth", ("--evaluate-features", "features:seen")), ("--evaluate-steps", "3,x", ()),
    ("--evaluate-steps", "0", ()), ("--evaluate-count", "1", ()), ("--evaluate-steps", "1", ("--flow", "diffusion"))])
def test_what_cannot_be_evaluated_is_refused_before_a_step(refused, images, tmp_path, option, value, more):
    out = tmp_path / "out"
    command = "train", images, "--steps", 2, "--out", out, "--evaluate-every", 1, *FAST
    said = refused(*command, option, value, *more)
    assert option in said and value in said and checkpoint.newest(out) is None


def test_latents_are_refused(refused, tmp_path):
    np.save(tmp_path / "latents.npy", np.zeros((8, 4, 8, 8), np.float16))
    assert "--evaluate-every" in refused("train", tmp_path / "latents.npy", "--evaluate-every", 1, *SEEN, *FAST)


def test_a_run_that_is_not_evaluated_makes_no_evaluation(run, images, monkeypatch):
    monkeypatch.setattr("dansm.scale.train.run.Evaluation", lambda *_: pytest.fail("made"))
    assert run("train", images, "--steps", 1, *FAST)[0] == 0


@needs_gloo
@pytest.mark.slow
@pytest.mark.parametrize("labels", [(), ("--labels", "folders")])
def test_two_processes_draw_the_images_of_one(run, by_class, tmp_path, monkeypatch, labels):
    wake_networks(monkeypatch)
    command = ["train", by_class, "--steps", 2, *FAST, *SEEN, "--evaluate-every", 2, "--match-size", 0, "--lr", 1e-9,
               *labels]
    codes, said = in_processes(tmp_path, [*command, "--out", tmp_path / "two"], hook=awake_with_own_cache)
    assert codes == [[0], [0]], said
    assert said[1] == ""
    assert run(*command, "--out", tmp_path / "one")[0] == 0
    (two,), (one,) = evaluations(tmp_path / "two"), evaluations(tmp_path / "one")
    for name in MEASURES - {"precision", "recall"}:  # which step by one image of forty
        assert two[f"{name}/2"] == pytest.approx(one[f"{name}/2"], rel=1e-3)
