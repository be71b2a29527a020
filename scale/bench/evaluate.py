"""What evaluating costs, without sampling: the features of many images and each measure on them, in one run."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from ..base.text import say_files
from ..evaluate.extractors import INCEPTION, LITE0, features_of, load_extractor
from ..evaluate.measures import frechet_distance, kernel_distance, precision_recall, shuffled
from ..evaluate.real import feature_batch, real_features
from . import clock
from .clock import milliseconds

SHAPE = 3, 32, 32
COMPARED = 10_000  # generated images that are scored against all


def bench_evaluate(count: int, seed: int, device: torch.device, out: Path) -> None:
    """Time the features of `count` images of 3×32×32, and the measures. Prints a table, writes evaluate.json and .csv.

    Inception's weights are untrained: its features mean nothing, their time does.
    """
    images = torch.randint(256, (count, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    about = {"images": count, "compared": min(count, COMPARED)}
    parts = [(features, row_of(features, images, seed, device)) for features in (LITE0, INCEPTION)]
    bench = clock.run("evaluate", device, about, parts, out)
    clock.show(f"Evaluating {count:,} images of 3×32×32, seconds, {clock.hardware_of(bench)}", bench["rows"], {
        "features from": "features", "images/s": "images_per_second", "features": "features_s", "Fréchet": "frechet_s",
        "kernel": "kernel_s", "precision": "reach_s", "features + Fréchet": "within_s"})
    say_files(out, "evaluate.csv", "evaluate.json")


def row_of(features: str, images: Tensor, seed: int, device: torch.device) -> Iterator[dict]:
    """The row of an extractor.

    features_s           for all images, from uint8 in memory to the mean and covariance of their features
    frechet_s            for the distance of the images compared to all, from their features
    kernel_s, reach_s    for the kernel distance; for precision and recall
    within_s             for the features of all and the Fréchet distance
    """
    with tempfile.TemporaryDirectory() as folder:
        weights = untrained_inception(Path(folder)) if features == INCEPTION else None
        extractor = load_extractor(features, device, weights)
    batch = feature_batch(device)
    features_of(images[:batch], extractor, device)  # what is loaded and chosen at the first call
    measured = []

    def measure_all() -> None:
        measured.append(real_features(images, extractor, device, batch=batch))

    seconds = {"features_s": milliseconds(device, measure_all) / 1000}
    real = measured.pop()
    some = shuffled(real.features, seed)[:COMPARED]
    for name, measure, *arguments in (("frechet_s", frechet_distance, some, real),
                                      ("kernel_s", kernel_distance, some, real.features, "kernel"),
                                      ("reach_s", precision_recall, some, some, device)):
        seconds[name] = milliseconds(device, measure, *arguments) / 1000
    yield {"features": features, "dimensions": some.shape[1], "batch": batch,
           "images_per_second": round(len(images) / seconds["features_s"], 1),
           **{name: round(value, 2) for name, value in seconds.items()},
           "within_s": round(seconds["features_s"] + seconds["frechet_s"], 2)}


def untrained_inception(folder: Path) -> Path:
    """A file of weights for torch-fidelity's Inception network, as they are before any training."""
    import torch_fidelity.feature_extractor_inceptionv3 as inception

    with patch.object(inception, "load_state_dict_from_url", lambda *_, **__: {}), \
            patch.object(inception.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None):
        state = inception.FeatureExtractorInceptionV3("", ["2048"], verbose=False).state_dict()
    torch.save(state, folder / "weights.pth")
    return folder / "weights.pth"
