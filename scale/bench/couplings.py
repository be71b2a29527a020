"""What ways of pairing noise with data cost, what they keep of the prior, and what they gain: one row for each."""

import importlib
import itertools
import math
import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import dansm
from dansm import BadInput

from ..base.machine import free_memory
from ..base.statistics import told_class
from ..base.text import counted, say
from ..data.labels import load_labels
from ..data.loader import CPU, load_images
from ..matching.others import optimal
from ..studies.conditions import class_means, class_p
from ..studies.pairs import crossing_share, inner_gain, principal_directions
from ..studies.prior import worst_p
from ..train.coupling import Samples
from . import clock
from .ways import ERROR_ELSEWHERE, Coupling, Data, Way, error_on

LIVES = 10  # times the samples of the data that a whole pool may take
MOST = {"cpu": 2048}  # samples by default; on other devices:
MOST_ELSEWHERE = 100_000
OPTIMAL_OF = {"cpu": 2000}  # samples that are assigned at once for the optimal gain; on other devices:
OPTIMAL_OF_ELSEWHERE = 10_000
EXTRA = 5  # calls of a size that did not come otherwise
UNCOUNTED = {"cuda": 1}  # passes before the one that is measured, in which kernels are compiled
BYTES_EACH = 40  # for each number of the noises that are measured: themselves, their samples, covariances in float64
COSTS = "coupling needs_data set_up_s batch_mean_ms one_mean_ms memory_mb"
QUALITY = "coupling batch_p life_p class_p class_told gain_share crossing_share"


def load(source: str | None, setting: str, size: int | None, count: int | None, batch: int, seed: int,
         device: torch.device) -> tuple[Data, str]:
    """`count` samples of the source at random, and what they are of. None: CIFAR-10, or synthetic ones where it is
    neither here nor to be had; and as many as MOST, the data and the memory allow. BadInput names the option."""
    most, name, found = MOST.get(device.type, MOST_ELSEWHERE), source or "cifar10", None
    try:
        images = load_images(name, size=size, labels=setting)
    except BadInput as error:
        if source:
            raise
        say(f"synthetic images are paired, as there are no others: {error}")
        images = clock.image_like(count or most, (3, size or 32, size or 32), seed, CPU)
        name = "synthetic images"
    else:
        found = load_labels(name, setting, len(images))
    fit = free_memory(device) // (2 * BYTES_EACH * math.prod(images.shape[1:]))
    largest = min(len(images), fit)
    if count and count > largest:
        why = f"{name} holds {len(images):,}" if largest == len(images) else f"{device} has memory for {fit:,}"
        raise BadInput(f"--count is {count:,}, and {why}: expected at most {largest:,}")
    count = count or min(largest, most)
    if count < batch:
        raise BadInput(f"--batch is {batch:,}, and there are {counted(count, 'sample')}: expected at most as many")
    numbers = torch.randperm(len(images), generator=dansm.noise_generator(seed))[:count].sort().values
    x = Samples(images, False)[numbers].to(device)
    names, labels = np.unique(found.numbers[numbers.numpy()], return_inverse=True) if found else ((), None)
    return Data(x, torch.from_numpy(labels) if len(names) > 1 else None, seed), name


def about(data: Data, source: str) -> dict:
    """What the figures depend on, kept next to them."""
    return {"data": source, "samples": len(data.x), "shape": list(data.x.shape[1:]), "classes": data.classes,
            "optimal_of": optimal_of(data), "share_error": error_on(data.x.device)}


def optimal_of(data: Data) -> int:
    return min(len(data.x), OPTIMAL_OF.get(data.x.device.type, OPTIMAL_OF_ELSEWHERE))


def captions(about: dict) -> tuple[str, str]:
    """What the columns of either table mean, and what is smaller than in a full one."""
    full = (f"; in full, on a GPU: {MOST_ELSEWHERE:,} samples or all, shares off by {ERROR_ELSEWHERE:.0%}, an "
            f"assignment over {OPTIMAL_OF_ELSEWHERE:,}")
    smaller = full if about["share_error"] > ERROR_ELSEWHERE else ""
    chance = f" Class: told from the noise, by chance {1 / about['classes']:.3f}." if about["classes"] else ""
    return ("ms: means over whole pools, of a batch and of one sample. set up: until a first batch has its noises",
            "p: of N(0, I) to depart as far, in a batch, over whole pools, within classes; small ones tell that noises "
            f"are not N(0, I).{chance} gain: in ⟨x, z⟩, of an assignment over {about['optimal_of']:,}. crossing: of "
            f"that of random pairs. {about['samples']:,} samples, semidiscrete shares off by "
            f"{about['share_error']:.0%}{smaller}")


