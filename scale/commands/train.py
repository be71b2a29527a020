"""What `dansm train` and `dansm sample` do around the trainer and the network: options, files, and what is said."""

from __future__ import annotations

import inspect
import json
import math
import shlex
import time
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.distributed as group
import typer
from rich.markup import escape
from rich.progress import track

import dansm

from ..base.files import make_folder, write_json
from ..base.locks import owning
from ..base.machine import hardware, number_type, pick_device
from ..base.processes import processes, quiet, ranks
from ..base.text import Stopped, console, counted, say, say_files
from ..data import loader
from ..data.latents import known_of
from ..model import checkpoint, sampling
from ..model.load import decoder_for
from ..model.recipe import SETTINGS, Recipe, kind_of, load, names, shown
from ..model.sampling import at_once, sampler
from ..train import fit
from ..train.judge import check_asked

WORDS = {int: "N", float: "X", str: "NAME"}  # that stand in the help for a value


def _help() -> str:
    known = names()
    width = max(map(len, known))
    lines = "\n".join(f"  {name:{width}}  {says}" for name, says in known.items())
    return (f"Train on images by a recipe. Ctrl-C saves; the same command resumes.\n\n"
            "Writes checkpoint-00001200.pt (of its step; the last few), metrics.jsonl, train.json, recipe.toml and "
            "samples.png into --out.\n\n"
            "An option given here goes before what the recipe says. In brackets: what holds where neither says "
            "anything. Several numbers are parted by commas, as in --decay 0.9999,0.999.\n\n"
            f"Recipes:\n\n\b\n{escape(lines)}")


def _with_options(function):
    """`function` with a parameter for each setting, None where it is not given: what Typer makes the options of."""
    text = ("a recipe's name, a .toml file of your own, or data: a folder of images (with subfolders), a zip or tar of "
            "them, an LSUN lmdb, latents (.npy), or cifar10")
    source = Annotated[str, typer.Argument(help=text, metavar="RECIPE", show_default=False)]
    device = Annotated[Literal["auto", "cpu", "cuda", "mps"], typer.Option(
        help="auto takes the fastest there is", metavar="NAME", rich_help_panel="Where")]
    out = Annotated[Path | None, typer.Option(
        help="folder for the results, made if missing " + escape(
            "[runs/ and the recipe's or the data's name; of a run's own recipe.toml that run's]"),
        metavar="PATH", rich_help_panel="Where")]
    fresh = Annotated[bool, typer.Option("--fresh", rich_help_panel="Where",
                                         help="begin anew where --out holds a run already, whose checkpoints go when "
                                              "the new one first saves")]
    all_steps = Annotated[bool, typer.Option("--all-steps", rich_help_panel="Where",
                                             help="exit code 130, not 0, if stopped before --steps: what a script has "
                                                  "after it waits")]
    taken = {"recipe": (source, inspect.Parameter.empty)} | {name: (_option(name), None) for name in SETTINGS}
    taken |= {"out": (out, None), "device": (device, "auto"), "fresh": (fresh, False), "all_steps": (all_steps, False)}

    def command(**given):
        try:
            function(**given)
        except KeyboardInterrupt as stop:
            raise Stopped("stopped at once; what was saved before is kept") from stop

    command.__signature__ = inspect.Signature([
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)
        for name, (annotation, default) in taken.items()])
    return command


def _option(name: str):
    """The option of a setting. All but the switches are taken as text, for the recipe to check as it checks files."""
    field, kind, option = SETTINGS[name], kind_of(name), "--" + name.replace("_", "-")
    rules, switch = field.metadata, kind.type is bool
    text = rules["text"] + (": " + ", ".join(rules["choices"]) if rules["choices"] else "")
    if not kind.optional and name != "data":
        text += f" [{('yes' if field.default else 'no') if switch else shown(field.default) or 'none'}]"
    word = "" if switch else WORDS[kind.type] + ",…" * kind.several
    return Annotated[(bool if switch else str) | None, typer.Option(
        f"{option}/--no-{option[2:]}" if switch else option, help=escape(text), metavar=word,
        rich_help_panel=rules["part"])]


def _by_options(recipe: str, out: Path | None, device: str, fresh: bool, all_steps: bool, **given) -> None:
    """Read the recipe and train by it. `given`: the settings of the command line, None where it says nothing."""
    overrides = {name: parse(name, value) for name, value in given.items() if value is not None}
    device = pick_device(device)
    if Path(recipe).is_dir() and recipe not in names() and checkpoint.newest(Path(recipe)):
        raise dansm.BadInput(f"{recipe} is a run, and no data: expected its recipe, {Path(recipe) / 'recipe.toml'}, to "
                             "go on with it")
    settings = load(recipe, overrides)
    if recipe in names() and recipe.startswith("latent"):
        check_latents(settings.data)
    whole = run(settings, out or folder_of_run(recipe), device, fresh)
    if all_steps and not whole:
        raise Stopped("not all steps are made, as --all-steps asks for; what comes after waits until they are")


