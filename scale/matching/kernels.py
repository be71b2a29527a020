"""The picks of nearest noises and the hand-out on a GPU, in Triton.

`KernelPool._take` is one matrix product (by the vendor's library) and three launches, and never makes the CPU wait for
the GPU:

    shortlist   the nearest noises of each sample, in order: one program a sample
    choose      the serial rule on the short lists, all samples at once: one program, or one for each group
    hand_out    copy the picked noises out of the pool, and the last free ones into their places

The same launches serve the pools of all groups in a batch (GROUPED): the last number of a program is then that of its
group, whose pool it finds in `table`, see `group_kernels`. Batches of a few samples have one launch for all of it, see
`few_kernels`.

Kernels name a noise by its label: its place when the pool began, which decides ties, so that the picks are those of the
plain path and of the paper's loop, whatever has moved since. pool.index is the label at a place, pool.place the place
of a label, or −1 once it is taken.
"""

from types import SimpleNamespace

import torch
import triton
import triton.language as tl
from torch import Tensor

from dansm import COSTS, costs_from, greedy

from ..base.launch import compiles_only, compiling_ahead, launch, on, starter
from . import draws
from .gpu import working
from .pool import DataCheck, FastPool
from .products import products

# Noises on a short list, and on one of a pool of more than MANY. Photographs like the same noises, and where a list
# ends a whole row is read, which takes about a millisecond for a million noises.
KEEP, MANY = (64, 128), 2**16
LANES = 1024  # noises looked at together
SAMPLES = FastPool.served_at_once
FEW = 1024  # with so few noises left, a list would hold all of them: samples are served in turn
NOBODY = tl.constexpr(2**31 - 1)
SMALL, LABELS = 8, 2**16  # samples of a batch, and noises of a pool, that `few_kernels` serves


# Of `table`: the addresses of noise, own, index and place, where the products begin, left, first sample, samples.
# Behind the rows of all groups it holds the number in the batch of each sample, sorted by group.
COLUMNS = tl.constexpr(8)


@triton.jit
def _group(table, group, products, own, index, place):
    """What the kernels are given for one pool, of a group; and the first of its samples."""
    row = table + COLUMNS * group
    own = tl.load(row + 1).to(own.dtype)
    index = tl.load(row + 2).to(index.dtype)
    place = tl.load(row + 3).to(place.dtype)
    left, first, samples = tl.load(row + 5).to(tl.int32), tl.load(row + 6).to(tl.int32), tl.load(row + 7).to(tl.int32)
    return products + tl.load(row + 4), own, index, place, left, tl.cdiv(left, 16) * 16, samples, first


# ---------------------------------------------------------------------------------------------------
# The nearest noises
# ---------------------------------------------------------------------------------------------------


@triton.jit
def _nearer(cost, label, other_cost, other_label):
    first = (cost < other_cost) | ((cost == other_cost) & (label < other_label))
    return tl.where(first, cost, other_cost), tl.where(first, label, other_label)


@triton.jit
def _farther(cost, label, other_cost, other_label):
    first = (cost < other_cost) | ((cost == other_cost) & (label < other_label))
    return tl.where(first, other_cost, cost), tl.where(first, other_label, label)


@triton.jit
def _nearest(cost, label):
    """The label of the lowest cost; the lowest label of equal ones."""
    return tl.min(tl.where(cost == tl.min(cost, 0), label, NOBODY), 0)


@triton.jit
def _costs(products, own, index, sample, places, left, wide):
    """Cost and label of the noises at these places, for one sample; inf and NOBODY beyond the last."""
    there = places < left
    cost = tl.load(products + sample * tl.cast(wide, tl.int64) + places, mask=there, other=0.0)
    cost = tl.load(own + places, mask=there, other=0.0) - 2 * cost
    cost = tl.where(there & (cost == cost), cost, float("inf"))  # NaN is as far as can be
    return cost, tl.load(index + places, mask=there, other=NOBODY)


