"""Couple CIFAR-10 where the condition of an image is a vector, as of a text: which way of pairing serves best?

    PYTHONPATH=. python results/conditions/embeddings.py DATA [--ways random,pool] [--seed 0] [--images 512000]

The condition of an image is its EfficientNet-Lite0 features, the first 64 principal components, each of variance 1. The
network is dansm's small one, whose embedding of labels is a linear layer of the condition, left out in 10 % of the
training. Ways of pairing:

    random      a fresh noise for each image
    pool        one pool of 10,000
    kmeans-K    a pool of 10,000 / K for each of K clusters of conditions
    carry-W     one pool of 10,000 whose noises carry the conditions of earlier images, cost ‖x − z‖² + W ‖c − c'‖²

A row for each in embeddings.csv, or --out: the Fréchet distance of 5,000 samples to all images in 3, 10 and 50 steps;
condition_error_…, the mean square between the condition asked for and the sample's own, per component (2 if samples had
nothing to do with it); cluster_told, the share of noises from which a linear probe tells one of ten clusters.
"""

import argparse
import csv
import math
import time
from functools import partial
from pathlib import Path

import torch
from torch import nn

import dansm
from dansm.scale.base.files import write_csv
from dansm.scale.base.machine import hardware, pick_device
from dansm.scale.base.statistics import frechet_distance, told_class
from dansm.scale.data.loader import load_images
from dansm.scale.data.pixels import from_uint8, to_uint8
from dansm.scale.evaluate.extractors import features_of_all, load_extractor
from dansm.scale.matching.pool import greedy_anywhere

NOISES, BATCH, COMPONENTS, DRAWN, STEPS = 10_000, 256, 64, 5_000, (3, 10, 50)
PROBED = 80  # batches, the last, whose noises the probe gets


class Conditioned(dansm.UNet):
    """Its labels are conditions (B, COMPONENTS)."""

    def __init__(self):
        super().__init__(**dansm.NETWORKS["small"], classes=1)
        self.label = nn.Linear(COMPONENTS, 4 * self.width)

    def _known(self, labels, x):
        if labels is None:
            return torch.zeros(len(x), COMPONENTS, device=x.device)
        return labels * (torch.rand(len(x), 1, device=x.device) >= 0.1) if self.training else labels


def clusters(conditions, count, seed):
    """The cluster (n,) of each condition (n, COMPONENTS), by k-means."""
    generator = torch.Generator(conditions.device).manual_seed(seed)
    order = torch.randperm(len(conditions), generator=generator, device=conditions.device)
    centres = conditions[order[:count]].clone()
    for _ in range(40):
        cluster = torch.cdist(conditions, centres).argmin(1)
        sums = torch.zeros_like(centres).index_add_(0, cluster, conditions)
        centres = sums / cluster.bincount(minlength=count).clamp_min(1)[:, None]
    return torch.cdist(conditions, centres).argmin(1)


