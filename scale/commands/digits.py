"""dansm digits: first images, handwritten digits of 8×8 pixels."""

import importlib
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

import dansm

from ..base import files, machine, text
from ..base.statistics import frechet_distance
from ..model.recipe import parse_counts
from .options import Device, Out, Seed, command_app

app = command_app()


@app.command()
def digits(
    match_size: Annotated[int, typer.Option(min=2, help="noises in the pool, compared with random pairs")] = 1000,
    steps: Annotated[int, typer.Option(min=1, help="training steps for each way of pairing")] = 500,
    batch: Annotated[int, typer.Option(min=1, help="images a step; a batch of 1 has no choice without a pool")] = 64,
    pairs: Annotated[str, typer.Option(
        help="comma-separated ways of pairing: random, greedy (by squared distance), priced, optimal (within each "
             "batch), semidiscrete")] = "random,greedy",
    evaluate_at: Annotated[str | None, typer.Option(
        help="comma-separated training steps after which to evaluate, for a curve of distance against images")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="trainings for each way of pairing, for the spread")] = 2,
    seed: Seed = 0,
    device: Device = "auto",
    out: Out = Path("runs/digits"),
) -> None:
    """First images in a minute: handwritten digits, paired at random and matched, side by side."""
    from dansm.tiny import comparison
    from dansm.tiny import digits as tiny

    torch.set_num_threads(1)  # so small a network gains little by two, which on a busy machine wait for each other
    importlib.import_module("matplotlib")  # if it is missing, that is told before anything is trained
    marks = parse_counts("--evaluate-at", evaluate_at, at_most=steps) if evaluate_at else []
    ways = list(dict.fromkeys(way.strip() for way in pairs.split(",")))
    for way in ways:
        dansm.check_choice("--pairs", way, list(tiny.LOOKS))
    settings = tiny.Settings(match_size, batch, ways, steps, sorted({*marks, steps}), list(range(seed, seed + seeds)))
    images = tiny.load_digits().to(machine.pick_device(device))
    dansm.NoisePool(match_size, images.shape[1:], device=images.device)  # refused here, not after other trainings
    halves = np.array_split(np.random.default_rng(0).permutation(len(images)), 2)
    floor = frechet_distance(*(images[half] for half in halves))
    result = {"data": "1,797 digits of scikit-learn, 8×8", **asdict(settings), "step_counts": tiny.STEP_COUNTS,
              "hardware": machine.hardware(images.device), "runs": [], "real_half_against_half": floor}
    (files.make_folder(out) / "curve.png").unlink(missing_ok=True)  # from an earlier call
    for by_way in comparison.each_seed(partial(tiny.train_and_evaluate, images, settings), ways, settings.seeds,
                                       out / "digits.json", images.device):
        result["runs"] += [run for runs, _ in by_way.values() for run in runs]
        files.write_json(out / "digits.json", result)  # after each seed: it stays when the command is stopped
        tiny.draw_picture(result, settings, {way: samples for way, (_, samples) in by_way.items()}, out / "digits.png")
        if len(settings.marks) > 1:
            tiny.draw_curve(result, settings, out / "curve.png")
    rows = [{"way": settings.name(run["method"]), "path length": run["path_length"]}
            | {text.counted(count, "step"): distance for count, distance in run["distance"].items()}
            for run in result["runs"] if run["trained_steps"] == steps]
    comparison.print_table(rows, f"Digits, {steps:,} steps of {batch}",
                           f"Steps: Fréchet distance in 64 pixels; real digits, half against half: {floor:.2f}.")
    text.say_files(out, *(name for name in ("digits.png", "curve.png", "digits.json") if (out / name).exists()))
