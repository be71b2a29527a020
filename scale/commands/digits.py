"""dansm digits: first images, handwritten digits of 8×8 pixels."""

from pathlib import Path
from typing import Annotated

import typer

from dansm import BadInput

from ..base.machine import pick_device
from ..model.recipe import parse_counts
from .options import Device, Out, Seed, command_app

app = command_app()


@app.command()
def digits(
    match_size: Annotated[int, typer.Option(min=2, help="noises in the pool, compared with random pairs")] = 1000,
    steps: Annotated[int, typer.Option(min=1, help="training steps for each way of pairing")] = 500,
    batch: Annotated[int, typer.Option(min=1, help="images a step; a batch of 1 has no choice without a pool")] = 64,
    optimal: Annotated[bool, typer.Option("--optimal", help="also linear assignment within each batch")] = False,
    evaluate_at: Annotated[str | None, typer.Option(
        help="comma-separated training steps after which to evaluate, for a curve of distance against images")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="trainings for each way of pairing, for the spread")] = 2,
    seed: Seed = 0,
    device: Device = "auto",
    out: Out = Path("runs/digits"),
) -> None:
    """First images in three minutes: handwritten digits, paired at random and matched, side by side."""
    from dansm.tiny.digits import Settings, run

    marks = parse_counts("--evaluate-at", evaluate_at) if evaluate_at else []
    if marks and max(marks) > steps:
        raise BadInput(f"--evaluate-at is {max(marks):,}: expected at most --steps, {steps:,}")
    ways = ["random", "optimal", "greedy"] if optimal else ["random", "greedy"]
    settings = Settings(match_size, batch, ways, steps, sorted({*marks, steps}), list(range(seed, seed + seeds)))
    run(settings, pick_device(device), out)
