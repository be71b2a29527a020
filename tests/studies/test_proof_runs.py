"""What dansm proof makes of known curves, in its summary and in its figures."""

import math

import numpy as np
import pytest

from dansm.scale.studies import proof_figures
from dansm.scale.studies.proof_runs import MATCHED, images_to, summarize


def rows_by(distance, name, seeds=1, images=(256_000, 512_000, 1_024_000, 2_048_000)):
    return [dict(run=name, seed=seed, images=each, seconds=each / 1000, steps=3, distance=distance(each, seed),
                 real=1.0, features="inception", data="some", gpu="none") for seed in range(seeds) for each in images]


def test_what_is_saved_is_read_off_curves_that_are_known():
    """Distances fall with the root of the images. What is as good after n images as random pairs after 1.6 n has saved
    37.5 %."""
    rows = rows_by(lambda n, _: n**-0.5, "random") + rows_by(lambda n, _: (1.6 * n) ** -0.5, "greedy-10000")
    found = {row["images"]: row for row in summarize(rows)}
    for images in (256_000, 512_000, 1_024_000):
        assert found[images]["images_random"] == pytest.approx(1.6 * images, rel=1e-6)
        assert found[images]["saved"] == pytest.approx(1 - 1 / 1.6, abs=1e-3)
        assert found[images]["of_random"] == pytest.approx(1.6**-0.5, abs=1e-4)
    assert found[2_048_000]["saved"] is None  # random pairs do not come so far
    assert [row["ratio"] for row in found.values()] == pytest.approx([1, 1.6, 1.6, 1.6], abs=1e-3)
    assert [row["at_least"] for row in found.values()] == [True, False, False, False]  # was nearer from the first on
    assert found[512_000]["images_ours"] == pytest.approx(320_000, rel=1e-5)
    worse = rows_by(lambda n, _: n**-0.5, "random") + rows_by(lambda n, _: (n / 2) ** -0.5, "greedy-10000")
    assert [row["saved"] for row in summarize(worse)] == [None, -1.0, -1.0, -1.0]
    assert [row["ratio"] for row in summarize(worse)] == [0.5, 0.5, 0.5, None]


def test_seeds_give_means_and_spreads():
    factor = (1.0, 1.1, 1.2)
    rows = rows_by(lambda n, seed: factor[seed] * n**-0.5, "random", 3) + rows_by(
        lambda n, seed: factor[seed] * (1.6 * n) ** -0.5, "greedy-10000", 3)
    row = next(row for row in summarize(rows) if row["images"] == 512_000)
    assert row["seeds"] == 3
    assert row["random"] == pytest.approx(1.1 * 512_000**-0.5, abs=1e-3)
    assert row["saved"] == pytest.approx(0.375, abs=1e-3)
    assert row["least_saved"] == pytest.approx(1 - (1.2 / 1.0) ** 2 / 1.6, abs=1e-3)
    assert row["most_saved"] == pytest.approx(1 - (1.0 / 1.2) ** 2 / 1.6, abs=1e-3)
    assert row["ratio"] == pytest.approx(1.6, abs=1e-3) and not row["at_least"]  # as one pair alone is
    assert row["least_ratio"] == pytest.approx(1.6 / 1.2**2, abs=1e-3) and row["most_ratio"] == 2.0


def test_seeds_that_are_under_way_count_as_far_as_both_have_come():
    """One whole seed of each, and a second begun: behind its end, what the first says stands, alone. Nor does a seed
    count that only one of the two has."""
    some = (256_000, 512_000)
    whole = rows_by(lambda n, _: n**-0.5, "random") + rows_by(lambda n, _: (1.6 * n) ** -0.5, "greedy-10000")
    begun = [{**row, "seed": 1, "distance": 3 * row["distance"]} for row in whole if row["images"] in some]
    alone = [{**row, "seed": 2, "distance": 9.0} for row in whole if row["run"] == "random"]
    found, of_one = summarize(whole + begun + alone), summarize(whole)
    assert [row["seeds"] for row in found] == [2, 2, 1, 1] and found[2:] == of_one[2:]
    mean = [2 * row["distance"] for row in of_one[:2]]
    assert [row["distance"] for row in found[:2]] == pytest.approx(mean, abs=2e-3)
    assert [row["of_random"] for row in found[:2]] == [row["of_random"] for row in of_one[:2]]
    assert found[1]["images_ours"] == of_one[1]["images_ours"] and found[1]["spread"] > 0


def test_a_seed_evaluated_at_its_end_alone_does_not_hide_how_few_images_others_need():
    rows = rows_by(lambda n, _: n**-0.5, "random", 2) + rows_by(lambda n, _: (1.6 * n) ** -0.5, "semidiscrete", 2)
    late = [row for row in rows if row["run"] == "random" or row["seed"] == 0 or row["images"] == 2_048_000]
    (whole, found) = (next(row for row in summarize(some) if row["images"] == 2_048_000) for some in (rows, late))
    assert found == whole and found["seeds"] == 2 and found["ratio"] == pytest.approx(1.6, abs=1e-3)


