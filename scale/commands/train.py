"""dansm train: train a network on images or latents by a recipe."""

import inspect
import re
import shlex
from collections.abc import Callable, Collection
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

import torch
import typer
from rich.markup import escape

from dansm import BadInput

from ..base.files import make_folder, write_json
from ..base.locks import owning
from ..base.machine import hardware, leave_out_compiler, pick_device
from ..base.processes import processes, quiet, ranks
from ..base.text import Stopped, counted, say, say_files, with_bar
from ..data import loader
from ..data.labels import Labels
from ..data.latents import known_of
from ..model import checkpoint
from ..model.recipe import SETTINGS, Recipe, as_option, check_without_labels, load, names, shown
from ..train import auto
from ..train import run as training
from ..train.folder import starts_over
from .options import Device
from .sample import check_foreign_samples

PAPERS = "ncsnpp", "ddpm"  # networks
VALUES = {int: "N", float: "X", str: "NAME"}  # in the help

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")


def describe() -> str:
    """The help of the command, with a line for each recipe."""
    lines = "\n".join(f"  {name:17}  {what}" for name, what in names().items())
    return ("Train on images by a recipe. Ctrl-C saves; the same command resumes.\n\n"
            "Writes checkpoint-00001200.pt (of its step; the last few), metrics.jsonl, train.json, recipe.toml and "
            "samples.png into --out.\n\n"
            "An option replaces what the recipe has. In brackets: the default. Lists are comma-separated, as in "
            "--ema-decay 0.9999,0.999.\n\n"
            f"Recipes:\n\n\b\n{escape(lines)}")


def with_settings(command: Callable) -> Callable:
    """Give the command an option for each setting of a recipe, None where it is not given."""
    options = {name: option_of(name, rules) for name, rules in SETTINGS.items()}
    signature = inspect.signature(command)
    parameters = [parameter for name, parameter in signature.parameters.items() if name != "given"]
    parameters += [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
                   for name, annotation in options.items()]
    command.__signature__ = signature.replace(parameters=parameters)
    return command


def option_of(name: str, rules: SimpleNamespace):
    """The option called `name` of a setting. Values are taken as text, which the recipe checks as it checks files."""
    option = as_option(name)
    text = rules.text
    if rules.choices:
        text += ": " + ", ".join(rules.choices)
    if not rules.optional and name != "data":
        text += f" [{shown(rules.default).lower() or 'none'}]"
    about = dict(help=escape(text), rich_help_panel=rules.part)
    if rules.kind is bool:
        return Annotated[bool | None, typer.Option(f"{option}/--no-{option[2:]}", **about)]
    value = VALUES[rules.kind] + (",…" if rules.several else "")
    return Annotated[str | None, typer.Option(option, metavar=value, **about)]


@app.command(help=describe())
@with_settings
def train(
    recipe: Annotated[str, typer.Argument(
        metavar="RECIPE", show_default=False,
        help="a recipe's name, a .toml file of your own, or data: a folder of images (with subfolders), a zip or tar "
             "of them, several as shards-{000..009}.tar, an LSUN lmdb, arrays of images or latents (.npy, .npz, "
             ".safetensors, .pt), or cifar10")],
    *,
    out: Annotated[Path | None, typer.Option(
        metavar="PATH", help=escape("folder for the results, made if missing [runs/ and the name of the recipe or of "
                                    "the data; for the recipe.toml of a run that run's]"))] = None,
    device: Device = "auto",
    fresh: Annotated[bool, typer.Option(
        "--fresh", help="start over; checkpoints in --out are deleted when the new run first saves")] = False,
    all_steps: Annotated[bool, typer.Option(
        "--all-steps", help="exit with 130 unless all --steps are done, for scripts")] = False,
    **given,
) -> None:
    device = pick_device(device)
    if device.type == "cuda":  # elsewhere each step of the optimizer imports it too
        leave_out_compiler()
    if recipe not in names() and checkpoint.newest(Path(recipe)):
        raise BadInput(f"{recipe} is a run, not data: expected its recipe, {recipe}/recipe.toml, to resume it")
    given = {name: value for name, value in given.items() if value is not None}
    settings = load(recipe, given)
    if settings.labels == "none":
        check_without_labels(settings, "--labels is none", given)
    if recipe in names() and recipe.startswith("latent"):
        loader.check_latents(settings.data)
    finished = run(settings, out or folder_of_run(recipe), device, fresh, given)
    if all_steps and not finished:
        raise Stopped("not all steps are done, as --all-steps requires")


