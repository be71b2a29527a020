"""The page on the theory: its numbers are those of the records, its two formulas hold, and what measures them measures
what it says."""

import itertools
import json
import re
from pathlib import Path
from statistics import fmean

import pytest
import torch
from dansm.scale.base.statistics import inter_path_distance
from dansm.scale.commands.main import main
from dansm.scale.studies import theory
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from support import noise_image

import dansm

RESULTS = Path(__file__).parents[2] / "results"
PAGE = " ".join((RESULTS / "theory" / "README.md").read_text().replace("−", "-").split())
RECORD = json.loads((RESULTS / "theory" / "theory.json").read_text())
OF = {(row["match_size"], row["way"]): row for row in RECORD["summary"]}
PRIOR = {row["way"]: row for row in RECORD["prior"]}


def load(*path):
    return json.loads(RESULTS.joinpath(*path).read_text())


# ------------------------------------------------------------------------------- the page


def spread(found: dict, digits: int, scale: float = 100) -> str:
    return f"{scale * found['mean']:.{digits}f} ± {scale * found['std']:.{digits}f}"


def listed(*parts: str) -> str:
    return ", ".join(parts[:-1]) + " and " + parts[-1]


def row_of_table(size: int) -> str:
    gain = {way: f"{spread(OF[size, way]['gain'], 2)} %" for way in theory.WAYS}
    share = {way: f" ({OF[size, way]['share_of_optimal']['mean']:.0%})".replace("%", " %") for way in theory.WAYS}
    last = {way: f"{spread(OF[size, way]['quarter_4'], 2)} %" for way in theory.WAYS}
    return (f"| {size:,} | {gain['squared']}{share['squared']} | {gain['inner']}{share['inner']} | {gain['optimal']} "
            f"| {last['squared']} | {last['inner']} |")


def first_and_last(way: str) -> list[str]:
    """The variance of noises along the images' first direction, in the first and the last quarter of 4,000."""
    return [spread(OF[4000, way][f"first_variance_{i}"], 2, 1) for i in (1, 4)]


def phrases_of_the_record() -> list[str]:
    growth = {row["pairs"]: row["over_random"] for row in load("foundations", "paths-cifar10.json")["summary"][1:]}
    assert list(growth) == ["matched, 100", "matched, 1,000", "matched, 10,000"]

    def grown(measure):
        return listed(*(spread({**row[measure], "mean": abs(row[measure]["mean"])}, 2) for row in growth.values()))

    digits = load("digits", "digits.json")["runs"]

    random, greedy = ([run for run in digits if run["method"] == method] for method in ("random", "greedy"))
    shorter = 1 - fmean(run["path_length"] for run in greedy) / fmean(run["path_length"] for run in random)
    two_steps = [fmean(run["distance"]["2"] for run in runs) for runs in (random, greedy)]
    data, matched, at_random, pool = RECORD["data"], OF[1000, "squared"], OF[1, "random"], PRIOR["matched"]
    return [
        f"make paths {grown('path_length')} % shorter",
        f"their mean distance {grown('inter_path_mean')} % longer",
        f"that to the nearest {grown('inter_path_minimum')} %",
        f"its noises is {spread(PRIOR['nearest']['first_variance'], 2, 1)} (k = {RECORD['nearest_of']:,})",
        f"their mean square {spread(PRIOR['nearest']['mean_square'], 4, 1)}",
        f"hands out {spread(pool['first_variance'], 3, 1)} and {spread(pool['mean_square'], 4, 1)}",
        *(row_of_table(size) for size in theory.MATCH_SIZES),
        f"a variance of {first_and_last('inner')[0]}, the last {first_and_last('inner')[1]} (squared: "
        f"{' and '.join(first_and_last('squared'))}; optimal: {' and '.join(first_and_last('optimal'))})",
        f"about {data['squared_norm']:.0f} + {data['numbers']:,} and",
        f"0 ± 2‖x‖ = {2 * data['squared_norm'] ** 0.5:.0f}",
        f"would save {spread(OF[1000, 'free']['gain'], 2)} %",
        f"{data['share_of_first_direction']:.0%} of their variance".replace("%", " %"),
        f"correlated {spread(matched['first_correlation'], 3, 1)}",
        f"{spread(matched['first_crossing'], 1)} % cross along it",
        f"{spread(at_random['first_crossing'], 1)} % at random",
        f"a linear guess, {spread(matched['explained'], 1)} % of the images' variance",
        f"(pools of 100 and 4,000: {spread(OF[100, 'squared']['explained'], 1)} and "
        f"{spread(OF[4000, 'squared']['explained'], 1)} %)",
        f"random ones {spread(at_random['explained'], 2)} %",
        f"paths are {shorter:.1%}".replace("%", " %") + " shorter",
        f"from {two_steps[0]:.2f} to {two_steps[1]:.2f}",
        f"the {data['images']:,} images of CIFAR-10 ({data['numbers']:,} numbers each)",
    ]


