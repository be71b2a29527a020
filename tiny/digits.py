"""First images: the 1,797 handwritten digits that come with scikit-learn, 8×8 pixels, paired at random and matched.

The trainings of a seed differ only in their pairs; their networks draw from the same noises in several step counts. The
distance is Fréchet's in the space of the 64 pixels: no feature network is needed, and it compares with no FID.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import count, islice
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from torch import Tensor

import dansm
from dansm.scale.base import colours
from dansm.scale.base.files import make_folder, write_json
from dansm.scale.base.machine import hardware
from dansm.scale.base.noise import path_noise
from dansm.scale.base.statistics import frechet_distance
from dansm.scale.base.text import counted, say_files

from .comparison import each_seed, print_table

STEP_COUNTS = (1, 2, 3, 5, 10)
CURVES = (1, 2, 5, 10)  # the step counts with a curve
NETWORK = dict(channels=1, size=8, width=16, multipliers=(1, 2), blocks=1, attention_at=(4,), dropout=0.0, biggan=False)
LOOKS = {"random": dict(color=colours.RANDOM, marker="o"), "optimal": dict(color=colours.OPTIMAL, marker="D"),
         "greedy": dict(color=colours.MATCHED, marker="s")}
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
                "greedy": f"matched, pool of {self.match_size:,}"}[way]


def load_digits() -> Tensor:
    """(1797, 1, 8, 8) in [−1, 1]; the pixels of the data set are 0 to 16."""
    from sklearn.datasets import load_digits

    return torch.from_numpy(load_digits().images).float()[:, None] / 8 - 1


def run(settings: Settings, device: torch.device, out: Path) -> None:
    """Train and evaluate every way with every seed. digits.json and the pictures are written after each seed, so they
    stay when the run is stopped; curve.png is drawn if there are several marks."""
    images = load_digits().to(device)
    halves = np.array_split(np.random.default_rng(0).permutation(len(images)), 2)
    floor = frechet_distance(*(images[half] for half in halves))
    result = {"data": "1,797 digits of scikit-learn, 8×8", **asdict(settings), "step_counts": STEP_COUNTS,
              "hardware": hardware(device), "runs": [], "real_half_against_half": floor}
    (make_folder(out) / "curve.png").unlink(missing_ok=True)  # from an earlier call
    for by_way in each_seed(partial(train_and_evaluate, images, settings), settings.ways, settings.seeds,
                            out / "digits.json"):
        result["runs"] += [run for runs, _ in by_way.values() for run in runs]
        write_json(out / "digits.json", result)
        draw_picture(result, settings, {way: samples for way, (_, samples) in by_way.items()}, out / "digits.png")
        if len(settings.marks) > 1:
            draw_curve(result, settings, out / "curve.png")
    rows = [{"way": settings.name(run["method"]), "path length": run["path_length"]}
            | {counted(count, "step"): distance for count, distance in run["distance"].items()}
            for run in result["runs"] if run["trained_steps"] == settings.steps]
    print_table(rows, f"Digits, {settings.steps:,} steps of {settings.batch}",
                f"Steps: Fréchet distance in 64 pixels; real digits, half against half: {floor:.2f}.")
    say_files(out, *(name for name in ("digits.png", "curve.png", "digits.json") if (out / name).exists()))


def train_and_evaluate(images: Tensor, settings: Settings, way: str, seed: int) -> tuple[list[dict], dict[int, Tensor]]:
    """Train once. Returns the runs of digits.json, one for each mark, and the samples of the last by step count.

    For other batches than BATCH the learning rate grows with their root, as their gradients' noise falls with it, and
    the average is over as many images.
    """
    noise = path_noise(range(len(images)), images.shape[1:], seed, images.device)  # the same for every network
    torch.manual_seed(seed)  # equal first weights and training times for every way
    share = settings.batch / BATCH
    training = dansm.Training(dansm.UNet(**NETWORK).to(images.device), lr=RATE * share**0.5, decay=DECAY**share)
    flow, lengths, runs = dansm.RectifiedFlow(), [], []
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
    """Endless pairs (x, z), both (batch, 1, 8, 8); the same images for every way."""
    draw = np.random.default_rng(seed)
    picks = (torch.from_numpy(draw.integers(len(images), size=settings.batch)) for _ in count())
    match_size = settings.batch if way == "optimal" else settings.match_size
    return dansm.pairs((images[pick.to(images.device)] for pick in picks), way, match_size, seed=seed)


# ------------ Pictures ------------------------------------------------------------------------------------------------


def draw_picture(result: dict, settings: Settings, samples: dict[str, dict[int, Tensor]], path: Path) -> None:
    """Left samples of two ways from the same noises, two rows for each step count; right the distances."""
    from .pictures import plt, show_images

    figure, (*pair, panel) = plt.subplots(1, 3, figsize=(11, 4.1), layout="constrained")
    for tiles, way in zip(pair, ("random", "greedy"), strict=True):
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
    """Draw the distances of every way: the mean over seeds as a line, their range as a band.

    cells: (training steps, sampling steps) at each of `across`
    """
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
