"""A noise pool for each group of samples, at full speed."""

import torch
from torch import Tensor

from dansm import BadInput, GroupedPool, NoisePool, check_count, check_labels, noise_generator

from .pool import FastPool
from .spread import SpreadPool


class FastGroupedPool(GroupedPool, FastPool):
    """`dansm.GroupedPool` of `FastPool`s, whose arguments it takes too.

    match_size  of each group; None makes it as large as `memory` allows if all groups come
    memory      gigabytes of all groups' pools together, and their matching

    Labels are needed on the CPU: those on a GPU are copied back, and the CPU waits for it. Raises BadInput also for a
    group whose pool does not fit any more, before the batch takes a noise.
    """

    kind = NoisePool  # of each group's pool

    def __init__(self, match_size: int | None, shape, *, groups: int, **settings):
        self.groups = check_count("groups", groups)
        super().__init__(match_size, shape, groups=groups, **settings)

    @torch.inference_mode(False)
    @torch.no_grad()
    def __call__(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        labels, coming = self._coming(x, labels)
        for group in coming:
            self._pool(group)
        return self._match_groups(x, labels, coming)

    def _coming(self, x: Tensor, labels: Tensor | None) -> tuple[Tensor, list[int]]:
        """The labels as int64 on the CPU, and the groups that come."""
        self.check(x)
        if isinstance(labels, Tensor):
            labels = labels.to("cpu", torch.int64 if labels.dtype in (torch.uint8, torch.int8) else None)
        labels = check_labels(labels, len(x), self.groups)
        return labels, labels.unique().tolist()

    def _match_groups(self, x: Tensor, labels: Tensor, coming: list[int]) -> Tensor:
        z = torch.empty_like(x)
        order = moved(labels.argsort(stable=True), x.device)
        counts = labels.bincount(minlength=self.groups)[coming].tolist()
        for group, members in zip(coming, order.split(counts), strict=True):
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
            pool.generator = noise_generator(self.seed, pool.noise.device, 0, *self.stream or (self.rank,), 1 + group)
            self.pools[group] = pool
        return self.pools[group]


class SpreadGroupedPool(FastGroupedPool, SpreadPool):
    """`FastGroupedPool` of `SpreadPool`s. All ranks serve every group that comes on any of them."""

    kind = SpreadPool

    def _coming(self, x: Tensor, labels: Tensor | None) -> tuple[Tensor, list[int]]:
        refusal, known = None, torch.empty(0, dtype=torch.int64)
        try:
            known, _ = super()._coming(x, labels)
        except BadInput as error:
            refusal = error
        told = torch.cat([known.bincount(minlength=self.groups), torch.tensor([refusal is not None])])
        told = torch.stack(self._gathered(told.to(self.noise.device))).cpu()
        refused = told[:, -1].tolist()
        if any(refused):
            raise refusal or BadInput(f"the batch of rank {refused.index(1)} is refused: its own message says why")
        return known, told[:, :-1].sum(0).nonzero()[:, 0].tolist()


def moved(numbers: Tensor, device: torch.device) -> Tensor:
    """Copy numbers from the CPU to a device without waiting for it."""
    return numbers.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else numbers
