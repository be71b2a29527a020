"""Lengths, nearest noises and straightness of paths: against a loop, a known value, or the textbook's formula."""

import math

import pytest
import torch

from dansm import path_length
from dansm.scale.base.statistics import own_noise_nearest, straightness

# ------------------------------------------------------------------------------- lengths and nearest noises


def test_path_length_is_the_mean_distance():
    x, z = torch.randn(6, 2, 3), torch.randn(6, 2, 3)
    expected = sum(math.dist(a.flatten().tolist(), b.flatten().tolist()) for a, b in zip(x, z, strict=True)) / 6
    assert path_length(x, z) == pytest.approx(expected, rel=1e-5)


def test_pairs_of_other_shapes_have_no_length():
    with pytest.raises(RuntimeError, match="size of tensor"):
        path_length(torch.zeros(2, 3, 8, 8), torch.zeros(2, 8, 8, 3))


def test_own_noise_nearest_is_the_share_of_samples_whose_own_noise_is_nearest():
    z = torch.tensor([[0.0], [10.0], [20.0], [30.0]])
    assert own_noise_nearest(z + 1, z) == 1
    assert own_noise_nearest(z.flip(0), z) == 0
    assert own_noise_nearest(torch.tensor([[1.0], [2.0], [19.0], [-5.0]]), z) == 0.5


@pytest.mark.parametrize("shift", [0, 0.5, 2])
def test_own_noise_nearest_is_what_a_loop_counts(shift):
    z = torch.randn(40, 2, 3)
    x = shift * z + torch.randn(40, 2, 3)
    own = 0
    for i in range(40):
        distances = [math.dist(x[i].flatten().tolist(), noise.flatten().tolist()) for noise in z]
        own += distances.index(min(distances)) == i
    assert own_noise_nearest(x, z) == own / 40


# ------------------------------------------------------------------------------- straightness


def test_a_straight_path_at_even_speed_has_straightness_0():
    z, x = torch.randn(5, 2, 3), torch.randn(5, 2, 3)
    path = torch.stack([z + (x - z) * i / 8 for i in range(9)])
    assert straightness(path) == pytest.approx(0, abs=1e-10)
    assert straightness(torch.stack([z, x])) == pytest.approx(0, abs=1e-12)


def test_a_right_angle_has_straightness_1():
    """One step along each axis: velocities (2, 0) and (0, 2), the line (1, 1): both 2 off, and 2 is its square."""
    path = torch.tensor([[[0.0, 0.0]], [[1.0, 0.0]], [[1.0, 1.0]]])
    assert straightness(path) == pytest.approx(1)
    assert straightness(7 * path + 3) == pytest.approx(1)  # neither size nor place matters


def test_straightness_of_a_half_circle():
    """Speed π along an arc, line 2: the mean of π² − 2·(mean velocity)·line + line², over line², is π²/4 − 1."""
    angle = torch.linspace(0, math.pi, 2001, dtype=torch.float64)
    path = torch.stack([angle.cos(), angle.sin()], 1)[:, None]
    assert straightness(path) == pytest.approx(math.pi**2 / 4 - 1, rel=1e-4)


def test_straightness_is_the_mean_over_the_samples():
    bent = torch.tensor([[[0.0, 0.0]], [[1.0, 0.0]], [[1.0, 1.0]]])
    straight = torch.tensor([[[0.0, 0.0]], [[9.0, 9.0]], [[18.0, 18.0]]])
    assert straightness(torch.cat([bent, straight], 1)) == pytest.approx(0.5)
