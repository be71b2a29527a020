"""dansm grid: samples by models and counts of steps."""

from itertools import product
from pathlib import Path
from typing import Annotated

import typer

from ..base import files, machine, text
from ..data.pixels import from_uint8
from ..model.load import load_models
from ..model.recipe import parse_counts
from ..studies.pairs import own_pairs
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
    from ..studies import figures

    counts = parse_counts("--steps", steps)
    device = machine.pick_device(device)
    loaded = [model.on(device, precision).with_decoder(autoencoder, device, precision, memory)
              for model in load_models(models, counts, labels=labels)]
    files.make_folder(out)
    cells = []
    for count, model in product(counts, loaded):
        x, *_ = own_pairs(model, range(side * side), count, seed=seed, batch=batch, device=device)
        cells.append(from_uint8(model.decode(x)) if model.decode else x)
    files.write_json(out / "grid.json", {
        "models": [model.described() for model in loaded], "steps": counts, "side": side, "seed": seed,
        "precision": precision, "autoencoder": autoencoder and str(autoencoder), "hardware": machine.hardware(device)})
    text.say_files(out, "grid.json", *figures.draw_grid(cells, loaded, counts, side, out / "grid"))
