"""Time a pool for each of several groups on a GPU, beside one pool of as many noises, and beside a call for each group.

    PYTHONPATH=. python results/bench/groups/groups.py [--out h100.csv]

A batch has 256 samples with labels in random order. Milliseconds of a call, waiting for the GPU: median, least and most
of 60, after twelve; host_ms is the time of 50 calls in a row that wait for nothing.
"""

import argparse
import time
from pathlib import Path
from statistics import median

import torch

from dansm import NoisePool
from dansm.scale.base.files import write_csv

GPU = torch.device("cuda")
CASES = [(10, 1000, (4, 32, 32)), (10, 10_000, (4, 32, 32)), (10, 1000, (3, 32, 32)), (10, 10_000, (3, 32, 32)),
         (100, 1000, (4, 32, 32)), (1000, 64, (3, 32, 32))]


def timed(call):
    milliseconds = []
    for _ in range(72):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        torch.cuda.synchronize()
        milliseconds.append(1000 * (time.perf_counter() - begin))
    some = milliseconds[12:]
    return [round(value, 3) for value in (median(some), min(some), max(some))]


def row_of(groups, match_size, shape):
    x, labels = torch.randn(256, *shape, device=GPU), torch.randint(groups, (256,))
    pool = NoisePool(match_size, shape, groups=groups, device=GPU, seed=0)
    one = NoisePool(groups * match_size, shape, device=GPU, seed=0)
    ways = {"grouped": lambda: pool(x, labels), "one pool": lambda: one(x)}
    if groups == 10:
        pools = [NoisePool(match_size, shape, device=GPU, seed=seed) for seed in range(groups)]
        parts = [x[(labels == group).to(GPU)] for group in range(groups)]
        ways |= {"labels on the GPU": lambda: pool(x, labels.to(GPU)),
                 "a call for each": lambda: [of_group(part) for of_group, part in zip(pools, parts, strict=True)]}
    for _ in range(100 if groups > 10 else 0):  # all groups have come
        pool(x, torch.randint(groups, (256,)))
    for way, call in ways.items():
        middle, least, most = timed(call)
        row = {"groups": groups, "match_size": match_size, "shape": "×".join(map(str, shape)), "way": way,
               "median_ms": middle, "least_ms": least, "most_ms": most, "host_ms": ""}
        if way == "grouped":
            begin = time.perf_counter()
            for _ in range(50):
                call()
            row["host_ms"] = round((time.perf_counter() - begin) / 50 * 1000, 3)
            torch.cuda.synchronize()
        yield row | {"gpu": torch.cuda.get_device_name()}
    torch.cuda.empty_cache()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "h100.csv")
    given, rows = parser.parse_args(), []
    for case in CASES:
        for row in row_of(*case):
            rows.append(row)
            print(row, flush=True)
            write_csv(given.out, rows)
