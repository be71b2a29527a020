"""The runs that `proof` compares, and the settings of each."""

import dataclasses
import math
import shlex
from typing import NamedTuple

from ..model.recipe import Recipe, load, shown

LONG, MIDDLE, SHORT = 5_120_000, 2_048_000, 1_024_000  # images
MARKS = (256_000, 512_000, SHORT, MIDDLE, 3_584_000, LONG)  # images after which a run is evaluated
FEW = 128_000, 256_000, 512_000  # the same for batches of 1 and of 8, whose steps take nearly as long as one of 256
RATE_STEPS = 500  # least count of training steps that a rate is measured over
OWN = "seed", "steps", "evaluate_at", "log_steps"  # what `recipe_of` sets for each run


class Run(NamedTuple):
    """What is compared: the settings that differ from the recipe, how many images it sees, in how many seeds."""

    name: str
    settings: dict
    images: int
    seeds: int
    label: str  # in figures


RANDOM, MATCHED = "random", "greedy-10000"
DIFFUSION = dict(flow="diffusion", target="velocity")  # one that predicts the noise needs far more images
RUNS = {run.name: run for run in [
    Run(RANDOM, dict(method="random"), LONG, 3, "random pairs"),
    Run(MATCHED, dict(), LONG, 3, "pool of 10,000"),
    Run("greedy-1000", dict(match_size=1000), MIDDLE, 1, "pool of 1,000"),
    Run("greedy-100000", dict(match_size=100_000), MIDDLE, 3, "pool of 100,000"),
    Run("greedy-1000000", dict(match_size=1_000_000, pool_dtype="bf16"), MIDDLE, 1, "pool of 1,000,000"),
    Run("assigned-256", dict(method="optimal", match_size=256), MIDDLE, 1, "assignment within batches of 256"),
    Run("nearest-16", dict(method="nearest", match_size=16), MIDDLE, 1, "nearest of 16"),
    Run("optimal-10000", dict(method="optimal"), MIDDLE, 1, "assignment over 10,000"),
    Run("diffusion-random", dict(DIFFUSION, method="random"), MIDDLE, 2, "diffusion, random pairs"),
    Run("diffusion-greedy-10000", DIFFUSION, MIDDLE, 2, "diffusion, pool of 10,000"),
    Run("inner-10000", dict(cost="inner"), SHORT, 3, "pool of 10,000, inner product"),
    Run("inner-100000", dict(cost="inner", match_size=100_000), SHORT, 3, "pool of 100,000, inner product"),
    Run("batch8-random", dict(batch=8, lr=1e-4, method="random"), FEW[2], 1, "batch 8, random pairs"),
    Run("batch8-assigned", dict(batch=8, lr=1e-4, method="optimal", match_size=8), FEW[2], 1,
        "batch 8, assignment within batches"),
    Run("batch8-greedy-10000", dict(batch=8, lr=1e-4), FEW[2], 1, "batch 8, pool of 10,000"),
    Run("batch1-random", dict(batch=1, lr=4e-5, method="random"), FEW[0], 1, "batch 1, random pairs"),
    Run("batch1-greedy-10000", dict(batch=1, lr=4e-5), FEW[0], 1, "batch 1, pool of 10,000"),
]}


def recipe_of(run: Run, seed: int, data: str, **more) -> Recipe:
    """All settings of a run. It is evaluated at the marks up to its last image, and at its end."""
    batch = run.settings.get("batch", load("proof").batch)
    marks = [images // batch for images in (MARKS if run.images > FEW[-1] else FEW) if images <= run.images]
    steps = run.images // batch
    return load("proof", {**run.settings, "data": data, "seed": seed, "steps": steps,
                          "evaluate_at": sorted({*marks, steps}), "log_steps": max(50, steps // 100), **more})


def command_of(run: Run, seed: int, data: str = "cifar10", **more) -> str:
    """The command that trains this run by itself."""
    recipe, default = recipe_of(run, seed, data, **more), load("proof")
    words = ["dansm train proof"]
    if data != "cifar10":
        words.append(f"--data {shlex.quote(data)}")
    for name in dict.fromkeys((*run.settings, *more, *OWN)):
        value = getattr(recipe, name)
        if value != getattr(default, name):
            words.append(f"--{name.replace('_', '-')} {shlex.quote(shown(value))}")
    return " ".join(words)


def runs_left(names: list[str], rows: list[dict]) -> list[tuple[Run, int]]:
    """The runs and seeds that are not measured to their end, the first seed of each before the second."""
    ended = {(row["run"], row["seed"]) for row in rows if row["images"] >= RUNS[row["run"]].images}
    seeds = max((RUNS[name].seeds for name in names), default=0)
    return [(RUNS[name], seed) for seed in range(seeds) for name in names
            if seed < RUNS[name].seeds and (name, seed) not in ended]


def timed(recipe: Recipe) -> Recipe:
    """A run as its rate is measured: without evaluations, over twelve lines of its log, of which ten count. They span
    whole lives of its pool, which costs more while it is full."""
    pool = recipe.match_size if recipe.method in ("greedy", "optimal") else 0
    life = max(1, math.ceil(pool / recipe.batch))  # steps
    line = math.ceil(life * math.ceil(RATE_STEPS / life) / 10)
    return dataclasses.replace(recipe, steps=12 * line, evaluate_at=(), log_steps=line)
