"""Continuous conditions in 2D: groups by k-means against noises that carry conditions, into continuous.csv. About half
an hour on a core: PYTHONPATH=. python results/conditions/continuous.py

Problems: two moons and a checkerboard whose condition is a sample's first coordinate; "texts", eight Gaussians whose
condition is a vector of 16 numbers, blurred, that names two opposite blobs. Couplings:

    random, one pool       of MATCH_SIZE, whatever the conditions
    k-means G              conditions clustered into G groups, a pool of MATCH_SIZE / G noises for each
    carried w              a pool whose noises each carry the condition c' of an earlier sample: the nearest by
                           ‖x − z‖² + w ‖c − c'‖²
    C²OT w                 an assignment by that cost within the batch (arXiv 2503.10636)
"""

import math
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor, nn

import dansm
from dansm.scale.base.files import write_csv
from dansm.scale.matching import optimal
from dansm.tiny import toy
from dansm.tiny.shapes import SHAPES

MATCH_SIZE, BATCH, STEPS, SEEDS = 1024, 256, 1500, 3
WEIGHTS = ("0.1", "1", "10", "100")
COUPLINGS = ["random", "one pool", "k-means 4", "k-means 16", "k-means 64",
             *[f"carried {w}" for w in WEIGHTS], *[f"C²OT {w}" for w in WEIGHTS]]
NAMES = torch.randn(4, 16, generator=torch.Generator().manual_seed(7))  # of pairs of blobs


