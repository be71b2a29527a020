"""The pools of all groups in a batch, matched by the same launches of the kernels."""

from functools import partial
from itertools import chain

import torch
from torch import Tensor

from ..base.launch import on
from . import kernels
from .groups import FastGroupedPool, by_group, moved
from .kernels import KernelPool
from .products import multiplied, undisturbed


class KernelGroupedPool(FastGroupedPool, KernelPool):
    """`FastGroupedPool` on a GPU: a batch costs a matrix product for each group, and one launch of each kernel."""

    kind = KernelPool

    def _match_groups(self, x: Tensor, labels: list[int], coming: list[int]) -> Tensor:
        samples = x.detach().reshape(len(x), self.noise.shape[1]).to(self.noise)
        z = samples.new_empty(samples.shape)
        at_once = self._samples_at_once(self.rows)
        with on(samples.device):
            for first in range(0, len(x), at_once):
                members = by_group(labels[first : first + at_once], coming, first)
                waiting = [(self.pools[group], numbers) for group, numbers in members.items() if numbers]
                while waiting:
                    waiting = self._serve_groups(samples, z, waiting)
        return z.view(x.shape).to(x)

    def _serve_groups(self, x: Tensor, z: Tensor, waiting: list[tuple[KernelPool, list[int]]]) -> list:
        """Match the samples of each group that its pool has noises for. Returns those that wait for the next pool."""
        for pool, _ in waiting:
            if pool.left == 0:
                pool._refill()
        now = [(pool, numbers[: pool.left]) for pool, numbers in waiting]
        later = [(pool, numbers[pool.left :]) for pool, numbers in waiting if len(numbers) > pool.left]
        take(self, x, z, now)
        for pool, _ in now:
            pool._draw_ahead()
        return later


def take(grouped: KernelGroupedPool, x: Tensor, z: Tensor, parts: list[tuple[KernelPool, list[int]]]) -> None:
    """Match samples of x: (B, D) → the same rows of z: (B, D). parts: a pool with enough noises left, and the numbers
    of its samples; 256 in all."""
    parts = sorted(parts, key=lambda part: part[0].left > kernels.FEW)
    table, order, begin = [], [], 0
    for pool, numbers in parts:
        addresses = (kept.data_ptr() for kept in (pool.noise, pool.squared, pool.index, pool.place))
        table.append((*addresses, begin, pool.left, len(order), len(numbers)))
        begin += len(numbers) * kernels.in_lines(pool.left)
        order += numbers
    told = moved([*chain(*table), *order], x.device)
    order = told[kernels.COLUMNS.value * len(table) :]
    samples = x.index_select(0, order)
    memory = kernels.scratch(grouped, x, len(order) * kernels.in_lines(grouped.rows))
    with undisturbed(x, grouped.tf32):
        for (pool, _), (*_, begin, left, first, count) in zip(parts, table, strict=True):
            wide = kernels.in_lines(left)
            out = memory[0].as_strided((count, wide), (wide, 1), begin)
            multiplied(samples[first : first + count], pool.noise[:wide], out)
    kernels.choose(z, parts[0][0], grouped.data_check.found, memory, max(row[-1] for row in table),
                   max(pool.left for pool, _ in parts), sum(pool.left <= kernels.FEW for pool, _ in parts), told, order,
                   len(parts))
    for pool, numbers in parts:
        pool.left -= len(numbers)


def together(pools: list[KernelPool], x: Tensor) -> Tensor:
    """`kernels.one_by_one` by the same launches."""
    samples = x.repeat(len(pools), 1)
    z = torch.empty_like(samples)
    numbers = torch.arange(len(samples)).split(len(x))
    take(pools[0], samples, z, [(pool, of_pool.tolist()) for pool, of_pool in zip(pools, numbers, strict=True)])
    return z


try_out = partial(kernels.try_out, match=together)
