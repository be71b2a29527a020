"""Batches of at most eight samples, matched in one launch, in Triton.

So few samples take longer to launch than to match: `kernels` needs a matrix product and three launches for them. And
the library multiplies eight samples at a fifth of the rate at which a GPU could read the noises (H200). Here one kernel
does it all:

    costs     each program reads some noises once, for all samples, and writes a key for each noise and sample, and the
              least key of its noises. Products are added up in float32, in an order that depends on nothing else
    choose    the program that finishes last serves the samples in turn: each gets the least of the least keys, and
              where a noise has left, the keys of its program are looked at one by one
    hand out  the same program copies the noises, unless they are long: then `kernels._hand_out` does

A key orders noises as the serial rule does, by cost and then by label, and names label and place, see `_keys`.
"""

import math
from types import SimpleNamespace

import torch
import triton
import triton.language as tl
from torch import Tensor

from dansm import COSTS, costs_from, greedy

from ..base.launch import compiles_only, compiling_ahead, launch, on, starter
from . import kernels
from .kernels import SMALL, _movers
from .pool import DataCheck, FastPool
from .products import products

ROWS, MANY = (4, 8), 2048  # noises of a program, and of one where more than MANY are left
COPIED = 2**17  # bytes of noises that one program hands out; of more, a launch for all of them is faster
LANES = 2048  # keys looked at together
GONE = tl.constexpr(2**63 - 1)  # the key of a noise that is not free


@triton.jit
def _keys(cost, label, place):
    """Sort keys, int64: cost, then label, then place. All of one shape."""
    cost = tl.where(cost == cost, cost, float("inf"))  # NaN, which may have a sign, is as far as can be
    bits = cost.to(tl.int32, bitcast=True)
    bits ^= (bits >> 31) & 0x7FFFFFFF
    return (bits.to(tl.int64) << 32) | (label.to(tl.int64) << 16) | place


@triton.jit
def _numbers(at, k, width, CACHE: tl.constexpr, MASKED: tl.constexpr):
    """Numbers k of the rows that begin at `at`, which broadcast, as float32; 0 beyond `width` if MASKED."""
    if MASKED:
        numbers = tl.load(at + k, mask=k < width, other=0.0, cache_modifier=CACHE)
    else:
        numbers = tl.load(at + k, cache_modifier=CACHE)
    return numbers.to(tl.float32)


