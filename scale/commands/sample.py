"""dansm sample: images from a trained network."""

import math
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from dansm import BadInput

from ..base.files import make_folder, read_json, write_json
from ..base.machine import hardware, pick_device
from ..base.text import Stopped, counted, say, say_files, shorten, with_bar
from ..model import sampling
from ..model.checkpoint import newest
from ..model.load import load_models
from . import options

SHOWN = 400  # images in samples.png at most
COLUMNS = 20  # classes at most of which each gets columns of its own there

app = options.command_app()


@app.command()
def sample(
    model: options.Model,
    count: Annotated[int, typer.Option(min=1, help="number of images")] = 64,
    steps: Annotated[int, typer.Option(min=1, help="steps from noise to image; more is better and slower")] = 20,
    solver: options.Solver = "euler",
    classes: Annotated[str | None, typer.Option(
        "--class", help="comma-separated names or numbers of classes, drawn in turn", show_default="all")] = None,
    guidance: options.Guidance = "1",
    guidance_interval: options.GuidanceInterval = "0,1",
    batch: options.SampleBatch = 0,
    files: Annotated[bool, typer.Option(help="also write every image to a file of its own")] = False,
    precision: options.Precision = "auto",
    autoencoder: options.DecodeWith = None,
    memory: options.DecodeMemory = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    out: options.Out = Path("runs/sample"),
) -> None:
    """Draw images from a trained network. Image 17 of a seed is the same for any --count and --batch."""
    device = pick_device(device)
    trained, *others = load_models([model], [steps], solver=solver, guidance=guidance, interval=guidance_interval)
    if others:
        raise BadInput(f"--guidance is {guidance}: expected one number")
    chosen = trained.classes_of(classes)
    trained = trained.with_decoder(autoencoder, device, precision, memory)
    out = make_folder(out)
    made_from = {"checkpoint": str(trained.about["file"]), "trained_steps": trained.about["step"], "steps": steps,
                 "solver": solver, "precision": precision, "seed": seed,
                 "autoencoder": autoencoder and str(autoencoder)}
    if chosen:
        names = ", ".join(trained.classes[number] for number in chosen)
        made_from |= {"class": names if classes else "all", **trained.guided_by()}
    check_folder(out, made_from, count)
    if files:
        write_json(out / "sample.json", {**made_from, "count": 0})  # so that after a kill the same call may repeat
    begin = time.perf_counter()
    ready = trained.on(device, precision)
    batch = batch or sampling.at_once(trained.net, device, trained.guidance)
    labels = sampling.labels_in_turn(range(count), chosen) if chosen else None
    draws = sampling.sample_images(ready.net, ready.flow, range(count), ready.shape, steps, seed=seed, batch=batch,
                                   device=device, decode=ready.decode, labels=labels, guidance=ready.guidance)
    done = 0
    shown = []
    try:
        for images in with_bar(draws, "sampling", math.ceil(count / batch)):
            if files:
                for number, image in enumerate(images, done):
                    sampling.save_grid(image[None], out / f"{number:06d}.png", enlarge=1)
            done += len(images)
            shown += images[: SHOWN - len(shown)]
    except KeyboardInterrupt:
        if not shown:
            raise
    seconds = time.perf_counter() - begin
    columns = None
    if 1 < len(chosen) <= COLUMNS:
        columns = len(chosen) * max(1, round(len(shown) ** 0.5 / len(chosen)))  # so that each is of one class
    sampling.save_grid(torch.stack(shown), out / "samples.png", columns=columns)
    write_json(out / "sample.json", {**made_from, "count": done, "recipe": trained.about["recipe"],
                                     "seconds": round(seconds, 2), "hardware": hardware(device)})
    say(f"{counted(done, 'image')} in {counted(steps, 'step')} each: {seconds:.1f} s")
    if chosen:
        say(f"classes in turn: {shorten(names, 300)}")
    say_files(out, "samples.png", "sample.json", *(["000000.png and so on"] if files else []))
    if done < count:
        raise Stopped(f"stopped after {done:,} of {counted(count, 'image')}")


def check_foreign_samples(out: Path, ours: bool) -> None:
    """BadInput if `out` holds a samples.png that no call of `dansm` wrote."""
    if not ours and (out / "samples.png").exists():
        raise BadInput(f"--out is {out}, which holds a samples.png of another program: expected another folder")


def check_folder(out: Path, made_from: dict, count: int) -> None:
    """BadInput if `out` holds a run, or images that this call would mix with its own."""
    if newest(out):
        raise BadInput(f"--out is {out}, which holds a run with its own samples.png: expected another folder")
    check_foreign_samples(out, (out / "sample.json").exists())
    held = len(list(out.glob("[0-9]*.png")))
    if not held:
        return
    description = out / "sample.json"
    before = read_json(description) if description.exists() else {}
    differences = [f"{name} {before.get(name)} → {value}" for name, value in made_from.items()
                   if before.get(name) != value]
    if held > count:
        differences.append(f"count {held} → {count}")
    if differences:  # whoever evaluates the folder would take them for images of one model
        raise BadInput(f"--out is {out}, which holds {counted(held, 'image')} of another call "
                       f"({', '.join(differences)}): expected another folder, or the same call with at least as many")
