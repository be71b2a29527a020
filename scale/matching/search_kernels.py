"""Short lists for a large pool of short noises, without ever storing the costs of all noises, in Triton.

A million keys of a coarse pool have 256 million costs in a batch of 256. To write and read these takes four times as
long as to multiply. So the product and the search are one kernel, which keeps only the least cost of each SPAN of
noises. A sample's nearest noises lie in the spans of the lowest such costs, and there they are found:

    least     multiply on tensor cores; the least cost of each span, and of each tile of them, for each sample
    spans     the i + 1 lowest spans of sample i, and a few more: in them lie as many of its nearest noises
    costs     the costs in these spans again, one by one
    order     these noises in order, KEEP at most, as `kernels._choose` needs them

Tensor cores add in another order than `costs`, so both differ in the last bits, and of noises that are as near but for
these bits a sample may get any: as by the products of `kernels`, which other cards add in other orders. A list ends
where spans that are not listed have nearer noises, and where so many costs are equal that not all fit. A sample that
needs more than its list has waits for one program to look at all noises, some milliseconds.
"""

import math
from functools import cache
from types import SimpleNamespace

import torch
import triton
import triton.language as tl
from torch import Tensor

from dansm import COSTS, costs_from, greedy

from ..base.launch import compiling_ahead, on
from . import kernels
from .kernels import NOBODY, KernelPool, _dot, _tell, fast_launch
from .pool import DataCheck
from .products import products

SPAN = 16  # noises
# Samples and noises that a program multiplies at once, how many tiles of noises are on their way, and warps: the first
# that its memory holds, in the order of their speed on an H200.
BLOCKS = (128, 128, 3, 8), (256, 64, 3, 8), (128, 128, 2, 8), (128, 64, 2, 8), (64, 64, 2, 8)
SMALLEST_TILE = min(blocks[1] for blocks in BLOCKS)
SHARED = 101_376  # bytes of it where torch does not tell: the least of today's cards
SPARE = 8  # more tiles than a sample needs: as its list ends before the next span
NEAR = 512  # noises that are put in order, some for equal costs
AT_ONCE = 4  # spans whose costs a program works out
LARGEST = 2**20  # noises: a program has the least costs of all tiles at once
WIDEST = 256  # numbers of a noise: a tile of them stays in a multiprocessor's memory


class SearchPool(KernelPool):
    """`KernelPool` that searches while it multiplies, as long as more than kernels.MANY noises are left."""

    def __init__(self, *arguments, **settings):
        super().__init__(*arguments, **settings)
        self.search_scratch = None

    def __getstate__(self) -> dict:
        return super().__getstate__() | {"search_scratch": None}

    def _take(self, samples: Tensor) -> Tensor:
        if not len(samples) or not self._searches(self.left):
            self.search_scratch = None
            return super()._take(samples)
        self.scratch = None  # there is never memory for both
        samples = samples.contiguous()
        with on(samples.device):  # kernels load 16 bytes at a time
            return take(self, samples.clone() if samples.data_ptr() % 16 else samples)

    def _searches(self, left: int) -> bool:
        """Whether noises are found by a search, with so many left."""
        width = self.noise.shape[1]
        return kernels.MANY < left <= LARGEST and width <= WIDEST and width % 16 == 0

    def _costs_each(self, rows: int) -> int:
        return max(kernels.MANY, room(rows)) if self._searches(rows) else super()._costs_each(rows)


def room(rows: int) -> int:
    """How many numbers of four bytes each sample takes in `scratch`."""
    return sum(columns for columns, _ in sizes(rows))


