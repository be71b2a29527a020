"""The pools of all groups in a batch, matched by the same launches of the kernels."""

import math
from functools import partial
from itertools import chain

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..base.launch import on
from . import kernels
from .groups import FastGroupedPool, by_group, moved
from .kernels import COLUMNS, KernelPool

TILE = tl.constexpr(64)  # samples, noises and their numbers that are multiplied together


@triton.jit(do_not_specialize=["units"])
def _multiply(products, x, noise, table, order, units, UNIT: tl.constexpr, PRECISION: tl.constexpr):
    """The products of all groups: a program for TILE noises and TILE samples of one, of units · UNIT numbers each.
    x and noise begin at multiples of 16 bytes and their rows at multiples of UNIT numbers, so loads take up to 16 bytes
    at a time. (On a kernel's own arguments Triton ignores tl.multiple_of.)"""
    row = table + COLUMNS * tl.program_id(2)
    left, first, samples = tl.load(row + 5).to(tl.int32), tl.load(row + 6).to(tl.int32), tl.load(row + 7).to(tl.int32)
    i, j = tl.program_id(1) * TILE + tl.arange(0, TILE), tl.program_id(0) * TILE + tl.arange(0, TILE)
    if (tl.program_id(1) * TILE >= samples) | (tl.program_id(0) * TILE >= left):
        return
    noise = tl.multiple_of(tl.load(row).to(noise.dtype), 16)
    sample = tl.load(order + first + i, mask=i < samples, other=0)
    width = units * UNIT
    k = tl.arange(0, TILE)
    a = x + sample[:, None] * width + k[None, :]
    b = noise + tl.minimum(j, left - 1).to(tl.int64)[None, :] * width + k[:, None]
    total = tl.zeros([TILE, TILE], products.dtype.element_ty)
    for start in range(0, width, TILE):
        there = start + k < width
        some, others = tl.load(a, mask=there[None, :], other=0.0), tl.load(b, mask=there[:, None], other=0.0)
        total = tl.dot(some, others, total, input_precision=PRECISION)
        a += TILE
        b += TILE
    out = products + tl.load(row + 4) + i[:, None] * (tl.cdiv(left, 16) * 16) + j[None, :]
    tl.store(out, total, mask=(i < samples)[:, None] & (j < left)[None, :])


class KernelGroupedPool(FastGroupedPool, KernelPool):
    """`FastGroupedPool` on a GPU: a batch costs one launch of each kernel, products included, whatever the groups.

    Products of float32 are sums of three in tf32 (PRECISION "tf32x3"), as exact as the library's in float32.
    """

    kind = KernelPool

    def _match_groups(self, x: Tensor, labels: list[int], coming: list[int]) -> Tensor:
        samples = x.detach().reshape(len(x), self.noise.shape[1]).to(self.noise).contiguous()
        samples = samples.clone() if samples.data_ptr() % 16 else samples  # `_multiply` loads 16 bytes at a time
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
    of its samples; 256 in all. x begins at a multiple of 16 bytes."""
    parts = sorted(parts, key=lambda part: part[0].left > kernels.FEW)
    table, order, begin = [], [], 0
    for pool, numbers in parts:
        addresses = (kept.data_ptr() for kept in (pool.noise, pool.squared, pool.index, pool.place))
        table.append((*addresses, begin, pool.left, len(order), len(numbers)))
        begin += len(numbers) * kernels.in_lines(pool.left)
        order += numbers
    told = moved([*chain(*table), *order], x.device)
    order = told[COLUMNS.value * len(table) :]
    memory = kernels.scratch(grouped, x, len(order) * kernels.in_lines(grouped.rows))
    most, samples, width = max(pool.left for pool, _ in parts), max(row[-1] for row in table), x.shape[1]
    grid = triton.cdiv(most, TILE.value), triton.cdiv(samples, TILE.value), len(parts)
    unit = math.gcd(width, TILE.value)
    kernels.fast_launch(_multiply, grid, x, (memory[0], x, parts[0][0].noise, told, order, width // unit),
                    (unit, "tf32" if grouped.tf32 else "tf32x3"), warps=4)
    kernels.choose(z, parts[0][0], grouped.data_check.found, memory, samples, most,
                   sum(pool.left <= kernels.FEW for pool, _ in parts), told, order, len(parts))
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
