"""Train one small flow with each way of pairing, and see what the pairing alone does.

Everything but the pairing is equal: network, data, steps, seeds, learning rate. `run` trains, measures, draws.

    pairs of training   path length, and the share of pairs whose straight lines cross
    the learned flow    straightness of its paths, and the squared Wasserstein-2 distance of its samples to the
                        target, W2², for 1, 2, 4, 8 and 50 steps
"""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from statistics import fmean, median, stdev

import torch
from dansm.scale.base.files import write_csv, write_json
from dansm.scale.base.statistics import inter_path_distance, squared_distances
from dansm.scale.base.text import counted, say_files
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn

import dansm

from .shapes import SHAPES

BATCH = 256
POINTS = 1000  # for each measure: W2² between more points takes seconds, between fewer has a higher floor
STEPS_SHOWN = (1, 2, 4, 8, 50)
AT_MOST = {"random": 1, "optimal": 128, "nearest": 16}  # match_size: larger ones make optimal slow, nearest biased


class MLP(nn.Module):
    """The velocity in 2D: (B, 2) and times (B,) in [0, 999] → (B, 2). 9,858 parameters.

    It sees place and time also as waves: with them it learns the fine parts of a shape in a third of the steps.
    """

    def __init__(self, width: int = 64):
        super().__init__()
        self.register_buffer("of_place", torch.tensor([1.0, 2.0, 4.0]))
        self.register_buffer("of_time", torch.tensor([0.5, 1.0, 2.0]) * math.pi)
        self.layers = nn.Sequential(
            nn.Linear(2 * (1 + 2 * 3) + 1 + 2 * 3, width), nn.SiLU(),
            nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, 2),
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        t = t[:, None] / 999
        angles = torch.cat([(x[:, :, None] * self.of_place).flatten(1), t * self.of_time], 1)
        return self.layers(torch.cat([x, t, angles.sin(), angles.cos()], 1))


def seed_for(purpose: str, seed: int) -> int:
    """A seed of its own for each purpose: given the same one, data and noise would be made of the same numbers."""
    return zlib.crc32(f"{purpose} {seed}".encode())


def points(shape: str, count: int, purpose: str, seed: int, device="cpu") -> Tensor:
    """(count, 2) points of the shape, or of the noise if `shape` is "noise"; others for each purpose and seed."""
    generator = torch.Generator().manual_seed(seed_for(purpose, seed))
    if shape == "noise":
        return torch.randn(count, 2, generator=generator).to(device)
    return SHAPES[shape](count, generator).to(device)


def batches(shape: str, seed: int, device="cpu") -> Iterator[Tensor]:
    """Fresh points for ever, (BATCH, 2) at a time."""
    generator = torch.Generator().manual_seed(seed_for("data", seed))
    while True:
        yield from SHAPES[shape](64 * BATCH, generator).to(device).split(BATCH)


def training_pairs(shape: str, method: str, match_size: int, seed: int, device="cpu", cost: str = "squared"):
    """The pairs (x, z) that a training with this method and seed sees, for ever."""
    return dansm.pairs(batches(shape, seed, device), method, match_size, cost=cost, seed=seed_for("noise", seed))


def train_flow(pairs, steps: int, seed: int, device="cpu",
               each_step: Callable[[Tensor], None] = lambda loss: None) -> nn.Module:
    """A flow trained on `steps` batches of pairs; its averaged network. `each_step` gets the loss of each of them."""
    torch.manual_seed(seed_for("network and times", seed))
    training = dansm.Training(MLP().to(device), lr=5e-3, decay=0.998)
    for loss in islice(dansm.train(training, dansm.RectifiedFlow(), pairs), steps):
        each_step(loss)
    return training.average


# Measures


def crossing_share(x: Tensor, z: Tensor) -> float:
    """Of all pairs of segments z_i → x_i, the share that cross. x, z: (N, 2), N ≥ 2."""
    x, z = x.cpu().double(), z.cpu().double()
    along = x - z

    def side(p):  # (N, N): on which side of line i lies point j
        return along[:, :1] * (p[:, 1] - z[:, 1:]) - along[:, 1:] * (p[:, 0] - z[:, :1])

    parted = side(x) * side(z) < 0  # line i has the ends of segment j on its two sides
    return ((parted & parted.T).sum() / (len(x) * (len(x) - 1))).item()


def wasserstein2(a: Tensor, b: Tensor) -> float:
    """The squared Wasserstein-2 distance of two equally large sets of points (N, D): mean ‖a_i − b_j‖², best paired."""
    distances = squared_distances(a.cpu().double(), b.cpu().double())
    return distances.gather(1, dansm.optimal(distances).picks[:, None]).mean().item()


def measure_pairs(pairs, match_size: int) -> dict[str, float]:
    """Of whole pools: the start of one would flatter, as the samples served first get the nearest noises."""
    count = math.ceil(POINTS / match_size) * match_size
    x, z = (torch.cat(part)[:count] for part in zip(*islice(pairs, math.ceil(count / BATCH)), strict=True))
    every = torch.arange(POINTS) * count // POINTS
    return {"path_length": dansm.path_length(x, z), "crossing": crossing_share(x[every], z[every]),
            "inter_path_mean": inter_path_distance(x[every], z[every]).mean}


