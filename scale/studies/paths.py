"""The paper's theory, measured: how the straight paths from noise to data run, and what a model loses along them, under
random, matched and a model's own pairs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import dansm
from dansm import BadInput

from ..base.files import make_folder, write_csv, write_json
from ..base.machine import hardware
from ..base.statistics import inter_path_distance, mean_and_std
from ..base.text import console, counted, say, say_files, shorten
from ..model.recipe import parse_counts
from .foundations import (
    MATCH_SIZES,
    Model,
    data_pairs,
    load_data,
    load_models,
    make_table,
    own_pairs,
    pick_match_sizes,
    whole_pools,
    with_bar,
)

COUNT_OF_TIMES = 20  # at which a loss is measured


# ---------------------------------------------------------------------------------------------------
# Paths
# ---------------------------------------------------------------------------------------------------

MEASURES = ("path_length", "own_noise_nearest", "inter_path_mean", "inter_path_mean_t", "inter_path_minimum",
            "inter_path_minimum_t")


GROWING = ("path_length", "inter_path_mean", "inter_path_minimum")


def measure_paths(x: Tensor, z: Tensor) -> dict[str, float]:
    """Each of MEASURES for the straight paths z_i → x_i, (N, C, H, W) each, N ≥ 2. The minimum of the distances, and
    the share of own noises that are nearest, depend on N: more paths, nearer neighbours."""
    between = inter_path_distance(x, z)
    return {"path_length": dansm.path_length(x, z), "own_noise_nearest": dansm.own_noise_nearest(x, z),
            "inter_path_mean": between.mean, "inter_path_mean_t": between.mean_t,
            "inter_path_minimum": between.minimum, "inter_path_minimum_t": between.minimum_t}


def measure_all_paths(models: list[Model], images, match_sizes: list[int], *, count: int, steps: int, seeds: int,
                      batch: int, seed: int, device) -> Iterator[dict]:
    """A row {"pairs", "seed", measures} for each way of pairing and each seed."""
    served = whole_pools(images, match_sizes, count)
    for one in range(seed, seed + seeds):
        for match_size in (0, *match_sizes):
            x, z = data_pairs(images, match_size, count, served, seed=one, device=device)
            name = f"matched, {match_size:,}" if match_size else "random"
            yield {"pairs": name, "match_size": match_size, "seed": one, **measure_paths(x, z)}
        for model in models:
            own = own_pairs(model, range(count), steps, seed=one, batch=batch, device=device)
            yield {"pairs": f"own, {model.label}", "seed": one, **measure_paths(own.x, own.z),
                   "straightness": own.straightness}


def summarize(rows: list[dict]) -> list[dict]:
    """Mean and standard deviation over the seeds, for each way of pairing; of matched pairs also "over_random", the
    growth over random pairs of the same samples, as a share, which varies far less than what grows."""
    found, random = [], {row["seed"]: row for row in rows if row["pairs"] == "random"}
    for name in dict.fromkeys(row["pairs"] for row in rows):
        of_name = [row for row in rows if row["pairs"] == name]
        measures = [key for key in (*MEASURES, "straightness") if key in of_name[0]]
        found.append({"pairs": name, **{key: mean_and_std([row[key] for row in of_name]) for key in measures}})
        if name.startswith("matched"):
            found[-1]["over_random"] = {
                key: mean_and_std([row[key] / random[row["seed"]][key] - 1 for row in of_name]) for key in GROWING}
    return found


def paths(model_paths: list[Path], *, source: str | None, size: int | None, match_size: str | None, count: int,
          steps: int, seeds: int, labels, batch: int, precision: str, seed: int, device: torch.device,
          out: Path) -> dict:
    """How long paths are and how near they come to each other: random pairs, matched ones, the models' own."""
    models = load_models(model_paths, device, steps=[steps], labels=labels, precision=precision)
    if match_size is not None:
        parse_counts("--match-size", match_size, at_least=2)  # before minutes of reading
    images = load_data(source, models, size=size, count=count)
    match_sizes = pick_match_sizes(match_size, images)
    whole_pools(images, match_sizes, count)  # refused before anything is written
    out = make_folder(out)
    rows = list(measure_all_paths(models, images, match_sizes, count=count, steps=steps, seeds=seeds, batch=batch,
                                  seed=seed, device=device))
    summary = summarize(rows)
    result = {"models": [model.described() for model in models], "data": source or models[0].about["data"],
              "shape": list(images.shape[1:]), "count": count, "match_sizes": match_sizes, "steps": steps,
              "seed": seed, "seeds": seeds, "summary": summary, "rows": rows, "hardware": hardware(device)}
    write_json(out / "paths.json", result)
    write_csv(out / "paths.csv", rows)
    print_paths(summary, count)
    from . import figures

    names = figures.draw_paths(summary, seeds, out / "paths")
    say_files(out, "paths.json", "paths.csv", *names)
    return result


