"""Matching written out naively, and pools whose noises are changed after they are drawn."""

import io
import math

import numpy as np
import torch

import dansm
from dansm import NoisePool, noise_generator
from dansm.scale.matching.pool import FastPool

COSTS = list(dansm.COSTS)
KINDS = ["random", "whole numbers", "one cluster", "the same"]
CHANGES = {
    "as drawn": lambda noise: noise.clone(),
    "whole numbers": lambda noise: noise.round(),  # many exact ties, all sums exact in float64
    "duplicates": lambda noise: noise[torch.arange(len(noise)) // 3],
    "all the same": lambda noise: torch.ones_like(noise),
}


def naive_cost(x, z, cost):
    """The cost of one sample and one noise, lists of numbers."""
    if cost == "squared":
        return math.fsum((a - b) ** 2 for a, b in zip(x, z, strict=True))
    return -math.fsum(a * b for a, b in zip(x, z, strict=True))


def naive_greedy(cost):
    free = list(range(len(cost[0]))) if cost else []
    picks = []
    for row in cost:
        picks.append(min(free, key=lambda j: row[j]))  # min keeps the first of equals
        free.remove(picks[-1])
    return picks


class NaivePool:
    """The paper's loop with lists: the nearest noise leaves the list, an empty list is filled again."""

    def __init__(self, match_size, dim, cost, seed, change, *stream):
        self.match_size, self.dim, self.cost, self.change = match_size, dim, cost, change
        self.seed, self.number, self.stream = seed, 0, stream
        self.noises = []

    def __call__(self, x):
        handed_out = []
        for sample in x.flatten(1).tolist():
            if not self.noises:
                self.number += 1
                drawn = drawn_for(self.seed, self.number, self.match_size, self.dim, torch.float64, *self.stream)
                self.noises = self.change(drawn).tolist()
            costs = [naive_cost(sample, z, self.cost) for z in self.noises]
            handed_out.append(self.noises.pop(costs.index(min(costs))))
        return torch.tensor(handed_out, dtype=torch.float64).view(x.shape)


class PlainPool(NoisePool):
    """The rule as dansm.py has it, where scale/ is installed too."""

    change = staticmethod(CHANGES["as drawn"])

    def _drawn(self, number):
        return self.change(super()._drawn(number))


class Changed:
    """Before a FastPool or one of its kind: its noises are changed after they are drawn."""

    change = staticmethod(CHANGES["as drawn"])

    def _draw(self, number, chunk, ours):
        return ours.copy_(self.change(super()._draw(number, chunk, ours)))


class ChangedFastPool(Changed, FastPool):
    pass


POOLS = [PlainPool, ChangedFastPool]


def drawn_for(seed, number, match_size, dim, dtype=torch.float32, *stream):
    """The noises of a pool that is drawn at once, as small ones are."""
    generator = noise_generator(seed, "cpu", number, 0, *stream)
    return torch.empty(match_size, dim, dtype=dtype).normal_(generator=generator)


def data(kind, count, dim, generator):
    x = torch.randn(count, dim, dtype=torch.float64, generator=generator)
    if kind == "whole numbers":
        return (2 * x).round()
    if kind == "one cluster":  # every sample wants the same few noises
        return 3 + 1e-3 * x
    if kind == "the same":
        return torch.full_like(x, 0.5)
    return x


def total(cost, picks):
    return cost[torch.arange(len(cost)), picks].sum().item()


def rows_in_order(z):
    rows = z.flatten(1).numpy()
    return rows[np.lexsort(rows.T)].tobytes()


def saved_and_loaded(pool):
    file = io.BytesIO()
    torch.save(pool.state_dict(), file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)
