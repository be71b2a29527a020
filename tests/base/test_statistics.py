"""Spreads, crossings, distances of paths and of features: against brute force, a known value, or the textbook."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from dansm import BadInput
from dansm.scale.base.statistics import (
    crossing_lines,
    frechet_distance,
    inter_path_distance,
    mean_and_std,
    squared_distances,
)

# ------------------------------------------------------------------------------- spreads and crossings


def test_mean_and_std_are_the_textbooks():
    assert mean_and_std([1, 2, 6]) == pytest.approx({"mean": 3.0, "std": math.sqrt(7)})
    assert mean_and_std(torch.tensor([4.0])) == {"mean": 4.0, "std": 0.0}


def test_lines_cross_where_each_has_the_ends_of_the_other_on_different_sides():
    a = torch.tensor([[0.0, 0.0], [0.0, 2.0], [5.0, 5.0]])
    b = torch.tensor([[2.0, 2.0], [2.0, 0.0], [6.0, 9.0]])
    crossing = crossing_lines(a, b)
    assert crossing.tolist() == [[False, True, False], [True, False, False], [False, False, False]]


def test_crossings_are_those_that_solving_for_the_meeting_point_finds():
    a, b = torch.randn(60, 2, dtype=torch.float64), torch.randn(60, 2, dtype=torch.float64)
    crossing = crossing_lines(a, b)
    for i in range(60):
        for j in range(i):
            sides = torch.stack([b[i] - a[i], a[j] - b[j]], 1)
            s, t = torch.linalg.solve(sides, a[j] - a[i])
            assert crossing[i, j] == crossing[j, i] == (0 < s < 1 and 0 < t < 1)


def test_squared_distances_are_those_of_a_loop():
    a, b = torch.randn(5, 2, 3, dtype=torch.float64), torch.randn(7, 2, 3, dtype=torch.float64)
    expected = torch.tensor([[(x - y).square().sum() for y in b] for x in a], dtype=torch.float64)
    torch.testing.assert_close(squared_distances(a, b), expected)


# ------------------------------------------------------------------------------- distances of paths


def brute_force(x, z, times=4001):
    """All pairs at all times of a fine grid: least distance and its time, (N, N) each, nothing on the diagonal."""
    x, z = x.flatten(1).double(), z.flatten(1).double()
    least = torch.full((len(x), len(x)), torch.inf, dtype=torch.float64)
    at = torch.zeros_like(least)
    for t in torch.linspace(0, 1, times, dtype=torch.float64):
        points = t * x + (1 - t) * z
        distance = (points[:, None] - points[None]).norm(dim=2)
        better = distance < least
        least[better], at[better] = distance[better], t
    return least, at


def brute_force_measures(x, z):
    least, at = brute_force(x, z)
    pairs = torch.triu_indices(len(x), len(x), 1)
    least.fill_diagonal_(torch.inf)
    minimum, other = least.min(1)
    return {
        "mean": least[pairs[0], pairs[1]].mean().item(),
        "mean_t": at[pairs[0], pairs[1]].mean().item(),
        "minimum": minimum.mean().item(),
        "minimum_t": at.gather(1, other[:, None]).mean().item(),
    }


SHAPES = [((12, 2), 1.0), ((9, 3, 2, 2), 1.0), ((12, 2), 5.0), ((2, 5), 1.0), ((30, 40), 0.1)]


@pytest.mark.parametrize(("shape", "spread"), SHAPES)
@pytest.mark.parametrize("block", [1, 4, 1024])
def test_inter_path_distance_is_the_least_over_a_fine_grid_of_times(shape, spread, block):
    x, z = spread * torch.randn(shape) + 0.3, torch.randn(shape)
    measured = inter_path_distance(x, z, block)
    for name, expected in brute_force_measures(x, z).items():
        assert getattr(measured, name) == pytest.approx(expected, abs=2e-3), name


@pytest.mark.parametrize("block", [1, 3, 16, 49, 50, 51])
def test_the_size_of_a_block_changes_nothing(block):
    x, z = torch.randn(50, 7), torch.randn(50, 7)
    assert vars(inter_path_distance(x, z, block)) == pytest.approx(vars(inter_path_distance(x, z)), rel=1e-10)


def test_two_paths_that_cross_are_0_apart_where_they_cross():
    """From (0, 0) to (4, 4), and from (4, 0) to (0, 4): at half time both are at (2, 2)."""
    x, z = torch.tensor([[4.0, 4.0], [0.0, 4.0]]), torch.tensor([[0.0, 0.0], [4.0, 0.0]])
    measured = inter_path_distance(x, z)
    assert (measured.mean, measured.minimum) == pytest.approx((0, 0), abs=1e-9)
    assert (measured.mean_t, measured.minimum_t) == (0.5, 0.5)


def test_paths_nearest_at_an_end_are_measured_at_that_end():
    apart = torch.tensor([[-3.0], [3.0]])
    near = torch.tensor([[-1.0], [1.0]])
    assert vars(inter_path_distance(near, apart)) == dict(mean=2, mean_t=1, minimum=2, minimum_t=1)
    assert vars(inter_path_distance(apart, near)) == dict(mean=2, mean_t=0, minimum=2, minimum_t=0)


@pytest.mark.parametrize("block", [2, 1024])
def test_parallel_paths_are_as_far_apart_as_their_ends(block):
    z = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 8.0]])
    measured = inter_path_distance(z + torch.tensor([7.0, -2.0]), z, block)
    assert measured.mean == pytest.approx((5 + 8 + 5) / 3)
    assert measured.minimum == pytest.approx(5)
    assert 0 <= measured.mean_t <= 1


def test_parallel_paths_with_rounded_ends_still_have_their_distance():
    z = torch.arange(8.0).view(4, 2) / 3
    measured = inter_path_distance(z + 0.1, z)  # ‖U − V‖² is rounding, of either sign
    apart = math.hypot(2 / 3, 2 / 3)
    assert measured.mean == pytest.approx(apart * (3 * 1 + 2 * 2 + 3) / 6, rel=1e-5)
    assert measured.minimum == pytest.approx(apart, rel=1e-5)


def test_equal_paths_are_0_apart():
    x, z = torch.randn(1, 5).expand(4, 5), torch.randn(1, 5).expand(4, 5)
    measured = inter_path_distance(x, z)
    assert (measured.mean, measured.minimum) == pytest.approx((0, 0), abs=1e-6)


@pytest.mark.parametrize("shapes", [((1, 3), (1, 3)), ((0, 3), (0, 3)), ((4, 3), (4, 2)), ((4, 3), (5, 3))])
def test_too_few_paths_and_unequal_ends_are_refused_naming_the_shapes(shapes):
    with pytest.raises(BadInput) as refused:
        inter_path_distance(torch.zeros(shapes[0]), torch.zeros(shapes[1]))
    assert all(str(shape) in str(refused.value) for shape in shapes)


def test_inter_path_distance_keeps_to_its_blocks_whatever_the_number_of_paths():
    """All pairs at once would take 1,500² numbers for each of a dozen matrices, 18 MB each."""
    most = []
    for paths in (512, 1500):
        x, z = torch.randn(paths, 256), torch.randn(paths, 256)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiled:
            inter_path_distance(x, z, 256)
        events = profiled.profiler.kineto_results.events()
        most.append(int(np.cumsum([event.nbytes() for event in events if event.name() == "[memory]"]).max()))
    assert most[1] < most[0] + 2**17 < 100 * 256**2 + 64 * 256 * 256


# ------------------------------------------------------------------------------- Fréchet distance


def features(count, dim, seed):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, dtype=torch.float64, generator=generator) / math.sqrt(dim)
    mix += torch.eye(dim, dtype=torch.float64)
    return torch.randn(count, dim, dtype=torch.float64, generator=generator) @ mix + seed / 10


def textbook(a, b):
    """The distance by the root of AB in the directions in which A is not 0, where B is not 0 either."""
    covariance_a, covariance_b = torch.cov(a.T), torch.cov(b.T)
    values, directions = torch.linalg.eigh(covariance_a)
    directions = directions[:, values > 1e-9 * values.max()]
    root = sqrtm((directions.T @ covariance_a @ covariance_b @ directions).numpy()).real.trace()
    shift = a.mean(0) - b.mean(0)
    return (shift @ shift + covariance_a.trace() + covariance_b.trace() - 2 * root).item()


@pytest.mark.parametrize(("count", "others", "dim", "rank"), [
    (500, 507, 2, 2), (500, 507, 10, 10), (900, 907, 64, 64), (65, 64, 63, 63), (20, 60, 100, 100), (20, 900, 100, 100),
    (300, 900, 64, 5), (20, 900, 64, 5)])
def test_frechet_distance_is_the_textbooks(count, others, dim, rank):
    """Also where a set has fewer samples than features, or features that do not vary: its covariance is singular."""
    a, b = features(count, dim, 1), features(others, dim, 2)
    a[:, rank:] = 0.5
    assert frechet_distance(a, b) == pytest.approx(textbook(a, b), rel=1e-8)
    assert frechet_distance(b, a) == pytest.approx(textbook(a, b), rel=1e-8)


@pytest.mark.parametrize(("count", "dim"), [(500, 10), (20, 100), (2, 3)])
def test_a_set_is_0_from_itself_and_a_shifted_one_the_square_of_the_shift(count, dim):
    """Also with fewer samples than features, where the covariance is singular."""
    a = features(count, dim, 3)
    shift = torch.linspace(-1, 1, dim, dtype=torch.float64)
    assert 0 <= frechet_distance(a, a) < 1e-10
    assert 0 <= frechet_distance(a, a[torch.randperm(count)]) < 1e-10
    assert frechet_distance(a, a + shift) == pytest.approx(shift.square().sum().item(), rel=1e-10)


def test_frechet_distance_of_a_widened_set():
    """Covariances A and 9A: tr(A + 9A − 2·3A) = 4 tr A."""
    for a in (features(500, 10, 4), features(12, 40, 4)):
        centred = a - a.mean(0)
        assert frechet_distance(centred, 3 * centred) == pytest.approx(4 * torch.cov(a.T).trace().item(), rel=1e-6)


def test_frechet_distance_of_sets_on_crossed_lines():
    """Singular covariances with nothing in common: the root of their product is 0 and only the traces stay."""
    t = torch.randn(50, 1, dtype=torch.float64)
    a, b = torch.cat([t, 0 * t], 1), torch.cat([0 * t, 2 * t], 1)
    a, b = a - a.mean(0), b - b.mean(0)
    assert frechet_distance(a, b) == pytest.approx(5 * t.var().item(), rel=1e-6)


def test_frechet_distance_flattens_images_and_takes_any_float():
    a, b = features(100, 12, 5), features(100, 12, 6)
    expected = frechet_distance(a, b)
    assert frechet_distance(a.view(100, 3, 2, 2), b.view(100, 3, 2, 2)) == expected
    assert frechet_distance(a.float(), b.float()) == pytest.approx(expected, rel=1e-5)


class OnAppleGPU(torch.Tensor):
    """As a tensor there: float64 it cannot be."""

    def double(self):
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype")

    def cpu(self):
        return self.as_subclass(torch.Tensor)


def test_frechet_distance_of_features_on_an_apple_gpu():
    a, b = torch.randn(20, 3), torch.randn(20, 3)
    assert frechet_distance(*(x.as_subclass(OnAppleGPU) for x in (a, b))) == frechet_distance(a, b)


def test_frechet_distance_of_one_feature():
    """Of two one-dimensional Gaussians: the squares of the differences of mean and of deviation."""
    a, b = torch.randn(50, 1, dtype=torch.float64), 3 + 2 * torch.randn(60, 1, dtype=torch.float64)
    expected = (a.mean() - b.mean()) ** 2 + (a.std() - b.std()) ** 2
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-8)


@pytest.mark.parametrize("shapes", [((1, 3), (9, 3)), ((9, 3), (9, 4)), ((0, 3), (9, 3))])
@pytest.mark.filterwarnings("ignore")
def test_frechet_distance_refuses_what_has_no_covariance(shapes):
    with pytest.raises(BadInput):
        frechet_distance(torch.zeros(shapes[0]), torch.zeros(shapes[1]))
