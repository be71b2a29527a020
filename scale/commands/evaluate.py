"""dansm evaluate: how far samples are from real images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..base.machine import pick_device
from .options import (
    DecodeMemory,
    DecodeWith,
    Device,
    InceptionWeights,
    Models,
    Out,
    Precision,
    SampleBatch,
    Seed,
    SkipUnreadable,
    Solver,
    command_app,
)

app = command_app()


@app.command()
def evaluate(
    models: Models,
    data: Annotated[str | None, typer.Option(
        help="the real images: a folder, an archive, cifar10 [those of the models' training, or of their latents]"
    )] = None,
    steps: Annotated[str, typer.Option(help="comma-separated counts of steps from noise to image")] = "3,4,5,10",
    count: Annotated[int, typer.Option(min=2, help="images drawn for each row of the table")] = 10_000,
    size: Annotated[int | None, typer.Option(min=1, help="make the real images squares of this many pixels")] = None,
    skip_unreadable: SkipUnreadable = False,
    features: Annotated[str, typer.Option(help="inception, or any other network as module:callable")] = "inception",
    inception_weights: InceptionWeights = None,
    autoencoder: DecodeWith = None,
    memory: DecodeMemory = None,
    solver: Solver = "euler",
    batch: SampleBatch = 0,
    precision: Precision = "auto",
    seed: Seed = 0,
    device: Device = "auto",
    cache: Annotated[Path, typer.Option(help="folder that keeps the features of real images")] = Path("~/.cache/dansm"),
    out: Out = Path("runs/evaluate"),
) -> None:
    """FID, KID, Inception Score, precision and recall of checkpoints, from the same noise, in one table.

    Without a download: --features dansm.scale.evaluate.evaluate:efficientnet_lite0
    """
    from ..evaluate.evaluate import evaluate

    evaluate(models, data, pick_device(device), out, steps=steps, count=count, size=size, features=features,
             weights=inception_weights, solver=solver, batch=batch, precision=precision, seed=seed,
             cache=cache.expanduser(), autoencoder=autoencoder, memory=memory, skip_unreadable=skip_unreadable)
