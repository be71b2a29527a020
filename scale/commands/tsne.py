"""dansm tsne: noises and samples in the plane."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..base.machine import pick_device
from .options import Batch, Device, Out, Precision, SampleSteps, Seed, Size, command_app

app = command_app()


@app.command()
def tsne(
    model: Annotated[Path | None, typer.Argument(
        help="folder of a dansm train, one of its checkpoints, or an export [none: matched pairs]")] = None,
    data: Annotated[str | None, typer.Option(help="images or latents for the random pairs [the model's samples]")] = None,
    size: Size = None,
    pairs: Annotated[int, typer.Option(min=2, help="pairs of noise and sample; the paper shows 20 to 23")] = 23,
    draws: Annotated[int, typer.Option(min=1, help="pictures; crossings are counted in all, the median is kept")] = 10,
    perplexity: Annotated[float, typer.Option(help="of t-SNE, less than twice the pairs; the paper's 22 to 30")] = 22,
    match_size: Annotated[int, typer.Option(min=2, help="noises in the pool, where no model is given")] = 1000,
    steps: SampleSteps = 50,
    label: Annotated[str | None, typer.Option(help="name of the model in the figure")] = None,
    batch: Batch = 64,
    precision: Precision = "auto",
    seed: Seed = 0,
    device: Device = "auto",
    out: Out = Path("runs/tsne"),
) -> None:
    """Noises and samples in the plane, random pairs above, the model's own below (the paper's second foundation)."""
    from ..studies.foundations import tsne

    tsne(model, source=data, size=size, pairs=pairs, draws=draws, perplexity=perplexity, match_size=match_size,
         steps=steps, label=label, batch=batch, precision=precision, seed=seed, device=pick_device(device), out=out)