def sizes(rows: int) -> list[tuple[int, torch.dtype]]:
    """Columns and type of each part of `scratch`."""
    spans = -(-min(rows, LARGEST) // SPAN)
    tiles = -(-spans * SPAN // SMALLEST_TILE)
    keep = kernels.KEEP[1]  # noises on a list
    most = 2 * keep  # spans that are looked at: more than hold them, as they are found by tiles
    return [(spans, torch.float32), (tiles, torch.float32), (most, torch.int32), (1, torch.float32),
            (most * SPAN, torch.float32), (most * SPAN, torch.int32), (NEAR, torch.float32), (NEAR, torch.int32),
            (keep, torch.int32), (2, torch.int32)]


def scratch(pool: SearchPool, x: Tensor) -> list[Tensor]:
    """Memory that a pool keeps between batches, for a batch of kernels.SAMPLES."""
    if pool.search_scratch is None:
        pool.search_scratch = [x.new_empty(kernels.SAMPLES, *size, dtype=dtype) for *size, dtype in sizes(pool.rows)]
    return pool.search_scratch


@cache
def card(device: torch.device) -> tuple[int, int]:
    """Multiprocessors of a GPU, and bytes of memory that a program may have in one."""
    if device.type != "cuda":
        return 2, SHARED
    found = torch.cuda.get_device_properties(device)
    return found.multi_processor_count, getattr(found, "shared_memory_per_block_optin", SHARED)


def blocks_of(samples: int, width: int, shared: int) -> tuple[int, int, int, int]:
    """The first of BLOCKS that takes so many bytes at most, with tiles of `width` numbers in bfloat16."""
    fitting = (blocks for blocks in BLOCKS if bytes_of(*blocks, width) <= shared)
    block, *others = next(fitting, BLOCKS[-1])
    return min(block, 64) if samples <= 64 else block, *others


def bytes_of(block: int, tile: int, stages: int, warps: int, width: int) -> int:
    """Memory of a multiprocessor that `_least` takes, as its compiler reports."""
    return (block + tile * stages) * width * 2 + 4 * tile * warps


def take(pool: SearchPool, x: Tensor) -> Tensor:
    """Match x: (B, D) with 1 ≤ B ≤ 256 and B ≤ pool.left → z: (B, D), which leaves the pool."""
    z = torch.empty_like(x)
    if x.is_cuda and pool.search_scratch is None:  # its sizes are constants of the kernels
        with compiling_ahead(x.device):
            match(z, pool, x)
    match(z, pool, x)
    pool.left -= len(x)
    return z


def match(z: Tensor, pool: SearchPool, x: Tensor) -> None:
    *memory, lists, told = scratch(pool, x)
    found = pool.data_check.found
    short_lists(lists, found, memory, x, pool)
    kernels.serve(z, pool, found, (memory[0], *told.view(2, -1), lists), len(x), lists.shape[1], x=x)


def short_lists(lists: Tensor, found: Tensor, memory: list[Tensor], x: Tensor, pool: SearchPool) -> None:
    """Fill lists: (SAMPLES, SAMPLES) labels, nearest first, −1 from where a list ends. x: (B, D)."""
    least, lowest, listed, beyond, costs, labels, near, near_labels = memory
    (samples, width), left, of_row, tiles_of_row = x.shape, pool.left, least.shape[1], lowest.shape[1]
    first = 1 << (width.bit_length() - 1)
    rest = max(16, triton.next_power_of_2(width - first)) if width > first else 0
    processors, shared = card(x.device)
    block, tile, stages, warps = blocks_of(samples, first + rest, shared)
    parts = -(-samples // block)
    grid = max(1, min(processors // parts, -(-left // tile))), parts, 1
    fast_launch(_least, grid, x, (least, lowest, x, pool.noise, pool.own, left, samples, of_row, tiles_of_row),
                (width, first, max(16, rest), rest > 0, block, tile, SPAN), warps=warps, stages=stages)
    keep, most = lists.shape[1], listed.shape[1]
    fast_launch(_spans, (samples, 1, 1), x, (listed, beyond, lowest, least, left, of_row, tiles_of_row),
                (triton.next_power_of_2(tiles_of_row), tile, SPAN, keep, most, SPARE), warps=8)
    fast_launch(_costs_in_spans, (samples, -(-most // AT_ONCE), 1), x,
                (costs, labels, listed, x, pool.noise, pool.own, pool.index, left), (width, math.gcd(width, 64),
                AT_ONCE, SPAN, most), warps=4)
    fast_launch(_order, (samples, 1, 1), x, (lists, found, near, near_labels, listed, beyond, costs, labels),
                (keep, most, NEAR, SPAN, 32), warps=16)


@triton.jit(do_not_specialize=["left", "samples", "of_row", "tiles_of_row"])
def _least(least, lowest, x, noise, own, left, samples, of_row, tiles_of_row, WIDTH: tl.constexpr, FIRST: tl.constexpr,
           SECOND: tl.constexpr, TWICE: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, SPAN: tl.constexpr):
    """least[i, s]: the least cost for sample i in span s; lowest[i, t]: in tile t of noises. A program has ROWS
    samples, and every so many tiles, whose numbers are multiplied in two parts: their sizes must be powers of two.
    NaN is as far as can be."""
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, FIRST)
    rest = FIRST + tl.arange(0, SECOND)
    here = row < samples
    a = tl.load(x + row[:, None] * WIDTH + k[None, :], mask=here[:, None], other=0.0)
    if TWICE:
        a_rest = tl.load(x + row[:, None] * WIDTH + rest[None, :], mask=here[:, None] & (rest < WIDTH)[None, :],
                         other=0.0)
    for tile in range(tl.program_id(0), tl.cdiv(left, TILE), tl.num_programs(0)):
        place = tile * TILE + tl.arange(0, TILE)
        there = place < left
        at = noise + place.to(tl.int64)[None, :] * WIDTH
        total = tl.dot(a, tl.load(at + k[:, None], mask=there[None, :], other=0.0))
        if TWICE:
            b = tl.load(at + rest[:, None], mask=there[None, :] & (rest < WIDTH)[:, None], other=0.0)
            total = tl.dot(a_rest, b, total)
        cost = tl.load(own + place, mask=there, other=float("inf"))[None, :] - 2 * total
        of_spans = tl.min(tl.reshape(cost, (ROWS, TILE // SPAN, SPAN)), 2)
        of_spans = tl.where(of_spans == of_spans, of_spans, float("inf"))
        span = tile * (TILE // SPAN) + tl.arange(0, TILE // SPAN)
        tl.store(least + row[:, None] * of_row + span[None, :], of_spans, mask=here[:, None] & (span < of_row)[None, :])
        tl.store(lowest + row * tiles_of_row + tile, tl.min(of_spans, 1), mask=here)


@triton.jit
def _cut(cost, wanted, most):
    """A value that from `wanted` to `most` costs do not exceed; more of them, if so many are equal to it."""
    low = tl.min(cost, 0)
    high = tl.max(tl.where(cost < float("inf"), cost, low), 0)
    searching = low < high
    while searching:
        middle = low + (high - low) * 0.5
        count = tl.sum((cost <= middle).to(tl.int32), 0)
        searching = ((count < wanted) | (count > most)) & (low < middle) & (middle < high)
        low = tl.where(count < wanted, middle, low)
        high = tl.where(count < wanted, high, middle)
    return high


@triton.jit(do_not_specialize=["left", "of_row", "tiles_of_row"])
def _spans(listed, beyond, lowest, least, left, of_row, tiles_of_row, BLOCK: tl.constexpr, TILE: tl.constexpr,
           SPAN: tl.constexpr, KEEP: tl.constexpr, SPANS: tl.constexpr, SPARE: tl.constexpr):
    """listed[i]: the spans to look at for sample i, −1 after the last; beyond[i]: the least cost in all others."""
    sample = tl.program_id(0)
    tiles = tl.cdiv(left, TILE)
    tile = tl.arange(0, BLOCK)
    cost = tl.load(lowest + sample * tiles_of_row + tile, mask=tile < tiles, other=float("inf"))
    # Tiles are fewer than spans, and there are hardly more spans below the cut than tiles.
    wanted = tl.minimum(tl.minimum(sample + 1, KEEP) + SPARE, tiles)
    cut = _cut(cost, wanted, tl.minimum(wanted + SPARE + wanted // 8, SPANS))
    near = (tile < tiles) & (cost <= cut)
    number = tl.cumsum(near.to(tl.int32), 0) - 1
    near = near & (number < SPANS)
    limit = tl.min(tl.where(near, float("inf"), cost), 0)
    count = tl.max(tl.where(near, number, -1), 0) + 1
    listed += sample * SPANS
    tl.store(listed + number, tile, mask=near)
    tl.debug_barrier()
    i = tl.arange(0, SPANS)
    of_tile: tl.constexpr = TILE // SPAN
    first = tl.load(listed + i, mask=i < count, other=-1, volatile=True) * of_tile
    tl.debug_barrier()
    span = first[:, None] + tl.arange(0, of_tile)[None, :]
    there = (span >= 0) & (span * SPAN < left)
    cost = tl.load(least + sample * of_row + span, mask=there, other=float("inf"))
    span, cost, there = tl.ravel(span), tl.ravel(cost), tl.ravel(there)
    near = there & (cost <= cut)
    number = tl.cumsum(near.to(tl.int32), 0) - 1
    near = near & (number < SPANS)
    count = tl.max(tl.where(near, number, -1), 0) + 1
    tl.store(listed + number, span, mask=near)
    tl.store(listed + count + i, -1, mask=count + i < SPANS)
    tl.store(beyond + sample, tl.minimum(limit, tl.min(tl.where(near, float("inf"), cost), 0)))


@triton.jit(do_not_specialize=["left"])
def _costs_in_spans(costs, labels, listed, x, noise, own, index, left, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
                    AT_ONCE: tl.constexpr, SPAN: tl.constexpr, SPANS: tl.constexpr):
    """costs[i] and labels[i]: of all noises in the spans listed for sample i."""
    sample, first = tl.program_id(0), tl.program_id(1) * AT_ONCE
    listed += sample * SPANS
    if tl.load(listed + first) < 0:
        return
    lane = tl.arange(0, AT_ONCE * SPAN)
    number = first + lane // SPAN
    span = tl.load(listed + number, mask=number < SPANS, other=-1)
    place = span * SPAN + lane % SPAN
    there = (span >= 0) & (place < left)
    cost = tl.load(own + place, mask=there, other=0.0) - 2 * _dot(x + sample * WIDTH, noise, place, there, WIDTH, BLOCK)
    at = sample * (SPANS * SPAN) + first * SPAN + lane
    here = number < SPANS
    tl.store(costs + at, tl.where(there, cost, float("inf")), mask=here)
    tl.store(labels + at, tl.load(index + place, mask=there, other=NOBODY), mask=here)


@triton.jit
def _order(lists, found, near, near_labels, listed, beyond, costs, labels, KEEP: tl.constexpr, SPANS: tl.constexpr,
           NEAR: tl.constexpr, SPAN: tl.constexpr, SOME: tl.constexpr):
    """lists[i]: the nearest noises of sample i in order, as long as no other span can have a nearer one."""
    sample = tl.program_id(0)
    lane = tl.arange(0, SPANS * SPAN)
    span = tl.load(listed + sample * SPANS + lane // SPAN)
    at = sample * (SPANS * SPAN) + lane
    label = tl.load(labels + at, mask=span >= 0, other=NOBODY)
    cost = tl.load(costs + at, mask=span >= 0, other=float("inf"))
    real = label != NOBODY
    _tell(found, real & ~(tl.abs(cost) < float("inf")))
    cost = tl.where(cost == cost, cost, float("inf"))
    limit = tl.load(beyond + sample)
    taken = real & (cost < limit)
    if tl.sum(taken.to(tl.int32), 0) > NEAR:
        taken = real & (cost <= _cut(cost, sample + 1, NEAR))
    number = tl.cumsum(taken.to(tl.int32), 0) - 1
    kept = taken & (number < NEAR)
    limit = tl.minimum(limit, tl.min(tl.where(taken & (number >= NEAR), cost, float("inf")), 0))
    count = tl.max(tl.where(kept, number, -1), 0) + 1
    near += sample * NEAR
    near_labels += sample * NEAR
    tl.store(near + number, cost, mask=kept)
    tl.store(near_labels + number, label, mask=kept)
    tl.debug_barrier()
    i = tl.arange(0, NEAR)
    there = i < count
    c = tl.load(near + i, mask=there, other=float("inf"), volatile=True)
    own_label = tl.load(near_labels + i, mask=there, other=NOBODY, volatile=True)
    rank = tl.zeros([NEAR], tl.int32)
    for start in range(0, count, SOME):
        j = start + tl.arange(0, SOME)
        other = tl.load(near + j, mask=j < count, other=float("inf"), volatile=True)
        other_label = tl.load(near_labels + j, mask=j < count, other=NOBODY, volatile=True)
        equal = other[None, :] == c[:, None]
        before = (other[None, :] < c[:, None]) | (equal & (other_label[None, :] < own_label[:, None]))
        rank += tl.sum(before.to(tl.int32), 1)
    sure = there & (c < limit)
    lists += sample * KEEP
    tl.store(lists + rank, own_label, mask=sure & (rank < KEEP))
    ends = tl.sum(sure.to(tl.int32), 0)
    tl.store(lists + i, -1, mask=(i >= ends) & (i < KEEP))


def try_out(device: torch.device) -> None:
    """Match a few samples by a search and the plain way on this device. Raises where they differ or nothing runs."""
    generator = torch.Generator(device).manual_seed(0)
    # Whole numbers: every precision multiplies them exactly, and of many equal costs the first must win.
    drawn = torch.randn(100 + 300, 16, generator=generator, device=device).mul(2).round().repeat(1, 16)
    for width in (80, 240):  # which is padded to the most memory that a program needs
        x, noises = drawn[:, :width].to(torch.bfloat16).split((100, 300))
        own, label = COSTS["squared"](noises), torch.arange(len(noises), dtype=torch.int32, device=device)
        pool = SimpleNamespace(noise=noises.clone(), own=own.clone(), index=label.clone(), place=label.clone(),
                               left=290, rows=300, data_check=DataCheck((width,), device), search_scratch=None)
        with on(device):
            picked = torch.cat([take(pool, part.clone()) for part in x.split((6, 94))])
        plain = noises[greedy(costs_from(products(x, noises[:290]), own[:290]))]
        if not torch.equal(picked, plain):
            raise RuntimeError("a search gives other noises than the plain path")
