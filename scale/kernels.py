"""The pick of the nearest noises, the hand-out and linear assignment on a GPU, in Triton.

`take` is `NoisePool._take` in one matrix product (by the vendor's library) and three launches, and never makes
the CPU wait for the GPU:

    shortlist   for each sample its nearest noises, in order: one program a sample
    choose      the serial rule on the short lists, all samples at once: one program
    hand_out    copy the noises picked out of the pool, and the last free ones into their places

What is said of a noise is its label: its place when the pool began, by which ties are decided, so that the picks
are those of the plain path and of the paper's loop, whatever moved since. pool.index is the label at a place,
pool.place the place of a label, or −1 once it is taken.
"""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import torch
import triton
import triton.language as tl
from torch import Tensor

import dansm
from scale.launch import compiling_ahead, launch

# Noises on a short list, and on one of a pool of more than MANY: photographs like the same ones, and where a list ends
# a whole row is read, which of a million noises takes about a millisecond.
KEEP, MANY = (64, 128), 2**16
LANES = 1024  # noises looked at together
WARP = 32  # threads
PROGRAMS = 528  # bidding at once: four for each of an H100's multiprocessors
SAMPLES = dansm.NoisePool.served_at_once
FEW = 1024  # so few noises are left that a list would be all of them: samples are served in turn
NOBODY = tl.constexpr(2**31 - 1)


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
    """The label of the least cost, of equal ones the lowest."""
    return tl.min(tl.where(cost == tl.min(cost, 0), label, NOBODY), 0)


@triton.jit
def _costs(products, squared, index, sample, places, left, wide, SQUARED: tl.constexpr):
    """Cost and label of the noises at these places for one sample; inf and NOBODY beyond the last."""
    there = places < left
    cost = tl.load(products + sample * tl.cast(wide, tl.int64) + places, mask=there, other=0.0)
    cost = tl.load(squared + places, mask=there, other=0.0) - 2 * cost if SQUARED else -cost
    cost = tl.where(there & (cost == cost), cost, float("inf"))  # NaN is as far as can be
    return cost, tl.load(index + places, mask=there, other=NOBODY)


@triton.jit
def _tell(found, infinite):
    """Data that is not finite has infinite costs: let the CPU know, which looks when the next batch comes."""
    tl.store(found, 1, mask=tl.max(infinite.to(tl.int32), 0) > 0)


@triton.jit(do_not_specialize=["left", "wide"])
def _shortlist(lists, found, products, squared, index, left, wide, SQUARED: tl.constexpr, KEEP: tl.constexpr,
               LANES: tl.constexpr):
    """lists: (samples, KEEP) labels, nearest first. Each lane remembers the four nearest that it met; where one has
    given up all four, what else it met might be next, and the list ends with −1."""
    sample = tl.program_id(0)
    lane = tl.arange(0, LANES)
    c1, l1 = _costs(products, squared, index, sample, lane + left, left, wide, SQUARED)  # none: inf and NOBODY
    c2, l2 = c1, l1
    c3, l3 = c1, l1
    c4, l4 = c1, l1
    infinite = l1 != NOBODY
    for start in range(0, left, LANES):
        c, label = _costs(products, squared, index, sample, start + lane, left, wide, SQUARED)
        infinite |= (label != NOBODY) & (tl.abs(c) == float("inf"))
        worse, worse_label = _farther(c1, l1, c, label)
        c1, l1 = _nearer(c1, l1, c, label)
        c, label = _farther(c2, l2, worse, worse_label)
        c2, l2 = _nearer(c2, l2, worse, worse_label)
        worse, worse_label = _farther(c3, l3, c, label)
        c3, l3 = _nearer(c3, l3, c, label)
        c4, l4 = _nearer(c4, l4, worse, worse_label)
    _tell(found, infinite)
    for k in range(KEEP):
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
def _nearest_not_taken(products, squared, index, place, sample, left, wide, SQUARED: tl.constexpr, LANES: tl.constexpr):
    """Of the whole row, the label of the nearest noise whose place is not marked as taken."""
    lane = tl.arange(0, LANES)
    best, best_label = _costs(products, squared, index, sample, lane + left, left, wide, SQUARED)
    for start in range(0, left, LANES):
        cost, label = _costs(products, squared, index, sample, start + lane, left, wide, SQUARED)
        free = tl.load(place + label, mask=label != NOBODY, other=-1, volatile=True) >= 0
        best, best_label = _nearer(best, best_label, tl.where(free, cost, float("inf")), tl.where(free, label, NOBODY))
    return _nearest(best, best_label)