@triton.jit
def _tell(found, infinite):
    """Note infinite costs, which data that is not finite has; the CPU looks when the next batch comes."""
    tl.store(found, 1, mask=tl.max(infinite.to(tl.int32), 0) > 0)


@triton.jit(do_not_specialize=["left", "wide"])
def _shortlist(lists, found, products, own, index, left, wide, table, KEEP: tl.constexpr,
               LANES: tl.constexpr, GROUPED: tl.constexpr):
    """Fill lists: (samples, KEEP) labels, nearest first; i + 1 of sample i, as only the i samples before it can be in
    its way. Each lane remembers the four nearest that it met. Once a lane has given up all four, another noise that it
    met might be next, so the list ends with −1."""
    sample = tl.program_id(0)
    if GROUPED:
        group = tl.program_id(2)
        products, own, index, _, left, wide, samples, first = _group(table, group, products, own, index, index)
        if sample >= samples:
            return
        lists += first * KEEP
    lane = tl.arange(0, LANES)
    c1, l1 = _costs(products, own, index, sample, lane + left, left, wide)  # none: inf and NOBODY
    c2, l2 = c1, l1
    c3, l3 = c1, l1
    c4, l4 = c1, l1
    infinite = l1 != NOBODY
    for start in range(0, left, LANES):
        c, label = _costs(products, own, index, sample, start + lane, left, wide)
        infinite |= (label != NOBODY) & (tl.abs(c) == float("inf"))
        worse, worse_label = _farther(c1, l1, c, label)
        c1, l1 = _nearer(c1, l1, c, label)
        c, label = _farther(c2, l2, worse, worse_label)
        c2, l2 = _nearer(c2, l2, worse, worse_label)
        worse, worse_label = _farther(c3, l3, c, label)
        c3, l3 = _nearer(c3, l3, c, label)
        c4, l4 = _nearer(c4, l4, worse, worse_label)
    _tell(found, infinite)
    for k in range(tl.minimum(sample + 1, KEEP)):
        label = _nearest(c1, l1)
        tl.store(lists + sample * KEEP + k, tl.where(label == NOBODY, -1, label))
        gone = (l1 == label) & (label >= 0)
        c1, l1 = tl.where(gone, c2, c1), tl.where(gone, l2, l1)
        c2, l2 = tl.where(gone, c3, c2), tl.where(gone, l3, l2)
        c3, l3 = tl.where(gone, c4, c3), tl.where(gone, l4, l3)
        c4, l4 = tl.where(gone, -float("inf"), c4), tl.where(gone, -1, l4)


# ---------------------------------------------------------------------------------------------------
# The serial rule
# ---------------------------------------------------------------------------------------------------


