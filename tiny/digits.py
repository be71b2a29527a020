"""First images: the 1,797 handwritten digits that come with scikit-learn, 8×8 pixels, paired at random and matched.

Two equal trainings a seed, but for the pairing; then the same noise through both, at several step counts. The
distance is Fréchet's in the space of the 64 pixels: no feature network is needed, and it compares with no FID.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

import dansm

STEP_COUNTS = (1, 2, 3, 5, 10)
NETWORK = dict(channels=1, size=8, width=16, multipliers=(1, 2), blocks=1, attention_at=(4,), dropout=0.0, biggan=False)
WAYS = ("random", "greedy")
BATCH = 64


def load_digits() -> Tensor:
    """(1797, 1, 8, 8) in [−1, 1]; the pixels of the data set are 0 to 16."""
    from sklearn.datasets import load_digits

    return torch.from_numpy(load_digits().images).float()[:, None] / 8 - 1


def batches(images: Tensor, seed: int) -> Iterator[Tensor]:
    """Endless random batches (BATCH, 1, 8, 8), the same for every way of pairing."""
    draw = np.random.default_rng(seed)
    while True:
        yield images[torch.from_numpy(draw.integers(len(images), size=BATCH)).to(images.device)]


def run(*, match_size: int = 1000, steps: int = 500, seeds: int = 2, seed: int = 0, device="cpu", out: Path) -> dict:
    """Train each way of pairing `steps` steps for each of `seeds` seeds; writes digits.json and digits.png into `out`
    after each seed, so that Ctrl-C keeps those done."""
    console, images = Console(), load_digits().to(device)
    halves = np.array_split(np.random.default_rng(0).permutation(len(images)), 2)
    result = {"data": "1,797 digits of scikit-learn, 8×8", "batch": BATCH, "steps": steps, "match_size": match_size,
              "step_counts": STEP_COUNTS, "hardware": dansm.hardware(device), "runs": [],
              "real_half_against_half": dansm.frechet_distance(*(images[half] for half in halves))}
    bar = Progress(TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[loss]}"),
                   TimeElapsedColumn(), TimeRemainingColumn(), console=console)
    with bar:
        task = bar.add_task("training", total=seeds * len(WAYS) * (steps + 2 * sum(STEP_COUNTS)), loss="")
        for each in range(seed, seed + seeds):
            samples = {}
            for way in WAYS:
                bar.update(task, description=f"{way}, seed {each}")
                net, length = train_one(images, way, match_size, steps, each,
                                        lambda loss: bar.update(task, advance=1, loss=f"loss {loss:.3f}"))
                distances = {}
                for count in STEP_COUNTS:
                    samples[way, count] = draw_samples(net, len(images), count, each, device)
                    distances[count] = dansm.frechet_distance(samples[way, count], images)
                    bar.update(task, advance=2 * count)  # a step over all digits takes about two of training
                result["runs"].append({"seed": each, "method": way, "path_length": length, "distance": distances})
            dansm.write_json(out / "digits.json", result)
            draw_picture(result, samples, out / "digits.png")
    print_table(result, console)
    dansm.say_files(out, "digits.png", "digits.json")
    return result


def train_one(images: Tensor, way: str, match_size: int, steps: int, seed: int,
              report: Callable[[float], None]) -> tuple[torch.nn.Module, float]:
    """One training; returns the averaged network and the mean length of the paths it was trained on."""
    torch.manual_seed(seed)  # equal first weights and training times for every way
    training = dansm.Training(dansm.UNet(**NETWORK).to(images.device), lr=1e-3, decay=0.995)
    lengths = []

    def measured(pairs):
        for x, z in pairs:
            lengths.append(dansm.path_length(x, z))
            yield x, z

    stream = measured(dansm.pairs(batches(images, seed), way, match_size, seed=seed))
    for loss in islice(dansm.train(training, dansm.RectifiedFlow(), stream), steps):
        report(loss.item())
    return training.average, statistics.fmean(lengths)


def draw_samples(net, count: int, steps: int, seed: int, device) -> Tensor:
    """(count, 1, 8, 8) from the same noises for every network."""
    noise = dansm.path_noise(range(count), (1, 8, 8), seed, device)
    flow = dansm.RectifiedFlow()
    return torch.cat([flow.sample(net, z, steps) for z in noise.split(512)])


def mean_and_spread(result: dict, way: str, count: int) -> tuple[float, float, float]:
    """Mean, least and most over the seeds of the distance at a step count."""
    values = [run["distance"][count] for run in result["runs"] if run["method"] == way]
    return statistics.fmean(values), min(values), max(values)


def print_table(result: dict, console: Console) -> None:
    table = Table(title="Fréchet distance to the digits in 64 pixels: mean over seeds (least … most)",
                  caption=f"real digits, one half against the other: {result['real_half_against_half']:.2f}")
    for name in "steps", *WAYS, "matched / random":
        table.add_column(name, justify="right")
    for count in STEP_COUNTS:
        of = {way: mean_and_spread(result, way, count) for way in WAYS}
        table.add_row(str(count), *(f"{mean:.2f} ({least:.2f} … {most:.2f})" for mean, least, most in of.values()),
                      f"{of['greedy'][0] / of['random'][0]:.2f}")
    console.print(table)


def draw_picture(result: dict, samples: dict, path: Path) -> None:
    """Left the last seed's samples of both ways from the same noises, a row a step count; right the distances."""
    import matplotlib.pyplot as plt

    names = {"random": "random pairs", "greedy": f"matched, pool of {result['match_size']:,}"}
    figure = plt.figure(figsize=(11, 4.1), layout="constrained")
    grid = figure.add_gridspec(len(STEP_COUNTS), 3, width_ratios=(1, 1, 0.95), hspace=0.02)
    for column, way in enumerate(WAYS):
        for row, count in enumerate(STEP_COUNTS):
            axes = figure.add_subplot(grid[row, column])
            spaced = F.pad(samples[way, count][:20].cpu(), (1, 1, 1, 1), value=-1)
            tiles = rearrange(spaced, "(row column) 1 h w -> (row h) (column w)", row=2)
            axes.imshow(tiles, cmap="gray_r", vmin=-1, vmax=1)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
            if row == 0:
                axes.set_title(names[way], fontsize=11)
            if column == 0:
                axes.set_ylabel(f"{count} step{'s' * (count > 1)}", rotation=0, ha="right", va="center", fontsize=10)
    axes = figure.add_subplot(grid[:, 2])
    for way, color, marker in zip(WAYS, ("#8a97a8", "#c8431a"), ("o", "s"), strict=True):
        mean, least, most = zip(*(mean_and_spread(result, way, count) for count in STEP_COUNTS), strict=True)
        axes.plot(STEP_COUNTS, mean, marker=marker, color=color, label=names[way])
        axes.fill_between(STEP_COUNTS, least, most, color=color, alpha=0.2)
    floor = result["real_half_against_half"]
    axes.axhline(floor, color="#555555", linestyle=":", label="real digits, half against half")
    axes.set(xscale="log", yscale="log", xlabel="steps from noise to image", ylabel="Fréchet distance in 64 pixels")
    axes.set_xticks(STEP_COUNTS, [str(count) for count in STEP_COUNTS])
    ticks = [tick for tick in (0.2, 0.5, 1, 2, 5, 10, 20, 50) if floor / 2 < tick < axes.get_ylim()[1]]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(True, alpha=0.25)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)
