"""Whether the noises that a way of pairing hands to training are N(0, I) still, as sampling takes them to be."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from scipy import stats
from torch import Tensor

import dansm

AT_ONCE = 4096  # noises whose products are summed at once


class Way(NamedTuple):
    name: str
    method: str
    match_size: int
    part: tuple[float, float] = (0.0, 1.0)  # of every pool, from its first sample to its last
    tf32: bool = False


WAYS = [Way("random pairs", "random", 0), Way("pool of 10,000", "greedy", 10_000),
        Way("pool of 10,000, its first quarter alone", "greedy", 10_000, (0.0, 0.25)),
        Way("pool of 10,000, its last quarter alone", "greedy", 10_000, (0.75, 1.0)),
        Way("pool of 100,000", "greedy", 100_000),
        Way("assignment within batches of 256", "optimal", 256), Way("nearest of 16", "nearest", 16)]
ON_A_GPU = [Way("pool of 1,000,000", "greedy", 1_000_000, tf32=True),
            Way("pool of 1,000,000, its first quarter alone", "greedy", 1_000_000, (0.0, 0.25), tf32=True)]


def prior(images: Tensor, ways: Iterable[Way] = WAYS, *, seed: int = 0,
          advance: Callable[[int], None] = lambda noises: None) -> Iterator[dict]:
    """A row for each way: the tests of `tests_of` on the noises that it pairs with images (N, ...), in [−1, 1]. N is to
    be a multiple of each smaller match_size, so that pools are whole; a larger pool is emptied by epochs of them.
    advance: told of each batch, how many noises it took."""
    for way in ways:
        used = paired(images, way, seed, advance)
        if way.part != (0.0, 1.0):
            used = within(used, *(round(share * way.match_size) for share in way.part), way.match_size)
        yield {"way": way.name, **tests_of(used)}


def count_of_noises(images: Tensor, way: Way) -> int:
    """How many a way is tried on: one for each image, or a whole pool."""
    return max(len(images), way.match_size)


def paired(images: Tensor, way: Way, seed: int, advance: Callable[[int], None]) -> Iterator[Tensor]:
    """The noises (B, D) of each batch. Images come in another order each epoch."""
    pool = dansm.NoisePool(way.match_size if way.method == "greedy" else 0, images.shape[1:], device=images.device,
                           seed=seed, tf32=way.tf32)
    drawn, count = torch.Generator().manual_seed(seed), count_of_noises(images, way)
    order = [torch.arange(len(images))]
    order += [torch.randperm(len(images), generator=drawn) for _ in range(count // len(images))]
    batches = (images[some.to(images.device)] for some in torch.cat(order)[:count].split(250))
    for _, z in dansm.pairs(batches, way.method, way.match_size, pool=pool):
        advance(len(z))
        yield z.flatten(1)


def within(parts: Iterable[Tensor], first: int, last: int, every: int) -> Iterator[Tensor]:
    """Of rows that are counted over all parts those whose number, modulo `every`, lies in [first, last)."""
    count = 0
    for part in parts:
        age = (count + torch.arange(len(part), device=part.device)) % every
        count += len(part)
        yield part[(first <= age) & (age < last)]


def tests_of(parts: Iterable[Tensor]) -> dict[str, float]:
    """parts: (B, D) each, N rows in all. The chance that N noises drawn from N(0, I) depart as far from it, one for
    each test; and their own numbers, to see by how much.

    size_p        of ‖z‖², whose distribution is χ² of D degrees of freedom (Kolmogorov and Smirnov)
    mean_p        of the D means: N Σ mean² is χ² of D
    variance_p    of the D variances, which are normal around 1 with 2/N
    covariance_p  of all D(D + 1)/2 covariances (Ledoit and Wolf 2002: valid for any ratio of D to N)
    """
    sizes, total, squares, products = [], 0, 0, 0
    for z in _gathered(parts):
        exact = z.double()
        sizes.append(exact.square().sum(1))
        total, squares, products = total + exact.sum(0), squares + exact.square().sum(0), products + (z.T @ z).double()
    size = torch.cat(sizes)
    count, numbers = len(size), len(total)
    mean, variance = total / count, squares / count
    of_variances = (count / 2 * (variance - 1).square()).sum().item()
    return {"noises": count, "size_p": stats.kstest(size.cpu().numpy(), stats.chi2(numbers).cdf).pvalue,
            "mean_p": _two_sided(stats.chi2(numbers), count * mean.square().sum().item()),
            "variance_p": _two_sided(stats.chi2(numbers), of_variances),
            "covariance_p": _two_sided(stats.norm(), _ledoit_wolf(products / count, count)),
            "mean_size": math.sqrt(size.mean().item() / numbers), "largest_mean": mean.abs().max().item(),
            "mean_variance": variance.mean().item()}


def _gathered(parts: Iterable[Tensor]) -> Iterator[Tensor]:
    """AT_ONCE rows or more at a time, as far as there are."""
    waiting = []
    for part in parts:
        waiting.append(part)
        if sum(map(len, waiting)) >= AT_ONCE:
            yield torch.cat(waiting)
            waiting = []
    if waiting:
        yield torch.cat(waiting)


def _two_sided(distribution, value: float) -> float:
    return min(1.0, 2 * min(distribution.cdf(value), distribution.sf(value)))


def _ledoit_wolf(covariance: Tensor, count: int) -> float:
    """A number that is standard normal if the covariance (D, D) of `count` noises of mean zero is the identity's."""
    numbers = len(covariance)
    trace = covariance.trace().item() / numbers
    apart = covariance.square().sum().item() / numbers - 2 * trace + 1
    w = apart - numbers / count * trace**2 + numbers / count
    return (count * w - numbers - 1) / 2
