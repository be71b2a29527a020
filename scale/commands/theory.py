"""dansm theory: what matching changes, measured without a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import Out, command_app

app = command_app()


@app.command()
def theory(
    data: Annotated[str, typer.Option(help="4,000 images or more, as for dansm train")] = "cifar10",
    draws: Annotated[int, typer.Option(min=2, help="how often to measure, for the spread")] = 3,
    out: Out = Path("runs/theory"),
) -> None:
    """What matching gains along the images' principal directions, and what the prior keeps. No model."""
    from ..studies.theory import theory

    theory(data, draws, out)
