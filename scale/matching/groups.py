"""A noise pool for each group of samples, at full speed."""

import warnings

import numpy as np
import torch
from torch import Tensor

from dansm import BadInput, NoisePool, check_count, check_labels, noise_generator

from .pool import FastPool
from .spread import SpreadPool


class FastGroupedPool(FastPool):
    """A pool of `match_size` noises for each group of samples: NoisePool(match_size, shape, groups=10).

        z = pool(x, labels)     # labels: (B,) whole numbers from 0 to groups − 1

    One pool for all classes gives each class noises of its own kind; sampling by class starts elsewhere. Here those of
    each group are N(0, I) by themselves. A group's pool is made when it first comes. It takes the arguments of
    `FastPool` too:

    match_size  of each group; None makes it as large as `memory` allows if all groups come, "auto" such that the
                `expected` samples, if equally many are of each group, empty each pool ten times or more
    memory      gigabytes of all groups' pools together, and their matching

    Labels are needed on the CPU: those on a GPU are copied back, and the CPU waits for it. Raises BadInput also for
    other labels, and for a group whose pool does not fit any more, before the batch takes a noise.
    """

    grouped = True
    kind = FastPool  # of each group's pool

    def __init__(self, match_size: int | str | None, shape, *, groups: int, **settings):
        self.groups = check_count("groups", groups)
        self.settings = {name: value for name, value in settings.items() if name != "expected"}
        self.pools = {}  # of the groups that came so far
        super().__init__(match_size, shape, **settings)

    def _answer(self, x: Tensor, labels: Tensor | None) -> Tensor:
        labels, coming = self._coming(x, labels)
        for group in coming:
            self._pool(group)
        return self._match_groups(x, labels, coming)

    def _coming(self, x: Tensor, labels: Tensor | None) -> tuple[np.ndarray, list[int]]:
        """The label of each sample, and the groups that come, in ascending order."""
        self.check(x)
        labels = labels.cpu() if isinstance(labels, Tensor) else labels
        labels = check_labels(labels, len(x), self.groups).numpy()
        return labels, np.bincount(labels).nonzero()[0].tolist()

    def _match_groups(self, x: Tensor, labels: np.ndarray, coming: list[int]) -> Tensor:
        z = torch.empty_like(x)
        for group in coming:
            members = moved(np.flatnonzero(labels == group), x.device)
            z[members] = self.pools[group](x[members])
        return z

    def _pool(self, group: int) -> NoisePool:
        if group not in self.pools:
            settings, made = self.settings | {"seed": self.seed}, len(self.pools)
            taken, memory = 1e-9 * made * self._kept(self.match_size), settings.get("memory")
            if memory is not None:
                settings["memory"] = max(memory - taken, 1e-9)
            try:
                pool = self.kind(self.match_size, self.shape, **settings)
                if self.match_size > 1:
                    pool._allocate()
            except BadInput as error:
                of = "" if memory is None else f" of {memory}"
                raise BadInput(f"group {group} comes when {made:,} pools take {taken:.2f}{of} GB: {error}") from error
            process = self.stream or (0,)  # all ranks share the streams of one where they share the pool
            pool.stream = *process, 1 + group
            # After the state of another process no stream is begun anew: `number` is not 0 then.
            pool.number, fresh = self.number, (self.number,) * (self.number > 0)
            pool.generator = noise_generator(self.seed, pool.noise.device, 0, *self.stream or (self.rank,), 1 + group,
                                             *fresh)
            self.pools[group] = pool
        return self.pools[group]

    def state_dict(self) -> dict:
        return super().state_dict() | {"pools": {group: pool.state_dict() for group, pool in self.pools.items()}}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.pools = {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what was said of the whole need not be said of each
            for group, state_of_group in state["pools"].items():
                self._pool(group).load_state_dict(state_of_group)

    def _made_for(self) -> dict:
        return super()._made_for() | {"groups": self.groups}


class SpreadGroupedPool(FastGroupedPool, SpreadPool):
    """`FastGroupedPool` of `SpreadPool`s. All ranks serve every group that comes on any of them."""

    kind = SpreadPool

    def _coming(self, x: Tensor, labels: Tensor | None) -> tuple[np.ndarray, list[int]]:
        refusal, known, mine = None, [], []
        try:
            known, mine = super()._coming(x, labels)
        except BadInput as error:
            refusal = error
        told = torch.zeros(self.groups + 1, dtype=torch.bool)  # the last: refused
        told[mine if refusal is None else -1] = True
        told = torch.stack(self._gathered(told.to(self.noise.device))).cpu()
        refused = told[:, -1].tolist()
        if any(refused):
            raise refusal or BadInput(f"the batch of rank {refused.index(True)} is refused: its own message says why")
        return known, told[:, :-1].any(0).nonzero()[:, 0].tolist()


def moved(numbers: np.ndarray, device: torch.device) -> Tensor:
    """Numbers on a device, without waiting for it."""
    numbers = torch.from_numpy(numbers)
    return numbers.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else numbers
