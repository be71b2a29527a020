"""What the distances of `proof` mean: how many images a way of pairing needs for the quality of random pairs."""

import math
import statistics
from collections.abc import Iterable
from itertools import pairwise

from ..base.statistics import mean_and_std
from .proof_plan import RUNS, Run

Curve = list[tuple[int, float]]  # (images, distance), in the order of images


def curves(rows: list[dict], name: str, steps: int) -> dict[int, Curve]:
    """The curve of each seed of a run, sampled in that many steps."""
    by_seed = {}
    for row in sorted(rows, key=lambda row: row["images"]):
        if (row["run"], row["steps"]) == (name, steps):
            by_seed.setdefault(row["seed"], []).append((row["images"], row["distance"]))
    return by_seed


def mean_curve(by_seed: dict[int, Curve]) -> Curve:
    """The mean over seeds, at the images that all have."""
    points = [dict(curve) for curve in by_seed.values()]
    shared = set.intersection(*map(set, points)) if points else set()
    return [(images, statistics.fmean(distances[images] for distances in points)) for images in sorted(shared)]


def images_to(distance: float, curve: Curve) -> float | None:
    """How many images it takes to come to a distance, by straight lines between the logarithms of a curve's points;
    None if the curve does not come so low, or begins lower."""
    for (before, worse), (after, better) in pairwise(curve):
        if worse >= distance > better or distance == better:
            share = (math.log(worse) - math.log(distance)) / max(math.log(worse) - math.log(better), 1e-12)
            return math.exp(math.log(before) + share * (math.log(after) - math.log(before)))
    return None


def images_at_most(distance: float, curve: Curve) -> float | None:
    """As `images_to`, but the first images of a curve that begins lower."""
    first_images, first_distance = curve[0]
    return first_images if first_distance < distance else images_to(distance, curve)


def summarize(rows: list[dict]) -> list[dict]:
    """A row for each run, steps and images at which both the run and random pairs were measured from equal seeds:

    distance, random  means over the `seeds` with which both have come so far
    spread, random_spread   standard deviations over seeds, None for one
    of_random         distance / random
    images_random     that random pairs need for the run's distance, and `saved`, 1 − images / images_random; None where
                      they never come to it. least_saved, most_saved: over all pairs of seeds, None unless each has one
    images_ours       that the run needs for the distance of random pairs, and ratio, images / images_ours, with its
                      least and most. If it was lower at its first mark: that mark, and at_least, as the ratio may be
                      larger
    """
    summary = []
    for name, run in RUNS.items():
        if name == base_of(run):
            continue
        for steps in sorted({row["steps"] for row in rows if row["run"] == name}):
            own, base = curves(rows, name, steps), curves(rows, base_of(run), steps)
            for images in sorted({row["images"] for row in rows}):
                seeds = sorted(seeds_at(images, own) & seeds_at(images, base))
                if seeds:
                    pair = ({seed: by_seed[seed] for seed in seeds} for by_seed in (own, base))
                    summary.append({"run": name, "steps": steps, "images": images, **compare(*pair, images)})
    return summary


def seeds_at(images: int, by_seed: dict[int, Curve]) -> set[int]:
    """The seeds that were measured after so many images."""
    return {seed for seed, curve in by_seed.items() if images in dict(curve)}


def base_of(run: Run) -> str:
    """The run that this one is compared with: random pairs, with the same flow and batch."""
    kind = {key: run.settings.get(key) for key in ("flow", "batch")}
    return next(other.name for other in RUNS.values() if other.settings.get("method") == "random" and
                kind == {key: other.settings.get(key) for key in kind})


def compare(own: dict[int, Curve], base: dict[int, Curve], images: int) -> dict:
    """The columns of `summarize`, from the curves of equal seeds."""
    distances, base_distances = ([dict(curve)[images] for curve in by_seed.values()] for by_seed in (own, base))
    distance, base_distance = statistics.fmean(distances), statistics.fmean(base_distances)
    needed = images_to(distance, mean_curve(base))
    least, most = range_of(images_to(goal, curve) for goal in distances for curve in base.values())
    needs = images_at_most(base_distance, mean_curve(own))
    quick, slow = range_of(images_at_most(goal, curve) for goal in base_distances for curve in own.values())
    return {"distance": round(distance, 3), "random": round(base_distance, 3), "seeds": len(distances),
            "spread": spread_of(distances), "random_spread": spread_of(base_distances),
            "of_random": round(distance / base_distance, 4),
            "images_random": needed and round(needed), "saved": needed and round(1 - images / needed, 3),
            "least_saved": least and round(1 - images / least, 3), "most_saved": most and round(1 - images / most, 3),
            "images_ours": needs and round(needs), "ratio": needs and round(images / needs, 3),
            "least_ratio": slow and round(images / slow, 3), "most_ratio": quick and round(images / quick, 3),
            "at_least": mean_curve(own)[0][1] < base_distance if needs else None}


def range_of(numbers: Iterable[float | None]) -> tuple[float | None, float | None]:
    """The least and most over pairs of seeds; None unless each pair has a number, or there would be half a range."""
    numbers = list(numbers)
    return (None, None) if None in numbers else (min(numbers), max(numbers))


def spread_of(distances: list[float]) -> float | None:
    return round(mean_and_std(distances)["std"], 3) if len(distances) > 1 else None
