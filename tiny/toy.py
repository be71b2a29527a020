"""2D flows that differ only in how noise and data were paired for training. Measured are the pairs (length, share that
crosses) and the flow (straightness, squared Wasserstein-2 distance of samples to the target, W2², by steps)."""

import math
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, count, islice, tee
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

import dansm
from dansm.scale.base.assignment import assign
from dansm.scale.base.files import make_folder, write_csv, write_json
from dansm.scale.base.statistics import (
    crossing_lines,
    inter_path_distance,
    mean_and_std,
    squared_distances,
    straightness,
)
from dansm.scale.base.text import counted, say_files

from .comparison import each_seed, print_table
from .shapes import SHAPES

BATCH = 256
POINTS = 1000  # for each measure: W2² between more points takes seconds, between fewer it has a higher floor
STEPS_SHOWN = (1, 2, 4, 8, 50)
AT_MOST = {"random": 1, "optimal": 128, "nearest": 16}  # match_size: larger ones make optimal slow, nearest biased
KNOWN = 1000  # samples of the shape that a semidiscrete coupling knows; the other methods draw new ones for each batch
MEASURES = {"path length": "path_length", "share crossing": "crossing", "median bend": "straightness",
            **{f"W2² {counted(steps, 'step')}": f"w2_{steps}_steps" for steps in STEPS_SHOWN}}


class MLP(nn.Module):
    """The velocity in 2D: (B, 2) and times (B,) in [0, 999] → (B, 2). It sees place and time also as waves, which makes
    it learn the fine parts of a shape in a third of the steps. With `classes` it is given labels (B,) too."""

    def __init__(self, width: int = 64, classes: int = 0):
        super().__init__()
        self.classes = classes
        self.register_buffer("of_place", torch.tensor([1.0, 2.0, 4.0]))
        self.register_buffer("of_time", torch.tensor([0.5, 1.0, 2.0]) * math.pi)
        self.layers = nn.Sequential(
            nn.Linear(2 * (1 + 2 * 3) + 1 + 2 * 3 + classes, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2))

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        t = t[:, None] / 999
        angles = torch.cat([(x[:, :, None] * self.of_place).flatten(1), t * self.of_time], 1)
        seen = [x, t, angles.sin(), angles.cos()]
        if self.classes:
            seen.append(nn.functional.one_hot(labels, self.classes))
        return self.layers(torch.cat(seen, 1))


def seed_for(purpose: str, seed: int) -> int:
    """A different seed for each purpose: with the same seed, data and noise would be made of the same numbers."""
    return zlib.crc32(f"{purpose} {seed}".encode())


def points(shape: str, count: int, purpose: str, seed: int, device="cpu") -> Tensor:
    """(count, 2) points of the shape, or of the noise if `shape` is "noise"; different for each purpose and seed."""
    generator = torch.Generator().manual_seed(seed_for(purpose, seed))
    if shape == "noise":
        return torch.randn(count, 2, generator=generator).to(device)
    return SHAPES[shape](count, generator).to(device)


def training_pairs(shape: str, method: str, match_size: int, seed: int, device="cpu") -> Iterator[tuple]:
    """The endless pairs (x, z) that a training with this method and seed sees, (BATCH, 2) each. A semidiscrete coupling
    knows the first match_size samples, and takes no others."""
    generator = torch.Generator().manual_seed(seed_for("data", seed))
    drawn = (SHAPES[shape](64 * BATCH, generator).to(device).split(BATCH) for _ in count())
    batches = chain.from_iterable(drawn)
    if method == "semidiscrete":
        known = torch.cat(list(islice(batches, math.ceil(match_size / BATCH))))[:match_size]
        return pairs_of_known(known, seed_for("noise", seed))
    return dansm.pairs(batches, method, match_size, cost="squared", seed=seed_for("noise", seed))


