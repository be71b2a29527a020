"""Trainings that differ only in their pairs: what the toy, the digits and the examples share."""

import os
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

import dansm
from dansm.scale.base.statistics import frechet_distance, mean_and_std
from dansm.scale.base.text import Stopped, console, counted, table, with_bar
from dansm.scale.base.workers import side_by_side

SAMPLES = 500
PROCESSES = min(4, os.cpu_count() or 1)  # that train at the same time on a CPU; each takes up to a gigabyte

Steps = Annotated[int, typer.Option(min=1, help="training steps of each row")]
Seeds = Annotated[int, typer.Option(min=1, help="trainings of each row, from other random numbers")]
MatchSize = Annotated[int, typer.Option(min=2, help="noises in the pool")]


def compare_lengths(train: Callable[[int, int], dict], seeds: int, title: str, match_size: int) -> list[dict]:
    """Train with random pairs and with a pool by train(match_size, seed) → {measure: value}, print a table of the
    measures, return its rows {"way", "seed", …}."""
    ways = {"random": 1, f"pool of {match_size:,}": match_size}
    rows = [{"way": way, "seed": seed, **train(size, seed)} for seed in range(seeds) for way, size in ways.items()]
    print_table(rows, title, "")
    return rows


def compare(ways: dict[str, Callable[[int], tuple]], images: Tensor, seeds: int, title: str,
            step_counts=(1, 2, 5, 10)) -> list[dict]:
    """Train each of `ways` with each seed, print the table that ends an example, return its rows {"way", "seed", …}.

    ways    by name: seed → ({measure: value}, draw), where draw(count, steps, generator) returns samples (count, ...)
    images  (N, ...) that were trained on. The Fréchet distance of samples to them, in the pixels, compares with no FID
    """
    rows = []
    for seed in range(seeds):
        for way, train in ways.items():
            measures, draw = train(seed)
            row = {"way": way, "seed": seed, **measures}
            for steps in step_counts:
                generator = torch.Generator().manual_seed(2**31 + seed)  # all ways start from the same noises
                row[counted(steps, "step")] = frechet_distance(draw(SAMPLES, steps, generator), images)
            rows.append(row)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    floor = frechet_distance(images[order[:SAMPLES]], images[order[SAMPLES:]])
    print_table(rows, title, f"Steps: Fréchet distance of {SAMPLES} samples in the pixels; {SAMPLES} real images have "
                             f"{floor:.2f}.")
    return rows


def print_table(rows: list[dict], title: str, caption: str) -> None:
    """Print the mean and the standard deviation of each measure over the seeds, a line for each way; a way may lack
    measures that the first has."""
    measures = [name for name in rows[0] if name not in ("way", "seed")]
    lines = []
    for way in dict.fromkeys(row["way"] for row in rows):
        same = [row for row in rows if row["way"] == way]
        values = ([row[name] for row in same if name in row] for name in measures)
        lines.append([way, *map(in_words, values)])
    seeds = counted(len(rows) // len(lines), "seed")
    columns = [name.replace(" ", "\n") for name in measures]
    console.print(table(f"{title}, {seeds}", ["pairs", *columns], lines, caption))


def in_words(values: list[float]) -> str:
    """The mean, and the standard deviation of several."""
    if not values:
        return ""
    found = mean_and_std(values)
    return f"{found['mean']:.3f}" + (f"\n[dim]±{found['std']:.3f}[/]" if len(values) > 1 else "")


def each_seed(train: Callable[[str, int], Any], ways: Collection[str], seeds: Sequence[int], file: Path,
              device: str | torch.device) -> Iterator:
    """Yield {way: train(way, seed)} for each seed. On a CPU several trainings run side by side, one on each core, also
    while the caller draws. Ctrl-C tells how many seeds the caller has in its file."""
    processes = PROCESSES if torch.device(device).type == "cpu" else 1
    calls = [(way, seed) for seed in seeds for way in ways]
    with closing(with_bar(side_by_side(train, calls, processes), "trainings", len(calls))) as trainings:
        for done in range(len(seeds)):
            try:
                trained = {way: next(trainings) for way in ways}
            except KeyboardInterrupt as stop:
                raise Stopped(f"stopped: {done} of {counted(len(seeds), 'seed')} in {file}") from stop
            yield trained


def run(main: Callable) -> None:
    """Run an example from the command line. Bad input ends it with one line and exit code 2."""
    torch.set_num_threads(1)  # more are no help to so small a network
    try:
        typer.run(main)
    except dansm.BadInput as error:
        print(error, file=sys.stderr)
        sys.exit(2)
