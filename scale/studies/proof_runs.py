"""The runs that `proof` compares, and how many images a way of pairing needs for the distance of random pairs."""

import dataclasses
import math
import shlex
from collections.abc import Iterable
from itertools import pairwise
from statistics import fmean
from typing import NamedTuple

from ..base.statistics import mean_and_std
from ..model.recipe import Recipe, as_option, load, shown

LONG, MIDDLE, SHORT = 5_120_000, 2_048_000, 1_024_000  # images
MARKS = (256_000, 512_000, SHORT, MIDDLE, 3_584_000, LONG)  # images after which a run is evaluated
FEW = 128_000, 256_000, 512_000  # the same for batches of 1 and of 8, whose steps take nearly as long as one of 256
RATE_STEPS = 500  # least count of training steps that a rate is measured over
OWN = "seed", "steps", "evaluate_at", "log_steps"  # what `recipe_of` sets for each run
Curve = dict[int, float]  # images → distance, in the order of images


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
    Run("priced-10000", dict(cost="priced"), MIDDLE, 3, "pool of 10,000 with prices"),
    Run("priced-100000", dict(cost="priced", match_size=100_000), MIDDLE, 1, "pool of 100,000 with prices"),
    Run("coarse-10000", dict(cost="priced", grid=(8, 8)), MIDDLE, 1, "coarse pool of 10,000 with prices"),
    Run("coarse-100000", dict(cost="priced", grid=(8, 8), match_size=100_000), MIDDLE, 3,
        "coarse pool of 100,000 with prices"),
    Run("greedy-1000000", dict(match_size=1_000_000, pool_dtype="bf16"), MIDDLE, 1, "pool of 1,000,000"),
    Run("assigned-256", dict(method="optimal", match_size=256), MIDDLE, 1, "assignment within batches of 256"),
    Run("nearest-16", dict(method="nearest", match_size=16), MIDDLE, 1, "nearest of 16"),
    Run("optimal-10000", dict(method="optimal"), MIDDLE, 1, "assignment over 10,000"),
    Run("semidiscrete", dict(method="semidiscrete"), LONG, 3, "semidiscrete plan"),
    Run("semidiscrete-10000", dict(method="semidiscrete", part=10_000), MIDDLE, 3, "plans of 10,000 samples"),
    Run("semidiscrete-1000", dict(method="semidiscrete", part=1000), MIDDLE, 3, "plans of 1,000 samples"),
    Run("diffusion-random", dict(DIFFUSION, method="random"), MIDDLE, 2, "diffusion, random pairs"),
    Run("diffusion-greedy-10000", DIFFUSION, MIDDLE, 2, "diffusion, pool of 10,000"),
    Run("diffusion-priced-10000", dict(DIFFUSION, cost="priced"), MIDDLE, 2, "diffusion, pool of 10,000 with prices"),
    Run("diffusion-semidiscrete", dict(DIFFUSION, method="semidiscrete"), MIDDLE, 2, "diffusion, semidiscrete plan"),
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
    words = ["dansm", "train", "proof"]
    for name in dict.fromkeys(("data", *run.settings, *more, *OWN)):
        value = getattr(recipe, name)
        if value != getattr(default, name):
            words += [as_option(name), shown(value)]
    return shlex.join(words)


def runs_left(names: list[str], rows: list[dict]) -> list[tuple[Run, int]]:
    """The runs and seeds that are not measured to their end, the first seed of each before the second."""
    ended = {(row["run"], row["seed"]) for row in rows if row["images"] >= RUNS[row["run"]].images}
    left = [(RUNS[name], seed) for name in names for seed in range(RUNS[name].seeds) if (name, seed) not in ended]
    return sorted(left, key=lambda run_and_seed: run_and_seed[1])


def timed(recipe: Recipe) -> Recipe:
    """A run as its rate is measured: without evaluations, over twelve lines of its log, of which ten count. They span
    whole lives of its pool, which costs more while it is full."""
    pool = recipe.match_size if recipe.method in ("greedy", "optimal") else 0
    life = max(1, math.ceil(pool / recipe.batch))  # steps
    line = math.ceil(life * math.ceil(RATE_STEPS / life) / 10)
    return dataclasses.replace(recipe, steps=12 * line, evaluate_at=(), log_steps=line)


# ------------ What distances mean -------------------------------------------------------------------------------------


