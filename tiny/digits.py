"""First images: the 1,797 handwritten digits that come with scikit-learn, 8×8 pixels, paired at random and matched.

Equal trainings for each seed, but for the pairing; then the same noise through both, at several step counts. The
distance is Fréchet's in the space of the 64 pixels: no feature network is needed, and it compares with no FID.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from dansm.scale.base.files import make_folder, write_json
from dansm.scale.base.machine import hardware
from dansm.scale.base.noise import path_noise
from dansm.scale.base.statistics import frechet_distance
from dansm.scale.base.text import Stopped, counted, say, say_files
from einops import rearrange
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

import dansm

STEP_COUNTS = (1, 2, 3, 5, 10)
NETWORK = dict(channels=1, size=8, width=16, multipliers=(1, 2), blocks=1, attention_at=(4,), dropout=0.0, biggan=False)
LOOKS = {"random": dict(color="#8a97a8", marker="o"), "optimal": dict(color="#7a4b94", marker="D"),
         "greedy": dict(color="#c8441b", marker="s")}
CURVES = (1, 2, 5, 10)  # of STEP_COUNTS, those with a curve
BATCH, RATE, DECAY = 64, 1e-3, 0.995  # for other batches see `train_one`


def load_digits() -> Tensor:
    """(1797, 1, 8, 8) in [−1, 1]; the pixels of the data set are 0 to 16."""
    from sklearn.datasets import load_digits

    return torch.from_numpy(load_digits().images).float()[:, None] / 8 - 1


def batches(images: Tensor, batch: int, seed: int) -> Iterator[Tensor]:
    """Endless random batches (batch, 1, 8, 8), the same for every way of pairing."""
    draw = np.random.default_rng(seed)
    while True:
        yield images[torch.from_numpy(draw.integers(len(images), size=batch)).to(images.device)]


def run(*, match_size: int = 1000, steps: int = 500, batch: int = BATCH, optimal: bool = False,
        evaluate_at: Iterable[int] = (), seeds: int = 2, seed: int = 0, device="cpu", out: Path) -> dict:
    """Train each way of pairing `steps` steps for each of `seeds` seeds; writes digits.json and digits.png into `out`
    after each seed, so that Ctrl-C keeps those done. Judged at the end, and after as many steps as `evaluate_at` says
    before, which curve.png shows then. `optimal`: linear assignment within each batch, too."""
    if late := [mark for mark in evaluate_at if mark > steps]:
        raise dansm.BadInput(f"--evaluate-at is {late[0]:,}: expected at most --steps, {steps:,}")
    console, images = Console(), load_digits().to(device)
    ways = [way for way in LOOKS if {"optimal": optimal}.get(way, True)]
    marks = sorted({mark for mark in evaluate_at if mark < steps} | {steps})
    halves = np.array_split(np.random.default_rng(0).permutation(len(images)), 2)
    result = {"data": "1,797 digits of scikit-learn, 8×8", "batch": batch, "steps": steps, "match_size": match_size,
              "ways": ways, "step_counts": STEP_COUNTS, "hardware": hardware(device), "runs": [],
              "real_half_against_half": frechet_distance(*(images[half] for half in halves))}
    bar = Progress(TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[loss]}"),
                   TimeElapsedColumn(), TimeRemainingColumn(), console=console)
    (make_folder(out) / "curve.png").unlink(missing_ok=True)  # of a call before
    with bar, _saying_what_is_kept(result, seeds, len(ways) * len(marks), out):
        task = bar.add_task("training", total=seeds * len(ways) * (steps + len(marks) * 2 * sum(STEP_COUNTS)), loss="")
        for each in range(seed, seed + seeds):
            samples = {}
            for way in ways:
                bar.update(task, description=f"{way}, seed {each}")
                training = train_one(images, way, match_size, batch, marks, each,
                                     lambda loss: bar.update(task, advance=1, loss=f"loss {loss:.3f}"))
                for mark, net, length in training:
                    distances = {}
                    for count in STEP_COUNTS:
                        samples[way, count] = draw_samples(net, len(images), count, each, device)
                        distances[count] = frechet_distance(samples[way, count], images)
                        bar.update(task, advance=2 * count)  # a step over all digits takes about two of training
                    result["runs"].append({"seed": each, "method": way, "trained_steps": mark, "path_length": length,
                                           "distance": distances})
                if not console.is_terminal:  # where the bar is not drawn
                    say(f"{way}, seed {each}: trained")
            write_json(out / "digits.json", result)
            draw_picture(result, samples, out / "digits.png")
            if len(marks) > 1:
                draw_curve(result, marks, out / "curve.png")
    print_table(result, console)
    say_files(out, "digits.png", *["curve.png"] * (len(marks) > 1), "digits.json")
    return result


@contextmanager
def _saying_what_is_kept(result: dict, seeds: int, a_seed: int, out: Path):
    try:
        yield
    except KeyboardInterrupt as stop:
        done = len(result["runs"]) // a_seed
        raise Stopped(f"stopped: {done} of {counted(seeds, 'seed')} in {out / 'digits.json'}" if done else
                            "stopped before the first seed was done, nothing is kept") from stop


def train_one(images: Tensor, way: str, match_size: int, batch: int, marks: list[int], seed: int,
              report: Callable[[float], None]) -> Iterator[tuple[int, torch.nn.Module, float]]:
    """One training; at each of `marks`, steps in rising order, it yields that, the averaged network and the mean length
    of the paths it was trained on. The last ends it. For other batches than BATCH the learning rate goes with their
    root, as their gradients' noise does, and the average is over as many images."""
    torch.manual_seed(seed)  # equal first weights and training times for every way
    share = batch / BATCH
    training = dansm.Training(dansm.UNet(**NETWORK).to(images.device), lr=RATE * share**0.5, decay=DECAY**share)
    lengths = []

    def measured(pairs):
        for x, z in pairs:
            lengths.append(dansm.path_length(x, z))
            yield x, z

    stream = measured(paired(images, way, match_size, batch, seed))
    for step, loss in enumerate(islice(dansm.train(training, dansm.RectifiedFlow(), stream), marks[-1]), 1):
        report(loss.item())
        if step in marks:
            yield step, training.average, statistics.fmean(lengths)


