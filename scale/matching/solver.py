"""The potentials of a semidiscrete coupling, by random steps on noises shared out among samples."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .gpu import working
from .products import products

VALUES = 2**28  # products of noises and samples in a step, at most


class Solved(NamedTuple):
    """How even the shares of a part's samples are."""

    square: float  # mean square of a share over what it should be, less 1; chance taken off, so it may be below 0
    deviation: float  # of this estimate
    noises: float  # drawn for each sample

    @property
    def error(self) -> float:
        """The root of the mean square."""
        return math.sqrt(max(0.0, self.square))

    @property
    def at_most(self) -> float:
        """The error, two deviations of the estimate included: where this stops a solve, luck does not."""
        return math.sqrt(max(0.0, self.square) + 2 * self.deviation)


class Solver:
    """Ever better potentials of samples x: (n, D), n ≥ 2, that are to get these shares (n,) of the noises.

    Gradient steps on the dual, one batch of noises each:

    - A noise is shared among samples whose values are nearly the largest (softmax), so it tells of several. The
      temperature is steered so that others than the largest get the part `spread` of it. It falls as more noises have
      come, but not before shares are within 60 %: in few dimensions, steps at once as fine as the end never get there
      (annealed as by Genans et al. 2025).
    - A step of temperature / spread for a share that is off by its whole is Newton's, if the others stand still:
      values near the largest thin out exponentially at that scale, whatever the units of the data.
    - The mean of all potentials on the way is what counts (Polyak and Juditsky 1992): its error is about that of the
      noises themselves, √(n / noises), though steps stay large enough to move on.

    x         on the CPU or a GPU, in any floating point type; noises are rounded to it
    share     of the noises, for each sample; their sum is 1
    generator  of the noises, on the same device
    values    products of noises and samples, computed at once; the result is the same but for rounding

    No step makes a GPU wait. What the steps change is in `state_dict`.
    """

    changed = "b", "mean", "judged", "taken", "temperature", "spread", "unevenness", "averaged"
    counted = "batch", "steps", "checked"

    def __init__(self, x: Tensor, share: Tensor, generator: torch.Generator, values: int = VALUES):
        self.x, self.share, self.generator, self.values = x, share.float(), generator, values
        self.batch = noises_of_a_step(len(x))
        size = sizes(x)
        self.weight = 0.5 + 0.5 * size / size.mean()
        self.b = self.mean = self.judged = first_potentials(x)  # those of the last step, their mean, and that before
        self.taken = torch.zeros(len(x), device=x.device, dtype=torch.int32)  # by the potentials `judged`
        self.scale = size.mean() / math.sqrt(2 * math.log(len(x)))
        self.temperature, number = self.scale, self.scale.new_tensor
        self.spread, self.unevenness, self.averaged = number(0.95), number(1.0), number(0.0)
        self.steps, self.checked = 0, 0.0  # noises for each sample when it was checked last
        self.shared_out = shared_out
        if x.dtype != torch.float64 and (kernels := working("semidiscrete_kernels", x.device)):
            self.shared_out = kernels.shared_out

    @property
    def noises(self) -> float:
        """Drawn for each sample so far."""
        return self.steps * self.batch / len(self.x)

    @property
    def due(self) -> bool:
        """Whether enough noises have come since the last check for another."""
        return self.noises >= max(4.0, 1.3 * self.checked)

    def step(self) -> None:
        self.steps += 1
        n, drawn = len(self.x), self.noises
        z = torch.randn(self.batch, self.x.shape[1], generator=self.generator, device=self.x.device,
                        dtype=torch.float32).to(self.x)  # whatever the default type is
        winners, first, second, squares = self._shared_out(z)
        self.taken.index_add_(0, winners, torch.ones_like(winners, dtype=torch.int32))
        first, second = first / self.share - 1, second / self.share - 1
        uneven = (self.share * first * second).sum()
        self.unevenness = torch.lerp(self.unevenness, uneven, min(0.25, self.batch / n))
        least = 0.6 * (1 + drawn / 10) ** -0.4
        finer = (self.spread * (1 - 0.5 * min(1, self.batch / n))).clamp_min(least)
        self.spread = torch.where(self.unevenness < 0.6**2, finer, self.spread)
        rate = min(0.5, 4 * self.batch / n / math.sqrt(1 + drawn))
        off = (rate * (first + second) / 2).clamp_max(2)
        self.b = self.b + self.temperature / self.spread * self.weight * off
        cooler = self.temperature * torch.exp(2 * (self.spread - 1 + squares))
        self.temperature = torch.maximum(cooler, 1e-6 * self.scale)
        self.averaged = self.averaged + (self.spread <= least)
        self.mean = torch.lerp(self.mean, self.b, 1 / self.averaged.clamp_min(1))

    def _shared_out(self, z: Tensor) -> tuple[Tensor, ...]:
        """`shared_out`, of as many noises z: (B, D) at once as `values` allow, as many of each half."""
        most = max(1, self.values // len(self.x) // 2)
        pieces = [z] if 2 * most >= len(z) else [torch.cat(pair) for pair in zip(
            *(half.split(most) for half in z.chunk(2)), strict=True)]
        found = [self.shared_out(products(some, self.x), self.b, self.judged, self.temperature) for some in pieces]
        if len(found) == 1:
            return found[0]
        winners, *means = zip(*found, strict=True)
        parts = [len(some) / len(z) for some in pieces]
        return torch.cat(winners), *(sum(part * of_piece for part, of_piece in zip(parts, of_pieces, strict=True))
                                     for of_pieces in means)

    def check(self) -> Solved:
        """How good the mean at the check before was: told by the noises since, which had no part in it."""
        solved = evenness(self.taken, self.share, self.noises)
        self.judged, self.taken, self.checked = self.mean, torch.zeros_like(self.taken), self.noises
        return solved

    def state_dict(self) -> dict:
        return {name: getattr(self, name) for name in (*self.changed, *self.counted)} | {
            "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict) -> None:
        for name in self.changed:
            setattr(self, name, state[name].to(getattr(self, name)))
        for name in self.counted:
            setattr(self, name, state[name])
        self.generator.set_state(state["generator"].cpu())


def noises_of_a_step(n: int) -> int:
    """An even number, for n samples."""
    return 2 * max(1, min(1024, max(32, n // 4), VALUES // n) // 2)


def shared_out(values: Tensor, potentials: Tensor, judged: Tensor, temperature: Tensor) -> tuple[Tensor, ...]:
    """Noises of these values (B, n), B even, shared out by softmax at a temperature.

    Returns the largest of values − judged, (B,) int64; what samples get of the noises of the first half and of the
    second, (n,) each, the mean over noises; and the mean over noises of the sum of squares, ().
    """
    winners = nearest(values, judged)
    shared = ((values - potentials) / temperature).softmax(1)
    first, second = (half.mean(0) for half in shared.chunk(2))
    return winners, first, second, shared.square().sum(1).mean()


def nearest(values: Tensor, potentials: Tensor) -> Tensor:
    """The argmax of values − potentials, (B, n) and (n,) → (B,), the lowest of equal ones."""
    return (values - potentials).argmax(1)


def sizes(x: Tensor) -> Tensor:
    """The deviations of ⟨z, x_j⟩ for x: (n, D) → (n,), without the part that is the same for all."""
    mean = x.mean(0, dtype=torch.promote_types(x.dtype, torch.float32))
    return torch.cat([(rows - mean).norm(dim=1) for rows in x.split(4096)])


def first_potentials(x: Tensor) -> Tensor:
    """Where potentials begin, x: (n, D) → (n,): the largest of n normal numbers lies at √(2 ln n) deviations.

    Where noises are shorter than that, √D of them, they begin by taking the sample nearest to z · rms coordinate.
    """
    size, n, dimensions = sizes(x), *x.shape
    if dimensions < 2 * math.log(n):
        squares = size.square()
        return squares / (2 * (squares.mean() / dimensions).sqrt()).clamp_min(torch.finfo(size.dtype).tiny)
    return size * math.sqrt(2 * math.log(n))


def evenness(taken: Tensor, share: Tensor, noises: float) -> Solved:
    """How far from their `share` (n,) samples are taken, from how often each was, (n,), by chance too."""
    taken, share = taken.cpu().double(), share.cpu().double()  # Apple's GPUs have no float64
    total = taken.sum().item()
    found = taken / total
    by_chance = found * (1 - found) / (total - 1)  # the variance of each, estimated
    square = (((found - share).square() - by_chance) / share).sum().item()
    return Solved(square, math.sqrt(2 / len(taken)) * (max(0.0, square) + len(taken) / total), noises)
