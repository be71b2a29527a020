"""A training run: the loop of `dansm.train` with a log, checkpoints and evaluations, resumed where it stopped."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import dansm
from dansm import BadInput

from ..base.machine import check_memory, make_deterministic, number_type
from ..base.processes import first_before_others, ranks
from ..base.text import counted, say, shorten
from ..data import loader
from ..data.labels import Labels, load_labels
from ..data.latents import known_of
from ..matching.coarse import key_shape
from ..model import checkpoint, sampling
from ..model.load import read_initial
from ..model.recipe import FLOWS, Recipe, check_without_labels, make_flow
from .auto import groups_of, new_pool, settled
from .coupled_batches import CoupledBatches
from .evaluation import Evaluation, check_evaluation, due
from .folder import RunFolder, starts_over
from .step import FastTraining
from .stop import Decide
from .watch import Watch, in_words, progress

LONG = 30_000  # steps from which on cuDNN tries its ways to convolve: 11 s, later 3, for 0.3 to 0.5 ms each on an H200
GRID_DEVICES = "cuda", "mps"  # a CPU would draw for minutes: there only the end of a run gets a grid of samples


def read_data(recipe: Recipe) -> tuple:
    """The recipe's data as `loader.load_images` gives it, and the files that were left out."""
    left_out = []
    with first_before_others() if recipe.data == "cifar10" else nullcontext():  # it is downloaded
        images = loader.load_images(recipe.data, size=recipe.size or None, background=recipe.background,
                                    channels=recipe.channels, skip_unreadable=recipe.skip_unreadable, left_out=left_out,
                                    cache=Path(recipe.cache) if recipe.cache else None, share=ranks()[1] > 1,
                                    labels=recipe.labels)
    if left_out:
        say(f"left out {len(left_out):,} of {counted(len(images) + len(left_out), 'image')}, not readable, such as",
            ", ".join(map(str, left_out[:3])))
    kind = "image" if known_of(images) is None else "latent"
    say(f"{counted(len(images), kind)} of {'×'.join(map(str, images.shape[1:]))}")
    if kind == "latent" and recipe.flip:
        say("half of the latents are mirrored: these are not the latents of the mirrored images, which dansm encode",
            "--flips makes")
    return images, left_out


def read_labels(recipe: Recipe, images, left_out: list[Path]) -> Labels | None:
    """The labels of the recipe's data, which `read_data` gave. A line says which, and how they are matched."""
    labels = load_labels(recipe.data, recipe.labels, len(images), left_out)
    if labels is None and recipe.labels != "none":
        check_without_labels(recipe, f"{recipe.data} has no labels")
        say(f"{recipe.data} has no labels: the network learns none")
    if labels is None:
        return None
    if left_out and (lost := set(range(len(labels.names))) - set(labels.numbers.tolist())):
        raise BadInput(f"{recipe.data} has no readable image of class {labels.names[min(lost)]}: expected some of each")
    classes = f"{counted(len(labels.names), 'class')} by {labels.origin} ({shorten(', '.join(labels.names), 80)})"
    together = recipe.method in ("greedy", "optimal") and recipe.match_size not in (0, 1)
    if not together and recipe.method != "semidiscrete":  # no noise depends on other samples
        say(classes)
    elif recipe.match_labels == "yes":
        say(f"{classes}; each is matched within itself (--match-labels no: all together, and a noise tells the class)")
    else:
        say(f"{classes}; all are matched together, and a noise tells the class (--match-labels yes: each by itself)")
    return labels


