"""dansm couple: solve the coupling of data with noises before a training, and measure it."""

import math
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.markup import escape
from torch import Tensor

import dansm

from ..base import files, machine, text
from ..data import loader
from ..data.labels import load_labels
from ..data.latents import known_of
from ..matching.semidiscrete import FastSemidiscrete
from ..matching.solver import evenness
from ..model.recipe import checked
from ..studies.conditions import MOST_BYTES, measure_leak
from ..studies.pairs import SERVED_AT_ONCE
from ..train.coupling import Samples, coupled, overall
from .options import Background, Device, Seed, Size, command_app

EACH, LEAST, POOL = 10, 10_000, 10_000  # noises counted for each sample at least, and in all; in the pool
MEASURES = {"share_error": ("shares off by, rms", ".1%"), "share_at_most": ("that and two deviations of it", ".1%"),
            "never_taken": ("samples never taken", ",.0f"), "least_share": ("least share", ".2f"),
            "largest_share": ("largest share", ".2f"), "inner": ("mean ⟨x, z⟩", ",.2f"),
            "squared_distance": ("mean ‖x − z‖²", ",.1f"), "noise_size": ("mean ‖z‖²/D", ".4f"),
            "class_told": ("class told from the noise", ".1%"),
            "class_mean_largest": ("class means in standard errors, largest", ".2f"),
            "class_mean_average": ("on average", ".2f"),
            "size_first_quarter": ("‖z‖²/D in the first quarter of a pool", ".3f"),
            "size_last_quarter": ("in the last", ".3f")}

app = command_app()


@app.command()
def couple(
    data: Annotated[str, typer.Argument(help="images or latents, as for dansm train")],
    size: Size = None,
    background: Background = "white",
    channels: Annotated[int, typer.Option(
        min=0, max=3, help="1 makes images grey, 3 coloured; 0: grey if all of them are")] = 0,
    labels: Annotated[str, typer.Option(
        help="classes of the data, as for dansm train: each is coupled within itself")] = "none",
    flip: Annotated[bool | None, typer.Option(
        "--flip/--no-flip", help="mirrored images are samples too", show_default="images yes, latents no")] = None,
    part: Annotated[int, typer.Option(min=1, help="samples that share a plan, at most")] = 100_000,
    error: Annotated[float, typer.Option(help="rms by which samples' shares of the noises may be off")] = 0.1,
    seed: Seed = 0,
    device: Device = "auto",
    memory: Annotated[float | None, typer.Option(
        help="gigabytes that the coupling takes at most", show_default="half of what the device has free")] = None,
    cache: Annotated[Path | None, typer.Option(
        help=escape("folder that keeps the potentials, and decoded images if it is given, as for dansm train "
                    "[potentials in ~/.cache/dansm]"), show_default=False)] = None,
    out: Annotated[Path | None, typer.Option(help="folder for couple.csv and couple.json, made if missing")] = None,
) -> None:
    """Couple data with noises, for dansm train --method semidiscrete. Ctrl-C saves; the same command resumes."""
    device = machine.pick_device(device)
    error, memory = checked("couple_error", error, "--error"), checked("memory", memory, "--memory")
    if out:
        loader.check_out(data, out)
    images = loader.load_images(data, size=size, background=background, channels=channels, cache=cache,
                                labels=labels)
    found = load_labels(data, labels, len(images))
    if found is None and labels != "none":
        text.say(f"{data} has no labels: all samples are one group")
    if out:
        files.make_folder(out)
    classes = found.numbers if found else None
    flip = known_of(images) is None if flip is None else flip
    coupling = coupled(images, flip=flip, labels=classes, part=part, error=error, seed=seed, device=device, cache=cache,
                       memory=memory)
    rows = compared(images, coupling, flip=flip, labels=classes, error=error, seed=seed)
    samples, parts = len(coupling.potentials), len(list(coupling.all_parts()))
    text.console.print(text.table(
        f"{text.counted(samples, 'sample')} in {text.counted(len(coupling.parts), 'group')} and "
        f"{text.counted(parts, 'part')}", ["", *(row["pairs"] for row in rows)],
        [[title, *(format(row[name], style) if name in row else "" for row in rows)]
         for name, (title, style) in MEASURES.items() if name in rows[-1]],
        caption="shares of fresh noises, 1 is even; for random pairs, what even ones give by chance"))
    if out:
        files.write_csv(out / "couple.csv", rows)
        files.write_json(out / "couple.json", {
            "data": data, "shape": list(images.shape[1:]), "samples": samples, "flip": flip, "labels": labels,
            "groups": len(coupling.parts), "parts": parts, "error": error, "seed": seed, "rows": rows,
            "hardware": machine.hardware(device)})
        text.say_files(out, "couple.csv", "couple.json")


