"""The paper's two foundations, measured: what several models make of one noise, and how near a sample's own noise is.
How the paths between them run is in `scale.paths`, the pictures of both are in `scale.figures`."""

from __future__ import annotations

import math
from contextlib import closing
from fractions import Fraction
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich import box
from rich.progress import track
from rich.table import Table
from torch import Tensor

import dansm
from dansm import BadInput

from ..base.files import make_folder, write_json
from ..base.machine import hardware
from ..base.noise import path_noise
from ..base.statistics import mean_and_std, squared_distances
from ..base.text import console, counted, say, say_files, shorten
from ..data import loader
from ..data.pixels import from_uint8
from ..model import checkpoint
from ..model.load import decoder_for, loaded
from ..model.recipe import parse_counts
from ..model.sampling import sampler

MATCH_SIZES = (100, 1000, 10_000)  # the paper's
SERVED_AT_ONCE = 250  # samples, the paper's batch
SHUFFLES = 1000  # random pairings of one t-SNE picture, for how many crossings are usual


# ---------------------------------------------------------------------------------------------------
# Models and their pairs
# ---------------------------------------------------------------------------------------------------


class Model(NamedTuple):
    """A trained network, ready to sample, and what figures call it."""

    label: str
    net: object  # (B, C, H, W), t (B,) → (B, C, H, W)
    flow: object
    shape: tuple[int, int, int]  # of one sample
    about: dict  # see `checkpoint.load_model`

    @property
    def pictures(self) -> bool:
        """Whether it draws these, and not latents."""
        return self.about["latents"] is None

    def described(self) -> dict:
        """What stands in the JSON beside a figure."""
        return {"label": self.label, "file": str(self.about["file"]), "flow": self.about["flow"],
                "trained_steps": self.about["step"], "decay": self.about["decay"], "recipe": self.about["recipe"]}


def load_models(paths: list[Path], device: torch.device, *, steps: list[int], labels: list[str] | None = None,
                precision: str = "auto") -> list[Model]:
    """The models of one or several runs' folders, checkpoints or exports.

    steps   that they will sample in: a diffusion refuses 1
    labels  one for each model, or None for their folders' names
    Raises BadInput where one cannot be loaded, or makes samples of another shape than the first.
    """
    labels = labels or label_by_path(paths)
    if len(labels) != len(paths):
        raise BadInput(f"--label is given {counted(len(labels), 'time')} for {counted(len(paths), 'model')}: expected "
                       "once for each, or not at all")
    models = []
    for path, label, (net, flow, about) in zip(paths, labels, loaded(paths, steps, device), strict=True):
        shape = net.shape
        models.append(Model(label, sampler(net, device, precision), flow, shape, about))
        if shape != models[0].shape:
            raise BadInput(f"{path} makes samples of {_sizes(shape)}, {paths[0]} of {_sizes(models[0].shape)}: "
                           "expected models of one shape, as they get the same noise")
    return models


def label_by_path(paths: list[Path]) -> list[str]:
    """The name of a run's folder, of the folder of a checkpoint, or of an export; with a number where it comes again,
    so that all are different."""
    names = [path.parent.name if checkpoint.NAME.fullmatch(path.name) else path.stem for path in
             (Path(path).resolve() for path in paths)]
    if len(set(names)) < len(names):  # several checkpoints of one run
        names = [f"{name} {path.stem}" if checkpoint.NAME.fullmatch(path.name) else name
                 for name, path in zip(names, paths, strict=True)]
    return [name if name not in names[:i] else f"{name} ({names[:i].count(name) + 1})" for i, name in enumerate(names)]


def _sizes(shape) -> str:
    return "×".join(map(str, shape))


class Pairs(NamedTuple):
    """Noises z and samples x, (N, C, H, W) each, and how far the paths bend between them."""

    x: Tensor
    z: Tensor
    straightness: float


