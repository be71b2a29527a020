"""Statistics that several rooms report: spreads, crossings and bends of lines, the Fréchet distance."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dansm import BadInput, cost_matrix, members_of, squared_norms

from .threads import one_thread


def mean_and_std(values: Sequence[float] | Tensor) -> dict[str, float]:
    """{"mean": …, "std": …} of some numbers; the standard deviation of one number is 0."""
    numbers = torch.as_tensor(values, dtype=torch.float64).cpu()
    return {"mean": numbers.mean().item(), "std": numbers.std().item() if len(numbers) > 1 else 0.0}


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """‖a_i − b_j‖² for every i and j. a: (N, ...), b: (M, ...) → (N, M)."""
    return cost_matrix(a, b).add_(squared_norms(a)[:, None])


def own_noise_nearest(x: Tensor, z: Tensor) -> float:
    """Share of samples whose own noise is the nearest of all, pairs (B, ...): see docs/theory.md."""
    nearest = cost_matrix(x.float(), z.float()).argmin(1)
    return (nearest == torch.arange(len(x), device=x.device)).cpu().double().mean().item()


def told_class(z: Tensor, labels: Tensor) -> float:
    """How often a linear probe tells the class of a sample from its noise: 1/classes is chance, 1 is always.

    z: (N, ...), labels: (N,). The probe names the class with the nearest mean noise. Every fifth noise of a class is
    held out to be told, the others make the mean. NaN if no class has five. The classes count alike, whatever their
    sizes.
    """
    held_out, means = [], []
    for members in members_of(labels, len(z), int(labels.max()) + 1).values():
        noises = z.flatten(1)[members.to(z.device)]
        held_out.append(noises[4::5])
        means.append((noises.sum(0) - noises[4::5].sum(0)) / (len(noises) - len(noises[4::5])))
    means = torch.stack(means)
    told = [(noises @ means.T - means.square().sum(1) / 2).argmax(1) == number
            for number, noises in enumerate(held_out)]
    return torch.stack([right.float().mean() for right in told]).nanmean().item()


def straightness(path: Tensor) -> float:
    """How far paths (steps + 1, B, ...) bend, 0 if straight: the mean squared difference of the velocity from that of
    the line between the ends (Liu et al. 2022), over that line's square: inf or NaN where a path ends as it began."""
    path = path.flatten(2)
    steps = path[1:] - path[:-1]
    line = path[-1] - path[0]
    bend = (steps * len(steps) - line).square().sum(2).mean(0)
    return (bend / line.square().sum(1)).mean().item()


def crossing_lines(a: Tensor, b: Tensor) -> Tensor:
    """Which segments a_i → b_i in the plane cross. a, b: (N, 2) → (N, N) bool, symmetric, False on the diagonal."""
    along = b - a

    def side(points):  # on which side of line i lies point j
        to = points[None] - a[:, None]
        return (along[:, None, 0] * to[..., 1] - along[:, None, 1] * to[..., 0]).sign()

    apart = side(a) * side(b) < 0  # line i has the ends of segment j on different sides
    return apart & apart.T


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """The Fréchet distance of two sets of features, taken as Gaussians: ‖μ_a − μ_b‖² + tr(A + B − 2 (AB)^½).

    a, b: (N, D), N ≥ 2 each. On Inception's features it is called FID (Heusel et al. 2017). The trace of the root is
    the sum of the singular values of a·bᵀ, centred and scaled so that A = aᵀa: no covariance is made, and a singular
    one costs no accuracy. Rounding below 0 is cut to 0.
    """
    if min(len(a), len(b)) < 2 or a.shape[1:] != b.shape[1:]:
        raise BadInput(f"features are {tuple(a.shape)} and {tuple(b.shape)}: expected at least two each, equally long")
    a, b = a.flatten(1).cpu().double(), b.flatten(1).cpu().double()  # Apple's GPUs have no float64
    shift = a.mean(0) - b.mean(0)
    a, b = root_of_covariance(a), root_of_covariance(b)
    overlap = torch.linalg.svdvals(a @ b.T).sum()
    return (shift.square().sum() + a.square().sum() + b.square().sum() - 2 * overlap).clamp_min(0).item()


