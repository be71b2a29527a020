"""One pool spread over all ranks (match_scope "global"): the samples of every rank are matched against it together.

The result is that of one process with the joined batch, rank 0's samples first, noise for noise. Each rank holds
match_size / ranks of the noises and matches every sample against those; what travels for a batch of B samples of D
numbers on each of R ranks is, to every rank:

    the other ranks' samples                         (R − 1) · B · D numbers
    of every sample that is still to be served, each round, the best that the other ranks have
                                                     (R − 1) · 16 bytes; about a dozen rounds, ever fewer samples
    the noises picked from other ranks, in the mean  (R − 1) / R · B · D numbers

and, when fewer than four noises a sample are left in all, the costs of these in place of the rounds. `pool.received`
counts the bytes.
"""

from __future__ import annotations

import torch
import torch.distributed as group
from torch import Tensor

import dansm


def agree(pool, match_size, largest: int) -> int:
    """The largest match_size that fits on every rank; BadInput on all of them if they were made unlike."""
    made = torch.tensor([-1 if match_size is None else int(match_size), pool.seed, largest], device=pool.noise.device)
    made = torch.stack(_gathered(pool, made))
    if (made[:, :2] != made[0, :2]).any():
        raise dansm.BadInput(f"match_size and seed of the ranks are {made[:, :2].tolist()}: expected the same on all")
    return made[:, 2].min().item()


def serve(pool: dansm.NoisePool, x: Tensor) -> Tensor:
    """Match x: (B, *shape), this rank's samples; B may differ between ranks → z: (B, D). All ranks must call it, and
    where the data of one is refused all raise, lest the others wait for it forever."""
    wrong = None
    try:
        pool.check.form(x)
        if x.numel() and not dansm.has_distance(x):
            raise pool.check.unfit(f"of shape {tuple(x.shape)}")
        x = pool.flat(x)
    except dansm.BadInput as error:
        wrong, x = error, pool.noise[:0]
    pool._allocate()
    counts = torch.stack(_gathered(pool, torch.tensor([len(x), pool.left, wrong is None], device=pool.noise.device)))
    sizes, left, fine = counts.T.tolist()
    if not all(fine):
        raise wrong or dansm.BadInput(f"the batch of rank {fine.index(0)} is refused: its own message says why")
    samples = _joined(pool, x, sizes)
    receiver = torch.arange(pool.ranks, device=x.device).repeat_interleave(counts[:, 0])
    z, served = [], 0
    while served < len(samples):
        if not any(left):
            pool._refill()
            left = [pool.rows] * pool.ranks
        now = slice(served, served + min(sum(left), pool.ranks * pool._samples_at_once(pool.rows)))
        labels = _match(pool, samples[now], left)
        noise, taken = _hand_out(pool, labels, receiver[now])
        left = [had - gone for had, gone in zip(left, taken, strict=True)]
        z.append(noise)
        pool._draw_ahead()
        served = now.stop
    return torch.cat(z) if z else torch.empty_like(x)


def _match(pool, x, left) -> Tensor:
    """The label in the whole pool of the noise of each sample, (B,), the same on every rank."""
    cost = dansm.cost_matrix(x, pool.noise[: pool.left], pool.cost, pool.squared[: pool.left], pool.fast)
    order = pool.index[: pool.left].argsort()
    labels = pool.first + pool.index[order].long()
    cost = cost[:, order]
    if sum(left) < 4 * len(x):  # few are left, and nearly all samples quarrel: every rank decides for all
        costs = _joined(pool, cost.T.contiguous(), left)
        return _joined(pool, labels, left)[dansm.greedy(costs.T)]
    return _match_by_rounds(pool, cost, labels)


def _match_by_rounds(pool, cost, labels):
    """As `dansm.greedy` by rounds, each rank looking for the nearest among its own. A label of every rank is lower
    than all of the next one's, so the first of equal costs has the lowest."""
    numbers = torch.arange(len(cost), device=cost.device)
    holder = torch.full((pool.rows,), len(cost), device=cost.device)  # by label, of ours; len(cost): nobody
    picks = torch.full_like(numbers, -1)
    waiting = numbers
    while len(waiting):
        best = torch.full((len(waiting),), torch.inf, dtype=cost.dtype, device=cost.device)
        label = torch.full_like(waiting, -1)
        if len(labels):
            held = holder[labels - pool.first] <= waiting[:, None]
            best, at = cost[waiting].masked_fill_(held, torch.inf).min(1)
            label = labels[at]
        both = torch.stack(_gathered(pool, torch.stack([best.double(), label.double()])))  # exact up to 2⁵³
        picks[waiting] = both[:, 1].gather(0, both[:, 0].argmin(0, keepdim=True))[0].long()
        # Who wants what an earlier one wants too goes on looking.
        by_pick = picks.argsort(stable=True)
        first = torch.ones_like(by_pick, dtype=torch.bool)
        first[1:] = picks[by_pick[1:]] != picks[by_pick[:-1]]
        ours = by_pick[first]
        ours = ours[(picks[ours] >= pool.first) & (picks[ours] < pool.first + pool.rows)]
        holder.scatter_reduce_(0, picks[ours] - pool.first, ours, "amin")
        waiting = by_pick[~first].sort().values
    return picks


def _hand_out(pool, labels, receiver) -> tuple[Tensor, list[int]]:
    """Send the noises picked to the ranks of their samples → those for our samples, in order; what each rank gave."""
    owner = labels // pool.rows
    sent = torch.bincount(owner * pool.ranks + receiver, minlength=pool.ranks**2).view(pool.ranks, -1).tolist()
    where = torch.full((pool.rows,), -1, device=labels.device)
    where[pool.index[: pool.left].long()] = torch.arange(pool.left, device=labels.device)
    picks = where[labels[owner == pool.rank] - pool.first]  # in order of the samples, and so of their ranks
    noise = pool.noise[picks]
    pool._fill_gaps(picks)
    to_each, from_each = sent[pool.rank], [of_rank[pool.rank] for of_rank in sent]
    received = noise.new_empty(sum(from_each), noise.shape[1])
    group.all_to_all_single(received, noise, from_each, to_each)
    pool.received += (sum(from_each) - from_each[pool.rank]) * noise.shape[1] * noise.element_size()
    z = torch.empty_like(received)
    z[owner[receiver == pool.rank].argsort(stable=True)] = received  # they came in order of their owners
    return z, [sum(of_rank) for of_rank in sent]


def _gathered(pool, part: Tensor) -> list[Tensor]:
    """What every rank has, of equal shapes."""
    parts = [torch.empty_like(part) for _ in range(pool.ranks)]
    group.all_gather(parts, part.contiguous())
    pool.received += (pool.ranks - 1) * part.nbytes
    return parts


def _joined(pool, part: Tensor, sizes: list[int]) -> Tensor:
    """The rows of every rank, one rank after the other; `sizes` says how many each has."""
    padded = part.new_zeros(max(sizes), *part.shape[1:])
    padded[: len(part)] = part
    return torch.cat([rows[:size] for rows, size in zip(_gathered(pool, padded), sizes, strict=True)])