@torch.no_grad()
def own_pairs(model: Model, numbers: range, steps: int, *, seed: int, batch: int, device) -> Pairs:
    """The noises of these numbers, see `path_noise`, and what the model makes of them. Pictures end in [−1, 1],
    as the files of them would."""
    parts, bend = [], 0.0
    starts = range(numbers.start, numbers.stop, batch)
    for start in with_bar(starts, f"sampling from {model.label}"):
        z = path_noise(range(start, min(start + batch, numbers.stop)), model.shape, seed, device)
        path = torch.stack(list(model.flow.path(model.net, z, steps)))
        parts.append((path[-1].clamp(-1, 1) if model.pictures else path[-1], z))
        bend += dansm.straightness(path) * len(z)
    x, z = (torch.cat(part) for part in zip(*parts, strict=True))
    return Pairs(x, z, bend / len(x))


def load_data(source: str | None, models: list[Model], *, size: int | None = None, count: int):
    """The images or latents of `source`, or those that the first model was trained on. (N, C, H, W), see
    `loader.load_images`.

    size  images are made squares of so many pixels; None for as many as the models' have
    Raises BadInput for fewer than `count`, and for those that are of another shape than what the models make.
    """
    cache, skip_unreadable = None, False
    if source is None:
        if not models:
            raise BadInput("--data is not given, nor a model that was trained on some: expected a folder of images, an "
                           "archive of them, an LSUN lmdb, latents (.npy), or cifar10")
        source, recipe = models[0].about["data"], models[0].about["recipe"]
        cache = recipe.get("cache")  # where its training kept them
        skip_unreadable = recipe.get("skip_unreadable", False)
    if size is None and models and models[0].about["recipe"].get("size"):
        size = models[0].about["recipe"]["size"]
    images = loader.load_images(source, size=size, skip_unreadable=skip_unreadable, track=_track_reading,
                              cache=Path(cache) if cache else None)
    if models and tuple(images.shape[1:]) != models[0].shape:
        raise BadInput(f"{source} holds samples of {_sizes(images.shape[1:])}, {models[0].about['file']} makes "
                       f"{_sizes(models[0].shape)}: expected the same; --size N makes images N pixels square")
    if len(images) < count:
        raise BadInput(f"--count is {count:,}, and {source} holds {counted(len(images), 'sample')}: expected at most "
                       f"{len(images):,}")
    return images


def _track_reading(parts, total):
    return with_bar(parts, "reading images", total=total)


def with_bar(work, words: str, total: float | None = None):
    """The items of `work`, while a bar shows how far it is; on a terminal it goes when it is full."""
    return track(work, words, total=total, console=console, transient=console.is_terminal)


def pick_match_sizes(text: str | None, images, default=MATCH_SIZES) -> list[int]:
    """The match sizes of "100,1000", or of `default` those that the data has as many samples as. Raises BadInput for a
    pool that no one pass over the data would empty."""
    if text is None:
        return [size for size in default if size <= len(images)] or [len(images)]
    sizes = parse_counts("--match-size", text, at_least=2)
    if max(sizes) > len(images):
        raise BadInput(f"--match-size is {max(sizes):,}, and there are {counted(len(images), 'sample')}: expected at "
                       f"most {len(images):,}, so that a whole pool is handed out")
    return sizes


