"""Ways of pairing noise with data by name, set up in one way, as dansm bench couplings measures them."""

import inspect
import os
import pkgutil
import sys
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import dansm
from dansm import BadInput

from ..base.machine import lacks_memory
from ..base.text import shorten
from ..matching.others import optimal
from ..matching.semidiscrete import FastSemidiscrete

BY_CLASS = "-by-class"
PARTS = 10_000  # samples that share a plan in semidiscrete-parts
WARMTH = 0.1  # of Sinkhorn's plan, in standard deviations of the costs
ERROR = {"cpu": 0.2}  # rms by which semidiscrete shares are off; on other devices:
ERROR_ELSEWHERE = 0.1
ROUNDS = 200  # of Sinkhorn's iteration, at most


class Data(NamedTuple):
    """The samples that all couplings pair, the same for each."""

    x: Tensor  # (n, ...) float32, on the device
    labels: Tensor | None  # (n,) int64 on the CPU, from 0 to classes − 1
    seed: int

    @property
    def classes(self) -> int:
        return 0 if self.labels is None else int(self.labels.max()) + 1


class Way(NamedTuple):
    """A coupling that is set up: one of `pair` and `draw`."""

    pair: Callable[[Tensor, Tensor | None], Tensor] | None = None  # x (B, ...), labels (B,) → z (B, ...)
    draw: Callable[[int], tuple[Tensor, Tensor]] | None = None  # B → z (B, ...), and the numbers (B,) of their samples
    ahead: int = 1  # noises that draw chooses at once, so that only means of as many calls tell their time
    held: Callable[[], int] | None = None  # the bytes that it keeps


class Coupling(NamedTuple):
    """How to set up a coupling, and what is known of it beforehand."""

    family: str
    make: Callable[[Data], Way]
    block: int = 0  # samples that are paired at once, however large batches are; 0: those of a batch
    life: int = 0  # noises of a pool, of all classes together
    needs: int = 1  # samples of the data, at least
    needs_data: bool = False  # beforehand
    by_class: bool = False
    processes: str = "yes, each its own noises"  # what holds where several train together


def registry(labelled: bool) -> dict[str, Coupling]:
    """All couplings by name; those that need labels only if there are some."""
    found = {"random": Coupling("random", partial(by_pairs, "random", 0))}
    for k in (4, 16):
        found[f"nearest-{k}"] = Coupling("nearest", partial(by_pairs, "nearest", k))
    for by_class in (False, True)[: 1 + labelled]:
        found |= {name + BY_CLASS * by_class: coupling._replace(
            make=partial(coupling.make, by_class=by_class), by_class=by_class)
            for name, coupling in within_classes_too().items()}
    found["sinkhorn-2048"] = Coupling("sinkhorn", by_sinkhorn, block=2048, needs=2048)
    if labelled:
        found["c2ot-256"] = Coupling("c2ot", by_weighted_assignment, block=256, needs=256)
    return found


def within_classes_too() -> dict[str, Coupling]:
    """The couplings that take by_class: their noises are N(0, I) within each class, too."""
    found = {}
    for size in (64, 256, 10_000):
        found[f"assigned-{size}"] = Coupling("assigned", partial(by_pairs, "optimal", size), block=size, needs=size)
    for size in (1000, 10_000, 100_000):
        for cost, suffix in (("squared", ""), ("inner", "-inner"), ("priced", "-priced")):
            found[f"pool-{size}{suffix}"] = Coupling("pool", partial(by_pool, size, cost, None), life=size,
                                                     processes="yes, a pool each or one for all")
    found["coarse-10000"] = found["pool-10000"]._replace(
        family="coarse", make=partial(by_pool, 10_000, "priced", (8, 8)))
    found["semidiscrete"] = Coupling("semidiscrete", partial(by_plan, None), needs_data=True)
    found["semidiscrete-parts"] = Coupling("semidiscrete", partial(by_plan, PARTS), needs=PARTS + 1, needs_data=True)
    return found


def chosen(text: str | None, labelled: bool, data: str) -> dict[str, Coupling]:
    """The couplings of a comma-separated list, module:function among them. None: of pools within classes only those
    with prices. BadInput for an unknown name, and for one that needs labels where there are none."""
    known = registry(labelled)
    if text is None:
        return {name: coupling for name, coupling in known.items()
                if not coupling.by_class or coupling.family != "pool" or "priced" in name}
    found = {}
    for name in dict.fromkeys(part.strip() for part in text.split(",")):
        if name not in known and name in registry(True):
            raise BadInput(f"--couplings names {name}, and {data} has no labels: expected --labels folders or a .npy "
                           "file, or another coupling")
        if name not in known and ":" not in name:
            raise BadInput(f"--couplings names {name!r}: expected module:function, or some of {', '.join(known)}")
        found[name] = known.get(name) or own(name)
    return found


def by_pairs(method: str, match_size: int, data: Data, by_class: bool = False) -> Way:
    """A method of `dansm.pairs` that keeps nothing from batch to batch."""
    source = dansm.NoisePool(0, data.x.shape[1:], cost="squared", device=data.x.device, seed=data.seed)
    settings = dict(method=method, match_size=match_size, pool=source, groups=data.classes if by_class else None)

    def pair(x: Tensor, labels: Tensor | None) -> Tensor:
        return next(dansm.pairs([x if labels is None else (x, labels)], **settings))[1]

    return Way(pair, held=(lambda: 14 * match_size**2) if method == "optimal" else None)


