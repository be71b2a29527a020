"""What "auto" stands for: chosen before a run begins, told, and kept when it is resumed."""

import dataclasses

import numpy as np
import pytest
import torch
from support import CPU, state_of

from dansm.scale.data.labels import Labels
from dansm.scale.model.recipe import Recipe, load
from dansm.scale.train import auto

SHAPE = 480, 3, 8, 8
GPU = torch.device("cuda")  # no tensor is made there
QUICK = "--batch", 8, "--sample-steps", 1, "--device", "cpu"


def settled(shape=SHAPE, labels=None, device=CPU, **settings):
    return auto.settled(Recipe("x", **settings), shape, labels, device, None)


@pytest.mark.parametrize(("side", "device", "network"), [
    (32, CPU, "tiny"), (256, CPU, "tiny"), (32, GPU, "small"), (64, GPU, "small"), (128, GPU, "ddpm"),
])
def test_the_network_goes_by_the_device_and_the_size(side, device, network, capsys):
    assert settled((9, 3, 8, side), device=device, match_size=0).network == network
    assert f"network {network}" in capsys.readouterr().out
    assert settled((9, 3, side, side), device=device, match_size=0, network="ncsnpp").network == "ncsnpp"
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("settings", "size"), [
    (dict(steps=100, batch=48), 480), (dict(steps=10**6), 10_000), (dict(steps=1, batch=8), 0),
    (dict(steps=10**6, minutes=2.0), 120),  # 1,200 images at 10 a second
    (dict(steps=100, batch=48, minutes=600.0), 480),
    (dict(method="nearest"), 16), (dict(method="optimal"), 1000), (dict(method="optimal", steps=2, batch=8), 16),
    (dict(method="random"), 0), (dict(method="semidiscrete"), 0), (dict(match_size=7), 7),
])
def test_the_match_size_goes_by_the_method_and_the_samples_in_all(settings, size, capsys):
    assert settled(**settings).match_size == size
    told = settings.get("method") not in ("random", "semidiscrete") and "match_size" not in settings
    assert (f"match size {size:,}" in capsys.readouterr().out) == told


def test_each_class_empties_its_pool_ten_times():
    labels = Labels(np.repeat([0, 1], [120, 360]), ["cat", "dog"], "folders")
    assert settled(labels=labels, steps=100, batch=48).match_size == 120  # cats are a quarter of 4,800
    assert settled(labels=labels, steps=100, batch=48, match_labels="no").match_size == 480


def test_the_pool_leaves_memory_for_the_training(monkeypatch):
    monkeypatch.setattr("dansm.scale.matching.pool.free_memory", lambda _: 10**9)
    size = settled((9, 3, 256, 256), steps=10**6).match_size
    assert 0 < size * 3 * 256 * 256 * 4 < 10**9 / 4


def test_the_advice_names_a_size_that_fits():
    recipe = Recipe("x", network="tiny", steps=10, batch=8, match_size=100)
    assert "--match-size 8 " in auto.safe_size(recipe, None)
    assert auto.safe_size(dataclasses.replace(recipe, match_size=80), None) == ""
    labels = Labels(np.repeat([0, 1], [1, 3]), ["cat", "dog"], "folders")
    assert "--match-size 2 " in auto.safe_size(recipe, labels) and "cat" in auto.safe_size(recipe, labels)


def test_a_run_that_is_resumed_keeps_what_was_chosen(run, images, tmp_path):
    out = tmp_path / "out"
    code, said, err = run("train", images, *QUICK, "--steps", 20, "--out", out)
    assert (code, err) == (0, "") and "network tiny" in said and "match size 16" in said
    assert (load(str(out / "recipe.toml")).network, load(str(out / "recipe.toml")).match_size) == ("tiny", 16)
    code, said, err = run("train", images, *QUICK, "--steps", 40, "--out", out)
    assert (code, err) == (0, "") and "as the run began" in said
    state = state_of(out)
    assert (state["recipe"]["match_size"], state["training"]["step"]) == (16, 40)
    assert run("train", images, *QUICK, "--steps", 41, "--out", out, "--match-size", 32)[0] == 2
    assert "match size 32" in run("train", images, *QUICK, "--steps", 40, "--out", out, "--fresh")[1]
    assert state_of(out)["recipe"]["match_size"] == 32


def test_a_match_size_without_effect_is_not_told(run, images, tmp_path):
    options = "--method", "semidiscrete", "--cache", tmp_path / "cache", "--out", tmp_path / "out"
    for steps in (1, 2):
        code, said, err = run("train", images, *QUICK, *options, "--steps", steps)
        assert code == 0 and "network tiny" in said and "match size" not in said, err


def test_a_run_of_another_network_is_resumed_with_it(run, images, tmp_path):
    run("train", images, *QUICK, "--network", "small", "--match-size", 5, "--steps", 1, "--out", tmp_path / "a")
    code, said, _ = run("train", images, *QUICK, "--steps", 2, "--out", tmp_path / "a")
    assert code == 0 and "network small, match size 5, as the run began" in said
    code, said, _ = run("train", images, *QUICK, "--steps", 2, "--out", tmp_path / "b", "--init", tmp_path / "a")
    assert code == 0 and "network small" in said and "match size 0" in said  # the pool is a new one
