"""One step of the semidiscrete solver on a GPU, in Triton: it reads the values twice and writes nothing of their size.

    by_rows      each row's argmax, and the maximum and sums of its softmax: online, in one pass
    by_columns   the mean of the softmax over each half of the rows

The shape alone decides the order of sums, and there are no atomics: equal values give equal bits.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..base.launch import compiling_ahead, on
from . import solver
from .kernels import NOBODY, fast_launch


class Tile(NamedTuple):
    """The values that a program looks at together."""

    rows: int
    columns: int
    stages: int  # tiles in memory at once: more than one are loaded ahead
    warps: int


ROW_TILE, COLUMN_TILE = Tile(2, 1024, 4, 8), Tile(4, 512, 3, 4)  # the fastest of 31 on an H100
PROGRAMS = 528  # that sum columns: four for each of an H100's multiprocessors
LOWEST = tl.constexpr(-1e30)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["batch", "n"])
def _by_rows(winners, tops, logs, squares, values, potentials, judged, temperature, batch, n, ALIGNED: tl.constexpr,
             ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr):
    """Every lane keeps a maximum of its own, and its sums are in units of that until the row ends. ALIGNED: n is a
    multiple of 4, so loads take 16 bytes at a time."""
    if ALIGNED:
        n = n // 4 * 4  # known to Triton: a hint, tl.multiple_of, on an argument has no effect
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    line = values + tl.minimum(row, batch - 1).to(tl.int64)[:, None] * n
    scale = LOG2_E / tl.load(temperature)
    top, best = tl.full([ROWS, COLUMNS], LOWEST, tl.float32), tl.full([ROWS, COLUMNS], float("-inf"), tl.float32)
    total, square = tl.zeros([ROWS, COLUMNS], tl.float32), tl.zeros([ROWS, COLUMNS], tl.float32)
    winner = tl.zeros([ROWS, COLUMNS], tl.int32)
    for start in tl.range(0, n, COLUMNS, num_stages=STAGES):
        j = start + tl.arange(0, COLUMNS)
        there = j < n
        value = tl.load(line + j[None, :], mask=there[None, :], other=float("-inf"))
        margin = value - tl.load(judged + j, mask=there, other=0.0)[None, :]
        winner = tl.where(margin > best, j[None, :], winner)
        best = tl.maximum(best, margin)
        value -= tl.load(potentials + j, mask=there, other=0.0)[None, :]
        top_before = top
        top = tl.maximum(top, value)
        shrink = tl.exp2((top_before - top) * scale)
        weight = tl.exp2((value - top) * scale)
        total = total * shrink + weight
        square = square * shrink * shrink + weight * weight
    top_of_row = tl.max(top, 1)
    shrink = tl.exp2((top - top_of_row[:, None]) * scale)
    total = tl.sum(total * shrink, 1)
    square = tl.sum(square * shrink * shrink, 1)
    winner = tl.min(tl.where(best == tl.max(best, 1)[:, None], winner, NOBODY), 1)
    there = row < batch
    tl.store(winners + row, winner, mask=there)
    tl.store(tops + row, top_of_row, mask=there)
    tl.store(logs + row, tl.log2(total * (batch // 2)), mask=there)
    tl.store(squares + row, square / (total * total), mask=there)


@triton.jit(do_not_specialize=["half", "n"])
def _by_columns(sums, values, potentials, temperature, tops, logs, half, n, ALIGNED: tl.constexpr, ROWS: tl.constexpr,
                COLUMNS: tl.constexpr, STAGES: tl.constexpr):
    """Fill sums: (2, splits, n) for each half of the rows, of which a split has every splits-th tile."""
    if ALIGNED:
        n = n // 4 * 4
    split, splits, of_half = tl.program_id(1), tl.num_programs(1), tl.program_id(2)
    j = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    there = j < n
    potential = tl.load(potentials + j, mask=there, other=0.0)
    scale = LOG2_E / tl.load(temperature)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in tl.range(split * ROWS, half, splits * ROWS, num_stages=STAGES):
        row = start + tl.arange(0, ROWS)
        here = row < half
        row += of_half * half
        line = values + row.to(tl.int64)[:, None] * n
        value = tl.load(line + j[None, :], mask=here[:, None] & there[None, :], other=float("-inf"))
        top, log = tl.load(tops + row, mask=here, other=0.0), tl.load(logs + row, mask=here, other=0.0)
        total += tl.exp2((value - potential[None, :] - top[:, None]) * scale - log[:, None])
    tl.store(sums + (of_half * splits + split) * n + j, tl.sum(total, 0), mask=there)


def by_rows(values: Tensor, potentials: Tensor, judged: Tensor, temperature: Tensor,
            tile: Tile = ROW_TILE) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four numbers for each row of values: (B, n) → winners, tops, logs, squares, (B,) each.

    winners  argmax of values − judged, the lowest j of equal ones
    tops     maximum of values − potentials
    logs     log₂ of B/2 times the sum of exp((values − potentials − top) / temperature)
    squares  the sum of the softmax's squares
    """
    batch, n = values.shape
    winners = values.new_empty(batch, dtype=torch.int64)
    tops, logs, squares = (values.new_empty(batch) for _ in range(3))
    arguments = winners, tops, logs, squares, values, potentials, judged, temperature, batch, n
    grid = triton.cdiv(batch, tile.rows), 1, 1
    fast_launch(_by_rows, grid, values, arguments, (n % 4 == 0, tile.rows, tile.columns, tile.stages), tile.warps)
    return winners, tops, logs, squares


