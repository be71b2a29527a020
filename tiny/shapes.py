"""The 2D targets: functions (n, generator) → (n, 2) float32, mean 0 and variance about 1 as the noise has."""

import math

import torch
from torch import Tensor


def eight_gaussians(n: int, generator: torch.Generator) -> Tensor:
    """Eight round blobs on a circle."""
    angle = torch.randint(8, (n,), generator=generator) * (math.pi / 4)
    return 1.4 * _on_circle(angle) + 0.12 * torch.randn(n, 2, generator=generator)


def two_moons(n: int, generator: torch.Generator) -> Tensor:
    """Two half circles that reach into each other, a little blurred."""
    return labelled_moons(n, generator)[0]


def labelled_moons(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The two moons, (n, 2), and the moon of each point, (n,) int64: 0 is the lower one, 1 the upper one."""
    upper = torch.randint(2, (n, 1), generator=generator) * 2 - 1
    arc = _on_circle(math.pi * torch.rand(n, generator=generator))
    moons = upper * (arc - torch.tensor([0.5, 0.25]))
    points = (moons + 0.06 * torch.randn(n, 2, generator=generator)) * torch.tensor([1.15, 2.0])
    return points, (upper[:, 0] + 1) // 2


def checkerboard(n: int, generator: torch.Generator) -> Tensor:
    """The eight black fields of a 4 × 4 board, evenly filled."""
    column = torch.randint(4, (n,), generator=generator)
    row = 2 * torch.randint(2, (n,), generator=generator) + column % 2
    corner = torch.stack([column, row], 1)
    return (corner + torch.rand(n, 2, generator=generator) - 2) * 0.87  # the side is 4 fields, √12 · its deviation


def swiss_roll(n: int, generator: torch.Generator) -> Tensor:
    """One and a half turns of a spiral."""
    turn = 1.5 * math.pi * (1 + 2 * torch.rand(n, generator=generator))
    roll = turn[:, None] * _on_circle(turn) - torch.tensor([2.0, 0.1])  # its mean
    return (roll + 0.3 * torch.randn(n, 2, generator=generator)) / 6.8


def pinwheel(n: int, generator: torch.Generator) -> Tensor:
    """Five blades, each a long Gaussian that is turned more the farther out it is."""
    blade = torch.randint(5, (n,), generator=generator) * (2 * math.pi / 5)
    radial = 1 + 0.3 * torch.randn(n, generator=generator)
    across = 0.1 * torch.randn(n, generator=generator)
    turn = blade + 0.25 * torch.exp(radial)
    x, y = _on_circle(turn).unbind(1)
    return 1.33 * torch.stack([radial * x - across * y, radial * y + across * x], 1)


def _on_circle(angle: Tensor) -> Tensor:
    """angle: (n,) in radians → (n, 2)."""
    return torch.stack([angle.cos(), angle.sin()], 1)


SHAPES = {"eight-gaussians": eight_gaussians, "two-moons": two_moons, "checkerboard": checkerboard,
          "swiss-roll": swiss_roll, "pinwheel": pinwheel}
