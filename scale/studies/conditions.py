"""How much the noises of a coupling tell about the classes of their samples: docs/conditions.md."""

import math
from collections.abc import Iterator
from contextlib import closing
from itertools import islice

import numpy as np
import torch
from torch import Tensor

import dansm

from ..base.statistics import told_class
from ..base.text import with_bar
from ..data import loader
from .pairs import SERVED_AT_ONCE
from .prior import worst_p

ASSIGNED, NEAREST_OF = 1000, 16  # match_size of the couplings that a pool is compared with
MOST_BYTES = 2**30  # of the noises that are probed together


def couplings(match_size: int, classes: int) -> dict[str, dict]:
    """Arguments of `dansm.pairs` by name. The pools for each class have together as many noises as the one pool, unless
    that leaves each a single one, which would give random pairs."""
    each, assigned = max(1, match_size // classes), min(match_size, ASSIGNED)
    ways = {"random pairs": dict(method="random"),
            f"one pool of {match_size:,}": dict(method="greedy", match_size=match_size),
            f"a pool of {each:,} for each class": dict(method="greedy", match_size=each, groups=classes),
            f"assigned within {assigned:,}": dict(method="optimal", match_size=assigned),
            f"assigned within {assigned:,}, by class": dict(method="optimal", match_size=assigned, groups=classes),
            f"nearest of {NEAREST_OF}": dict(method="nearest", match_size=NEAREST_OF)}
    return {name: settings for name, settings in ways.items() if settings.get("match_size") != 1}


def probed(images) -> int:
    """How many of the images (N, C, H, W) `leakage` takes: all, or those whose noises MOST_BYTES hold."""
    return min(len(images), max(1, MOST_BYTES // (4 * math.prod(images.shape[1:]))))


def leakage(images, labels: np.ndarray, match_size: int, *, seed: int, device: torch.device | str) -> Iterator[dict]:
    """A row of `measure_leak` for each coupling, over one pass of the data in random order, or what 1 GB holds of it.

    images      (N, C, H, W) as `loader.batches` takes them
    labels      (N,)
    match_size  of the pool; `probed(images)` if that is less, as a pool is measured to its end
    """
    count = probed(images)
    batch = min(SERVED_AT_ONCE, count)
    ways = couplings(min(match_size, count), int(labels.max()) + 1)
    for name, settings in with_bar(ways.items(), "pairing by class"):
        with closing(loader.batches(images, batch, seed=seed, flip=False, device=device, labels=labels)) as batches:
            pairs = dansm.pairs(batches, **settings, cost="squared", seed=seed)
            z, classes = zip(*((z.flatten(1), of_z) for _, z, of_z in islice(pairs, -(-count // batch))), strict=True)
        pool = {name: settings.get(name) for name in ("match_size", "groups")} if settings["method"] == "greedy" else {}
        leak = measure_leak(torch.cat(z)[:count], torch.cat(classes)[:count], **pool)
        yield {"coupling": name, "seed": seed, **leak}


def measure_leak(z: Tensor, labels: Tensor, match_size: int | None = None, groups: int | None = None) -> dict:
    """How far noises z: (N, D), in the order handed out, depend on their classes (N,) and on the age of their pool.
    Without pools, match_size None, N noises count as one.

    class_told          see `told_class`
    class_mean_largest  ‖mean of a class's noises‖ over √(D / its size), which is what the mean of noises from N(0, I)
                        has: 1 is no shift. The largest of the classes; class_mean_average is their average
    size_first_quarter  ‖z‖²/D in the first quarter, rounded up, of a pool's life, and size_last_quarter in its last;
                        N(0, I) has 1
    """
    of_class = dansm.members_of(labels, len(z), int(labels.max()) + 1)
    shifts = torch.stack([z[members.to(z.device)].mean(0).norm() * math.sqrt(len(members) / z.shape[1])
                          for members in of_class.values()])
    age = torch.empty(len(z), dtype=torch.int64)
    life = match_size or len(z)
    for members in of_class.values() if groups else [torch.arange(len(z))]:
        age[members] = torch.arange(len(members)) % life
    sizes, quarter = z.square().mean(1).cpu(), math.ceil(life / 4)
    first, last = sizes[age < quarter], sizes[age >= life - quarter]
    return {"class_told": told_class(z, labels), "class_mean_largest": shifts.max().item(),
            "class_mean_average": shifts.mean().item(), "size_first_quarter": first.mean().item(),
            "size_last_quarter": last.mean().item()}


def class_means(x: Tensor, labels: Tensor) -> Tensor:
    """The direction in which the mean of each class lies from the mean of these, (classes, D), of length 1. x: (N, D),
    labels: (N,) from 0, each class with a sample."""
    members = dansm.members_of(labels, len(x), int(labels.max()) + 1).values()
    means = torch.stack([x[of_class.to(x.device)].mean(0) for of_class in members])
    return torch.nn.functional.normalize(means - means.mean(0))


def class_p(z: Tensor, labels: Tensor, directions: Tensor) -> float:
    """The probability that noises from N(0, I) within each class depart from it as far. z: (N, D), labels: (N,).

    It is twice the lesser (Bonferroni) of two: `worst_p` of the classes, which looks everywhere and so sees large
    departures alone; and that of the classes' mean noises along their `class_means`, where couplings shift them: in
    standard errors their squares add up to χ² with a degree of freedom for each class.
    """
    from scipy import stats

    members = {number: of_class.to(z.device) for number, of_class in dansm.members_of(
        labels, len(z), len(directions)).items()}
    shifts = torch.stack([z[of_class].mean(0) @ directions[number] * math.sqrt(len(of_class))
                          for number, of_class in members.items()])
    along = stats.chi2(len(members)).sf(shifts.square().sum().item())
    anywhere = worst_p(z[of_class] for of_class in members.values())
    return min(1.0, 2 * min(along, 1.0 if anywhere is None else anywhere))
