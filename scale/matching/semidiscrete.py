"""Noises for data that are known beforehand, by an optimal plan: semidiscrete optimal transport."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dansm import (
    BadInput,
    at_least_float32,
    check_count,
    check_finite_batch,
    check_tensor,
    members_of,
    noise_generator,
    rows,
)

VALUES = 2**28  # of noises and samples, computed at once
SOLVING, DRAWING, LOTS, PARTS = range(2**31, 2**31 + 4)  # streams of the seed that no pool has


class Solved(NamedTuple):
    """How even the shares of a part's samples are."""

    error: float  # rms of a share over what it should be, less 1; chance taken off, so 0 may be an estimate
    deviation: float  # of its square
    noises: float  # drawn for each sample


class Part(NamedTuple):
    """Samples that share a plan. Equal ones count as one that is to be taken as often as all of them."""

    samples: Tensor  # their numbers, equal ones together
    begin: Tensor  # where each group of equal ones begins in it,
    copies: Tensor  # and how many they are


class Semidiscrete:
    """Noises for known data: z takes the sample x_j of the largest ⟨z, x_j⟩ − b_j, so that every batch is N(0, I).

    A number b_j for each sample, its potential, makes all be taken equally often; of all plans that do, this has the
    least E‖x − z‖² (Genevay et al. 2016). No pool is left over, and no process needs another's.

        coupling = Semidiscrete(data, groups=labels)     # data: (n, ...), labels: (n,) or None
        coupling.solve()                                 # until shares are off by 10 % (rms)
        z, taken = coupling.draw(256)                    # (256, ...), and the numbers of their samples: data[taken]
        z, taken = coupling.draw(256, labels)            # of samples with these labels

    groups  match within each: then noises are N(0, I) within each, see docs/conditions.md
    part    how many samples share a plan, at most; None: all of a group. Samples go to parts at random, and noises to
            parts by their sizes, so that the prior stays. A noise costs 2 · part · D operations
    seed    see `dansm.NoisePool`

    Raises BadInput for data without samples, with NaN, infinite or huge values, and labels that `dansm.pairs` refuses.
    """

    def __init__(self, data: Tensor, groups: Tensor | None = None, *, part: int | None = None, seed: int | None = None):
        check_tensor(data)
        if data.ndim < 2 or not len(data):
            raise BadInput(f"the data are of shape {tuple(data.shape)}: expected (n, ...) with a sample or more")
        check_finite_batch(data)
        self.shape, self.x = data.shape[1:], at_least_float32(rows(data.detach()))
        self.seed = torch.seed() % 2**32 if seed is None else check_count("seed", seed, at_least=0)
        part = len(data) if part is None else check_count("part", part)
        shuffle = noise_generator(self.seed, "cpu", PARTS)
        self.groups, members = 1, {0: torch.arange(len(data))}
        if groups is not None:
            self.groups = int(groups.max()) + 1 if isinstance(groups, Tensor) and groups.numel() else 1
            members = members_of(groups, len(data), self.groups)
        keys = digests(self.x)
        self.parts = {}  # group → its parts
        for group, samples in members.items():
            samples = samples[torch.randperm(len(samples), generator=shuffle)].to(self.x.device)
            parts = samples.tensor_split(-(-len(samples) // part))
            self.parts[group] = [with_copies(of_part, keys) for of_part in parts]
        self.potentials = torch.empty(len(data), device=self.x.device)
        for of_part in self._all_parts():
            self._keep(of_part, first_potentials(self.x[of_part.samples[of_part.begin]]))
        self.generator = noise_generator(self.seed, self.x.device, DRAWING)
        self.lots = noise_generator(self.seed, "cpu", LOTS)

    def _all_parts(self) -> Iterator[Part]:
        return (of_part for parts in self.parts.values() for of_part in parts)

    def _keep(self, of_part: Part, potentials: Tensor) -> None:
        self.potentials[of_part.samples] = potentials.repeat_interleave(of_part.copies)

    # ------------------------------------------------------------------------------- potentials

    @torch.no_grad()
    def solve(self, error: float = 0.1, most: int = 1000) -> list[Solved]:
        """Find the potentials, part by part, until the shares are off by `error` or less (rms), two deviations of its
        estimate included, or `most` noises have been drawn for each sample. Returns what each part reached."""
        if not 0 < error < math.inf:
            raise BadInput(f"error is {error}: expected a number above 0, like 0.1 for shares that are off by 10 %")
        reached = []
        for number, of_part in enumerate(self._all_parts()):
            x, share = self.x[of_part.samples[of_part.begin]], of_part.copies / len(of_part.samples)
            solved = Solved(0.0, 0.0, 0.0)
            if len(x) > 1:
                for potentials, solved in approach(x, share, noise_generator(self.seed, x.device, SOLVING, number)):
                    self._keep(of_part, potentials)
                    if solved.error**2 + 2 * solved.deviation <= error**2 or solved.noises >= most:
                        break
            reached.append(solved)
        return reached

    # ------------------------------------------------------------------------------- noises

    @torch.no_grad()
    def draw(self, count: int, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Fresh noises z: (count, ...), and the numbers (count,) of the samples that they take: of these labels
        (count,), or of labels as often as the data have them."""
        z = torch.randn(count, self.x.shape[1], generator=self.generator, device=self.x.device)
        lots = torch.rand(count, generator=self.generator, device=self.x.device)  # which of equal samples
        taken = torch.empty(count, dtype=torch.int64, device=self.x.device)
        for (samples, begin, copies), noises in self._shared_out(count, labels):
            noises, first = noises.to(z.device), samples[begin]
            picks = (z[noises] @ self.x[first].T - self.potentials[first]).argmax(1)
            taken[noises] = samples[begin[picks] + (lots[noises] * copies[picks]).long()]
        return z.view(count, *self.shape), taken

    def _shared_out(self, count: int, labels: Tensor | None) -> Iterator[tuple[Part, Tensor]]:
        """The parts, and which noises each gets: by lot, as many as it has samples."""
        by_group, noises_of = {0: list(self._all_parts())}, {0: torch.arange(count)}
        if labels is not None:
            by_group, noises_of = self.parts, members_of(labels, count, self.groups)
            if missing := sorted(noises_of.keys() - by_group.keys()):
                raise BadInput(f"no sample of the data has label {missing[0]}: expected labels that some have")
        for group, noises in noises_of.items():
            sizes = torch.tensor([len(of_part.samples) for of_part in by_group[group]], dtype=torch.float64)
            lots = torch.rand(len(noises), generator=self.lots, dtype=torch.float64) * sizes.sum()
            numbers = torch.searchsorted(sizes.cumsum(0), lots, right=True)
            for number in numbers.unique().tolist():
                yield by_group[group][number], noises[numbers == number]

    # ------------------------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict:
        return {"made_for": self._made_for(), "potentials": self.potentials.clone(),
                "generator": self.generator.get_state(), "lots": self.lots.get_state()}

    def load_state_dict(self, state: dict) -> None:
        made_for = state.get("made_for") if isinstance(state, dict) else None
        if made_for != self._made_for():
            raise BadInput(f"the state is of {made_for}: expected one of {self._made_for()}")
        self.potentials.copy_(state["potentials"])
        self.generator.set_state(state["generator"].cpu())
        self.lots.set_state(state["lots"].cpu())

    def _made_for(self) -> dict:
        return {"samples": len(self.x), "shape": list(self.shape), "seed": self.seed, "groups": self.groups,
                "parts": [len(of_part.samples) for of_part in self._all_parts()], "device": self.x.device.type}


# ------------------------------------------------------------------------------- equal samples


def digests(x: Tensor) -> Tensor:
    """A number for each row of x: (n, D) → (n,) int64, the same for equal ones. Others share one by chance alone."""
    factors = torch.randint(-(2**62), 2**62, (x.shape[1],), generator=torch.Generator().manual_seed(0)).to(x.device)
    return torch.cat([((part + 0.0).float().view(torch.int32) * factors).sum(1) for part in x.split(1024)])


def with_copies(samples: Tensor, keys: Tensor) -> Part:
    """A part of these samples; keys: the `digests` of all."""
    order = keys[samples].argsort(stable=True)
    samples = samples[order]
    _, copies = keys[samples].unique_consecutive(return_counts=True)
    return Part(samples, copies.cumsum(0) - copies, copies)


# ------------------------------------------------------------------------------- the solver


def sizes(x: Tensor) -> Tensor:
    """The deviations of ⟨z, x_j⟩ for x: (n, D) → (n,), without the part that is the same for all."""
    return (x - x.mean(0)).norm(dim=1)


def first_potentials(x: Tensor) -> Tensor:
    """Where potentials begin, x: (n, D) → (n,): the largest of n normal numbers lies at √(2 ln n) deviations."""
    return sizes(x) * math.sqrt(2 * math.log(len(x)))


def approach(x: Tensor, share: Tensor, generator: torch.Generator,
             batch: int = 1024) -> Iterator[tuple[Tensor, Solved]]:
    """Ever better potentials (n,) of x: (n, D), n ≥ 2, for these shares (n,) of the noises, and how good they are.

    Gradient steps on the dual, one batch of noises each:

    - A noise is shared among samples whose values are nearly the largest (softmax), so it tells of several. The
      temperature is steered so that others than the largest get the part `spread` of it. It falls as more noises have
      come, but not before shares are within 60 %: in few dimensions, steps at once as fine as the end never get there
      (annealed as by Genans et al. 2025).
    - A step of temperature / spread for a share that is off by its whole is Newton's, if the others stand still:
      values near the largest thin out exponentially at that scale, whatever the units of the data.
    - The mean of all potentials on the way is what counts (Polyak and Juditsky 1992): its error is about that of the
      noises themselves, √(n / noises), though steps stay large enough to move on.

    The error is that of the mean at the check before, told by the noises since: they had no part in it.
    """
    n, size = len(x), sizes(x)
    batch = max(2, min(batch, max(32, n // 4), VALUES // n))
    b = first_potentials(x)
    mean, averaged = b.clone(), 0
    scale = size.mean().item() / math.sqrt(2 * math.log(n))
    temperature, spread, unevenness = scale, 0.95, 1.0
    weight = 0.5 + 0.5 * size / size.mean()
    judged, taken, step, check = mean, torch.zeros(n, device=x.device), 0, 4.0
    while True:
        step += 1
        drawn = step * batch / n
        values = torch.randn(batch, x.shape[1], generator=generator, device=x.device).to(x) @ x.T
        taken += (values - judged).argmax(1).bincount(minlength=n)
        shared = ((values - b) / temperature).softmax(1)
        one, other = (half.mean(0) / share - 1 for half in shared.chunk(2))
        unevenness += min(0.25, batch / n) * ((share * one * other).sum().item() - unevenness)
        least = 0.6 * (1 + drawn / 10) ** -0.4
        if unevenness < 0.6**2:
            spread = max(least, spread * (1 - 0.5 * min(1, batch / n)))
        rate = min(0.5, 4 * batch / n / math.sqrt(1 + drawn))
        b = b + temperature / spread * weight * (rate * (one + other) / 2).clamp_max(2)
        temperature = max(1e-6 * scale, temperature * math.exp(2 * (spread - 1 + shared.square().sum(1).mean().item())))
        averaged += spread == least
        mean = mean + (b - mean) / max(1, averaged)
        if drawn >= check:
            yield mean, evenness(taken, share, drawn)
            judged, taken, check = mean, torch.zeros_like(taken), 1.3 * drawn


def evenness(taken: Tensor, share: Tensor, noises: float) -> Solved:
    """How far from their `share` (n,) samples are taken, from how often each was, (n,), by chance too."""
    total, share = taken.sum().item(), share.double()
    found = taken.double() / total
    by_chance = found * (1 - found) / (total - 1)  # the variance of each, estimated
    square = max(0.0, (((found - share).square() - by_chance) / share).sum().item())
    return Solved(math.sqrt(square), math.sqrt(2 / len(taken)) * (square + len(taken) / total), noises)
