"""What "auto" stands for in the recipe of a run: its network and its match_size, which a run that is resumed keeps."""

import dataclasses
from pathlib import Path

import numpy as np
import torch

import dansm

from ..base.machine import number_type
from ..base.processes import everyones, ranks
from ..base.text import counted, say
from ..data.labels import Labels
from ..model import checkpoint
from ..model.load import read_initial
from ..model.recipe import AUTO, COMPARING, Recipe

SMALL_SIDE = 64  # pixels; above, and on a GPU, the network is the paper's for larger images
RATES = {"cpu": 10}  # images a second, few, that --minutes are taken for; on a GPU:
RATE_OF_GPU = 1000
NEAREST_OF = 16  # more shift the prior further
ASSIGNED, ASSIGNED_ON_GPU = 1000, 10_000  # samples, half a second for the CPU


def settled(recipe: Recipe, shape: tuple[int, ...], labels: Labels | None, device: torch.device,
            out: Path | None) -> Recipe:
    """The recipe with a network and a match_size instead of "auto", for data of this shape (N, C, H, W): those of the
    run in the folder `out`, if there is one; `out` is None for a run that starts over. A line says which and why. Every
    process must call it."""
    names = [name for name in ("network", "match_size") if getattr(recipe, name) == AUTO]
    if not names:
        return recipe
    if kept := everyones(out and checkpoint.recipe_in(out))[0]:
        words = {name: f"{kept[name]:,}" if isinstance(kept[name], int) else kept[name] for name in names}
        if recipe.method not in COMPARING:  # it has no effect
            words.pop("match_size", None)
        if words:
            say(", ".join(f"{name.replace('_', ' ')} {word}" for name, word in words.items()) + ", as the run began")
        return dataclasses.replace(recipe, **{name: kept[name] for name in names})
    if "network" in names:
        name, why = _network(recipe, max(shape[2:]), device)
        say(f"network {name}, {why} (--network takes another)")
        recipe = dataclasses.replace(recipe, network=name)
    if "match_size" in names:
        size, why = min(everyones(_match_size(recipe, shape, labels, device)))
        if why:
            say(f"match size {size:,}{' for each class' * bool(groups_of(labels, recipe))}, {why}",
                "(--match-size takes another)")
        recipe = dataclasses.replace(recipe, match_size=size)
    return recipe


def _network(recipe: Recipe, side: int, device: torch.device) -> tuple[str, str]:
    """The network for images of that longer side, and why."""
    if recipe.init:
        return read_initial(recipe.init)[1]["recipe"]["network"], f"that of {recipe.init}"
    if device.type == "cpu":
        return "tiny", "for a CPU"
    if side <= SMALL_SIDE:
        return "small", f"for a GPU and at most {SMALL_SIDE} pixels a side"
    return "ddpm", f"for a GPU and more than {SMALL_SIDE} pixels a side"


def _match_size(recipe: Recipe, shape: tuple[int, ...], labels: Labels | None, device: torch.device) -> tuple[int, str]:
    """The match_size for a method, and why; empty where it has no effect."""
    if recipe.method == "nearest":
        return NEAREST_OF, "as more shift the noises further from N(0, I)"
    if recipe.method == "optimal":
        most = ASSIGNED_ON_GPU if device.type == "cuda" else ASSIGNED
        samples = samples_of_pool(recipe, None)
        return max(1, min(most, samples)), "all there are" if samples < most else "as more take long to assign"
    if recipe.method != "greedy":
        return 0, ""
    groups = groups_of(labels, recipe)
    samples = samples_of_pool(recipe, labels if groups else None)
    if recipe.minutes:
        share = 60 * recipe.minutes * RATES.get(device.type, RATE_OF_GPU) / (recipe.steps * recipe.batch)
        samples = int(samples * min(1, share))
    pool = new_pool(recipe, AUTO, shape[1:], device, groups, expected=max(1, samples * (groups or 1)))
    return pool.match_size, pool.why


def groups_of(labels: Labels | None, recipe: Recipe) -> int | None:
    """In how many groups samples are matched; None if all are matched together."""
    return len(labels.names) if labels and recipe.match_labels == "yes" else None


def samples_of_pool(recipe: Recipe, labels: Labels | None) -> int:
    """How many samples one pool matches in all steps: of this process, or of all that share it; with `labels`, by which
    each class has a pool, of the smallest class."""
    samples = recipe.steps * recipe.batch // (1 if recipe.match_scope == "global" else ranks()[1])
    if labels is None:
        return samples
    return samples * int(np.bincount(labels.numbers).min()) // len(labels.numbers)


def new_pool(recipe: Recipe, size: int | str, shape: tuple[int, ...], device: torch.device, groups: int | None,
             expected: int | None = None) -> dansm.NoisePool:
    """The pool of a run for samples of this shape (C, H, W)."""
    dtype = number_type(recipe.pool_dtype, device)
    coarse = {"grid": recipe.grid} if recipe.grid and recipe.method == "greedy" else {}
    return dansm.NoisePool(size, shape, cost=recipe.cost, device=device, seed=recipe.seed, dtype=dtype,
                           tf32=recipe.tf32, match_scope=recipe.match_scope, compile=recipe.compile, groups=groups,
                           expected=expected, **coarse)


def safe_size(recipe: Recipe, labels: Labels | None) -> str:
    """What to tell of a pool that the training does not empty, empty for others. labels: by which each class has a
    pool of its own."""
    samples = samples_of_pool(recipe, labels)
    if recipe.method != "greedy" or recipe.match_size <= samples:
        return ""
    pool, of = f"the pool of {counted(recipe.match_size, 'noise')}", ""
    if labels:
        pool += f" for {labels.names[np.bincount(labels.numbers).argmin()]}"
        of = " of that class"
    size = samples // 10
    advice = f"--match-size {size} is emptied ten times" if size > 1 else "--match-size 0 gives random pairs"
    return (f"{pool} outlasts the {counted(samples, 'image')}{of} in all steps: those trained on are not N(0, I); "
            f"{advice}")