@triton.jit(do_not_specialize=["left", "wide", "samples"])
def _choose(picks, movers, lists, found, products, squared, index, place, left, wide, samples, SQUARED: tl.constexpr,
            KEEP: tl.constexpr, LANES: tl.constexpr, SAMPLES: tl.constexpr, IN_TURN: tl.constexpr):
    """Writes for each sample the place of its noise into picks, and into movers the place of the noise that moves
    there, −1 for none; updates squared, index and place for the pool of left − samples noises."""
    i = tl.arange(0, SAMPLES)
    if IN_TURN:  # few noises: the row is no longer than a list would be, and what is taken fits into registers
        lane = tl.arange(0, LANES)
        free = lane < left
        pick = tl.full([SAMPLES], -1, tl.int32)
        infinite = lane < 0
        next_cost, label = _costs(products, squared, index, 0, lane, left, wide, SQUARED)
        for sample in range(samples):
            cost = next_cost
            following = tl.minimum(sample + 1, samples - 1)  # asked for before it is needed
            next_cost, label = _costs(products, squared, index, following, lane, left, wide, SQUARED)
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
            # Deferred acceptance, as in dansm.greedy: who wants what an earlier one has goes on in his list.
            same = (pick[:, None] == pick[None, :]) & (i[None, :] < i[:, None])
            lost = (tl.max(same.to(tl.int32), 1) > 0) & (pick >= 0)
            if tl.max(lost.to(tl.int32), 0) > 0:
                rank += lost.to(tl.int32)
                after = tl.load(lists + i * KEEP + rank, mask=lost & (rank < KEEP), other=-1)
                pick = tl.where(lost, after, pick)
            else:
                # All are content but those whose list has ended. Nothing can change any more for those before the
                # first of these, so what he gets is the nearest that they left.
                first = tl.min(tl.where((pick < 0) & (i < samples), i, SAMPLES), 0)
                if first < samples:
                    at = tl.load(place + pick, mask=i < first, other=0, volatile=True)
                    tl.debug_barrier()
                    tl.store(place + pick, tl.where(at >= 0, -2 - at, at), mask=i < first)  # a mark to be taken back
                    tl.debug_barrier()
                    nearest = _nearest_not_taken(products, squared, index, place, first, left, wide, SQUARED, LANES)
                    pick = tl.where(i == first, nearest, pick)
                waiting = first < samples
        tl.debug_barrier()

    here = i < samples
    at = tl.load(place + pick, mask=here, other=-1, volatile=True)
    at = tl.where(at < -1, -2 - at, at)
    tl.store(picks + i, at, mask=here)

    # The last ones move into the gaps: the first gap in batch order gets the first of them that is not taken.
    end = left - samples
    gap = here & (at < end)
    stays = tl.max((at[:, None] == (end + i)[None, :]).to(tl.int32), 0) == 0  # the i-th of the last is not taken
    moves = here & stays
    gap_number = tl.where(gap, tl.cumsum(gap.to(tl.int32), 0), -1)
    move_number = tl.where(moves, tl.cumsum(moves.to(tl.int32), 0), 0)
    fits = gap_number[:, None] == move_number[None, :]
    mover = tl.max(tl.where(fits, (end + i)[None, :], -1), 1)
    tl.store(movers + i, mover, mask=here)
    moved = tl.load(index + mover, mask=gap, other=0)
    norm = tl.load(squared + mover, mask=gap, other=0.0)
    tl.debug_barrier()
    tl.store(place + pick, -1, mask=here)
    tl.store(place + moved, at, mask=gap)
    tl.store(index + at, moved, mask=gap)
    tl.store(squared + at, norm, mask=gap)


@triton.jit(do_not_specialize=["width"])
def _hand_out(z, noise, picks, movers, width, BLOCK: tl.constexpr):
    """z[i] = noise[picks[i]], and noise[movers[i]] takes its place. A row is read before it is written by the one
    program that does both, and no row that moves is one that was picked."""
    i = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at, mover = tl.load(picks + i).to(tl.int64), tl.load(movers + i).to(tl.int64)
    there, moves = columns < width, columns < tl.where(mover >= 0, width, 0)
    picked = tl.load(noise + at * width + columns, mask=there)
    moved = tl.load(noise + mover * width + columns, mask=moves)
    tl.store(z + i * width + columns, picked, mask=there)
    tl.store(noise + at * width + columns, moved, mask=moves)


def take(pool: dansm.NoisePool, x: Tensor) -> Tensor:
    """Match x: (B, D) with 1 ≤ B ≤ 256 and B ≤ pool.left → z: (B, D), which leaves the pool."""
    with _on(x.device):
        return _take(pool, x)