def test_the_page_says_what_the_record_says():
    missing = [phrase for phrase in phrases_of_the_record() if phrase not in PAGE]
    assert not missing


def test_no_measured_number_of_the_page_is_from_elsewhere():
    rest = PAGE
    for phrase in phrases_of_the_record():
        rest = rest.replace(phrase, "")
    assert re.findall(r"\d+\.\d+|[\d.]+ ?%", rest) == []


def test_what_the_page_says_in_words_holds_in_every_draw():
    rows = {(row["draw"], row["match_size"], row["way"]): row for row in RECORD["rows"]}
    for draw in range(RECORD["draws"]):
        assert rows[draw, 1000, "squared"]["gain"] > rows[draw, 100, "optimal"]["gain"]
        for size in theory.MATCH_SIZES:
            assert rows[draw, size, "squared"]["gain"] < rows[draw, size, "inner"]["gain"]
            assert rows[draw, size, "squared"]["quarter_4"] < rows[draw, size, "inner"]["quarter_4"]
            first, last = ([rows[draw, size, way][f"first_variance_{i}"] for way in ("inner", "squared", "optimal")]
                           for i in (1, 4))
            assert first == sorted(first, reverse=True) and last == sorted(last)
    same = {row["way"]: row["the_noises_drawn"] for row in RECORD["prior_rows"]}
    assert same == {"drawn": True, "matched": True, "nearest": False}
    data = RECORD["data"]
    short = (PRIOR["drawn"]["mean_square"]["mean"] - PRIOR["nearest"]["mean_square"]["mean"]) * data["numbers"]
    saved = OF[1000, "free"]["gain"]["mean"] * (data["squared_norm"] + data["numbers"])
    assert short > saved / 2


def test_the_page_and_its_figure_are_small():
    assert (RESULTS / "theory" / "theory.png").stat().st_size < 200_000
    assert len((RESULTS / "theory" / "README.md").read_text().splitlines()) <= 65


# ------------------------------------------------------------------------------- the formulas


@given(st.integers(0, 2**31 - 1), st.integers(1, 6))
def test_the_closed_form_is_the_least_over_dense_times(seed, dim):
    x, z = torch.randn(2, 2, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).unbind()
    u, v = z[0] - z[1], x[0] - x[1]
    t = torch.linspace(0, 1, 20_001, dtype=torch.float64)[:, None]
    distances = ((1 - t) * u + t * v).norm(dim=1)
    at = (u @ (u - v) / (u - v).square().sum()).clamp(0, 1)
    closed = ((1 - at) * u + at * v).norm().item()
    assert distances.min() - 1e-3 <= closed <= distances.min() + 1e-12
    assert inter_path_distance(x, z).mean == pytest.approx(closed, abs=1e-7)  # a root near 0


@given(st.integers(0, 2**31 - 1), st.integers(1, 6))
def test_of_two_pairings_the_shorter_is_farther_apart_at_every_time(seed, dim):
    x, z = torch.randn(2, 2, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).unbind()
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


@pytest.fixture(scope="module")
def result(small):
    return theory.measure(small, draws=2, match_sizes=(4, 40, 200), nearest_of=30)


def test_the_measured_ways_are_ordered_as_they_must_be(result):
    of = {(row["draw"], row["match_size"], row["way"]): row for row in result["rows"]}
    for draw, size in itertools.product(range(2), (4, 40, 200)):
        gain = {way: of[draw, size, way]["gain"] for way in (*theory.WAYS, "free")}
        assert 0 < gain["squared"] <= gain["optimal"] + 1e-6 and 0 < gain["inner"] <= gain["optimal"] + 1e-6
        assert gain["optimal"] <= gain["free"] + 1e-6
        assert of[draw, size, "optimal"]["share_of_optimal"] == 1
    assert of[0, 200, "squared"]["first_crossing"] < of[0, 1, "random"]["first_crossing"] - 0.1


