"""dansm export: averaged weights as safetensors."""

import json
from pathlib import Path
from typing import Annotated

import typer

from dansm import BadInput

from ..base.files import make_folder, replacing
from ..base.text import say, say_files
from ..model.load import DESCRIBED, build, read_average
from .options import command_app

app = command_app()


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="folder of a dansm train, or one of its checkpoints")],
    average: Annotated[int, typer.Option(min=0, help="which moving average, if the run keeps several")] = 0,
    out: Annotated[Path | None, typer.Option(
        help="file to write", show_default="weights.safetensors in the run's folder")] = None,
) -> None:
    """Write the averaged weights alone, as safetensors, with what it takes to sample from them."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    out = out or (run if run.is_dir() else run.parent) / "weights.safetensors"
    if out.suffix != ".safetensors":
        raise BadInput(f"--out is {out}: expected a name that ends in .safetensors")
    if run.suffix == ".safetensors":
        raise BadInput(f"{run} is exported already: expected a run's folder or one of its checkpoints")
    weights, about = read_average(run, average)
    build(weights, about)  # refuses what could not be read again
    make_folder(out.parent)
    with replacing(out) as partial:
        try:
            save_file({name: weight.contiguous() for name, weight in weights.items()}, partial,
                      {name: json.dumps(about[name]) for name in (*DESCRIBED, "classes") if name in about})
        except SafetensorError as error:  # what it raises for a full disk
            raise OSError(None, str(error)) from error
    say(f"step {about['step']:,} of {about['file']}, average of decay {about['decay']}")
    say_files(out.parent, out.name)
