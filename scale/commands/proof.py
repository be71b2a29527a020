"""dansm proof: does matching pay?"""

import math
import time
from pathlib import Path
from typing import Annotated

import typer

from dansm import BadInput, check_choice

from ..base import files, locks, machine, text
from .options import Device, InceptionWeights, command_app

app = command_app()


@app.command()
def proof(
    data: Annotated[str, typer.Option(help="images, as for dansm train")] = "cifar10",
    only: Annotated[str | None, typer.Option(
        help="comma-separated run names, prior (tests the noises) or rates (times each run, with nothing else on the "
             "device); an unknown name prints the list", show_default="all but rates")] = None,
    minutes: Annotated[float, typer.Option(min=0, help="end this call after this many; 0: when all is done")] = 0.0,
    work: Annotated[Path | None, typer.Option(help="folder of the runs", show_default="runs in --out")] = None,
    cache: Annotated[Path | None, typer.Option(help="folder that keeps the decoded images")] = None,
    features: Annotated[str, typer.Option(help="inception makes the distances standard FIDs")] = "efficientnet-lite0",
    inception_weights: InceptionWeights = None,
    device: Device = "auto",
    out: Annotated[Path, typer.Option(help="folder of the tables, which are added to, and the figures")] = (
        Path("runs/proof")),
) -> None:
    """Does matching pay? Equal runs, paired in many ways; adds what is missing to the tables in --out."""
    from ..evaluate.extractors import load_extractor
    from ..studies import proof as study
    from ..studies.proof_figures import draw
    from ..studies.proof_runs import RUNS, command_of, runs_left, summarize

    names = [*RUNS, "prior"] if only is None else only.split(",")
    for name in names:
        check_choice("--only", name, [*RUNS, "prior", "rates"])
    end = time.monotonic() + 60 * minutes if minutes else math.inf
    settings = {"evaluate_features": features, "inception_weights": str(inception_weights or ""),
                "cache": str(cache or "")}
    device = machine.pick_device(device)
    gpu = machine.hardware(device)["gpu"] or "CPU"
    call = study.Call(data, files.make_folder(out), work or out / "runs", device, settings, gpu)
    rows, runs = study.read(out), [name for name in names if name in RUNS]
    study.read(out, "speed.csv")  # a damaged table must be refused before hours of work
    study.read(out, "prior.csv")
    study.check_same(rows, out, features=features)
    left = runs_left(runs, rows)
    tests_prior = names == ["prior"] or ("prior" in names and not minutes)
    if left:
        load_extractor(features, call.device, inception_weights)
    if left or tests_prior or "rates" in names:
        call.read_images()
        if names == ["prior"] and len(call.images) < study.PRIOR:
            raise BadInput(f"--only is prior, and {data} has {text.counted(len(call.images), 'image')}: expected "
                           f"{study.PRIOR:,} or more")
        study.check_same(rows, out, data=call.images_name)
    text.say(f"{text.counted(len(left), 'run')} of {sum(RUNS[name].seeds for name in runs)} to go")
    if left:
        commands = [command_of(run, seed, data, **settings) for run, seed in runs_left(list(RUNS), [])]
        with locks.alone(out / ".lock"), files.replacing(out / "commands.txt") as partial:
            partial.write_text("".join(f"{command}\n" for command in commands))
    stopped = study.train_all(call, left, end) or ("rates" in names and study.measure_rates(call, end))
    with locks.alone(out / ".lock"):
        rows = study.read(out)
        if summary := summarize(rows):  # empty before two runs can be compared
            files.write_csv(out / "summary.csv", summary)
        tables = ("distances.csv", "speed.csv", "summary.csv", "commands.txt")
        tables = [name for name in tables if (out / name).exists()]
        if rows or (tables and "rates" in names):
            text.say_files(out, *tables, *draw(rows, study.read(out, "speed.csv"), out))
    if remaining := left and runs_left(runs, rows):
        text.say(f"{text.counted(len(remaining), 'run')} to go: the same command resumes")
    if tests_prior and not stopped:
        with locks.alone(out / ".prior.lock"):  # a call that waits here finds what this one has measured
            study.test_prior(call)