def draw(problem: str, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Samples (count, 2) and their conditions, (count, 1) or (count, 16)."""
    generator = torch.Generator().manual_seed(seed)
    if problem != "texts":
        x = SHAPES[problem](count, generator)
        return x, x[:, :1]
    x = SHAPES["eight-gaussians"](count, generator)
    return x, NAMES[blob_of(x) % 4] + 0.5 * torch.randn(count, 16, generator=generator)


def blob_of(x: Tensor) -> Tensor:
    return torch.atan2(x[:, 1], x[:, 0]).div(math.pi / 4).round().long() % 8


class Conditioned(toy.MLP):
    """The toy's network, given conditions (B, C) in place of classes."""

    def __init__(self, numbers: int):
        super().__init__(width=96, classes=numbers)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        t = t[:, None] / 999
        angles = torch.cat([(x[:, :, None] * self.of_place).flatten(1), t * self.of_time], 1)
        return self.layers(torch.cat([x, t, angles.sin(), angles.cos(), labels], 1))


def couple(coupling: str, problem: str, seed: int) -> Callable[[Tensor, Tensor], Tensor]:
    """What gives noises to samples and conditions."""
    kind, _, number = coupling.rpartition(" ")
    if coupling in ("random", "one pool"):
        pool = dansm.NoisePool(MATCH_SIZE if coupling == "one pool" else 0, (2,), seed=seed)
        return lambda x, c: pool(x)
    if kind == "k-means":
        groups = int(number)
        centres = cluster(draw(problem, 4096, 555 + seed)[1], groups, seed)
        pool = dansm.NoisePool(MATCH_SIZE // groups, (2,), seed=seed, groups=groups)
        return lambda x, c: pool(x, torch.cdist(c, centres).argmin(1))
    generator = torch.Generator().manual_seed(1000 + seed)
    if kind == "carried":
        return CarryingPool(float(number), generator)
    return partial(assign_in_batch, w=float(number), generator=generator)


def cluster(c: Tensor, groups: int, seed: int) -> Tensor:
    """The centres of k-means from random conditions."""
    centres = c[torch.randperm(len(c), generator=torch.Generator().manual_seed(seed))[:groups]].clone()
    for _ in range(30):
        nearest = torch.cdist(c, centres).argmin(1)
        for group in nearest.unique():
            centres[group] = c[nearest == group].mean(0)
    return centres


def assign_in_batch(x: Tensor, c: Tensor, w: float, generator: torch.Generator) -> Tensor:
    z = torch.randn(x.shape, generator=generator)
    carried = c[torch.randperm(len(c), generator=generator)]
    return z[optimal(dansm.cost_matrix(x, z) + w * torch.cdist(c, carried).square()).picks]


class CarryingPool:
    def __init__(self, w: float, generator: torch.Generator):
        self.w = w
        self.generator = generator
        self.z = torch.empty(0, 2)
        self.earlier = []  # conditions of the last samples

    def __call__(self, x: Tensor, c: Tensor) -> Tensor:
        self.earlier = [*self.earlier[-MATCH_SIZE // BATCH :], c]
        if len(self.z) == 0:  # MATCH_SIZE is a multiple of BATCH
            self.z = torch.randn(MATCH_SIZE, 2, generator=self.generator)
            carried = torch.cat(self.earlier)
            self.carried = carried[torch.randint(len(carried), (MATCH_SIZE,), generator=self.generator)]
        cost = dansm.cost_matrix(x, self.z) + self.w * torch.cdist(c, self.carried).square()
        picks = dansm.greedy(cost)
        z = self.z[picks]
        free = torch.ones(len(self.z), dtype=torch.bool)
        free[picks] = False
        self.z, self.carried = self.z[free], self.carried[free]
        return z


def told_condition(z: Tensor, c: Tensor) -> float:
    """Share of the conditions' variance that a linear guess from the noise tells, on the half it has not seen."""
    half = len(z) // 2
    inputs = torch.cat([z, torch.ones(len(z), 1)], 1)
    guess = inputs[half:] @ torch.linalg.lstsq(inputs[:half], c[:half]).solution
    return 1 - ((c[half:] - guess).square().sum() / (c[half:] - c[:half].mean(0)).square().sum()).item()


def distance(problem: str, x: Tensor, c: Tensor, target: Tensor, of_target: Tensor) -> float:
    """W2² of samples to the target: for texts between those of each name, else of the points with their conditions."""
    if problem != "texts":
        pairs = torch.cat([x, c], 1), torch.cat([target, of_target], 1)
        return fmean(map(toy.wasserstein2, *(points.split(1000) for points in pairs)))
    parts = []
    for name in range(4):
        asked = torch.cdist(c, NAMES).argmin(1) == name
        blobs = [target[blob_of(target) == blob][:480] for blob in (name, name + 4)]  # as many of each
        parts.append(toy.wasserstein2(x[asked][:960], torch.cat(blobs)))
    return fmean(parts)


def train_and_measure(problem: str, coupling: str, seed: int) -> dict:
    pair = couple(coupling, problem, seed)
    torch.manual_seed(99 + seed)
    training = dansm.Training(Conditioned(draw(problem, 1, 0)[1].shape[1]), lr=5e-3, decay=0.998)
    seen = []
    for step in range(STEPS):
        x, c = draw(problem, BATCH, 100_000 * (1 + seed) + step)
        z = pair(x, c)
        seen = [*seen[-79:], (z, c)]
        training.gradients(dansm.RectifiedFlow(), x, z, c)
        training.update()
    count = 4400 if problem == "texts" else 2000
    target, of_target = draw(problem, count, 10_000 + seed)
    _, asked = draw(problem, count, 20_000 + seed)
    start = torch.randn(count, 2, generator=torch.Generator().manual_seed(30_000 + seed))
    net: nn.Module = training.average
    row = {"problem": problem, "coupling": coupling, "seed": seed,
           "told": told_condition(*map(torch.cat, zip(*seen, strict=True)))}
    for steps in (2, 5, 20, 50):
        x = dansm.RectifiedFlow().sample(partial(net, labels=asked), start, steps)
        row[f"w2_{steps}_steps"] = distance(problem, x, asked, target, of_target)
    return row


if __name__ == "__main__":
    torch.set_num_threads(1)
    rows = []
    for problem, seed, coupling in product(("two-moons", "checkerboard", "texts"), range(SEEDS), COUPLINGS):
        rows.append(train_and_measure(problem, coupling, seed))
        print(rows[-1], flush=True)
        write_csv(Path(__file__).with_suffix(".csv"), rows)
