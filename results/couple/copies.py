"""Ask whether a coupling makes flows copy training images, among samples that are equally good.

    PYTHONPATH=. python results/couple/copies.py DATA RUN [RUN …] [--steps 10,12,15,20,50] [--out copies.csv]

DATA are the images that all runs were trained on, each RUN is a folder of dansm train. A row for each run and count of
Euler steps. The first run is what others are compared with, in its row of the nearest Fréchet distance:

    frechet_distance  of --count samples, in the features of --features (efficientnet-lite0)
    pixels_nearest    mean distance ‖x − y‖ of a sample to the nearest training image or its mirror image, pixels in
                      [−1, 1]; features_nearest, the same in the features
    pixels_below_0.5  share of the samples whose nearest training image has less than half the distance of the second
    equal_steps, equal_distance   steps and Fréchet distance of the first run's row that this one is compared with
    pixels_nearer     share of the samples that lie nearer to a training image than the first run's sample from the
                      same noise: 0.5 if neither does; features_nearer, the same in the features
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from learned import three_nearest

from dansm import BadInput
from dansm.scale.base.files import write_csv
from dansm.scale.base.machine import hardware, pick_device
from dansm.scale.data.loader import load_images
from dansm.scale.data.pixels import from_uint8
from dansm.scale.evaluate.extractors import features_of_all, load_extractor
from dansm.scale.evaluate.measures import Reference, frechet_distance
from dansm.scale.evaluate.real_features import real_features
from dansm.scale.model.load import load_models
from dansm.scale.model.sampling import at_once, sample_images, sampler


def measure(data: str, runs: list[Path], steps: list[int], count: int, features: str, device: torch.device):
    """Yield the rows, first those of the first run."""
    models = load_models(runs, steps)
    images = torch.as_tensor(np.asarray(load_images(data, size=models[0].about["recipe"]["size"] or None)))
    if trained := next((model for model in models if model.about["images"] != len(images) or model.classes), None):
        raise BadInput(f"{trained.path} was trained on {trained.about['images']} images or by class, {data} holds "
                       f"{len(images)}: expected runs of these images without labels")
    extractor = load_extractor(features, device)
    real = real_features(images, extractor, device)
    reference = Reference(real, extractor, device=device)
    known = {"pixels": from_uint8(images), "features": real.features}
    first = []  # rows of the first run, with the distances of each sample
    for model in models:
        net = sampler(model.net.to(device), device, "fp32", compile=False)
        for number in steps:
            samples = torch.cat([*sample_images(net, model.flow, range(count), model.shape, number, device=device,
                                                batch=at_once(model.net, device))])
            spaces, mirrored = ({"pixels": from_uint8(each), "features": features_of_all([each], extractor, device)[0]}
                                for each in (samples, samples.flip(3)))
            nearest = {space: three_nearest(spaces[space], mirrored[space], known[space], device) for space in known}
            row = {"run": model.label, "steps": number,
                   "frechet_distance": frechet_distance(spaces["features"], reference),
                   **{f"{space}_nearest": nearest[space][:, 0].mean().item() for space in known},
                   "pixels_below_0.5": (nearest["pixels"][:, 0] < nearest["pixels"][:, 1] / 2).double().mean().item()}
            if model is models[0]:
                first.append((row, nearest))
            equal, theirs = min(first, key=lambda each: abs(each[0]["frechet_distance"] - row["frechet_distance"]))
            row |= {"equal_steps": equal["steps"], "equal_distance": equal["frechet_distance"],
                    **{f"{space}_nearer": (nearest[space][:, 0] < theirs[space][:, 0]).double().mean().item()
                       for space in known if model is not models[0]}}
            yield row
        model.net.cpu()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("runs", type=Path, nargs="+", metavar="run")
    parser.add_argument("--steps", default="10,12,15,20,50")
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--features", default="efficientnet-lite0")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("copies.csv"))
    given = parser.parse_args()
    device, rows = pick_device(given.device), []
    numbers = [int(number) for number in given.steps.split(",")]
    for row in measure(given.data, given.runs, numbers, given.count, given.features, device):
        row |= {"extractor": given.features, "gpu": hardware(device)["gpu"] or "CPU"}
        rows.append({name: f"{value:.5g}" if isinstance(value, float) else value for name, value in row.items()})
        print(*rows[-1].values(), sep="  ", flush=True)
        write_csv(given.out, rows)
