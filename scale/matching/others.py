"""Couplings to compare the pool with: the nearest of k fresh noises, and linear assignment in `dansm.pairs`."""

from collections import deque
from collections.abc import Iterator
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from dansm import (
    COSTS,
    BadInput,
    NoisePool,
    Semidiscrete,
    at_least_float32,
    check_batch,
    check_choice,
    check_count,
    check_labels,
    check_sides,
    check_tensor,
    cost_matrix,
    costs_from,
    members_of,
    parts_of,
    rows,
)

from ..base.assignment import assign
from .gpu import working

SMALL = 100  # noises up to which the CPU is faster than the auction


class Assignment(NamedTuple):
    """A pairing, and a bound that proves how good it is."""

    picks: Tensor  # (B,) int64, the noise of each sample
    total: float  # Σ cost[i, picks[i]]
    bound: float  # no pairing costs less; equal to total where the pairing is optimal


def optimal(cost: Tensor, gap: float = 1e-3) -> Assignment:
    """Linear assignment: the pairing of least total cost. cost: (B, M), B ≤ M, finite.

    On the CPU it is exact but for float64's rounding (lapx, or scipy without it). On a GPU and for M > 100 an auction
    runs until total − bound is at most `gap` of what the pairing saves over a random one, or float32 prices end.
    """
    check_sides(cost)
    cost = at_least_float32(cost.detach())
    slow = cost.is_cuda and len(cost) and cost.shape[1] > SMALL
    if slow and (kernels := working("auction", cost.device)):
        return Assignment(*kernels.auction(cost, gap))
    picks = assign(cost.cpu()).to(cost.device)
    total = cost.gather(1, picks[:, None]).sum(dtype=torch.float64).item()
    return Assignment(picks, total, total)


def nearest_of_k(x: Tensor, k: int, cost: str = "squared", generator: torch.Generator | None = None) -> Tensor:
    """Draw k fresh noises for each sample and keep the nearest. x: (B, ...) → z: (B, ...).

    It needs no pool but changes the prior: the other k − 1 noises are thrown away, so the noises trained on crowd
    where the data is, while sampling still starts from N(0, I).
    """
    check_count("k", k)
    check_choice("cost", cost, COSTS)
    flat = rows(x).detach().float()
    nearest = torch.empty_like(flat)
    block = max(1, 2**24 // (k * flat.shape[1]))  # samples at a time, so that their noises take about 64 MB
    for samples, out in zip(flat.split(block), nearest.split(block), strict=True):
        z = torch.randn(len(samples), k, flat.shape[1], device=x.device, generator=generator)
        scores = torch.einsum("bkd,bd->bk", z, samples)
        costs = costs_from(scores, COSTS[cost](z.flatten(0, 1)).view(scores.shape))
        out.copy_(z[torch.arange(len(samples), device=x.device), costs.argmin(1)])
    return nearest.view(x.shape).to(x)


def pairs_to_compare(batches: Iterator, method: str, match_size: int, cost: str | None, seed: int | None,
                     pool: NoisePool | None, groups: int | None) -> Iterator[tuple[Tensor, ...]]:
    """`dansm.pairs` by "optimal", "nearest" or "semidiscrete". The pool is asked for fresh noises alone."""
    if method == "semidiscrete":
        if pool is not None:
            raise BadInput("a pool is given: expected none for semidiscrete pairs, which use no pool")
        yield from _semidiscrete_pairs(list(batches), seed, groups)
        return
    cost = cost if cost in COSTS else "squared"  # prices are of a pool
    for batch in batches:
        x, *labels = parts_of(batch)
        if pool is None:
            check_tensor(x)
            pool = NoisePool(0, x.shape[1:], cost=cost, device=x.device, seed=seed)
        if method == "optimal":
            yield from _optimal_pairs(chain([batch], batches), match_size, cost, pool, groups)  # takes all that is left
        else:
            pool.check(x)
            if groups is not None:
                check_labels(labels[0] if labels else None, len(x), groups)
            yield x, nearest_of_k(x, match_size, cost, pool.generator), *labels


def _semidiscrete_pairs(batches: list, seed: int | None, groups: int | None) -> Iterator[tuple[Tensor, ...]]:
    """Batches of the same sizes, from the samples of all: each comes as often as noises take it."""
    labelled = bool(batches) and len(parts_of(batches[0])) == 2
    for batch in batches:
        x, *labels = parts_of(batch)
        check_tensor(x)
        check_batch(x, parts_of(batches[0])[0].shape[1:])
        if labelled or labels or groups is not None:
            check_labels(labels[0] if labels else None, len(x), groups or 2**31)
    if not batches:
        return
    data, *labels = (torch.cat(parts) for parts in zip(*map(parts_of, batches), strict=True))
    coupling = Semidiscrete(data, None if groups is None else labels[0], seed=seed)
    coupling.solve()
    for batch in batches:
        z, taken = coupling.draw(len(parts_of(batch)[0]))
        yield data[taken], z.to(data), *(of_all[taken.to(of_all.device)] for of_all in labels)


def _optimal_pairs(batches: Iterator, match_size: int, cost: str, pool: NoisePool,
                   groups: int | None) -> Iterator[tuple[Tensor, ...]]:
    """Collect match_size samples, over several batches if need be, and assign as many noises to them, within each
    group if there are any. What is left at the end is assigned within itself."""
    waiting = deque()  # the batches that are not handed out yet
    x = torch.empty(0, *pool.shape, device=pool.noise.device)  # their samples
    group = torch.empty(0, dtype=torch.int64)  # of each of these
    z = x[:0]  # the noises of the first len(z) of them
    for batch in chain(batches, [None]):  # None: no more batches, match what is left
        if batch is not None:
            data, *labels = parts_of(batch)
            pool.check(data)
            waiting.append((data, labels))
            x = torch.cat([x, data.detach().to(x)])
            of_data = torch.zeros(len(data), dtype=torch.int64)
            if groups is not None:
                of_data = check_labels(labels[0] if labels else None, len(data), groups).cpu()
            group = torch.cat([group, of_data])
        least = 1 if batch is None else match_size
        while len(x) - len(z) >= least:
            now = slice(len(z), len(z) + match_size)
            z = torch.cat([z, _assigned(x[now], group[now], cost, pool, groups or 1)])
        while waiting and len(z) >= len(waiting[0][0]):
            data, labels = waiting.popleft()
            yield data, z[: len(data)].to(data), *labels
            x, group, z = x[len(data) :], group[len(data) :], z[len(data) :]


def _assigned(x: Tensor, group: Tensor, cost: str, pool: NoisePool, groups: int) -> Tensor:
    """Fresh noises for x: (B, ...), assigned to the samples of each group (B,) by themselves."""
    noise, picks = pool.fresh(x), torch.arange(len(x))
    of_groups = members_of(group, len(x), groups).values()
    few = x.is_cuda and len(x) <= 1024 and all(len(members) <= SMALL for members in of_groups)
    costs = cost_matrix(x, noise, cost).cpu() if few else None  # one wait for a GPU, not one for each group
    for members in of_groups:
        own = costs[members][:, members] if few else cost_matrix(x[members], noise[members], cost)
        picks[members] = members[optimal(own).picks.cpu()]
    return noise[picks.to(x.device)]