def paired(images: Tensor, way: str, match_size: int, batch: int, seed: int) -> Iterator:
    """Endless pairs (x, z), both (batch, 1, 8, 8), by one of the ways of LOOKS."""
    stream = batches(images, batch, seed)
    return dansm.pairs(stream, way, batch if way == "optimal" else match_size, seed=seed)


def draw_samples(net, count: int, steps: int, seed: int, device) -> Tensor:
    """(count, 1, 8, 8) from the same noises for every network."""
    noise = path_noise(range(count), (1, 8, 8), seed, device)
    flow = dansm.RectifiedFlow()
    return torch.cat([flow.sample(net, z, steps) for z in noise.split(512)])


def mean_and_spread(result: dict, way: str, count: int, mark: int | None = None) -> tuple[float, float, float]:
    """Mean, least and most over seeds of the distance at a step count, after `mark` training steps or at the end."""
    values = [run["distance"][count] for run in result["runs"]
              if (run["method"], run["trained_steps"]) == (way, mark or result["steps"])]
    return statistics.fmean(values), min(values), max(values)


def told(found: tuple[float, float, float]) -> str:
    mean, least, most = found
    return f"{mean:.2f}" if least == most else f"{mean:.2f} ({least:.2f} … {most:.2f})"


def print_table(result: dict, console: Console) -> None:
    table = Table(title="Fréchet distance to the digits in 64 pixels: mean over seeds (least … most)",
                  caption=f"real digits, one half against the other: {result['real_half_against_half']:.2f}")
    for name in "steps", *names_of(result).values(), "pool / random":
        table.add_column(name, justify="right")
    for count in STEP_COUNTS:
        of = {way: mean_and_spread(result, way, count) for way in result["ways"]}
        table.add_row(str(count), *map(told, of.values()),
                      f"{of['greedy'][0] / of['random'][0]:.2f}")
    console.print(table)


