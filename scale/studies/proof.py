"""Does matching pay, when, and by how much? Trainings that are equal in all but their pairs.

A run is the recipe "proof" with the settings that its name stands for, and a seed. Its evaluations go into one table,
distances.csv, as soon as the call that trains it ends. What is in the table is not measured again, so calls add up,
whatever ends them, and several calls share the runs, one on each GPU. How fast each run trains is measured apart, on a
device that has nothing else to do (speed.csv). `proof_summary` and `proof_figures` show what the tables mean.
"""

import csv
import gc
import json
import math
import statistics
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from dansm import BadInput

from ..base.files import make_folder, read_csv, write_csv
from ..base.locks import InUse, alone, owning
from ..base.machine import hardware
from ..base.text import console, counted, say, say_files
from ..data.pixels import from_uint8
from ..evaluate.extractors import load_extractor
from ..evaluate.real import check_real, digest_of_images
from ..model.recipe import Recipe
from ..train import run as training
from .prior import ON_A_GPU, WAYS, prior
from .proof_plan import RANDOM, RUNS, Run, command_of, recipe_of, runs_left, timed
from .proof_summary import summarize

PRIOR = 10_000  # the largest pool whose noises are tested
TABLES = {  # name → the columns that tell rows apart, and the types of columns that are no text
    "distances.csv": (("run", "seed", "images", "steps"), {"seed": int, "images": int, "seconds": float, "steps": int,
                                                           "distance": float, "real": float}),
    "speed.csv": (("run", "gpu"), {"images_per_second": float, "matching": float}),
    "prior.csv": (("way", "data"), {"noises": int})}


def read(out: Path, name: str = "distances.csv") -> list[dict]:
    """The rows of a table. BadInput for a damaged table."""
    keys, types = TABLES[name]
    rows = {}
    try:
        for line in read_csv(out / name):
            if None in line or None in line.values():
                raise ValueError(f"{line} has not as many values as there are columns")
            row = line | {column: kind(line[column]) for column, kind in types.items()}
            if not all(0 <= row[column] < math.inf for column in types):
                raise ValueError(f"{line} has a number that is negative or not finite")
            if row.get("run", RANDOM) not in RUNS:
                raise ValueError(f"it holds a run {row['run']!r}, expected one of {', '.join(RUNS)}")
            key = tuple(row[column] for column in keys)
            if key in rows:
                raise ValueError(f"it has two rows of {', '.join(map(str, key))}")
            rows[key] = row
    except (KeyError, ValueError, OSError, csv.Error) as error:
        raise BadInput(f"{out / name} cannot be read ({error}): expected what dansm proof wrote, or another --out"
                       ) from error
    return list(rows.values())


def check_same(rows: list[dict], out: Path, **now: str) -> None:
    """BadInput for a table with other features or other images."""
    for name, value in now.items():
        if other := [row.get(name) for row in rows if row.get(name) != value]:
            raise BadInput(f"the {name} of the tables in {out} is {other[0]}, of this call {value}: expected the same, "
                           "or another --out")


def in_order(rows: Iterable[dict], *keys: str) -> list[dict]:
    """Sorted by run as in RUNS, then by `keys`. The last of rows with equal keys counts."""
    order = list(RUNS)
    rows = {(order.index(row["run"]), *(row[key] for key in keys)): row for row in rows}
    return [rows[key] for key in sorted(rows)]


def add(new: list[dict], out: Path) -> None:
    """Put the evaluations of a run of one seed into the table, to which other calls may have added."""
    with alone(out / ".lock"):
        rows = read(out)
        if new:  # another call may have written the first row since this one began
            check_same(rows, out, features=new[0]["features"], data=new[0]["data"])
            write_csv(out / "distances.csv", joined(rows, new))


def joined(rows: list[dict], new: list[dict]) -> list[dict]:
    """`rows` with all evaluations so far of a run of one seed.

    Evaluations that are known keep their row, which names the GPU. A run that was trained again, as its checkpoints
    were lost, takes the place of the old one once it has come as far: a curve of two trainings is none.
    """
    old = [row for row in rows if (row["run"], row["seed"]) == (new[0]["run"], new[0]["seed"])]
    if len(new) < len(old):
        return rows
    known = {(row["images"], row["steps"], row["distance"]): row for row in old}
    new = [known.get((row["images"], row["steps"], row["distance"]), row) for row in new]
    return in_order([*(row for row in rows if row not in old), *new], "seed", "images", "steps")


