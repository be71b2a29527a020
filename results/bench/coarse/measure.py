"""Time pools of whole noises and coarse pools next to each other, and measure the memory that each takes on a GPU.

    PYTHONPATH=. python results/bench/coarse/measure.py --out h200.csv [--costs 26] [--seconds 2] [--cases 0,3]
    PYTHONPATH=. python results/bench/coarse/measure.py --out FILE.csv --device cpu --tiny

Each pool is measured when it is full and with 75, 50, 25 and 5 % of its noises left, as a life of a million noises is
long: a row for each, and one for all of them. A quarter of the noises is drawn between two levels, which is not timed.

median_ms, least_ms, most_ms    a call, waiting for the device before and after
p90_ms                          a tenth of the calls took longer
queued_ms                       a call when as many are made in a row, waiting once
gpu_ms                          a call when they wait behind other work on the GPU, as behind a training step, so that
                                the time that Python takes to launch does not count
pool_mb, kept_mb                the noises or keys; all that is allocated between two calls
peak_mb                         the most that was allocated, pool included, without the batches and what cuBLAS keeps
faster…, smaller                of a coarse pool's row for all levels: times and peak of the pool of whole noises in
                                bfloat16 over its own
--costs                         exponents of two: how many costs a coarse pool works out at once, at most
--seconds                       that the calls of one pool may take
"""

import argparse
import itertools
import time
from functools import partial
from pathlib import Path
from statistics import mean, median

import torch

from dansm import NoisePool
from dansm.scale.base.files import write_csv
from dansm.scale.bench import clock
from dansm.scale.matching import coarse

LEVELS = 1.0, 0.75, 0.5, 0.25, 0.05
CALLS = 50
BATCHES = 16  # different ones, in turn
BF16 = torch.bfloat16
LATENTS, PIXELS, SMALL_LATENTS = (16, 128, 128), (3, 32, 32), (4, 32, 32)
CASES = [(10_000, LATENTS, 1), (10_000, LATENTS, 2), (10_000, LATENTS, 4), (10**6, PIXELS, 256),
         (10**6, SMALL_LATENTS, 256)]
TINY = [(200, (4, 16, 16), 1), (300, (3, 16, 16), 8)]


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", type=torch.device, default="cuda")
    parser.add_argument("--costs", default="26")
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--cases", help="numbers of the pools to measure, from 0; all if not given")
    parser.add_argument("--tiny", action="store_true", help="pools of a few hundred noises, to try this out")
    given = parser.parse_args(arguments)
    cases = TINY if given.tiny else CASES
    rows = []
    for dtype in (torch.float32, BF16):  # what cuBLAS keeps, which a training has too
        torch.ones(64, 64, device=given.device, dtype=dtype).mm(torch.ones(64, 64, device=given.device, dtype=dtype))
    for match_size, shape, batch in [cases[int(i)] for i in given.cases.split(",")] if given.cases else cases:
        x = [clock.image_like(batch, shape, seed, given.device) for seed in range(BATCHES)]
        whole = None  # the row of whole noises in bfloat16, which others are compared with
        for way, about, make in ways(match_size, shape, given.device, list(map(int, given.costs.split(",")))):
            about = {"match_size": match_size, "shape": "×".join(map(str, shape)), "batch": batch, "way": way, **about}
            for row in measured(make, x, given.device, given.seconds):
                if row["left"] == "all" and way == "coarse":
                    row |= compared(row, whole)
                elif row["left"] == "all" and about["dtype"] == "bfloat16":
                    whole = row
                rows.append(about | row | {"device": name_of(given.device), "torch": torch.__version__})
                write_csv(given.out, rows)
            print(rows[-1], flush=True)


def ways(match_size, shape, device, costs):
    """(way, what tells it from others, what makes its pool)"""
    of_all = partial(NoisePool, match_size, shape, device=device, seed=0)
    yield "whole", {"dtype": "bfloat16"}, partial(of_all, dtype=BF16)
    if shape != LATENTS:
        yield "whole", {"dtype": "float32"}, of_all
    for power, dtype in itertools.product(costs, (torch.float32, BF16)):
        def made(power=power, dtype=dtype):
            coarse.COSTS_AT_ONCE = 2**power
            return of_all(grid=(8, 8), dtype=dtype)

        yield "coarse", {"dtype": str(dtype)[6:], "costs": 2**power}, made


def measured(make, x, device, seconds):
    """The rows of one pool: for each level, and for all together."""
    clock.reset_peak(device)
    before = allocated(device)
    pool = make()
    inner = getattr(pool, "keys", pool)
    first = clock.milliseconds(device, pool, x[0])
    while inner.prices is not None and inner.prices.missing > 0:  # until noises have their prices
        pool(x[0])
    for level in LEVELS:  # whatever compiles does so now
        at_level(inner, level)
        pool(x[1])
    one = clock.milliseconds(device, pool, x[2])
    batch = len(x[0])
    few = int(LEVELS[-1] * inner.match_size / batch / 2)  # are left at the last level
    calls = max(3, min(CALLS, few, int(1000 * seconds / (2 * len(LEVELS) * one))))
    rows, times, queued, behind = [], [], [], []
    for level in LEVELS:
        at_level(inner, level)
        batches = list(itertools.islice(itertools.cycle(x), calls))
        some = [clock.milliseconds(device, pool, samples) for samples in batches]
        clock.wait(device)
        begin = time.perf_counter()
        for samples in batches:
            pool(samples)
        clock.wait(device)
        in_a_row = 1000 * (time.perf_counter() - begin) / calls
        at_level(inner, level)
        on_gpu = behind_work(pool, batches[:40]) if device.type == "cuda" else in_a_row
        rows.append(described(some, in_a_row, on_gpu) | {"left": level})
        times += some
        queued.append(in_a_row)
        behind.append(on_gpu)
    memory = {"pool_mb": round(inner.noise.nbytes / 1e6, 1), "first_ms": round(first, 1)}
    if device.type == "cuda":
        memory |= {"kept_mb": round((allocated(device) - before) / 1e6, 1),
                   "peak_mb": round((torch.cuda.max_memory_allocated(device) - before) / 1e6, 1)}
    yield from rows
    yield described(times, mean(queued), mean(behind)) | memory | {"left": "all"}


def behind_work(pool, batches):
    """Milliseconds that the GPU takes for each of at most 40 batches, as its queue holds a thousand launches."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(300_000_000)  # ticks of its clock: 150 ms
    begin.record()
    for samples in batches:
        pool(samples)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / len(batches)


def at_level(pool, level):
    """Leave this share of the noises, and draw the next ones into the places of the others."""
    pool._begin()
    pool.left = int(level * pool.rows)
    pool._draw_ahead()


def described(times, queued, behind):
    ordered = sorted(times)
    return {"calls": len(times), "median_ms": round(median(times), 4), "least_ms": round(ordered[0], 4),
            "p90_ms": round(ordered[int(0.9 * (len(times) - 1))], 4), "most_ms": round(ordered[-1], 4),
            "queued_ms": round(queued, 4), "gpu_ms": round(behind, 4)}


def compared(row, whole):
    times = {"faster": round(whole["median_ms"] / row["median_ms"], 2),
             "faster_queued": round(whole["queued_ms"] / row["queued_ms"], 2),
             "faster_gpu": round(whole["gpu_ms"] / row["gpu_ms"], 2)}
    return times | ({"smaller": round(whole["peak_mb"] / row["peak_mb"], 2)} if "peak_mb" in row else {})


def allocated(device):
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def name_of(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


if __name__ == "__main__":
    main()
