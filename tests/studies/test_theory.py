"""The theory: its two formulas hold, what measures them measures what it says, and the record agrees with the page."""

import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from support import ROOT, make_images

import dansm
from dansm.scale.base.statistics import inter_path_distance
from dansm.scale.commands import theory as command
from dansm.scale.studies import theory

SIZES = (4, 40, 200)


# ------------------------------------------------------------------------------- the formulas


def two_paths(seed, dim):
    """x and z of two paths: (2, dim) each."""
    return torch.randn(2, 2, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).unbind()


@given(st.integers(0, 2**31 - 1), st.integers(1, 6))
def test_the_closed_form_is_the_least_over_dense_times(seed, dim):
    x, z = two_paths(seed, dim)
    u, v = z[0] - z[1], x[0] - x[1]
    t = torch.linspace(0, 1, 20_001, dtype=torch.float64)[:, None]
    distances = ((1 - t) * u + t * v).norm(dim=1)
    at = (u @ (u - v) / (u - v).square().sum()).clamp(0, 1)
    closed = ((1 - at) * u + at * v).norm().item()
    assert distances.min() - 1e-3 <= closed <= distances.min() + 1e-12
    assert inter_path_distance(x, z).mean == pytest.approx(closed, abs=1e-7)  # a root near 0


@given(st.integers(0, 2**31 - 1), st.integers(1, 6))
def test_of_two_pairings_the_shorter_is_farther_apart_at_every_time(seed, dim):
    x, z = two_paths(seed, dim)
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)[:, None]

    def length_and_distances(z):
        path = (1 - t) * (z[0] - z[1]) + t * (x[0] - x[1])
        return (x - z).square().sum(), path.square().sum(1)

    (length, apart), (swapped_length, swapped_apart) = length_and_distances(z), length_and_distances(z.flip(0))
    assert torch.allclose(swapped_length - length, 2 * (z[0] - z[1]) @ (x[0] - x[1]))
    assert ((apart > swapped_apart) == (length < swapped_length)).all()


# ------------------------------------------------------------------------------- what measures


@pytest.fixture(scope="module")
def small():
    """Images that differ most in brightness, as CIFAR-10's do."""
    numbers = torch.Generator().manual_seed(0)
    brightness = torch.randn(300, 1, generator=numbers)
    return (brightness + 0.5 * torch.randn(300, 12, generator=numbers)) / 2


@pytest.fixture(autouse=True)
def fewer(monkeypatch):
    monkeypatch.setattr(theory, "MATCH_SIZES", SIZES)
    monkeypatch.setattr(theory, "NEAREST_OF", 30)


@pytest.fixture
def result(small):
    return theory.measure(small, draws=2)


def test_the_measured_ways_are_ordered_as_they_must_be(result):
    of = {(row["draw"], row["match_size"], row["way"]): row for row in result["rows"]}
    for draw, size in itertools.product(range(2), SIZES):
        gain = {way: of[draw, size, way]["gain"] for way in (*theory.WAYS, "free")}
        assert 0 < gain["squared"] <= gain["optimal"] + 1e-6 and 0 < gain["inner"] <= gain["optimal"] + 1e-6
        assert gain["optimal"] <= gain["free"] + 1e-6
        assert of[draw, size, "optimal"]["share_of_optimal"] == 1
    assert of[0, 200, "squared"]["first_crossing"] < of[0, 1, "random"]["first_crossing"] - 0.1


def test_gains_are_those_of_all_pairings_of_a_pool(small):
    x, z = small[:8], torch.randn(8, 12)
    paired = theory.match_in_pools(x, z, 4, "squared")
    at_random = [sum((x[i] - z[j]).square().sum() for i in pool for j in pool) / 4 for pool in (range(4), range(4, 8))]
    length = (x - paired).square().sum()
    found = theory.gains(x, paired, z, 4)
    assert found["gain"] == pytest.approx(1 - (length / sum(at_random)).item(), abs=1e-5)
    first = sum((x[i] - z[j]).square().sum() / 4 for i in (0, 4) for j in range(i, i + 4))
    assert found["quarter_1"] == pytest.approx(1 - ((x - paired)[[0, 4]].square().sum() / first).item(), abs=1e-5)


def test_the_variance_by_age_is_of_the_same_quarter_of_all_pools():
    along = torch.tensor([0.0, 1, 2, 3, 4, 5, 6, 9])  # two pools of four: quarters (0, 4), (1, 5), (2, 6), (3, 9)
    found = theory.variance_by_age(along, 4)
    assert found == {"first_variance_1": 8, "first_variance_2": 8, "first_variance_3": 8, "first_variance_4": 18}


