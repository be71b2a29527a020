"""dansm theory: what matching changes, measured without a model."""

import math
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from dansm import BadInput

from ..base.files import make_folder, write_csv, write_json
from ..base.machine import check_memory
from ..base.text import console, counted, say_files, table
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

    images = load_pixels(data, max(study.MATCH_SIZES))
    make_folder(out)
    result = study.measure(images, draws)
    print_gains(result)
    write_json(out / "theory.json", result)
    write_csv(out / "theory.csv", result["rows"])
    say_files(out, "theory.json", "theory.csv", *study.draw(result, out / "theory"))


def load_pixels(source: str, count: int) -> torch.Tensor:
    """The images of `source`, (N, D) in [−1, 1]. BadInput for latents and for fewer than `count` images."""
    images = load_images(source)
    if "uint8" not in str(images.dtype):
        raise BadInput(f"--data is {source}, which holds latents: expected images")
    if len(images) < count:
        raise BadInput(f"--data is {source}, which holds {counted(len(images), 'image')}: expected at least {count:,}, "
                       "as many as the largest pool has noises")
    numbers = math.prod(images.shape[1:])
    needed = 12 * len(images) * numbers + 24 * numbers**2  # bytes: what is converted, and what is made on the way
    check_memory(f"--data is {source}, {len(images):,} images of {numbers:,} numbers", needed, "cpu")
    return from_uint8(torch.as_tensor(np.asarray(images)).flatten(1))


def print_gains(result: dict) -> None:
    """Print what each way of pairing gains at each size, and which noises its first and its last quarter take."""
    summary = {(row["match_size"], row["way"]): row for row in result["summary"]}
    gains = {"gain": "", "quarter_4": ",\nlast ¼"}
    variances = {"first_variance_1": ",\nfirst ¼", "first_variance_4": ",\nlast ¼"}
    for title, measures, cell in (
            ("Mean squared path, shorter than at random by", gains, "{mean:.2%}\n± {std:.2%}"),
            ("Variance of the noises taken, along the images' first direction (N(0, I): 1)", variances,
             "{mean:.2f}\n± {std:.2f}")):
        columns = [(way, measure) for measure in measures for way in ("squared", "inner", "optimal")]
        rows = [[f"{size:,}", *(cell.format(**summary[size, way][measure]) for way, measure in columns)]
                for size in result["match_sizes"]]
        console.print(table(title, ["match_size", *(way + measures[measure] for way, measure in columns)], rows))
