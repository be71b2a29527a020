"""How close generated images are to real ones, by features of both (Inception's: FID and KID).

The measures are torch-fidelity's, with the numbers that it computes: products on the device, in float64 where that is
fast, and what depends on the real images alone once.
"""

from functools import cache, cached_property

import numpy as np
import torch
from torch import Tensor

from ..base.machine import float64
from ..base.statistics import squared_distances, trace_of_root
from ..base.threads import one_thread
from .extractors import Extractor
from .real_features import Real, random_order

NEIGHBOUR = 3  # its distance is an image's reach in precision and recall (k in Kynkäänniemi et al. 2019)
SUBSETS, SUBSET = 100, 1000  # of the kernel distance: how many are drawn, and images in each
SUBSETS_SEED = 2020  # torch-fidelity's
DISTANCES_AT_ONCE = 2**25  # 268 MB in float64


class Reference:
    """The real images as others are compared with them: what depends on these alone is computed once.

    real       their features
    extractor  that made them
    seed       of the random order in which some of them are taken
    device     that computes products
    """

    def __init__(self, real: Real, extractor: Extractor, *, seed: int = 0, device: torch.device | str = "cpu"):
        self.real = real
        self.extractor = extractor
        self.device = torch.device(device)
        self.order = random_order(len(real.features), seed)
        self.reaches = {}

    @cached_property
    def root(self) -> Tensor:
        """R (D, D) float64 on the device, with RᵀR the covariance of all real images."""
        with one_thread():
            values, vectors = torch.linalg.eigh(torch.from_numpy(self.real.covariance))
        return float64((vectors * values.clamp_min(0).sqrt()).T, self.device)

    def drawn(self, places: slice) -> Tensor:
        """The features at these places of the random order."""
        return self.real.features[self.order[places]]

    def reach_of_last(self, count: int, neighbour: int) -> Tensor:
        """`reach` of the last `count` in the random order, on the CPU."""
        key = count, neighbour
        if key not in self.reaches:
            self.reaches[key] = reach(centred(self.drawn(slice(-count, None)), self.device)[0], neighbour).cpu()
        return self.reaches[key]


def score(features: Tensor, reference: Reference, *, logits: Tensor | None = None,
          measures: str = "all") -> dict[str, float]:
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
    frechet, kernel = reference.extractor.distances
    row = {frechet: frechet_distance(features, reference)}
    if measures == "distance":
        return row
    row |= kernel_distance(features, reference.real.features, kernel, reference.device)
    if logits is not None:
        from torch_fidelity import metric_isc

        result = metric_isc.isc_features_to_metric(logits.cpu(), splits=min(10, len(logits)))
        row |= {"inception_score": result[metric_isc.KEY_METRIC_ISC_MEAN],
                "inception_score_std": result[metric_isc.KEY_METRIC_ISC_STD]}
    return row | precision_recall(features, len(features), reference)


