"""Evaluation while a run trains: what `dansm evaluate` says of its checkpoints, as lines of metrics.jsonl."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as group
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

import dansm

from ..base.processes import ranks
from ..base.text import counted
from ..data.latents import known_of
from ..evaluate import evaluate
from ..model.recipe import Recipe
from ..model.sampling import at_once, check_steps, sampler
from .step import FastTraining

SEED = 0  # of the noises for every run, as that of dansm evaluate where none is given: runs compare pair by pair
CACHE = Path("~/.cache/dansm")  # of the features of real images, as that of dansm evaluate


def due(recipe: Recipe, step: int) -> bool:
    """Whether a run is to be evaluated after this step."""
    every = recipe.evaluate_every
    return step > 0 and (bool(every and step % every == 0) or step in recipe.evaluate_at)


def is_evaluation(line: dict) -> bool:
    """Whether a line of the log is of an evaluation."""
    return any(name.endswith("/real") for name in line)


def check_asked(recipe: Recipe) -> None:
    """BadInput for evaluations that cannot be made, as far as the recipe tells: before any data is read."""
    if not (recipe.evaluate_every or recipe.evaluate_at):
        return
    if recipe.evaluate_count < (processes := ranks()[1]):
        raise dansm.BadInput(f"--evaluate-count is {recipe.evaluate_count}: expected at least {processes}, an image "
                             "for each process")
    for steps in recipe.evaluate_steps:
        check_steps("--evaluate-steps", steps, dansm.FLOWS[recipe.flow])
    evaluate.fidelity()


class Judge:
    """Scores the averaged network each `recipe.evaluate_every` steps, never if that is 0, and after those of
    `recipe.evaluate_at`.

    Every process must make one and call it in the same step: each draws its share of the images. What is scored is
    the first one's to log. BadInput at once, before any training, for what cannot be evaluated.
    """

    def __init__(self, images, recipe: Recipe, device: torch.device, console: Console):
        self.recipe, self.device, self.console = recipe, device, console
        self.rank, self.processes = ranks()
        if not (recipe.evaluate_every or recipe.evaluate_at):
            return
        self.measures = recipe.evaluate_measures
        if known_of(images) is not None:
            raise dansm.BadInput("--evaluate-every and --evaluate-at judge images, and these are latents: expected "
                                 "neither; dansm evaluate --autoencoder judges a run's checkpoints, of which --keep N "
                                 "keeps more")
        evaluate.check_real(images)
        check_asked(recipe)
        if self.rank:
            group.barrier()  # what is to be downloaded, the first one does
        weights = Path(recipe.inception_weights) if recipe.inception_weights else None
        self.extractor = evaluate.load_extractor(recipe.evaluate_features, device, weights, "--evaluate-features")
        if self.rank == 0:
            self.real = self._real(images)
            self.floor = evaluate.floor(self.real, recipe.evaluate_count, self.extractor, seed=SEED, device=device,
                                        measures=self.measures)
            if self.processes > 1:
                group.barrier()

    def _real(self, images) -> evaluate.Real:
        def track(parts, total):
            task = bar.add_task("features of the real images", total=total)
            for part in parts:
                yield part
                bar.advance(task)

        with Progress(console=self.console, transient=True) as bar:
            return evaluate.real_features(images, self.extractor, self.device,
                                          batch=evaluate.seen_at_once(self.device),
                                          cache=CACHE.expanduser(), track=track)

    def __call__(self, run: FastTraining, flow, seconds: float, show, stop) -> dict | None:
        """A line of the log: "frechet_distance/5" and the like are of images in 5 steps, "…/real" of real images.

        seconds  that the run has trained
        show     takes the text of the live line
        stop     true if this is to be given up, where there is one process: the checkpoint is kept, and
                 `dansm evaluate` can score it; then the line is None
        """
        begin = time.monotonic()
        line = {"step": run.step, "images": run.step * self.recipe.batch, "seconds": round(seconds, 2)}
        net = sampler(run.average, self.device, self.recipe.precision, self.recipe.compile)
        rows, batch = {}, at_once(run.average, self.device)
        with ThreadPoolExecutor(1) as scores:  # the CPU scores these images while the GPU draws the next
            for steps in self.recipe.evaluate_steps:
                try:
                    features, logits = self._draw(net, flow, run.net.shape, steps, batch, show, stop)
                except _GivenUp:
                    scores.shutdown(cancel_futures=True)
                    return None
                if self.rank == 0:
                    rows[steps] = scores.submit(evaluate.score, features, self.real, self.extractor, logits=logits,
                                                seed=SEED, device=self.device, measures=self.measures)
        if self.rank:
            return None
        for steps, row in rows.items():
            line |= _of_steps(row.result(), steps)
        line |= _of_steps(self.floor, "real") | {"evaluation_seconds": round(time.monotonic() - begin, 2)}
        self._say(line)
        return line

    def _draw(self, net, flow, shape, steps, batch, show, stop) -> tuple[Tensor, Tensor | None]:
        """Features and logits of all images, on the first process."""
        count, done = self.recipe.evaluate_count, 0

        def advance(images):
            nonlocal done
            done += images * self.processes
            show(f"evaluating: {min(done, count):,} of {count:,} images in {counted(steps, 'step')}")
            if stop and self.processes == 1:
                raise _GivenUp

        first, last = (count * rank // self.processes for rank in (self.rank, self.rank + 1))
        found = evaluate.draw_features(net, flow, range(first, last), shape, steps, self.extractor, self.device,
                                       seed=SEED, batch=batch, advance=advance)
        if self.processes == 1:
            return found
        everyones = [None] * self.processes if self.rank == 0 else None
        group.gather_object(found, everyones)
        if self.rank:
            return found
        features, logits = zip(*everyones, strict=True)
        return torch.cat(features), None if logits[0] is None else torch.cat(logits)

    def _say(self, line):
        name = self.extractor.distances[0]
        label = "FID" if name == "fid" else f"Fréchet distance ({self.extractor.name})"
        values = ", ".join(f"{line[f'{name}/{steps}']:.2f} in {steps}" for steps in self.recipe.evaluate_steps)
        self.console.print(f"step {line['step']:,}: {label} {values} steps; real images {line[f'{name}/real']:.2f}",
                           soft_wrap=True, markup=False)


class _GivenUp(Exception):
    pass


def _of_steps(row: dict, steps) -> dict:
    return {f"{name}/{steps}": round(float(value), 6) for name, value in row.items() if name != "count"}