def trace_of_root(product: Tensor) -> float:
    """tr P^½ of a symmetric, positive P (n, n), the sum of the roots of its eigenvalues; negative ones, rounding, count
    as 0. It is computed on the CPU, as a GPU is no faster."""
    with one_thread():
        return torch.linalg.eigvalsh(product.cpu()).clamp_min(0).sqrt().sum().item()


def root_of_covariance(features: Tensor) -> Tensor:
    """R with RᵀR the covariance of features (N, D): (N, D), or (D, D) where that is smaller."""
    root = (features - features.mean(0)) / (len(features) - 1) ** 0.5
    return torch.linalg.qr(root, mode="r").R if len(root) > root.shape[1] else root


@dataclass
class InterPathDistance:
    """Means in the units of the data; NaN for a single path. t runs from noise, 0, to data, 1."""

    mean: float  # of the least distances of all pairs of paths
    mean_t: float  # the time at which pairs are nearest
    minimum: float  # of the distance of each path to the one that comes nearest
    minimum_t: float  # the time at which it does


@torch.no_grad()
def inter_path_distance(x: Tensor, z: Tensor, block: int = 1024) -> InterPathDistance:
    """How near the straight paths z_i → x_i come to each other at equal times, over all pairs i ≠ j.

    x, z: (B, ...), B ≥ 2. With U = z_i − z_j and V = x_i − x_j two paths are ‖(1−t)U + tV‖ apart, least at
    t* = ⟨U, U−V⟩ / ‖U−V‖², clamped to [0, 1]. All inner products come from matrix products of block × block paths in
    float64, which take about 100·block² + 64·block·D bytes, whatever the number of paths.
    """
    if len(x) < 2 or x.shape != z.shape:
        raise BadInput(f"x is {tuple(x.shape)} and z {tuple(z.shape)}: expected at least two paths, equal shapes")
    exact = torch.float32 if x.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    total = total_t = 0.0
    minimum = torch.full((len(x),), torch.inf, dtype=exact, device=x.device)
    minimum_t = torch.zeros_like(minimum)
    blocks = [slice(start, start + block) for start in range(0, len(x), block)]
    for number, first in enumerate(blocks):
        for second in blocks[number:]:  # (i, j) is (j, i)
            ends = x[first], z[first], x[second], z[second]
            distance, t = _distances_of_paths(*(end.flatten(1).to(exact) for end in ends))
            if first == second:
                distance.fill_diagonal_(torch.inf)  # a path and itself are no pair
            once = torch.ones_like(distance, dtype=torch.bool).triu(1 if first == second else -len(x))
            total += distance[once].sum().item()
            total_t += t[once].sum().item()
            for rows, of_rows, times in (first, distance, t), (second, distance.T, t.T):
                nearest, at = of_rows.min(1)
                better = nearest < minimum[rows]
                minimum[rows] = torch.where(better, nearest, minimum[rows])
                minimum_t[rows] = torch.where(better, times.gather(1, at[:, None])[:, 0], minimum_t[rows])
    count = len(x) * (len(x) - 1) / 2
    return InterPathDistance(total / count, total_t / count, minimum.mean().item(), minimum_t.mean().item())


def _distances_of_paths(x1: Tensor, z1: Tensor, x2: Tensor, z2: Tensor) -> tuple[Tensor, Tensor]:
    """Least distance and its time for each path of (x1, z1): (A, D) with each of (x2, z2): (B, D) → two (A, B)."""
    products = torch.cat([z1, x1]) @ torch.cat([z2, x2]).T
    zz, zx, xz, xx = (part for half in products.chunk(2) for part in half.chunk(2, 1))
    uu = z1.square().sum(1, keepdim=True) + z2.square().sum(1) - 2 * zz
    vv = x1.square().sum(1, keepdim=True) + x2.square().sum(1) - 2 * xx
    uv = (z1 * x1).sum(1, keepdim=True) + (z2 * x2).sum(1) - zx - xz
    spread = uu - 2 * uv + vv  # ‖U − V‖², 0 for parallel paths, which are as near at t = 0 as anywhere
    t = torch.where(spread > 1e-12 * (uu + vv), (uu - uv) / spread, 0).clamp_(0, 1)
    return (uu - 2 * t * (uu - uv) + t * t * spread).clamp_min_(0).sqrt_(), t
