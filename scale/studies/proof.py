"""Does matching pay, when, and by how much? Trainings that are equal in all but their pairs. Calls add up: each run's
evaluations go into distances.csv as soon as its training ends, and several calls share the runs, one on each GPU."""

import csv
import gc
import json
import math
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dansm import BadInput

from ..base import files, locks, text
from ..data.pixels import from_uint8
from ..evaluate.real_features import check_real, digest_of_images
from ..model.recipe import Recipe
from ..train import run as training
from .prior import ON_A_GPU, WAYS, prior
from .proof_runs import RANDOM, RUNS, Run, command_of, recipe_of, runs_left, timed

PRIOR = 10_000  # the largest pool whose noises are tested
TABLES = {  # name → types of the columns that are read
    "distances.csv": dict(run=str, seed=int, images=int, seconds=float, steps=int, distance=float, real=float,
                          features=str, data=str),
    "speed.csv": dict(run=str, images_per_second=float, matching=float, gpu=str),
    "prior.csv": dict(way=str, noises=int, data=str)}


def read(out: Path, name: str = "distances.csv") -> list[dict]:
    """The rows of a table. BadInput for a damaged table, and for one with the names of an earlier version."""
    types = TABLES[name].items()
    try:
        rows = [line | {column: kind(line[column]) for column, kind in types} for line in files.read_csv(out / name)]
        if strange := {row["run"] for row in rows if "run" in row} - RUNS.keys():
            raise ValueError(f"it holds a run {min(strange)!r}, expected one of {', '.join(RUNS)}")
    except (KeyError, TypeError, ValueError, OSError, csv.Error) as error:
        raise BadInput(f"{out / name} cannot be read ({error}): expected what dansm proof wrote, or another --out"
                       ) from error
    return rows


def check_same(rows: list[dict], out: Path, **now: str) -> None:
    """BadInput for a table with other features or other images."""
    for name, value in now.items():
        if others := {row[name] for row in rows} - {value}:
            raise BadInput(f"the {name} of the tables in {out} is {min(others)}, of this call {value}: expected the "
                           "same, or another --out")


def add(new: list[dict], out: Path) -> None:
    """Put all evaluations so far of a run of one seed into the table, to which other calls may have added. Those known
    keep their row, which names the GPU. A run trained again, as its checkpoints were lost, replaces the old one once it
    has come as far: a curve of two trainings is none."""
    with locks.alone(out / ".lock"):
        rows = read(out)
        old = [row for row in rows if new and (row["run"], row["seed"]) == (new[0]["run"], new[0]["seed"])]
        if new and len(new) >= len(old):
            check_same(rows, out, features=new[0]["features"], data=new[0]["data"])  # of a call since this one began
            known = {(row["images"], row["steps"], row["distance"]): row for row in old}
            new = [known.get((row["images"], row["steps"], row["distance"]), row) for row in new]
            order = list(RUNS)
            rows = sorted([*(row for row in rows if row not in old), *new], key=lambda row: (
                order.index(row["run"]), row["seed"], row["images"], row["steps"]))
            files.write_csv(out / "distances.csv", rows)


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def rows_of(run: Run, seed: int, folder: Path, **more: str) -> list[dict]:
    """A row for each evaluation in a run's log."""
    rows = []
    for line in lines_of(folder):
        for name, value in line.items():
            kind, _, steps = name.partition("/")
            if kind in ("frechet_distance", "fid") and steps.isdecimal():
                rows.append(dict(run=run.name, seed=seed, images=line["images"], seconds=line["seconds"],
                                 steps=int(steps), distance=value, real=line[f"{kind}/real"], **more))
    return rows


def speed_of(run: Run, folder: Path, gpu: str) -> dict:
    """How fast a training was: means over the lines of its log without the first two, in which it warms up."""
    lines = [line for line in lines_of(folder) if "loss" in line][2:]
    rates = [line["images_per_second"] for line in lines]
    means = {name: round(statistics.fmean(line[name] for line in lines), 4)
             for name in ("matching", "distance", "distance_random")}
    return dict(run=run.name, images_per_second=round(statistics.harmonic_mean(rates), 1), least=min(rates),
                most=max(rates), **means, gpu=gpu)