def by_pool(match_size: int, cost: str, grid: tuple[int, int] | None, data: Data, by_class: bool = False) -> Way:
    """One pool, or one for each class that have as many noises together."""
    groups = data.classes if by_class else None
    pool = dansm.NoisePool(match_size // (groups or 1), data.x.shape[1:], cost=cost, device=data.x.device,
                           seed=data.seed, groups=groups, **({"grid": grid} if grid else {}))
    keys = getattr(pool, "keys", pool)
    return Way(lambda x, labels: pool(x, labels) if by_class else pool(x),
               held=lambda: sum(one.noise.nbytes for one in (keys.pools.values() if by_class else [keys])))


def by_plan(part: int | None, data: Data, by_class: bool = False) -> Way:
    coupling = FastSemidiscrete(data.x, data.labels if by_class else None, part=part, seed=data.seed)
    coupling.solve(error_on(data.x.device))
    return Way(draw=coupling.draw, ahead=coupling.ahead,
               held=lambda: sum(of_part.points.nbytes for of_part in coupling.all_parts()))


def by_weighted_assignment(data: Data) -> Way:
    """C²OT (arXiv 2503.10636): each noise carries the class of a sample of its batch, and the batch is assigned by
    ‖x − z‖² + w · [other class]. w is the standard deviation of 2⟨x, z⟩; an infinite one would match within classes."""
    generator = dansm.noise_generator(data.seed, data.x.device, 1)

    def pair(x: Tensor, labels: Tensor) -> Tensor:
        z = torch.randn(x.shape, generator=generator, device=x.device)
        cost = dansm.cost_matrix(x, z)
        carried = labels[torch.randperm(len(labels), generator=generator, device=x.device).cpu()]
        weight = (cost - cost.mean(0)).std()
        return z[optimal(cost + weight * (labels[:, None] != carried).to(x)).picks]

    return Way(pair, held=lambda: 14 * 256**2)


def by_sinkhorn(data: Data) -> Way:
    """Sinkhorn's plan by POT, in logarithms. Each sample takes a noise drawn from its row, so one may come twice. The
    regularisation is WARMTH standard deviations of the costs, without what all pairings have in common."""
    import ot

    generator = dansm.noise_generator(data.seed, data.x.device, 1)

    def pair(x: Tensor, labels: Tensor | None) -> Tensor:
        z = torch.randn(x.shape, generator=generator, device=x.device)
        cost = dansm.cost_matrix(x, z, "inner")
        cost = cost - cost.mean(0) - cost.mean(1, keepdim=True) + cost.mean()
        even = cost.new_full((len(x),), 1 / len(x))
        plan = ot.bregman.sinkhorn_log(even, even, cost, float(WARMTH * cost.std()), ROUNDS, 1e-3, warn=False)
        return z[plan.clamp_min_(0).multinomial(1, generator=generator)[:, 0]]

    return Way(pair)


def own(name: str) -> Coupling:
    """A coupling from the Python path or the working folder: pair(x, labels, generator) → z, or, if its first argument
    is called data, prepare(data, labels, generator) → draw(count) → (z, numbers of the samples that they take)."""
    sys.path.append(os.getcwd())
    try:
        function = pkgutil.resolve_name(name)
        needs_data = next(iter(inspect.signature(function).parameters)) == "data"
    except Exception as error:  # a module may raise anything
        raise BadInput(f"--couplings names {name}, which cannot be imported ({error}): expected the module:function of "
                       "a function pair(x, labels, generator) or prepare(data, labels, generator)") from error

    def make(data: Data) -> Way:
        generator = dansm.noise_generator(data.seed, data.x.device, 1)
        if not needs_data:
            return Way(lambda x, labels: checked(name, x.shape, lambda: (function(x, labels, generator),))[0])
        draw = function(data.x, data.labels, generator)
        return Way(draw=lambda count: checked(name, (count, *data.x.shape[1:]), lambda: draw(count), len(data.x)))

    return Coupling("own", make, needs_data=needs_data, processes="")


def checked(name: str, shape: tuple, work: Callable[[], tuple], samples: int = 0) -> tuple:
    """What a coupling of one's own gives: noises of this shape and, where there are `samples`, numbers of those that
    they take. BadInput for anything else."""
    wanted = f"noises {tuple(shape)}" + f", and {shape[0]} numbers from 0 to {samples - 1}" * (samples > 0)
    try:
        given = work()
        noise = given[0]
        faults = {f"noises {tuple(noise.shape)}": noise.shape != torch.Size(shape),
                  "values that are not finite": not noise.isfinite().all()}
        if samples:
            numbers = given[1]
            fine = numbers.shape == (shape[0],) and ((numbers >= 0) & (numbers < samples)).all()
            faults["other numbers of samples"] = not fine
    except Exception as error:  # a function may raise anything
        if lacks_memory(error):
            raise
        raise BadInput(f"--couplings names {name}, which fails ({type(error).__name__}: {shorten(str(error), 150)}): "
                       f"expected {wanted}") from error
    if fault := next((fault for fault, found in faults.items() if found), None):
        raise BadInput(f"--couplings names {name}, which gave {fault}: expected {wanted}")
    return given


def error_on(device: torch.device) -> float:
    return ERROR.get(device.type, ERROR_ELSEWHERE)
