"""dansm compare: what several models make of the same noise."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..base.machine import pick_device
from .options import Batch, Device, Labels, Models, Out, Precision, SampleSteps, Seed, command_app

app = command_app()


@app.command()
def compare(
    models: Models,
    count: Annotated[int, typer.Option(min=2, help="number of noises")] = 256,
    shown: Annotated[int, typer.Option(min=1, max=16, help="how many of them the picture shows")] = 8,
    steps: SampleSteps = 20,
    label: Labels = None,
    batch: Batch = 64,
    precision: Precision = "auto",
    seed: Seed = 0,
    device: Device = "auto",
    out: Out = Path("runs/compare"),
) -> None:
    """What several models make of the same noise, and how near it is (the paper's first foundation)."""
    from ..studies.foundations import compare

    compare(models, count=count, pictured=min(shown, count), steps=steps, labels=label, batch=batch,
            precision=precision, seed=seed, device=pick_device(device), out=out)
