"""The pools of all groups in a batch, matched by the same launches of the kernels."""

import math
from functools import partial
from itertools import chain
from operator import itemgetter

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ..base.launch import on
from . import kernels
from .groups import FastGroupedPool, moved
from .kernels import COLUMNS, KernelPool

Part = tuple[KernelPool, int, int]  # a pool, where its samples begin in the order by group, and their count
TILE = tl.constexpr(64)  # samples, noises and their numbers that are multiplied together


@triton.jit(do_not_specialize=["units"])
def _multiply(products, x, noise, table, units, UNIT: tl.constexpr, PRECISION: tl.constexpr):
    """The products of all groups: a program for TILE noises and TILE samples of one, of units · UNIT numbers each.
    x and noise begin at multiples of 16 bytes and their rows at multiples of UNIT numbers, so loads take up to 16 bytes
    at a time. (On a kernel's own arguments Triton ignores tl.multiple_of.)"""
    row = table + COLUMNS * tl.program_id(2)
    left, first, samples = tl.load(row + 5).to(tl.int32), tl.load(row + 6).to(tl.int32), tl.load(row + 7).to(tl.int32)
    i, j = tl.program_id(1) * TILE + tl.arange(0, TILE), tl.program_id(0) * TILE + tl.arange(0, TILE)
    if (tl.program_id(1) * TILE >= samples) | (tl.program_id(0) * TILE >= left):
        return
    noise = tl.multiple_of(tl.load(row).to(noise.dtype), 16)
    sample = tl.load(table + COLUMNS * tl.num_programs(2) + first + i, mask=i < samples, other=0)
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

    def _match_groups(self, x: Tensor, labels: np.ndarray, coming: list[int]) -> Tensor:
        if self.match_size <= 1:  # which "auto" may have chosen
            return super()._match_groups(x, labels, coming)
        samples = x.detach().reshape(len(x), self.noise.shape[1]).to(self.noise).contiguous()
        samples = samples.clone() if samples.data_ptr() % 16 else samples  # `_multiply` loads 16 bytes at a time
        z = samples.new_empty(samples.shape)
        at_once = self._samples_at_once(self.rows)
        with on(samples.device):
            for begin in range(0, len(x), at_once):
                part = labels[begin : begin + at_once]
                order = begin + part.argsort(kind="stable")
                counts = np.bincount(part, minlength=self.groups)[coming]
                waiting = [(self.pools[group], end - count, count)
                           for group, end, count in zip(coming, counts.cumsum().tolist(), counts.tolist(), strict=True)
                           if count]
                while waiting:
                    waiting = self._serve_groups(samples, z, order, waiting)
        return z.view(x.shape).to(x)

    def _serve_groups(self, x: Tensor, z: Tensor, order: np.ndarray, waiting: list[Part]) -> list[Part]:
        """Match the samples of each group that its pool has noises for. Returns those that wait for the next pool."""
        for pool, _, _ in waiting:
            if pool.left == 0:
                pool._refill()
        now = [(pool, first, min(samples, pool._at_most(pool.left))) for pool, first, samples in waiting]
        later = [(pool, first + served, samples - served)
                 for (pool, first, samples), (_, _, served) in zip(waiting, now, strict=True) if samples > served]
        take(self, x, z, order, now)
        for pool, first, samples in now:
            if pool.prices and pool.prices.missing:
                pool._learn(x[moved(order[first : first + samples], x.device)])
            pool._draw_ahead()
        return later


def take(grouped: KernelGroupedPool, x: Tensor, z: Tensor, order: np.ndarray, parts: list[Part]) -> None:
    """Match samples of x: (B, D) → the same rows of z: (B, D). order: the numbers of at most 256 samples; parts: pools
    with enough noises left. x begins at a multiple of 16 bytes."""
    wide = kernels.in_lines(grouped.rows)
    rows = [(pool.noise.data_ptr(), pool.own.data_ptr(), pool.index.data_ptr(), pool.place.data_ptr(),
             first * wide, pool.left, first, samples) for pool, first, samples in parts]
    rows.sort(key=itemgetter(5))  # those with few noises left first
    in_turn = sum(row[5] <= kernels.FEW for row in rows)
    most, samples = rows[-1][5], max(row[7] for row in rows)
    table = moved(np.concatenate([np.fromiter(chain.from_iterable(rows), np.int64), order]), x.device)
    memory = kernels.scratch(grouped, x, len(order) * wide)
    unit = math.gcd(x.shape[1], TILE.value)
    grid = -(-most // TILE.value), -(-samples // TILE.value), len(parts)
    kernels.fast_launch(_multiply, grid, x, (memory[0], x, parts[0][0].noise, table, x.shape[1] // unit),
                        (unit, "tf32" if grouped.tf32 else "tf32x3"), warps=4)
    kernels.choose(z, parts[0][0], grouped.data_check.found, memory, samples, most, in_turn, table, len(parts))
    for pool, _, samples in parts:
        pool.left -= samples


def together(pools: list[KernelPool], x: Tensor) -> Tensor:
    """`kernels.one_by_one` by the same launches."""
    samples = x.repeat(len(pools), 1)
    z = torch.empty_like(samples)
    take(pools[0], samples, z, np.arange(len(samples)), [(pool, i * len(x), len(x)) for i, pool in enumerate(pools)])
    return z


try_out = partial(kernels.try_out, match=together)
