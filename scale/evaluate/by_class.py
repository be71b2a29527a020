"""How well samples follow their labels: the distance of each class, and the labels that a linear probe predicts."""

import os
from contextlib import nullcontext
from functools import cached_property
from statistics import fmean

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dansm import BadInput

from ..base.machine import float64
from ..base.statistics import root_of_covariance, trace_of_root
from ..base.text import shorten
from ..base.threads import ahead, one_thread
from ..data.labels import Labels
from .real_features import Real, digest_of, kept_places, shuffled

LEAST = 50  # images of a class, real ones and samples, for a distance of its own
HELD_OUT = 5  # one real image of so many is kept from the probe's training, to test it
THREADS = min(8, os.cpu_count())  # that measure classes
RIDGE = 1e-3  # of the probe, times the mean square of a feature


class Classes:
    """The classes of models, and the real images of each.

    names   of the classes, as the models number them
    labels  of the real images; None: each class is drawn as often as the others, and none is measured
    real    may be set later: only `drawn` does without
    device  that computes products
    BadInput for labels of classes that the models do not know. Classes are not measured either where the labels are
    more than the images.
    """

    def __init__(self, names: list[str], labels: Labels | None, real: Real | None = None,
                 device: torch.device | str = "cpu"):
        self.names = names
        self.device = torch.device(device)
        self.real = real
        self.numbers = torch.arange(len(names))
        if labels is not None:
            if unknown := set(labels.names) - set(names):
                raise BadInput(f"{labels.origin} has the class {min(unknown)}, the model knows "
                               f"{shorten(', '.join(names), 200)}: expected labels of these")
            self.numbers = torch.tensor([names.index(name) for name in labels.names])[torch.from_numpy(labels.numbers)]
        self.digest = digest_of(names, self.numbers.tolist())
        self.labelled = labels is not None

    @property
    def measured(self) -> bool:
        """Whether the label of each real image is known."""
        return self.labelled and len(self.numbers) == self.real.count

    def drawn(self, images: range, seed: int) -> Tensor:
        """Labels (len(images),) for images to draw, with the shares that the real images have. Image 17 of a seed has
        the same label in any range."""
        lots = np.random.default_rng([seed, 0, 1]).random(images.stop)[images.start :]
        return self.numbers[torch.from_numpy(lots * len(self.numbers)).long()]

    def score(self, features: Tensor, labels: Tensor, name: str) -> dict[str, float]:
        """Measure the features (N, D) of samples of these labels (N,); empty if classes cannot be measured.

        name             of the Fréchet distance
        <name>/<class>   the distance of a class's samples to its real images, where there are LEAST of both
        …_class_mean     its mean, if all classes have one
        label_accuracy   share of the samples whose label the probe predicts
        """
        if not self.measured:
            return {}
        return self._distances(features, labels, name) | {"label_accuracy": self._accuracy(features, labels)}

    def floor(self, count: int, seed: int, name: str) -> dict[str, float]:
        """The measures of `count` random real images, those of `measures.floor`. The accuracy is that of the probe on
        the real images that it was not trained on."""
        if not self.measured:
            return {}
        row = self._distances(shuffled(self.real.features, seed)[:count], shuffled(self._kept, seed)[:count], name)
        return row | {"label_accuracy": self._accuracy(self.real.features[::HELD_OUT], self._kept[::HELD_OUT])}

    @cached_property
    def _kept(self) -> Tensor:
        """The labels of the images whose features are kept."""
        return self.numbers[kept_places(self.real.count)]

    @cached_property
    def _probe(self) -> Tensor:
        """A linear map of features to classes, (D + 1, classes): ridge regression of the labels, one-hot."""
        trained = torch.arange(len(self._kept)) % HELD_OUT > 0
        x = self._with_one(self.real.features[trained])
        products = x.T @ x
        products.diagonal().add_(RIDGE * products.diagonal().mean())
        return torch.linalg.solve(products, x.T @ F.one_hot(self._kept[trained], len(self.names)).to(x))

    def _accuracy(self, features: Tensor, labels: Tensor) -> float:
        predicted = (self._with_one(features) @ self._probe).argmax(1).cpu()
        return (predicted == labels).double().mean().item()

    def _with_one(self, features: Tensor) -> Tensor:
        """Features (N, D) and a number that is 1, (N, D + 1)."""
        return F.pad(float64(features, self.device), (0, 1), value=1.0)

    def _distances(self, features: Tensor, labels: Tensor, name: str) -> dict[str, float]:
        """The distances that `score` describes, of features (N, D) with labels (N,), by class and their mean."""
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None

        def distance(number: int) -> float | None:
            own, others = features[labels == number], self.real.features[self._kept == number]
            if min(len(own), len(others)) < LEAST:
                return None
            with one_thread(), torch.cuda.stream(stream) if stream else nullcontext():  # threads take a class each
                return distance_of_few(float64(own, self.device), float64(others, self.device))

        distances = list(ahead(distance, range(len(self.names)), threads=THREADS, depth=THREADS))
        row = {f"{name}/{of_class}": distance for of_class, distance in zip(self.names, distances, strict=True)
               if distance is not None}
        if len(row) == len(self.names):
            row[f"{name}_class_mean"] = fmean(row.values())
        return row


def distance_of_few(a: Tensor, b: Tensor) -> float:
    """`base.statistics.frechet_distance` of features in float64, a: (N, D), b: (M, D), by a matrix of N or D rows: fast
    for an N below D."""
    shift = (a.mean(0) - b.mean(0)).square().sum()
    a, b = root_of_covariance(a), (b - b.mean(0)) / (len(b) - 1) ** 0.5
    spreads = a.square().sum() + b.square().sum()
    between = a @ b.T
    return max(0.0, (shift + spreads).item() - 2 * trace_of_root(between @ between.T))