@triton.jit
def _dot(x, noise, places, there, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The products of one sample (WIDTH,) and the noises at these places, BLOCK numbers at a time."""
    total = places * 0.0
    for start in tl.static_range(0, WIDTH, BLOCK):
        k = start + tl.arange(0, BLOCK)
        sample = tl.load(x + k, mask=k < WIDTH, other=0.0).to(tl.float32)
        numbers = tl.load(noise + places.to(tl.int64)[:, None] * WIDTH + k[None, :],
                          mask=there[:, None] & (k < WIDTH)[None, :], other=0.0)
        total += tl.sum(numbers.to(tl.float32) * sample[None, :], 1)
    return total


@triton.jit
def _nearest_not_taken(products, own, index, place, sample, left, wide, x, noise, LANES: tl.constexpr,
                       WIDTH: tl.constexpr):
    """The label of the nearest noise in the whole row whose place is not marked as taken. WIDTH: of the noises, where
    no products are kept, else 0."""
    lane = tl.arange(0, LANES)
    best, best_label = tl.full([LANES], float("inf"), tl.float32), tl.full([LANES], NOBODY, tl.int32)
    if WIDTH == 0:
        best, best_label = _costs(products, own, index, sample, lane + left, left, wide)
    for start in range(0, left, LANES):
        if WIDTH > 0:
            there = start + lane < left
            cost = _dot(x + sample * WIDTH, noise, start + lane, there, WIDTH, 16)
            cost = tl.load(own + start + lane, mask=there, other=0.0) - 2 * cost
            cost = tl.where(there & (cost == cost), cost, float("inf"))
            label = tl.load(index + start + lane, mask=there, other=NOBODY)
        else:
            cost, label = _costs(products, own, index, sample, start + lane, left, wide)
        free = tl.load(place + label, mask=label != NOBODY, other=-1, volatile=True) >= 0
        best, best_label = _nearer(best, best_label, tl.where(free, cost, float("inf")), tl.where(free, label, NOBODY))
    return _nearest(best, best_label)


@triton.jit(do_not_specialize=["left", "wide", "samples", "start"])
def _choose(picks, movers, lists, found, products, own, index, place, left, wide, samples, table, start, x, noise,
            KEEP: tl.constexpr, LANES: tl.constexpr, SAMPLES: tl.constexpr,
            IN_TURN: tl.constexpr, GROUPED: tl.constexpr, WIDTH: tl.constexpr):
    """Write the place of each sample's noise into picks, and the place of the noise that moves there into movers, −1
    for none. Updates own, index and place for the pool of left − samples noises."""
    i = tl.arange(0, SAMPLES)
    if GROUPED:
        group = start + tl.program_id(2)
        products, own, index, place, left, wide, samples, first = _group(table, group, products, own, index,
                                                                             place)
        picks, movers, lists = picks + first, movers + first, lists + first * KEEP
    if IN_TURN:  # few noises: a row is no longer than a list would be, and which are taken fits into registers
        lane = tl.arange(0, LANES)
        free = lane < left
        pick = tl.full([SAMPLES], -1, tl.int32)
        infinite = lane < 0
        next_cost, label = _costs(products, own, index, 0, lane, left, wide)
        for sample in range(samples):
            cost = next_cost
            following = tl.minimum(sample + 1, samples - 1)  # loaded before it is needed
            next_cost, label = _costs(products, own, index, following, lane, left, wide)
            infinite |= free & (tl.abs(cost) == float("inf"))
            cost = tl.where(free, cost, float("inf"))
            nearest = _nearest(cost, tl.where(free, label, NOBODY))
            free = free & (label != nearest)
            pick = tl.where(i == sample, nearest, pick)
        _tell(found, infinite)
    else:
        pick = tl.load(lists + i * KEEP, mask=i < samples, other=-1)
        rank = tl.zeros([SAMPLES], tl.int32)
        waiting = samples > 0
        while waiting:
            # Deferred acceptance, as in greedy_by_rounds: a sample whose noise an earlier one has goes down its list.
            same = (pick[:, None] == pick[None, :]) & (i[None, :] < i[:, None])
            lost = (tl.max(same.to(tl.int32), 1) > 0) & (pick >= 0)
            if tl.max(lost.to(tl.int32), 0) > 0:
                rank += lost.to(tl.int32)
                after = tl.load(lists + i * KEEP + rank, mask=lost & (rank < KEEP), other=-1)
                pick = tl.where(lost, after, pick)
            else:
                # Only samples whose list has ended have no noise. Nothing changes any more for those before the
                # first of them, so it gets the nearest noise that they left.
                first = tl.min(tl.where((pick < 0) & (i < samples), i, SAMPLES), 0)
                if first < samples:
                    at = tl.load(place + pick, mask=i < first, other=0, volatile=True)
                    tl.debug_barrier()
                    tl.store(place + pick, tl.where(at >= 0, -2 - at, at), mask=i < first)  # marked; undone below
                    tl.debug_barrier()
                    nearest = _nearest_not_taken(products, own, index, place, first, left, wide, x, noise, LANES,
                                                 WIDTH)
                    pick = tl.where(i == first, nearest, pick)
                waiting = first < samples
        tl.debug_barrier()

    here = i < samples
    at = tl.load(place + pick, mask=here, other=-1, volatile=True)
    at = tl.where(at < -1, -2 - at, at)
    tl.store(picks + i, at, mask=here)

    gap, mover = _movers(at, left, samples, SAMPLES)
    tl.store(movers + i, mover, mask=here)
    moved = tl.load(index + mover, mask=gap, other=0)
    moved_own = tl.load(own + mover, mask=gap, other=0.0)
    tl.debug_barrier()
    tl.store(place + pick, -1, mask=here)
    tl.store(place + moved, at, mask=gap)
    tl.store(index + at, moved, mask=gap)
    tl.store(own + at, moved_own, mask=gap)


@triton.jit
def _movers(at, left, samples, SAMPLES: tl.constexpr):
    """Which of the places picked, (SAMPLES,), become gaps, and the place of the noise that moves there, −1 for none:
    the first gap in batch order gets the first of the last noises that is not taken."""
    i = tl.arange(0, SAMPLES)
    end = left - samples
    gap = (i < samples) & (at < end)
    stays = tl.max((at[:, None] == (end + i)[None, :]).to(tl.int32), 0) == 0  # the i-th of the last is not taken
    moves = (i < samples) & stays
    gap_number = tl.where(gap, tl.cumsum(gap.to(tl.int32), 0), -1)
    move_number = tl.where(moves, tl.cumsum(moves.to(tl.int32), 0), 0)
    fits = gap_number[:, None] == move_number[None, :]
    return gap, tl.max(tl.where(fits, (end + i)[None, :], -1), 1)


@triton.jit(do_not_specialize=["width"])
def _hand_out(z, noise, picks, movers, width, table, BLOCK: tl.constexpr, GROUPED: tl.constexpr):
    """z[i] = noise[picks[i]], and noise[movers[i]] takes its place. One program reads a row and then writes it, and no
    row that moves was picked. With groups, the table's end tells which sample of the batch i is."""
    i = tl.program_id(0).to(tl.int64)
    sample = i
    if GROUPED:
        row = table + COLUMNS * tl.program_id(2)
        if i >= tl.load(row + 7):
            return
        noise = tl.load(row).to(noise.dtype)
        i += tl.load(row + 6)
        sample = tl.load(table + COLUMNS * tl.num_programs(2) + i)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at, mover = tl.load(picks + i).to(tl.int64), tl.load(movers + i).to(tl.int64)
    there, moves = columns < width, columns < tl.where(mover >= 0, width, 0)
    picked = tl.load(noise + at * width + columns, mask=there)
    moved = tl.load(noise + mover * width + columns, mask=moves)
    tl.store(z + sample * width + columns, picked, mask=there)
    tl.store(noise + at * width + columns, moved, mask=moves)


# ---------------------------------------------------------------------------------------------------
# The pool that uses them
# ---------------------------------------------------------------------------------------------------


class KernelPool(FastPool):
    """`FastPool` on a GPU, matched by the kernels."""

    cost_copies = 1

    def __init__(self, *arguments, **settings):
        super().__init__(*arguments, **settings)
        self.scratch = None  # memory that the kernels keep between batches, so that none waits for it
        self.is_small = False  # the batch that is matched

    def __getstate__(self) -> dict:  # of a copy
        return self.__dict__ | {"scratch": None, "few": None}

    def __call__(self, x: Tensor, labels: Tensor | None = None, mask: None = None) -> Tensor:
        if not torch.compiler.is_compiling() and self.few and self.few.serves_at_once(self, x, labels, mask):
            self.check_worker()
            self.check(x)
            return self.few(self, x)
        return super().__call__(x, labels, mask)

    def check(self, x: Tensor) -> None:
        self.data_check(x, numbers=self.match_size <= 1)  # the kernels look at the numbers

    def _begin(self) -> None:
        super()._begin()
        self.place = self.index.clone()

    def _fill(self, noise: Tensor, number: int, first: int) -> Tensor:
        return super()._fill(noise, number, first, working("draw_kernels", noise.device, noise.dtype) or draws)

    def _forget(self) -> None:
        super()._forget()
        self.place = self.index
        self.few = None  # what serves small batches: it has memory for pools of this size

    def _draw_again(self, index: Tensor) -> Tensor:
        self.place = super()._draw_again(index)
        return self.place

    def _match(self, samples: Tensor) -> Tensor:
        # The end of a large batch is not small: it would wait for one more kernel to be compiled.
        self.is_small = 0 < len(samples) <= SMALL and self._has_few()
        return super()._match(samples)

    def _has_few(self) -> bool:
        """Whether small batches of this pool have a kernel of their own, which is made ready."""
        if self.few is None and self.rows <= LABELS and self.noise.dtype != torch.float64:
            kernel = working("few_kernels", self.noise.device, self.noise.dtype)
            self.few = kernel.Few(self) if kernel else None
        return self.few is not None

    def _take(self, samples: Tensor) -> Tensor:
        if not len(samples):
            return super()._take(samples)
        with on(samples.device):
            return self.few.take(self, samples) if self.is_small else take(self, samples)


def take(pool: KernelPool, x: Tensor) -> Tensor:
    """Match x: (B, D) with 1 ≤ B ≤ 256 and B ≤ pool.left → z: (B, D), which leaves the pool."""
    samples, wide = len(x), multiplied(pool)
    memory = scratch(pool, x, samples * wide)
    products(x, pool.noise[:wide], pool.tf32, out=memory[0][: samples * wide].view(samples, wide))
    z = x.new_empty(x.shape)  # empty_like would keep the order of a transposed batch in memory
    choose(z, pool, pool.data_check.found, memory, samples, pool.left, in_turn=int(pool.left <= FEW))
    pool.left -= samples
    return z


def multiplied(pool: KernelPool) -> int:
    """How many noises to multiply for the free ones, of a few sizes, as cuBLAS takes 0.6 ms to choose its way for each
    new one. The others are never looked at."""
    step = max(16, (1 << pool.left.bit_length()) // 32)
    return min(-(-pool.left // step) * step, in_lines(pool.rows))


def in_lines(rows: int) -> int:
    """How many noises a pool of so many has memory for: whole lines of it."""
    return -(-rows // 16) * 16


def scratch(pool: KernelPool, x: Tensor, size: int) -> tuple[Tensor, ...]:
    """Memory that a pool keeps between batches: for `size` products, and for picks, movers and short lists."""
    if pool.scratch is None or len(pool.scratch[0]) < size:
        exact = torch.promote_types(x.dtype, torch.float32)
        pool.scratch = None  # free it first: there are never two at once
        told = x.new_empty(2 + KEEP[1], SAMPLES, dtype=torch.int32)
        pool.scratch = x.new_empty(size, dtype=exact), *told.split((1, 1, KEEP[1]))
    return pool.scratch


def choose(z: Tensor, pool: KernelPool, found: Tensor, memory: tuple[Tensor, ...], samples: int, most: int,
           in_turn: int, table: Tensor | None = None, groups: int = 1) -> None:
    """Write the noises of a pool, or of those in `table`, into z: (B, D), and close the gaps.

    memory   `scratch`, with the products
    samples  of the largest group
    most     noises that a group has left
    in_turn  groups that have few left; they come first
    """
    inner, _, _, lists = memory
    keep = KEEP[most > MANY]
    if in_turn < groups:
        arguments = lists, found, inner, pool.own, pool.index, pool.left, multiplied(pool)
        grouped = table is not None
        fast_launch(_shortlist, (samples, 1, groups), z, (*arguments, table if grouped else pool.index),
                    (keep, LANES, grouped), warps=8)
    serve(z, pool, found, memory, samples, keep, in_turn, table, groups)


def serve(z: Tensor, pool: KernelPool, found: Tensor, memory: tuple[Tensor, ...], samples: int, keep: int,
          in_turn: int = 0, table: Tensor | None = None, groups: int = 1, x: Tensor | None = None) -> None:
    """Finish `choose` by the short lists of `keep` noises. x: (B, D) where no products are kept."""
    inner, picks, movers, lists = memory
    grouped, width = table is not None, z.shape[1]
    table = table if grouped else pool.index  # which nobody looks at
    for start, end, lanes in ((0, in_turn, FEW), (in_turn, groups, LANES)):
        if start < end:
            few = end == in_turn
            fast_launch(_choose, (1, 1, end - start), z,
                    (picks, movers, lists, found, inner, pool.own, pool.index, pool.place, pool.left,
                     multiplied(pool), samples, table, start, z if x is None else x, pool.noise),
                    (keep, lanes, SAMPLES, few, grouped, 0 if x is None else width), warps=4 if few else 8)
    hand_out(z, pool.noise, picks, movers, samples, table, groups, grouped)


def hand_out(z: Tensor, noise: Tensor, picks: Tensor, movers: Tensor, samples: int, table: Tensor, groups: int = 1,
             grouped: bool = False) -> None:
    """Copy the noises picked into z: (B, D), and those that move into their places."""
    width = z.shape[1]
    block = min(4096, 1 << (width - 1).bit_length())
    grid = samples, -(-width // block), groups
    fast_launch(_hand_out, grid, z, (z, noise, picks, movers, width, table), (block, grouped), warps=4)


_started = {}


def fast_launch(kernel, grid, x, arguments, constants, warps, stages=3):
    """Run kernel[grid](*arguments, *constants) without Triton's check, slower than the kernel, whether such arguments
    need another compilation: the type of x and the constants tell."""
    key = kernel, x.device, x.dtype, constants
    if (start := _started.get(key)) and not compiles_only():
        start(grid, *arguments)
    elif compiled := launch(kernel, grid, *arguments, *constants, num_warps=warps, num_stages=stages):
        _started[key] = starter(compiled, constants, x.device)  # the interpreter returns None


def one_by_one(pools: list[KernelPool], x: Tensor) -> Tensor:
    """The noises of each pool for the same x: (B, D) → (pools · B, D)."""
    return torch.cat([take(pool, x) for pool in pools])


def try_out(device: torch.device, dtype: torch.dtype, tf32: bool, match=one_by_one) -> None:
    """Match a few samples by the kernels and the plain way on this device. Raises where they differ or nothing runs."""
    generator = torch.Generator(device).manual_seed(0)
    # Whole numbers: every precision multiplies them exactly, and of many equal costs the first must win.
    x = torch.randn(FEW + 48, 8, generator=generator, device=device).mul(2).round().repeat(1, 8)
    x, noise = x.split((16, FEW + 32))
    label = torch.arange(len(noise), dtype=torch.int32, device=device)
    samples, noises = x.to(dtype), noise.to(dtype)
    own = COSTS["squared"](noises)
    lefts = FEW + 20, FEW

    def picked():
        pools = [SimpleNamespace(noise=noises.clone(), own=own.clone(), index=label.clone(), place=label.clone(),
                                 left=left, rows=len(noises), tf32=tf32, data_check=DataCheck((8,), device),
                                 scratch=None) for left in lefts]
        with on(device):
            return match(pools, samples)

    with compiling_ahead(device):
        picked()
    plain = torch.cat([noises[greedy(costs_from(products(samples, noises[:left], tf32), own[:left]))]
                       for left in lefts])
    for _ in range(2):  # compiled, and launched again
        if not torch.equal(picked(), plain):
            raise RuntimeError("its kernels give other noises than the plain path")