def rows_of(run: Run, seed: int, log: Path, **more: str) -> list[dict]:
    """A row for each evaluation in a run's metrics.jsonl."""
    rows = []
    for line in map(json.loads, log.read_text().splitlines()):
        for name, value in line.items():
            kind, _, steps = name.partition("/")
            if kind in ("frechet_distance", "fid") and steps.isdecimal():
                rows.append(dict(run=run.name, seed=seed, images=line["images"], seconds=line["seconds"],
                                 steps=int(steps), distance=value, real=line[f"{kind}/real"], **more))
    return rows


def speed_of(run: Run, log: Path, gpu: str) -> dict:
    """How fast a training was: means over the lines of its log without the first two, in which it warms up. `matching`
    is a share of the time; `distance` that of the pairs, `distance_random` of random ones."""
    lines = [line for line in map(json.loads, log.read_text().splitlines()) if "loss" in line][2:]
    rates = [line["images_per_second"] for line in lines]
    means = {name: round(statistics.fmean(line[name] for line in lines), 4)
             for name in ("matching", "distance", "distance_random")}
    return dict(run=run.name, images_per_second=round(statistics.harmonic_mean(rates), 1), least=min(rates),
                most=max(rates), **means, gpu=gpu)


@dataclass
class Call:
    """What all parts of one call share.

    out       folder of the tables and figures
    work      folder of the runs themselves, with their checkpoints: the next call resumes what this one did not finish
    settings  of every run, such as the features
    """

    data: str
    out: Path
    work: Path
    device: torch.device
    settings: dict
    images: Tensor | np.ndarray | None = None
    images_name: str = ""

    @property
    def gpu(self) -> str:
        return hardware(self.device)["gpu"] or "CPU"

    def recipe(self, run: Run, seed: int = 0, **more) -> Recipe:
        return recipe_of(run, seed, self.data, **self.settings, **more)

    def read_images(self) -> None:
        """Read the images. The name is how the tables call them."""
        self.images, _ = training.read_data(self.recipe(RUNS[RANDOM]))
        check_real(self.images)
        self.images_name = f"{len(self.images):,} images, {digest_of_images(np.asarray(self.images))[:8]}"


def prove(call: Call, names: list[str], minutes: float) -> None:
    """Measure what is missing in the tables, for at most `minutes` if not 0; then summarize and draw.

    names  of runs, and "prior" and "rates"
    """
    end = time.monotonic() + 60 * minutes if minutes else math.inf
    out, features = call.out, call.settings["evaluate_features"]
    rows, runs = read(out), [name for name in names if name in RUNS]
    read(out, "speed.csv")  # a damaged table must be refused before hours of work
    read(out, "prior.csv")
    check_same(rows, out, features=features)
    left = runs_left(runs, rows)
    tests_prior = names == ["prior"] or ("prior" in names and not minutes)
    if left:
        weights = call.settings["inception_weights"]
        load_extractor(features, call.device, Path(weights) if weights else None, "--features")
    if left or tests_prior or "rates" in names:
        call.read_images()
        check_same(rows, out, data=call.images_name)
    if names == ["prior"] and len(call.images) < PRIOR:
        raise BadInput(f"--only is prior, and there are {len(call.images):,} images: expected at least {PRIOR:,}")
    say(f"{counted(len(left), 'run')} of {sum(RUNS[name].seeds for name in runs)} to go")
    if left:
        commands = [command_of(run, seed, call.data, **call.settings) for run, seed in runs_left(list(RUNS), [])]
        with alone(out / ".lock"):
            (out / "commands.txt").write_text("".join(f"{command}\n" for command in commands))
    stopped = train_all(call, left, end) or ("rates" in names and measure_rates(call))
    with alone(out / ".lock"):
        rows = read(out)
        if rows:
            finish(rows, read(out, "speed.csv"), out)
    if left:
        remaining = len(runs_left(runs, rows))
        say(f"{counted(remaining, 'run')} to go: the same command resumes" if remaining else "all runs are done")
    if tests_prior and not stopped:
        with alone(out / ".prior.lock"):  # a call that waits here finds what this one has measured
            test_prior(call)


