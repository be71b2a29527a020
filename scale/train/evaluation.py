"""A run evaluated while it trains: its log gets the measures that `dansm evaluate` takes of its checkpoints."""

import importlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from dansm import BadInput

from ..base.processes import everyones, first_before_others, ranks
from ..base.text import counted, say
from ..base.threads import use_own_stream
from ..data.labels import Labels
from ..data.latents import known_of
from ..evaluate.by_class import Classes
from ..evaluate.extractors import INCEPTION, features_of_all, load_extractor
from ..evaluate.real_features import check_real, real_features
from ..model.recipe import FLOWS, Recipe
from ..model.sampling import at_once, check_steps, sample_images, sampler
from .step import FastTraining

SEED = 0  # of the noises, as for dansm evaluate by default: runs compare pair by pair
CACHE = Path("~/.cache/dansm")  # of the features of real images, as for dansm evaluate


def due(recipe: Recipe, step: int) -> bool:
    """Whether the run is to be evaluated after this step."""
    every = recipe.evaluate_every
    return step > 0 and (step in recipe.evaluate_at or bool(every and step % every == 0))


def check_evaluation(recipe: Recipe) -> None:
    """BadInput for evaluations that cannot be made, as far as the recipe tells."""
    if not (recipe.evaluate_every or recipe.evaluate_at):
        return
    if recipe.evaluate_count < ranks()[1]:
        raise BadInput(f"--evaluate-count is {recipe.evaluate_count}: expected at least an image for each process")
    for steps in recipe.evaluate_steps:
        check_steps("--evaluate-steps", steps, FLOWS[recipe.flow])
    if recipe.evaluate_features == INCEPTION:
        importlib.import_module("torch_fidelity")  # so that it is missed before the training


class Evaluation:
    """Call it to evaluate the averaged network, on every process after the same step: each draws its share of the
    images. Labels of the images are drawn with their shares. BadInput for what cannot be evaluated."""

    def __init__(self, images, run: FastTraining, flow, labels: Labels | None = None):
        self.run = run
        self.flow = flow
        self.rank, self.processes = ranks()
        self.classes = Classes(labels.names, labels, device=run.device) if labels else None
        self.labels = self.classes.drawn(range(run.recipe.evaluate_count), SEED) if labels else None
        recipe, device = run.recipe, run.device
        if known_of(images) is not None:
            raise BadInput("--evaluate-every and --evaluate-at need images, and these are latents: expected neither; "
                           "dansm evaluate --autoencoder evaluates checkpoints, of which --keep N keeps more")
        check_real(images)
        weights = Path(recipe.inception_weights) if recipe.inception_weights else None
        with first_before_others():  # it may download them
            self.extractor = load_extractor(recipe.evaluate_features, device, weights, "--evaluate-features")
        if self.rank == 0:
            from ..evaluate.measures import Reference, floor

            real = real_features(images, self.extractor, device, cache=CACHE.expanduser())
            self.reference = Reference(real, self.extractor, seed=SEED, device=device)
            self.floor = floor(self.reference, recipe.evaluate_count, measures=recipe.evaluate_measures)
            if self.classes:
                self.classes.real = real
                if recipe.evaluate_measures == "all":
                    self.floor |= self.classes.floor(self.floor["count"], SEED, self.extractor.distances[0])

    def __call__(self, seconds: float, show: Callable[[str], None]) -> dict:
        """A line of the log: "frechet_distance/5" is of images drawn in 5 steps, "…/real" of real images. Empty on all
        processes but the first. The run has trained `seconds`; `show` takes the text of the live line."""
        run, recipe = self.run, self.run.recipe
        begin = time.monotonic()
        net = sampler(run.average, run.device, recipe.precision, recipe.compile)
        batch = at_once(run.average, run.device)  # once: graphs' memory counts as free later
        scores = {}
        with ThreadPoolExecutor(1, initializer=use_own_stream, initargs=(run.device,)) as scorer:
            for steps in recipe.evaluate_steps:  # these images are scored while the next are drawn
                features, logits = self._draw(net, steps, batch, show)
                if self.rank == 0:
                    scores[steps] = scorer.submit(self._score, features, logits)
        if self.rank:
            return {}
        rows = {steps: measured.result() for steps, measured in scores.items()} | {"real": self.floor}
        line = {"step": run.step, "images": run.step * recipe.batch, "seconds": round(seconds, 2)}
        for steps, row in rows.items():
            line |= {f"{name}/{steps}": round(float(value), 6) for name, value in row.items()
                     if name != "count" and "/" not in name}  # no line for each class
        line["evaluation_seconds"] = round(time.monotonic() - begin, 2)
        name = self.extractor.distances[0]
        label = "FID" if name == "fid" else f"Fréchet distance ({self.extractor.name})"
        values = ", ".join(f"{line[f'{name}/{steps}']:.2f} in {steps}" for steps in recipe.evaluate_steps)
        say(f"step {run.step:,}: {label} {values} steps; real images {line[f'{name}/real']:.2f}")
        return line

    def _score(self, features: torch.Tensor, logits: torch.Tensor | None) -> dict:
        """The measures of all images."""
        from ..evaluate.measures import score

        measures = self.run.recipe.evaluate_measures
        row = score(features, self.reference, logits=logits, measures=measures)
        if self.classes and measures == "all":
            row |= self.classes.score(features, self.labels, self.extractor.distances[0])
        return row

    def _draw(self, net, steps: int, batch: int, show: Callable[[str], None]) -> tuple:
        """Features (N, D) of all images, and logits or None. A process draws `batch` at a time."""
        run, count = self.run, self.run.recipe.evaluate_count
        share = range(count * self.rank // self.processes, count * (self.rank + 1) // self.processes)

        def draw() -> Iterator[torch.Tensor]:
            done = 0
            labels = None if self.labels is None else self.labels[share.start : share.stop]
            for images in sample_images(net, self.flow, share, run.net.shape, steps, seed=SEED, device=run.device,
                                        batch=batch, labels=labels, to_cpu=False):
                done += len(images) * self.processes
                show(f"evaluating: {min(done, count):,} of {count:,} images in {counted(steps, 'step')}")
                yield images

        drawn = features_of_all(draw(), self.extractor, run.device)
        features, logits = zip(*everyones(drawn), strict=True)
        return torch.cat(features), None if logits[0] is None else torch.cat(logits)
