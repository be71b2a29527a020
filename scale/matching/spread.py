"""One pool spread over all ranks (match_scope "global"): the samples of every rank are matched against it together.

The result is, noise for noise, that of one process with the joined batch, rank 0's samples first. Each rank keeps
match_size / ranks of the noises and matches every sample against those. For a batch of B samples of D numbers on each
of R ranks, every rank receives

    the other ranks' samples                                (R − 1) · B · D numbers
    in each round, the other ranks' best noise for every
    sample that is still waiting                            (R − 1) · 16 bytes each; about a dozen rounds, ever fewer
    the noises picked from other ranks, on average          (R − 1) / R · B · D numbers

and, when fewer than four noises a sample are left in all, the costs of these instead of the rounds. `received` counts
the bytes.
"""

import torch
import torch.distributed as group
from torch import Tensor

from dansm import BadInput, check_batch, check_finite_batch, greedy

from .pool import FastPool


class SpreadPool(FastPool):
    """`FastPool` of which each rank keeps a part. All ranks must make it, and call it, together."""

    def __init__(self, *arguments, seed: int | None = None, **settings):
        if not (group.is_available() and group.is_initialized()):
            raise BadInput("match_scope is global: expected torch.distributed to be set up, as by torchrun")
        if seed is None:
            raise BadInput("match_scope is global and seed is None: expected a seed, the same on every rank")
        self.rank, self.ranks = group.get_rank(), group.get_world_size()
        self.received = 0  # bytes, from the other ranks
        super().__init__(*arguments, seed=seed, **settings)

        self.stream = ()  # all ranks draw from the streams of one process

    def _answer(self, x: Tensor, labels: Tensor | None) -> Tensor:
        """Match x: (B, *shape), this rank's samples, → z: the same; B may differ between ranks. Where the data of one
        rank is refused all ranks raise, so that none waits for ever."""
        if self.match_size <= 1:
            return super()._answer(x, labels)
        return self._match(x).view(x.shape).to(x)

    def _match(self, x: Tensor) -> Tensor:
        samples, receiver, left = self._everyones_samples(x)
        z, served = [self.noise[:0]], 0
        while served < len(samples):
            if not any(left):
                self._refill()
                left = [self.rows] * self.ranks
            at_once = self._at_most(min(sum(left), self.ranks * self._samples_at_once(self.rows)))
            now = slice(served, served + at_once)
            noise, taken = self._hand_out(self._labels(samples[now], left), receiver[now])
            left = [before - gone for before, gone in zip(left, taken, strict=True)]
            z.append(noise)
            self._learn(samples[now])
            self._draw_ahead()
            served = now.stop
        return torch.cat(z)

    def _everyones_samples(self, x: Tensor) -> tuple[Tensor, Tensor, list[int]]:
        """The samples of all ranks (B, D), the rank of each, and how many noises each rank has left."""
        refusal = None
        try:
            check_batch(x, self.shape)
            check_finite_batch(x)
            x = x.detach().reshape(len(x), self.noise.shape[1]).to(self.noise)
        except BadInput as error:
            refusal, x = error, self.noise[:0]
        self._allocate()
        counts = torch.stack(self._gathered(
            torch.tensor([len(x), self.left, refusal is None], device=self.noise.device)))
        sizes, left, fine = counts.T.tolist()
        if not all(fine):
            raise refusal or BadInput(f"the batch of rank {fine.index(0)} is refused: its own message says why")
        receiver = torch.arange(self.ranks, device=x.device).repeat_interleave(counts[:, 0])
        return self._joined(x, sizes), receiver, left

    def _labels(self, x: Tensor, left: list[int]) -> Tensor:
        """The index in the whole pool of the noise of each sample, (B,), the same on every rank."""
        cost = self._costs(x)
        order = self.index[: self.left].argsort()
        labels = self.first + self.index[order].long()
        cost = cost[:, order]
        if sum(left) < 4 * len(x):  # few are left, nearly all samples want the same: every rank decides for all
            costs = self._joined(cost.T.contiguous(), left)
            return self._joined(labels, left)[greedy(costs.T)]
        return self._labels_by_rounds(cost, labels)

    def _labels_by_rounds(self, cost: Tensor, labels: Tensor) -> Tensor:
        """As `greedy_by_rounds`, each rank looking for the nearest among its own. The labels of a rank are lower than
        those of the next, so the first of equal costs has the lowest."""
        numbers = torch.arange(len(cost), device=cost.device)
        nobody = len(cost)
        holder = torch.full((self.rows,), nobody, device=cost.device)  # of each noise of this rank
        picks = torch.full_like(numbers, -1)
        waiting = numbers
        while len(waiting):
            best = torch.full((len(waiting),), torch.inf, dtype=cost.dtype, device=cost.device)
            label = torch.full_like(waiting, -1)
            if len(labels):
                held = holder[labels - self.first] <= waiting[:, None]
                best, at = cost[waiting].masked_fill_(held, torch.inf).min(1)
                label = labels[at]
            offers = torch.stack(self._gathered(torch.stack([best.double(), label.double()])))  # exact up to 2⁵³
            picks[waiting] = offers[:, 1].gather(0, offers[:, 0].argmin(0, keepdim=True))[0].long()
            # A sample that wants the noise of an earlier one continues to look.
            by_pick = picks.argsort(stable=True)
            first = torch.ones_like(by_pick, dtype=torch.bool)
            first[1:] = picks[by_pick[1:]] != picks[by_pick[:-1]]
            ours = by_pick[first]
            ours = ours[(picks[ours] >= self.first) & (picks[ours] < self.first + self.rows)]
            holder.scatter_reduce_(0, picks[ours] - self.first, ours, "amin")
            waiting = by_pick[~first].sort().values
        return picks

    def _hand_out(self, labels: Tensor, receiver: Tensor) -> tuple[Tensor, list[int]]:
        """Send the noises picked to the ranks of their samples. Returns those for this rank, in the order of its
        samples, and how many each rank gave."""
        owner = labels // self.rows
        sent = torch.bincount(owner * self.ranks + receiver, minlength=self.ranks**2).view(self.ranks, -1).tolist()
        where = torch.full((self.rows,), -1, device=labels.device)
        where[self.index[: self.left].long()] = torch.arange(self.left, device=labels.device)
        picks = where[labels[owner == self.rank] - self.first]  # in the order of the samples, so of their ranks
        noise = self.noise[picks]
        self._fill_gaps(picks)
        to_each, from_each = sent[self.rank], [row[self.rank] for row in sent]
        received = noise.new_empty(sum(from_each), noise.shape[1])
        group.all_to_all_single(received, noise, from_each, to_each)
        self.received += (sum(from_each) - from_each[self.rank]) * noise.shape[1] * noise.element_size()
        z = torch.empty_like(received)
        z[owner[receiver == self.rank].argsort(stable=True)] = received  # they came in the order of their owners
        return z, [sum(row) for row in sent]

    def _gathered(self, part: Tensor) -> list[Tensor]:
        """What every rank has, tensors of equal shape."""
        parts = [torch.empty_like(part) for _ in range(self.ranks)]
        group.all_gather(parts, part.contiguous())
        self.received += (self.ranks - 1) * part.nbytes
        return parts

    def _joined(self, part: Tensor, sizes: list[int]) -> Tensor:
        """The rows of every rank, one rank after the other. sizes: how many rows each has."""
        padded = part.new_zeros(max(sizes), *part.shape[1:])
        padded[: len(part)] = part
        return torch.cat([rows[:size] for rows, size in zip(self._gathered(padded), sizes, strict=True)])

    def _agreed(self, match_size: int | None, largest: int) -> int:
        made = torch.tensor([-1 if match_size is None else int(match_size), self.seed, largest],
                            device=self.noise.device)
        made = torch.stack(self._gathered(made))
        if (made[:, :2] != made[0, :2]).any():
            raise BadInput(f"match_size and seed of the ranks are {made[:, :2].tolist()}: expected the same on all")
        return made[:, 2].min().item() // self.ranks * self.ranks
