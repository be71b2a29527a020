"""The semidiscrete coupling in torch's DataLoader: a batch sampler that hands out the noises of each batch."""

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Sampler, get_worker_info

from dansm import BadInput, check_count, check_tensor, process_number

from .inside import from_elsewhere
from .semidiscrete import FastSemidiscrete


class Drawn(NamedTuple):
    """A batch that has not taken its noises."""

    place: tuple  # where it begins among the coupling's noises
    z: Tensor  # (B, ...)
    indices: list[int]  # (B,)


class CoupledBatchSampler(Sampler[list[int]]):
    """Batches of samples that fresh noises choose, for a DataLoader whose dataset[i] is sample i of the coupling.

        sampler = CoupledBatchSampler(coupling, batch_size=256)
        for x, y in DataLoader(dataset, batch_sampler=sampler, num_workers=4):
            z = sampler.noise(x)        # once for each batch, in the loader's order

    coupling  a solved `dansm.Semidiscrete`. Each process makes its own and draws other noises, so the loader is not to
              be split among them
    batches   in an epoch; None: as many as the data fill

    A loop may end early; the next one has the batches whose noises were not asked for. BadInput where a batch and
    noises do not belong together.
    """

    def __init__(self, coupling: FastSemidiscrete, batch_size: int, batches: int | None = None):
        if not isinstance(coupling, FastSemidiscrete):
            raise BadInput(f"coupling is a {type(coupling).__name__}: expected a Semidiscrete")
        self.coupling, self.size = coupling, check_count("batch_size", batch_size)
        fill = max(1, len(coupling.potentials) // self.size)
        self.batches = fill if batches is None else check_count("batches", batches)
        self.loop = 0  # the number of the loop over the sampler
        self.done = self.resumed = 0  # batches of the epoch that have their noises; those before a resumed loop
        self._forget_drawn()

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:
        self.coupling.settle()
        self.loop += 1
        self.asked, self.ahead, self.done, loop = 0, 0, self.resumed, self.loop
        for _ in range(self.done, self.batches):
            if self.asked == len(self.drawn):
                self.drawn.append(self._draw())
            self.asked += 1
            yield self.drawn[self.asked - 1].indices
            if loop != self.loop:
                raise BadInput("a loop goes on after another began or a state was loaded: expected it to end before")

    def _draw(self) -> Drawn:
        if not self.coupling.solved:
            raise BadInput("the coupling is not solved: expected coupling.solve(), or a saved state, before the loop")
        place = self._place()
        z, taken = self.coupling.draw(self.size)
        return Drawn(place, z, taken.tolist())

    def _place(self) -> tuple:
        return self.coupling.before, self.coupling.handed

    def _forget_drawn(self) -> None:
        self.drawn = deque()
        self.asked = 0  # how many of them the loader has asked for
        self.ahead = 0  # how many it had when `noise` was first called

    # ------------------------------------------------------------------------------- noises

    def noise(self, x: Tensor, indices: Sequence[int] | Tensor | None = None) -> Tensor:
        """The noises of a batch x: (B, ...), like x. With its indices (B,) batches before it may be left out."""
        if get_worker_info() is not None:
            raise BadInput("noise() is called in a worker of the loader: expected the process that trains")
        check_tensor(x)
        if not self.asked:
            raise BadInput("noise() is called more often than batches came: expected once for each")
        if indices is None:
            self._check_ahead()
        left_out = 0 if indices is None else self._batches_before(torch.as_tensor(indices).tolist())
        z = self.drawn[left_out].z
        if x.shape != z.shape:
            raise BadInput(f"the batch is of shape {tuple(x.shape)}: expected that of its noises, {tuple(z.shape)}")
        for _ in range(left_out + 1):
            self.drawn.popleft()
            self.asked -= 1
            self.done += 1
        self.resumed = 0
        return z.to(x)

    def _check_ahead(self) -> None:
        """BadInput if the loader has read farther ahead than at first: then it came to batches that took no noises."""
        self.ahead = self.ahead or self.asked
        if self.asked > self.ahead:
            raise BadInput("noise() is called less often than batches came: expected once for each, or their indices")

    def _batches_before(self, indices: list[int]) -> int:
        """How many batches without noises came before that of these indices."""
        for number, batch in enumerate(islice(self.drawn, self.asked)):
            if batch.indices == indices:
                return number
        raise BadInput(f"the indices begin with {indices[:3]}: expected those of a batch after the last one")

    # ------------------------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict:
        """What a checkpoint needs to resume after the last batch that has its noises, the coupling's state included.
        Each of several processes has a state of its own, and can go on with another's."""
        before, handed = self.drawn[0].place if self.drawn else self._place()
        return {"made_for": self._made_for(), "done": self.done % self.batches,
                "coupling": self.coupling.state_dict() | {"before": before, "handed": handed}}

    def load_state_dict(self, state: dict) -> None:
        """Resume before the next loop: it has the rest of the epoch."""
        saved = state.get("made_for") if isinstance(state, dict) else None
        if saved != self._made_for() and not from_elsewhere(state, self._made_for()):
            raise BadInput(f"the saved sampler is {saved}, this one {self._made_for()}: expected the same")
        self.coupling.load_state_dict(state["coupling"])
        self.loop += 1
        self.done = self.resumed = state["done"]
        self._forget_drawn()

    def _made_for(self) -> dict:
        return {"batch_size": self.size, "batches": self.batches, "process": process_number()}