def compared(images, coupling: FastSemidiscrete, *, flip: bool, labels: np.ndarray | None, error: float,
             seed: int) -> list[dict]:
    """A row for random pairs, with shares that are even but for chance; for one pool without labels, over its whole
    life; and for the coupling."""
    most = max(1, MOST_BYTES // (4 * math.prod(images.shape[1:])))
    batch, pool = min(SERVED_AT_ONCE, most), min(POOL, len(images), most)
    pool -= pool % batch if pool > batch else 0
    whole = max(pool, batch)
    steps = whole // batch * max(1, min(max(LEAST, len(images)), most) // whole)
    samples = Samples(images, flip)
    shuffled = partial(shuffled_batches, samples, coupling, batch, seed, labels is not None)
    even, shares = shares_of(coupling, error)
    one_pool = f"pool of {pool:,}" + ", labels ignored" * (labels is not None)
    ways = {"random": (even, dansm.pairs(shuffled(), "random", seed=seed)),
            one_pool: ({}, dansm.pairs(shuffled(), "greedy", pool, cost="squared", seed=seed)),
            "coupling": (shares, pairs_of(coupling, samples, batch, labels is not None))}
    return [{"pairs": name} | of_way | measured(pairs, steps, name, pool if name == one_pool else None)
            for name, (of_way, pairs) in ways.items()]


def shuffled_batches(samples: Samples, coupling: FastSemidiscrete, batch: int, seed: int,
                     labelled: bool) -> Iterator[Tensor | tuple[Tensor, Tensor]]:
    """Endless batches x, or (x, labels), of all samples in random order."""
    generator, left = torch.Generator().manual_seed(seed), torch.empty(0, dtype=torch.int64)
    while True:
        while len(left) < batch:
            left = torch.cat([left, torch.randperm(len(coupling.potentials), generator=generator)])
        taken, left = left[:batch], left[batch:]
        x = samples[taken].to(coupling.device)
        yield (x, coupling.labels[taken]) if labelled else x


def pairs_of(coupling: FastSemidiscrete, samples: Samples, batch: int, labelled: bool) -> Iterator[tuple]:
    """Endless batches (x, z), or (x, z, labels)."""
    while True:
        z, taken = coupling.draw(batch)
        taken = taken.cpu()
        x = samples[taken].to(z.device)
        yield (x, z, coupling.labels[taken]) if labelled else (x, z)


def measured(pairs: Iterator[tuple], steps: int, name: str, match_size: int | None) -> dict[str, float]:
    """Means over so many batches, and what z tells of the classes if they have labels. match_size: of the pool."""
    sums, noises, classes = 0, [], []
    for x, z, *labels in text.with_bar(islice(pairs, steps), name, steps):
        x, z = x.flatten(1), z.flatten(1)
        sums += torch.stack([(x * z).sum(1).mean(), (x - z).square().sum(1).mean(), z.square().mean()])
        if labels:
            noises.append(z)
            classes += labels
    means = dict(zip(("inner", "squared_distance", "noise_size"), (sums / steps).tolist(), strict=True))
    return means | (measure_leak(torch.cat(noises), torch.cat(classes), match_size) if classes else {})


def shares_of(coupling: FastSemidiscrete, error: float) -> tuple[dict, dict]:
    """What even shares give by chance, and what samples have of fresh noises: so many that they tell an `error`, at
    half the work of its solve at most. Both are counted within parts, as lots bring noises to parts."""
    n = len(coupling.potentials)
    taken = torch.zeros(n, dtype=torch.int64, device=coupling.device)
    each = max(EACH, min(10 * math.sqrt(2 / n), 0.5) / error**2)  # the square's deviation is √(2/n) / each, by chance
    steps = -(-max(LEAST, math.ceil(each * n)) // SERVED_AT_ONCE)
    for _ in text.with_bar(range(steps), "counting", steps):
        _, numbers = coupling.draw(SERVED_AT_ONCE)
        taken.index_add_(0, numbers, torch.ones_like(numbers))
    counts = [of_part for part in coupling.all_parts() if (of_part := taken[part.samples].cpu()).sum() > 1]
    lots = torch.Generator().manual_seed(coupling.seed)
    chance = [torch.randint(len(of_part), (int(of_part.sum()),), generator=lots).bincount(minlength=len(of_part))
              for of_part in counts]
    return evenness_of(chance), evenness_of(counts)


def evenness_of(counts: list[Tensor]) -> dict[str, float]:
    """How even the shares are of samples that were taken so often, (n,) for each part."""
    sizes = [len(of_part) for of_part in counts]
    even = [torch.full((size,), 1 / size) for size in sizes]
    solved = overall([evenness(of_part, share, 0) for of_part, share in zip(counts, even, strict=True)], sizes)
    shares = torch.cat([of_part * (len(of_part) / of_part.sum()) for of_part in counts])
    return {"share_error": solved.error, "share_at_most": solved.at_most,
            "never_taken": int((shares == 0).sum()), "least_share": shares.min().item(),
            "largest_share": shares.max().item()}