class Served(NamedTuple):
    """What a coupling handed out, and how long its calls took, in milliseconds."""

    z: Tensor  # (N, D) on the CPU
    taken: Tensor  # (N,) the numbers of their samples
    batch_ms: list[float]
    one_ms: list[float]


def parts_of(couplings: dict[str, Coupling], data: Data, batch: int) -> Iterator[tuple[str, Iterator[dict]]]:
    """The parts of `clock.run`: a row for each coupling."""
    x = data.x[order(data, optimal_of(data), 0).to(data.x.device)]
    z = torch.randn(x.shape, generator=dansm.noise_generator(data.seed, x.device, 2), device=x.device)
    best = inner_gain(x, z[optimal(dansm.cost_matrix(x, z)).picks])
    directions = principal_directions(data.x)
    for name, coupling in couplings.items():
        yield name, row_of(name, coupling, data, batch, best, directions)


def row_of(name: str, coupling: Coupling, data: Data, batch: int, best: float, directions: Tensor) -> Iterator[dict]:
    """The row of one coupling. RuntimeError, which says why, for one that cannot be measured with these data."""
    clock.reset_peak(data.x.device)  # what the coupling before held is free
    if why := what_lacks(coupling, data):
        raise RuntimeError(why)
    device = data.x.device
    try:
        for _ in range(UNCOUNTED.get(device.type, 0)):
            serve(set_up(coupling, data, batch)[0], coupling, data, batch)
        clock.reset_peak(device)
        before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        way, set_up_s = set_up(coupling, data, batch)
        served = serve(way, coupling, data, batch)
    except (BadInput, ModuleNotFoundError) as error:
        if coupling.family == "own":
            raise
        raise RuntimeError(str(error)) from error  # such as a pool that does not fit
    memory = clock.peak_mb(device)
    memory = way.held() / 1e6 if memory is None and way.held else memory and memory - before / 1e6
    yield {"coupling": name, "needs_data": "yes" if coupling.needs_data else "no",
           "batch_of_1": f"waits for {coupling.block}" if coupling.block > 1 else "yes",
           "processes": coupling.processes, "family": coupling.family, "set_up_s": round(set_up_s, 3),
           **{f"batch_{part}": value for part, value in clock.spread(served.batch_ms).items()},
           **{f"one_{part}": value for part, value in clock.spread(served.one_ms).items()},
           "memory_mb": None if memory is None else round(memory, 1), "pairs": len(served.z),
           **quality(served, data, batch, best, directions)}


def what_lacks(coupling: Coupling, data: Data) -> str:
    """Why a coupling cannot be measured; empty if it can."""
    n = len(data.x)
    if coupling.needs > n:
        return f"it needs {counted(coupling.needs, 'sample')}, there are {n:,}"
    if coupling.needs_data and coupling.by_class and coupling.needs > (largest := int(data.labels.bincount().max())):
        return f"it needs {counted(coupling.needs, 'sample')} of a class, the largest has {largest:,}"
    if coupling.life > LIVES * n:
        return f"a whole pool serves {coupling.life:,} samples, more than {LIVES} times the {n:,} that there are"
    if coupling.by_class and coupling.life and coupling.life < 2 * data.classes:
        return f"{coupling.life:,} noises for {data.classes:,} classes give random pairs"
    if coupling.family == "sinkhorn":
        try:
            importlib.import_module("ot")  # a second, before a set-up is timed
        except ImportError:
            return "POT is not installed"
    needed = BYTES_EACH * whole(coupling, data) * data.x[0].numel()
    return "not enough memory" if needed > free_memory(data.x.device) else ""


