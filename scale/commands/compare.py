"""dansm compare: what several models make of the same noise."""

from itertools import combinations
from pathlib import Path
from typing import Annotated

import torch
import typer

from dansm import BadInput

from ..base import files, machine, statistics, text
from ..model.load import classes_of, load_models
from ..studies.pairs import own_pairs
from . import options

app = options.command_app()


@app.command()
def compare(
    models: options.Models,
    count: Annotated[int, typer.Option(min=2, help="number of noises")] = 256,
    shown: Annotated[int, typer.Option(min=1, max=16, help="how many of them the picture shows")] = 8,
    steps: options.SampleSteps = 20,
    guidance: options.Guidances = "1",
    guidance_interval: options.GuidanceInterval = "0,1",
    names: options.Labels = None,
    batch: options.Batch = 64,
    precision: options.Precision = "auto",
    seed: options.Seed = 0,
    device: options.Device = "auto",
    out: options.Out = Path("runs/compare"),
) -> None:
    """Compare what several models make of the same noises (the paper's first foundation)."""
    from ..studies import figures

    loaded = load_models(models, [steps], labels=names, guidance=guidance, interval=guidance_interval)
    if len(loaded) < 2:
        raise BadInput(f"MODELS is {models[0]} alone: expected two or more to compare, or several --guidance")
    classes_of(loaded)  # as all get the same ones
    device = machine.pick_device(device)
    loaded = [model.on(device, precision) for model in loaded]
    for model in loaded[1:]:
        if model.shape != loaded[0].shape:
            raise BadInput(f"{model.path} makes samples {model.shape}, {loaded[0].path} {loaded[0].shape}: expected "
                           "models of one shape, as they get the same noise")
    files.make_folder(out)
    images = []
    for model in loaded:
        x, z, _ = own_pairs(model, range(count), steps, seed=seed, batch=batch, device=device)
        images.append(x)
    comparisons = [{"models": [loaded[i].label, loaded[j].label], **compare_images(images[i], images[j])}
                   for i, j in combinations(range(len(loaded)), 2)]
    for pair in comparisons:
        same, unequal = ("{mean:.2f} ± {std:.2f}".format(**pair[noise]) for noise in ("same", "unequal"))
        text.say(f"{' – '.join(pair['models'])}: {same} apart from the same noise, {unequal} from unequal noises;",
                 f"ratio {pair['ratio']:.3f} (1: the noise decides nothing), nearest is own {pair['nearest']:.1%}")
    files.write_json(out / "compare.json", {
        "models": [model.described() for model in loaded], "noises": count, "steps": steps, "seed": seed,
        "precision": precision, "pairs": comparisons, "hardware": machine.hardware(device)})
    text.say_files(out, "compare.json", *figures.draw_compare(
        loaded, [x[:shown] for x in images], z[:shown], comparisons, out / "compare"))


def compare_images(a: torch.Tensor, b: torch.Tensor) -> dict:
    """How much nearer images a_i and b_i of two models are, as both are from noise i. a, b: (N, ...), N ≥ 2.

    same, unequal  ‖a_i − b_j‖ over i = j, and over all i ≠ j: mean and standard deviation
    ratio          of the two means: 0 for equal models, 1 if the noise decides nothing
    nearest        share of the images a_i whose nearest of all b is b_i; 1/N by chance
    """
    a, b = a.flatten(1).float(), b.flatten(1).float()
    same = (a - b).norm(dim=1)  # by differences: equal images are 0 apart, not a rounding error
    distances = statistics.squared_distances(a, b).clamp_min_(0).sqrt_()
    distances.diagonal().copy_(same)
    nearest = (distances.argmin(1) == torch.arange(len(a), device=a.device)).float().mean().item()
    unequal = distances[~torch.eye(len(a), dtype=torch.bool, device=a.device)]
    return {"same": statistics.mean_and_std(same), "unequal": statistics.mean_and_std(unequal),
            "ratio": (same.mean() / unequal.mean()).item(), "nearest": nearest}
