"""The table that ends each of the examples: trainings equal but for their pairs, and what they draw in few steps.

The distance is Fréchet's in the pixels, of a few hundred samples: it ranks the rows of one table and compares with no
FID. The last row is as many real images against all others, the least that the samples can come to.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import wraps
from typing import Annotated, NamedTuple

import torch
import typer
from dansm.scale.base.statistics import frechet_distance
from dansm.scale.base.text import counted
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

STEP_COUNTS = (1, 2, 5, 10)
SAMPLES = 500

Steps = Annotated[int, typer.Option(min=1, help="training steps of each way")]
Seeds = Annotated[int, typer.Option(min=1, help="trainings of each way, from other random numbers")]
MatchSize = Annotated[int, typer.Option(min=2, help="noises in the pool")]


class Trained(NamedTuple):
    """What a training comes to: how long its paths were, by the name of a column, and its sampler."""

    path_length: dict[str, float]
    draw: Callable[[int, int, torch.Generator], Tensor]  # (count, steps, generator) → (count, ...)


def compare(ways: dict[str, Callable[[int], Trained]], images: Tensor, seeds: int, title: str,
            step_counts=STEP_COUNTS) -> list[dict]:
    """Train each of `ways` with each seed, print a row for it, return the rows {"way", "seed", measures}.

    ways    by name: a function of the seed, which decides all that is random but the pairing
    images  (N, ...) that it was trained on; of the same seed all ways start their samples from the same noises
    """
    rows = []
    for seed in range(seeds):
        for way, train in ways.items():
            trained = train(seed)
            row = {"way": way, "seed": seed, **trained.path_length}
            for steps in step_counts:
                drawn = trained.draw(SAMPLES, steps, torch.Generator().manual_seed(2**31 + seed))
                row[steps_column(steps)] = frechet_distance(drawn, images)
            rows.append(row)
    print_table(rows, title, real_against_real(images, SAMPLES), SAMPLES)
    return rows


def steps_column(steps: int) -> str:
    return counted(steps, "step")


def real_against_real(images: Tensor, samples: int) -> float:
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return frechet_distance(images[order[:samples]], images[order[samples:]])


def print_table(rows: list[dict], title: str, floor: float, samples: int) -> None:
    seeds = len({row["seed"] for row in rows})
    measures = [key for key in rows[0] if key not in ("way", "seed")]
    caption = (f"Mean of {counted(seeds, 'seed')} (beneath: least … most). Steps: Fréchet distance of {samples} "
               f"samples in the pixels; {samples} real ones have {floor:.2f}.")
    table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("pairs", *measures):
        table.add_column(name, justify="left" if name == "pairs" else "right", no_wrap=True)
    for way in dict.fromkeys(row["way"] for row in rows):
        table.add_row(way, *(in_words([row[key] for row in rows if row["way"] == way]) for key in measures))
    Console().print(table)


def in_words(values: list[float]) -> str:
    """Three digits, so that seven columns fit into a terminal."""
    return f"{statistics.fmean(values):#.3g}" + f"\n{min(values):#.3g}…{max(values):#.3g}" * (len(values) > 1)


def run(main: Callable) -> None:
    """An example from the command line: what cannot be used is one line and exit code 2, as of dansm's own commands."""

    @wraps(main)
    def example(**options) -> None:  # rows are for tests; what a command returns would be its exit code
        main(**options)

    commands = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    commands.command(help=main.__globals__["__doc__"])(example)
    main(commands=commands)