def summarize(rows: list[dict]) -> list[dict]:
    """A row for each run, steps and images at which both the run and random pairs were measured from equal seeds:

    distance, random  means over the `seeds` with which both have come so far; of_random: their ratio
    spread, random_spread   standard deviations over seeds, None for one
    images_random     that random pairs need for the run's distance, and `saved`, 1 − images / images_random, with its
                      least and most over all pairs of seeds; None where (one of) them never comes to it
    images_ours       that the run needs for the distance of random pairs, by its seeds with the earliest marks, and
                      ratio, images / images_ours. If it was lower at its first mark: that mark, and at_least, as the
                      ratio may be larger
    """
    summary = []
    for name, run in RUNS.items():
        if name == base_of(run):
            continue
        for steps in sorted({row["steps"] for row in rows if row["run"] == name}):
            own, base = curves(rows, name, steps), curves(rows, base_of(run), steps)
            for images in sorted({row["images"] for row in rows}):
                if seeds := [seed for seed in sorted(own) if images in own[seed] and images in base.get(seed, {})]:
                    columns = compare([own[seed] for seed in seeds], [base[seed] for seed in seeds], images)
                    summary.append({"run": name, "steps": steps, "images": images, **columns})
    return summary


def base_of(run: Run) -> str:
    """The run that this one is compared with: random pairs, with the same flow and batch."""
    kind = {key: run.settings.get(key) for key in ("flow", "batch")}
    return next(other.name for other in RUNS.values() if other.settings.get("method") == "random" and
                kind == {key: other.settings.get(key) for key in kind})


def curves(rows: list[dict], name: str, steps: int) -> dict[int, Curve]:
    """The curve of each seed of a run, sampled in that many steps."""
    by_seed = {}
    for row in sorted(rows, key=lambda row: row["images"]):
        if (row["run"], row["steps"]) == (name, steps):
            by_seed.setdefault(row["seed"], {})[row["images"]] = row["distance"]
    return by_seed


def compare(own: list[Curve], base: list[Curve], images: int) -> dict:
    """The columns of `summarize`, from the curves of equal seeds."""
    distances, base_distances = [curve[images] for curve in own], [curve[images] for curve in base]
    distance, base_distance = fmean(distances), fmean(base_distances)
    needed = images_to(distance, mean_curve(base))
    least, most = range_of(images_to(goal, curve) for goal in distances for curve in base)
    earliest = min(min(curve) for curve in own)
    whole = [curve for curve in own if min(curve) == earliest]  # others were evaluated late and tell no fewer images
    needs = images_to(base_distance, mean_curve(whole), or_less=True)
    spreads = [round(mean_and_std(each)["std"], 3) if len(each) > 1 else None for each in (distances, base_distances)]
    quick, slow = range_of(images_to(goal, curve, True) for goal in base_distances for curve in whole)
    return {"distance": round(distance, 3), "random": round(base_distance, 3), "seeds": len(distances),
            "spread": spreads[0], "random_spread": spreads[1],
            "of_random": round(distance / base_distance, 4),
            "images_random": needed and round(needed), "saved": needed and round(1 - images / needed, 3),
            "least_saved": least and round(1 - images / least, 3), "most_saved": most and round(1 - images / most, 3),
            "images_ours": needs and round(needs), "ratio": needs and round(images / needs, 3),
            "least_ratio": slow and round(images / slow, 3), "most_ratio": quick and round(images / quick, 3),
            "at_least": next(iter(mean_curve(whole).values())) < base_distance if needs else None}


def mean_curve(by_seed: list[Curve]) -> Curve:
    """The mean over seeds, at the images that all have."""
    shared = sorted(set.intersection(*map(set, by_seed)))
    return {images: fmean(curve[images] for curve in by_seed) for images in shared}


def images_to(distance: float, curve: Curve, or_less: bool = False) -> float | None:
    """How many images it takes to come to a distance, by straight lines between the logarithms of a curve's points;
    None if the curve does not come so low, or begins lower, which is its first images with `or_less`."""
    first = next(iter(curve))
    if or_less and curve[first] < distance:
        return first
    for (before, worse), (after, better) in pairwise(curve.items()):
        if worse >= distance > better or distance == better:
            share = (math.log(worse) - math.log(distance)) / max(math.log(worse) - math.log(better), 1e-12)
            return math.exp(math.log(before) + share * (math.log(after) - math.log(before)))
    return None


def range_of(numbers: Iterable[float | None]) -> tuple[float | None, float | None]:
    """The least and most over pairs of seeds; None unless each pair has a number, or there would be half a range."""
    numbers = list(numbers)
    return (None, None) if None in numbers else (min(numbers), max(numbers))
