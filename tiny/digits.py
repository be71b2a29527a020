"""First images: scikit-learn's 1,797 handwritten digits of 8×8 pixels. The trainings of a seed differ only in their
pairs. The distance is Fréchet's in the space of the 64 pixels, without a feature network: it compares with no FID."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from torch import Tensor

import dansm
from dansm.scale.base import colours
from dansm.scale.base.noise import path_noise
from dansm.scale.base.statistics import frechet_distance
from dansm.scale.base.text import counted

STEP_COUNTS = (1, 2, 3, 5, 10)
CURVES = (1, 2, 5, 10)  # the step counts with a curve
NETWORK = dict(channels=1, size=8, width=16, multipliers=(1, 2), blocks=1, attention_at=(4,), dropout=0.0, biggan=False)
LOOKS = {"random": dict(color=colours.RANDOM, marker="o"), "optimal": dict(color=colours.OPTIMAL, marker="D"),
         "greedy": dict(color=colours.MATCHED, marker="s"), "priced": dict(color=colours.POOLS[1000], marker="v"),
         "semidiscrete": dict(color=colours.SEMIDISCRETE, marker="P")}
BATCH, RATE, DECAY = 64, 1e-3, 0.995  # for other batches see `train_and_evaluate`


@dataclass
class Settings:
    """The options of `dansm digits`; its help says what each sets."""

    match_size: int
    batch: int
    ways: list[str]  # of LOOKS
    steps: int
    marks: list[int]  # training steps after which to evaluate, ascending; the last is `steps`
    seeds: list[int]

    def name(self, way: str) -> str:
        """What figures and tables call it."""
        return {"random": "random pairs", "optimal": f"assigned within batches of {self.batch}",
                "greedy": f"matched, pool of {self.match_size:,}",
                "priced": f"matched, pool of {self.match_size:,} with prices",
                "semidiscrete": "semidiscrete plan of all digits"}[way]


def load_digits() -> Tensor:
    """(1797, 1, 8, 8) in [−1, 1]; the pixels of the data set are 0 to 16."""
    from sklearn.datasets import load_digits

    return torch.from_numpy(load_digits().images).float()[:, None] / 8 - 1


def train_and_evaluate(images: Tensor, settings: Settings, way: str, seed: int) -> tuple[list[dict], dict[int, Tensor]]:
    """Train once. Returns the runs of digits.json, one for each mark, and the samples of the last by step count. The
    learning rate grows with the root of the batch, and the average is over equally many images."""
    noise = path_noise(range(len(images)), images.shape[1:], seed, images.device)  # the same for every network
    torch.manual_seed(seed)  # equal first weights and training times for every way
    share = settings.batch / BATCH
    training = dansm.Training(dansm.UNet(**NETWORK).to(images.device), lr=RATE * share**0.5, decay=DECAY**share)
    flow = dansm.RectifiedFlow()
    lengths, runs = [], []
    for step, (x, z) in enumerate(islice(paired(images, way, settings, seed), settings.steps), 1):
        training.gradients(flow, x, z)
        training.update()
        lengths.append(dansm.path_length(x, z))
        if step in settings.marks:
            samples = {steps: torch.cat([flow.sample(training.average, part, steps) for part in noise.split(512)])
                       for steps in STEP_COUNTS}
            distances = {steps: frechet_distance(drawn, images) for steps, drawn in samples.items()}
            runs.append({"seed": seed, "method": way, "trained_steps": step, "path_length": fmean(lengths),
                         "distance": distances})
    return runs, samples


def paired(images: Tensor, way: str, settings: Settings, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless pairs (x, z), both (batch, 1, 8, 8); the same images for every way but the plan, whose noises choose."""
    if way == "semidiscrete":
        return planned(images, settings.batch, seed)
    draw = np.random.default_rng(seed)
    picks = (torch.from_numpy(draw.integers(len(images), size=settings.batch)) for _ in count())
    match_size = settings.batch if way == "optimal" else settings.match_size
    method, cost = ("greedy", "priced") if way == "priced" else (way, "squared")
    return dansm.pairs((images[pick.to(images.device)] for pick in picks), method, match_size, cost=cost, seed=seed)


def planned(images: Tensor, batch: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    coupling = dansm.Semidiscrete(images, seed=seed)
    coupling.solve()
    while True:
        z, taken = coupling.draw(batch)
        yield images[taken], z


def draw_picture(result: dict, settings: Settings, samples: dict[str, dict[int, Tensor]], path: Path) -> None:
    """Left samples of the first way and the last from the same noises, two rows for each step count; right the
    distances."""
    from .pictures import plt, show_images

    figure, (*pair, panel) = plt.subplots(1, 3, figsize=(11, 4.1), layout="constrained")
    for tiles, way in zip(pair, (settings.ways[0], settings.ways[-1]), strict=True):
        show_images(tiles, torch.cat([samples[way][steps][:20] for steps in STEP_COUNTS]), rows=2 * len(STEP_COUNTS))
        tiles.set_title(settings.name(way))
    for row, steps in enumerate(STEP_COUNTS):
        pair[0].text(-2, 20 * row + 10, counted(steps, "step"), ha="right", va="center")  # a row is 10 pixels high
    draw_distances(panel, result, settings, STEP_COUNTS, [(settings.steps, steps) for steps in STEP_COUNTS])
    panel.set(xlabel="steps from noise to image", ylabel="Fréchet distance in 64 pixels")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_curve(result: dict, settings: Settings, path: Path) -> None:
    """Distance against images trained on, a panel for each count of sampling steps."""
    from .pictures import plt

    figure, panels = plt.subplots(1, len(CURVES), figsize=(11, 3.1), layout="constrained")
    thousands = [settings.batch * mark / 1000 for mark in settings.marks]
    for panel, steps in zip(panels, CURVES, strict=True):
        draw_distances(panel, result, settings, thousands, [(mark, steps) for mark in settings.marks])
        panel.set_title(counted(steps, "sampling step"))
        panel.get_legend().remove()
    panels[0].set_ylabel("Fréchet distance in 64 pixels")
    figure.supxlabel("images trained on, thousands", fontsize=10)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_distances(panel, result: dict, settings: Settings, across: Sequence[float], cells: list[tuple]) -> None:
    """Draw the distances of every way, mean and range over seeds, for (training, sampling steps) at each `across`."""
    from .pictures import name_axes

    for way in settings.ways:
        values = [[run["distance"][steps] for run in result["runs"]
                   if (run["method"], run["trained_steps"]) == (way, mark)] for mark, steps in cells]
        panel.plot(across, [fmean(value) for value in values], label=settings.name(way), **LOOKS[way])
        panel.fill_between(across, [min(value) for value in values], [max(value) for value in values],
                           color=LOOKS[way]["color"], alpha=0.2)
    floor = result["real_half_against_half"]
    panel.axhline(floor, color=colours.INK, linestyle=":", label="real digits, half against half")
    panel.set(yscale="log")
    highest = panel.get_ylim()[1]
    ticks = [tick for tick in (0.2, 0.3, 0.5, 1, 2, 3, 5, 10, 20, 50) if floor / 2 < tick < highest]
    name_axes(panel, "", "", across, ticks)
