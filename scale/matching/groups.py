"""A noise pool for each group of samples, at full speed."""

import torch

from dansm import GroupedPool


class FastGroupedPool(GroupedPool):
    """`dansm.GroupedPool` of `FastPool`s. It takes their arguments too."""

    def __init__(self, match_size: int, shape, *, groups: int, cost: str = "squared", device="cpu", dtype=torch.float32,
                 seed: int | None = None, **fast):
        super().__init__(match_size, shape, groups=groups, cost=cost, device=device, dtype=dtype, seed=seed)
        self.settings |= fast