def floor(reference: Reference, count: int, *, measures: str = "all") -> dict[str, float]:
    """The measures of `count` random real images, half of all if there are no more: what no generator should beat.

    Kernel distance, precision and recall compare two halves that share no image. "count" tells how many were taken.
    """
    kept = len(reference.real.features)
    count = min(count, kept)
    if count == reference.real.count:
        count //= 2
    frechet, kernel = reference.extractor.distances
    row = {"count": count, frechet: frechet_distance(reference.drawn(slice(count)), reference)}
    if measures == "distance":
        return row
    half = min(count, kept // 2)
    features = reference.drawn(slice(half))
    row |= kernel_distance(features, reference.drawn(slice(-half, None)), kernel, reference.device)
    return row | precision_recall(features, half, reference)


def frechet_distance(features: Tensor, reference: Reference) -> float:
    """‖μ − ν‖² + tr(A + B − 2 (AB)^½) for features (N, D) of mean μ and covariance A, in float64. `base.statistics` has
    that of two sets of features."""
    real = reference.real
    features = float64(features, reference.device)
    mean = features.mean(0)
    features = features - mean
    covariance = features.T @ features / (len(features) - 1)
    overlap = trace_of_root(reference.root @ covariance @ reference.root.T)
    shift = mean.cpu() - torch.from_numpy(real.mean)
    return (shift.square().sum() + covariance.trace().cpu()).item() + np.trace(real.covariance).item() - 2 * overlap


def kernel_distance(features: Tensor, others: Tensor, name: str, device: torch.device) -> dict[str, float]:
    """Mean and deviation, as `name` and `name`_std, of the squared distance without bias, over subsets of features
    (N, D) and of others (M, D): those that torch-fidelity draws."""
    features, others = features.to(device), others.to(device)
    values = []
    numbers = (part.to(device) for part in subsets(len(features), len(others), SUBSETS, SUBSET))
    for own, of_others in zip(*numbers, strict=True):
        x, y = products_type(features[own]), products_type(others[of_others])
        size = len(x)
        within = sum(kernel.sum() - kernel.trace() for kernel in (cubes(x, x), cubes(y, y)))
        values.append(within / (size * (size - 1)) - 2 * cubes(x, y).mean())
    values = torch.stack(values).cpu().double()
    return {name: values.mean().item(), f"{name}_std": values.std(correction=0).item()}


def cubes(x: Tensor, y: Tensor) -> Tensor:
    """(⟨x_i, y_j⟩ / D + 1)³ for x: (N, D), y: (M, D) → (N, M)."""
    products = (x @ y.T).div_(x.shape[1]).add_(1)
    return (products * products).mul_(products)


@cache
def subsets(count: int, others: int, draws: int, size: int) -> tuple[Tensor, Tensor]:
    """The numbers of at most `size` of `count` features, and of `others`, for each draw: two (draws, size) int64."""
    random = np.random.RandomState(SUBSETS_SEED)
    size = min(size, count, others)
    pairs = [(random.choice(count, size, replace=False), random.choice(others, size, replace=False))
             for _ in range(draws)]
    return tuple(torch.from_numpy(np.stack(part)) for part in zip(*pairs, strict=True))


def products_type(x: Tensor) -> Tensor:
    """x in the type of its products: float64 on a GPU of CUDA's, where that takes milliseconds, else float32."""
    return x.double() if x.is_cuda else x.float()


def centred(features: Tensor, device: torch.device, *others: Tensor) -> list[Tensor]:
    """Features (N, D) and others on the device, with the first of the features as origin: squares of small numbers lose
    no digits. Differences of whole numbers are exact, as those from a mean are not, and equal distances stay equal."""
    parts = [products_type(part.to(device)) for part in (features, *others)]
    return [part - parts[0][0] for part in parts]


def precision_recall(features: Tensor, count: int, reference: Reference) -> dict[str, float]:
    """Share of the features (N, D) within reach of one of `count` real ones, and of these within reach of the features.
    Squared distances are compared with squared ones."""
    count = min(count, len(reference.real.features))
    neighbour = min(NEIGHBOUR, len(features) - 1, count - 1)
    others, features = centred(reference.drawn(slice(-count, None)), reference.device, features)
    own_reach, reach_of_others = reach(features, neighbour), reference.reach_of_last(count, neighbour).to(others.device)
    precise = torch.empty(len(features), dtype=torch.bool, device=features.device)
    recalled = torch.zeros(count, dtype=torch.bool, device=features.device)
    for rows in blocks(len(features), count):
        distances = squared_distances(features[rows], others)
        precise[rows] = (distances <= reach_of_others).any(1)
        recalled |= (distances <= own_reach[rows, None]).any(0)
    return {name: within.double().mean().item() for name, within in (("precision", precise.cpu()),
                                                                     ("recall", recalled.cpu()))}


def reach(features: Tensor, neighbour: int) -> Tensor:
    """The squared distance of each of the features (N, D) to its nearest but `neighbour` − 1 of the others, (N,)."""
    return torch.cat([squared_distances(features[rows], features).topk(neighbour + 1, largest=False).values[:, -1]
                      for rows in blocks(len(features), len(features))])  # itself is nearest


def blocks(rows: int, columns: int) -> list[slice]:
    """Slices of the rows of a matrix of distances, as large as fits."""
    at_once = max(1, DISTANCES_AT_ONCE // columns)
    return [slice(start, start + at_once) for start in range(0, rows, at_once)]