def whole_pools(images, match_sizes: list[int], count: int) -> int:
    """The least number of samples, `count` or more, that fills whole pools of each size. BadInput where there are not
    so many."""
    every = math.lcm(*match_sizes)
    served = -(-count // every) * every
    if served > len(images):
        raise BadInput(f"--match-size is {','.join(map(str, match_sizes))}: whole pools of each, for {count:,} samples,"
                       f" take {served:,}, and there are {len(images):,}; expected sizes that divide one another, or a "
                       "smaller --count")
    return served


def data_pairs(images, match_size: int, count: int, served: int, *, seed: int, device) -> tuple[Tensor, Tensor]:
    """`count` pairs (x, z) of data and noise, (count, C, H, W) each, drawn evenly from `served` that a pool of
    match_size hands out one after the other; for 0 random pairs.

    A pool's first samples find nearer noises than its last: only whole pools are what training gets, so `served` should
    be a multiple of match_size. The samples drawn depend on the seed alone, so they are the same for every match_size.
    """
    if served > len(images) or count > served:
        raise BadInput(f"{count} of {served} pairs of {len(images)} samples: expected no more than there are")
    batch = min(SERVED_AT_ONCE, served)
    total = math.ceil(served / batch)
    kept = np.zeros(total * batch, bool)
    kept[np.random.default_rng([seed, served]).permutation(served)[:count]] = True
    kept = torch.from_numpy(kept).to(device).split(batch)
    method = "greedy" if match_size > 1 else "random"
    label = f"matching, {match_size:,}" if match_size > 1 else "random pairs"
    drawn = []
    with closing(loader.batches(images, batch, seed=seed, flip=False, device=device)) as batches:
        pairs = dansm.pairs(batches, method, match_size, seed=seed)
        for rows in with_bar(kept, label, total=total):
            x, z = next(pairs)
            drawn.append((x[rows], z[rows]))
    x, z = (torch.cat(part) for part in zip(*drawn, strict=True))
    return x, z


# ---------------------------------------------------------------------------------------------------
# Foundation 1: several models, one noise
# ---------------------------------------------------------------------------------------------------


def compare_images(a: Tensor, b: Tensor) -> dict:
    """How much nearer the images of two models are if they come from the same noise. a, b: (N, ...), N ≥ 2, a_i and
    b_i from noise i.

    same, unequal  ‖a_i − b_j‖ over i = j, and over all i ≠ j: mean and standard deviation
    ratio          of the two means: 0 for models that are one, 1 where the noise says nothing
    nearest        share of the images a_i to which of all b the nearest is b_i; 1/N by chance
    """
    if len(a) < 2 or a.shape != b.shape:
        raise BadInput(f"images are {tuple(a.shape)} and {tuple(b.shape)}: expected at least two each, equal shapes")
    a, b = a.flatten(1).float(), b.flatten(1).float()
    same = (a - b).norm(dim=1)  # by differences: equal images are 0 apart, not a rounding error
    distances = squared_distances(a, b).clamp_min_(0).sqrt_()
    distances.diagonal().copy_(same)
    nearest = (distances.argmin(1) == torch.arange(len(a), device=a.device)).float().mean().item()
    unequal = distances[~torch.eye(len(a), dtype=torch.bool, device=a.device)]
    ratio = (same.mean() / unequal.mean()).item() if unequal.mean() > 0 else math.nan
    return {"same": mean_and_std(same), "unequal": mean_and_std(unequal), "ratio": ratio, "nearest": nearest}


def compare(paths: list[Path], *, count: int, pictured: int, steps: int, labels, batch: int, precision: str, seed: int,
            device: torch.device, out: Path) -> dict:
    """Samples of every model from the same `count` noises: numbers, and a picture of the first `pictured`."""
    if len(paths) < 2:
        raise BadInput(f"MODELS is {paths[0]} alone: expected two or more to compare")
    models = load_models(paths, device, steps=[steps], labels=labels, precision=precision)
    out = make_folder(out)
    pairs = [own_pairs(model, range(count), steps, seed=seed, batch=batch, device=device) for model in models]
    found = [{"models": [models[i].label, models[j].label], **compare_images(pairs[i].x, pairs[j].x)}
             for i, j in combinations(range(len(models)), 2)]
    result = {"models": [model.described() for model in models], "noises": count, "steps": steps, "seed": seed,
              "precision": precision, "pairs": found, "hardware": hardware(device)}
    write_json(out / "compare.json", result)
    table = make_table(f"Images of two models, ‖a − b‖, over {counted(count, 'noise')}",
                       "same noise", "unequal noise", "ratio", "nearest\nis own",
                       caption="Ratio of the means: 0 where the models are one, 1 where the noise says nothing. "
                               f"Nearest is own: by chance {1 / count:.1%}.")
    for pair in found:
        table.add_row(" – ".join(shorten(name, 14) for name in pair["models"]), _with_std(pair["same"]),
                      _with_std(pair["unequal"]), f"{pair['ratio']:.3f}", f"{pair['nearest']:.1%}")
    console.print(table)
    from . import figures

    images = {model.label: pair.x[:pictured] for model, pair in zip(models, pairs, strict=True)}
    if not models[0].pictures:
        say(f"latents of {models[0].shape[0]} channels are no pictures: only their distances are drawn")
        images = {}
    names = figures.draw_compare(images, pairs[0].z[:pictured], found, out / "compare")
    say_files(out, "compare.json", *names)
    return result


def grid(paths: list[Path], *, step_counts: str, side: int, labels, batch: int, precision: str, seed: int,
         device: torch.device, out: Path, autoencoder: Path | None = None, memory: float | None = None) -> dict:
    """A picture of side × side samples for each model and each count of steps, all from the same noises. Latents are
    decoded by `autoencoder`, in so many gigabytes of memory."""
    counts = parse_counts("--steps", step_counts)
    models = load_models(paths, device, steps=counts, labels=labels, precision=precision)
    decoders = [decoder_for(path, model.shape[0], model.about, autoencoder, device, precision, memory)
                for path, model in zip(paths, models, strict=True)]
    out = make_folder(out)
    numbers = range(side * side)
    images = [[_pictures(own_pairs(model, numbers, count, seed=seed, batch=batch, device=device).x, decoder)
               for model, decoder in zip(models, decoders, strict=True)] for count in counts]
    result = {"models": [model.described() for model in models], "steps": counts, "side": side, "seed": seed,
              "precision": precision, "autoencoder": autoencoder and str(autoencoder),
              "hardware": hardware(device)}
    write_json(out / "grid.json", result)
    from . import figures

    names = figures.draw_grid(images, [model.label for model in models], counts, side, out / "grid")
    say_files(out, "grid.json", *names)
    return result


def _pictures(x: Tensor, decoder) -> Tensor:
    """Samples, (N, C, H, W), as images in [−1, 1]: latents decoded."""
    return x if decoder is None else from_uint8(decoder.decode(x))


# ---------------------------------------------------------------------------------------------------
# Foundation 2: a sample's own noise is near
# ---------------------------------------------------------------------------------------------------


def count_crossings(a: np.ndarray, b: np.ndarray) -> int:
    """Of the segments a_i → b_i in the plane, (N, 2) each, how many pairs have a point in common. Exact."""
    i, j = np.triu_indices(len(a), 1)
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    sides = [_side(a[i], b[i], a[j]), _side(a[i], b[i], b[j]), _side(a[j], b[j], a[i]), _side(a[j], b[j], b[i])]
    cross = (sides[0] * sides[1] <= 0) & (sides[2] * sides[3] <= 0)
    on_one_line = (sides[0] == 0) & (sides[1] == 0) & (sides[2] == 0) & (sides[3] == 0)
    low, high = np.minimum(a, b), np.maximum(a, b)
    meet = ((low[i] <= high[j]) & (low[j] <= high[i])).all(1)
    return int((cross & (meet | ~on_one_line)).sum())


def _side(a, b, c) -> np.ndarray:
    """On which side of the line a → b lies c, (N, 2) each: −1, 0 or 1. Float64 where it is sure of the sign, by the
    bound of Shewchuk (1997), and fractions where it is not."""
    left = (a[:, 0] - c[:, 0]) * (b[:, 1] - c[:, 1])
    right = (a[:, 1] - c[:, 1]) * (b[:, 0] - c[:, 0])
    side = np.sign(left - right)
    for n in np.flatnonzero(np.abs(left - right) <= 4e-16 * (np.abs(left) + np.abs(right))):
        (ax, ay), (bx, by), (cx, cy) = (map(Fraction, point[n].tolist()) for point in (a, b, c))
        exact = (ax - cx) * (by - cy) - (ay - cy) * (bx - cx)
        side[n] = (exact > 0) - (exact < 0)
    return side


def embed(x: Tensor, z: Tensor, perplexity: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Samples and noises, (N, ...) each, in one t-SNE: (N, 2) and (N, 2)."""
    from sklearn.manifold import TSNE

    both = torch.cat([x.flatten(1), z.flatten(1)]).cpu().float().numpy()
    places = TSNE(2, perplexity=perplexity, random_state=seed, init="pca").fit_transform(both)
    return places[: len(x)], places[len(x) :]


def crossings_by_chance(a: np.ndarray, b: np.ndarray, seed: int) -> dict:
    """Mean and standard deviation of the count of crossings over random pairings of the points a with b, (N, 2)."""
    numbers = np.random.default_rng([seed, 1])
    counts = [count_crossings(a, b[numbers.permutation(len(b))])
              for _ in with_bar(range(SHUFFLES), "shuffling pairs")]
    return mean_and_std(counts)


def two_panels(above: tuple, below: tuple, below_name: str, perplexity: float, seed: int) -> list[dict]:
    """The pairs (x, z) of both halves in the plane, those above shuffled, with their crossings."""
    places = embed(*below, perplexity, seed)
    x, z = places if above is below else embed(*above, perplexity, seed)
    shuffled = z[np.random.default_rng([seed, 0]).permutation(len(z))]
    return [{"name": name, "crossings": count_crossings(*pair), "samples": pair[0].tolist(), "noises": pair[1].tolist()}
            for name, pair in (("random pairs", (x, shuffled)), (below_name, places))]


def tsne(path: Path | None, *, source: str | None, size: int | None, pairs: int, draws: int, perplexity: float,
         match_size: int, steps: int, label, batch: int, precision: str, seed: int, device: torch.device,
         out: Path) -> dict:
    """Noises and samples in the plane, a line for each pair: random pairs above, and below the model's own, or without
    a model those of a pool. Crossings are counted in `draws` such pictures, of which
    the one with the median count of the lower half is kept: one t-SNE may be a tangle.

    With a model and no `source` both halves have the model's samples, so they differ by the lines alone; with both,
    data stands above.
    """
    if pairs < 2 or not 0 < perplexity < 2 * pairs:
        raise BadInput(f"--perplexity is {perplexity:g} for {counted(pairs, 'pair')}, {2 * pairs} points: expected "
                       f"more than 0 and less than {2 * pairs}, and two pairs at least")
    models = load_models([path], device, steps=[steps], labels=label and [label], precision=precision) if path else []
    images = load_data(source, models, size=size, count=pairs) if source or not models else None
    if not models:
        (match_size,) = pick_match_sizes(str(match_size), images)
        served = whole_pools(images, [match_size], pairs)
    out = make_folder(out)
    below_name = f"own pairs of {models[0].label}" if models else f"matched, match size {match_size:,}"
    drawn = []
    for draw in range(draws):
        one = {"seed": seed + draw, "device": device}
        if models:
            below = own_pairs(models[0], range(draw * pairs, (draw + 1) * pairs), steps, seed=seed, batch=batch,
                              device=device)[:2]
        else:
            below = data_pairs(images, match_size, pairs, served, **one)
        above = data_pairs(images, 0, pairs, pairs, **one) if models and images is not None else below
        drawn.append(two_panels(above, below, below_name, perplexity, seed + draw))
    panels = sorted(drawn, key=lambda panels: panels[1]["crossings"])[(draws - 1) // 2]
    for panel, *others in zip(panels, *drawn, strict=True):
        panel["over_draws"] = mean_and_std([float(other["crossings"]) for other in others])
        panel["by_chance"] = crossings_by_chance(np.array(panel["samples"]), np.array(panel["noises"]), seed)
    result = {"models": [model.described() for model in models], "data": source, "pairs": pairs,
              "draws": draws, "perplexity": perplexity, "steps": steps, "seed": seed, "shuffles": SHUFFLES,
              "panels": panels, "hardware": hardware(device)}
    write_json(out / "tsne.json", result)
    for panel in panels:
        chance = panel["by_chance"]
        say(f"{panel['name']}: {panel['crossings']} of {math.comb(pairs, 2)} pairs of lines cross; by chance "
            f"{chance['mean']:.1f} ± {chance['std']:.1f}; in {counted(draws, 'draw')} {_with_std(panel['over_draws'])}")
    from . import figures

    names = figures.draw_tsne(panels, draws, out / "tsne")
    say_files(out, "tsne.json", *names)
    return result


# ---------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------


def make_table(title: str, *columns: str, caption: str = "") -> Table:
    table = Table(title=title, caption=caption, caption_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _with_std(value: dict) -> str:
    return f"{value['mean']:.2f} ± {value['std']:.2f}"
