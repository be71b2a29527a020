"""dansm paths: lengths and distances of paths."""

from pathlib import Path
from typing import Annotated

import typer
from torch import Tensor

import dansm

from ..base import files, machine, statistics, text
from ..model.load import load_models
from ..model.recipe import parse_counts
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
    labels: Labels = None,
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
    loaded = [model.on(device, precision) for model in load_models(models or [], [steps], labels=labels)]
    images, match_sizes, served = load_data(data, loaded, match_sizes, count=count, size=size)
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
        "models": [model.described() for model in loaded], "data": data or loaded[0].about["data"],
        "shape": list(images.shape[1:]), "count": count, "match_sizes": match_sizes, "steps": steps, "seed": seed,
        "seeds": seeds, "summary": summary, "rows": rows, "hardware": machine.hardware(device)})
    files.write_csv(out / "paths.csv", rows)
    text.say_files(out, "paths.json", "paths.csv", *figures.draw_paths(summary, seeds, out / "paths"))


def measure_paths(x: Tensor, z: Tensor) -> dict[str, float]:
    """Measures of the straight paths z_i → x_i, (N, C, H, W) each, N ≥ 2: among more paths neighbours are nearer."""
    distance = statistics.inter_path_distance(x, z)
    return {"path_length": dansm.path_length(x, z), "own_noise_nearest": statistics.own_noise_nearest(x, z),
            **{f"inter_path_{name}": value for name, value in vars(distance).items()}}


def growth_over_random(rows: list[dict], pairs: str) -> dict[str, dict]:
    """By what share measures of these pairs exceed those of random pairs of the same samples, over the seeds."""
    random = {row["seed"]: row for row in rows if row["pairs"] == "random"}
    matched = [row for row in rows if row["pairs"] == pairs]
    return {name: statistics.mean_and_std([row[name] / random[row["seed"]][name] - 1 for row in matched])
            for name in ("path_length", "inter_path_mean", "inter_path_minimum")}