def folder_of_run(source: str) -> Path:
    """The folder of a run without --out: named after the recipe or the data, or the one its own recipe.toml is in."""
    path = Path(source)
    if path.name == "recipe.toml" and checkpoint.newest(path.parent):
        return path.parent
    name = source if source in names() else re.split(r"\W*[.{]", path.resolve().name)[0]  # without suffix or pattern
    return Path("runs") / (name or "train")


def run(recipe: Recipe, out: Path, device: torch.device, fresh: bool, given: Collection[str] = ()) -> bool:
    """Read the data, train, and write what the run was with a grid of samples. Returns whether all steps are done.
    Under torchrun every process does so, and the first one prints and writes."""
    loader.check_out(recipe.data, out)
    is_new = not out.exists()
    make_folder(out)
    check_foreign_samples(out, bool(checkpoint.newest(out)) or (out / "metrics.jsonl").exists())
    with processes(device) as device:
        first = ranks()[0] == 0
        try:
            with owning(out) if first else nullcontext(), quiet(not first):
                return read_and_train(recipe, out, device, fresh, given)
        except BadInput:
            if is_new and first and [path.name for path in out.iterdir()] == [".lock"]:  # nothing was written
                (out / ".lock").unlink()
                out.rmdir()
            raise


def read_and_train(recipe: Recipe, out: Path, device: torch.device, fresh: bool, given: Collection[str]) -> bool:
    training.check(recipe, device)
    images, left_out = training.read_data(recipe)
    labels = training.read_labels(recipe, images, left_out)
    over = starts_over(out, fresh)
    recipe = auto.settled(recipe, images.shape, labels, device, None if over else out)
    advise(recipe, device, labels if auto.groups_of(labels, recipe) else None, given)
    summary, net, flow = training.fit(images, recipe, out=out, fresh=fresh, device=device, labels=labels)
    finished = summary["steps"] >= recipe.steps
    if ranks()[0]:
        return finished
    written = []
    if summary["this_call"]["steps"]:
        write_json(out / "train.json", {"data": recipe.data, "data_images": len(images),
                                        "unreadable_images": len(left_out), "hardware": hardware(device), **summary})
        written = [checkpoint.newest(out).name, "metrics.jsonl", "train.json", "recipe.toml"]
        say(f"{counted(summary['images'], 'image')} in {counted(summary['steps'], 'step')},",
            f"{summary['this_call']['images_per_second']:,} a second")
    elif finished:
        say(f"already at step {summary['steps']:,} of --steps {recipe.steps:,}: nothing to do; more --steps resume it")
    if not finished:
        say(f"stopped at step {summary['steps']:,} of {recipe.steps:,}, saved; this command without --fresh resumes")
    pictures = known_of(images) is None
    if pictures and written and not summary["interrupted"]:
        rows = training.rows_of_grid(net, recipe, device, summary["this_call"]["steps"])
        training.draw_grid(net, flow, recipe, device, out / "samples.png", batch=8, rows=rows,  # for a bar
                           track=lambda draws: with_bar(draws, "sampling", total=rows))
        written.insert(0, "samples.png")
    if written:
        say_files(out, *written)
    if pictures:
        say("images from it: dansm sample", shlex.quote(str(out)))
    return finished


def advise(recipe: Recipe, device: torch.device, labels: Labels | None, given: Collection[str]) -> None:
    """Say what is likely not meant. labels: by which each class has a pool of its own; given: the options."""
    if device.type == "cpu" and recipe.network in PAPERS and recipe.width is None:
        say(f"on a CPU {recipe.network} takes seconds for each image: --network tiny is for CPUs")
    for name, rules in SETTINGS.items():
        if name in given and rules.methods and recipe.method not in rules.methods:
            say(f"{as_option(name)} has no effect with --method {recipe.method}")
    if advice := auto.safe_size(recipe, labels):
        say(advice)
