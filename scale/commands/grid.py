"""dansm grid: samples by models and counts of steps."""

from pathlib import Path
from typing import Annotated

import typer

from ..base.files import make_folder, write_json
from ..base.machine import hardware, pick_device
from ..base.text import say_files
from ..data.pixels import from_uint8
from ..model.recipe import parse_counts
from ..studies import figures
from ..studies.pairs import load_models, own_pairs
from .options import Batch, DecodeMemory, DecodeWith, Device, Labels, Models, Out, Precision, Seed, command_app

app = command_app()


@app.command()
def grid(
    models: Models,
    steps: Annotated[str, typer.Option(help="comma-separated counts of steps, a row each")] = "3,4,5,10",
    side: Annotated[int, typer.Option(min=1, max=16, help="samples on each side of a cell")] = 3,
    autoencoder: DecodeWith = None,
    memory: DecodeMemory = None,
    labels: Labels = None,
    batch: Batch = 64,
    precision: Precision = "auto",
    seed: Seed = 0,
    device: Device = "auto",
    out: Out = Path("runs/grid"),
) -> None:
    """Draw samples by counts of steps (rows) and models (columns), all from the same noises."""
    counts = parse_counts("--steps", steps)
    device = pick_device(device)
    loaded = [model.with_decoder(autoencoder, device, precision, memory)
              for model in load_models(models, device, steps=counts, labels=labels, precision=precision)]
    make_folder(out)

    def images(model, count):
        x, *_ = own_pairs(model, range(side * side), count, seed=seed, batch=batch, device=device)
        return from_uint8(model.decode(x)) if model.decode else x

    cells = [[images(model, count) for model in loaded] for count in counts]
    write_json(out / "grid.json", {
        "models": [model.described() for model in loaded], "steps": counts, "side": side, "seed": seed,
        "precision": precision, "autoencoder": autoencoder and str(autoencoder), "hardware": hardware(device)})
    say_files(out, "grid.json", *figures.draw_grid(cells, loaded, counts, side, out / "grid"))
