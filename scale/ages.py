"""Pools of different ages side by side.

The first samples of a pool find the nearest noises, the last what is left, and what is near is another kind of noise
than what is left. One pool serves these to a network one after the other. Several, of which each is at another point of
its life and serves a part of each batch, mix them: equal pools, equal pairs in the long run, in another order. What
that is worth on the digits, and what is known on CIFAR-10, stands in results/README.md. It takes the memory of all.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

import dansm


class SideBySide:
    """`ages` pools of `match_size` noises each, in the place of one `NoisePool`; `settings` are a NoisePool's.

    Samples are dealt to the pools like cards, over the borders of batches, so that a batch of one will do. Of n pools
    number k begins as one of (n − k)/n of the size, drawn from N(0, I) as every pool, and is whole from its second
    life on; they stay as far apart, as each serves as many samples. All have begun a second life after n · match_size
    samples. BadInput as of NoisePool, and for fewer noises in a pool than there are pools.
    """

    def __init__(self, ages: int, match_size: int, shape, *, seed: int, **settings):
        dansm.check_count("seed", seed, at_least=0)
        if dansm.check_count("match_size", match_size) < dansm.check_count("ages", ages):
            raise dansm.BadInput(f"ages is {ages}: expected at most {match_size}, the noises of one pool")
        self.served, self.pools = 0, []
        for age in reversed(range(ages)):  # the first, which draws when it is called, is checked against what is left
            pool = dansm.NoisePool(match_size, shape, seed=seed_of(seed, age), **settings)
            begin_at(pool, match_size * age // ages)
            self.pools.insert(0, pool)

    @property
    def match_size(self) -> int:
        return self.pools[0].match_size

    @property
    def shape(self) -> torch.Size:
        return self.pools[0].shape

    def __call__(self, x: Tensor) -> Tensor:
        """x: (B, *shape), any B → z: the same, z_i matched to x_i in the pool whose turn it is."""
        self.pools[0].check.form(x)
        z = torch.empty_like(x)
        for number, pool in enumerate(self.pools):
            dealt = slice((number - self.served) % len(self.pools), None, len(self.pools))
            if len(x[dealt]):
                z[dealt] = pool(x[dealt])
        self.served += len(x)
        return z

    def state_dict(self) -> dict:
        """All a checkpoint needs, see `NoisePool.state_dict`; "made_for" is that of each pool."""
        states = [pool.state_dict() for pool in self.pools]
        return {"made_for": states[0]["made_for"], "served": self.served, "pools": states}

    def load_state_dict(self, state: dict) -> None:
        """Go on where `state_dict` was taken, with as many pools made with the same arguments."""
        pools = state.get("pools", ()) if isinstance(state, dict) else ()
        if len(pools) != len(self.pools):
            raise dansm.BadInput(f"the state is of {len(pools)} pools side by side: expected {len(self.pools)}")
        for pool, saved in zip(self.pools, pools, strict=True):
            pool.load_state_dict(saved)
        self.served = state["served"]


def seed_of(seed: int, age: int) -> int:
    """Of one of the pools, whose noises are to be its own."""
    return seed if age == 0 else int(np.random.SeedSequence([seed, 0xA6E, age]).generate_state(1)[0] >> 1)


def begin_at(pool: dansm.NoisePool, taken: int) -> None:
    """Draw a new pool, of which as many noises are gone: they are independent, so it does not matter which."""
    if taken:
        left = torch.arange(taken, pool.match_size, dtype=torch.int32)
        pool.load_state_dict({**pool.state_dict(), "number": 1, "index": left})
