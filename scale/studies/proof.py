"""The proof: does matching pay, when, and by how much? Runs that are equal in all but their pairs.

A run is the recipe "proof" with the settings that its name stands for, and a seed. What its evaluations say goes into
one table, distances.csv, as soon as it is there; what is there is not measured again, so that calls add up, whatever
ends them, and share the work where several are under way, one on each GPU. How fast each trains is measured apart, all
on one device with nothing beside it (speed.csv). `summarize` and `scale.proof_figures` make of the tables what a reader
wants to know.
"""

from __future__ import annotations

import csv
import dataclasses
import gc
import json
import math
import os
import shlex
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

import dansm

from ..base.files import make_folder, write_csv
from ..base.locks import InUse, alone, owning, share
from ..base.locks import try_alone as take_alone
from ..base.machine import hardware
from ..base.text import console, counted, say, say_files
from ..commands import train
from ..data.pixels import from_uint8
from ..evaluate.evaluate import check_real, digest_of_images, load_extractor
from ..model.recipe import Recipe, load, shown
from ..train import fit as trainer
from .prior import ON_A_GPU, WAYS, count_of_noises, prior

LONG, MIDDLE, SHORT = 5_120_000, 2_048_000, 1_024_000  # images
MARKS = (256_000, 512_000, SHORT, MIDDLE, 3_584_000, LONG)  # images after which a run is evaluated
FEW = 128_000, 256_000, 512_000  # those with batches of 1 and of 8, whose steps take nearly as long as one of 256
OWN = "seed", "steps", "evaluate_at", "log_steps"  # what `recipe_of` sets for each run
PRIOR = 10_000  # the largest pool whose noises are tested
RATE_STEPS = 500  # at least, that count of a training that is to tell how fast it is
FIELDS = ("run", "seed", "images", "seconds", "steps", "distance", "real", "features", "data", "gpu")


class Run(NamedTuple):
    """What is compared: the settings in which it departs from the recipe, how many images it sees, and how often it is
    trained from another seed."""

    name: str
    settings: dict
    images: int
    seeds: int
    label: str  # as figures call it


OFF, MATCHED = "off", "greedy-10000"
DIFFUSION = dict(flow="diffusion", target="velocity")  # one that says the noise needs far more images than fit here
RUNS = {run.name: run for run in [
    Run(OFF, dict(method="random"), LONG, 3, "random pairs"),
    Run(MATCHED, dict(), LONG, 3, "pool of 10,000"),
    Run("greedy-1000", dict(match_size=1000), MIDDLE, 1, "pool of 1,000"),
    Run("greedy-100000", dict(match_size=100_000), MIDDLE, 3, "pool of 100,000"),
    Run("greedy-1000000", dict(match_size=1_000_000, pool="bf16"), MIDDLE, 1, "pool of 1,000,000"),
    Run("assigned-256", dict(method="optimal", match_size=256), MIDDLE, 1, "assignment within batches of 256"),
    Run("nearest-16", dict(method="nearest", match_size=16), MIDDLE, 1, "nearest of 16"),
    Run("optimal-10000", dict(method="optimal"), MIDDLE, 1, "assignment over 10,000"),
    Run("diffusion-off", dict(DIFFUSION, method="random"), MIDDLE, 2, "diffusion, random pairs"),
    Run("diffusion-greedy-10000", DIFFUSION, MIDDLE, 2, "diffusion, pool of 10,000"),
    Run("inner-10000", dict(cost="inner"), SHORT, 3, "pool of 10,000, inner product"),
    Run("inner-100000", dict(cost="inner", match_size=100_000), SHORT, 3, "pool of 100,000, inner product"),
    Run("batch8-off", dict(batch=8, lr=1e-4, method="random"), FEW[2], 1, "batch 8, random pairs"),
    Run("batch8-assigned", dict(batch=8, lr=1e-4, method="optimal", match_size=8), FEW[2], 1,
        "batch 8, assignment within batches"),
    Run("batch8-greedy-10000", dict(batch=8, lr=1e-4), FEW[2], 1, "batch 8, pool of 10,000"),
    Run("batch1-off", dict(batch=1, lr=4e-5, method="random"), FEW[0], 1, "batch 1, random pairs"),
    Run("batch1-greedy-10000", dict(batch=1, lr=4e-5), FEW[0], 1, "batch 1, pool of 10,000"),
]}