def by_columns(values: Tensor, potentials: Tensor, temperature: Tensor, tops: Tensor, logs: Tensor,
               tile: Tile = COLUMN_TILE, programs: int = PROGRAMS) -> Tensor:
    """The mean of the softmax over each half of the rows of values: (B, n) → (2, n)."""
    half, n = len(values) // 2, values.shape[1]
    blocks = triton.cdiv(n, tile.columns)
    splits = max(1, min(programs // (2 * blocks), triton.cdiv(half, tile.rows)))
    sums = values.new_empty(2, splits, n)
    arguments, grid = (sums, values, potentials, temperature, tops, logs, half, n), (blocks, splits, 2)
    fast_launch(_by_columns, grid, values, arguments, (n % 4 == 0, tile.rows, tile.columns, tile.stages), tile.warps)
    return sums.sum(1)


def shared_out(values: Tensor, potentials: Tensor, judged: Tensor,
               temperature: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Share noises out among samples, without waiting for the GPU → (winners, first, second, squares).

    values       (B, n) float32, the products ⟨z_i, x_j⟩, B even
    potentials   (n,) float32, subtracted before the softmax over j
    judged       (n,) float32, subtracted before the argmax over j
    temperature  () float32, of the softmax

    winners        (B,) int64, argmax of values − judged, the lowest j of equal ones
    first, second  (n,), the softmax's mean over the first and the second half of the rows
    squares        (), the mean over rows of the sum of the softmax's squares
    """
    values, potentials, judged = _aligned(values), _aligned(potentials), _aligned(judged)
    with on(values.device):
        winners, tops, logs, squares = by_rows(values, potentials, judged, temperature)
        first, second = by_columns(values, potentials, temperature, tops, logs)
        return winners, first, second, squares.mean()


def nearest(values: Tensor, potentials: Tensor) -> Tensor:
    """The argmax of values − potentials, (B, n) and (n,) → (B,) int64, the lowest of equal ones."""
    values, potentials = _aligned(values), _aligned(potentials)
    with on(values.device):
        return by_rows(values, potentials, potentials, values.new_ones(()))[0]


def _aligned(tensor: Tensor) -> Tensor:
    """A copy unless the tensor is contiguous and begins at a multiple of 16 bytes, as compiled kernels expect."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def try_out(device: torch.device) -> None:
    """Share a few noises out by the kernels and the plain way on this device. Raises where they differ or nothing
    runs."""
    generator = torch.Generator(device).manual_seed(0)
    # Whole numbers: of many equal values the first must win. Rows of 1201 are not aligned.
    cases = [torch.randn(14, n, generator=generator, device=device).mul(4).round() for n in (1200, 1201)]
    arguments = [(case[:12], case[12], case[13], torch.tensor(3.0, device=device)) for case in cases]
    with compiling_ahead(device):
        for case in arguments:
            shared_out(*case)
    for case in 2 * arguments:  # compiled, and launched again
        (winners, *shares), (expected, *others) = shared_out(*case), solver.shared_out(*case)
        close = (torch.allclose(*pair, rtol=1e-4, atol=1e-7) for pair in zip(shares, others, strict=True))
        same = torch.equal(winners, expected) and torch.equal(nearest(*case[:2]), solver.nearest(*case[:2]))
        if not (same and all(close)):
            raise RuntimeError("its kernels share noises out otherwise than the plain path")
