"""Pairs of noise and sample that studies measure: a model's own, and those of data, matched or random."""

import math
from collections.abc import Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import dansm
from dansm import BadInput

from ..base.noise import path_noise
from ..base.statistics import mean_and_std, straightness
from ..base.text import counted, with_bar
from ..data import loader
from ..model.load import Model
from ..model.sampling import guided

MATCH_SIZES = (100, 1000, 10_000)  # the paper's
SERVED_AT_ONCE = 250  # samples, the paper's batch


@torch.no_grad()
def own_pairs(model: Model, numbers: Sequence[int], steps: int, *, seed: int, batch: int, device: torch.device | str,
              labels: Tensor | None = None) -> tuple[Tensor, Tensor, float]:
    """A model's samples x from the noises z of these numbers (see `path_noise`), (N, C, H, W) each, and how far the
    paths between them bend. Images are cut to [−1, 1], as image files would cut them. labels: (N,); by default, where
    the model has classes, all in turn."""
    x, z, bend = [], [], 0.0
    labels = model.labels_of(numbers) if labels is None else labels
    for start in with_bar(range(0, len(numbers), batch), f"sampling from {model.label}"):
        noise = path_noise(numbers[start : start + batch], model.shape, seed, device)
        of_batch = None if labels is None else labels[start : start + batch].to(device)
        net = guided(model.net, of_batch, model.guidance, model.flow, steps)
        path = torch.stack(list(model.flow.path(net, noise, steps)))
        x.append(path[-1].clamp(-1, 1) if model.draws_images else path[-1])
        z.append(noise)
        bend += straightness(path) * len(noise)
    return torch.cat(x), torch.cat(z), bend / len(numbers)


def load_data(source: str | None, models: list[Model], match_sizes: list[int] | None, *, count: int,
              size: int | None = None, default: tuple[int, ...] = MATCH_SIZES,
              left_out: list[Path] | None = None, labels: str = "none") -> tuple:
    """The images or latents (N, C, H, W) of `source`, or those that the first model was trained on; the match sizes;
    and how many samples to serve: the least number, at least `count`, that empties whole pools of every size.

    match_sizes  None: those of `default` that the data fills
    size         make images squares of this many pixels; None: of as many as the model's
    left_out     gets the paths of the files that were left out
    labels       as of `load_images`
    Raises BadInput for other shapes than the model's, and if one pass over the data does not empty such pools.
    """
    if not source and not models:
        raise BadInput("--data is not given, nor a model that was trained on some: expected images or latents")
    recipe = models[0].about["recipe"] if models else {}
    read_as = {} if source else recipe
    source = source or models[0].about["data"]
    images = loader.load_images(source, size=size or recipe.get("size") or None,
                                channels=models[0].shape[0] if models and models[0].draws_images else 0,
                                background=read_as.get("background", "white"),
                                skip_unreadable=read_as.get("skip_unreadable", False), left_out=left_out,
                                cache=Path(read_as["cache"]) if read_as.get("cache") else None, labels=labels)
    for model in models:
        if tuple(images.shape[1:]) != model.shape:
            is_square = model.draws_images and model.shape[1] == model.shape[2]
            hint = f"; --size {model.shape[1]} makes images so" if is_square else ""
            raise BadInput(f"{source} holds samples {tuple(images.shape[1:])}, {model.path} makes {model.shape}: "
                           f"expected the same{hint}")
    if match_sizes is None:
        match_sizes = [number for number in default if number <= len(images)] or [len(images)]
    multiple = math.lcm(*match_sizes)
    served = math.ceil(count / multiple) * multiple
    if served > len(images):
        most = len(images) // multiple * multiple
        others = f"a --count of at most {most:,}, or " if most > 1 else ""
        raise BadInput(f"{source} holds {counted(len(images), 'sample')}, and {count:,} from whole pools take "
                       f"{served:,}: expected {others}--match-size smaller or of sizes that divide one another")
    return images, match_sizes, served


