"""dansm grid: samples by models and counts of steps."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..base.machine import pick_device
from .options import Batch, DecodeMemory, DecodeWith, Device, Labels, Models, Out, Precision, Seed, command_app

app = command_app()


@app.command()
def grid(
    models: Models,
    steps: Annotated[str, typer.Option(help="comma-separated counts of steps, a row each")] = "3,4,5,10",
    side: Annotated[int, typer.Option(min=1, max=16, help="samples on each side of a cell")] = 3,
    autoencoder: DecodeWith = None,
    memory: DecodeMemory = None,
    label: Labels = None,
    batch: Batch = 64,
    precision: Precision = "auto",
    seed: Seed = 0,
    device: Device = "auto",
    out: Out = Path("runs/grid"),
) -> None:
    """Samples by counts of steps (rows) and models (columns), all from the same noise."""
    from ..studies.foundations import grid

    grid(models, step_counts=steps, side=side, labels=label, batch=batch, precision=precision, seed=seed,
         device=pick_device(device), out=out, autoencoder=autoencoder, memory=memory)
