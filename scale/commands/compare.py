"""dansm compare: what several models make of the same noise."""

import math
from itertools import combinations
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from dansm import BadInput

from ..base.files import make_folder, write_json
from ..base.machine import hardware, pick_device
from ..base.statistics import mean_and_std, squared_distances
from ..base.text import console, counted, say, say_files, shorten, table
from ..studies.pairs import load_models, own_pairs
from .options import Batch, Device, Labels, Models, Out, Precision, SampleSteps, Seed, command_app

app = command_app()


@app.command()
def compare(
    models: Models,
    count: Annotated[int, typer.Option(min=2, help="number of noises")] = 256,
    shown: Annotated[int, typer.Option(min=1, max=16, help="how many of them the picture shows")] = 8,
    steps: SampleSteps = 20,
    labels: Labels = None,
    batch: Batch = 64,
    precision: Precision = "auto",
    seed: Seed = 0,
    device: Device = "auto",
    out: Out = Path("runs/compare"),
) -> None:
    """Compare what several models make of the same noises (the paper's first foundation)."""
    if len(models) < 2:
        raise BadInput(f"MODELS is {models[0]} alone: expected two or more to compare")
    device = pick_device(device)
    loaded = load_models(models, device, steps=[steps], labels=labels, precision=precision)
    make_folder(out)
    images = []
    for model in loaded:
        x, z, _ = own_pairs(model, range(count), steps, seed=seed, batch=batch, device=device)
        images.append(x)
    comparisons = [{"models": [loaded[i].label, loaded[j].label], **compare_images(images[i], images[j])}
                   for i, j in combinations(range(len(loaded)), 2)]
    write_json(out / "compare.json", {
        "models": [model.described() for model in loaded], "noises": count, "steps": steps, "seed": seed,
        "precision": precision, "pairs": comparisons, "hardware": hardware(device)})
    print_comparisons(comparisons, count)
    rows = {}
    if loaded[0].draws_images:
        rows = {model.label: x[:shown] for model, x in zip(loaded, images, strict=True)}
    else:
        say(f"latents of {loaded[0].shape[0]} channels are no images: only their distances are drawn")
    from ..studies.figures import draw_compare

    say_files(out, "compare.json", *draw_compare(rows, z[:shown], comparisons, out / "compare"))


def compare_images(a: Tensor, b: Tensor) -> dict:
    """How much nearer the images of two models are if they come from the same noise. a, b: (N, ...), N ≥ 2, a_i and
    b_i from noise i.

    same, unequal  ‖a_i − b_j‖ over i = j, and over all i ≠ j: mean and standard deviation
    ratio          of the two means: 0 for equal models, 1 if the noise decides nothing
    nearest        share of the images a_i whose nearest of all b is b_i; 1/N by chance
    """
    a, b = a.flatten(1).float(), b.flatten(1).float()
    same = (a - b).norm(dim=1)  # by differences: equal images are 0 apart, not a rounding error
    distances = squared_distances(a, b).clamp_min_(0).sqrt_()
    distances.diagonal().copy_(same)
    nearest = (distances.argmin(1) == torch.arange(len(a), device=a.device)).float().mean().item()
    unequal = distances[~torch.eye(len(a), dtype=torch.bool, device=a.device)]
    ratio = (same.mean() / unequal.mean()).item() if unequal.mean() > 0 else math.nan
    return {"same": mean_and_std(same), "unequal": mean_and_std(unequal), "ratio": ratio, "nearest": nearest}


def print_comparisons(comparisons: list[dict], count: int) -> None:
    rows = []
    for pair in comparisons:
        same, unequal = (f"{pair[noise]['mean']:.2f} ± {pair[noise]['std']:.2f}" for noise in ("same", "unequal"))
        names = " – ".join(shorten(name, 14) for name in pair["models"])
        rows.append([names, same, unequal, f"{pair['ratio']:.3f}", f"{pair['nearest']:.1%}"])
    console.print(table(
        f"Images of two models, ‖a − b‖, over {counted(count, 'noise')}",
        ["", "same noise", "unequal noise", "ratio", "nearest\nis own"], rows,
        f"Ratio of the means: 0 for equal models, 1 if the noise decides nothing. By chance {1 / count:.1%} of the "
        "images are nearest to that of their own noise."))
