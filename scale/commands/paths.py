"""dansm paths: lengths and distances of paths."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..base.machine import pick_device
from .options import Batch, Data, Device, Labels, Out, Precision, SampleSteps, Seed, Size, command_app

app = command_app()


@app.command()
def paths(
    models: Annotated[list[Path] | None, typer.Argument(
        help="folders of dansm train, their checkpoints, or exports: rows of their own pairs")] = None,
    data: Data = None,
    size: Size = None,
    match_size: Annotated[str | None, typer.Option(
        help="comma-separated pool sizes, a row each [100,1000,10000 where there are enough data]")] = None,
    count: Annotated[int, typer.Option(min=2, help="number of paths to measure")] = 1000,
    steps: SampleSteps = 50,
    seeds: Annotated[int, typer.Option(min=1, help="how often to measure, for the spread")] = 3,
    label: Labels = None,
    batch: Batch = 64,
    precision: Precision = "auto",
    seed: Seed = 0,
    device: Device = "auto",
    out: Out = Path("runs/paths"),
) -> None:
    """How long paths are and how near they come to each other: random, matched, and models' own pairs."""
    from ..studies.paths import paths

    paths(models or [], source=data, size=size, match_size=match_size, count=count, steps=steps, seeds=seeds,
          labels=label, batch=batch, precision=precision, seed=seed, device=pick_device(device), out=out)