@triton.jit
def _add(totals, x, samples, first, second, k, width, SAMPLES: tl.constexpr, EACH: tl.constexpr, MASKED: tl.constexpr):
    """Each total plus products of the numbers k: of the samples in turn with the first rows, and with the second."""
    numbers = _numbers(first, k, width, ".cg", MASKED)  # the multiprocessor's own cache is for the samples
    others = _numbers(second, k, width, ".cg", MASKED) if EACH == 2 else numbers
    shape: tl.constexpr = [k.shape[0], 8, k.shape[1] // 8]
    added = ()
    for i in tl.static_range(SAMPLES):
        sample = x + tl.minimum(i, samples - 1).to(tl.int64) * width
        sample = _numbers(sample, k, width, "", MASKED)
        added += (totals[len(added)] + tl.sum(tl.reshape(numbers * sample, shape), 2),)
        if EACH == 2:
            added += (totals[len(added)] + tl.sum(tl.reshape(others * sample, shape), 2),)
    return added


@triton.jit(do_not_specialize=["left", "units", "samples"])
def _serve(z, picks, movers, finished, keys, found, x, noise, own, index, place, left, units, samples,
           UNIT: tl.constexpr, SAMPLES: tl.constexpr, ROWS: tl.constexpr, AHEAD: tl.constexpr, LANES: tl.constexpr,
           COPIES: tl.constexpr):
    """Give each of the samples (SAMPLES at most) the nearest noise, and let the last free ones move into the gaps.

    keys      for each sample those of all noises, then for each the least of each program
    units     rows of x and noise have units · UNIT numbers, and begin at multiples of UNIT
    AHEAD     loads of a row that are on their way at once
    COPIES    hand the noises out too; else write what _hand_out needs into picks and movers
    """
    # A warp reads 128 bytes of four rows at once, so that only eight of its threads have parts of the same sum.
    COLUMNS: tl.constexpr = 1024 // x.dtype.element_ty.primitive_bitwidth
    STEP: tl.constexpr = 4 * COLUMNS
    EACH: tl.constexpr = ROWS // 4
    width = units * UNIT
    program, programs = tl.program_id(0), tl.num_programs(0)
    part = tl.arange(0, 16)
    row = program * ROWS + part % 4 * EACH
    first = noise + (tl.minimum(row, left - 1).to(tl.int64) * width)[:, None]
    second = noise + (tl.minimum(row + 1, left - 1).to(tl.int64) * width)[:, None]
    columns = (part // 4 * COLUMNS)[:, None] + tl.arange(0, COLUMNS)[None, :]
    totals = ()
    for _ in tl.static_range(SAMPLES * EACH):
        totals += (tl.zeros([16, 8], tl.float32),)
    whole = width // (STEP * AHEAD) * (STEP * AHEAD)
    for start in range(0, whole, STEP * AHEAD):
        for step in tl.static_range(AHEAD):
            k = start + step * STEP + columns
            totals = _add(totals, x, samples, first, second, k, width, SAMPLES, EACH, False)
    for start in range(whole, width, STEP):
        totals = _add(totals, x, samples, first, second, start + columns, width, SAMPLES, EACH, True)

    i = tl.arange(0, SAMPLES)
    here = i < samples
    total = tl.zeros([SAMPLES, ROWS], tl.float32)
    for n in tl.static_range(SAMPLES):
        its = tl.sum(tl.reshape(tl.sum(totals[n * EACH], 1), [4, 4]), 0)
        if EACH == 2:
            others = tl.sum(tl.reshape(tl.sum(totals[n * EACH + 1], 1), [4, 4]), 0)
            its = tl.reshape(tl.join(its, others), [ROWS])
        total = tl.where(i[:, None] == n, its[None, :], total)
    at = program * ROWS + tl.arange(0, ROWS)
    free = at < left
    cost = tl.load(own + at, mask=free, other=0.0)[None, :] - 2 * total
    label = tl.load(index + at, mask=free, other=0)
    real = here[:, None] & free[None, :]
    tl.store(found, 1, mask=tl.max(tl.max((real & ~(tl.abs(cost) < float("inf"))).to(tl.int32), 1), 0) > 0)
    key = tl.where(real, _keys(cost, label[None, :], at[None, :]), GONE)
    least = keys + samples * left
    if SAMPLES > 1:
        tl.store(keys + i[:, None] * left + at[None, :], key, mask=real)
    tl.store(least + i * programs + program, tl.min(key, 1), mask=here)
    tl.debug_barrier()
    if tl.atomic_add(finished, 1, sem="acq_rel") == programs - 1:
        tl.store(finished, 0)  # for the next batch
        _choose(z, picks, movers, keys, least, noise, own, index, place, left, width, samples, programs, SAMPLES, ROWS,
                LANES, COPIES)


@triton.jit
def _choose(z, picks, movers, keys, least, noise, own, index, place, left, width, samples, programs,
            SAMPLES: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, COPIES: tl.constexpr):
    """The serial rule, by one program. What others wrote is loaded past this multiprocessor's cache (volatile)."""
    i = tl.arange(0, SAMPLES)
    here = i < samples
    lane, row = tl.arange(0, LANES), tl.arange(0, ROWS)
    at = tl.full([SAMPLES], -1, tl.int32)
    pick = tl.full([SAMPLES], 0, tl.int32)
    for sample in range(samples):
        near = tl.full([LANES], GONE, tl.int64)
        for start in range(0, programs, LANES):
            key = tl.load(least + sample * programs + start + lane, mask=start + lane < programs, other=GONE,
                          volatile=True)
            near = tl.minimum(near, key)
        nearest = tl.min(near, 0)
        if SAMPLES > 1:  # those of programs whose least have left
            others = (at // ROWS * ROWS)[:, None] + row[None, :]
            key = tl.load(keys + sample * left + others, mask=(at >= 0)[:, None] & (others < left), other=GONE,
                          volatile=True)
            nearest = tl.minimum(nearest, tl.min(tl.min(key, 1), 0))
        taken = (nearest & 0xFFFF).to(tl.int32)
        at = tl.where(i == sample, taken, at)
        pick = tl.where(i == sample, (nearest >> 16 & 0xFFFF).to(tl.int32), pick)
        if SAMPLES > 1:
            tl.store(keys + i * left + taken, GONE, mask=here)
            tl.store(least + i * programs + taken // ROWS, GONE, mask=here)
            tl.debug_barrier()

    gap, mover = _movers(at, left, samples, SAMPLES)
    moved = tl.load(index + mover, mask=gap, other=0)
    moved_own = tl.load(own + mover, mask=gap, other=0.0)
    tl.debug_barrier()
    tl.store(place + pick, -1, mask=here)
    tl.store(place + moved, at, mask=gap)
    tl.store(index + at, moved, mask=gap)
    tl.store(own + at, moved_own, mask=gap)
    if COPIES:
        BLOCK: tl.constexpr = 4096 // SAMPLES
        to = noise + at.to(tl.int64)[:, None] * width
        end = noise + mover.to(tl.int64)[:, None] * width
        for start in range(0, width, BLOCK):
            k = (start + tl.arange(0, BLOCK))[None, :]
            picked = tl.load(to + k, mask=here[:, None] & (k < width))
            numbers = tl.load(end + k, mask=gap[:, None] & (k < width))
            tl.store(z + i.to(tl.int64)[:, None] * width + k, picked, mask=here[:, None] & (k < width))
            tl.store(to + k, numbers, mask=gap[:, None] & (k < width))
    else:
        tl.store(picks + i, at, mask=here)
        tl.store(movers + i, mover, mask=here)


# ---------------------------------------------------------------------------------------------------
# From Python
# ---------------------------------------------------------------------------------------------------


class Few:
    """Serves small batches of a pool, and keeps memory and kernels between them, so that none waits for these."""

    copied = COPIED

    def __init__(self, pool: FastPool):
        noise, self.width = pool.noise, pool.noise.shape[1]
        # 80 bytes a noise, 5 MB at most, which `_bytes` counts as memory to draw noises with.
        self.keys = noise.new_empty(SMALL * (pool.rows + -(-pool.rows // ROWS[0])), dtype=torch.int64)
        self.told = torch.zeros(3, SMALL, dtype=torch.int32, device=noise.device)
        self.addresses = *(part.data_ptr() for part in self.told), self.keys.data_ptr()
        self.unit = math.gcd(self.width, 16)
        self.compiled = {}

    def serves_at_once(self, pool: FastPool, x, labels, mask) -> bool:
        """Whether x: (B, ...) can be served as it is, and nothing is to be done for the pool before or after."""
        if not (isinstance(x, Tensor) and x.ndim and 0 < (samples := x.shape[0]) <= SMALL):
            return False
        noise = pool.noise
        return (labels is None and mask is None and pool.left - samples > pool.due and x.dtype is noise.dtype
                and x.device == noise.device and x.is_contiguous() and x.data_ptr() % 16 == 0 and is_current(x.device)
                and not (pool.prices and pool.prices.missing) and not torch.is_inference_mode_enabled())

    def take(self, pool: FastPool, x: Tensor) -> Tensor:
        """Match x: (B, D) with 1 ≤ B ≤ SMALL and B ≤ pool.left → z: (B, D), which leaves the pool."""
        x = x.contiguous()
        return self(pool, x.clone() if x.data_ptr() % 16 else x)

    def __call__(self, pool: FastPool, x: Tensor) -> Tensor:
        """`take` for x: (B, ...) that is contiguous and begins at a multiple of 16 bytes → z like x."""
        z, samples, left = torch.empty_like(x), x.shape[0], pool.left
        most, rows = 1 << (samples - 1).bit_length(), ROWS[left > MANY]
        copies = most * self.width * x.element_size() <= self.copied
        programs, numbers = -(-left // rows), (left, self.width // self.unit, samples)
        if (start := self.compiled.get((most, rows))) and not compiles_only():
            start((programs, 1, 1), z.data_ptr(), *self.addresses, pool.data_check.found, x.data_ptr(),
                  pool.noise.data_ptr(), pool.own.data_ptr(), pool.index.data_ptr(), pool.place.data_ptr(), *numbers)
        else:
            constants = self.unit, most, rows, 8 // max(most // 2, rows // 4), LANES, copies
            tensors = z, *self.told, self.keys, pool.data_check.found, x, pool.noise, pool.own, pool.index, pool.place
            kernel = launch(_serve, (programs, 1, 1), *tensors, *numbers, *constants, num_warps=4)
            if kernel is not None:  # else it was only compiled, or interpreted
                self.compiled[most, rows] = starter(kernel, constants, x.device)
        if not copies:
            kernels.hand_out(z.view(samples, -1), pool.noise, self.told[0], self.told[1], samples, pool.index)
        pool.left -= samples
        return z


def is_current(device: torch.device) -> bool:
    """Whether Triton launches on this device."""
    return device.type != "cuda" or torch.cuda.current_device() == device.index


def try_out(device: torch.device, dtype: torch.dtype, width: int = 2064) -> None:
    """Match batches of all sizes by the kernel and the plain way. Raises where they differ or nothing runs.

    width  of the noises: a multiple of 16. The kernels for such are compiled, and in the first both loops run
    """
    generator = torch.Generator(device).manual_seed(0)
    sizes = 1, 2, 3, 8, 1, 2, 4, 7  # compiled, and launched again
    # Whole numbers: their products are added up exactly in any order, and of many equal costs the first must win.
    drawn = torch.randn(sum(sizes) + MANY + 40, 16, generator=generator, device=device).mul(2).round()
    x, noise = drawn.repeat(1, width // 16).to(dtype).split((sum(sizes), MANY + 40))
    label, own = torch.arange(len(noise), dtype=torch.int32, device=device), COSTS["squared"](noise)

    def picked(left, copied):
        pool = SimpleNamespace(noise=noise.clone(), own=own.clone(), index=label.clone(), place=label.clone(),
                               left=left, rows=len(noise), data_check=DataCheck((width,), device))
        few = Few(pool)
        few.copied = copied
        with on(device):
            return torch.cat([few(pool, part.clone()) for part in x.split(sizes)])

    ways = (len(noise), COPIED), (MANY, COPIED), (MANY, 0)
    with compiling_ahead(device):
        for way in ways:
            picked(*way)
    for left, copied in ways:
        plain = noise[greedy(costs_from(products(x, noise[:left]), own[:left]))]
        if not torch.equal(picked(left, copied), plain):
            raise RuntimeError("its kernel gives other noises than the plain path")