def fit(images: Tensor | np.ndarray, recipe: Recipe, *, out: Path, fresh: bool, device: torch.device,
        labels: Labels | None = None) -> tuple:
    """Train a network on images (N, C, H, W) by a recipe. Returns `Watch.summary`, the averaged network, the flow.

    Writes checkpoints, metrics.jsonl, recipe.toml and, on a GPU, a grid of samples with each timed checkpoint to `out`.
    A run that `out` holds is resumed with the same noises and the same order of images, as if it had never stopped
    (but method "optimal" begins a new group of samples). See `Decide` for when it stops; it saves first. Under torchrun
    every process calls it. BadInput for a run of other settings, a loss that is not finite, a full disk.
    """
    pictures = known_of(images) is None
    fresh = starts_over(out, fresh)
    recipe = settled(recipe, images.shape, labels, device, None if fresh else out)
    if recipe.flip is None:  # a mirrored latent is not the latent of the mirrored image
        recipe = dataclasses.replace(recipe, flip=pictures)
    run, flow, pool = begin(images, recipe, device, labels)
    folder = RunFolder(out, run, pool, images, fresh, labels)
    seconds = folder.resume()
    if recipe.init and run.step == 0:
        begin_with(run, recipe.init)
    if run.step < recipe.steps:
        run.compile_ahead()
    overdue = due(recipe, run.step) and not folder.has_evaluation()  # it was cut off after its checkpoint
    evaluated = (recipe.evaluate_every or recipe.evaluate_at) and (run.step < recipe.steps or overdue)
    evaluation = Evaluation(images, run, flow, labels) if evaluated else None
    if recipe.method == "semidiscrete" and run.step < recipe.steps:
        pool.solve()
    watch = Watch(run, seconds)
    batches = batches_of(images, run, pool, watch, labels)
    pairs = watch.pairs(batches, pool, groups_of(labels, recipe))
    with closing(batches), closing(folder), blamed_on_data(images), progress(run) as show, \
            Decide(run, lambda: show("stopping after this step")) as decide:
        if overdue:
            with watch.paused():
                folder.log(evaluation(watch.seconds, show))
        for loss in dansm.train(run, flow, pairs) if run.step < recipe.steps else ():
            watch.losses.append(loss)
            stop, save = decide()
            if run.step % recipe.log_steps == 0 or save or stop:
                line = watch.line()
                folder.log(line)
                show(line=in_words(line))
            else:
                show()
            if due(recipe, run.step) or save or stop:
                folder.save(watch.seconds)
            if due(recipe, run.step):
                with watch.paused():
                    folder.log(evaluation(watch.seconds, show))
            if save and not stop and pictures and ranks()[0] == 0 and device.type in GRID_DEVICES:
                share = recipe.batch // (ranks()[1] * recipe.accumulate)  # fits into memory: a step had it
                with watch.paused():
                    draw_grid(run.average, flow, recipe, device, out / f"samples-{run.step:08d}.png", min(64, share))
            if stop:
                break
    return watch.summary(decide.interrupted), run.average, flow


def batches_of(images, run: FastTraining, pool: dansm.NoisePool | CoupledBatches, watch: Watch,
               labels: Labels | None) -> Iterator[tuple | Tensor]:
    """This process's part of each batch that is left to train on. Those of method "semidiscrete" are pairs already."""
    recipe, (rank, processes) = run.recipe, ranks()
    resident = None if recipe.data_on_gpu == "auto" else recipe.data_on_gpu == "yes"
    place = dict(seed=recipe.seed, start=run.step, rank=rank, ranks=processes, device=run.device, resident=resident)
    if recipe.method == "semidiscrete":
        return pool.pairs(watch.matching, **place)
    return loader.batches(images, recipe.batch, flip=recipe.flip, labels=labels.numbers if labels else None, **place)


