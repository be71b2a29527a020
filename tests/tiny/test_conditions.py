"""The 2D flow by class: the classes of the moons, what a training sees, a small run, and what ignoring classes does."""

from itertools import islice

import pytest
import torch
from PIL import Image
from support import files_of

from dansm.scale.base.files import read_csv
from dansm.scale.base.statistics import told_class
from dansm.tiny import conditions, toy
from dansm.tiny.shapes import labelled_moons, two_moons


def settings(**changes):
    return toy.Settings(**{"match_size": 200, "steps": 2, "seeds": 1, "seed": 0, "device": "cpu", **changes})


def test_the_classes_are_the_moons_and_the_points_those_of_the_shape():
    points, labels = labelled_moons(1000, torch.Generator().manual_seed(3))
    assert points.equal(two_moons(1000, torch.Generator().manual_seed(3)))
    assert sorted(labels.unique().tolist()) == [0, 1]
    assert points[labels == 1, 1].mean() > 0.5 > -0.5 > points[labels == 0, 1].mean()


def test_a_network_of_classes_depends_on_the_label_alone_if_it_has_any():
    x, t = torch.randn(4, 2), torch.rand(4) * 999
    net = toy.MLP(classes=2)
    assert not net(x, t, torch.zeros(4).long()).equal(net(x, t, torch.ones(4).long()))
    torch.manual_seed(0)
    plain = toy.MLP()
    assert plain.layers[0].in_features == net.layers[0].in_features - 2 and plain(x, t).shape == (4, 2)


def test_only_one_pool_leaks_the_class_and_the_pools_of_the_classes_share_its_noises():
    for way in conditions.WAYS:
        _, z, labels = (torch.cat(part) for part in zip(*islice(conditions.training_pairs(way, settings(), 0), 25),
                                                        strict=True))
        told = told_class(z, labels)
        assert told > 0.75 if way == "one pool" else told == pytest.approx(0.5, abs=0.04), way
    first = {size: next(conditions.training_pairs("a pool for each class", settings(match_size=size), 0))[1]
             for size in (16, 17, 18)}
    assert first[16].equal(first[17]) and not first[16].equal(first[18])  # 8, 8 and 9 noises for each class


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(conditions, "POINTS", 60)
    monkeypatch.setattr(conditions, "BATCH", 64)


def test_a_run_writes_a_row_for_each_training_and_one_picture(small, run, tmp_path):
    out = tmp_path / "out"
    code, said, _ = run("toy", "--conditional", "--steps", 2, "--seeds", 2, "--match-size", 20, "--out", out)
    assert code == 0 and files_of(out) == ["2d.csv", "2d.png"]
    rows = read_csv(out / "2d.csv")
    assert [(row["way"], row["seed"]) for row in rows] == [(way, seed) for seed in "01" for way in conditions.WAYS]
    assert all(float(row[f"w2_{steps}_steps"]) > 0 for row in rows for steps in toy.STEPS_SHOWN)
    assert len(Image.open(out / "2d.png").getcolors()) > 30
    assert all(way in said for way in conditions.WAYS) and str(out / "2d.png") in said


def test_samples_by_class_end_elsewhere_where_the_pool_ignored_the_classes(monkeypatch):
    monkeypatch.setattr(conditions, "POINTS", 150)
    w2 = {way: conditions.train_and_measure(settings(match_size=500, steps=200), way, 0)[0]["w2_50_steps"]
          for way in ("random pairs", "one pool", "a pool for each class")}
    assert w2["one pool"] > 4 * max(w2["random pairs"], w2["a pool for each class"])


def test_another_shape_has_no_classes(refused, tmp_path):
    said = refused("toy", "--conditional", "--shape", "pinwheel", "--out", tmp_path / "out")
    assert "--shape" in said and "pinwheel" in said and "--conditional" in said