def check_latents(source: str) -> None:
    """BadInput for the data of a recipe for latents that is not there, or is images."""
    path = Path(source)
    if not path.exists() or loader.files_of(path)[0].suffix.lower() != ".npy":
        found = "does not exist" if not path.exists() else "holds images"
        raise dansm.BadInput(f"{source} {found}: expected latents, which dansm encode makes of images, there or in the "
                             "folder that --data names")


def parse(name: str, text: str | bool):
    """The value that `text` is for a setting; or `text` itself if it is none, which the recipe then refuses."""
    kind = kind_of(name)
    if kind.type in (str, bool):
        return text
    try:
        return [kind.type(one) for one in text.split(",") if text] if kind.several else kind.type(text)
    except ValueError:
        return text


def folder_of_run(source: str) -> Path:
    """Where a run goes that is not told: of the recipe's name or, where there is none, the data's. A recipe.toml that
    lies in a run's folder is that run."""
    path = Path(source)
    if path.name == "recipe.toml" and checkpoint.newest(path.parent):
        return path.parent
    return Path("runs") / (source if source in names() else path.resolve().name.split(".")[0] or "train")


def run(recipe: Recipe, out: Path, device: torch.device, fresh: bool) -> bool:
    """Read the data, train, write what the run was and a grid of samples, and say where they are. Under torchrun every
    process does so, and the first one speaks and writes. Returns whether all steps are made."""
    sampling.check_steps("--sample-steps", recipe.sample_steps, dansm.FLOWS[recipe.flow])
    loader.check_out(recipe.data, out)
    new, out = not out.exists(), make_folder(out)
    check_pictures_of_others(out, checkpoint.newest(out) or (out / "metrics.jsonl").exists())
    with processes(device) as device:
        first = ranks()[0] == 0
        try:
            with owning(out) if first else nullcontext(), quiet(not first):
                return _read_and_train(recipe, out, device, fresh, first)
        except dansm.BadInput:
            if new and first:
                forget(out)
            raise


def forget(out: Path) -> None:
    """Remove the folder of a run that was refused before it wrote anything."""
    with suppress(OSError):
        if [path.name for path in out.iterdir()] in ([], [".lock"]):
            (out / ".lock").unlink(missing_ok=True)
            out.rmdir()


def check_place(recipe: Recipe, device: torch.device, new: bool) -> None:
    """BadInput for what this device, or so many processes, cannot do: to be told before minutes of reading."""
    number_type(recipe.precision, device)
    if recipe.match_scope == "global" and not group.is_initialized():
        raise dansm.BadInput("--match-scope is global, for several processes: expected the command under torchrun, or "
                             "rank")
    fit.check_parts(recipe)
    if new:
        check_asked(recipe)


def _read_and_train(recipe, out, device, fresh, first) -> bool:
    check_place(recipe, device, new=fresh or not checkpoint.newest(out))
    images, left_out = read(recipe)
    if device.type == "cpu" and recipe.network != "small" and recipe.width is None:
        say(f"on a CPU {recipe.network} takes seconds for each image: --network small is made for one")
    if recipe.method == "greedy" and recipe.match_size > (seen := recipe.steps * recipe.batch):
        say(f"the pool of {counted(recipe.match_size, 'noise')} outlasts the {counted(seen, 'image')} of all steps:",
            "those trained on are not N(0, I); a smaller --match-size, emptied several times, is safer")
    summary, net, flow = fit.fit(images, recipe, out=out, fresh=fresh, device=device, console=console)
    whole = summary["steps"] >= recipe.steps
    if not first:
        return whole
    saved, grid, written = checkpoint.newest(out), out / "samples.png", []
    if summary["this_call"]["steps"]:
        write_json(out / "train.json", {
            "data": recipe.data, "data_images": len(images), "unreadable_images": left_out,
            "hardware": hardware(device), **summary})
        written = [saved.name, "metrics.jsonl", "train.json", "recipe.toml"]
        say(f"{counted(summary['images'], 'image')} in {counted(summary['steps'], 'step')},",
            f"{summary['this_call']['images_per_second']:,} a second")
    elif whole:
        say(f"already at step {summary['steps']:,} of --steps {recipe.steps:,}: nothing to do; a larger --steps",
            "goes on")
    if not whole:
        say(f"stopped at step {summary['steps']:,} of {recipe.steps:,}, saved;",
            f"the same command{' without --fresh' * fresh} goes on")
    pictures = known_of(images) is None
    current = grid.exists() and grid.stat().st_mtime >= saved.stat().st_mtime  # it is this checkpoint's already
    if pictures and not summary["interrupted"] and not current:
        drawing = sampler(net, device, recipe.precision, recipe.compile)
        sample_grid(drawing, flow, images.shape[1:], recipe.sample_steps, recipe.seed, device, saved, grid)
        written.insert(0, "samples.png")
    if written:
        say_files(out, *written)
    if pictures:
        say("images from it: dansm sample", shlex.quote(str(out)))
    return whole