@pytest.mark.parametrize("cost", dansm.COSTS)
def test_greedy_in_pools_is_the_pool(small, cost):
    """The same noises from a NoisePool that draws those of the study."""
    x, z = small[:40], torch.randn(40, 12)
    pool = dansm.NoisePool(20, (12,), cost=cost, seed=0)
    pool._draw = lambda number, chunk, rows: rows.copy_(z[20 * (number - 1) % 40 :][:20])
    assert pool(x).equal(theory.match_in_pools(x, z, 20, cost))


def test_only_the_nearest_of_many_bends_the_prior(result):
    same = {row["way"]: row["the_noises_drawn"] for row in result["prior_rows"]}
    assert same == {"drawn": True, "matched": True, "nearest": False}
    variance = {row["way"]: row["first_variance"]["mean"] for row in result["prior"]}
    assert variance["matched"] == pytest.approx(variance["drawn"])
    assert abs(variance["nearest"] - variance["drawn"]) > 0.1


def test_crossing_counts_pairs_that_change_sides():
    def crossing(a, b):
        return theory.spread_along(a[:, None], b[:, None], torch.eye(1))["first_crossing"]

    order = torch.arange(20.0)
    assert crossing(order, order) == 0 and crossing(order, -order) == 1
    assert crossing(torch.tensor([0.0, 1, 2]), torch.tensor([0.0, 2, 1])) == pytest.approx(1 / 3)


def test_a_linear_guess_explains_what_it_can():
    z = torch.randn(5000, 3, generator=torch.Generator().manual_seed(0))
    x = z * torch.tensor([3.0, 0.0, 0.0]) + torch.randn(5000, 3, generator=torch.Generator().manual_seed(1))
    found = theory.spread_along(x, z, torch.eye(3))
    assert found["explained"] == pytest.approx(9 / 12, abs=0.02)
    assert found["first_correlation"] == pytest.approx((9 / 10) ** 0.5, abs=0.01)


# ------------------------------------------------------------------------------- the command and its record


def test_too_few_images_and_latents_are_refused(refused, tmp_path):
    images = make_images(tmp_path / "images", 3)
    np.save(tmp_path / "latents.npy", np.zeros((8, 4, 2, 2), np.float32))
    for data, words in ((images, ("3 samples", "200")), (tmp_path / "latents.npy", ("latents.npy", "float32"))):
        said = refused("theory", "--data", data, "--out", tmp_path / "out")
        assert "--data" in said and all(word in said for word in words)
        assert not (tmp_path / "out").exists()


def test_the_command_measures_and_writes(run, small, tmp_path, monkeypatch):
    images = torch.randint(0, 256, (300, 3, 2, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(command, "load_images", lambda source: images)
    code, said, _ = run("theory", "--data", "d", "--draws", 2, "--out", tmp_path)
    result = json.loads((tmp_path / "theory.json").read_text())
    assert code == 0 and {row["draw"] for row in result["rows"]} == {0, 1}
    assert result["data"]["squared_norm"] == pytest.approx((images / 127.5 - 1).square().sum((1, 2, 3)).mean().item())
    assert len((tmp_path / "theory.csv").read_text().splitlines()) == len(result["rows"]) + 1
    assert Image.open(tmp_path / "theory.png").width == pytest.approx(3.4 * 200, abs=1)
    assert all(f"theory.{kind}" in said for kind in ("json", "csv", "png", "svg"))


def test_what_the_page_says_in_words_holds_in_every_draw():
    record = json.loads((ROOT / "results" / "theory" / "theory.json").read_text())
    rows = {(row["draw"], row["match_size"], row["way"]): row for row in record["rows"]}
    for draw in range(record["draws"]):
        assert rows[draw, 1000, "squared"]["gain"] > rows[draw, 100, "optimal"]["gain"]
        for size in record["match_sizes"]:
            assert rows[draw, size, "squared"]["gain"] < rows[draw, size, "inner"]["gain"]
            assert rows[draw, size, "squared"]["quarter_4"] < rows[draw, size, "inner"]["quarter_4"]
            first, last = ([rows[draw, size, way][f"first_variance_{i}"] for way in ("inner", "squared", "optimal")]
                           for i in (1, 4))
            assert first == sorted(first, reverse=True) and last == sorted(last)
    same = {row["way"]: row["the_noises_drawn"] for row in record["prior_rows"]}
    assert same == {"drawn": True, "matched": True, "nearest": False}
    mean_square = {row["way"]: row["mean_square"]["mean"] for row in record["prior"]}
    free = next(row for row in record["summary"] if (row["match_size"], row["way"]) == (1000, "free"))
    saved = free["gain"]["mean"] * (record["data"]["squared_norm"] + record["data"]["numbers"])
    assert (mean_square["drawn"] - mean_square["nearest"]) * record["data"]["numbers"] > saved / 2
