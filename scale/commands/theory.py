"""dansm theory: what matching changes, measured without a model."""

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from dansm import BadInput

from ..base import files, text
from ..data.loader import load_images
from ..data.pixels import from_uint8
from .options import Out, command_app

app = command_app()


@app.command()
def theory(
    data: Annotated[str, typer.Option(help="4,000 images or more, as for dansm train")] = "cifar10",
    draws: Annotated[int, typer.Option(min=2, help="how often to measure, for the spread")] = 3,
    out: Out = Path("runs/theory"),
) -> None:
    """Measure what matching gains along the images' principal directions, and what the prior keeps. No model."""
    from ..studies import theory as study

    images = load_images(data)
    if "uint8" not in str(images.dtype) or len(images) < max(study.MATCH_SIZES):
        raise BadInput(f"--data is {data}, {text.counted(len(images), 'sample')} of {images.dtype}: expected at least "
                       f"{max(study.MATCH_SIZES):,} images, as many as the largest pool has noises, and no latents")
    files.make_folder(out)
    result = study.measure(from_uint8(torch.as_tensor(np.asarray(images)).flatten(1)), draws)
    files.write_json(out / "theory.json", result)
    files.write_csv(out / "theory.csv", result["rows"])
    text.say_files(out, "theory.json", "theory.csv", *study.draw(result, out / "theory"))
