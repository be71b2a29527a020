"""Linear assignment on a GPU: an auction in Triton, with a bound that proves how good its pairing is."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dansm import BadInput

from ..base.launch import on

WARP = 32  # threads
PROGRAMS = 528  # bidding at once: four for each of an H100's multiprocessors
NOBODY = tl.constexpr(2**31 - 1)


@triton.jit
def _bid(cost, words, samples, noises, epsilon, LANES: tl.constexpr):
    """An auction (Bertsekas 1979) without rounds: every program bids for one sample after the other.

    A word holds the state of a noise: its price in the upper half, its holder + 1 in the lower, so that words are in
    the order of their prices. A sample names the noise of least cost + price, and raises its price until it is worth
    `epsilon` less than the second best. If the atomic maximum finds a lower word, the sample has the noise, and the
    program continues with the sample that lost it. If not, another program was faster, and the sample looks again.
    Prices that rose since it looked only make its choice better, so nobody ever waits. Samples beyond the last cost
    nothing anywhere: they take what is left.
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
            second_least = tl.min(tl.where(best_noise == named, second, best), 0)
            second_least = tl.where(noises > 1, second_least, least)
            bits = (price + (second_least - least) + epsilon).to(tl.int32, bitcast=True)
            bits = tl.maximum(bits, price.to(tl.int32, bitcast=True) + 1)  # rounding must not end the bidding
            bid = (bits.to(tl.int64) << 32) | (sample + 1).to(tl.int64)
            before = tl.atomic_max(words + named, bid, sem="relaxed")
            holder = (before & 0xFFFFFFFF).to(tl.int32)
            won = before < bid
            bidding = (won & (holder > 0)) | (before >= bid)
            sample = tl.where(won & (holder > 0), holder - 1, sample)


def auction(cost: Tensor, gap: float) -> tuple[Tensor, float, float]:
    """Linear assignment of cost: (B, M) with B ≤ M → (picks (B,), total, bound), see `others.optimal`.

    The auction is repeated with ever smaller epsilon, each from the prices of the one before, until it proves itself:
    for any prices p ≥ 0, Σ_i min_j (cost_ij + p_j) − Σ_j p_j is at most the cost of any pairing.
    """
    with on(cost.device):
        return _auction(cost, gap)


def _auction(cost, gap):
    samples, noises = cost.shape
    # For digits: subtracting a number for each sample, or for each noise where all are given out, changes no pairing.
    shifted = cost - cost.amin(1, keepdim=True)
    cheapest = shifted.amin(0) if samples == noises else torch.zeros_like(shifted[0])
    shifted = shifted.sub_(cheapest).float().contiguous()
    if not shifted.isfinite().all():  # a sample without a nearest noise would never end bidding
        raise BadInput(f"the {samples}×{noises} costs hold NaN or infinite values: expected finite ones")
    random = cost.mean(dtype=torch.float64).item() * samples
    words = torch.zeros(noises, dtype=torch.int64, device=cost.device)
    epsilon = shifted.mean(dtype=torch.float64).item() / 4
    # At least as many lanes as threads: two threads that read the same word while others write it could read it
    # differently, bid for different noises, and wait for each other for ever.
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
    bound = (len(prices) - len(cost)) * prices.min() - prices.sum()  # samples that cost nothing take the cheapest
    for rows in cost.split(1024):
        bound += (rows + prices).amin(1).sum()
    return bound.item()


def try_out(device: torch.device) -> None:
    """Raises where the auction does not run on this device, or gives a noise twice."""
    if sorted(auction(torch.eye(8, device=device), 1e-3)[0].tolist()) != list(range(8)):
        raise RuntimeError("its auction gives a noise twice")
