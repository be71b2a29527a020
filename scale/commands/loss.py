"""dansm loss: the loss of a model by time."""

import math
from pathlib import Path
from statistics import fmean
from typing import Annotated

import torch
import typer
from torch import Tensor

from ..base.files import make_folder, write_json
from ..base.machine import hardware, pick_device
from ..base.text import console, counted, say_files, table
from ..model import load
from ..studies.pairs import MATCH_SIZES, data_pairs, load_models, load_pools, own_pairs, with_bar
from .options import Batch, Data, Device, Labels, Model, Out, Precision, SampleSteps, Seed, Size, command_app

TIMES = [(i + 0.5) / 20 for i in range(20)]

app = command_app()


@app.command()
def loss(
    model: Model,
    data: Data = None,
    size: Size = None,
    match_size: Annotated[str | None, typer.Option(
        help="comma-separated pool sizes, a curve each", show_default="10000, or as many as there are data")] = None,
    count: Annotated[int, typer.Option(min=2, help="pairs of each kind")] = 512,
    steps: SampleSteps = 50,
    labels: Labels = None,
    batch: Batch = 64,
    precision: Precision = "auto",
    seed: Seed = 0,
    device: Device = "auto",
    out: Out = Path("runs/loss"),
) -> None:
    """Measure a model's loss by time t under random, matched and its own pairs."""
    device = pick_device(device)
    (loaded,) = load_models([model], device, steps=[steps], labels=labels, precision=precision)
    images, match_sizes, served = load_pools(data, [loaded], match_size, size=size, count=count,
                                             default=MATCH_SIZES[-1:])
    make_folder(out)
    curves = {}
    for pool in (0, *match_sizes):
        x, z = data_pairs(images, pool, count, served, seed=seed, device=device)
        curves[f"matched, {pool:,}" if pool else "random"] = loss_by_time(loaded, x, z, TIMES, batch)
    x, z, _ = own_pairs(loaded, range(count), steps, seed=seed, batch=batch, device=device)
    curves["own"] = loss_by_time(loaded, x, z, TIMES, batch)
    write_json(out / "loss.json", {
        "models": [loaded.described()], "data": data or loaded.about["data"], "count": count, "steps": steps,
        "seed": seed, "times": TIMES, "curves": curves, "hardware": hardware(device)})
    thirds = [[i for i, t in enumerate(TIMES) if low <= 3 * t < low + 1] for low in range(3)]
    rows = [[name, *(f"{fmean(curve['mean'][i] for i in part):.4f}" for part in (*thirds, range(len(TIMES))))]
            for name, curve in curves.items()]
    console.print(table(f"Loss of {loaded.label}, {counted(count, 'pair')} each",
                        ["", "t < 1/3", "1/3 ≤ t < 2/3", "2/3 ≤ t", "mean"], rows))
    from ..studies.figures import draw_loss

    say_files(out, "loss.json", *draw_loss(TIMES, curves, loaded.about["flow"], out / "loss"))


@torch.no_grad()
def loss_by_time(model: load.Model, x: Tensor, z: Tensor, times: list[float], batch: int = 64) -> dict:
    """The flow's loss for the pairs (x, z), (N, C, H, W) each, N ≥ 2, at each time: mean and its standard error.

    A flow's loss is a mean over its batch, so the error comes from the means of parts: at least eight, of at most
    `batch` samples.
    """
    count = min(len(x), max(8, math.ceil(len(x) / batch)))
    parts = list(zip(x.tensor_split(count), z.tensor_split(count), strict=True))
    weights = torch.tensor([len(part) for part, _ in parts], dtype=torch.float64) / len(x)
    means, errors = [], []
    for t in with_bar(times, f"loss of {model.label}"):
        losses = [model.flow.loss(model.net, samples, noises, torch.full((len(samples),), t, device=x.device))
                  for samples, noises in parts]
        losses = torch.stack(losses).cpu().double()
        means.append((losses * weights).sum().item())
        errors.append(losses.std().item() / math.sqrt(count))
    return {"mean": means, "error": errors}
