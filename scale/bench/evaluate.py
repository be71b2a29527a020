"""What evaluating costs, without sampling: the features of many images and each measure on them, in one run."""

from collections.abc import Iterator
from unittest.mock import patch

import torch
from torch import Tensor

from ..evaluate.extractors import features_of, load_extractor
from ..evaluate.measures import frechet_distance, kernel_distance, precision_recall, shuffled
from ..evaluate.real import feature_batch, real_features
from .clock import milliseconds

INCEPTION = "torch_fidelity.feature_extractor_inceptionv3"


def row_of(features: str, images: Tensor, seed: int, device: torch.device) -> Iterator[dict]:
    """The row of an extractor, Inception's with untrained weights: seconds for all images' features with their mean and
    covariance, and for each measure on the features. reach: precision and recall; within: features and Fréchet."""
    with patch(f"{INCEPTION}.load_state_dict_from_url", lambda *_, **__: {}), \
            patch(f"{INCEPTION}.FeatureExtractorInceptionV3.load_state_dict"):
        extractor = load_extractor(features, device)
    batch = feature_batch(device)
    features_of(images[:batch], extractor, device)  # what is loaded and chosen at the first call
    measured = []
    ms = milliseconds(device, lambda: measured.append(real_features(images, extractor, device)))
    real, seconds = measured[0], {"features_s": ms / 1000}
    some = shuffled(real.features, seed)[:10_000]  # generated images are scored against all
    for name, measure, *arguments in (("frechet_s", frechet_distance, some, real),
                                      ("kernel_s", kernel_distance, some, real.features, "kernel"),
                                      ("reach_s", precision_recall, some, some, device)):
        seconds[name] = milliseconds(device, measure, *arguments) / 1000
    yield {"features": features, "dimensions": some.shape[1], "batch": batch,
           "images_per_second": round(len(images) / seconds["features_s"], 1),
           **{name: round(value, 2) for name, value in seconds.items()},
           "within_s": round(seconds["features_s"] + seconds["frechet_s"], 2)}
