"""How close generated images are to real ones, by torch-fidelity's measures on features (Inception's: FID and KID)."""

import numpy as np
import torch
from torch import Tensor
from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc

from .extractors import Extractor
from .real_features import Real, shuffled

NEIGHBOUR = 3  # its distance is an image's reach in precision and recall (k in Kynkäänniemi et al. 2019)
SUBSETS, SUBSET = 100, 1000  # of the kernel distance: how many are drawn, and images in each


def score(features: Tensor, real: Real, extractor: Extractor, *, logits: Tensor | None = None, seed: int = 0,
          device: torch.device | str = "cpu", measures: str = "all") -> dict[str, float]:
    """Measure the features (N, D) of generated images, N ≥ 2, against the real ones.

    logits    (N, classes) of them, for the Inception Score
    measures  "all", or "distance" for the Fréchet distance alone

    fid                 Fréchet distance of the Gaussians around both sets of features; against all real images
    kid, kid_std        squared distance of their means under a cubic kernel, over 100 draws of up to 1,000 of each
    inception_score, …  exp of the mutual information of image and class; with logits only
    precision, recall   share of generated images within reach of a real one, and of real ones within reach of a
                        generated; against N real images, or all if there are fewer. On these features, not on VGG16's
                        as in Kynkäänniemi et al. 2019
    """
    frechet, kernel = extractor.distances
    row = {frechet: frechet_distance(features, real)}
    if measures == "distance":
        return row
    row |= kernel_distance(features, real.features, kernel)
    if logits is not None:
        result = metric_isc.isc_features_to_metric(logits.cpu(), splits=min(10, len(logits)))
        row |= {"inception_score": result[metric_isc.KEY_METRIC_ISC_MEAN],
                "inception_score_std": result[metric_isc.KEY_METRIC_ISC_STD]}
    return row | precision_recall(features, shuffled(real.features, seed)[-len(features) :], device)


def floor(real: Real, count: int, extractor: Extractor, *, seed: int = 0, device: torch.device | str = "cpu",
          measures: str = "all") -> dict[str, float]:
    """The measures of `count` random real images, half of all if there are no more: what no generator should beat.

    Kernel distance, precision and recall compare two halves that share no image. "count" tells how many were taken.
    """
    count = min(count, len(real.features))
    if count == real.count:
        count //= 2
    features = shuffled(real.features, seed)
    frechet, kernel = extractor.distances
    row = {"count": count, frechet: frechet_distance(features[:count], real)}
    if measures == "distance":
        return row
    half = min(count, len(features) // 2)
    row |= kernel_distance(features[:half], features[-half:], kernel)
    return row | precision_recall(features[:half], features[-half:], device)


def frechet_distance(features: Tensor, real: Real) -> float:
    """By torch-fidelity, from features (N, D) in float64. `base.statistics` has the same of two sets."""
    statistics = metric_fid.fid_features_to_statistics(features.cpu().double())
    statistics["sigma"] = np.atleast_2d(statistics["sigma"])
    real_statistics = {"mu": real.mean, "sigma": real.covariance}
    return metric_fid.fid_statistics_to_metric(statistics, real_statistics, False)[metric_fid.KEY_METRIC_FID]


def kernel_distance(features: Tensor, others: Tensor, name: str) -> dict[str, float]:
    result = metric_kid.kid_features_to_metric(features, others, kid_subsets=SUBSETS, verbose=False,
                                               kid_subset_size=min(SUBSET, len(features), len(others)))
    return {name: result[metric_kid.KEY_METRIC_KID_MEAN], f"{name}_std": result[metric_kid.KEY_METRIC_KID_STD]}


def precision_recall(features: Tensor, others: Tensor, device: torch.device | str) -> dict[str, float]:
    neighbour = min(NEIGHBOUR, len(features) - 1, len(others) - 1)
    result = metric_prc.prc_features_to_metric(features.to(device), others.to(device), prc_neighborhood=neighbour,
                                               prc_batch_size=5000, save_cpu_ram=True, verbose=False)
    return {"precision": result[metric_prc.KEY_METRIC_PRECISION], "recall": result[metric_prc.KEY_METRIC_RECALL]}
