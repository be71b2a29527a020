"""dansm loss: the loss of a model by time."""

import math
from pathlib import Path
from statistics import fmean
from typing import Annotated

import torch
import typer

from ..base import files, machine, text
from ..model import load
from ..model.recipe import parse_counts
from ..studies.pairs import data_pairs, load_data, own_pairs
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
    from ..studies import figures

    device = machine.pick_device(device)
    match_sizes = parse_counts("--match-size", match_size, at_least=2) if match_size else None
    loaded = load.load_models([model], [steps], labels=labels)[0].on(device, precision)
    images, match_sizes, served = load_data(data, [loaded], match_sizes, count=count, size=size, default=(10_000,))
    files.make_folder(out)
    curves = {}
    for pool in (0, *match_sizes):
        x, z = data_pairs(images, pool, count, served, seed=seed, device=device)
        curves[f"matched, {pool:,}" if pool else "random"] = loss_by_time(loaded, x, z, TIMES, batch)
    x, z, _ = own_pairs(loaded, range(count), steps, seed=seed, batch=batch, device=device)
    curves["own"] = loss_by_time(loaded, x, z, TIMES, batch)
    for name, curve in curves.items():
        text.say(f"{name} pairs: loss {fmean(curve['mean']):.4f}, mean over all times")
    files.write_json(out / "loss.json", {
        "models": [loaded.described()], "data": data or loaded.about["data"], "count": count, "steps": steps,
        "seed": seed, "times": TIMES, "curves": curves, "hardware": machine.hardware(device)})
    text.say_files(out, "loss.json", *figures.draw_loss(TIMES, curves, loaded.about["flow"], out / "loss"))


@torch.no_grad()
def loss_by_time(model: load.Model, x: torch.Tensor, z: torch.Tensor, times: list[float], batch: int = 64) -> dict:
    """The flow's loss for the pairs (x, z), (N, C, H, W) each, N ≥ 2, at each time: mean and its standard error. A
    flow's loss is a mean over its batch, so the error comes from the means of eight parts or more."""
    count = min(len(x), max(8, math.ceil(len(x) / batch)))
    parts = list(zip(x.tensor_split(count), z.tensor_split(count), strict=True))
    weights = torch.tensor([len(part) for part, _ in parts], dtype=torch.float64) / len(x)
    means, errors = [], []
    for t in text.with_bar(times, f"loss of {model.label}"):
        losses = [model.flow.loss(model.net, samples, noises, torch.full((len(samples),), t, device=x.device))
                  for samples, noises in parts]
        losses = torch.stack(losses).cpu().double()
        means.append((losses * weights).sum().item())
        errors.append(losses.std().item() / math.sqrt(count))
    return {"mean": means, "error": errors}
