"""dansm grid: samples by models and counts of steps."""

from itertools import product
from pathlib import Path
from typing import Annotated

import typer

from ..base import files, machine, text
from ..data.pixels import from_uint8
from ..model.load import load_models
from ..model.recipe import parse_counts
from ..model.sampling import ROWS, rows_of_classes
from ..studies.pairs import own_pairs
from . import options

app = options.command_app()


@app.command()
def grid(
    models: options.Models,
    steps: Annotated[str, typer.Option(help="comma-separated counts of steps, a row each")] = "3,4,5,10",
    side: Annotated[int, typer.Option(
        min=1, max=16, help=f"samples on each side of a cell; with classes in each row, for {ROWS} at most")] = 3,
    guidance: options.Guidances = "1",
    guidance_interval: options.GuidanceInterval = "0,1",
    autoencoder: options.DecodeWith = None,
    memory: options.DecodeMemory = None,
    names: options.Labels = None,
    batch: options.Batch = 64,
    precision: options.Precision = "auto",
    seed: options.Seed = 0,
    device: options.Device = "auto",
    out: options.Out = Path("runs/grid"),
) -> None:
    """Draw samples by counts of steps (rows) and models (columns), all from the same noises."""
    from ..studies import figures

    counts = parse_counts("--steps", steps)
    device = machine.pick_device(device)
    loaded = [model.on(device, precision).with_decoder(autoencoder, device, precision, memory)
              for model in load_models(models, counts, labels=names, guidance=guidance, interval=guidance_interval)]
    files.make_folder(out)
    cells = []
    for count, model in product(counts, loaded):
        numbers, of_numbers = range(side * side), None
        if model.classes:
            numbers, of_numbers = rows_of_classes(len(model.classes), side)
        x, *_ = own_pairs(model, numbers, count, seed=seed, batch=batch, device=device, labels=of_numbers)
        cells.append(from_uint8(model.decode(x)) if model.decode else x)
    for classes in dict.fromkeys(", ".join(model.classes[:ROWS]) for model in loaded if model.classes):
        text.say(f"rows of a cell: {text.shorten(classes, 300)}")
    files.write_json(out / "grid.json", {
        "models": [model.described() for model in loaded], "steps": counts, "side": side, "seed": seed,
        "precision": precision, "autoencoder": autoencoder and str(autoencoder), "hardware": machine.hardware(device)})
    text.say_files(out, "grid.json", *figures.draw_grid(cells, loaded, counts, side, out / "grid"))
