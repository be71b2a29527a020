"""Noises for data that are known beforehand, by an optimal plan: semidiscrete optimal transport for millions."""

import hashlib
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dansm import (
    NO_DISTANCE,
    BadInput,
    Semidiscrete,
    at_least_float32,
    check_count,
    check_tensor,
    has_distances,
    members_of,
    noise_generator,
    process_number,
    rows,
)

from ..base.machine import free_memory
from ..base.text import shorten, warn
from .gpu import working
from .groups import moved
from .inside import OfOneProcess, as_known_to, card, drawn, from_elsewhere, stream_after, warn_of_fresh_noises
from .products import products
from .solver import VALUES, Solved, Solver, first_potentials, nearest, noises_of_a_step

SOLVING, DRAWING, LOTS, PARTS, TURNS, ASKED = range(2**31, 2**31 + 6)  # streams of the seed that no pool has
GROUPS = 2**31
BLOCK = 4096  # samples that are read together, at most
NUMBERS = 2**24  # in the samples that are read together, and in the noises that are drawn ahead
EACH, PRODUCT = 100, 16  # bytes for the numbers of a sample in all vectors, and for a product (four copies on the CPU)
OF_DATA = "the data are"
CENTRED = 8192  # samples whose mean is taken off all, so that rounding loses less


class Part(NamedTuple):
    """Samples that share a plan. Equal ones are one point, to be taken as often as all of them."""

    points: Tensor  # (m, D), the samples as they are multiplied
    samples: Tensor  # (n,) their numbers, equal ones together
    begin: Tensor  # (m,) where each point's begin in it,
    copies: Tensor  # (m,) and how many they are


