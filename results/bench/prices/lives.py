"""Time whole lives of pools by squared distance and with prices, in turn, on a GPU or the CPU.

    PYTHONPATH=. python results/bench/prices/lives.py --out h200.csv

median_ms, mean_ms, least_ms, most_ms   a batch, over a life of the pool after one that is not counted
whole_ms                                all batches of that life together
"""

import argparse
from pathlib import Path

import torch

from dansm.scale.base.files import write_csv
from dansm.scale.base.machine import pick_device
from dansm.scale.bench import clock, match

CASES = [(shape, batch, match_size) for shape in ((4, 32, 32), (3, 32, 32))
         for batch, match_size in ((250, 1000), (250, 10_000), (1, 1000))]
KEPT = "median_ms", "mean_ms", "least_ms", "most_ms", "whole_ms", "calls"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="auto")
    given = parser.parse_args()
    device, rows = pick_device(given.device), []
    for shape, batch, match_size in CASES:
        x = clock.image_like(batch, shape, 0, device)
        for cost in ("squared", "priced") * 2:
            life = match.life_of_a_pool(x, match_size, 0, cost=cost)
            name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
            rows.append({"shape": "×".join(map(str, shape)), "batch": batch, "match_size": match_size, "cost": cost,
                         **{column: life[column] for column in KEPT}, "device": name})
            write_csv(given.out, rows)


if __name__ == "__main__":
    main()
