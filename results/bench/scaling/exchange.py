"""Train a network by two exchanges of gradients, in bf16 and in float32: the losses, and the rate.

    PYTHONPATH=. python results/bench/scaling/exchange.py --out results/bench/scaling/one.csv
    PYTHONPATH=. torchrun --nproc-per-node 2 results/bench/scaling/exchange.py --out results/bench/scaling/two.csv

Each process has 250 synthetic samples a step and a pool of its own of 10,000. Each way begins with the same weights,
noises and times. --tiny tries it on a CPU.

loss      mean of the steps since the row before, and of all processes
median_ms of these steps, by the first GPU's clock
"""

import argparse
import csv
import itertools
from pathlib import Path
from statistics import fmean, median

import torch
import torch.distributed as group

import dansm
from dansm.scale.base.processes import everyones, processes, ranks
from dansm.scale.bench.clock import image_like
from dansm.scale.bench.train import between, moment
from dansm.scale.data import loader
from dansm.scale.model.recipe import Recipe
from dansm.scale.train.exchange import Exchange
from dansm.scale.train.step import FastTraining

EVERY = 25  # steps between two rows


class InFloat32(FastTraining):
    """Exchanges the gradients after all of them are there, in float32."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.one_pass = False  # which reads the gradients of copies, in bf16

    def _exchange(self):
        self.late = Exchange(self.net.parameters())

    def _backward(self, *arguments):
        loss = super()._backward(*arguments)
        self.late.now()
        return loss


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="ncsnpp")
    parser.add_argument("--batch", type=int, default=250, help="of one process")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    shape, images = (4, 32, 32), 20_000
    if given.tiny:
        dansm.NETWORKS["ncsnpp"] = dict(width=8, multipliers=(1,), blocks=1, attention_at=())
        shape, images, given.batch, given.steps = (4, 8, 8), 64, 4, 2 * EVERY
    rows = []
    with processes(torch.device("cpu" if given.tiny else "cuda")) as device:
        torch.backends.cudnn.benchmark = True  # as the trainer does
        data = image_like(images, shape, 0, device).half()
        ways = {"bf16": FastTraining, "float32": InFloat32} if ranks()[1] > 1 else {"none": FastTraining}
        for way, kind in ways.items():
            for row in train(kind, data, given, device):
                rows.append({"processes": ranks()[1], "exchange": way, **row})
                if ranks()[0] == 0:
                    print(*rows[-1].values(), flush=True)
                    write(given.out, rows)


def train(kind, data, given, device):
    rank, count = ranks()
    torch.manual_seed(0)
    recipe = Recipe(data="", network=given.network, batch=given.batch * count, lr=1e-4)
    run = kind(dansm.UNet(**recipe.network_settings(data.shape[1], data.shape[2:])), recipe, device)
    torch.manual_seed(1 + rank)
    pool = dansm.NoisePool(min(10_000, len(data)), data.shape[1:], device=device, seed=0)
    batches = loader.batches(data, recipe.batch, flip=False, seed=0, rank=rank, ranks=count, device=device)
    losses, moments = [], [moment(device)]
    pairs = ((x, pool(x)) for x in itertools.islice(batches, given.steps))
    for step, loss in enumerate(dansm.train(run, dansm.RectifiedFlow(), pairs), 1):
        losses.append(loss)
        moments.append(moment(device))
        if step % EVERY == 0:
            mean = torch.stack(losses).mean().item()  # waits
            ms = median(between(begin, end) for begin, end in itertools.pairwise(moments))
            yield {"step": step, "loss": round(fmean(everyones(mean)), 5), "median_ms": round(ms, 3),
                   "images_per_second": round(1000 * recipe.batch / ms, 1)}
            losses, moments = [], [moment(device)]
    if count > 1:
        group.barrier()


def write(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