def test_gains_are_those_of_all_pairings_of_a_pool(small):
    x, z = theory.draw_ends(small, 8, 0)
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


def test_greedy_of_the_page_is_the_pool(small):
    """The same noises from a NoisePool that draws the page's."""
    x, z = theory.draw_ends(small, 40, 0)

    class Given(dansm.NoisePool):
        def _draw(self, number, chunk, ours):
            return ours.copy_(z[20 * (number - 1) % 40 :][:20])

    for cost in dansm.COSTS:
        assert Given(20, (12,), cost=cost, seed=0)(x).equal(theory.match_in_pools(x, z, 20, cost))


def test_only_the_nearest_of_many_bends_the_prior(result):
    same = {row["way"]: row["the_noises_drawn"] for row in result["prior_rows"]}
    assert same == {"drawn": True, "matched": True, "nearest": False}
    variance = {row["way"]: row["first_variance"]["mean"] for row in result["prior"]}
    assert variance["matched"] == pytest.approx(variance["drawn"])
    assert abs(variance["nearest"] - variance["drawn"]) > 0.1


def test_crossing_counts_pairs_that_change_sides():
    order = torch.arange(20.0)
    assert theory.crossing(order, order) == 0
    assert theory.crossing(order, -order) == 1
    assert theory.crossing(torch.tensor([0.0, 1, 2]), torch.tensor([0.0, 2, 1])) == pytest.approx(1 / 3)


def test_a_linear_guess_explains_what_it_can():
    z = torch.randn(5000, 3, generator=torch.Generator().manual_seed(0))
    x = z * torch.tensor([3.0, 0.0, 0.0]) + torch.randn(5000, 3, generator=torch.Generator().manual_seed(1))
    found = theory.spread_along(x, z, torch.eye(3))
    assert found["explained"] == pytest.approx(9 / 12, abs=0.02)
    assert found["first_correlation"] == pytest.approx((9 / 10) ** 0.5, abs=0.01)


def test_the_command_refuses_fewer_images_than_a_pool_has_noises(capsys, tmp_path):
    noise_image(4, 4, seed=1).save(tmp_path / "1.png")
    with pytest.raises(SystemExit) as ended:
        main(["theory", "--data", str(tmp_path), "--out", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "holds 1 image: expected at least 4,000" in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_more_images_than_the_memory_holds_are_refused(monkeypatch):
    monkeypatch.setattr(theory, "load_images", lambda source: torch.zeros(10, 3, 4, 4, dtype=torch.uint8))
    monkeypatch.setattr(dansm, "free_memory", lambda device: 10_000)
    with pytest.raises(dansm.BadInput, match="--data is x, 10 images of 48 numbers: that needs"):
        theory.load_pixels("x")


def test_the_command_measures(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(theory, "load_pixels", lambda source: torch.rand(4000, 12) * 2 - 1)
    monkeypatch.setattr(theory, "MATCH_SIZES", (20, 40, 80))
    measured = theory.measure
    monkeypatch.setattr(theory, "measure", lambda x, draws: measured(x, draws, (20, 40, 80), nearest_of=30))
    with pytest.raises(SystemExit) as ended:
        main(["theory", "--data", "d", "--draws", "2", "--out", str(tmp_path)])
    assert ended.value.code == 0
    assert {row["draw"] for row in json.loads((tmp_path / "theory.json").read_text())["rows"]} == {0, 1}


def test_a_folder_of_images_is_read_and_the_results_are_written(result, tmp_path):
    (tmp_path / "images").mkdir()
    noise_image(4, 4, seed=1).save(tmp_path / "images" / "1.png")
    pixels = theory.load_pixels(str(tmp_path / "images"))
    assert pixels.shape == (1, 48) and pixels.abs().max() <= 1
    theory.write(result, tmp_path)
    assert json.loads((tmp_path / "theory.json").read_text()) == result
    assert len((tmp_path / "theory.csv").read_text().splitlines()) == len(result["rows"]) + 1
    assert Image.open(tmp_path / "theory.png").width == pytest.approx(3.4 * 200, abs=1)