def recipe_of(run: Run, seed: int, data: str, **more) -> Recipe:
    """All settings of a run: it ends after its images, and is evaluated at the MARKS up to there, and at its end."""
    batch = run.settings.get("batch", load("proof").batch)
    marks = [images // batch for images in (MARKS if run.images > FEW[-1] else FEW) if images <= run.images]
    steps = run.images // batch
    return load("proof", {**run.settings, "data": data, "seed": seed, "steps": steps,
                          "evaluate_at": sorted({*marks, steps}), "log_steps": max(50, steps // 100), **more})


def command_of(run: Run, seed: int, data: str = "cifar10", **more) -> str:
    """The command that makes this run by itself."""
    recipe, usual = recipe_of(run, seed, data, **more), load("proof")
    given = {name: getattr(recipe, name) for name in (*run.settings, *more, *OWN)}
    words = [f"--{name.replace('_', '-')} {shlex.quote(shown(value))}" for name, value in given.items()
             if value != getattr(usual, name)]
    return " ".join(["dansm train proof", *([f"--data {shlex.quote(data)}"] if data != "cifar10" else []), *words])


def todo(names: list[str], rows: list[dict]) -> Iterator[tuple[Run, int]]:
    """Of these runs those that are not measured to their end, the first seed of each before the second."""
    ended = {(row["run"], row["seed"]) for row in rows if row["images"] >= RUNS[row["run"]].images}
    for seed in range(max((RUNS[name].seeds for name in names), default=0)):
        yield from ((RUNS[name], seed) for name in names if seed < RUNS[name].seeds and (name, seed) not in ended)


# ---------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------


def read_rows(path: Path) -> list[dict]:
    """What was measured so far."""
    kinds = dict(seed=int, images=int, seconds=float, steps=int, distance=float, real=float)
    rows = read_table(path, "run", "seed", "images", "steps", **dict.fromkeys(FIELDS, str) | kinds)
    strange = [row["run"] for row in rows if row["run"] not in RUNS]
    if strange:
        raise dansm.BadInput(f"{path} holds a run {strange[0]!r}: expected one of {', '.join(RUNS)}, or another --out")
    return rows


def read_speeds(path: Path) -> list[dict]:
    return read_table(path, "run", "gpu", run=str, images_per_second=float, matching=float, gpu=str)


def read_prior(path: Path) -> list[dict]:
    return read_table(path, "way", way=str, noises=int, data=str)


def read_table(path: Path, *keys: str, **kinds: type) -> list[dict]:
    """The rows, the columns of `kinds` as that; none where there is no file. BadInput for what is no such table: lines
    cut off or two of equal `keys`, and numbers that nothing measured can be."""
    if not path.exists():
        return []
    try:
        with open(path, newline="") as file:
            lines = csv.DictReader(file, strict=True)
            if missing := [name for name in kinds if name not in (lines.fieldnames or ())]:
                raise ValueError(f"it has no column {missing[0]}")
            rows = [_row(line, number, kinds) for number, line in enumerate(lines, 2)]
        seen = [tuple(row[key] for key in keys) for row in rows if keys]
        if twice := next((each for each in seen if seen.count(each) > 1), None):
            raise ValueError(f"it has two rows of {', '.join(map(str, twice))}")
        return rows
    except (ValueError, TypeError, OSError, csv.Error) as error:
        raise dansm.BadInput(f"{path} cannot be read ({error}): expected what dansm proof wrote, or another --out"
                             ) from error


def _row(line: dict, number: int, kinds: dict[str, type]) -> dict:
    if None in line or None in line.values() or any("\n" in value for value in line.values()):
        raise ValueError(f"line {number} has not as many values as there are columns")
    row = line | {name: kind(line[name]) for name, kind in kinds.items()}
    least = {"seed": 0, "seconds": 0, "matching": 0}
    for name, kind in kinds.items():
        if kind is not str and not (math.isfinite(row[name]) and (row[name] > 0 or row[name] == least.get(name))):
            raise ValueError(f"line {number} has {name} {line[name]}")
    return row


def rows_of(run: Run, seed: int, log: Path, gpu: str, features: str) -> list[dict]:
    """What the evaluations in a run's metrics.jsonl say."""
    rows = []
    for line in map(json.loads, log.read_text().splitlines()):
        for name, value in line.items():
            kind, _, steps = name.partition("/")
            if kind in ("frechet_distance", "fid") and steps.isdecimal():
                rows.append(dict(run=run.name, seed=seed, images=line["images"], seconds=line["seconds"],
                                 steps=int(steps), distance=value, real=line[f"{kind}/real"], features=features,
                                 gpu=gpu))
    return rows


def speed_of(run: Run, log: Path, gpu: str) -> dict:
    """How fast a training was: means over the lines of its log, but for two, in which it warms up; `least` and `most`
    of a line. `matching`: its share of the time; `distance`: of the pairs, and of unmatched ones beside it."""
    lines = [line for line in map(json.loads, log.read_text().splitlines()) if "loss" in line][2:]
    rates = [line["images_per_second"] for line in lines]
    means = {name: round(statistics.fmean(line[name] for line in lines), 4)
             for name in ("matching", "distance", "distance_unmatched")}
    return dict(run=run.name, images_per_second=round(statistics.harmonic_mean(rates), 1), least=min(rates),
                most=max(rates), **means, gpu=gpu)


def merged(rows: list[dict], new: list[dict], *keys: str) -> list[dict]:
    """`rows` with those of `new` in the place of any of equal keys, in the order of RUNS."""
    by_key = {tuple(row[key] for key in keys): row for row in [*rows, *new]}
    order = list(RUNS)
    return sorted(by_key.values(), key=lambda row: (order.index(row["run"]), *(row[key] for key in keys[1:])))


def taken_in(rows: list[dict], new: list[dict]) -> list[dict]:
    """`rows` with all that a run of one seed has told so far. What was told before stays as it is, on whichever card;
    other distances are those of a training begun anew, as its checkpoints were lost: the one that came farther counts,
    of two that came as far the later. It counts whole, as a curve of two trainings is none."""
    ours = [row for row in rows if new and (row["run"], row["seed"]) == (new[0]["run"], new[0]["seed"])]
    if len(new) < len(ours):
        return rows
    before = {(row["images"], row["steps"], row["distance"]): row for row in ours}
    new = [before.get((row["images"], row["steps"], row["distance"]), row) for row in new]
    return merged([row for row in rows if row not in ours], new, "run", "seed", "images", "steps")


# ---------------------------------------------------------------------------------------------------
# The runs
# ---------------------------------------------------------------------------------------------------


def prove(data: str, out: Path, work: Path, device: torch.device, *, names: list[str], minutes: float,
          cache: Path | None, more: dict) -> None:
    """Train and evaluate what is not in the table yet, for `minutes` at most if not 0; then summarize and draw.

    out    gets distances.csv, speed.csv, prior.csv, commands.txt, summary.csv and the figures
    work   the folder of the runs themselves, their checkpoints among them: what a call did not finish goes on there
    more   settings of every run: the features that distances are taken of
    """
    begin, more = time.monotonic(), {**more, "cache": str(cache or "")}
    rows, runs = read_rows(out / "distances.csv"), [name for name in names if name in RUNS]
    read_speeds(out / "speed.csv"), read_prior(out / "prior.csv")  # a damaged one is to be told before hours of work
    check_same(rows, out / "distances.csv", features=more["evaluate_features"])  # before anything is read or made
    waiting = list(todo(runs, rows))
    tests_prior, times = (name in names and (not minutes or names == [name]) for name in ("prior", "rates"))
    if waiting:
        weights = more.get("inception_weights")
        load_extractor(more["evaluate_features"], device, Path(weights) if weights else None, "--features")
    images, which = None, ""
    if waiting or tests_prior or times:
        images, _ = train.read(recipe_of(RUNS[OFF], 0, data, **more))
        check_real(images)
        if names == ["prior"] and len(images) < PRIOR:
            raise dansm.BadInput(f"--only is prior, which is tested on {PRIOR:,} images or more, and there are "
                                 f"{len(images):,}: expected more")
        which = f"{len(images):,} images, {digest_of_images(np.asarray(images))[:8]}"
        check_same(rows, out / "distances.csv", data=which)
    say(f"{counted(len(waiting), 'run')} of {sum(RUNS[name].seeds for name in runs)} to go")
    if waiting:
        commands = [command_of(run, seed, data, **more) for run, seed in todo(list(RUNS), [])]
        with alone(out / ".lock"):
            (out / "commands.txt").write_text("".join(f"{each}\n" for each in commands))
    stopped = train_all(waiting, images, data, which, out, work, device, minutes=minutes, begin=begin, more=more)
    if times and not stopped:
        stopped = measure_rates(images, data, out, work, device, more)
    with alone(out / ".lock"):
        rows = read_rows(out / "distances.csv")
        if rows or times:
            finish(rows, read_speeds(out / "speed.csv"), out)
    if waiting:
        left = len(list(todo(runs, rows)))
        say("all runs are done" if not left else f"{counted(left, 'run')} to go: the same command goes on")
    if tests_prior and not stopped:
        with alone(out / ".prior.lock"):  # another call finds there what this one has measured
            test_prior(images, which, out, device)


def train_all(waiting: list[tuple[Run, int]], images, data: str, which: str, out: Path, work: Path, device, *,
              minutes: float, begin: float, more: dict) -> bool:
    """Those runs, one after the other, but for what other calls do. `which` images, as the table calls them. Returns
    whether Ctrl-C or SIGTERM ended it."""
    for run, seed in waiting:
        left = minutes - (time.monotonic() - begin) / 60 if minutes else 0
        if minutes and left <= 0:
            break
        with turn(run, seed, out, work) as ours:
            if not ours:
                continue
            recipe = recipe_of(run, seed, data, minutes=left, **more)
            say(f"{run.name}, seed {seed}: {command_of(run, seed, data, **more)}")
            with visit(device, out):
                new, stopped = one_run(run, seed, images, recipe, work, device)
            add([{**row, "data": which} for row in new], out)
        if stopped:
            return True
    return False


def check_same(rows: list[dict], table: Path, **now: str) -> None:
    """BadInput for a table of other features, or of other images."""
    for name, value in now.items():
        if other := next((row[name] for row in rows if row[name] != value), None):
            raise dansm.BadInput(f"{table} is of {name} {other}, this call of {value}: expected the same, or another "
                                 "--out")


@contextmanager
def turn(run: Run, seed: int, out: Path, work: Path) -> Iterator[bool]:
    """Whether the run is left to this call, and to no other meanwhile: calls side by side take what the others have not
    begun, and leave what they have ended."""
    with ExitStack() as held:
        try:
            held.enter_context(owning(folder_of(run, seed, work)))
            ours = (run, seed) in todo([run.name], read_rows(out / "distances.csv"))
        except InUse as other:
            say(f"{run.name}, seed {seed}, is another call's: {other}")
            ours = False
        yield ours


@contextmanager
def visit(device: torch.device, out: Path) -> Iterator[Callable[[], bool]]:
    """Yields what tells whether no other call into `out` has trained on this device meanwhile: that of half a GPU is no
    rate. A visitor has the file to himself if he is the first, and leaves a byte in it."""
    name = torch.cuda.get_device_properties(device).uuid if device.type == "cuda" else device.type
    with open(out / f".{name}.lock", "ab", buffering=0) as visitors:
        first = take_alone(visitors)
        visitors.write(b".")
        count = visitors.tell()
        share(visitors)
        yield lambda: first and os.fstat(visitors.fileno()).st_size == count


def folder_of(run: Run, seed: int, work: Path) -> Path:
    return make_folder(work / f"{run.name}-{seed}", "--work")


def one_run(run: Run, seed: int, images, recipe: Recipe, work: Path, device) -> tuple[list[dict], bool]:
    """Train it as far as the recipe's minutes go. Returns what its evaluations say, and whether Ctrl-C or SIGTERM ended
    it."""
    folder, gpu = folder_of(run, seed, work), hardware(device)["gpu"] or "CPU"
    summary = fit(images, recipe, folder, device)
    return rows_of(run, seed, folder / "metrics.jsonl", gpu, recipe.evaluate_features), summary["stopped_early"]


def fit(images, recipe: Recipe, folder: Path, device) -> dict:
    summary, *_ = trainer.fit(images, recipe, out=folder, fresh=False, device=device, console=console)
    gc.collect()  # a run's graphs hold memory
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return summary


def add(new: list[dict], out: Path) -> None:
    """Into the table, to which a call beside this one may have added meanwhile."""
    with alone(out / ".lock"):
        rows = read_rows(out / "distances.csv")
        if new:  # as when this call began: another may have written the first row
            check_same(rows, out / "distances.csv", features=new[0]["features"], data=new[0]["data"])
        if rows := taken_in(rows, new):
            write_csv(out / "distances.csv", rows)


def measure_rates(images, data: str, out: Path, work: Path, device, more: dict) -> bool:
    """How fast each run trains on this device, of those that speed.csv does not have of it: trainings of their own that
    nothing is kept of. One of another call on the same device meanwhile makes it half a device: then there is no row.
    Returns whether Ctrl-C or SIGTERM ended it."""
    gpu, table = hardware(device)["gpu"] or "CPU", out / "speed.csv"
    for run in RUNS.values():
        if (run.name, gpu) in {(row["run"], row["gpu"]) for row in read_speeds(table)}:
            continue
        say(f"{run.name}: how fast it trains")
        make_folder(work, "--work")
        with visit(device, out) as alone_there, tempfile.TemporaryDirectory(dir=work, prefix="rate-") as folder:
            if not alone_there():
                say(f"{run.name} has no rate, nor has what follows: another call trains on the same device")
                return False
            summary = fit(images, timed_recipe(run, data, **more), Path(folder), device)
            if summary["interrupted"]:
                return True
            speed = speed_of(run, Path(folder) / "metrics.jsonl", gpu)
            if not alone_there():
                say(f"{run.name} has no rate: another call trained on the same device")
                continue
        with alone(out / ".lock"):
            write_csv(table, merged(read_speeds(table), [speed], "run", "gpu"))
    return False


def timed_recipe(run: Run, data: str, **more) -> Recipe:
    """A run as it is timed: not evaluated, twelve lines of its log, of which ten count: over whole lives of its pool,
    which costs more while it is full."""
    recipe = recipe_of(run, 0, data, **more)
    pool = recipe.match_size if recipe.method in ("greedy", "optimal") else 0
    life = max(1, math.ceil(pool / recipe.batch))  # steps
    line = math.ceil(life * math.ceil(RATE_STEPS / life) / 10)
    return dataclasses.replace(recipe, steps=12 * line, evaluate_at=(), log_steps=line)


def test_prior(images, which: str, out: Path, device) -> None:
    """The prior of each way of pairing, on as many of the images, in random order, as fill whole pools; of those that
    are not in prior.csv yet."""
    table, count = out / "prior.csv", len(images) // PRIOR * PRIOR
    if not count:
        say(f"the prior is not tested: that takes {PRIOR:,} images, there are {len(images):,}")
        return
    rows, names = read_prior(table), [way.name for way in WAYS + ON_A_GPU]
    check_same(rows, table, data=which)
    there = {row["way"] for row in rows}
    ways = [way for way in WAYS + (ON_A_GPU if device.type == "cuda" else []) if way.name not in there]
    if not ways:
        return
    some = np.random.default_rng(0).permutation(len(images))[:count]
    images = from_uint8(torch.from_numpy(np.asarray(images)[some]).to(device))
    with Progress(TextColumn("the prior of {task.description}"), BarColumn(), TimeRemainingColumn(),
                  console=console) as bar:
        task = bar.add_task(ways[0].name, total=sum(count_of_noises(images, way) for way in ways))
        for way in ways:
            bar.update(task, description=way.name)
            row, = prior(images, [way], advance=lambda count: bar.advance(task, count))
            rows.append({**row, "data": which})
            rows.sort(key=lambda row: names.index(row["way"]) if row["way"] in names else len(names))
            write_csv(table, rows)
    say_files(out, table.name)


def finish(rows: list[dict], speeds: list[dict], out: Path) -> None:
    from .proof_figures import draw

    if found := summarize(rows):  # nothing before two runs can be compared
        write_csv(out / "summary.csv", found)
    tables = [name for name in ("distances.csv", "speed.csv", "summary.csv", "commands.txt") if (out / name).exists()]
    say_files(out, *tables, *draw(rows, speeds, out))


# ---------------------------------------------------------------------------------------------------
# What it says
# ---------------------------------------------------------------------------------------------------


def curves(rows: list[dict], name: str, steps: int) -> dict[int, list[tuple[int, float]]]:
    """Of each seed of a run, in that many steps: (images, distance) in the order of images."""
    found = {}
    for row in sorted(rows, key=lambda row: row["images"]):
        if (row["run"], row["steps"]) == (name, steps):
            found.setdefault(row["seed"], []).append((row["images"], row["distance"]))
    return found


def mean_curve(found: dict[int, list[tuple[int, float]]]) -> list[tuple[int, float]]:
    """The mean over seeds, at the images that all have."""
    by_seed = [dict(points) for points in found.values()]
    shared = set.intersection(*map(set, by_seed)) if by_seed else set()
    return [(images, statistics.fmean(points[images] for points in by_seed)) for images in sorted(shared)]


def images_to(distance: float, found: list[tuple[int, float]]) -> float | None:
    """How many images it takes to come to that distance, by straight lines between the logarithms of a curve's points;
    None where it does not come so far, or was nearer at its first point."""
    for (before, worse), (after, better) in pairwise(found):
        if worse >= distance > better or distance == better:
            share = (math.log(worse) - math.log(distance)) / max(math.log(worse) - math.log(better), 1e-12)
            return math.exp(math.log(before) + share * (math.log(after) - math.log(before)))
    return None


def summarize(rows: list[dict]) -> list[dict]:
    """A row for each run, steps and images at which both it and off (of its own kind) were measured from equal seeds:

    distance, off     means over the `seeds` that both have come so far with
    spread, off_spread   standard deviations over seeds, None of one
    of_off            distance / off
    images_off        that off needs for the run's distance, and `saved`, 1 − images / images_off; None where off does
                      not come to it in its run. least_saved and most_saved: of all pairs of seeds, None unless each
                      pair has one
    images_ours       that the run needs for off's distance, and ratio, images / images_ours, with its least and most.
                      Where it was nearer at its first mark already, that mark, and at_least: the ratio may be larger
    """
    found = []
    for name, run in RUNS.items():
        if name == base_of(run):
            continue
        for steps in sorted({row["steps"] for row in rows if row["run"] == name}):
            ours, off = curves(rows, name, steps), curves(rows, base_of(run), steps)
            for images in sorted({row["images"] for row in rows}):
                seeds = reached(ours, images) & reached(off, images)
                if seeds:
                    pair = ({seed: all_of_them[seed] for seed in sorted(seeds)} for all_of_them in (ours, off))
                    found.append({"run": name, "steps": steps, "images": images, **_compared(*pair, images)})
    return found


def reached(found: dict[int, list[tuple[int, float]]], images: int) -> set[int]:
    """The seeds that were measured after so many images."""
    return {seed for seed, points in found.items() if images in dict(points)}


def base_of(run: Run) -> str:
    """The run that this one is compared with: of the same flow and batch, with random pairs."""
    kind = {key: run.settings.get(key) for key in ("flow", "batch")}
    return next(other.name for other in RUNS.values() if other.settings.get("method") == "random" and
                kind == {key: other.settings.get(key) for key in kind})


def _compared(ours: dict, off: dict, images: int) -> dict:
    mine, theirs = ([dict(points)[images] for points in found.values()] for found in (ours, off))
    distance, of_off = statistics.fmean(mine), statistics.fmean(theirs)
    needed = images_to(distance, mean_curve(off))
    least, most = _range(images_to(each, points) for each in mine for points in off.values())
    needs = images_or_fewer(of_off, mean_curve(ours))
    quick, slow = _range(images_or_fewer(each, points) for each in theirs for points in ours.values())
    return {"distance": round(distance, 3), "off": round(of_off, 3), "seeds": len(mine),
            "spread": _spread(mine), "off_spread": _spread(theirs), "of_off": round(distance / of_off, 4),
            "images_off": needed and round(needed), "saved": needed and round(1 - images / needed, 3),
            "least_saved": least and round(1 - images / least, 3), "most_saved": most and round(1 - images / most, 3),
            "images_ours": needs and round(needs), "ratio": needs and round(images / needs, 3),
            "least_ratio": slow and round(images / slow, 3), "most_ratio": quick and round(images / quick, 3),
            "at_least": mean_curve(ours)[0][1] < of_off if needs else None}


def images_or_fewer(distance: float, found: list[tuple[int, float]]) -> float | None:
    """As `images_to`, but of a curve that begins nearer than that its first images."""
    return found[0][0] if found[0][1] < distance else images_to(distance, found)


def _range(of_pairs: Iterable[float | None]) -> tuple[float | None, float | None]:
    """Least and most, of pairs of seeds; None unless each pair has a number: there would be half a range."""
    of_pairs = list(of_pairs)
    return (None, None) if None in of_pairs else (min(of_pairs), max(of_pairs))


def _spread(of_seeds: list[float]) -> float | None:
    return round(statistics.stdev(of_seeds), 3) if len(of_seeds) > 1 else None
