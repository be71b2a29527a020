"""A class-conditional flow in 2D: what a pool that ignores the classes does to the noises of each class."""

from collections.abc import Iterator
from functools import partial
from itertools import count, islice
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor, nn

import dansm
from dansm.scale.base.files import make_folder, write_csv
from dansm.scale.base.statistics import told_class
from dansm.scale.base.text import say_files

from .comparison import each_seed, print_table
from .shapes import labelled_moons
from .toy import AT_MOST, BATCH, MEASURES, POINTS, STEPS_SHOWN, Settings, seed_for, train_flow, wasserstein2

CLASSES = 2
WAYS = {"random pairs": ("random", None), "one pool": ("greedy", None), "a pool for each class": ("greedy", CLASSES),
        "assigned within classes": ("optimal", CLASSES)}
W2 = {name: key for name, key in MEASURES.items() if name.startswith("W2²")}


def run(settings: Settings, out: Path) -> None:
    """Train and measure each of WAYS with each seed, and draw the first seed's, into out/2d.png and out/2d.csv."""
    from .pictures import draw_conditions

    torch.set_num_threads(1)
    make_folder(out)
    rows, shown = [], None
    seeds = range(settings.seed, settings.seed + settings.seeds)
    for by_way in each_seed(partial(train_and_measure, settings), WAYS, seeds, out / "2d.csv", settings.device):
        rows += [row for row, *_ in by_way.values()]
        write_csv(out / "2d.csv", rows)
        shown = shown or {way: rest for way, (_, *rest) in by_way.items()}
    lines = [{"way": row["way"], **{name: row[key] for name, key in {"class told": "class_told", **W2}.items()}}
             for row in rows]
    floor = fmean(row["w2_floor"] for row in rows)
    print_table(lines, f"two moons by class, {settings.steps:,} steps of {BATCH}",
                f"W2² of each class after 1, 2, … sampling steps, mean of both; other points have {floor:.3f}.")
    draw_conditions(shown, rows, out / "2d.png")
    say_files(out, "2d.csv", "2d.png")


def training_pairs(way: str, settings: Settings, seed: int) -> Iterator[tuple]:
    """The endless (x, z, labels) that a training sees. Pools for each class share the noises of one pool."""
    method, groups = WAYS[way]
    match_size = min(settings.match_size, AT_MOST.get(method, settings.match_size))
    if method == "greedy" and groups:
        match_size //= groups
    generator = torch.Generator().manual_seed(seed_for("data", seed))
    drawn = ([part.to(settings.device) for part in labelled_moons(BATCH, generator)] for _ in count())
    return dansm.pairs(drawn, method, match_size, cost="squared", seed=seed_for("noise", seed), groups=groups)


def train_and_measure(settings: Settings, way: str, seed: int) -> tuple[dict, Tensor, Tensor, Tensor, Tensor]:
    """The row of a training; noises (N, 2) of whole pools and their classes (N,); samples in 50 steps and theirs."""
    pairs = training_pairs(way, settings, seed)
    net = train_flow(pairs, settings.steps, seed, settings.device, classes=CLASSES)
    _, z, seen = (torch.cat(part) for part in zip(*islice(pairs, 40), strict=True))
    generator = torch.Generator().manual_seed(seed_for("target", seed))
    target, of_target = labelled_moons(3 * POINTS, generator)
    other, of_other = labelled_moons(3 * POINTS, generator)
    start = torch.randn(len(target), 2, generator=generator)
    samples = {steps: sample(net, start.to(settings.device), of_target, steps) for steps in STEPS_SHOWN}
    row = {"way": way, "seed": seed, "class_told": told_class(z, seen),
           **{f"w2_{steps}_steps": of_classes(x, of_target, target, of_target) for steps, x in samples.items()},
           "w2_floor": of_classes(other, of_other, target, of_target)}
    return row, z[::16], seen[::16], samples[STEPS_SHOWN[-1]], of_target


def sample(net: nn.Module, z: Tensor, labels: Tensor, steps: int) -> Tensor:
    """Samples (N, 2) of these labels (N,), from the noises z: (N, 2)."""
    return dansm.RectifiedFlow().sample(partial(net, labels=labels.to(z.device)), z, steps)


def of_classes(a: Tensor, of_a: Tensor, b: Tensor, of_b: Tensor) -> float:
    """The mean over the classes of W2² between POINTS points of each, a, b: (N, 2), of_a, of_b: (N,)."""
    return fmean(wasserstein2(a[of_a == label][:POINTS], b[of_b == label][:POINTS]) for label in range(CLASSES))