def data_pairs(images, match_size: int, count: int, served: int, *, seed: int, device: torch.device | str,
               labels: np.ndarray | None = None, groups: int | None = None) -> tuple[Tensor, ...]:
    """`count` pairs (x, z) of data and noise, (count, C, H, W) each, drawn evenly from `served` that a pool hands out.

    match_size  of the pool; 0: random pairs
    served      a multiple of match_size, for whole pools: a pool's first samples find nearer noises than its last
    labels      (N,) of the images: the pairs are (x, z, labels)
    groups      number of classes: each is matched by a pool of its own, which hands out `served`
    The samples depend on the seed alone, so they are the same for every match_size.
    """
    batch = min(SERVED_AT_ONCE, served)
    kept = _kept(count, served, seed, labels if groups else None)
    kept = torch.from_numpy(np.pad(kept, (0, -len(kept) % batch))).to(device).split(batch)
    parts = []
    with closing(loader.batches(images, batch, seed=seed, flip=False, device=device, labels=labels)) as batches:
        pairs = dansm.pairs(batches, "greedy" if match_size else "random", match_size, cost="squared", seed=seed,
                            groups=groups)
        for rows in with_bar(kept, f"matching, {match_size:,}" if match_size else "random pairs"):
            parts.append([part.to(device)[rows] for part in next(pairs)])
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def _kept(count: int, served: int, seed: int, labels: np.ndarray | None) -> np.ndarray:
    """Which of the samples that `loader.batches` serves are kept: `count` of the first `served`. With labels (N,) each
    class has a random share of `count`, as large on average as its share of the data, in its own first `served`."""
    order, shares = np.zeros(served, int), [count]
    if labels is not None:
        sizes = np.bincount(labels)
        drawn = np.random.default_rng([seed, served, 1]).choice(labels, count)
        shares = np.bincount(drawn, minlength=len(sizes))
        order = _served(labels, math.ceil(served / sizes[shares > 0].min()), seed)
    kept = np.zeros(len(order), bool)
    numbers = np.random.default_rng([seed, served])
    for number in np.flatnonzero(shares):
        kept[np.flatnonzero(order == number)[numbers.permutation(served)[: shares[number]]]] = True
    return kept[: np.flatnonzero(kept)[-1] + 1]


def _served(labels: np.ndarray, epochs: int, seed: int) -> np.ndarray:
    """The labels in the order in which `loader.batches` serves them."""
    blank = torch.zeros(len(labels), 1, 1, 1, dtype=torch.uint8)
    with closing(loader.batches(blank, len(labels), seed=seed, flip=False, labels=labels)) as batches:
        return np.concatenate([of_epoch for _, of_epoch in islice(batches, epochs)])


def principal_directions(x: Tensor, count: int = 64) -> Tensor:
    """The directions in which samples x: (N, ...) differ most, (D, count) or as many as there are."""
    flat = x.flatten(1)
    with torch.random.fork_rng([]):  # it begins with random directions
        torch.manual_seed(0)
        return torch.svd_lowrank(flat - flat.mean(0), min(count, *flat.shape))[2]


def inner_gain(x: Tensor, z: Tensor) -> float:
    """Mean ⟨x_i, z_i⟩ over pairs (N, ...), less the mean over all pairings of the same samples and noises: 0 for random
    pairs. Half of what ‖x − z‖² loses."""
    x, z = x.flatten(1), z.flatten(1)
    own = sum((some * of_some).sum().item() for some, of_some in zip(x.split(4096), z.split(4096), strict=True))
    return own / len(x) - (x.mean(0) @ z.mean(0)).item()


def crossing_share(x: Tensor, z: Tensor, directions: Tensor) -> float:
    """How much paths cross: the variance of x − z along the directions (D, K) that a linear guess from the middle
    (x + z)/2 leaves unexplained, over that of random pairs: 1 is random, 0 is straight. x, z: (N, ...).

    Straight paths need Var(x − z | x_t) = 0 (Liu et al. 2022); the linear guess, each direction by itself, is ours. For
    the variances λ of x and 1 of z and their covariance c it leaves 4 (λ − c²) / (λ + 1 + 2c), and 4 λ / (λ + 1) of
    random pairs.
    """
    a, b = x.flatten(1) @ directions, z.flatten(1) @ directions
    a, b = a - a.mean(0), b - b.mean(0)
    own, of_noise, shared = a.square().mean(0), b.square().mean(0), (a * b).mean(0)
    left = (own * of_noise - shared.square()) / (own + of_noise + 2 * shared)
    return (left.sum() / (own / (own + 1)).sum()).item()


def summarize(rows: list[dict], *by: str) -> list[dict]:
    """Mean and standard deviation of every measure (a float), for each group of rows that agree in the columns `by`."""
    groups = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in by), []).append(row)
    summary = []
    for key, group in groups.items():
        spreads = {name: mean_and_std([row[name] for row in group]) for name, value in group[0].items()
                   if isinstance(value, float)}
        summary.append(dict(zip(by, key, strict=True)) | spreads)
    return summary