def unit(coupling: Coupling, data: Data) -> int:
    """How many samples a coupling takes before it is as it was in the beginning: a whole pool, or a block."""
    pools = data.classes if coupling.by_class else 1
    return max(1, coupling.life // pools * pools, coupling.block)


def whole(coupling: Coupling, data: Data) -> int:
    """How many pairs to measure: one for each sample at least, and whole pools or blocks."""
    return math.ceil(len(data.x) / unit(coupling, data)) * unit(coupling, data)


def order(data: Data, count: int, seed: int, each_class: bool = False) -> Tensor:
    """The numbers (count,) of samples in random order, epoch after epoch. each_class: as many of each, so that the
    pools of all classes end together."""
    generator = dansm.noise_generator(data.seed, "cpu", 3, seed)
    if not each_class:
        epochs = [torch.randperm(len(data.x), generator=generator) for _ in range(-(-count // len(data.x)))]
        return torch.cat(epochs)[:count]
    members = dansm.members_of(data.labels, len(data.x), data.classes)
    parts = [of_class[order(data._replace(x=of_class), count // len(members), seed)] for of_class in members.values()]
    return torch.cat(parts)[torch.randperm(count // len(members) * len(members), generator=generator)]


def calls(way: Way, coupling: Coupling, batch: int, count: int) -> Iterator[int]:
    """How many samples each call takes, `count` in all: blocks; or batches and single samples in turn, as a pool gets
    faster while it empties; or batches, and then so many single ones that noises drawn ahead are drawn again."""
    turn = (coupling.block,) if coupling.block else (batch,) if way.draw else (batch, 1)
    for size in itertools.cycle(turn):
        if count <= 0:
            break
        yield min(size, count)
        count -= size
    yield from [1] * max(way.ahead, batch) if way.draw else ()


def set_up(coupling: Coupling, data: Data, batch: int) -> tuple[Way, float]:
    """The coupling, and the seconds until a first batch has its noises. Then what is left of a first pool is emptied,
    as it tells prices and compiles kernels; without a pool, a single sample is paired."""
    size, each_class = coupling.block or batch, coupling.by_class and coupling.life > 0
    count = math.ceil(size / unit(coupling, data)) * unit(coupling, data) if coupling.life else size + 1
    numbers = order(data, count, 1, each_class)
    begin = time.perf_counter()
    way = coupling.make(data)
    call(way, data, numbers[:size])
    seconds = time.perf_counter() - begin
    others = numbers[:0] if coupling.block else numbers[size:]
    for several in itertools.cycle((1, batch)):
        if not len(others):
            return way, seconds
        call(way, data, others[:several])
        others = others[several:]


def call(way: Way, data: Data, numbers: Tensor) -> tuple[float, Tensor, Tensor]:
    """Milliseconds, noises (B, ...) and the numbers (B,) of their samples: these, or as many that the noises take."""
    given = []
    if way.draw:
        ms = clock.milliseconds(data.x.device, lambda: given.extend(way.draw(len(numbers))))
        return ms, *given
    x, labels = data.x[numbers.to(data.x.device)], None if data.labels is None else data.labels[numbers]
    ms = clock.milliseconds(x.device, lambda: given.append(way.pair(x, labels)))
    return ms, given[0], numbers


def serve(way: Way, coupling: Coupling, data: Data, batch: int) -> Served:
    """Pair as many samples as `whole` says, or, without a pool, as many as `clock.PATIENCE` seconds allow. The time of
    a block is shared out among its samples."""
    count = whole(coupling, data)
    each_class = coupling.by_class and coupling.life > 0
    numbers = order(data, count if each_class else count + max(way.ahead, batch), 2, each_class)
    z, taken, batch_ms, one_ms, begin, spent = [], [], [], [], 0, 0.0
    for size in calls(way, coupling, batch, count):
        ms, noises, of_noises = call(way, data, numbers[begin : begin + size])
        begin += size
        if coupling.block:
            batch_ms.append(ms * batch / size)
            one_ms.append(ms / size)
        elif size in (1, batch):
            (one_ms if size == 1 else batch_ms).append(ms)
        if begin <= count:
            z.append(noises.flatten(1).float().cpu())
            taken.append(of_noises.cpu())
        spent += ms / 1000
        if spent > clock.PATIENCE and not coupling.life:  # part of a pool's life is not N(0, I)
            break
    for size, times in ((1, one_ms), (batch, batch_ms)):
        if not times:  # all samples together are one batch, or several blocks
            times += [call(way, data, numbers[:size])[0] for _ in range(EXTRA)]
    return Served(torch.cat(z), torch.cat(taken), batch_ms, one_ms)


def quality(served: Served, data: Data, batch: int, best: float, directions: Tensor) -> dict:
    """The columns of the prior, of what noises tell about classes, and of paths. batch_p is of the first and the last
    batch, see `worst_p`."""
    at = data.x.device if data.x.device.type == "cuda" else torch.device("cpu")  # Apple's GPUs have no float64
    x, z = data.x.flatten(1)[served.taken.to(data.x.device)].to(at), served.z.to(at)
    labels = None if data.labels is None else data.labels[served.taken]
    row = {"batch_p": worst_p([z[:batch], z[-batch:]]), "life_p": worst_p([z]), "class_p": None, "class_told": None}
    if labels is not None:
        row |= {"class_p": class_p(z, labels, class_means(data.x.flatten(1), data.labels).to(at)),
                "class_told": told_class(z, labels)}
    row |= {"path_length": dansm.path_length(x, z), "gain_share": inner_gain(x, z) / best,
            "crossing_share": crossing_share(x, z, directions.to(at))}
    return {name: value and float(f"{value:.4g}") for name, value in row.items()}
