"""Time linear assignment of images to noises on the CPU, one library after the other, several times around.

    PYTHONPATH=. python results/bench/assignment/measure.py IMAGES --out cpu.csv [--threads 1,2] [--sizes 256,256x10000]

IMAGES is what dansm train takes. The costs are known already, ‖z‖² − 2⟨x, z⟩ in float32, images as rows. A row for each
size, library and count of threads (BLAS's and torch's: those of numpy, in a process for each count).

median_ms, least_ms, most_ms  a call, after one that is not counted
faster, least_faster          scipy's time over the library's in the same round: the median of all rounds, and the least
total, equal                  what the pairing costs in float64, and whether it is scipy's to 1e-6
"""

import argparse
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from dansm import cost_matrix
from dansm.scale.base.files import write_csv
from dansm.scale.data.loader import load_images
from dansm.scale.data.pixels import from_uint8
from dansm.scale.matching import optimal

SIZES = "8,64,256,1000,2000,4096,256x10000"
ROUNDS = 5, 200  # at least and at most
SECONDS = 5  # for scipy's rounds, if there are enough


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", default=f"1,{os.cpu_count()}")
    parser.add_argument("--sizes", default=SIZES)
    given = parser.parse_args(arguments)
    sizes = [tuple(map(int, size.split("x"))) for size in given.sizes.split(",")]
    sizes = [(size[0], size[-1]) for size in sizes]
    images = load_images(given.images)
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[: max(sizes)[0]]
    x = from_uint8(images[chosen])
    rows = []
    for threads in given.threads.split(","):
        os.environ |= {"OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        for size in sizes:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                of_size = process.submit(measured, x[: size[0]], size[1]).result()
            rows += [{"threads": threads, **row, "processor": processor()} for row in of_size]
            write_csv(given.out, rows)
            print(*rows[-len(of_size):], sep="\n", flush=True)


def libraries():
    """Name → what solves costs (B, M), as a tensor or an array, and returns the column of each row."""
    import lap

    return {"scipy": lambda cost: linear_sum_assignment(cost.numpy())[1],
            "dansm": lambda cost: optimal(cost).picks.numpy(),
            "lapx, lapjvh, float64": lambda cost: lap.lapjvh(
                cost.numpy(), extend_cost=True, return_cost=False, precision="float64")[1],
            "lapx, lapjvs, row minima off": lambda cost: lap.lapjvs(
                (cost - cost.amin(1, keepdim=True)).numpy(), return_cost=False)[1]}


def measured(x, noises):
    """A row for each library, from rounds in which all take their turns."""
    cost = cost_matrix(x, torch.randn(noises, *x.shape[1:], generator=torch.Generator().manual_seed(0)))
    solve = libraries()
    found = {name: timed(partial(way, cost)) for name, way in solve.items()}
    rounds = max(ROUNDS[0], min(ROUNDS[1], int(1000 * SECONDS / found["scipy"][0])))
    times = {name: [] for name in solve}
    for _ in range(rounds):
        for name, way in solve.items():
            times[name].append(timed(partial(way, cost))[0])
    return [row_of(name, cost, found, times) for name in solve]


def row_of(name, cost, found, times):
    """times: library → milliseconds in each round. found: library → milliseconds, picks."""
    faster = [scipy / ms for scipy, ms in zip(times["scipy"], times[name], strict=True)]
    best, reached = (total(cost, found[library][1]) for library in ("scipy", name))
    return {"images": len(cost), "noises": len(cost[0]), "library": name, "median_ms": f"{median(times[name]):.4g}",
            "least_ms": f"{min(times[name]):.4g}", "most_ms": f"{max(times[name]):.4g}", "rounds": len(faster),
            "faster": f"{median(faster):.3g}", "least_faster": f"{min(faster):.3g}", "total": f"{reached:.9g}",
            "equal": bool(abs(reached - best) <= 1e-6 * abs(best))}


def timed(work):
    begin = time.perf_counter()
    picks = work()
    return 1000 * (time.perf_counter() - begin), picks


def total(cost, picks):
    """What a pairing costs; every column may be taken once."""
    assert len(np.unique(picks)) == len(cost)
    return cost.numpy()[np.arange(len(cost)), picks].sum(dtype=np.float64)


def processor():
    names = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
             if line.startswith("model name")]
    return f"{len(names)} × {names[0]}"


if __name__ == "__main__":
    main()
