"""dansm export: averaged weights as safetensors."""

from pathlib import Path
from typing import Annotated

import typer

from ..base.text import say, say_files
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
    from ..model.export import export

    out = out or (run if run.is_dir() else run.parent) / "weights.safetensors"
    about = export(run, out, average)
    say(f"step {about['step']:,} of {about['file']}, average of decay {about['decay']}")
    say_files(out.parent, out.name)
