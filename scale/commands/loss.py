"""dansm loss: the loss of a model by time."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..base.machine import pick_device
from .options import Batch, Data, Device, Model, Out, Precision, SampleSteps, Seed, Size, command_app

app = command_app()


@app.command()
def loss(
    model: Model,
    data: Data = None,
    size: Size = None,
    match_size: Annotated[str | None, typer.Option(
        help="comma-separated pool sizes, a curve each [10000, or as many as there are data]")] = None,
    count: Annotated[int, typer.Option(min=2, help="pairs of each kind")] = 512,
    steps: SampleSteps = 50,
    label: Annotated[str | None, typer.Option(help="name of the model in the table")] = None,
    batch: Batch = 64,
    precision: Precision = "auto",
    seed: Seed = 0,
    device: Device = "auto",
    out: Out = Path("runs/loss"),
) -> None:
    """A model's loss by t under random, matched and its own pairs."""
    from ..studies.paths import loss

    loss(model, source=data, size=size, match_size=match_size, count=count, steps=steps, label=label, batch=batch,
         precision=precision, seed=seed, device=pick_device(device), out=out)
