"""dansm bench couplings: right values on data whose class is their brightness, and couplings of one's own."""

import csv
import json
import math
import sys
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from support import CPU, files_of

import dansm
from dansm.scale.bench import clock, couplings, ways
from dansm.scale.bench.couplings_figure import EXACT
from dansm.scale.studies import pairs

OWN = """
import torch

def pair(x, labels, generator):
    return torch.randn(x.shape, generator=generator)

def prepare(data, labels, generator):
    def draw(count):
        taken = torch.randint(len(data), (count,), generator=generator)
        z = torch.randn(count, *data.shape[1:], generator=generator)
        return z, taken
    return draw

def too_short(x, labels, generator):
    return x[:1]

def failing(x, labels, generator):
    raise ValueError("no noise today")


def not_finite(x, labels, generator):
    return x / 0


def others(data, labels, generator):
    return lambda count: (torch.randn(count, *data.shape[1:]), torch.full((count,), len(data)))
"""


@pytest.fixture
def photographs(tmp_path):
    """1,100 images of 1×8×8, of two classes: dark and bright."""
    labels = np.arange(1100) % 2
    pixels = np.random.default_rng(1).integers(0, 128, (1100, 1, 8, 8), np.uint8)
    np.save(tmp_path / "photographs.npy", pixels + 128 * labels[:, None, None, None].astype(np.uint8))
    np.save(tmp_path / "classes.npy", labels)
    (tmp_path / "mine.py").write_text(OWN)
    return tmp_path / "photographs.npy"


@pytest.fixture
def bench(run, photographs, tmp_path):
    """The rows of a call by name, and what else it wrote."""
    def bench(names, *options, labels=tmp_path / "classes.npy"):
        code, _, err = run("bench", "couplings", "--data", photographs, "--labels", labels, "--couplings", names,
                           "--batch", 100, "--device", "cpu", "--out", tmp_path / "out", *options)
        assert (code, err) == (0, "")
        written = json.loads((tmp_path / "out" / "couplings.json").read_text())
        return {row["coupling"]: row for row in written["rows"]}, written
    return bench


def test_gain_prior_and_class_are_what_they_must_be(bench, monkeypatch, tmp_path):
    monkeypatch.setitem(couplings.OPTIMAL_OF, "cpu", 256)
    names = ["random", "nearest-16", "assigned-256", "pool-1000", "pool-1000-by-class", "assigned-256-by-class",
             "c2ot-256", "coarse-10000", "semidiscrete", "semidiscrete-by-class"]
    rows, written = bench(",".join(names))
    assert list(rows) == names and written["left_out"] == {}
    assert rows["random"]["gain_share"] == pytest.approx(0, abs=0.05)
    assert rows["random"]["crossing_share"] == pytest.approx(1, abs=0.03)
    assert rows["assigned-256"]["gain_share"] == pytest.approx(1, abs=0.05)  # against itself
    assert rows["pool-1000"]["gain_share"] > 0.8 and rows["pool-1000"]["crossing_share"] < 0.8
    bent = [name for name, row in rows.items() if row["life_p"] < EXACT]
    assert bent == ["nearest-16"]
    assert rows["pool-1000"]["batch_p"] < EXACT < rows["semidiscrete"]["batch_p"]
    by_class = ["random", "pool-1000-by-class", "assigned-256-by-class", "semidiscrete-by-class"]
    for name, row in rows.items():
        tells = name not in by_class
        assert (row["class_p"] < EXACT) == tells, name
        assert row["class_told"] > 0.6 if tells else row["class_told"] == pytest.approx(0.5, abs=0.06), name
    assert rows["pool-1000"]["pairs"] == rows["pool-1000-by-class"]["pairs"] == 2000  # whole pools
    assert rows["assigned-256"]["pairs"] == 1280 and rows["random"]["pairs"] == 1100
    for row in rows.values():
        assert row["set_up_s"] > 0 and 0 < row["batch_least_ms"] <= row["batch_mean_ms"] <= row["batch_most_ms"]
        assert row["one_mean_ms"] > 0
    assert {name for name, row in rows.items() if row["needs_data"] == "yes"} == {"semidiscrete",
                                                                                 "semidiscrete-by-class"}
    assert rows["assigned-256"]["batch_of_1"] == "waits for 256" and rows["pool-1000"]["batch_of_1"] == "yes"
    assert rows["pool-1000"]["memory_mb"] == pytest.approx(1008 * 64 * 4 / 1e6, abs=0.1)
    assert files_of(tmp_path / "out") == [f"couplings.{kind}" for kind in ("csv", "json", "png", "svg")]
    assert [row["coupling"] for row in csv.DictReader((tmp_path / "out" / "couplings.csv").open())] == names
    assert Image.open(tmp_path / "out" / "couplings.png").width > 1000


