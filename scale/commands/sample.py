"""dansm sample: images from a trained network."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..base.machine import pick_device
from .options import DecodeMemory, DecodeWith, Device, Model, Out, Precision, SampleBatch, Seed, Solver, command_app

app = command_app()


@app.command()
def sample(
    model: Model,
    count: Annotated[int, typer.Option(min=1, help="number of images")] = 64,
    steps: Annotated[int, typer.Option(min=1, help="steps from noise to image; more is better and slower")] = 20,
    solver: Solver = "euler",
    batch: SampleBatch = 0,
    files: Annotated[bool, typer.Option(help="also write every image to a file of its own")] = False,
    precision: Precision = "auto",
    autoencoder: DecodeWith = None,
    memory: DecodeMemory = None,
    seed: Seed = 0,
    device: Device = "auto",
    out: Out = Path("runs/sample"),
) -> None:
    """Draw images from a trained network. Image 17 of a seed is the same whatever --count and --batch."""
    from .train import sample

    sample(model, pick_device(device), out, count=count, steps=steps, solver=solver, batch=batch,
           files=files, precision=precision, seed=seed, autoencoder=autoencoder, memory=memory)
