"""The coupling of a training's data with noises (method "semidiscrete"), solved once and kept on the disk."""

import hashlib
import json
import math
import time
from collections.abc import Sequence
from contextlib import closing
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dansm import BadInput

from ..base.files import make_folder
from ..base.locks import alone
from ..base.processes import first_before_others
from ..base.text import Bar, Stopped, console, counted, say
from ..data.latents import Shards
from ..data.pixels import from_uint8
from ..matching.semidiscrete import FastSemidiscrete
from ..matching.solver import Solved, Solver
from ..model import checkpoint

POTENTIALS = Path("~/.cache/dansm/potentials")


class Samples:
    """The images (n, C, H, W) of `loader.load_images` as a coupling takes them. Mirrored ones, if any, are samples of
    their own, behind the others. Of moments it takes the means."""

    def __init__(self, images, mirrored: bool):
        self.images, self.count = images, len(images)
        self.shape = (self.count * (1 + mirrored), *images.shape[1:])

    def __getitem__(self, numbers: np.ndarray | Tensor) -> Tensor:
        """The samples of these numbers (B,), as networks see them: (B, C, H, W) float32."""
        numbers = torch.as_tensor(numbers)
        rows, mirrored = numbers % self.count, numbers >= self.count
        if isinstance(self.images, Tensor):
            x = self.images[rows.to(self.images.device)]
        else:
            order = rows.argsort().cpu()  # that of the file: fewer, longer reads
            in_order = self.images.take(rows.cpu()[order].numpy(), axis=0)[:, : self.shape[1]]
            x = torch.as_tensor(in_order)[order.argsort()]
        x = torch.where(mirrored.to(x.device)[:, None, None, None], x.flip(3), x)
        return from_uint8(x) if x.dtype == torch.uint8 else x.float()


def coupled(images, *, flip: bool, labels: np.ndarray | None, part: int | None, error: float, seed: int, device,
            cache: Path | None, memory: float | None = None, most: int | None = None) -> FastSemidiscrete:
    """The coupling of images (n, C, H, W) with noises, solved until shares are off by `error` (rms) or `most` noises
    are drawn for each sample, by default twice what the error takes, and 1,000 at least. A line says what was reached.
    Several processes call it together: the first one solves.

    flip    mirrored images are samples too, see `Samples`
    labels  (n,): each class is coupled within itself
    part, memory  see `FastSemidiscrete`
    cache   folder that keeps the potentials, for a later call with the same data to take or improve; None: POTENTIALS

    Raises BadInput for data that are not finite or do not fit, and Stopped after Ctrl-C, which keeps what was found.
    """
    coupling = uncoupled(images, flip=flip, labels=labels, part=part, seed=seed, device=device, memory=memory)
    made_for = json.dumps(coupling.solution()["made_for"]).encode()
    name = f"potentials-{hashlib.blake2b(made_for, digest_size=8).hexdigest()}.pt"
    kept = make_folder(cache or POTENTIALS.expanduser(), "--cache") / name
    with first_before_others(), alone(kept.with_suffix(".lock")), closing(Reporter(coupling, error, most)) as reporter:
        reporter.save = lambda: checkpoint.write(kept, coupling.solution())
        try:
            with checkpoint.reading(kept):
                coupling.load_solution(checkpoint.as_written(kept))
        except BadInput as error_of_file:
            if kept.exists():  # damaged, or another program's
                say(f"not used, and written anew: {error_of_file}")
        begin = time.monotonic()
        try:
            reached = coupling.solve(error, most, reporter)
        except KeyboardInterrupt as interrupt:
            raise Stopped(f"stopped; {kept} has the potentials so far, the same command resumes") from interrupt
        finally:
            if reporter.shown:
                reporter.save()
    say_reached(coupling, reached, f"{time.monotonic() - begin:.0f} s" if reporter.shown else f"found in {kept}")
    if above := sum(solved.at_most > error for solved in reached):
        most_drawn = counted(round(max(solved.noises for solved in reached)), "noise")
        say(f"shares of {above:,} of {counted(len(reached), 'part')} may be off by more than {100 * error:.3g} % after",
            f"{most_drawn} for each sample; the plan serves as it is")
    return coupling


def uncoupled(images, *, flip: bool, labels: np.ndarray | None, part: int | None, seed: int, device,
              memory: float | None = None) -> FastSemidiscrete:
    """The coupling before it is solved, see `coupled`."""
    groups = None if labels is None else torch.from_numpy(np.tile(labels, 1 + flip))
    try:
        with console.status("reading samples"):
            return FastSemidiscrete(Samples(images, flip), groups, part=part, seed=seed, device=device, memory=memory)
    except BadInput:
        if isinstance(images, Shards):
            images.check_finite()  # which names the file
        raise


class Reporter:
    """What `solve` reports to: a progress bar, shown from the first step on. What was found is saved every minute."""

    def __init__(self, coupling: FastSemidiscrete, error: float, most: int | None):
        self.begins = list(accumulate((len(of_part.samples) for of_part in coupling.all_parts()), initial=0))
        self.each = max(error**2 / 1.1, 1 / (most or math.inf))  # part of the work that a noise a sample is, about
        self.bar = Bar("coupling")
        self.text = "coupling"
        self.shown = False
        self.saved = time.monotonic()

    def __call__(self, number: int, solver: Solver, solved: Solved | None) -> None:
        if not self.shown:
            self.bar.__enter__()
            self.shown = True
        begin, end = self.begins[number : number + 2]
        if solved:
            self.text = f"coupling, {in_words(solved)}"
        self.bar((begin + (end - begin) * min(1, solver.noises * self.each)) / self.begins[-1], self.text)
        if solved and time.monotonic() - self.saved > 60:
            self.save()
            self.saved = time.monotonic()

    def close(self) -> None:
        if self.shown:
            self.bar.__exit__()


def say_reached(coupling: FastSemidiscrete, reached: list[Solved], how: str) -> None:
    sizes, points = zip(*((len(part.samples), len(part.points)) for part in coupling.all_parts()), strict=True)
    if copies := sum(sizes) - sum(points):
        is_copy = "is a copy of another" if copies == 1 else "are copies of others"
        say(f"{copies:,} of {sum(sizes):,} samples {is_copy}; each is taken as often as any other sample")
    what = f"{counted(sum(sizes), 'sample')} in {counted(len(coupling.parts), 'group')}"
    what += f" and {len(sizes):,} parts" if len(sizes) > len(coupling.parts) else ""
    solved = overall(reached, sizes)
    found = f"{in_words(solved)} after {counted(round(solved.noises), 'noise')} for each, {how}"
    say(f"{what}: {found if sum(points) > len(points) else 'nothing to choose'}")


def overall(parts: Sequence[Solved], sizes: Sequence[int]) -> Solved:
    """How even shares are over all parts, which have this many samples."""
    weight = torch.tensor(sizes, dtype=torch.float64) / sum(sizes)
    square, deviation, noises = torch.tensor(parts, dtype=torch.float64).T
    return Solved((weight @ square).item(), (weight * deviation).norm().item(), (weight @ noises).item())


def in_words(solved: Solved) -> str:
    return f"shares off by at most {100 * solved.at_most:.1f} % (rms)"