def train_all(call: Call, left: list[tuple[Run, int]], end: float) -> bool:
    """Train these runs one after the other, but not those of other calls, until time.monotonic() is `end`. Returns
    whether Ctrl-C or SIGTERM ended it."""
    for run, seed in left:
        minutes = (end - time.monotonic()) / 60
        if minutes <= 0:
            break
        folder = make_folder(call.work / f"{run.name}-{seed}", "--work")
        recipe = call.recipe(run, seed, minutes=0.0 if end == math.inf else minutes)
        try:
            with owning(folder):
                if (run, seed) not in runs_left([run.name], read(call.out)):
                    continue  # another call has ended it
                say(f"{run.name}, seed {seed}: {command_of(run, seed, call.data, **call.settings)}")
                summary = fit(call, recipe, folder)
                add(rows_of(run, seed, folder / "metrics.jsonl", features=recipe.evaluate_features,
                            data=call.images_name, gpu=call.gpu), call.out)
        except InUse as other:
            say(f"{run.name}, seed {seed}, is left to another call: {other}")
            continue
        if summary["stopped_early"]:
            return True
    return False


def fit(call: Call, recipe: Recipe, folder: Path) -> dict:
    summary, *_ = training.fit(call.images, recipe, out=folder, fresh=False, device=call.device)
    gc.collect()  # a run's graphs hold memory
    if call.device.type == "cuda":
        torch.cuda.empty_cache()
    return summary


def measure_rates(call: Call) -> bool:
    """Measure how fast each run trains that has no rate on this kind of device yet, in trainings of their own. Returns
    whether Ctrl-C or SIGTERM ended it."""
    say("rates are measured: nothing else may run on this device meanwhile")
    make_folder(call.work, "--work")
    for run in RUNS.values():
        if (run.name, call.gpu) in {(row["run"], row["gpu"]) for row in read(call.out, "speed.csv")}:
            continue
        say(f"{run.name}: how fast it trains")
        with tempfile.TemporaryDirectory(dir=call.work, prefix="rate-") as folder:
            summary = fit(call, timed(call.recipe(run)), Path(folder))
            if summary["interrupted"]:
                return True
            speed = speed_of(run, Path(folder) / "metrics.jsonl", call.gpu)
        with alone(call.out / ".lock"):
            write_csv(call.out / "speed.csv", in_order([*read(call.out, "speed.csv"), speed], "gpu"))
    return False


def test_prior(call: Call) -> None:
    """Test the prior of the ways of pairing that are not in prior.csv yet, on as many images as fill whole pools."""
    count = len(call.images) // PRIOR * PRIOR
    if not count:
        say(f"the prior is not tested: that takes {PRIOR:,} images, and there are {len(call.images):,}")
        return
    rows = read(call.out, "prior.csv")
    check_same(rows, call.out, data=call.images_name)
    known = [row["way"] for row in rows]
    ways = [way for way in WAYS + (ON_A_GPU if call.device.type == "cuda" else []) if way.name not in known]
    if not ways:
        return
    some = np.random.default_rng(0).permutation(len(call.images))[:count]
    images = from_uint8(torch.from_numpy(np.asarray(call.images)[some]).to(call.device))
    for row in track(prior(images, ways), "testing the prior", total=len(ways), console=console):
        rows.append({**row, "data": call.images_name})
        write_csv(call.out / "prior.csv", rows)
    say_files(call.out, "prior.csv")


def finish(rows: list[dict], speeds: list[dict], out: Path) -> None:
    """Write the summary and the figures."""
    from .proof_figures import draw  # matplotlib takes a while to import

    if summary := summarize(rows):  # empty before two runs can be compared
        write_csv(out / "summary.csv", summary)
    tables = [name for name in ("distances.csv", "speed.csv", "summary.csv", "commands.txt") if (out / name).exists()]
    say_files(out, *tables, *draw(rows, speeds, out))