def test_a_coupling_of_ones_own_is_one_function(bench, refused, photographs, tmp_path):
    rows, _ = bench("mine:pair,mine:prepare")
    assert [row["needs_data"] for row in rows.values()] == ["no", "yes"]
    for row in rows.values():
        assert row["life_p"] > EXACT and row["gain_share"] == pytest.approx(0, abs=0.06)
    command = ("bench", "couplings", "--data", photographs, "--device", "cpu", "--out", tmp_path / "none",
               "--couplings")
    assert "mine:too_short" in refused(*command, "mine:too_short") and "(1, 1, 8, 8)" in refused(
        *command, "mine:too_short")
    assert "no noise today" in refused(*command, "mine:failing")
    assert "not finite" in refused(*command, "mine:not_finite")
    assert "numbers from 0 to" in refused(*command, "mine:others")
    for name in ("mine:missing", "missing:pair"):
        assert "--couplings" in (said := refused(*command, name)) and name in said


def test_single_calls_are_timed_where_all_samples_are_one_batch():
    data = couplings.Data(torch.randn(6, 1, 4, 4), None, 0)
    asked = []
    way = ways.Way(lambda x, labels: [asked.append(len(x)), torch.randn_like(x)][1])
    served = couplings.serve(way, ways.registry(False)["random"], data, 6)
    assert asked.count(6) and asked.count(1) == len(served.one_ms) == couplings.EXTRA


def test_what_cannot_be_measured_is_left_out_with_its_reason(bench, monkeypatch):
    monkeypatch.setitem(sys.modules, "ot", None)  # which cannot be imported then
    rows, written = bench("random,pool-100000,assigned-10000,semidiscrete-parts,sinkhorn-2048", "--count", 1000)
    reasons = written["left_out"]
    assert list(rows) == ["random"] and list(reasons) == ["pool-100000", "assigned-10000", "semidiscrete-parts",
                                                         "sinkhorn-2048"]
    assert "100,000" in reasons["pool-100000"] and "10,000" in reasons["assigned-10000"]
    monkeypatch.setattr(couplings, "free_memory", lambda device: 40 * 64 * 2200)  # for samples, not for a pool's life
    assert "memory" in bench("random,pool-10000")[1]["left_out"]["pool-10000"]


def test_a_plan_of_parts_by_class_needs_a_class_with_parts():
    data = ways.Data(torch.zeros(12_000, 1), torch.arange(12_000) % 2, 0)
    known = ways.registry(True)
    assert "6,000" in couplings.what_lacks(known["semidiscrete-parts-by-class"], data)
    assert not couplings.what_lacks(known["semidiscrete-parts"], data)


def test_a_coupling_that_fails_leaves_the_others_their_rows(bench, monkeypatch):
    """The first lacks a package, the second memory; the third is measured after a pass that is not counted."""
    made = []

    def failing(error, data):
        raise error

    def random(data):
        made.append(data)
        return ways.Way(lambda x, labels: torch.randn_like(x))

    monkeypatch.setitem(couplings.UNCOUNTED, "cpu", 1)
    monkeypatch.setattr(ways, "registry", lambda labelled: {
        "without": ways.Coupling("random", partial(failing, ModuleNotFoundError("no triton"))),
        "large": ways.Coupling("random", partial(failing, torch.OutOfMemoryError("CUDA out of memory"))),
        "random": ways.Coupling("random", random)})
    rows, written = bench("without,large,random")
    assert written["left_out"] == {"without": "no triton", "large": "not enough memory"}
    assert list(rows) == ["random"] and rows["random"]["pairs"] == 1100 and len(made) == 2


def test_slow_couplings_are_measured_on_fewer_pairs(monkeypatch):
    monkeypatch.setattr(clock, "PATIENCE", 0.0)
    data = ways.Data(torch.randn(50, 4), None, 0)
    way = ways.Way(lambda x, labels: torch.randn_like(x))
    served = couplings.serve(way, ways.registry(False)["random"], data, 20)
    assert len(served.z) == 20 and len(served.batch_ms) == 1 and len(served.one_ms) == couplings.EXTRA
    served = couplings.serve(way, ways.registry(False)["assigned-64"], data, 20)
    assert len(served.z) == 64 and len(served.batch_ms) == 1
    draw = ways.Way(draw=lambda count: (torch.randn(count, 4), torch.zeros(count, dtype=torch.int64)))
    assert len(couplings.serve(draw, ways.registry(False)["semidiscrete"], data, 20).z) == 20
    whole = couplings.serve(way, ways.registry(False)["pool-1000"]._replace(life=100), data, 20)
    assert len(whole.z) == 100  # a whole pool


def test_without_labels_there_is_nothing_by_class(bench):
    rows, written = bench("random", labels="none")
    assert written["classes"] == 0 and (rows["random"]["class_told"], rows["random"]["class_p"]) == (None, None)
    assert not [name for name in ways.chosen(None, False, "") if "by-class" in name or "c2ot" in name]
    with_labels = ways.chosen(None, True, "")
    assert {"c2ot-256", "pool-10000-priced-by-class", "semidiscrete-parts-by-class"} <= with_labels.keys()
    assert "pool-10000-by-class" not in with_labels and "pool-10000-by-class" in ways.registry(True)


