"""Batches for --method semidiscrete: fresh noises choose the samples, by a plan that all samples share."""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing
from pathlib import Path

import torch

from ..data import loader
from ..data.labels import Labels
from ..model.recipe import Recipe
from .coupling import coupled, uncoupled


class CoupledBatches:
    """What pairs a run by method "semidiscrete", as a pool does by others. `solve` may take long: first all that may
    refuse the run is to do so."""

    def __init__(self, images, recipe: Recipe, device: torch.device, labels: Labels | None = None):
        self.images = images
        self.recipe = recipe
        self.device = device
        self.labels = labels.numbers if labels else None
        self.coupling = None
        self.served = {}  # the place among the noises after the batch served last; more of them are read ahead

    def solve(self) -> None:
        """Make the coupling, unless it is there. Its samples from number len(images) on are mirrored."""
        if self.coupling is None:
            cache = Path(self.recipe.cache) if self.recipe.cache else None
            self.coupling = coupled(self.images, error=self.recipe.couple_error, cache=cache, **self._settings())

    def make(self) -> None:
        """Make the coupling without solving it: a checkpoint has what was found."""
        self.coupling = uncoupled(self.images, **self._settings())

    def _settings(self) -> dict:
        recipe = self.recipe
        return dict(flip=recipe.flip, labels=self.labels if recipe.match_labels == "yes" else None, part=recipe.part,
                    seed=recipe.seed, device=self.device, memory=recipe.memory)

    def pairs(self, matching: Callable[[], AbstractContextManager], *, ranks: int, device: torch.device,
              **place) -> Iterator[tuple]:
        """Yield this process's part of each batch, (x, z) or (x, z, labels), all (B, ...) on the device. Noises are
        drawn inside `matching()`. No one waits for a GPU. place: as `loader.serve` takes it."""
        labels = None if self.labels is None else torch.from_numpy(self.labels).to(device)
        batch, drawn = self.recipe.batch, deque()  # of batches that are not served yet

        def shares(there: torch.device, _) -> Iterator[list]:
            while True:
                with matching():
                    z, taken = self.coupling.draw(batch // ranks)
                rows, mirrored = taken % len(self.images), taken >= len(self.images)
                drawn.append((z, rows, {"before": self.coupling.before, "handed": self.coupling.handed}))
                yield loader.on_its_way([rows, mirrored]) if there.type == "cpu" else [rows, mirrored]

        with closing(loader.serve(self.images, shares, batch, ranks=ranks, device=device, **place)) as served:
            for x in served:
                z, rows, self.served = drawn.popleft()
                yield (x, z) if labels is None else (x, z, labels[rows])

    def state_dict(self) -> dict:
        """What a checkpoint needs for the batches after the one served last. Before `solve` there is none."""
        if self.coupling is None:
            return {"made_for": {"device": self.device.type}}
        return self.coupling.state_dict() | self.served

    def load_state_dict(self, state: dict) -> None:
        """Resume after the batch that was served last; `make` comes before. BadInput for the state of other data."""
        self.coupling.load_state_dict(state)