def read(recipe: Recipe):
    """The recipe's data, and how many files were left out. Of several processes the first downloads."""
    left_out, first = [], ranks()[0] == 0
    if recipe.data == "cifar10" and not first:
        group.barrier()
    images = loader.load_images(recipe.data, size=recipe.size or None, skip_unreadable=recipe.skip_unreadable,
                              cache=Path(recipe.cache) if recipe.cache else None, share=ranks()[1] > 1,
                              left_out=left_out, track=_track_reading)
    if recipe.data == "cifar10" and first and ranks()[1] > 1:
        group.barrier()
    if left_out:
        say(f"left out {len(left_out):,} of {counted(len(images) + len(left_out), 'image')}, not readable:",
            ", ".join(map(str, left_out[:3])) + ", …" * (len(left_out) > 3))
    kind = "image" if known_of(images) is None else "latent"
    say(f"{counted(len(images), kind)} of {'×'.join(map(str, images.shape[1:]))}")
    if kind == "latent" and recipe.flip:
        say("half are mirrored, as asked: not the latents of the mirrored images, which dansm encode --flips makes")
    return images, len(left_out)


def _track_reading(parts, total):
    return track(parts, "reading images", total=total, console=console)


def sample_grid(net, flow, shape, steps: int, seed: int, device, saved: Path, path: Path) -> None:
    """64 images of a trained network, eight at a time so that the time left can be told."""
    try:
        draws = sampling.sample_images(net, flow, range(64), shape, steps, seed=seed, batch=8, device=device)
        sampling.save_grid(torch.cat(list(track(draws, "sampling", total=8, console=console))), path)
    except KeyboardInterrupt as stop:
        raise Stopped(f"stopped; the run is saved in {saved}") from stop


def sample(model: Path, device: torch.device, out: Path, *, count: int, steps: int, solver: str, batch: int,
           files: bool, precision: str, seed: int, autoencoder: Path | None = None,
           memory: float | None = None) -> None:
    """Draw images 0 … count − 1 of a seed from a run, a checkpoint or exported weights, and decode latents."""
    net, flow, about = checkpoint.load_model(model, device, solver, say=say)
    sampling.check_steps("--steps", steps, type(flow))
    decoder = decoder_for(model, net.settings["channels"], about, autoencoder, device, precision, memory)
    out, made_from = make_folder(out), {
        "checkpoint": str(about["file"]), "trained_steps": about["step"], "steps": steps, "solver": solver,
        "precision": precision, "seed": seed, "autoencoder": autoencoder and str(autoencoder)}
    if checkpoint.newest(out):
        raise dansm.BadInput(f"--out is {out}, which holds a run, whose sampling.png this would take the place of: "
                             "expected another folder")
    check_pictures_of_others(out, (out / "sample.json").exists())
    check_numbered(out, made_from, count)
    if files:
        write_json(out / "sample.json", {**made_from, "count": 0})  # whose images these are, if it is killed
    batch = batch or at_once(net, device)
    begin, drawn_so_far, shown = time.perf_counter(), 0, []
    draws = sampling.sample_images(sampler(net, device, precision), flow, range(count), net.shape, steps, seed=seed,
                                batch=batch, device=device, decode=decoder and decoder.decode)
    try:
        for drawn in track(draws, "sampling", total=math.ceil(count / batch), console=console):
            for number, image in enumerate(drawn if files else (), drawn_so_far):
                sampling.save_grid(image[None], out / f"{number:06d}.png", enlarge=1)
            drawn_so_far += len(drawn)
            shown += drawn[: 400 - len(shown)]
    except KeyboardInterrupt:
        if not shown:
            raise
    seconds = time.perf_counter() - begin
    sampling.save_grid(torch.stack(shown), out / "samples.png")
    write_json(out / "sample.json", {
        **made_from, "count": drawn_so_far, "recipe": about["recipe"], "seconds": round(seconds, 2),
        "hardware": hardware(device)})
    say(f"{counted(drawn_so_far, 'image')} in {counted(steps, 'step')} each: {seconds:.1f} s")
    say_files(out, "samples.png", "sample.json", *(["000000.png and so on"] if files else []))
    if drawn_so_far < count:
        raise Stopped(f"stopped after {drawn_so_far:,} of {counted(count, 'image')}")


def check_pictures_of_others(out: Path, ours: bool) -> None:
    """BadInput if `out` holds a sampling.png and nothing beside it that says it is of a call of ours."""
    if not ours and (out / "samples.png").exists():
        raise dansm.BadInput(f"--out is {out}, which holds a sampling.png that no dansm wrote, as it seems: expected "
                             "another folder, or that it is moved")


def check_numbered(out: Path, made_from: dict, count: int) -> None:
    """BadInput if `out` holds numbered images that this call would not write: whoever judges the folder would take
    those of two models for one's."""
    there = len(list(out.glob("[0-9]*.png")))
    try:
        before = json.loads((out / "sample.json").read_text())
    except (OSError, ValueError):
        before = {}
    others = [f"{name} {before.get(name)} → {value}" for name, value in made_from.items() if before.get(name) != value]
    others += [f"count {there} → {count}"] if there > count else []
    if there and others:
        raise dansm.BadInput(f"--out is {out}, which holds {counted(there, 'image')} of another call "
                             f"({', '.join(others)}): expected another folder, or the same call with as many")


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
app.command(help=_help())(_with_options(_by_options))