@torch.no_grad()
def measure_flow(net: nn.Module, x: Tensor, z: Tensor) -> dict:
    """x: (N, 2) points of the target, z: (N, 2) noises to start from.

    Straightness is the median over the paths: a path that ends where it began divides by almost nothing, and
    in 2D a mean would be that of a few of them.
    """
    flow = dansm.RectifiedFlow()
    path = torch.stack(list(flow.path(net, z, STEPS_SHOWN[-1])))
    bends = [dansm.straightness(one) for one in path.split(1, 1)]
    w2 = {str(steps): wasserstein2(flow.sample(net, z, steps), x) for steps in STEPS_SHOWN}
    return {"straightness": median(bends), "w2": w2}


def spread(values: list[float]) -> dict[str, float]:
    """Mean and standard deviation over seeds, 0 for a single one."""
    return {"mean": fmean(values), "std": stdev(values) if len(values) > 1 else 0.0}


def summary(trainings: list[dict]) -> dict[str, dict]:
    """Each method's measures over its seeds."""
    found = {}
    for method in dict.fromkeys(training["method"] for training in trainings):
        of_method = [training for training in trainings if training["method"] == method]
        found[method] = {"match_size": of_method[0]["match_size"], "seeds": len(of_method)}
        for measure in ("path_length", "crossing", "straightness"):
            found[method][measure] = spread([training[measure] for training in of_method])
        found[method]["w2"] = {str(s): spread([t["w2"][str(s)] for t in of_method]) for s in STEPS_SHOWN}
    return found


# The run


def run(shape: str = "swiss-roll", match_size: int = 1000, steps: int = 800, seeds: int = 3, seed: int = 0,
        device: str = "cpu", out: str | Path = "toy", cost: str = "squared") -> dict:
    """Train a flow with each method of pairing and each seed, measure, draw; returns what it writes to toy.json.

    shape       a name in SHAPES, or "all": every shape into its own folder, and for all of them results.csv,
                results.json and shapes.png
    match_size  for greedy; optimal gets at most 128 and nearest at most 16 of it
    steps       of training, BATCH pairs each
    seeds       trainings a method: seed, seed + 1, …
    out         the folder for toy.json, results.csv, pairs.png, paths.png, samples.png, flow.gif

    toy.json and results.csv are written after every training, the pictures after the first seed: stopping early keeps
    them.
    Raises BadInput for an unknown shape or cost, and for counts that are not whole and positive.
    """
    dansm.check_choice("shape", shape, (*SHAPES, "all"))
    dansm.check_choice("cost", cost, dansm.COSTS)
    match_size = dansm.check_count("match_size", match_size, at_least=0)
    steps, seeds = dansm.check_count("steps", steps), dansm.check_count("seeds", seeds)
    seed = dansm.check_count("seed", seed, at_least=0)
    dansm.NoisePool(match_size, (2,), device=device)  # one that no memory holds is refused before anything is trained
    settings = dict(match_size=match_size, steps=steps, seeds=seeds, seed=seed, device=str(device), cost=cost)
    with one_thread():
        if shape != "all":
            return run_shape(shape, Path(out), settings)[0]
        results, nets = {}, {}
        for name in SHAPES:
            results[name], nets[name] = run_shape(name, Path(out) / name, settings)
            write_table(results, Path(out))
        draw_all(results, nets, Path(out))
        say_files(Path(out), "results.json", "results.csv", "shapes.png")
        return results


def run_shape(shape: str, out: Path, settings: dict) -> tuple[dict, dict[str, nn.Module]]:
    """`run` for one shape, its arguments checked; the networks of the first seed too."""
    out.mkdir(parents=True, exist_ok=True)
    seeds = range(settings["seed"], settings["seed"] + settings["seeds"])
    count = len(seeds) * len(dansm.METHODS)
    floor = spread([wasserstein2(*(points(shape, POINTS, use, seed) for use in ("target", "floor"))) for seed in seeds])
    results = {"shape": shape, "settings": {**settings, "batch": BATCH, "points": POINTS}, "floor": floor,
               "summary": {}, "trainings": []}
    console, nets = Console(), {}
    try:
        with progress_bar(console) as bar:
            task = bar.add_task(shape, total=count * settings["steps"])
            for seed in seeds:  # the outer loop, so that a run that is stopped has every method equally often
                for method in dansm.METHODS:
                    bar.update(task, description=f"{shape}, {method}, seed {seed}")
                    net, found = train_and_measure(shape, method, seed, settings, lambda loss: bar.advance(task))
                    nets.setdefault(method, net)
                    results["trainings"].append(found)
                    results["summary"] = summary(results["trainings"])
                    write_json(out / "toy.json", results)
                    write_csv(out / "results.csv", rows_of({shape: results}))
                if seed == seeds[0]:
                    bar.update(task, description=f"{shape}, drawing")
                    draw(results, nets, out)
    except KeyboardInterrupt:
        console.print(f"Stopped: {len(results['trainings'])} of {count} trainings are in {out / 'toy.json'}")
        raise
    console.print(table(results))
    say_files(out, "toy.json", "results.csv", "pairs.png", "paths.png", "samples.png", "flow.gif")
    return results, nets