def begin(images, recipe: Recipe, device: torch.device, labels: Labels | None = None) -> tuple:
    """What trains (`FastTraining`), the flow and the pool, or what draws pairs in its place, as they are before the
    first step."""
    rank, processes = ranks()
    share = recipe.batch // processes * math.prod(images.shape[1:]) * 4  # bytes
    check_memory(f"--batch is {recipe.batch:,}", share, device)
    if recipe.deterministic:
        make_deterministic()
    torch.backends.cudnn.benchmark = recipe.compile and not recipe.deterministic and recipe.steps >= LONG
    torch.manual_seed(recipe.seed)  # the same weights on all processes
    run = FastTraining(new_network(images, recipe, len(labels.names) if labels else 0), recipe, device)
    own_seed = np.random.SeedSequence([recipe.seed, rank]).generate_state(1, np.uint64)[0] >> 1
    torch.manual_seed(int(own_seed) if rank else recipe.seed)
    flow = make_flow(dataclasses.asdict(recipe), known_of(images) is None)
    if recipe.method == "semidiscrete":
        return run, flow, CoupledBatches(images, recipe, device, labels)
    greedy = recipe.method == "greedy"
    size = recipe.match_size if greedy else 0  # other methods use the pool's generator alone
    groups = groups_of(labels, recipe) if greedy else None
    if groups:  # pools are made as their classes come, when an hour may have passed
        dtype = number_type(recipe.pool_dtype, device)
        owners = processes if recipe.match_scope == "global" else 1
        numbers = key_shape(images.shape[1:], recipe.grid).numel()
        check_memory(f"--match-size is {size:,} for each of {counted(groups, 'class')}",
                     groups * size // owners * numbers * dtype.itemsize, device)
    return run, flow, new_pool(recipe, size, images.shape[1:], device, groups)


def check(recipe: Recipe, device: torch.device) -> None:
    """BadInput for what this device or this number of processes cannot do, before any data is read."""
    number_type(recipe.precision, device)
    sampling.check_steps("--sample-steps", recipe.sample_steps, FLOWS[recipe.flow])
    processes = ranks()[1]
    parts = processes * recipe.accumulate
    if recipe.batch % parts:
        raise BadInput(f"--batch is {recipe.batch}: expected a multiple of {parts}, {counted(processes, 'process')} "
                       f"times --accumulate {recipe.accumulate}")
    if recipe.match_scope == "global" and not torch.distributed.is_initialized():
        raise BadInput("--match-scope is global: expected several processes, started by torchrun")
    if recipe.match_scope == "global" and recipe.method == "semidiscrete":
        raise BadInput("--match-scope is global: expected rank with --method semidiscrete, which has no pool to share")
    check_evaluation(recipe)


def new_network(images, recipe: Recipe, classes: int = 0) -> dansm.UNet:
    """A network by the recipe for such images, with labels if there are classes. BadInput for images that it cannot
    take, and for attention without effect, at a size that no level has."""
    channels, *sides = images.shape[1:]
    settings = recipe.network_settings(channels, sides)
    check_sides(sides, settings["multipliers"], recipe.data, known_of(images) is None)
    net = dansm.UNet(**settings, classes=classes, label_dropout=recipe.label_dropout)
    levels = [max(sides) >> level for level in range(len(settings["multipliers"]))]
    if strange := set(recipe.attention_at or ()) - set(levels):
        raise BadInput(f"--attention-at has {min(strange)}: expected sizes of the network's levels, "
                       f"{', '.join(map(str, levels))}")
    return net


def begin_with(run: FastTraining, init: str) -> None:
    """Take the averaged weights of another run. BadInput for those of another network."""
    weights, about = read_initial(init)
    theirs, ours = about["network"], run.net.settings
    if differences := [f"{name} {theirs.get(name)} → {ours.get(name)}" for name in theirs | ours
                       if theirs.get(name) != ours.get(name) and name not in ("dropout", "label_dropout")]:
        raise BadInput(f"--init is {init}, a run of another network ({', '.join(differences)}): expected the same")
    with checkpoint.reading(about["file"]):
        for net in (run.net, *run.averages):
            net.load_state_dict(weights)
    say(f"begins with the averaged weights of {about['file']}, step {about['step']:,}")


def check_sides(sides: list[int], multipliers: Sequence[int], data: str, of_images: bool) -> None:
    """BadInput if a network of these multipliers cannot halve height and width once for each level but the first."""
    fits = [level for level in range(len(multipliers)) if all(side % 2**level == 0 for side in sides)]
    least = 2 ** (len(multipliers) - 1)
    if len(fits) < len(multipliers):
        fewer = ",".join(map(str, multipliers[: len(fits)]))
        remedy = f"--multipliers {fewer} has {counted(len(fits), 'level')}"
        if of_images:
            remedy += f"; --size N makes images N pixels square, N a multiple of {least}"
        kind = "images" if of_images else "latents"
        raise BadInput(f"{data} holds {kind} of {sides[0]}×{sides[1]} (height × width): expected multiples of "
                       f"{least} for a network of {len(multipliers)} levels; {remedy}")


@contextmanager
def blamed_on_data(images) -> Iterator[None]:
    """Where training fails, name latents that are not finite. To look beforehand would take reading all data twice."""
    try:
        yield
    except BadInput:
        if isinstance(images, loader.Shards):
            images.check_finite()
        raise


def rows_of_grid(net: dansm.UNet, recipe: Recipe, device: torch.device, steps: int) -> int:
    """How many rows of eight images the grid at the end of a call has: eight, or one for each class. On a CPU, after
    few `steps`, those that take no longer than the steps did, but one at least: to train on an image takes three times
    as long as a step of sampling."""
    rows = min(net.classes, sampling.ROWS) or 8
    if device.type in GRID_DEVICES:
        return rows
    return max(1, min(rows, 3 * steps * recipe.batch // (8 * recipe.sample_steps)))


def draw_grid(net: dansm.UNet, flow, recipe: Recipe, device: torch.device, path: Path, batch: int,
              rows: int | None = None, track: Callable[[Iterable], Iterable] = iter) -> None:
    """Write `rows` of eight images of a network as one picture, by default eight or one for each class, from the same
    noises in every grid of a run."""
    network = sampling.sampler(net, device, recipe.precision, recipe.compile)
    images, labels = range(8 * (rows or 8)), None
    if net.classes:
        images, labels = sampling.rows_of_classes(min(rows or sampling.ROWS, net.classes), 8)
    draws = sampling.sample_images(network, flow, images, net.shape, recipe.sample_steps, seed=recipe.seed,
                                   batch=batch, device=device, labels=labels)
    sampling.save_grid(torch.cat(list(track(draws))), path, columns=8)