def print_paths(summary: list[dict], count: int) -> None:
    table = make_table(f"Straight paths from noise to data, {count:,} of each kind", "length", "own is\nnearest",
                       "apart,\nall", "at t*", "apart,\nnearest", "at t*", "bend",
                       caption="Apart: the least distance of two paths at equal times t*, mean over all pairs of "
                               "paths, and mean of each path to its nearest. Bend: of the learned paths, 0 is "
                               "straight.")
    for row in summary:
        values = {key: row[key]["mean"] for key in (*MEASURES, "straightness") if key in row}
        table.add_row(shorten(row["pairs"], 18), f"{values['path_length']:.2f}", f"{values['own_noise_nearest']:.1%}",
                      f"{values['inter_path_mean']:.2f}", f"{values['inter_path_mean_t']:.3f}",
                      f"{values['inter_path_minimum']:.2f}", f"{values['inter_path_minimum_t']:.3f}",
                      f"{values['straightness']:.3f}" if "straightness" in values else "")
    console.print(table)
    for row in summary:
        if growth := row.get("over_random"):
            length, mean, least = (_grown(**growth[key]) for key in GROWING)
            say(f"{row['pairs']} against random: length {length}, apart {mean}, nearest {least}")


def _grown(mean: float, std: float) -> str:
    return f"{100 * mean:+.2f} ± {100 * std:.2f} %" if std else f"{100 * mean:+.2f} %"  # of one draw there is no spread


# ---------------------------------------------------------------------------------------------------
# Loss
# ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def loss_by_time(model: Model, x: Tensor, z: Tensor, times: list[float], batch: int = 64) -> dict:
    """The flow's loss of the pairs (x, z), (N, C, H, W) each, N ≥ 2, at each time: mean and its standard error.

    A flow's loss is a mean over its batch, so the error comes from the means of parts of the samples: eight at least,
    of `batch` samples at most.
    """
    if len(x) < 2:
        raise BadInput(f"there are {counted(len(x), 'pair')}: expected at least two for an error")
    count = min(len(x), max(8, math.ceil(len(x) / batch)))
    parts = list(zip(x.tensor_split(count), z.tensor_split(count), strict=True))
    weights = torch.tensor([len(part) for part, _ in parts], dtype=torch.float64) / len(x)
    means, errors = [], []
    for t in with_bar(times, f"loss of {model.label}"):
        losses = [model.flow.loss(model.net, xs, zs, torch.full((len(xs),), t, device=x.device)) for xs, zs in parts]
        losses = torch.stack(losses).cpu().double()
        means.append((losses * weights).sum().item())
        errors.append(losses.std().item() / math.sqrt(len(losses)))
    return {"mean": means, "error": errors}


def loss(path: Path, *, source: str | None, size: int | None, match_size: str | None, count: int, steps: int,
         label, batch: int, precision: str, seed: int, device: torch.device, out: Path) -> dict:
    """The model's loss at COUNT_OF_TIMES times under random, matched and its own pairs."""
    models = load_models([path], device, steps=[steps], labels=label and [label], precision=precision)
    if match_size is not None:
        parse_counts("--match-size", match_size, at_least=2)
    images = load_data(source, models, size=size, count=count)
    match_sizes = pick_match_sizes(match_size, images, default=MATCH_SIZES[-1:])
    served = whole_pools(images, match_sizes, count)
    out = make_folder(out)
    times, curves = [(i + 0.5) / COUNT_OF_TIMES for i in range(COUNT_OF_TIMES)], {}
    for one in (0, *match_sizes):
        name = f"matched, {one:,}" if one else "random"
        pairs = data_pairs(images, one, count, served, seed=seed, device=device)
        curves[name] = loss_by_time(models[0], *pairs, times, batch)
    own = own_pairs(models[0], range(count), steps, seed=seed, batch=batch, device=device)
    curves["own"] = loss_by_time(models[0], own.x, own.z, times, batch)
    result = {"models": [models[0].described()], "data": source or models[0].about["data"], "count": count,
              "steps": steps, "seed": seed, "times": times, "curves": curves, "hardware": hardware(device)}
    write_json(out / "loss.json", result)
    table = make_table(f"Loss of {models[0].label}, {counted(count, 'pair')} each", "t < 1/3", "1/3 ≤ t < 2/3",
                       "2/3 ≤ t", "mean")
    for name, curve in curves.items():
        thirds = [[mean for mean, t in zip(curve["mean"], times, strict=True) if low <= 3 * t < low + 1]
                  for low in range(3)]
        table.add_row(name, *(f"{np.mean(some):.4f}" for some in (*thirds, curve["mean"])))
    console.print(table)
    from . import figures

    names = figures.draw_loss(times, curves, models[0].about["flow"], out / "loss")
    say_files(out, "loss.json", *names)
    return result
