"""The pools of all groups in a batch, matched by the same launches of the kernels."""

from functools import partial

import torch
from torch import Tensor

from ..base.launch import on
from . import kernels
from .groups import FastGroupedPool, moved
from .kernels import KernelPool
from .products import multiplied, undisturbed


class KernelGroupedPool(FastGroupedPool, KernelPool):
    """`FastGroupedPool` on a GPU: a batch costs a matrix product for each group, and one launch of each kernel."""

    kind = KernelPool

    def _match_groups(self, x: Tensor, labels: Tensor, coming: list[int]) -> Tensor:
        if not coming:
            return torch.empty_like(x)
        samples = x.detach().reshape(len(x), self.noise.shape[1]).to(self.noise)
        at_once = self._samples_at_once(self.rows)
        parts = zip(samples.split(at_once), labels.split(at_once), strict=True)
        with on(samples.device):
            z = [self._serve_groups(*part) for part in parts]
        return (z[0] if len(z) == 1 else torch.cat(z)).view(x.shape).to(x)

    def _serve_groups(self, x: Tensor, labels: Tensor) -> Tensor:
        """Match x: (B, D) with B ≤ 256, sorted by group meanwhile, → (B, D)."""
        order = labels.argsort(stable=True)
        order, back = moved(torch.stack([order, order.argsort()]), x.device)
        x = x[order]
        z = torch.empty_like(x)
        groups, counts = labels.unique(return_counts=True)
        ends = counts.cumsum(0)
        waiting = [(self.pools[group], *ends) for group, *ends in
                   torch.stack([groups, ends - counts, ends], 1).tolist()]
        while waiting:
            for pool, _, _ in waiting:
                if pool.left == 0:
                    pool._refill()
            now = [(pool, first, min(end - first, pool.left)) for pool, first, end in waiting]
            take(self, x, z, now)
            waiting = [(pool, first + count, end) for (pool, first, count), (_, _, end) in
                       zip(now, waiting, strict=True) if first + count < end]
            for pool, _, count in now:
                pool.left -= count
                pool._draw_ahead()
        return z[back]


def take(grouped: KernelGroupedPool, x: Tensor, z: Tensor, parts: list[tuple[KernelPool, int, int]]) -> None:
    """Match samples of x: (B, D) → the same rows of z: (B, D), by their groups' pools.

    parts  (pool, first sample, samples): consecutive ones, no more than pool.left
    """
    parts = sorted(parts, key=lambda part: part[0].left > kernels.FEW)
    most = max(pool.left for pool, _, _ in parts)
    memory = kernels.scratch(grouped, x, len(x) * kernels.in_lines(grouped.rows))
    table, begin = [], 0
    with undisturbed(x, grouped.tf32):
        for pool, first, count in parts:
            wide = kernels.in_lines(pool.left)
            out = memory[0][begin : begin + count * wide].view(count, wide)
            multiplied(x[first : first + count], pool.noise[:wide], out)
            addresses = [kept.data_ptr() for kept in (pool.noise, pool.squared, pool.index, pool.place)]
            table.append([*addresses, begin, pool.left, first, count])
            begin += count * wide
    kernels.choose(z, parts[0][0], grouped.data_check.found, memory, max(count for _, _, count in parts), most,
                   sum(pool.left <= kernels.FEW for pool, _, _ in parts),
                   moved(torch.tensor(table), x.device), len(parts))


def together(pools: list[KernelPool], x: Tensor) -> Tensor:
    """`kernels.one_by_one` by the same launches."""
    samples = x.repeat(len(pools), 1)
    z = torch.empty_like(samples)
    take(pools[0], samples, z, [(pool, number * len(x), len(x)) for number, pool in enumerate(pools)])
    return z


try_out = partial(kernels.try_out, match=together)
