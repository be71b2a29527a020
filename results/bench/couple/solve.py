"""Time the semidiscrete coupling on a GPU: solving, choosing, and the matrix products that both need at least.

    PYTHONPATH=. python results/bench/couple/solve.py IMAGES [--out h100.csv]

IMAGES is what dansm train takes; their mirror images are samples too. Then come random latents of 4×32×32: 400,000 and
three million. A row for each way: seconds until shares are off by 10 %, what was told then and what an
independent count says, milliseconds to draw 256 noises and choose (64 batches in a row, median, least and most of ten),
and the share of each that the products alone take.
"""

import argparse
import time
from pathlib import Path
from statistics import median

import torch

from dansm import Semidiscrete
from dansm.scale.base.files import write_csv
from dansm.scale.data.labels import load_labels
from dansm.scale.data.loader import load_images
from dansm.scale.matching.products import products
from dansm.scale.matching.solver import Solver, evenness
from dansm.scale.train.coupling import Samples

GPU = torch.device("cuda")
PART = 100_000


class Latents:
    """Random ones, drawn as they are read: of equal size and in no order, which are the hardest to couple."""

    def __init__(self, count):
        self.shape = count, 4, 32, 32

    def __getitem__(self, numbers):
        return torch.randn(len(numbers), *self.shape[1:], device=GPU)


def timed(call, repeats=10):
    """Median, least and most seconds of a call, after two."""
    seconds = []
    for _ in range(repeats + 2):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return median(seconds[2:]), min(seconds[2:]), max(seconds[2:])


def rows_of(name, data, groups=None, part=PART, solve=True):
    """One row, of a coupling of these data."""
    torch.cuda.empty_cache()
    begin = time.perf_counter()
    coupling = Semidiscrete(data, groups, part=part, seed=0, device=GPU)
    torch.cuda.synchronize()
    row = {"way": name, "shape": "×".join(map(str, coupling.shape)), "samples": len(coupling.potentials),
           "parts": len(list(coupling.all_parts())), "made_s": time.perf_counter() - begin}
    first = next(coupling.all_parts())
    z = torch.randn(1024, coupling.shape.numel(), device=GPU).to(coupling.dtype)
    product = timed(lambda: products(z, first.points), 40)[0]
    if solve:
        begin = time.perf_counter()
        reached = coupling.solve(0.1)
        torch.cuda.synchronize()
        row["solve_s"] = time.perf_counter() - begin
        row["noises_each"] = sum(solved.noises for solved in reached) / len(reached)
        row["error_told"] = (sum(solved.error**2 for solved in reached) / len(reached)) ** 0.5
        taken, n = torch.zeros(len(coupling.potentials), device=GPU), len(coupling.potentials)
        for _ in range(2000):
            taken += coupling.draw(1024)[1].bincount(minlength=n)
        row["error_counted"] = evenness(taken, torch.full((n,), 1 / n, device=GPU), 0).error
        noises = row["noises_each"] * n / row["parts"]
    else:  # the time of a step tells
        solver = Solver(first.points, first.copies / len(first.samples), torch.Generator(GPU).manual_seed(0))
        step = timed(lambda: [solver.step() for _ in range(20)])[0] / 20
        noises = 120 * len(first.samples)
        row["solve_s"] = row["parts"] * noises / solver.batch * step
    row["samples_a_second"] = len(coupling.potentials) / row["solve_s"]
    row["products_of_solve"] = row["parts"] * noises / 1024 * product / row["solve_s"]
    choose = [1000 / 64 * seconds for seconds in timed(lambda: [coupling.draw(256) for _ in range(64)])]
    row |= dict(zip(("choose_256_ms", "least_ms", "most_ms"), choose, strict=True))
    row["products_of_choose"] = 250 * product / choose[0] if row["parts"] == 1 or groups is None else ""
    row["gpu"] = torch.cuda.get_device_name()
    return {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("data")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "h100.csv")
    given = parser.parse_args()
    images = torch.as_tensor(load_images(given.data))
    labels = load_labels(given.data, "auto", len(images))
    samples, found = Samples(images.to(GPU), True), []
    Semidiscrete(samples, part=5000, seed=0, device=GPU).solve(1, most=8)  # kernels are compiled now
    ways = [("whole", samples), ("parts of 10,000", samples, None, 10_000), ("parts of 1,000", samples, None, 1000)]
    if labels:
        ways.append(("by class", samples, torch.from_numpy(labels.numbers).repeat(2)))
    for way in ways:
        found.append(rows_of(*way))
        print(found[-1], flush=True)
        write_csv(given.out, found)
    for count in (400_000, 3_000_000):
        found.append(rows_of(f"{count:,} latents in parts", Latents(count), solve=False))
        print(found[-1], flush=True)
        write_csv(given.out, found)