class CarryingPool:
    """A pool whose noises carry conditions of earlier samples: cost ‖x − z‖² + weight · ‖c − c'‖²."""

    def __init__(self, weight, dimensions, seed, device):
        self.weight, self.generator = weight, torch.Generator(device).manual_seed(seed)
        self.z, self.seen = torch.empty(0, dimensions, device=device), []

    def refill(self):
        past = torch.cat(self.seen)[-NOISES:]
        order = torch.randperm(len(past), generator=self.generator, device=past.device)
        self.carried = past[order.repeat(math.ceil(NOISES / len(past)))[:NOISES]]
        self.z = torch.randn(NOISES, self.z.shape[1], generator=self.generator, device=past.device)
        self.seen = self.seen[-(NOISES // BATCH + 1):]

    def __call__(self, x, conditions):
        self.seen.append(conditions)
        out, begin = torch.empty_like(x.flatten(1)), 0
        while begin < len(x):
            if not len(self.z):
                self.refill()
            now = slice(begin, begin + len(self.z))
            apart = torch.cdist(conditions[now], self.carried).square()
            picks = greedy_anywhere(dansm.cost_matrix(x[now], self.z) + self.weight * apart)
            out[now] = self.z[picks]
            left = torch.ones(len(self.z), dtype=torch.bool, device=x.device)
            left[picks] = False
            begin, self.z, self.carried = begin + len(picks), self.z[left], self.carried[left]
        return out.view_as(x)


def coupling(way, conditions, shape, seed):
    """A function of images x and their numbers that returns their noises."""
    kind, _, number = way.partition("-")
    settings = dict(shape=shape, device=conditions.device, seed=seed)
    if kind in ("random", "pool"):
        pool = dansm.NoisePool(NOISES if kind == "pool" else 0, **settings)
        return lambda x, numbers: pool(x)
    if kind == "kmeans":
        cluster = clusters(conditions, int(number), seed).cpu()
        pool = dansm.NoisePool(NOISES // int(number), **settings, groups=int(number))
        return lambda x, numbers: pool(x, cluster[numbers])
    pool = CarryingPool(float(number), math.prod(shape), seed, conditions.device)
    return lambda x, numbers: pool(x, conditions[numbers.to(conditions.device)])


def trained(images, conditions, pair, steps, seed):
    """The network after so many steps, averaged, and of the last batches their noises and numbers."""
    device = images.device
    torch.manual_seed(seed)
    order = torch.Generator().manual_seed(seed)
    net = Conditioned().to(device, memory_format=torch.channels_last)
    training, flow = dansm.Training(net, lr=3e-4, decay=0.999), dansm.RectifiedFlow()
    forward = torch.compile(net) if device.type == "cuda" else net
    net.train()
    noises, all_numbers = [], []
    for step in range(steps):
        numbers = torch.randint(len(images), (BATCH,), generator=order)
        x = images[numbers.to(device)]
        x = torch.where(torch.rand(len(x), 1, 1, 1, device=device) < 0.5, x.flip(3), x)
        z = pair(x, numbers)
        if step >= steps - PROBED:
            noises.append(z.flatten(1).float())
            all_numbers.append(numbers)
        training.optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = flow.loss(partial(forward, labels=conditions[numbers.to(device)]), x, z)
        loss.backward()
        training.update()
    return training.average, torch.cat(noises), torch.cat(all_numbers)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("data")
    parser.add_argument("--ways", default="random,pool,kmeans-10,kmeans-100,carry-1")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=512_000)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    given = parser.parse_args()
    device = pick_device("auto")
    torch.set_float32_matmul_precision("high")
    pixels = torch.as_tensor(load_images(given.data))
    extractor = load_extractor("efficientnet-lite0", device)
    real = features_of_all(pixels.split(500), extractor, device)[0].float().to(device)
    centre = real.mean(0)
    values, directions = torch.linalg.eigh(torch.cov((real - centre).T))
    basis = directions[:, -COMPONENTS:] / values[-COMPONENTS:].clamp_min(1e-8).sqrt()
    conditions, images = (real - centre) @ basis, from_uint8(pixels.to(device))
    probed = clusters(conditions, 10, 123).cpu()
    asked = conditions[torch.randperm(len(conditions), generator=torch.Generator().manual_seed(1))[:DRAWN].to(device)]
    start = torch.randn(len(asked), *images.shape[1:], generator=torch.Generator(device).manual_seed(2), device=device)
    rows = list(csv.DictReader(given.out.open(newline=""))) if given.out.exists() else []
    for way in given.ways.split(","):
        begin, pair = time.time(), coupling(way, conditions, images.shape[1:], given.seed)
        net, noises, numbers = trained(images, conditions, pair, given.images // BATCH, given.seed)
        row = {"way": way, "seed": given.seed, "images": given.images,
               "cluster_told": told_class(noises, probed[numbers]), "train_seconds": time.time() - begin}
        for steps in STEPS:
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                drawn = torch.cat([dansm.RectifiedFlow().sample(partial(net, labels=of_these), z, steps).float()
                                   for of_these, z in zip(asked.split(1000), start.split(1000), strict=True)])
            features = features_of_all(to_uint8(drawn).cpu().split(500), extractor, device)[0].float().to(device)
            row[f"frechet_{steps}"] = frechet_distance(features.cpu(), real.cpu())
            row[f"condition_error_{steps}"] = ((features - centre) @ basis - asked).square().mean().item()
        row["gpu"] = hardware(device)["gpu"] or "CPU"
        rows.append({name: f"{value:.5g}" if isinstance(value, float) else value for name, value in row.items()})
        print(rows[-1], flush=True)
        write_csv(given.out, rows)