def _on(device):
    """Triton launches on the current device, which need not be that of the pool."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _take(pool, x):
    samples, width = x.shape
    wide = -(-pool.left // 16) * 16  # the products beyond pool.left are of noises taken, and never looked at
    if pool.scratch is None or len(pool.scratch[0]) < samples * wide:
        exact, pool.scratch = torch.promote_types(x.dtype, torch.float32), None  # None: never two of them at once
        pool.scratch = x.new_empty(samples * wide, dtype=exact), x.new_empty(2 + KEEP[1], SAMPLES, dtype=torch.int32)
    products, (picks, movers, lists) = pool.scratch[0], pool.scratch[1].split((1, 1, KEEP[1]))
    dansm.inner_products(x, pool.noise[:wide], pool.fast, out=products[: samples * wide].view(samples, wide))
    z = torch.empty_like(x)
    row = pool.check.found, products, pool.squared, pool.index
    squared, in_turn, keep = pool.cost == "squared", pool.left <= FEW, KEEP[pool.left > MANY]
    if not in_turn:
        _launch(_shortlist, (samples, 1, 1), x, (lists, *row, pool.left, wide), (squared, keep, LANES), warps=8)
    _launch(_choose, (1, 1, 1), x, (picks, movers, lists, *row, pool.place, pool.left, wide, samples),
            (squared, keep, FEW if in_turn else LANES, SAMPLES, in_turn), warps=4 if in_turn else 8)
    block = min(4096, triton.next_power_of_2(width))
    grid = samples, triton.cdiv(width, block), 1
    _launch(_hand_out, grid, x, (z, pool.noise, picks, movers, width), (block,), warps=4)
    pool.left -= samples
    return z


def _launch(kernel, grid, x, arguments, constants, warps):
    """kernel[grid](*arguments, *constants), but without finding out each time, in more time than the kernel takes,
    whether such arguments need another compilation: the type of x and the constants tell."""
    key = kernel, x.device, x.dtype, constants
    if key in _compiled:
        _compiled[key][grid](*arguments, *constants)
    elif compiled := launch(kernel, grid, *arguments, *constants, num_warps=warps):  # None in the interpreter
        _compiled[key] = compiled


_compiled = {}


# ---------------------------------------------------------------------------------------------------
# Linear assignment
# ---------------------------------------------------------------------------------------------------


@triton.jit
def _bid(cost, words, samples, noises, epsilon, LANES: tl.constexpr):
    """An auction (Bertsekas 1979) without rounds: every program bids for one sample after the other.

    A word holds what is known of a noise: its price in the upper half, its holder + 1 in the lower; as numbers such
    words are in the order of their prices. A sample names the noise of least cost + price and raises its price until
    it is worth `epsilon` less than the second best. If the atomic maximum finds a lower word, the noise is his, and
    the program goes on with the sample that lost it; if not, another was quicker, and he looks again. Prices that
    rose since he looked only make his choice better, so nobody ever waits. Samples beyond the last cost nothing
    anywhere: they take what is left.
    """
    lane = tl.arange(0, LANES)
    for start_sample in range(tl.program_id(0), noises, tl.num_programs(0)):
        sample = start_sample
        bidding = True
        while bidding:
            best = tl.full([LANES], float("inf"), tl.float32)
            second, best_price = best, tl.zeros([LANES], tl.float32)
            best_noise = tl.full([LANES], NOBODY, tl.int32)
            row = cost + sample.to(tl.int64) * noises
            for start in range(0, noises, LANES):
                noise = start + lane
                there = noise < noises
                word = tl.load(words + noise, mask=there, other=0, volatile=True)
                price = (word >> 32).to(tl.int32).to(tl.float32, bitcast=True)
                value = tl.load(row + noise, mask=there & (noise < tl.where(sample < samples, noises, 0)), other=0.0)
                value = tl.where(there, value + price, float("inf"))
                second = tl.minimum(second, tl.maximum(best, value))
                best_noise = tl.where(value < best, noise, best_noise)
                best_price = tl.where(value < best, price, best_price)
                best = tl.minimum(best, value)
            least = tl.min(best, 0)
            named = tl.minimum(tl.min(tl.where(best == least, best_noise, NOBODY), 0), noises - 1)
            price = tl.max(tl.where(best_noise == named, best_price, 0.0), 0)
            least_but_one = tl.min(tl.where(best_noise == named, second, best), 0)
            least_but_one = tl.where(noises > 1, least_but_one, least)
            bits = (price + (least_but_one - least) + epsilon).to(tl.int32, bitcast=True)
            bits = tl.maximum(bits, price.to(tl.int32, bitcast=True) + 1)  # rounding must not end the bidding
            bid = (bits.to(tl.int64) << 32) | (sample + 1).to(tl.int64)
            before = tl.atomic_max(words + named, bid, sem="relaxed")
            holder = (before & 0xFFFFFFFF).to(tl.int32)
            won = before < bid
            bidding = (won & (holder > 0)) | (before >= bid)
            sample = tl.where(won & (holder > 0), holder - 1, sample)


def auction(cost: Tensor, gap: float) -> tuple[Tensor, float, float]:
    """Linear assignment, cost: (B, M) with B ≤ M → (picks (B,), total, bound), see `dansm.optimal`.

    The auction is repeated with an ever smaller epsilon, from the prices of the one before, until it proves itself:
    for any prices p ≥ 0, Σ_i min_j (cost_ij + p_j) − Σ_j p_j is no more than the cost of any pairing.
    """
    with _on(cost.device):
        return _auction(cost, gap)


def _auction(cost, gap):
    samples, noises = cost.shape
    least = cost.amin(1, keepdim=True)  # a number for each sample changes no pairing, nor does one for each noise where
    shifted = cost - least  # all are given out; it saves digits
    cheapest = shifted.amin(0) if samples == noises else torch.zeros_like(shifted[0])
    shifted = shifted.sub_(cheapest).float().contiguous()
    dansm.check_costs(shifted)  # a sample without a nearest noise would bid for none for ever
    random = cost.mean(dtype=torch.float64).item() * samples
    words = torch.zeros(noises, dtype=torch.int64, device=cost.device)
    epsilon = shifted.mean(dtype=torch.float64).item() / 4
    # No fewer lanes than threads: two that read the same word, which others write meanwhile, could read it differently,
    # bid for different noises, and wait for each other for ever.
    lanes = min(4096, max(WARP, triton.next_power_of_2(noises)))
    while True:
        words &= -(2**32)
        _bid[(min(noises, PROGRAMS),)](shifted, words, samples, noises, epsilon, lanes, num_warps=min(8, lanes // WARP))
        holder = (words & (2**32 - 1)) - 1
        prices = (words >> 32).int().view(torch.float32)
        picks = torch.empty(noises, dtype=torch.int64, device=cost.device)
        picks[holder] = torch.arange(noises, device=cost.device)
        total = cost.gather(1, picks[:samples, None]).sum(dtype=torch.float64).item()
        bound = _bound(cost, prices.double() - cheapest)
        if total - bound <= gap * (random - total) or epsilon <= 2**-20 * prices.max().item() or epsilon == 0:
            return picks[:samples], total, bound
        epsilon /= 5


def _bound(cost, prices):
    bound = (len(prices) - len(cost)) * prices.min() - prices.sum()  # the first: samples that cost nothing anywhere
    for rows in cost.split(1024):
        bound += (rows + prices).amin(1).sum()
    return bound.item()


# ---------------------------------------------------------------------------------------------------
# Whether all this works here
# ---------------------------------------------------------------------------------------------------


def try_out(device: torch.device, *way) -> None:
    """Match a few samples this way and the plain way, on this device; raises where they differ or nothing runs. `way`
    as in `dansm.gpu_kernels`: what a pool does not need is not compiled."""
    if way:
        _try_matching(device, *way)
    elif sorted(auction(torch.eye(8, device=device), 1e-3)[0].tolist()) != list(range(8)):
        raise RuntimeError("its auction gives a noise twice")


def _try_matching(device, cost, dtype, fast):
    generator = torch.Generator(device).manual_seed(0)
    # Whole numbers: every precision multiplies them exactly, and of many equal costs the first must win.
    x, noise = torch.randn(FEW + 48, 8, generator=generator, device=device).mul(2).round().split((16, FEW + 32))
    label = torch.arange(len(noise), dtype=torch.int32, device=device)
    check = dansm.DataCheck((8,), device)
    samples, noises = x.to(dtype), noise.to(dtype)
    norms = dansm.squared_norms(noises)

    def pool(left):
        return SimpleNamespace(noise=noises.clone(), squared=norms.clone(), index=label.clone(), place=label.clone(),
                               left=left, cost=cost, fast=fast, check=check, scratch=None)

    with compiling_ahead(device):
        for left in (FEW + 20, FEW):
            take(pool(left), samples)
    for left in (FEW + 20, FEW):
        plain = noises[dansm.greedy(dansm.cost_matrix(samples, noises[:left], cost, norms[:left], fast))]
        for _ in range(2):  # compiled, and launched again
            if not torch.equal(take(pool(left), samples), plain):
                raise RuntimeError("its kernels give other noises than the plain path")
