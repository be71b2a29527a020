"""What is seen of a run while it trains: lines of its log, and a live line on the console."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as group
from torch import Tensor

import dansm

from ..base.machine import peak
from ..base.processes import ranks
from ..base.text import Bar, say
from ..model.sampling import operations_per_image
from .coupled_batches import CoupledBatches
from .step import FastTraining


class Watch:
    """Measures a run, which has trained `seconds` in earlier calls. What it measures stays on the device until a line
    of the log is due, so that no step waits."""

    def __init__(self, run: FastTraining, seconds: float):
        self.run = run
        self.recipe = run.recipe
        self.begin = time.monotonic() - seconds
        self.call_began = self.line_began = (run.step, seconds)
        self.losses = []  # of the steps since the last line
        self.matchings = []  # (before, after) of each matching since then
        self.arrived = None  # when the batch came that is not matched yet
        self.z = None
        self.peak = None  # images a second of all processes together, if the network took each GPU to its peak
        if operations := peak(run.device):
            self.peak = ranks()[1] * operations / operations_per_image(run.net.settings)

    @property
    def seconds(self) -> float:
        """Seconds trained, in all calls."""
        return time.monotonic() - self.begin

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count what happens inside: evaluations and grids are no training."""
        before = self.seconds
        try:
            yield
        finally:
            self.begin = time.monotonic() - before

    @contextmanager
    def matching(self) -> Iterator[None]:
        """Note what happens inside as a matching."""
        begin = self._now()
        yield
        self.matchings.append((begin, self._now()))

    def pairs(self, batches: Iterator, pool: dansm.NoisePool | CoupledBatches,
              groups: int | None = None) -> Iterator[tuple]:
        """Match the batches, x or (x, labels), by the recipe, and note when each matching begins and ends. Those of
        method "semidiscrete" are pairs already."""
        recipe, matched = self.recipe, batches
        if recipe.method != "semidiscrete":
            matched = dansm.pairs(self._arriving(batches), recipe.method, recipe.match_size, cost=recipe.cost,
                                  pool=pool, groups=groups)
        for x, z, *labels in matched:
            if self.arrived is not None:  # else "optimal" matched it together with batches before
                self.matchings.append((self.arrived, self._now()))
                self.arrived = None
            self.x = x
            self.z_before, self.z = self.z, z
            yield x, z, *labels

    def _arriving(self, batches: Iterator) -> Iterator:
        for batch in batches:
            self.arrived = self._now()
            yield batch

    def _now(self):
        if self.run.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds_of_matching(self) -> float:
        if self.run.device.type == "cuda":
            return sum(before.elapsed_time(after) for before, after in self.matchings) / 1000
        return sum(after - before for before, after in self.matchings)

    def line(self) -> dict:
        """The line of the log for the steps since the last one; docs/training.md tells what its fields mean. Every
        process must call it. Raises BadInput on all, with the step, if a loss of any process is not finite."""
        losses = self._mean_losses()
        step, seconds = self.run.step, self.seconds
        duration = max(seconds - self.line_began[1], 1e-9)
        rate = (step - self.line_began[0]) * self.recipe.batch / duration
        other_z = self.z.roll(1, 0) if len(self.z) > 1 or self.z_before is None else self.z_before
        line = {"step": step, "images": step * self.recipe.batch, "seconds": round(seconds, 2),
                "loss": round(losses[-1].item(), 5), "loss_mean": round(losses.mean().item(), 5),
                "images_per_second": round(rate, 1), "matching": round(self._seconds_of_matching() / duration, 4),
                "distance": round(dansm.path_length(self.x, self.z), 4),
                "distance_random": round(dansm.path_length(self.x, other_z), 4)}
        if self.peak:
            line["mfu"] = round(rate / self.peak, 4)
        self.losses.clear()
        self.matchings.clear()
        self.line_began = step, seconds
        return line

    def _mean_losses(self) -> Tensor:
        """The losses since the last line, each the mean over all processes."""
        losses = torch.stack(self.losses).float().cpu()
        if ranks()[1] > 1:
            group.all_reduce(losses)
        losses /= ranks()[1]
        if not losses.isfinite().all():
            bad = int((~losses.isfinite()).int().argmax())
            raise dansm.BadInput(f"--lr is {self.recipe.lr}: the loss became {losses[bad].item()} at step "
                                 f"{self.run.step - len(losses) + 1 + bad}, expected a smaller one; what was saved "
                                 "before is untouched")
        return losses

    def summary(self, interrupted: bool) -> dict:
        """What train.json keeps of the run, and of this call, which may be on another machine than earlier ones."""
        step, seconds = self.run.step, self.seconds
        steps_here, seconds_here = step - self.call_began[0], seconds - self.call_began[1]
        rate = steps_here * self.recipe.batch / max(seconds_here, 1e-9)
        return {"recipe": dataclasses.asdict(self.recipe), "steps": step, "images": step * self.recipe.batch,
                "seconds": round(seconds, 1), "processes": ranks()[1],
                "this_call": {"steps": steps_here, "seconds": round(seconds_here, 1),
                              "images_per_second": round(rate, 1)},
                "precision": str(self.run.dtype).removeprefix("torch."), "compiled": self.run.compiled,
                "parameters": sum(weight.numel() for weight in self.run.net.parameters()),
                "interrupted": interrupted, "stopped_early": interrupted and step < self.recipe.steps}


def in_words(line: dict) -> str:
    """A line of the log for the console."""
    mfu = f"  MFU {line['mfu']:.0%}" if "mfu" in line else ""
    return (f"step {line['step']:,}  loss {line['loss_mean']:.4f}  {line['images_per_second']:,.0f}/s{mfu}  "
            f"matching {line['matching']:.1%}  ‖x−z‖ {line['distance']:.1f}, random {line['distance_random']:.1f}")


@contextmanager
def progress(run: FastTraining) -> Iterator[Callable]:
    """Show a live line with the time left, or plain lines now and then, and yield a function that is to be called after
    each step. It takes a line of the log in words, which is shown from now on, or else what goes on now. A line before
    all says what the numbers are."""
    recipe = run.recipe
    if run.step >= recipe.steps:
        yield lambda *_, **__: None
        return
    say("in each line: the mean loss since the line before; ‖x−z‖, the mean distance of a sample and its noise, and "
        "that of the same samples and noises in random pairs, which matching is to undercut")
    said, last, last_step = True, "", 0  # whether a plain line has told the last line of the log; at which step it is

    def show(now: str = "", line: str = "") -> None:
        nonlocal said, last, last_step
        if line:
            said, last, last_step = False, line, run.step
        text = f"step {run.step:,} of {recipe.steps:,}"
        if last and (bar.live or not said):
            text = last if last_step == run.step else f"{text}, at {last}"
        if bar(None if now else run.step / recipe.steps, now or text) and not now:
            said = True

    with Bar(f"step {run.step:,} of {recipe.steps:,}", done=run.step / recipe.steps, keeps=True,
             seconds=60 * recipe.minutes or math.inf) as bar:
        yield show
    if last and not said and not bar.live:
        say(last)