def test_a_range_is_that_of_all_pairs_of_seeds_or_none():
    """After 1,024,000 images the second seed is lower than random pairs ever come: there is no range then."""
    factor = (1.0, 0.5)
    rows = rows_by(lambda n, _: n**-0.5, "random", 2) + rows_by(
        lambda n, seed: factor[seed] * (1.2 * n) ** -0.5, "greedy-10000", 2)
    found = {row["images"]: row for row in summarize(rows)}
    assert found[256_000]["least_saved"] == pytest.approx(1 - 1 / 1.2, abs=1e-3)
    assert found[256_000]["most_saved"] == pytest.approx(1 - 1 / 4.8, abs=1e-3)
    assert found[256_000]["least_saved"] < found[256_000]["saved"] < found[256_000]["most_saved"]
    assert found[1_024_000]["least_saved"] is None is found[1_024_000]["most_saved"]


def test_a_curve_that_never_comes_so_near_has_no_images():
    falling = {100: 4.0, 200: 2.0, 400: 1.0}
    assert images_to(2.0, falling) == pytest.approx(200)
    assert images_to(math.sqrt(8), falling) == pytest.approx(100 * math.sqrt(2))
    assert images_to(0.5, falling) is None and images_to(5.0, falling) is None


def test_a_line_is_of_the_seeds_that_came_farthest_and_its_band_of_all():
    some = (256_000, 512_000)
    rows = rows_by(lambda n, _: 8e6 / n, "random") + [
        {**row, "seed": 1} for row in rows_by(lambda n, _: 4e6 / n, "random", images=some)]
    axes, = proof_figures.draw_curves(rows, proof_figures.LOOKS).axes
    line, = axes.lines
    assert list(line.get_ydata()) == [8e6 / images for images in (256_000, 512_000, 1_024_000, 2_048_000)]
    corners = axes.collections[0].get_paths()[0].vertices
    assert {round(x * 1e6) for x, _ in corners} == set(some)  # where there is one alone, there is no band
    assert {round(y, 6) for _, y in corners} == {round(each / images, 6) for each in (8e6, 4e6) for images in some}


def test_the_lower_panels_show_the_share_of_images_and_leave_hollow_what_is_at_most():
    """A quarter of random pairs' distance is a quarter of the images; before the first mark nobody has looked."""
    rows = rows_by(lambda n, _: 8e6 / n, "random") + rows_by(lambda n, _: 2e6 / n, MATCHED)
    above, below = proof_figures.draw_curves(rows, proof_figures.LOOKS).axes
    assert len(above.lines) == 2
    equal, line, hollow, *_ = [line for line in below.lines if len(line.get_xdata())]
    assert list(equal.get_ydata()) == [1, 1] and list(line.get_ydata())[2:] == pytest.approx([0.25, 0.25])
    assert list(line.get_xdata()) == [0.256, 0.512, 1.024, 2.048] and np.isnan(line.get_ydata()[:2]).all()
    assert hollow.get_markerfacecolor() == "white"
    assert (list(hollow.get_xdata()), list(hollow.get_ydata())) == ([0.512], [0.5])  # at the first mark it is no news


def test_what_is_not_reached_by_each_seed_ends_at_the_top_edge():
    rows = rows_by(lambda n, _: 4e6 / n, "random", 2) + rows_by(lambda n, seed: (2e6, 5e6)[seed] / n, MATCHED, 2)
    row = next(row for row in summarize(rows) if row["images"] == 2_048_000)
    assert row["ratio"] > 1 and row["least_ratio"] is None  # the mean is there before, the second seed never
    below = proof_figures.draw_curves(rows, proof_figures.LOOKS).axes[1]
    *_, rising, edge = [line for line in below.lines if len(line.get_xdata())]
    assert list(rising.get_xdata()) == [2.048, 2.048] and list(edge.get_xdata()) == [2.048]
    assert rising.get_ydata()[1] == edge.get_ydata()[0] == below.get_ylim()[1] > 1


def test_the_ratio_of_each_run_is_to_random_pairs_of_its_own_batch():
    known = {"random": 9.0, "batch8-random": 4.0, "batch8-assigned": 3.0}
    rows = [row for name in known for row in rows_by(lambda *_, name=name: known[name], name, images=(512_000,))]
    assert proof_figures.ratios_of(rows, "batch8-assigned", None) == {3: [0.75]}
    assert proof_figures.ratios_of(rows, "random", 512_000) == {3: [1.0]}
    seeds = rows_by(lambda _, seed: (2.0, 4.0)[seed], "random", 2) + rows_by(lambda _, seed: 2.0, "greedy-10000", 3)
    assert proof_figures.ratios_of(seeds, "greedy-10000", 512_000) == {3: [1.0, 0.5]}  # each by its own seed's


def test_minutes_are_those_of_the_images_at_the_runs_rate_on_one_card():
    rows = rows_by(lambda n, _: 1.0, "random", 2, images=(256_000,)) + rows_by(lambda n, _: 1.0, "nearest-16", 1)
    speeds = [dict(run=name, gpu=gpu, images_per_second=rate) for name, gpu, rate in (
        ("random", "another", 1.0), ("random", "A", 12800.0), ("greedy-1000", "A", 5.0))]
    found, card = proof_figures.at_their_rate(rows, speeds)
    assert card == "A" and [(row["run"], row["seed"], row["seconds"]) for row in found] == [
        ("random", 0, 20.0), ("random", 1, 20.0)]
    assert proof_figures.at_their_rate(rows, []) == ([], "")


def test_the_proof_of_nothing_draws_nothing(tmp_path):
    assert proof_figures.draw([], [], tmp_path) == [] and not list(tmp_path.iterdir())
