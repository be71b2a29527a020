"""Time the norm's kernels on a GPU with tiles of several shapes, at each of the network's sizes.

    PYTHONPATH=. python results/bench/train/tiles.py --out results/bench/train/tiles.csv

A program holds all pixels of some channels of one image. N = 250 images in bf16, as NCSN++ has them. "now" is what
scale/model/fused.py takes. --tiny tries it in Triton's interpreter.

us    of one call inside a CUDA graph, median of 20
gb_s  bytes that it must read and write at least, over that time
"""

import argparse
import csv
import os
import sys
from itertools import product
from pathlib import Path
from statistics import median

if "--tiny" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import torch

from dansm.scale.base.launch import compiling_ahead
from dansm.scale.model import fused

# (side of the image, channels): [(channels of a program, its warps, the most registers of a thread or 0)]
SIZES = {(32, 128): [(8, 4, 0), (8, 8, 0), (16, 8, 0), (16, 8, 128), (16, 16, 0), (16, 16, 64), (16, 32, 0),
                     (32, 32, 0)],
         (16, 256): [(16, 4, 0), (16, 2, 0), (32, 4, 0), (32, 8, 128), (64, 8, 0), (64, 8, 128), (64, 16, 0)],
         (8, 256): [(16, 1, 0), (16, 2, 0), (32, 2, 0), (32, 4, 0), (64, 2, 0), (64, 4, 0), (64, 8, 0)],
         (4, 256): [(16, 1, 0), (32, 1, 0), (64, 1, 0), (64, 2, 0), (64, 4, 0)]}
KINDS = {"with SiLU": (False, 0.0), "with shift, SiLU and dropout": (True, 0.15)}
CALLS = 20


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    device = torch.device("cpu" if given.tiny else "cuda")
    sizes = {(2, 16): [(16, 1, 0)]} if given.tiny else SIZES
    if device.type == "cuda":  # autograd goes back on the stream it came on, which must be the one that is captured
        torch.cuda.set_stream(torch.cuda.Stream())
    works = [(size, kind, tile) for size, tiles in sizes.items() for kind, tile in product(KINDS, (None, *tiles))]
    with compiling_ahead(device):
        for work in works:
            calls_of(*work, device)
    rows = []
    for (side, channels), kind, tile in works:
        forward, backward = calls_of((side, channels), kind, tile, device)
        for name, call, tensors in ("forward", forward, 2), ("backward", backward, 4 if kind == "with SiLU" else 3):
            columns, warps, registers = tile or ("now", "now", "now")
            row = {"side": side, "channels": channels, "kernel": name, "kind": kind, "columns": columns, "warps": warps,
                   "registers": registers}
            try:
                us = timed(call, device)
            except Exception as error:  # more registers or memory than there are
                row |= {"us": "", "gb_s": str(error).partition("\n")[0][:60]}
            else:
                row |= {"us": round(us, 2), "gb_s": round(tensors * 500 * side**2 * channels / us / 1e3)}
            rows.append(row)
            print(*row.values(), sep="\t", flush=True)
            with open(given.out, "w", newline="") as file:
                writer = csv.DictWriter(file, row)
                writer.writeheader()
                writer.writerows(rows)


def calls_of(size, kind, tile, device):
    """Forward and backward with such a tile, already called once."""
    side, channels = size
    shifted, dropout = KINDS[kind]
    n = 250 if device.type == "cuda" else 2
    x, dy, around = (torch.randn(n, channels, side, side, dtype=torch.bfloat16, device=device).to(
        memory_format=torch.channels_last) for _ in range(3))
    shift = torch.randn(n, channels, dtype=torch.bfloat16, device=device).requires_grad_() if shifted else None
    weight, bias = (torch.rand(n, channels, device=device).requires_grad_() for _ in range(2))
    seeds = fused.new_seeds(1, device)[0] if dropout else None
    x.requires_grad_()
    wanted = [x, weight, bias, *[shift][: shifted]]

    def forward():
        with choosing(tile, size):
            return fused._Norm.apply(x, shift, weight, bias, seeds, channels // (channels // 32 or 1), 1e-6, True,
                                     round(2**24 * dropout))

    y, passed = forward()
    outputs, given = ([y], [dy]) if shifted else ([y, passed], [dy, around])

    def backward():
        with choosing(tile, size):
            torch.autograd.grad(outputs, wanted, given, retain_graph=True)

    backward()
    return forward, backward


class choosing:
    """Let the kernels take this tile inside."""

    def __init__(self, tile, size):
        self.tile, (side, self.channels) = tile, size
        self.pixels = side**2
        self.before = fused._tile_of, fused._warps

    def __enter__(self):
        if self.tile:
            columns, warps, registers = self.tile
            fused._tile_of = lambda pixels, channels, group: (self.pixels, columns, columns)
            fused._warps = lambda numbers: {"num_warps": warps, "maxnreg": registers or None}

    def __exit__(self, *_):
        fused._tile_of, fused._warps = self.before


def timed(call, device):
    """Microseconds of a call."""
    if device.type != "cuda":
        call()
        return 1.0
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
        for _ in range(CALLS):
            call()
    times = []
    for _ in range(CALLS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1000 * begin.elapsed_time(end) / CALLS)
    return median(times)


if __name__ == "__main__":
    main()
