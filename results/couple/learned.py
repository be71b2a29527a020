"""Measure what flows have learned: how straight their paths are, what an adaptive solver needs, and whether samples are
copies of training images.

    pip install '.[adaptive,eval]'
    PYTHONPATH=. python results/couple/learned.py DATA RUN [RUN …] [--count 10000] [--out learned.csv]

DATA are the images that all runs were trained on, each RUN is a folder of dansm train. A row for each, in float32:

    straightness      ∫ E‖v(x_t, t) − (x_1 − x_0)‖² dt / E‖x_1 − x_0‖² on paths of 100 Euler steps, 0 if straight (Liu
                      et al. 2022), from 512 noises, or --count if that is less
    nfe_T, seconds_T  calls of the network by dopri5 with rtol = atol = T, and their time: mean over batches of 128 of
                      these noises; nfe_T_std is the standard deviation
    pixels_nearest_…  distance ‖x − y‖ of a sample in 20 Euler steps to the nearest training image or its mirror image,
                      pixels in [−1, 1]: mean and percentiles
    pixels_below_R    share of the samples whose nearest training image has less than R times the distance of the
                      second nearest; 1/3 tells copies (Yoon et al. 2023), but not those of an image that is there twice
    features_…        the same distances and shares in the features of --features (efficientnet-lite0)

The last row compares --count random training images with all others: what samples as new as unseen images would have.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import torch
from torch import Tensor

from dansm import BadInput, RectifiedFlow, cost_matrix, squared_norms
from dansm.scale.base.files import write_csv
from dansm.scale.base.machine import hardware, pick_device
from dansm.scale.base.noise import path_noise
from dansm.scale.data.labels import load_labels
from dansm.scale.data.loader import load_images
from dansm.scale.data.pixels import from_uint8
from dansm.scale.evaluate.by_class import Classes
from dansm.scale.evaluate.extractors import features_of_all, load_extractor
from dansm.scale.model.load import load_models
from dansm.scale.model.sampling import UNGUIDED, at_once, guided, sample_images, sampler

try:
    from torchdiffeq import odeint
except ImportError:
    odeint = None

NOISES, BATCH = 512, 128  # of paths and of the solver
PATH_STEPS, SAMPLE_STEPS = 100, 20
RATIOS = {"1/3": 1 / 3, "0.5": 0.5, "0.8": 0.8}
BLOCK = 2**26  # distances at a time, 256 MB


def measure_paths(flow: RectifiedFlow, net, z: Tensor, labels: Tensor | None) -> dict:
    """Straightness and solver, from noises z: (N, C, H, W) and labels (N,) on the same device."""
    noises = z.split(BATCH)
    labels_of = [None] * len(noises) if labels is None else labels.split(BATCH)
    parts = [(guided(net, classes, UNGUIDED, flow, 1), part) for classes, part in zip(labels_of, noises, strict=True)]
    bends, lengths = zip(*(measure_straightness(flow, *part) for part in parts), strict=True)
    row = {"straightness": sum(bends) / sum(lengths)}
    for tolerance in ("1e-3", "1e-5") if odeint else ():
        calls, seconds = zip(*(solve(flow, *part, float(tolerance)) for part in parts), strict=True)
        row |= {f"nfe_{tolerance}": fmean(calls), f"nfe_{tolerance}_std": stdev(calls) if len(calls) > 1 else "",
                f"seconds_{tolerance}": fmean(seconds)}
    return row


def measure_straightness(flow: RectifiedFlow, net, z: Tensor) -> tuple[float, float]:
    """Sums over the noises z: (B, ...) of ∫ ‖v − (x_1 − x_0)‖² dt, and of ‖x_1 − x_0‖²."""
    x = torch.stack(list(flow.path(net, z, PATH_STEPS)))
    line = x[-1] - x[0]
    v = x.diff(dim=0) * PATH_STEPS
    return (v - line).square().sum().item() / PATH_STEPS, line.square().sum().item()


def solve(flow: RectifiedFlow, net, z: Tensor, tolerance: float) -> tuple[int, float]:
    """Draw samples from z: (B, ...) by dopri5. Returns how often the network was called, and the seconds."""
    times = []

    def velocity(t: Tensor, x: Tensor) -> Tensor:
        times.append(t.item())
        return flow._velocity(net, x, times[-1])

    ends = torch.tensor([0.0, 1.0], device=z.device)
    land = {"step_t": ends[1:]}  # else the last step goes beyond 1, to times that no network was trained for
    begin = time.perf_counter()
    odeint(velocity, z, ends, rtol=tolerance, atol=tolerance, method="dopri5", options=land)[-1].cpu()
    return len(times), time.perf_counter() - begin


def three_nearest(x: Tensor, mirrored: Tensor, known: Tensor, device: torch.device) -> Tensor:
    """Distances (N, 3) of each x or its mirror image, (N, ...), to the nearest of known, (n, ...), in their order."""
    x, mirrored = x.to(device), mirrored.to(device)
    nearest = torch.full((len(x), 3), torch.inf, device=device)
    for block in known.split(max(1, BLOCK // len(x))):
        block = block.to(device)
        squares = torch.minimum(squared_distances(x, block), squared_distances(mirrored, block))
        nearest = torch.cat([nearest, squares], 1).topk(3, largest=False).values.sort().values
    return nearest.clamp(min=0).sqrt().cpu()  # a copy's may round to less than 0


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """(N, ...), (n, ...) → (N, n)"""
    return cost_matrix(x, y).add_(squared_norms(x)[:, None])


def measure_copies(images: Tensor, spaces: dict, known: dict, device: torch.device, skip: int = 0) -> dict:
    """Nearest training images of images (N, C, H, W) uint8. `spaces` are functions of images, `known` what these make
    of the training images. The `skip` nearest do not count: 1 for training images, which are nearest to themselves."""
    row = {"count": len(images)}
    for space, function in spaces.items():  # a sample's mirror image is as near to y as the sample to y's mirror image
        nearest = three_nearest(function(images), function(images.flip(3)), known[space], device)
        first, second = nearest[:, skip : skip + 2].T
        row[f"{space}_nearest_mean"] = first.mean().item()
        row |= {f"{space}_nearest_{q}%": np.percentile(first, q).item() for q in (1, 10, 50)}
        row |= {f"{space}_below_{name}": (first < r * second).double().mean().item() for name, r in RATIOS.items()}
    return row


def measure(data: str, runs: list[Path], count: int, features: str, device: torch.device) -> Iterator[dict]:
    models = load_models(runs, [SAMPLE_STEPS])
    recipe, left_out = models[0].about["recipe"], []
    images = torch.as_tensor(np.asarray(load_images(data, size=recipe["size"] or None, left_out=left_out,
                                                    skip_unreadable=recipe["skip_unreadable"])))
    for model in models:
        trained_on = model.about["images"], *model.shape
        if not isinstance(model.flow, RectifiedFlow) or not model.draws_images or trained_on != images.shape:
            raise BadInput(f"{model.path} is a {model.about['flow']} flow of {trained_on}, {data} holds "
                           f"{tuple(images.shape)}: expected a rectified flow, and the images it was trained on")
    extractor = load_extractor(features, device)
    spaces = {"pixels": from_uint8, "features": lambda images: features_of_all([images], extractor, device)[0]}
    known = {space: function(images) for space, function in spaces.items()}
    for model in models:
        net = sampler(model.net.to(device), device, "fp32", compile=False)
        labels = None
        if model.classes:
            of_images = load_labels(data, model.about["recipe"]["labels"], len(images), left_out)
            labels = Classes(model.classes, of_images).drawn(range(count), seed=0).to(device)
        z = path_noise(range(min(count, NOISES)), model.shape, device=device)
        row = measure_paths(model.flow, net, z, None if labels is None else labels[: len(z)])
        samples = torch.cat([*sample_images(net, model.flow, range(count), model.shape, SAMPLE_STEPS, device=device,
                                            batch=at_once(model.net, device), labels=labels)])
        yield {"run": model.label, "trained_steps": model.about["step"], **row,
               **measure_copies(samples, spaces, known, device)}
        model.net.cpu()
    own = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count]
    yield {"run": "real images", **measure_copies(images[own], spaces, known, device, skip=1)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("data")
    parser.add_argument("runs", type=Path, nargs="+", metavar="run")
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--features", default="efficientnet-lite0")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("learned.csv"))
    given = parser.parse_args()
    if odeint is None:
        print("torchdiffeq is not installed (pip install '.[adaptive]'): no nfe and no seconds are measured")
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # tf32 is too coarse for a tolerance of 1e-5
    device, rows = pick_device(given.device), []
    for row in measure(given.data, given.runs, given.count, given.features, device):
        row |= {"extractor": given.features, "gpu": hardware(device)["gpu"] or "CPU"}
        rows.append({name: f"{value:.5g}" if isinstance(value, float) else value for name, value in row.items()})
        print(*rows[-1].values(), sep="  ", flush=True)
        write_csv(given.out, rows)
