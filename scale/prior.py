"""Whether the noises that a way of pairing hands to training are N(0, I) still, as sampling takes them to be."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from scipy import stats
from torch import Tensor

import dansm


class Way(NamedTuple):
    name: str
    method: str
    match_size: int
    part: tuple[float, float] = (0.0, 1.0)  # of every pool, from its first sample to its last


WAYS = [Way("random pairs", "random", 0), Way("pool of 10,000", "greedy", 10_000),
        Way("pool of 10,000, its first quarter alone", "greedy", 10_000, (0.0, 0.25)),
        Way("pool of 10,000, its last quarter alone", "greedy", 10_000, (0.75, 1.0)),
        Way("assignment within batches of 256", "optimal", 256), Way("nearest of 16", "nearest", 16)]


def prior(images: Tensor, ways: Iterable[Way] = WAYS, *, seed: int = 0) -> list[dict]:
    """A row for each way: the tests of `tests_of` on the noises that it pairs with images (N, ...), in [−1, 1]. N is to
    be a multiple of each pool's match_size, so that pools are whole."""
    rows = []
    for way in ways:
        used = torch.cat([z.flatten(1) for _, z in dansm.pairs(
            images.split(250), way.method, way.match_size, seed=seed)])
        if way.part != (0.0, 1.0):
            first, last = (round(share * way.match_size) for share in way.part)
            used = used.unflatten(0, (-1, way.match_size))[:, first:last].flatten(0, 1)
        rows.append({"way": way.name, "noises": len(used), **tests_of(used)})
    return rows


def tests_of(z: Tensor) -> dict[str, float]:
    """z: (N, D). The chance that N noises drawn from N(0, I) depart as far from it, one for each test; and z's own
    numbers, to see by how much.

    size_p        of ‖z‖², whose distribution is χ² of D degrees of freedom (Kolmogorov and Smirnov)
    mean_p        of the D means: N Σ mean² is χ² of D
    variance_p    of the D variances, which are normal around 1 with 2/N
    covariance_p  of all D(D + 1)/2 covariances (Ledoit and Wolf 2002: valid for any ratio of D to N)
    """
    count, numbers = z.shape
    size, mean, variance = z.double().square().sum(1), z.mean(0).double(), z.double().square().mean(0)
    of_variances = (count / 2 * (variance - 1).square()).sum().item()
    return {"size_p": stats.kstest(size.cpu().numpy(), stats.chi2(numbers).cdf).pvalue,
            "mean_p": _two_sided(stats.chi2(numbers), count * mean.square().sum().item()),
            "variance_p": _two_sided(stats.chi2(numbers), of_variances),
            "covariance_p": _two_sided(stats.norm(), _ledoit_wolf(z)),
            "mean_size": math.sqrt(size.mean().item() / numbers), "largest_mean": mean.abs().max().item(),
            "mean_variance": variance.mean().item()}


def _two_sided(distribution, value: float) -> float:
    return min(1.0, 2 * min(distribution.cdf(value), distribution.sf(value)))


def _ledoit_wolf(z: Tensor) -> float:
    """A number that is standard normal if the covariance of z: (N, D), of mean zero, is the identity."""
    count, numbers = z.shape
    covariance = torch.zeros(numbers, numbers, dtype=torch.float64, device=z.device)
    for part in z.split(4096):
        covariance += (part.T @ part).double() / count
    trace = covariance.trace().item() / numbers
    apart = covariance.square().sum().item() / numbers - 2 * trace + 1
    w = apart - numbers / count * trace**2 + numbers / count
    return (count * w - numbers - 1) / 2
