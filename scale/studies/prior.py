"""Whether the noises that a way of pairing hands to training still are N(0, I), which sampling starts from."""

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

import dansm

FEWEST = 32  # noises that are tested
AT_ONCE = 4096  # least number of noises whose products are summed at once


class Way(NamedTuple):
    """A way of pairing. part: of every pool's life, from its first sample to its last."""

    name: str
    method: str
    match_size: int
    part: tuple[float, float] = (0.0, 1.0)
    tf32: bool = False


WAYS = [Way("random pairs", "random", 0), Way("pool of 10,000", "greedy", 10_000),
        Way("pool of 10,000, its first quarter alone", "greedy", 10_000, (0.0, 0.25)),
        Way("pool of 10,000, its last quarter alone", "greedy", 10_000, (0.75, 1.0)),
        Way("pool of 100,000", "greedy", 100_000),
        Way("assignment within batches of 256", "optimal", 256), Way("nearest of 16", "nearest", 16)]
ON_A_GPU = [Way("pool of 1,000,000", "greedy", 1_000_000, tf32=True),
            Way("pool of 1,000,000, its first quarter alone", "greedy", 1_000_000, (0.0, 0.25), tf32=True)]


def prior(images: Tensor, ways: Iterable[Way] = WAYS, seed: int = 0) -> Iterator[dict]:
    """A row for each way: `tests_of` the noises it pairs with images (N, ...). Pools smaller than N must divide it."""
    for way in ways:
        yield {"way": way.name, **tests_of(paired(images, way, seed))}


def paired(images: Tensor, way: Way, seed: int) -> Iterator[Tensor]:
    """The noises (B, D) of each batch that belong to the part, of one for each image or of a whole pool. The images are
    in order in the first epoch, then shuffled."""
    pool = dansm.NoisePool(way.match_size if way.method == "greedy" else 0, images.shape[1:], cost="squared",
                           device=images.device, seed=seed, tf32=way.tf32)
    count = max(len(images), way.match_size)
    numbers = torch.Generator().manual_seed(seed)
    epochs = [torch.randperm(len(images), generator=numbers) for _ in range(count // len(images))]
    order = torch.cat([torch.arange(len(images)), *epochs])[:count]
    first, last = (round(share * way.match_size) for share in way.part)
    ages = torch.arange(count, device=images.device) % max(1, way.match_size)
    kept = (first <= ages) & (ages < max(1, last))
    batches = (images[rows.to(images.device)] for rows in order.split(250))
    begin = 0
    for _, z in dansm.pairs(batches, way.method, way.match_size, pool=pool):
        yield z.flatten(1)[kept[begin : begin + len(z)]]
        begin += len(z)


def tests_of(parts: Iterable[Tensor]) -> dict[str, float]:
    """How far N noises, parts (B, D) each, depart from N(0, I).

    For each test the probability that noises drawn from N(0, I) depart as far:
    size_p        of ‖z‖², whose distribution is χ² with D degrees of freedom (Kolmogorov and Smirnov)
    mean_p        of the D means: N Σ mean² is χ² with D degrees of freedom
    variance_p    of the D variances, which are normal around 1 with variance 2/N
    covariance_p  of all D(D + 1)/2 covariances (Ledoit and Wolf 2002: valid for any ratio of D to N)
    and the sizes themselves: mean_size (√ of the mean square), largest_mean, mean_variance.
    """
    from scipy import stats

    sizes, total, squares, products = [], 0, 0, 0
    wide = isinstance(parts, list) and len(parts) == 1 and len(parts[0]) < parts[0].shape[1]
    for z in _joined(parts):
        exact = z.double()
        sizes.append(exact.square().sum(1))
        total = total + exact.sum(0)
        squares = squares + exact.square().sum(0)
        products = _squared_products(z) if wide else products + (z.T @ z).double()
    size = torch.cat(sizes)
    count, numbers = len(size), len(total)
    mean, variance = total / count, squares / count
    squared = products if wide else products.square().sum().item()
    normal = _ledoit_wolf(squares.sum().item() / count, squared / count**2, numbers, count)
    chi2 = stats.chi2(numbers)

    def two_sided(distribution, value):
        return min(1.0, 2 * min(distribution.cdf(value), distribution.sf(value)))

    return {"noises": count, "size_p": stats.kstest(size.cpu().numpy(), chi2.cdf).pvalue,
            "mean_p": two_sided(chi2, count * mean.square().sum().item()),
            "variance_p": two_sided(chi2, (count / 2 * (variance - 1).square()).sum().item()),
            "covariance_p": two_sided(stats.norm(), normal),
            "mean_size": math.sqrt(size.mean().item() / numbers), "largest_mean": mean.abs().max().item(),
            "mean_variance": variance.mean().item()}


def worst_p(sets: Iterable[Tensor]) -> float | None:
    """The least probability that any test of `tests_of` finds for any set of noises (N, D), times the number of all
    these tests, at most 1 (Bonferroni): noises from N(0, I) have less than 0.05 in one of twenty cases at most. Sets
    of fewer than FEWEST noises are passed over, as their variances are not near normal; None if all are."""
    found = [tests_of([z]) for z in sets if len(z) >= FEWEST]
    p = [value for tests in found for name, value in tests.items() if name.endswith("_p")]
    return min(1.0, len(p) * min(p)) if p else None


def _joined(parts: Iterable[Tensor]) -> Iterator[Tensor]:
    """The rows of all parts, AT_ONCE or more at a time."""
    waiting = []
    for part in parts:
        waiting.append(part)
        if sum(map(len, waiting)) >= AT_ONCE:
            yield torch.cat(waiting)
            waiting = []
    if waiting:
        yield torch.cat(waiting)


def _squared_products(z: Tensor) -> float:
    """Σ ⟨z_i, z_j⟩² over all pairs of noises z: (N, D), which is that of the squares of zᵀz: (D, D)."""
    return sum((some @ z.T).square().sum(dtype=torch.float64).item() for some in z.split(AT_ONCE))


def _ledoit_wolf(trace: float, squared: float, numbers: int, count: int) -> float:
    """A number that is standard normal if the covariance (D, D) of `count` noises of mean zero is the identity, by its
    trace, the sum of its squares, and D."""
    mean = trace / numbers
    apart = squared / numbers - 2 * mean + 1
    w = apart - numbers / count * mean**2 + numbers / count
    return (count * w - numbers - 1) / 2