def test_bad_input_names_the_option(refused, photographs, tmp_path):
    command = ("bench", "couplings", "--data", photographs, "--device", "cpu", "--out", tmp_path / "out")
    said = refused(*command, "--couplings", "random,pool-12")
    assert "--couplings" in said and all(name in said for name in ways.registry(False))
    said = refused(*command, "--couplings", "pool-1000-by-class", "--labels", "none")
    assert "pool-1000-by-class" in said and "--labels" in said
    said = refused(*command, "--count", 100, "--batch", 200)
    assert "--count" in said and "200" in said
    assert "--count is 5,000" in refused(*command, "--count", 5000)
    assert "--batch is 2,000" in refused(*command, "--batch", 2000)
    assert not (tmp_path / "out").exists()


def test_synthetic_images_stand_in_for_cifar10_alone(monkeypatch, capsys):
    def missing(*_, **__):
        raise dansm.BadInput("not here")

    monkeypatch.setattr(couplings, "load_images", missing)
    data, source = couplings.load(None, "auto", 8, 40, 20, 0, CPU)
    assert "synthetic" in capsys.readouterr().out
    assert data.x.shape == (40, 3, 8, 8) and data.labels is None and "synthetic" in source
    with pytest.raises(dansm.BadInput):
        couplings.load("cifar10", "auto", 8, 40, 20, 0, CPU)


def test_pools_of_all_classes_end_together():
    """Two and eight samples of two classes, of 30 numbers each."""
    data = ways.Data(torch.zeros(10, 1), torch.tensor([0, 0, *[1] * 8]), 0)
    numbers = couplings.order(data, 60, 0, each_class=True)
    assert data.labels[numbers].bincount().tolist() == [30, 30]
    counts = numbers.bincount()
    assert counts[:2].tolist() == [15, 15] and set(counts[2:].tolist()) == {3, 4}
    assert data.labels[numbers[:30]].unique().tolist() == [0, 1]  # mixed
    assert sorted(couplings.order(data, 20, 0)[:10].tolist()) == list(range(10))  # an epoch


@pytest.mark.parametrize("batch", [7, 30, 45])
@pytest.mark.parametrize("by_class", [False, True])
def test_whole_pools_are_measured_whatever_the_batch(batch, by_class):
    """Pools of 30 noises, or of 15 for each of two classes: what is handed out is what some of them hold."""
    data = ways.Data(torch.randn(50, 4), torch.arange(50) % 2, 0)
    make = partial(ways.by_pool, 30, "squared", None, by_class=by_class)
    coupling = ways.Coupling("pool", make, life=30, by_class=by_class)
    way, seconds = couplings.set_up(coupling, data, batch)
    served = couplings.serve(way, coupling, data, batch)
    assert seconds > 0 and len(served.z) == 60
    groups = data.labels[served.taken] if by_class else torch.zeros(60, dtype=torch.int64)
    fresh = dansm.NoisePool(15 if by_class else 30, (4,), cost="squared", seed=0, groups=2 if by_class else None)
    before = -(-batch // 30) * 30
    labels = torch.arange(before + 60) % 2
    drawn = fresh(torch.zeros(before + 60, 4), *([labels] if by_class else []))
    for group in groups.unique():
        expected = drawn[before:][labels[before:] == group] if by_class else drawn[before:]
        assert sorted(map(tuple, served.z[groups == group].tolist())) == sorted(map(tuple, expected.tolist()))


def test_sinkhorns_pairs_are_near_the_optimal_ones(monkeypatch):
    pytest.importorskip("ot")
    x = torch.randn(400, 30, generator=torch.Generator().manual_seed(2)) * torch.linspace(0, 1, 30)
    way = ways.by_sinkhorn(ways.Data(x, None, 0))
    z = torch.randn(x.shape)
    best = pairs.inner_gain(x, z[ways.optimal(dansm.cost_matrix(x, z)).picks])
    assert 0.7 < pairs.inner_gain(x, way.pair(x, None)) / best < 1.1


def test_crossing_is_that_of_gaussians():
    """Along one direction of variance λ with covariance c it is (λ − c²) (λ + 1) / ((λ + 1 + 2c) λ)."""
    x = 0.5 * torch.randn(200_000, 1)
    axis = torch.ones(1, 1)
    assert pairs.crossing_share(x, torch.randn(x.shape), axis) == pytest.approx(1, abs=0.01)
    assert pairs.crossing_share(x, 2 * x, axis) == pytest.approx(0, abs=1e-4)  # paths keep their order
    z = 0.6 * 2 * x + 0.8 * torch.randn(x.shape)
    expected = (0.25 - 0.3**2) * 1.25 / ((1.25 + 0.6) * 0.25)
    assert pairs.crossing_share(x, z, axis) == pytest.approx(expected, abs=0.01)


def test_the_directions_are_those_in_which_samples_differ():
    x = torch.randn(500, 2, 3) * torch.tensor([[5.0, 1, 1], [1, 3, 1]])
    directions = pairs.principal_directions(x, 2)
    assert directions.abs()[0, 0] > 0.99 and directions.abs()[4, 1] > 0.98
    assert math.isclose(directions.norm(dim=0).prod(), 1, rel_tol=1e-4)