class FastSemidiscrete(OfOneProcess, Semidiscrete):
    """`dansm.Semidiscrete` for millions of samples, on a GPU. Call `solve` before `draw`: else shares are uneven,
    which a warning tells once.

    It takes the arguments of `dansm.Semidiscrete`, and:

    data    also anything that has a shape (n, ...) and gives the samples of an array of numbers, as files on a disk do
    part    how many samples share a plan, at most; None: all of a group. Samples go to parts at random. All noises that
            are drawn together choose within one part of their group, the next in a random order, so that the prior
            stays, and a noise costs 2 · part · D operations
    device  where noises are drawn and choose; None: where the data are
    dtype   of the copies of the samples there; None: bfloat16 on a GPU, else float32. Sums are in float32 at least
    memory  gigabytes that the coupling takes on the device at most, besides what `draw` returns: copies of the samples,
            noises, and their products, for fewer noises at once where there is less. Results differ by rounding only.
            None: half of what the device has free. A GPU's copies that do not fit stay on the CPU, and come part by
            part

    Noises are drawn some batches ahead, which costs a GPU less. BadInput also for what does not fit.
    """

    @torch.inference_mode(False)  # see FastPool.__call__
    @torch.no_grad()
    def __init__(self, data, groups: Tensor | None = None, *, part: int | None = None, seed: int | None = None,
                 device=None, dtype: torch.dtype | None = None, memory: float | None = None):
        if not hasattr(data, "shape"):
            check_tensor(data, OF_DATA)
        n, self.shape = (data.shape[0] if len(data.shape) else 0), torch.Size(data.shape[1:])
        if not n or not self.shape.numel():
            raise BadInput(f"the data are of shape {tuple(data.shape)}: expected (n, ...) with a sample or more")
        self.device = torch.empty(0, device=device or getattr(data, "device", "cpu")).device
        self.dtype = dtype or (torch.bfloat16 if self.device.type == "cuda" else torch.float32)
        self.seed = torch.randint(2**31, ()).item() if seed is None else check_count("seed", seed, at_least=0)
        self.part = part if part is None else check_count("part", part)
        self.labels = torch.zeros(n, dtype=torch.int64) if groups is None else groups
        members = members_of(self.labels, n, GROUPS, "groups, a label for each sample, are")
        self.labels = self.labels.cpu().long()
        shuffle = noise_generator(self.seed, "cpu", PARTS)
        split = {group: samples[torch.randperm(len(samples), generator=shuffle)].tensor_split(
            -(-len(samples) // (self.part or len(samples)))) for group, samples in members.items()}
        self.potentials = torch.empty(n, device=self.device)
        self.block = max(1, min(BLOCK, NUMBERS // self.shape.numel()))
        ahead = 1024 * min(4, len(split)) if self.device.type == "cuda" else 256
        self.ahead = max(16, min(ahead, NUMBERS // self.shape.numel()))
        self.copies_on = self._room(n, max(len(parts[0]) for parts in split.values()), memory)
        self.centre = self._centre(data, torch.linspace(0, n - 1, min(n, CENTRED)).long())
        keys = torch.empty(n, dtype=torch.int64)  # of the samples as they are
        self.parts = {group: [self._read(data, samples, keys) for samples in parts] for group, parts in split.items()}
        self.content = hashlib.blake2b(keys.numpy().tobytes(), digest_size=16).hexdigest()
        for of_part in self.all_parts():
            self._keep(of_part, first_potentials(of_part.points))
        self.solved = self.warned = False  # solved, or loaded; warned that it is not
        self.progress = {}  # the states of parts' solvers, by the numbers of parts
        kernels = working("semidiscrete_kernels", self.device) if self.dtype != torch.float64 else None
        self.nearest = kernels.nearest if kernels else nearest
        self.process = None
        self.settle()
        self._enter()

    def _room(self, n: int, largest: int, memory: float | None) -> torch.device:
        """Where the copies live. Sets how many products are computed at once. BadInput if the least does not fit."""
        if memory is not None and not is_positive(memory):
            raise BadInput(f"memory is {memory!r}: expected a number of gigabytes, more than 0")
        limit = free_memory(self.device) / 2 if memory is None else 1e9 * memory
        sample, size = self.shape.numel(), self.shape.numel() * self.dtype.itemsize
        rows_at_once = max(min(self.block, n), noises_of_a_step(largest), self.ahead)
        always = EACH * n + 20 * sample * rows_at_once  # float64 sums and hashes take further copies of rows
        on_gpu = self.device.type != "cpu"
        copies = size * n if always + size * n + PRODUCT * 256 * largest <= limit or not on_gpu else size * largest
        least = always + copies + PRODUCT * 2 * largest
        if least > limit:
            raise BadInput(f"memory is {limit / 1e9:.3g} GB{' (half of what is free)' * (memory is None)} for {n:,} "
                           f"samples, of which up to {largest:,} share a plan: expected {up(least / 1e9):g} or more")
        self.values = int(min(VALUES, (limit - always - copies) // PRODUCT))
        return self.device if copies == size * n else torch.device("cpu")

    def _centre(self, data, numbers: Tensor) -> Tensor:
        """The mean of some samples, summed in float64 where there is one, so that it does not depend on blocks."""
        sums, wide = 0, torch.float32 if self.device.type == "mps" else torch.float64
        for some in numbers.split(self.block):
            x = read(data, some, self.device)
            sums = sums + x.sum(0, dtype=wide)
        return (sums / len(numbers)).to(x.dtype)

    def _read(self, data, samples: Tensor, keys: Tensor) -> Part:
        """A part of these samples, whose `digests` are put into keys: (n,)."""
        samples = samples.sort().values  # as a disk reads them best
        points = torch.empty(len(samples), self.shape.numel(), dtype=self.dtype, device=self.copies_on)
        for numbers, to in zip(samples.split(self.block), points.split(self.block), strict=True):
            x = read(data, numbers, self.device)
            keys[numbers] = digests(x).cpu()
            to.copy_(x - self.centre)
        order, copies = same_together(torch.cat([digests(some) for some in points.split(self.block)]))
        begin = copies.cumsum(0) - copies
        if len(begin) < len(points):
            points, samples = points[order[begin]], samples[order.cpu()]
        if self.copies_on != self.device and self.device.type == "cuda":
            points = points.pin_memory()  # so that no one waits while they come
        return Part(points, samples.to(self.device), begin.to(self.device), copies.to(self.device))

    def all_parts(self) -> Iterator[Part]:
        return (of_part for parts in self.parts.values() for of_part in parts)

    def _keep(self, of_part: Part, potentials: Tensor) -> None:
        self.potentials[of_part.samples] = potentials.to(self.potentials).repeat_interleave(of_part.copies)

    # ------------------------------------------------------------------------------- potentials

    @torch.inference_mode(False)
    @torch.no_grad()
    def solve(self, error: float = 0.1, most: int | None = None,
              report: Callable[[int, Solver, Solved | None], None] | None = None) -> list[Solved]:
        """Find the potentials, part by part, until the shares are off by `error` or less (rms), two deviations of its
        estimate included, or `most` noises have been drawn for each sample. Returns what each part reached.

        A solve that is interrupted keeps the best that it has found, and the next continues there.
        most    None: 1,000, or more for a small error, and for a small part until its error is told from chance
        report  is called after each step, with the number of the part and its solver, and what a check told if any
        """
        if not is_positive(error):
            raise BadInput(f"error is {error!r}: expected a number above 0, like 0.1 for shares that are off by 10 %")
        most = most if most is None else check_count("most", most)
        self._forget_drawn()
        self.solved = True  # as far as it comes
        return [self._solve(number, of_part, error, most, report) for number, of_part in enumerate(self.all_parts())]

    def _solve(self, number: int, of_part: Part, error: float, most: int | None, report: Callable | None) -> Solved:
        if len(of_part.points) == 1:
            return Solved(0.0, 0.0, 0.0)
        most = most or max(1000, (2 + 20 * math.sqrt(2 / len(of_part.points))) / error**2)
        state = self.progress.get(number, {})
        reached = state.get("reached")  # by the potentials that are kept
        if reached and (reached.at_most <= error or reached.noises >= most):
            return reached
        solver = Solver(of_part.points.to(self.device), of_part.copies / len(of_part.samples),
                        noise_generator(self.seed, self.device, SOLVING, number), self.values)
        solver.judged = self.potentials[of_part.samples[of_part.begin]].to(solver.judged)  # they may be loaded ones
        if "solver" in state:
            solver.load_state_dict(state["solver"])
        try:
            while True:
                solver.step()
                solved = None
                if solver.due or solver.noises >= most:
                    judged, solved = solver.judged, solver.check()
                    if not reached or solved.at_most <= reached.at_most:
                        self._keep(of_part, judged)
                        reached = solved
                    reached = reached._replace(noises=solved.noises)
                    state = {"reached": reached, "solver": solver.state_dict()}
                    self.progress[number] = state
                if report:
                    report(number, solver, solved)
                if solved and (reached.at_most <= error or reached.noises >= most):
                    return reached
        finally:
            self.progress[number] = state | {"solver": solver.state_dict()}

    # ------------------------------------------------------------------------------- noises

    def settle(self) -> None:
        """Draw the noises of this process, if it has got another number: a coupling may be made before
        torch.distributed begins."""
        if self.process == process_number():
            return
        self.process = process_number()
        self._begin()

    def _begin(self, *stream: int) -> None:
        """Forget all noises, and draw from streams of this process."""
        stream = self.process, *stream
        self.generator = noise_generator(self.seed, self.device, DRAWING, *stream)
        self.lots = noise_generator(self.seed, "cpu", LOTS, *stream)  # that share noises out among groups
        self.turns = {}  # of the parts of each group, the last one
        self.asked = noise_generator(self.seed, self.device, ASKED, *stream)  # for `draw` with labels,
        self.asked_turns = {}  # whose parts have turns of their own
        self._forget_drawn()

    def draw(self, count: int, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Fresh noises z: (count, ...), and the numbers (count,) of the samples that they take: those of these labels
        (count,), or of labels as often as the data have them. What torch.compile compiles may call it, see `FastPool`.
        """
        if torch.compiler.is_compiling():
            return drawn(self, count, labels)
        self.check_worker()
        self.settle()
        if not (self.solved or self.warned):
            warn("draw() is called before solve(): noises may take some samples far more often than others")
            self.warned = True
        with torch.inference_mode(False), torch.no_grad():
            return self._draw(check_count("count", count, at_least=0), labels)

    def _draw(self, count: int, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        if labels is not None:
            z, lots = self._noises(count, self.asked)
            taken = torch.empty(count, dtype=torch.int64, device=self.device)
            for group, noises in members_of(labels, count, GROUPS).items():
                if group not in self.parts:
                    raise BadInput(f"no sample of the data has label {group}: expected labels that some have")
                noises = moved(noises.numpy(), self.device)
                taken[noises] = self._choose(self._next_part(group, self.asked_turns), z[noises], lots[noises])
            return z.view(count, *self.shape), taken
        pieces = []
        while count or not pieces:
            if self.handed == len(self.drawn[0]):
                self._draw_ahead()
            pieces.append([part[self.handed : self.handed + count] for part in self.drawn])
            self.handed += len(pieces[-1][0])
            count -= len(pieces[-1][0])
        z, taken = pieces[0] if len(pieces) == 1 else map(torch.cat, zip(*pieces, strict=True))
        return z.view(-1, *self.shape), taken

    def _draw_ahead(self) -> None:
        """Draw the next noises, of all groups by their sizes."""
        self.before, self.handed = (self.generator.get_state(), self.lots.get_state(), dict(self.turns)), 0
        z, lots = self._noises(self.ahead, self.generator)
        if len(self.parts) == 1:
            self.drawn = z, self._choose(self._next_part(*self.parts, self.turns), z, lots)
            return
        sizes = [float(sum(len(of_part.samples) for of_part in parts)) for parts in self.parts.values()]
        of_groups = torch.multinomial(torch.tensor(sizes), self.ahead, replacement=True, generator=self.lots)
        counts = of_groups.bincount(minlength=len(sizes)).tolist()
        taken = torch.cat([self._choose(self._next_part(group, self.turns), *of_group) for group, *of_group in
                           zip(self.parts, z.split(counts), lots.split(counts), strict=True) if len(of_group[0])])
        mixed = moved(torch.randperm(self.ahead, generator=self.lots).numpy(), self.device)
        self.drawn = z[mixed], taken[mixed]

    def _forget_drawn(self) -> None:
        self.drawn, self.handed = (torch.empty(0), torch.empty(0)), 0
        self.before = self.generator.get_state(), self.lots.get_state(), dict(self.turns)

    def _noises(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Noises (count, D), and numbers (count,) below 1 that decide among equal samples."""
        z = torch.randn(count, self.shape.numel(), generator=generator, device=self.device)
        return z, torch.rand(count, generator=generator, device=self.device)

    def _next_part(self, group: int, turns: dict[int, int]) -> Part:
        """The part of a group whose turn it is. After all have had one, they come in another order."""
        parts = self.parts[group]
        if len(parts) == 1:
            return parts[0]
        turn = turns[group] = turns.get(group, -1) + 1
        order = noise_generator(self.seed, "cpu", TURNS, self.process, group, turn // len(parts))
        return parts[torch.randperm(len(parts), generator=order)[turn % len(parts)]]

    def _choose(self, of_part: Part, z: Tensor, lots: Tensor) -> Tensor:
        """The samples of a part that noises z: (B, D) take, (B,)."""
        points = of_part.points.to(self.device, non_blocking=True)
        potentials = self.potentials[of_part.samples[of_part.begin]]
        picks = torch.cat([self.nearest(products(some, points), potentials)
                           for some in z.to(self.dtype).split(max(1, self.values // len(points)))])
        if len(points) == len(of_part.samples):
            return of_part.samples[picks]
        copies = of_part.copies[picks]
        return of_part.samples[of_part.begin[picks] + torch.minimum((lots * copies).long(), copies - 1)]

    # ------------------------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict:
        """What a checkpoint needs to draw the same noises again: four bytes a sample."""
        return {"made_for": self._made_for() | self._place_of(), "potentials": self.potentials.clone(),
                "asked": (self.asked.get_state(), dict(self.asked_turns)), "before": self.before, "handed": self.handed}

    def load_state_dict(self, state: dict) -> None:
        """Resume where `state_dict` was taken, or, from the state of another process, with noises that nobody has."""
        self.settle()
        made_for = as_known_to(state, self._made_for() | self._place_of())
        foreign = from_elsewhere(state, made_for)
        check_made_for(state | {"made_for": made_for} if foreign else state, made_for, "potentials", "before", "asked",
                       "handed")
        self.solved, self.progress = True, {}
        self.potentials.copy_(state["potentials"])
        (generator, lots, turns), (asked, asked_turns) = state["before"], state["asked"]
        if foreign:
            warn_of_fresh_noises(state["made_for"], made_for)
            self._begin(stream_after([state[name] for name in ("before", "handed", "asked")]))
            return
        for ours, saved in ((self.generator, generator), (self.lots, lots), (self.asked, asked)):
            ours.set_state(saved.cpu())
        self.turns, self.asked_turns = dict(turns), dict(asked_turns)
        self._forget_drawn()
        if state["handed"]:
            self._draw_ahead()
            self.handed = min(state["handed"], self.ahead)

    def _place_of(self) -> dict:
        """Where the noises are drawn: others draw others."""
        return {"device": self.device.type, "process": self.process} | card(self.device)

    def solution(self) -> dict:
        """What `solve` found, for a file, as tensors and plain values: 4 bytes a sample, and 16 more to resume it."""
        progress = {number: {name: tuple(value) if name == "reached" else value for name, value in state.items()}
                    for number, state in self.progress.items()}
        return {"made_for": self._made_for(), "potentials": self.potentials.clone(), "progress": progress,
                "device": self.device.type}

    def load_solution(self, solution: dict) -> None:
        """Take what another coupling of the same data found. On another kind of device a solve starts over, if what was
        reached is not enough. BadInput for other data, groups or parts."""
        check_made_for(solution, self._made_for(), "potentials", "progress", "device")
        progress, resumable = {}, {*Solver.changed, *Solver.counted, "generator"}
        for number, of_part in enumerate(self.all_parts()):
            state = dict(solution["progress"].get(number, {}))
            if "reached" in state:
                state["reached"] = Solved(*state["reached"])
            solver = state.pop("solver", None)
            if solver and solution["device"] == self.device.type and resumable == solver.keys() and (
                    len(solver["b"]) == len(of_part.points)):
                state["solver"] = solver
            progress[number] = state
        self.potentials.copy_(solution["potentials"])
        self.progress, self.solved = progress, True
        self._forget_drawn()

    def _made_for(self) -> dict:
        sizes = [[len(of_part.samples) for of_part in parts] for parts in self.parts.values()]
        split = {} if all(len(of_group) == 1 for of_group in sizes) else {"seed": self.seed}
        labels = hashlib.blake2b(self.labels.numpy().tobytes(), digest_size=8).hexdigest()
        return {"samples": len(self.potentials), "shape": list(self.shape), "content": self.content, "labels": labels,
                "parts": sizes} | split


def check_made_for(state, made_for: dict, *needed: str) -> None:
    """BadInput for anything but what was saved for the same data, with all that is needed."""
    saved = state.get("made_for") if isinstance(state, dict) and state.keys() >= set(needed) else None
    if not isinstance(saved, dict):
        raise BadInput(f"the state is a {type(state).__name__}: expected what a Semidiscrete saved")
    for name, expected in made_for.items():
        if saved.get(name) != expected and name == "content":
            raise BadInput("the data have changed since their coupling was saved: expected the same")
        if saved.get(name) != expected:
            given, expected = (shorten(str(value), 60) for value in (saved.get(name), expected))
            raise BadInput(f"what was saved is for {name} {given}, these data have {expected}: expected the same data")


def is_positive(value) -> bool:
    """Whether the value is a finite number above 0. True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def up(number: float) -> float:
    """The next number of three digits."""
    digit = 10.0 ** (math.floor(math.log10(number)) - 2)
    return math.ceil(number / digit) * digit


def read(data, numbers: Tensor, device: torch.device) -> Tensor:
    """Samples of these numbers (B,) as rows (B, D) in float32 at least, on the device. BadInput for integers, and for
    values that are not finite."""
    if isinstance(data, Tensor):
        check_tensor(data, OF_DATA)  # torch 2.6 takes no rows of float8 on a CPU
    some = data[numbers.to(data.device)] if isinstance(data, Tensor) else data[numbers.numpy()]
    some = torch.as_tensor(some).detach().to(device)
    check_tensor(some, OF_DATA)
    if some.numel() and not has_distances(some):
        number = next(number for number, x in zip(numbers.tolist(), some, strict=True) if not has_distances(x))
        raise BadInput(f"sample {number} of the data {NO_DISTANCE}")
    return at_least_float32(rows(some))


# ------------------------------------------------------------------------------- equal samples


def digests(x: Tensor) -> Tensor:
    """A number for each row of x: (n, D) → (n,) int64, the same for equal ones. Others share one by chance alone."""
    factors = torch.randint(-(2**62), 2**62, (x.shape[1],), generator=torch.Generator().manual_seed(0)).to(x.device)
    parts = x.split(max(1, NUMBERS // 4 // x.shape[1]))
    return torch.cat([((part + 0.0).float().view(torch.int32) * factors).sum(1) for part in parts])


def same_together(keys: Tensor) -> tuple[Tensor, Tensor]:
    """An order (n,) that has equal keys together, and how many each of the others, (m,), has."""
    order = keys.argsort(stable=True)
    _, copies = keys[order].unique_consecutive(return_counts=True)
    return order, copies
