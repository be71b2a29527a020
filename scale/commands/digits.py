"""dansm digits: first images, handwritten digits of 8×8 pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..base.machine import pick_device
from ..model.recipe import parse_counts
from .options import Device, Out, Seed, command_app

app = command_app()


@app.command()
def digits(
    match_size: Annotated[int, typer.Option(min=2, help="noises in the pool, compared with random pairs")] = 1000,
    steps: Annotated[int, typer.Option(min=1, help="training steps for each way of pairing")] = 500,
    batch: Annotated[int, typer.Option(min=1, help="images a step; down to 1, where a batch has no choice")] = 64,
    optimal: Annotated[bool, typer.Option("--optimal", help="also linear assignment within each batch")] = False,
    evaluate_at: Annotated[str | None, typer.Option(
        help="comma-separated training steps after which to evaluate, for a curve of distance against images")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="trainings for each way of pairing, for the spread")] = 2,
    seed: Seed = 0,
    device: Device = "auto",
    out: Out = Path("runs/digits"),
) -> None:
    """First images in three minutes: handwritten digits, paired at random and matched, side by side."""
    from dansm.tiny.digits import run

    run(match_size=match_size, steps=steps, batch=batch, optimal=optimal,
        evaluate_at=parse_counts("--evaluate-at", evaluate_at) if evaluate_at else (), seeds=seeds, seed=seed,
        device=pick_device(device), out=out)
