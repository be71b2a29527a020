"""How well samples follow their labels: the distance of each class, and the labels that a linear probe predicts."""

from functools import cached_property
from statistics import fmean

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dansm import BadInput

from ..base.statistics import frechet_distance
from ..base.text import shorten
from ..data.labels import Labels
from .real_features import Real, digest_of, kept_places, shuffled

LEAST = 50  # images of a class, real ones and samples, for a distance of its own
HELD_OUT = 5  # one real image of so many is kept from the probe's training, to test it
RIDGE = 1e-3  # of the probe, times the mean square of a feature


class Classes:
    """The classes of models, and the real images of each.

    names   of the classes, as the models number them
    labels  of the real images; None: each class is drawn as often as the others, and none is measured
    real    may be set later: only `drawn` does without
    BadInput for labels of classes that the models do not know. Classes are not measured either where the labels are
    more than the images.
    """

    def __init__(self, names: list[str], labels: Labels | None, real: Real | None = None):
        self.names = names
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
        x = F.pad(self.real.features[trained].double(), (0, 1), value=1.0)
        products = x.T @ x
        products.diagonal().add_(RIDGE * products.diagonal().mean())
        return torch.linalg.solve(products, x.T @ F.one_hot(self._kept[trained], len(self.names)).double())

    def _accuracy(self, features: Tensor, labels: Tensor) -> float:
        predicted = (F.pad(features.double(), (0, 1), value=1.0) @ self._probe).argmax(1)
        return (predicted == labels).double().mean().item()

    def _distances(self, features: Tensor, labels: Tensor, name: str) -> dict[str, float]:
        row = {}
        for number, of_class in enumerate(self.names):
            own, others = features[labels == number], self.real.features[self._kept == number]
            if min(len(own), len(others)) >= LEAST:
                row[f"{name}/{of_class}"] = frechet_distance(own, others)
        if len(row) == len(self.names):
            row[f"{name}_class_mean"] = fmean(row.values())
        return row