@dataclass
class Call:
    """What all parts of one call share."""

    data: str
    out: Path  # folder of the tables and figures
    work: Path  # folder of the runs, with their checkpoints: the next call resumes what this one did not finish
    device: torch.device
    settings: dict  # of every run, such as the features
    gpu: str  # and images_name: in the tables
    images: Tensor | np.ndarray | None = None
    images_name: str = ""

    def read_images(self) -> None:
        self.images, _ = training.read_data(recipe_of(RUNS[RANDOM], 0, self.data, **self.settings))
        check_real(self.images)
        self.images_name = f"{len(self.images):,} images, {digest_of_images(np.asarray(self.images))[:8]}"


def train_all(call: Call, left: list[tuple[Run, int]], end: float) -> bool:
    """Train the runs until time.monotonic() is `end`, but not those of other calls. Returns whether it was stopped."""
    for run, seed in left:
        minutes = (end - time.monotonic()) / 60
        if minutes <= 0:
            break
        folder = files.make_folder(call.work / f"{run.name}-{seed}", "--work")
        recipe = recipe_of(run, seed, call.data, **call.settings, minutes=0.0 if end == math.inf else minutes)
        try:
            with locks.owning(folder):
                if (run, seed) not in runs_left([run.name], read(call.out)):
                    continue  # another call has ended it
                text.say(f"{run.name}, seed {seed}: {command_of(run, seed, call.data, **call.settings)}")
                summary = fit(call, recipe, folder)
                add(rows_of(run, seed, folder, features=recipe.evaluate_features, data=call.images_name, gpu=call.gpu),
                    call.out)
                if summary["stopped_early"]:
                    return True
        except locks.InUse as other:
            text.say(f"{run.name}, seed {seed}, is left to another call: {other}")
    return False


def fit(call: Call, recipe: Recipe, folder: Path) -> dict:
    summary, *_ = training.fit(call.images, recipe, out=folder, fresh=False, device=call.device)
    gc.collect()  # a run's graphs hold memory
    if call.device.type == "cuda":
        torch.cuda.empty_cache()
    return summary


def measure_rates(call: Call, end: float) -> bool:
    """Measure how fast each run trains that has no rate on this kind of device; none begins after `end`, a moment of
    time.monotonic(). Returns whether it was stopped."""
    text.say("rates are measured: nothing else may run on this device meanwhile")
    files.make_folder(call.work, "--work")
    for run in RUNS.values():
        if (run.name, call.gpu) in {(row["run"], row["gpu"]) for row in read(call.out, "speed.csv")}:
            continue
        if time.monotonic() >= end:
            break
        text.say(f"{run.name}: how fast it trains")
        with tempfile.TemporaryDirectory(dir=call.work, prefix="rate-") as folder:
            summary = fit(call, timed(recipe_of(run, 0, call.data, **call.settings)), Path(folder))
            if summary["interrupted"]:
                return True
            speed = speed_of(run, Path(folder), call.gpu)
        with locks.alone(call.out / ".lock"):
            files.write_csv(call.out / "speed.csv", [*read(call.out, "speed.csv"), speed])
    return False


def test_prior(call: Call) -> None:
    """Test the prior of the ways of pairing that are not in prior.csv yet, on as many images as fill whole pools."""
    count = len(call.images) // PRIOR * PRIOR
    if not count:
        text.say(f"the prior is not tested: that takes {PRIOR:,} images, and there are {len(call.images):,}")
        return
    rows = read(call.out, "prior.csv")
    check_same(rows, call.out, data=call.images_name)
    ways = WAYS + (ON_A_GPU if call.device.type == "cuda" else [])
    ways = [way for way in ways if way.name not in {row["way"] for row in rows}]
    if not ways:
        return
    some = np.random.default_rng(0).permutation(len(call.images))[:count]
    images = from_uint8(torch.from_numpy(np.asarray(call.images)[some]).to(call.device))
    for row in text.with_bar(prior(images, ways), "testing the prior", len(ways)):
        rows.append({**row, "data": call.images_name})
        files.write_csv(call.out / "prior.csv", rows)
    text.say_files(call.out, "prior.csv")
