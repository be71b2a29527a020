"""dansm paths: lengths and distances of paths."""

from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from torch import Tensor

import dansm
from dansm import BadInput

from ..base import files, machine, statistics, text
from ..data.labels import load_labels
from ..model.load import load_models
from ..model.recipe import parse_counts
from ..studies.conditions import leakage, probed
from ..studies.pairs import data_pairs, load_data, own_pairs, summarize
from .options import Batch, Data, Device, Labels, Out, Precision, SampleSteps, Seed, Size, command_app

app = command_app()


@app.command()
def paths(
    models: Annotated[list[Path] | None, typer.Argument(
        help="folders of dansm train, their checkpoints, or exports: rows of their own pairs")] = None,
    data: Data = None,
    size: Size = None,
    match_size: Annotated[str | None, typer.Option(
        help="comma-separated pool sizes, a row each",
        show_default="100,1000,10000 where there are enough data")] = None,
    count: Annotated[int, typer.Option(min=2, help="number of paths to measure")] = 1000,
    steps: SampleSteps = 50,
    seeds: Annotated[int, typer.Option(min=1, help="how often to measure, for the spread")] = 3,
    names: Labels = None,
    labels: Annotated[str, typer.Option(
        help="classes of the data, as for dansm train: measure what noises tell about them, by coupling")] = "none",
    batch: Batch = 64,
    precision: Precision = "auto",
    seed: Seed = 0,
    device: Device = "auto",
    out: Out = Path("runs/paths"),
) -> None:
    """Measure how long paths are and how near they come to each other: random, matched, and models' own pairs."""
    from ..studies import figures

    device = machine.pick_device(device)
    match_sizes = parse_counts("--match-size", match_size, at_least=2) if match_size else None
    loaded = [model.on(device, precision) for model in load_models(models or [], [steps], labels=names)]
    images, match_sizes, served = load_data(data, loaded, match_sizes, count=count, size=size, labels=labels)
    source = data or loaded[0].about["data"]
    classes = read_classes(source, labels, len(images)) if labels != "none" else None
    files.make_folder(out)
    rows = []
    for draw in range(seed, seed + seeds):
        for pool in (0, *match_sizes):
            x, z = data_pairs(images, pool, count, served, seed=draw, device=device)
            name = f"matched, {pool:,}" if pool else "random"
            rows.append({"pairs": name, "match_size": pool, "seed": draw, **measure_paths(x, z)})
        for model in loaded:
            x, z, bend = own_pairs(model, range(count), steps, seed=draw, batch=batch, device=device)
            rows.append({"pairs": f"own, {model.label}", "seed": draw, **measure_paths(x, z), "straightness": bend})
    summary = summarize(rows, "pairs")
    for row in summary:
        if row["pairs"].startswith("matched"):
            row["over_random"] = growth_over_random(rows, row["pairs"])
        text.say(f"{row['pairs']}: length {row['path_length']['mean']:.2f}, distance of two paths",
                 f"{row['inter_path_mean']['mean']:.2f}, to the nearest {row['inter_path_minimum']['mean']:.2f};",
                 f"own noise is the nearest of {row['own_noise_nearest']['mean']:.1%}")
    files.write_json(out / "paths.json", {
        "models": [model.described() for model in loaded], "data": source,
        "shape": list(images.shape[1:]), "count": count, "match_sizes": match_sizes, "steps": steps, "seed": seed,
        "seeds": seeds, "summary": summary, "rows": rows, "hardware": machine.hardware(device)})
    files.write_csv(out / "paths.csv", rows)
    written = ["paths.json", "paths.csv", *figures.draw_paths(summary, seeds, out / "paths")]
    if classes is not None:
        if (samples := probed(images)) < max(match_sizes):
            text.say(f"1 GB holds the noises of {samples:,} samples: classes are probed with pools of {samples:,}")
        draws = range(seed, seed + seeds)
        leaks = [row for draw in draws for row in leakage(images, classes, max(match_sizes), seed=draw, device=device)]
        files.write_csv(out / "leakage.csv", leaks)
        written.append("leakage.csv")
        say_leakage(summarize(leaks, "coupling"), classes.max() + 1)
    text.say_files(out, *written)


def read_classes(source: str, setting: str, count: int) -> np.ndarray:
    """The class of each image or latent, (N,). BadInput if there are none, or one has too few to probe."""
    found = load_labels(source, setting, count)
    if found is None:
        raise BadInput(f"--labels is {setting}, and {source} has none: expected folders of classes, or a .npy file")
    sizes = np.bincount(found.numbers)
    if sizes.min() < 5:
        raise BadInput(f"class {found.names[sizes.argmin()]} of {source} has {text.counted(sizes.min(), 'sample')}: "
                       "expected at least 5 of each, to tell it from the noise")
    return found.numbers


def say_leakage(summary: list[dict], classes: int) -> None:
    for row in summary:
        told, largest, average, first, last = (row[name] for name in summary[0] if name != "coupling")
        text.say(f"{row['coupling']}: class told from {told['mean']:.1%} ± {told['std']:.1%} of noises, by chance from",
                 f"{1 / classes:.1%}; means of classes {largest['mean']:.2f} times their standard error at most,",
                 f"{average['mean']:.2f} on average; ‖z‖²/D from {first['mean']:.3f} to {last['mean']:.3f}")


def measure_paths(x: Tensor, z: Tensor) -> dict[str, float]:
    """Measures of the straight paths z_i → x_i, (N, C, H, W) each, N ≥ 2: among more paths neighbours are nearer."""
    distance = statistics.inter_path_distance(x, z)
    return {"path_length": dansm.path_length(x, z), "own_noise_nearest": statistics.own_noise_nearest(x, z),
            **{f"inter_path_{name}": value for name, value in vars(distance).items()}}


def growth_over_random(rows: list[dict], pairs: str) -> dict[str, dict]:
    """How far, as a share, measures of these pairs exceed those of random pairs of the same samples, over the seeds."""
    random = {row["seed"]: row for row in rows if row["pairs"] == "random"}
    matched = [row for row in rows if row["pairs"] == pairs]
    return {name: statistics.mean_and_std([row[name] / random[row["seed"]][name] - 1 for row in matched])
            for name in ("path_length", "inter_path_mean", "inter_path_minimum")}