def draw_picture(result: dict, samples: dict, path: Path) -> None:
    """Left the last seed's samples of both ways from the same noises, a row a step count; right the distances."""
    import matplotlib.pyplot as plt

    names = names_of(result)
    figure = plt.figure(figsize=(11, 4.1), layout="constrained")
    grid = figure.add_gridspec(len(STEP_COUNTS), 3, width_ratios=(1, 1, 0.95), hspace=0.02)
    for column, way in enumerate(("random", "greedy")):
        for row, count in enumerate(STEP_COUNTS):
            axes = figure.add_subplot(grid[row, column])
            spaced = F.pad(samples[way, count][:20].cpu(), (1, 1, 1, 1), value=-1)
            tiles = rearrange(spaced, "(row column) 1 h w -> (row h) (column w)", row=2)
            axes.imshow(tiles.numpy(), cmap="gray_r", vmin=-1, vmax=1)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
            if row == 0:
                axes.set_title(names[way], fontsize=11)
            if column == 0:
                axes.set_ylabel(counted(count, "step"), rotation=0, ha="right", va="center", fontsize=10)
    axes = figure.add_subplot(grid[:, 2])
    for way, name in names.items():
        mean, least, most = zip(*(mean_and_spread(result, way, count) for count in STEP_COUNTS), strict=True)
        axes.plot(STEP_COUNTS, mean, label=name, **(look := LOOKS[way]))
        axes.fill_between(STEP_COUNTS, least, most, color=look["color"], alpha=0.2)
    floor = result["real_half_against_half"]
    axes.axhline(floor, color="#555555", linestyle=":", label="real digits, half against half")
    axes.set(xscale="log", yscale="log", xlabel="steps from noise to image", ylabel="Fréchet distance in 64 pixels")
    axes.set_xticks(STEP_COUNTS, [str(count) for count in STEP_COUNTS])
    plain_ticks(axes, floor)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_curve(result: dict, marks: list[int], path: Path) -> None:
    """Distance against the images trained on, a panel for each count of sampling steps."""
    import matplotlib.pyplot as plt

    names, floor = names_of(result), result["real_half_against_half"]
    images = [result["batch"] * mark for mark in marks]
    figure, panels = plt.subplots(1, len(CURVES), figsize=(11, 3.1), layout="constrained")
    for axes, count in zip(panels, CURVES, strict=True):
        for way, name in names.items():
            mean, least, most = zip(*(mean_and_spread(result, way, count, mark) for mark in marks), strict=True)
            axes.plot(images, mean, label=name, **(look := LOOKS[way]))
            axes.fill_between(images, least, most, color=look["color"], alpha=0.2)
        axes.axhline(floor, color="#555555", linestyle=":", label="real digits, half against half")
        axes.set(xscale="log", yscale="log")
        axes.set_title(counted(count, "sampling step"), fontsize=11)
        axes.set_xticks(images, [f"{number / 1000:g}" for number in images])
        plain_ticks(axes, floor)
    panels[0].set_ylabel("Fréchet distance in 64 pixels")
    figure.supxlabel("images trained on, thousands", fontsize=10)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def names_of(result: dict) -> dict[str, str]:
    """Of the ways that were trained, as figures and tables call them."""
    all_names = {"random": "random pairs", "optimal": f"assigned within batches of {result['batch']}",
                 "greedy": f"matched, pool of {result['match_size']:,}"}
    return {way: all_names[way] for way in result["ways"]}


def plain_ticks(axes, floor: float) -> None:
    """0.5, 1, 2, 5 in place of powers of ten."""
    ticks = [tick for tick in (0.2, 0.3, 0.5, 1, 2, 3, 5, 10, 20, 50) if floor / 2 < tick < axes.get_ylim()[1]]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(True, alpha=0.25)