def train_and_measure(shape: str, method: str, seed: int, settings: dict, each_step) -> tuple[nn.Module, dict]:
    """One row of toy.json, and its network."""
    device = settings["device"]
    match_size = max(1, min(settings["match_size"], AT_MOST.get(method, math.inf)))
    pairing = (shape, method, match_size, seed, device, settings["cost"])
    began = time.perf_counter()
    net = train_flow(training_pairs(*pairing), settings["steps"], seed, device, each_step)
    seconds = time.perf_counter() - began
    pool = match_size if method == "greedy" else 1  # no other method serves some samples before others
    target, start = points(shape, POINTS, "target", seed, device), points("noise", POINTS, "start", seed, device)
    return net, {"method": method, "match_size": match_size, "seed": seed, "seconds": seconds,
                 **measure_pairs(training_pairs(*pairing), pool), **measure_flow(net, target, start)}


def draw(results: dict, nets: dict[str, nn.Module], out: Path) -> None:
    """The four pictures, of the first seed."""
    from . import pictures  # matplotlib takes a second to import

    shape, device, seed = results["shape"], results["settings"]["device"], results["settings"]["seed"]
    x, z = points(shape, POINTS, "target", seed, device), points("noise", POINTS, "start", seed, device)
    pictures.draw_pairs(x, z, out / "pairs.png")
    pictures.draw_paths(results, nets, z, out / "paths.png")
    pictures.draw_samples(results, nets, *to_show(results), out / "samples.png")
    pictures.draw_flow(results, nets, x, z[:700], out / "flow.gif")


def draw_all(results: dict[str, dict], nets: dict[str, dict[str, nn.Module]], out: Path) -> None:
    """One picture of all shapes."""
    from . import pictures

    shown = {shape: to_show(of_shape) for shape, of_shape in results.items()}
    pictures.draw_shapes(results, nets, shown, 2, out / "shapes.png")


def to_show(results: dict) -> tuple[Tensor, Tensor]:
    """Points of the target and noises of the first seed, three times as many as are measured: denser looks better."""
    device, seed = results["settings"]["device"], results["settings"]["seed"]
    return (points(results["shape"], 3 * POINTS, "target", seed, device),
            points("noise", 3 * POINTS, "start", seed, device))


def table(results: dict) -> Table:
    """What was measured, a method a row."""
    settings, floor = results["settings"], results["floor"]
    seeds = len({training["seed"] for training in results["trainings"]})
    shown = Table(title=f"{results['shape']}: {counted(seeds, 'seed')}, "
                        f"{settings['steps']:,} training steps of {BATCH} pairs",
                  caption=f"W2² after 1, 2, … sampling steps, to {POINTS:,} points of the target;\n"
                          f"as many other points of the target: {floor['mean']:.3f} ± {floor['std']:.3f}",
                  box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for name in ("pairing", "match\nsize", "path\nlength", "pairs\ncross", "median\nbend"):
        shown.add_column(name, justify="left" if name == "pairing" else "right")
    for steps in STEPS_SHOWN:
        shown.add_column(f"W2²\nat {steps}", justify="right")
    for method, found in results["summary"].items():
        shown.add_row(method, f"{found['match_size']:,}", cell(found["path_length"]), cell(found["crossing"], "{:.1%}"),
                      cell(found["straightness"], "{:.2f}"), *(cell(found["w2"][str(steps)]) for steps in STEPS_SHOWN))
    return shown


def cell(value: dict[str, float], form: str = "{:.3f}") -> str:
    return f"{form.format(value['mean'])}\n[dim]±{form.format(value['std'])}[/]"


def rows_of(results: dict[str, dict]) -> list[dict]:
    """The summaries as a table: a row for each shape and method, means and standard deviations over seeds."""
    rows = []
    for shape, of_shape in results.items():
        for method, found in of_shape["summary"].items():
            measures = {name: found[name] for name in ("path_length", "crossing", "straightness")}
            measures |= {f"w2_{steps}_steps": value for steps, value in found["w2"].items()}
            measures["w2_floor"] = of_shape["floor"]
            rows.append({"shape": shape, "method": method, "match_size": found["match_size"], "seeds": found["seeds"]}
                        | {f"{name}{end}": round(value[key], 5) for name, value in measures.items()
                           for end, key in (("", "mean"), ("_std", "std"))})
    return rows


def write_table(results: dict[str, dict], out: Path) -> None:
    """Every shape's summary: results.json, and as a table results.csv."""
    write_csv(out / "results.csv", rows_of(results))
    write_json(out / "results.json", {
        shape: {key: of_shape[key] for key in ("settings", "floor", "summary")} for shape, of_shape in results.items()})


def progress_bar(console: Console) -> Progress:
    return Progress(TextColumn("{task.description:<32}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"),
                    TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=console)


@contextmanager
def one_thread():
    """On two threads such a small network takes half as long again."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)

