"""dansm toy: 2D flows with every way of pairing."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from dansm import BadInput

from ..base.machine import pick_device
from .options import Device, MatchSize, Out, Seed, command_app

app = command_app()


@app.command()
def toy(
    shape: Annotated[
        Literal["swiss-roll", "eight-gaussians", "two-moons", "checkerboard", "pinwheel", "all"] | None, typer.Option(
            show_default="swiss-roll")] = None,
    conditional: Annotated[bool, typer.Option(
        "--conditional", help="the two moons as two classes: what ignoring the classes does, see docs/conditions.md")
    ] = False,
    match_size: MatchSize = 1000,
    steps: Annotated[int, typer.Option(min=1, help="training steps for each way of pairing")] = 800,
    seeds: Annotated[int, typer.Option(min=1, help="trainings for each way of pairing, for the spread")] = 3,
    seed: Seed = 0,
    device: Device = "cpu",
    out: Out = Path("runs/toy"),
) -> None:
    """See in a minute what matching does: 2D flows, each way of pairing, pictures and a table."""
    from dansm.tiny import conditions, toy

    settings = toy.Settings(match_size, steps, seeds, seed, str(pick_device(device)))
    if not conditional:
        toy.run(shape or "swiss-roll", settings, out)
    elif shape in (None, "two-moons"):
        conditions.run(settings, out)
    else:
        raise BadInput(f"--shape is {shape} with --conditional: expected two-moons, whose moons are the classes")
