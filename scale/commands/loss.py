"""dansm loss: the loss of a model by time."""

import math
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Annotated

import numpy as np
import torch
import typer
from torch import Tensor

from dansm import BadInput

from ..base import files, machine, text
from ..data.labels import load_labels
from ..evaluate.by_class import Classes
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
    names: Labels = None,
    labels: Annotated[str | None, typer.Option(
        help="of the data, as for dansm train", show_default="as in the model's training, or auto")] = None,
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
    loaded = load.load_models([model], [steps], labels=names)[0].on(device, precision)
    if labels and not loaded.classes:
        raise BadInput(f"--labels is {labels}, and {model} was trained without labels: expected no --labels")
    setting = labels or ("auto" if data else loaded.about["recipe"].get("labels", "auto"))
    left_out = []
    images, match_sizes, served = load_data(data, [loaded], match_sizes, count=count, size=size, default=(10_000,),
                                            left_out=left_out, labels=setting if loaded.classes else "none")
    of_data = read_labels(loaded, data, setting, len(images), left_out) if loaded.classes else None
    groups = len(loaded.classes) if loaded.about["recipe"].get("match_labels") == "yes" and loaded.classes else None
    files.make_folder(out)
    curves = {}
    for pool in (0, *match_sizes):
        x, z, *classes = data_pairs(images, pool, count, served, seed=seed, device=device, labels=of_data,
                                    groups=groups)
        curves[f"matched, {pool:,}" if pool else "random"] = loss_by_time(loaded, x, z, TIMES, batch, *classes)
    x, z, _ = own_pairs(loaded, range(count), steps, seed=seed, batch=batch, device=device)
    curves["own"] = loss_by_time(loaded, x, z, TIMES, batch, loaded.labels_of(range(count)))
    for name, curve in curves.items():
        text.say(f"{name} pairs: loss {fmean(curve['mean']):.4f}, mean over all times")
    files.write_json(out / "loss.json", {
        "models": [loaded.described()], "data": data or loaded.about["data"], "labels": labels, "count": count,
        "steps": steps, "seed": seed, "times": TIMES, "curves": curves, "hardware": machine.hardware(device)})
    text.say_files(out, "loss.json", *figures.draw_loss(TIMES, curves, loaded.about["flow"], out / "loss"))


def read_labels(model: load.Model, data: str | None, setting: str, count: int, left_out: list[Path]) -> np.ndarray:
    """The label of each of `count` images or latents, (N,), as the model numbers its classes. BadInput if the data has
    no labels, or classes that the model does not know."""
    data = data or model.about["data"]
    found = load_labels(data, setting, count, left_out)
    if found is None:
        raise BadInput(f"{data} has no labels by --labels {setting}, and {model.path} was trained with some: expected "
                       "folders of classes, or a .npy file")
    return Classes(model.classes, found).numbers.numpy()


@torch.no_grad()
def loss_by_time(model: load.Model, x: Tensor, z: Tensor, times: list[float], batch: int = 64,
                 labels: Tensor | None = None) -> dict:
    """The flow's loss for the pairs (x, z), (N, C, H, W) each, N ≥ 2, at each time: mean and its standard error. A
    flow's loss is a mean over its batch, so the error comes from the means of eight parts or more. labels: (N,), for a
    network with classes."""
    count = min(len(x), max(8, math.ceil(len(x) / batch)))
    nets = [model.net] * count
    if labels is not None:
        nets = [partial(model.net, labels=part) for part in labels.to(x.device).tensor_split(count)]
    parts = list(zip(nets, x.tensor_split(count), z.tensor_split(count), strict=True))
    weights = torch.tensor([len(part) for _, part, _ in parts], dtype=torch.float64) / len(x)
    means, errors = [], []
    for t in text.with_bar(times, f"loss of {model.label}"):
        losses = [model.flow.loss(net, samples, noises, torch.full((len(samples),), t, device=x.device))
                  for net, samples, noises in parts]
        losses = torch.stack(losses).cpu().double()
        means.append((losses * weights).sum().item())
        errors.append(losses.std().item() / math.sqrt(count))
    return {"mean": means, "error": errors}