def pairs_of_known(x: Tensor, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless pairs of fresh noises with samples x: (n, 2), all taken equally often, within 25 % (rms)."""
    coupling = dansm.Semidiscrete(x, seed=seed, dtype=torch.float32)
    coupling.solve(error=0.25)
    while True:
        z, taken = coupling.draw(BATCH)
        yield x[taken], z


def settling(x: Tensor, seed: int) -> dict[str, Tensor]:
    """Potentials (n,) of a semidiscrete coupling of x: (n, 2), from zero until all samples are taken equally often."""
    coupling = dansm.Semidiscrete(x, seed=seed)
    potentials = {"zero": torch.zeros(len(x)), "at the start": coupling.potentials.clone()}
    coupling.solve(error=0.5)
    potentials["on the way"] = coupling.potentials.clone()
    coupling.solve(error=0.05)
    return potentials | {"settled": coupling.potentials}


def pool_from(z: Tensor, x: Tensor, match_size: int) -> Tensor:
    """The noises that x gets from pools of `match_size` filled from z in order. x, z: (N, 2) → (N, 2)."""
    groups = zip(x.split(match_size), z.split(match_size), strict=True)
    return torch.cat([noise[dansm.greedy(dansm.cost_matrix(samples, noise))] for samples, noise in groups])


def train_flow(pairs: Iterable, steps: int, seed: int, device="cpu",
               each_step: Callable[[Tensor], None] = lambda loss: None, classes: int = 0) -> nn.Module:
    """Train a flow on `steps` batches of pairs and return its averaged network. `each_step` gets the loss of each."""
    torch.manual_seed(seed_for("network and times", seed))
    training = dansm.Training(MLP(classes=classes).to(device), lr=5e-3, decay=0.998)
    for loss in islice(dansm.train(training, dansm.RectifiedFlow(), pairs), steps):
        each_step(loss)
    return training.average


def crossing_share(x: Tensor, z: Tensor) -> float:
    """The share of all pairs of segments z_i → x_i that cross. x, z: (N, 2), N ≥ 2."""
    crossing = crossing_lines(z.cpu().double(), x.cpu().double())
    return (crossing.sum() / (len(x) * (len(x) - 1))).item()


def wasserstein2(a: Tensor, b: Tensor) -> float:
    """The squared Wasserstein-2 distance of two equally large sets of points (N, D): mean ‖a_i − b_j‖², best paired."""
    distances = squared_distances(a.cpu().double(), b.cpu().double())
    return distances.gather(1, assign(distances)[:, None]).mean().item()


def measure_pairs(pairs: Iterable, match_size: int) -> dict[str, float]:
    """Measure whole pools of pairs: the samples served first get the nearest noises, so a part would flatter."""
    total = math.ceil(POINTS / match_size) * match_size
    x, z = (torch.cat(part)[:total] for part in zip(*islice(pairs, math.ceil(total / BATCH)), strict=True))
    evenly = torch.arange(POINTS) * total // POINTS
    return {"path_length": dansm.path_length(x, z), "crossing": crossing_share(x[evenly], z[evenly]),
            "inter_path_mean": inter_path_distance(x[evenly], z[evenly]).mean}


def path_of(net: nn.Module, z: Tensor, steps: int) -> Tensor:
    """Where samples are on their way. z: (N, 2), the noises → (steps + 1, N, 2)."""
    return torch.stack(list(dansm.RectifiedFlow().path(net, z, steps)))


@torch.no_grad()
def measure_flow(net: nn.Module, x: Tensor, z: Tensor) -> dict:
    """Straightness, and W2² by sampling steps. x: (N, 2) points of the target, z: (N, 2) noises to start from. The
    median of straightness, as the few paths that end near their start would decide the mean."""
    bends = [straightness(path) for path in path_of(net, z, STEPS_SHOWN[-1]).split(1, 1)]
    w2 = {steps: wasserstein2(dansm.RectifiedFlow().sample(net, z, steps), x) for steps in STEPS_SHOWN}
    return {"straightness": median(bends), "w2": w2}


# ------------ The run -------------------------------------------------------------------------------------------------


@dataclass
class Settings:
    """The options of `dansm toy` that hold for every shape; its help says what each sets."""

    match_size: int
    steps: int
    seeds: int
    seed: int
    device: str


def run(shape: str, settings: Settings, out: Path) -> None:
    """Train, measure and draw one shape into `out`; "all": each into its own folder, and a table and picture of all."""
    from .pictures import draw_samples

    dansm.NoisePool(settings.match_size, (2,), device=settings.device)  # refused here, not after other trainings
    torch.set_num_threads(1)  # on two threads such a small network takes half as long again
    if shape != "all":
        run_shape(shape, settings, out)
        return
    rows, grid = [], {}
    for name in SHAPES:
        trainings, shown = run_shape(name, settings, out / name)
        rows += rows_of(name, trainings)
        write_csv(out / "results.csv", rows)
        for method in ("random", "greedy", "semidiscrete"):
            row = grid.setdefault(f"{name_of(shown[method][1])}, 2 steps", {})
            row[name.replace("-", " ")] = samples_of(name, *shown[method], 2, settings)
    draw_samples(grid, out / "shapes.png")
    say_files(out, "results.csv", "shapes.png")


def run_shape(shape: str, settings: Settings, out: Path) -> tuple[list[dict], dict]:
    """`run` for one shape. Returns all trainings, and (network, training) of the first seed by method."""
    make_folder(out)
    trainings, shown = [], {}
    seeds = range(settings.seed, settings.seed + settings.seeds)
    for by_method in each_seed(partial(train_and_measure, shape, settings), dansm.METHODS, seeds, out / "toy.json",
                               settings.device):
        trainings += [training for _, training in by_method.values()]  # written now: they stay when it is stopped
        write_json(out / "toy.json", {"shape": shape, **asdict(settings), "batch": BATCH, "points": POINTS,
                                      "trainings": trainings})
        write_csv(out / "results.csv", rows_of(shape, trainings))
        if not shown:
            shown = by_method
            draw(shape, shown, settings, out)
    lines = [{"way": f"{training['method']} {training['match_size']:,}"}
             | {column: training[name] for column, name in MEASURES.items()} for training in trainings]
    of_itself = [{"way": "the shape itself"} | {column: training["w2_floor"] for column in MEASURES if "W2²" in column}
                 for training in trainings if training["method"] == "random"]
    print_table(lines + of_itself, f"{shape}, {settings.steps:,} steps of {BATCH}",
                "Bend: mean squared difference of a path's velocity from its straight line's, over the square of "
                "that; 0 is straight. W2²: squared Wasserstein-2 distance of samples after 1, 2, … steps; below other "
                "points of the shape itself no way is better than another. Greedy, the pool, serves each sample as it "
                "comes, also one alone; optimal waits for all that it assigns, and for ten times as many takes a "
                "thousand times as long.")
    say_files(out, "toy.json", "results.csv", "pairs.png", "cells.png", "paths.png", "samples.png", "flow.gif")
    return trainings, shown


def train_and_measure(shape: str, settings: Settings, method: str, seed: int) -> tuple[nn.Module, dict]:
    """A trained network, and what toy.json holds about it."""
    match_size = max(1, min(settings.match_size, AT_MOST.get(method, math.inf)))
    if method == "semidiscrete":
        match_size = KNOWN
    pairs, again = tee(training_pairs(shape, method, match_size, seed, settings.device))
    net = train_flow(pairs, settings.steps, seed, settings.device)
    pool = match_size if method == "greedy" else 1  # no other method serves some samples before others
    target, start = target_and_start(shape, seed, settings.device)
    flow = measure_flow(net, target, start)
    return net, {"method": method, "match_size": match_size, "seed": seed,
                 **measure_pairs(again, pool), "straightness": flow["straightness"],
                 **{f"w2_{steps}_steps": value for steps, value in flow["w2"].items()},
                 "w2_floor": wasserstein2(target, points(shape, POINTS, "floor", seed, settings.device))}


def target_and_start(shape: str, seed: int, device: str, times: int = 1) -> tuple[Tensor, Tensor]:
    """Points of the target, and noises to start from, both (times · POINTS, 2)."""
    return (points(shape, times * POINTS, "target", seed, device),
            points("noise", times * POINTS, "start", seed, device))


def rows_of(shape: str, trainings: list[dict]) -> list[dict]:
    """A row for each method: means and standard deviations over its seeds."""
    rows = []
    for method in dict.fromkeys(training["method"] for training in trainings):
        same = [training for training in trainings if training["method"] == method]
        row = {"shape": shape, "method": method, "match_size": same[0]["match_size"], "seeds": len(same)}
        for measure in (*MEASURES.values(), "w2_floor"):
            value = mean_and_std([training[measure] for training in same])
            row |= {measure: round(value["mean"], 5), f"{measure}_std": round(value["std"], 5)}
        rows.append(row)
    return rows


@torch.no_grad()
def draw(shape: str, shown: dict, settings: Settings, out: Path) -> None:
    """Draw the five pictures of a shape. shown: (network, measures) by method."""
    from . import pictures  # matplotlib takes a second to import

    x, z = target_and_start(shape, settings.seed, settings.device)
    planes = {}
    for match_size in (1, 10, 100, 1000):
        name = "random pairs" if match_size == 1 else f"match size {match_size:,}"
        planes[name] = plane_of(x, pool_from(z, x, match_size))
    pairs = training_pairs(shape, "semidiscrete", KNOWN, settings.seed, settings.device)
    taken, noise = (torch.cat(part)[:POINTS] for part in zip(*islice(pairs, math.ceil(POINTS / BATCH)), strict=True))
    planes[f"semidiscrete of {KNOWN:,}"] = plane_of(taken, noise)
    pictures.draw_planes(planes, out / "pairs.png")
    few = points(shape, 40, "few", settings.seed)
    pictures.draw_cells(few, settling(few, settings.seed), points("noise", 100_000, "cells", settings.seed),
                        out / "cells.png")
    paths, grid, movies = {}, {}, {}
    for method, (net, training) in shown.items():
        name = name_of(training)
        paths[name] = path_of(net, z[::4], 50), f"bend {training['straightness']:.2f}, 0 is straight"
        grid[name] = {counted(steps, "step"): samples_of(shape, net, training, steps, settings)
                      for steps in STEPS_SHOWN}
        if method in ("random", "greedy"):
            movies[name] = {steps: (path_of(net, z[:700], steps),
                                    f", W2² to the target {training[f'w2_{steps}_steps']:.3f}") for steps in (50, 2)}
    pictures.draw_planes(paths, out / "paths.png")
    pictures.draw_samples(grid, out / "samples.png")
    pictures.draw_flow(x, movies, out / "flow.gif")


def plane_of(x: Tensor, z: Tensor) -> tuple[Tensor, str]:
    """Some of the lines between pairs x, z: (N, 2), as all would be a tangle, and what is measured of all."""
    text = f"{crossing_share(x, z):.1%} of pairs cross\nmean length {dansm.path_length(x, z):.2f}"
    return torch.stack([z[::4], x[::4]]), text


def samples_of(shape: str, net: nn.Module, training: dict, steps: int, settings: Settings) -> tuple:
    """Points of the target, samples in `steps` steps, and their W2² as text."""
    target, start = target_and_start(shape, settings.seed, settings.device, times=3)  # denser is easier to see
    return target, dansm.RectifiedFlow().sample(net, start, steps), f"{training[f'w2_{steps}_steps']:.3f}"


def name_of(training: dict) -> str:
    method, size = training["method"], f"{training['match_size']:,}"
    names = {"random": "random pairs", "semidiscrete": f"semidiscrete of {size}", "nearest": f"nearest of {size}"}
    return names.get(method, f"{method}, match size {size}")
