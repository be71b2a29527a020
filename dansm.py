"""DANSM: pair each sample with a near noise, and a flow's samples of few steps get good earlier in training.

A rectified flow learns to carry noise z to data x along straight lines. Usually each x gets a random z,
so the lines cross, and where they cross the network can only learn their average. Distance-aware
noise-sample matching (ICLR 2025, "Easing Training Process of Rectified Flow Models via Lengthening
Inter-Path Distance") lets each sample take the nearest noise left in a pool of `match_size` noises:
the lines cross less, and samples of few steps get good earlier. Nothing else of the training changes.

Read top to bottom:

    1 matching    cost_matrix, greedy, optimal, nearest_of_k, NoisePool, pairs
    2 flows       RectifiedFlow, Diffusion: loss(net, x, z) and sample(net, z, steps)
    3 network     UNet: the paper's two networks, by their settings
    4 training    train: the plain loop
    5 measuring   path length, crossing, straightness, inter-path distance, Fréchet distance
    6 refusing    what a batch, a count or a pool cannot be, said in one line
    7 commands     toy, digits, train, export, encode, decode, sample, evaluate, compare, grid, tsne, paths, loss,
                  theory, proof, bench

Names used throughout: x is data, z is noise, both (B, C, H, W) or any (B, ...); t runs from noise (0) to
data (1); B is the batch, M the pool's match_size, D the count of numbers in one sample.
"""

from __future__ import annotations

import copy
import csv
import json
import math
import os
import platform
import re
import sys
import warnings
from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import typer
from einops import rearrange
from rich.console import Console
from torch import Tensor, nn


class BadInput(ValueError):
    """What was given cannot be used. The commands print it as one line and exit with code 2."""


class Stopped(Exception):
    """Ctrl-C, with a word on what is kept: Typer lets no words through in a KeyboardInterrupt."""


# ---------------------------------------------------------------------------------------------------
# 1  Matching
# ---------------------------------------------------------------------------------------------------

COSTS = ("squared", "inner")
METHODS = ("random", "greedy", "optimal", "nearest")


def inner_products(x: Tensor, z: Tensor, fast: bool = False, out: Tensor | None = None) -> Tensor:
    """⟨x_i, z_j⟩ for every i and j. x: (B, ...), z: (M, ...) → (B, M), in float32 at least; into `out` if given.

    On a GPU float32 is multiplied as float32, whatever the trainer around has allowed (autocast, tf32), or in tf32
    if `fast`: ten bits of mantissa, several times quicker.
    """
    x, z = x.flatten(1), z.flatten(1)
    with torch.autocast(x.device.type, enabled=False) if torch.is_autocast_enabled(x.device.type) else nullcontext():
        if x.dtype in (torch.bfloat16, torch.float16):
            if x.is_cuda:
                return torch.mm(x, z.T, out_dtype=torch.float32, out=out)
            return torch.cat([x.float() @ rows.float().T for rows in z.split(4096)], 1, out=out)
        if out is None and _suits_onednn(x, z):
            return F.linear(x.to_mkldnn(), z).to_dense()
        with _cuda_float32("tf32" if fast else "ieee"):
            return torch.mm(x, z.T, out=out)


def _suits_onednn(x, z):
    """Whether torch's other library for CPUs is worth its preparations: for large float32 products, on an AMD EPYC 1.6
    times as fast as torch.mm, and as exact."""
    large = x.device.type == "cpu" and x.dtype == z.dtype == torch.float32 and x.numel() * len(z) > 2**28
    return large and torch.backends.mkldnn.is_available() and not x.requires_grad


@contextmanager
def _cuda_float32(precision):
    settings = torch.backends.cuda.matmul
    before, settings.fp32_precision = settings.fp32_precision, precision
    try:
        yield
    finally:
        settings.fp32_precision = before


def squared_norms(x: Tensor) -> Tensor:
    """‖x_i‖². (B, ...) → (B,), in float32 at least."""
    return x.flatten(1).to(torch.promote_types(x.dtype, torch.float32)).square().sum(1)


def squared_distances(x: Tensor, z: Tensor) -> Tensor:
    """‖x_i − z_j‖² for every i and j, by one matrix product: ‖x‖² − 2⟨x, z⟩ + ‖z‖².

    x: (B, ...), z: (M, ...) → (B, M).
    """
    return cost_matrix(x, z).add_(squared_norms(x)[:, None])


def cost_matrix(x: Tensor, z: Tensor, cost: str = "squared", z_squared: Tensor | None = None,
                fast: bool = False) -> Tensor:
    """What it costs to give noise j to sample i. x: (B, ...), z: (M, ...) → (B, M), lower is better.

    "squared"  ‖z‖² − 2⟨x, z⟩: the paper's ‖x − z‖² less ‖x‖², which is the same for every noise and, where it is
               large, would only round the rest away. `z_squared`, the (M,) of ‖z_j‖², saves a pass over a pool
               used often. (The paper takes the mean over D in place of the sum: the same order.)
    "inner"    −⟨x, z⟩. Over a whole pool every noise is given out once, so Σ‖z‖² is the same for every
               pairing and only Σ⟨x, z⟩ can be won. A greedy pick by distance chases short noises all the
               same, and leaves the long ones to the last samples; without ‖z‖² it cannot. On images that
               comes nearer to the optimum at every match_size (1,000: 89 % of the optimal gain, not 81 %).
               In 2D it does so only for pools of about ten (1,000: 84 to 95 %, not 92 to 96 %): there −⟨x, z⟩
               sends even a sample near the origin to the farthest noise in its direction. A nearer optimum is no
               better training: on CIFAR-10 samples of ten steps and more came out worse by it (results/README.md).
    fast       see `inner_products`.
    """
    products = inner_products(x, z, fast)
    if check_choice("cost", cost, COSTS) == "inner":
        return products.neg_()
    return torch.sub(squared_norms(z) if z_squared is None else z_squared, products, alpha=2, out=products)


def greedy(cost: Tensor) -> Tensor:
    """The paper's serial rule: in batch order, each sample takes its nearest noise that is still free.

    cost: (B, M) with B ≤ M; a noise that is already taken costs inf. Ties go to the lower index.
    Returns the (B,) int64 indices of the noises picked, no index twice. Both ways below give the very
    same picks; with few noises to go round almost all samples quarrel, and taking turns is quicker.
    """
    cost = check_sides(cost).detach()
    samples, noises = cost.shape
    return _greedy_in_turn(cost) if noises < max(4 * samples, 1) else _greedy_by_rounds(cost)


def _greedy_in_turn(cost: Tensor) -> Tensor:
    """The rule as it reads: one sample after the other."""
    rows = _at_least_float32(cost).cpu().numpy()
    taken = np.zeros(rows.shape[1], rows.dtype)
    picks = np.empty(len(rows), np.int64)
    for i, row in enumerate(rows):
        picks[i] = (row + taken).argmin()
        if not np.isfinite(row[picks[i]] + taken[picks[i]]):
            raise _no_noise_left()
        taken[picks[i]] = np.inf
    return torch.from_numpy(picks).to(cost.device)


def _greedy_by_rounds(cost: Tensor) -> Tensor:
    """The same picks with all samples choosing at once (deferred acceptance, Gale and Shapley 1962).

    Every waiting sample names its nearest noise that no earlier sample holds; a noise named by several is
    held by the earliest of them, and the others, the one it is taken from included, name again. All
    noises prefer the earlier sample, and under one common preference the outcome is the serial one.
    """
    order = torch.arange(len(cost), device=cost.device)
    holder = torch.full((cost.shape[1],), len(cost), device=cost.device)  # len(cost): held by nobody
    least, picks = cost.min(1)
    waiting = order
    while len(waiting):
        if not least.isfinite().all():
            raise _no_noise_left()
        holder.scatter_reduce_(0, picks[waiting], waiting, "amin")
        waiting = order[holder[picks] != order]
        held = holder <= waiting[:, None]
        least, picks[waiting] = cost[waiting].masked_fill_(held, torch.inf).min(1)
    return picks


def _no_noise_left():
    return BadInput("a sample's costs are NaN, or infinite for every noise that is left: expected a finite one")


def _at_least_float32(cost):
    return cost.to(torch.promote_types(cost.dtype, torch.float32))


class Assignment(NamedTuple):
    """A pairing and the proof of how good it is: no pairing at all costs less than `bound`."""

    picks: Tensor  # (B,) int64, the noise of each sample
    total: float  # Σ cost[i, picks[i]]
    bound: float  # equal to total where the pairing is exactly optimal, up to rounding


def optimal(cost: Tensor, gap: float = 1e-3) -> Assignment:
    """Linear assignment: the pairing of least total cost. cost: (B, M), B ≤ M, finite.

    On the CPU exact, by scipy in about M³ operations: 10 ms for 250, half a second for 1,000, half a minute for
    4,096. On a GPU by `scale.kernels.auction`, until total − bound is at most `gap` of what the pairing wins
    over a random one, or as far as prices in float32 go: compare the two.
    """
    cost = _at_least_float32(check_sides(cost).detach())
    if len(cost) and (kernels := gpu_kernels(cost.device)):
        return Assignment(*kernels.auction(cost, gap))
    check_costs(cost)
    from scipy.optimize import linear_sum_assignment

    _, picks = linear_sum_assignment(cost.cpu().numpy())
    picks = torch.from_numpy(picks).to(cost.device)
    total = cost[torch.arange(len(cost), device=cost.device), picks].sum(dtype=torch.float64).item()
    return Assignment(picks, total, total)


def nearest_of_k(x: Tensor, k: int, cost: str = "squared", generator: torch.Generator | None = None) -> Tensor:
    """Each sample draws k fresh noises and keeps the nearest. x: (B, ...) → z: (B, ...). For comparison.

    It needs no pool, but it bends the prior: the other k − 1 noises are thrown away, never trained on, so the
    noises used are no longer N(0, I) but crowd where the data is, while sampling still starts from N(0, I).
    """
    check_count("k", k), check_choice("cost", cost, COSTS)
    check_memory(f"match_size is {k:,}", 8 * k * x[0].numel() if len(x) else 0, x.device)
    flat = x.detach().float().flatten(1)
    kept = torch.empty_like(flat)
    block = max(1, 2**24 // (k * flat.shape[1]))  # samples at a time, so that their noises fill about 64 MB
    for rows, out in zip(flat.split(block), kept.split(block), strict=True):
        z = torch.randn(len(rows), k, flat.shape[1], device=x.device, generator=generator)
        scores = torch.einsum("bkd,bd->bk", z, rows)
        if cost == "squared":
            scores -= z.square().sum(2) / 2  # ‖x − z‖² = ‖x‖² − 2 (⟨x, z⟩ − ‖z‖²/2)
        out.copy_(z[torch.arange(len(rows), device=x.device), scores.argmax(1)])
    return kept.view(x.shape).to(x)


def noise_generator(seed: int | None = None, device="cpu", *stream: int) -> torch.Generator:
    """The generator of a pool's noises. Without a seed it takes one from torch's own, so that torch.manual_seed
    decides, as it does for `torch.randn_like`. Its numbers are not those that torch draws by the same seed: data
    or weights drawn by it would be the very noise. Each `stream` of a seed has numbers of its own."""
    seed = torch.randint(2**31, ()).item() if seed is None else check_count("seed", seed, at_least=0)
    mixed = np.random.SeedSequence([seed, 0xDA45, *stream]).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(mixed[0]))


class NoisePool:
    """A pool of `match_size` noises: call it with a batch, get the noises matched to it.

        pool = NoisePool(10_000, x.shape[1:], device=x.device)      # once
        z = pool(x)                                                 # was: z = torch.randn_like(x)

    Samples are served in batch order, each takes its nearest noise, which leaves the pool; an empty pool is
    drawn anew, in the middle of a batch if need be. So the scope of the match does not depend on the batch
    size, which may be 1. Over a whole pool the noises handed out are exactly those drawn: the prior stays
    N(0, I). match_size 0 or 1 is vanilla training, a random noise for each sample. For each x of a batch it is

        if len(noise) == 0:
            noise = torch.randn(match_size, *shape)
        i = (noise - x).flatten(1).norm(dim=1).argmin()
        z, noise = noise[i], torch.cat([noise[:i], noise[i + 1 :]])

    and the rest of the class is how that costs a batch nothing.

    match_size   how many noises, or None for as many as `memory` holds
    shape        of one sample, (C, H, W) or any other
    cost         see `cost_matrix`
    dtype        of the noises kept; torch.bfloat16 halves the memory, match_size × D × 4 bytes in float32
    seed         see `noise_generator`; under torch.distributed each rank has noises of its own from the same seed
    fast         multiply float32 in tf32 on a GPU: quicker; up to four samples in a hundred take another noise, as
                 near in the mean (paths change by less than 4e-5 of their length)
    memory       gigabytes that the pool may use in all; without it, what the device has free
    match_scope  "rank", or "global": under torch.distributed all ranks match their samples against one pool, of
                 which each holds match_size / ranks noises, as one process would with the joined batch
    compile      on a GPU, match by kernels that take some seconds to compile when the pool is made. Without: the same
                 picks, from the first batch on, in some milliseconds more each

    The pool keeps its free noises in front. When a batch has taken some, the last ones move into their places, and
    behind them the next pool is drawn bit by bit, from the end on: no batch pays for taken noises, and none waits for
    a whole pool (but the very first). A pool of ten, number 1, after a batch of three:

        place   0  1  2  3  4  5  6 │ 7  8  9      left = 7 noises are free
        index   0  7  2  3  9  5  6 │ next pool    a noise's index is its place when the pool began: ties go by it
                   ↑        ↑                      1, 4 and 8 were taken; 7 and 9 moved into the gaps
                                                   drawn = 3 noises of pool number 2 are there already

    Raises BadInput for a negative or fractional match_size, a batch of another shape, NaN or infinite data, and
    for a pool that does not fit, before anything is allocated.
    """

    dtypes = (torch.float32, torch.float64, torch.bfloat16)  # float16 overflows in the product of long samples
    drawn_at_once = 2**23  # numbers: enough to fill a GPU, few enough for no batch to notice
    served_at_once = 256  # samples: beyond, the matrix product gains nothing more

    def __init__(self, match_size: int | None, shape, *, cost: str = "squared", device="cpu", dtype=torch.float32,
                 seed: int | None = None, fast: bool = False, memory: float | None = None, match_scope: str = "rank",
                 compile: bool = True):
        self.shape = check_shape(shape)
        self.cost = check_choice("cost", cost, COSTS)
        self.seed = torch.randint(2**31, ()).item() if seed is None else check_count("seed", seed, at_least=0)
        self.noise = torch.empty(0, self.shape.numel(), device=device, dtype=check_choice("dtype", dtype, self.dtypes))
        self.squared = squared_norms(self.noise)
        process, self.rank, self.ranks = place_in_group(match_scope, seed)
        usable = compile and match_size not in (0, 1) and self.ranks == 1  # a spread pool has kernels of its own
        kernels = gpu_kernels(self.noise.device, cost, dtype, fast) if usable else None
        self.kernel_take = kernels.take if kernels else None
        self.scratch = None  # what the kernels keep between two batches, so that none waits for memory
        self.check = DataCheck(self.shape, self.noise.device)
        self.fast = fast
        self.stream = (process,) if process and self.ranks == 1 else ()  # pools of the ranks' own must not be equal
        self.received = 0  # bytes, from the other ranks of a pool that is spread
        self.match_size = self._fitting(match_size, memory)
        self.rows = self.match_size // self.ranks  # of the pool's noises, those that are ours:
        self.first = self.rank * self.rows  # from this one on
        self.chunk = max(1, self.drawn_at_once // self.shape.numel())
        self.generator = noise_generator(self.seed, device, 0, process)  # of `fresh`; a pool's are in `_draw`
        self._forget()

    @torch.no_grad()
    @torch.inference_mode(False)  # what such a mode makes can never be written to again
    def __call__(self, x: Tensor) -> Tensor:
        """x: (B, *shape), any B, dtype and device → z: the same, z_i matched to x_i."""
        if self.ranks > 1 and self.match_size > 1:
            from scale.spread import serve

            return serve(self, x).view(x.shape).to(x)
        self.check(x, numbers=self.kernel_take is None or self.match_size <= 1)
        if self.match_size <= 1:
            return self.fresh(x)
        samples, at_once = self.flat(x), self._samples_at_once(self.rows)
        parts = [samples] if len(samples) <= at_once else samples.split(at_once)
        z = [self._serve(part) for part in parts]
        return (z[0] if len(z) == 1 else torch.cat(z)).view(x.shape).to(x)

    def flat(self, x: Tensor) -> Tensor:
        """(B, *shape) → (B, D), of the type and on the device of the noises."""
        return x.detach().reshape(len(x), self.noise.shape[1]).to(self.noise)

    def _serve(self, x: Tensor) -> Tensor:
        """Match x: (B, D), from this pool and, where it ends, from the next."""
        if self.left == 0:
            self._refill()
        z = self._take(x[: self.left])
        self._draw_ahead()
        return z if len(z) == len(x) else torch.cat([z, self._serve(x[len(z) :])])

    def _take(self, x: Tensor) -> Tensor:
        """Match x: (B, D), B ≤ left, among the noises left → (B, D)."""
        if self.kernel_take and len(x):
            return self.kernel_take(self, x)
        cost = cost_matrix(x, self.noise[: self.left], self.cost, self.squared[: self.left], self.fast)
        order = self.index[: self.left].argsort()  # of equally near noises the one that had the lower place
        picks = order[greedy(cost.index_select(1, order))]
        z = self.noise[picks]
        self._fill_gaps(picks)
        return z

    def _fill_gaps(self, picks: Tensor) -> None:
        """The noises picked are taken: the last ones that are not move into their places."""
        end = self.left - len(picks)
        last = torch.arange(end, self.left, device=picks.device)
        last = last[torch.isin(last, picks, invert=True)]
        gaps = picks[picks < end]
        for kept in (self.noise, self.squared, self.index):
            kept[gaps] = kept[last]
        self.left = end

    def _refill(self) -> None:
        """Begin the next pool: draw what is not drawn yet."""
        self._allocate()
        self._draw_ahead()
        self._begin()

    def _begin(self) -> None:
        """All that is drawn ahead is the pool now."""
        self.number += 1
        self.drawn, self.left = 0, self.rows
        self.index = torch.arange(self.rows, device=self.noise.device, dtype=torch.int32)
        self.place = self.index.clone()

    def _allocate(self) -> None:
        if len(self.noise) == 0:
            try:
                rows = -(-self.rows // 16) * 16  # whole lines of memory, for which a GPU has its best products
                self.noise = self.noise.new_empty(rows, self.noise.shape[1])
                self.squared = squared_norms(self.noise[:0]).new_empty(rows)
            except RuntimeError as error:  # torch's word for memory that is not there any more
                needed = self._bytes(self.match_size) / 1e9
                raise BadInput(f"match_size is {self.match_size:,}: the pool needs {needed:,.1f} GB, more than "
                               f"{self.noise.device} has left; expected a smaller one") from error

    def _draw_ahead(self) -> None:
        """Draw the next pool, from its end to its front, as far as the places for it are free."""
        while self.drawn < self.rows:
            chunk = (self.first + self.rows - self.drawn - 1) // self.chunk
            places = self._places(chunk)
            if places.start < self.left:
                break
            self._draw(self.number + 1, chunk, self.noise[places])
            self.squared[places] = squared_norms(self.noise[places])
            self.drawn += places.stop - places.start

    def _draw(self, number: int, chunk: int, ours: Tensor) -> Tensor:
        """Into `ours` the noises of one chunk of pool `number` that are ours. Each chunk has a stream of its own, so
        that it does not matter who draws it, nor when."""
        start, places = chunk * self.chunk - self.first, self._places(chunk)
        rows = min(self.chunk, self.match_size - chunk * self.chunk)
        noise = ours if len(ours) == rows else ours.new_empty(rows, ours.shape[1])
        noise.normal_(generator=noise_generator(self.seed, ours.device, number, chunk, *self.stream))
        return ours if noise is ours else ours.copy_(noise[places.start - start : places.stop - start])

    def _places(self, chunk: int) -> slice:
        """Where the chunk lies among our rows when its pool begins."""
        start = chunk * self.chunk - self.first
        return slice(max(start, 0), min(start + self.chunk, self.rows))

    def _forget(self) -> None:
        """As before the first batch: no pool drawn. `left` is the count of noises that are free."""
        self.number = self.left = self.drawn = 0
        self.index = self.place = torch.empty(0, dtype=torch.int32, device=self.noise.device)

    def fresh(self, x: Tensor) -> Tensor:
        """Unmatched noise for x from the pool's generator, as `torch.randn_like(x)`."""
        return torch.randn(x.shape, device=self.noise.device, generator=self.generator).to(x)

    def state_dict(self) -> dict:
        """All a checkpoint needs to go on with the same noises: the seed, the number of this pool and which of its
        noises lie where. The pool itself is drawn again. At most 4 bytes a noise. Of several processes each has its
        own."""
        return {"made_for": self._made_for(), "seed": self.seed, "number": self.number,
                "index": self.index[: self.left].clone(), "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict) -> None:
        """Go on where `state_dict` was taken, in a pool made with the same arguments."""
        if not isinstance(state, dict) or not {"made_for", "seed", "number", "index", "generator"} <= state.keys():
            raise BadInput(f"the state is a {type(state).__name__}: expected what NoisePool.state_dict() returned")
        if state["made_for"] != self._made_for():
            raise BadInput(f"the saved pool is {state['made_for']}, this one {self._made_for()}: expected the same")
        self._forget()
        self.seed, self.number = state["seed"], state["number"]
        self.generator.set_state(state["generator"].cpu())
        if len(state["index"]):
            self._draw_again(state["index"].to(self.noise.device))

    def _draw_again(self, index: Tensor) -> None:
        """The noises `index` of this pool, each at the place it had."""
        self._allocate()
        self.left = len(index)
        self.index = torch.zeros(self.rows, device=index.device, dtype=torch.int32)
        self.index[: self.left] = index
        self.place = torch.full_like(self.index, -1)
        self.place[index.long()] = torch.arange(self.left, device=index.device, dtype=torch.int32)
        for chunk in range(self.first // self.chunk, -(-(self.first + self.rows) // self.chunk)):
            places = self.place[self._places(chunk)]
            noise = self._draw(self.number, chunk, self.noise.new_empty(len(places), self.noise.shape[1]))
            kept = places >= 0
            self.noise[places[kept]] = noise[kept]
            self.squared[places[kept]] = squared_norms(noise)[kept]
        self._draw_ahead()

    def _made_for(self) -> dict:
        return {"match_size": self.match_size, "shape": list(self.shape), "cost": self.cost, "rank": self.rank,
                "ranks": self.ranks, "dtype": str(self.noise.dtype), "device": self.noise.device.type,
                **({"process": self.stream[0]} if self.stream else {})}  # of whose noises the index speaks

    def _fitting(self, match_size, memory) -> int:
        """The match_size asked for if it fits, the largest that does for None."""
        if memory is not None and not (isinstance(memory, int | float) and 0 < memory < math.inf):
            raise BadInput(f"memory is {memory!r}: expected a number of gigabytes, more than 0")
        free = free_memory(self.noise.device)
        given = f"{self.noise.device} has {free / 1e9:,.1f} GB free"
        if memory is not None and 1e9 * memory < free:
            free, given = int(1e9 * memory), f"memory is {memory} GB"
        largest = bisect_left(range(2**31), True, key=lambda size: self._bytes(size) > free) - 1
        if self.ranks > 1:
            from scale.spread import agree

            largest = agree(self, match_size, largest) // self.ranks * self.ranks
        if match_size is None:
            if largest < 2:
                raise BadInput(f"match_size is None: a pool of two needs {self._bytes(2) / 1e9:,.2f} GB and {given}; "
                               "expected more")
            return largest
        match_size = check_count("match_size", match_size, at_least=0)
        if match_size % self.ranks:
            raise BadInput(f"match_size is {match_size}: expected a multiple of {self.ranks}, the number of ranks")
        if match_size > max(1, largest):
            raise BadInput(f"match_size is {match_size:,}: the pool needs {self._bytes(match_size) / 1e9:,.1f} GB and "
                           f"{given}; expected at most {max(0, largest):,}")
        return match_size

    def _bytes(self, match_size: int) -> int:
        """Of memory that a pool and the matching of what it serves at once take, at most, besides a batch itself."""
        rows, size = match_size // self.ranks, self.noise.element_size()
        samples = self._samples_at_once(rows) * self.ranks
        costs = max(size, 4) if self.kernel_take else 5 * max(size, 4)  # the plain way copies them
        handed_out = 3 * samples * self.shape.numel() * size  # the samples, their noises, and those that move
        drawn = 2 * max(self.drawn_at_once, self.shape.numel()) * max(size, 4)
        return rows * (self.shape.numel() * size + samples * costs + 16) + handed_out + drawn

    def _samples_at_once(self, rows: int) -> int:
        """Of one rank: so many that their costs take a gigabyte at most, and their noises 32 MB."""
        return max(1, min(self.served_at_once, 2**28 // max(1, rows), 2**23 // self.shape.numel()))


def place_in_group(match_scope, seed):
    """Of this process: (its rank, its rank and the number of ranks among those that share a pool)."""
    import torch.distributed as group

    there = group.is_available() and group.is_initialized()
    process = group.get_rank() if there else 0
    if check_choice("match_scope", match_scope, ("rank", "global")) == "rank":
        return process, 0, 1
    if not there:
        raise BadInput("match_scope is global: expected torch.distributed to be set up, as by torchrun")
    if seed is None:
        raise BadInput("match_scope is global and seed is None: expected a seed, the same on every rank")
    return process, process, group.get_world_size()


@cache
def gpu_kernels(device: torch.device, *way):
    """`scale.kernels`, the same picks in one tenth of the time, where CUDA and Triton are there and work; or None.
    `way`: a pool's cost, its type of numbers and whether it is fast; nothing for linear assignment."""
    if device.type != "cuda":
        return None
    try:
        from scale import kernels

        kernels.try_out(device, *way)
    except Exception as error:  # Triton missing, too old, without a compiler, on a card it does not know
        warnings.warn(f"matching on {device} goes the plain way, with the same result: {error!r}", stacklevel=2)
        return None
    return kernels


def pairs(batches: Iterable[Tensor], method: str = "greedy", match_size: int = 10_000, *, cost: str = "squared",
          seed: int | None = None, pool: NoisePool | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Pair every batch x with noises z and yield (x, z), the same batches in the same order.

    batches     x each, (B, ...): data or latents → x and z, both (B, ...)
    match_size  noises of the pool, samples assigned at once, or noises drawn for each sample, by method
    method  "random"   a fresh noise for each sample: vanilla training
            "greedy"   `NoisePool`, the paper's method
            "optimal"  collects match_size samples, over several batches if need be, and solves the linear
                       assignment with as many noises; the last partial group is matched among itself
            "nearest"  the nearest of match_size fresh noises, see `nearest_of_k`
    pool    for a run that is resumed, or a pool of other settings: its noises serve "greedy", its generator
            every method; for "greedy" its match_size and cost count.
    Raises BadInput for an unknown method or cost, for a match_size that is not a whole number, and for a batch of
    another shape than the first.
    """
    check_choice("method", method, METHODS)
    check_choice("cost", cost, COSTS)
    match_size = check_count("match_size", match_size, at_least=0 if method in ("random", "greedy") else 1)
    return _pairs(iter(batches), method, match_size, cost, seed, pool)


def _pairs(batches, method, match_size, cost, seed, pool):
    for x in batches:
        if pool is None:
            check_tensor(x)
            size = match_size if method == "greedy" else 0  # the other methods need its generator only
            pool = NoisePool(size, x.shape[1:], cost=cost, device=x.device, seed=seed)
        if method == "optimal":
            yield from _optimal_pairs(chain([x], batches), match_size, cost, pool)
        elif method == "greedy":
            yield x, pool(x)
        else:
            pool.check(x)
            yield x, nearest_of_k(x, match_size, cost, pool.generator) if method == "nearest" else pool.fresh(x)


def _optimal_pairs(batches, match_size, cost, pool):
    waiting = deque()  # batches not handed out yet, whose samples are x; the first of them have their noises, z
    x = z = torch.empty(0, *pool.shape, device=pool.noise.device)
    for batch in chain(batches, [None]):  # None: no more are coming, match what is there
        if batch is not None:
            pool.check(batch)
            waiting.append(batch)
            x = torch.cat([x, batch.detach().to(x)])
        while len(x) - len(z) >= (match_size if batch is not None else 1):
            group = x[len(z) : len(z) + match_size]
            noise = pool.fresh(group)
            z = torch.cat([z, noise[optimal(cost_matrix(group, noise, cost)).picks]])
        while waiting and len(z) >= len(waiting[0]):
            batch_done = waiting.popleft()
            yield batch_done, z[: len(batch_done)].to(batch_done)
            x, z = x[len(batch_done) :], z[len(batch_done) :]


# ---------------------------------------------------------------------------------------------------
# 2  Flows
# ---------------------------------------------------------------------------------------------------

TIMES = ("uniform", "logit-normal")
TARGETS = ("noise", "velocity")


def draw_times(count: int, times: str, device=None) -> Tensor:
    """`count` times in (0, 1): uniform as in the paper, or the sigmoid of a standard normal, which favours the
    middle, where the paths are nearest to each other (Esser et al. 2024, Stable Diffusion 3)."""
    return torch.rand(count, device=device) if times == "uniform" else torch.randn(count, device=device).sigmoid()


def over(t: Tensor, x: Tensor) -> Tensor:
    """t: (B,) shaped to multiply x: (B, ...)."""
    return t.reshape(-1, *[1] * (x.ndim - 1))


class RectifiedFlow:
    """Straight paths x_t = t·x + (1 − t)·z; the network learns the velocity x − z (Liu et al. 2022).

    The network sees 999·t, so that its time embedding spans what it does in a diffusion.
    times: "uniform" or "logit-normal".   solver: "euler", or "heun" (second order, two evaluations a step).
    """

    first_t = 1e-3  # the paper keeps away from t = 0, in training and in sampling

    def __init__(self, times: str = "uniform", solver: str = "euler"):
        self.times = check_choice("times", times, TIMES)
        self.solver = check_choice("solver", solver, ("euler", "heun"))

    def loss(self, net: nn.Module, x: Tensor, z: Tensor, t: Tensor | None = None) -> Tensor:
        """Mean squared error of the velocity for pairs x, z: (B, ...), at random times, or at t: (B,) in [0, 1]. A
        scalar."""
        if t is None:
            t = draw_times(len(x), self.times, x.device)
        t = self._network_time(t)
        x_t = over(t, x) * x + over(1 - t, x) * z
        return F.mse_loss(net(x_t, 999 * t), x - z)

    def path(self, net: nn.Module, z: Tensor, steps: int) -> Iterator[Tensor]:
        """z: (B, ...) → the `steps` + 1 states from z on, (B, ...) each, the last one x. BadInput for no steps."""
        steps = check_count("steps", steps)
        x, dt = z, 1 / steps
        yield x
        for i in range(steps):
            v = self._velocity(net, x, i * dt)
            if self.solver == "heun":  # the mean of the slopes at both ends of the step
                v = (v + self._velocity(net, x + v * dt, (i + 1) * dt)) / 2
            x = x + v * dt
            yield x

    def sample(self, net: nn.Module, z: Tensor, steps: int) -> Tensor:
        """x from z in `steps` equal steps, without gradients."""
        return _end(self.path(net, z, steps))

    def _velocity(self, net, x, t):
        return net(x, 999 * self._network_time(torch.full((len(x),), t, device=x.device)))

    def _network_time(self, t):
        return t * (1 - self.first_t) + self.first_t


class Diffusion:
    """Denoising diffusion: the network learns the noise in √ᾱ·x + √(1−ᾱ)·z (DDPM, Ho et al. 2020), and DDIM
    takes few steps back without randomness (Song et al. 2020). The same two methods as `RectifiedFlow`.

    Diffusion counts its T = 1,000 levels of noise from the data's side: level 0 is almost data, level 999
    almost noise. β rises from 1e-4 to 0.02, ᾱ is the running product of 1 − β.

    target  what the network says: "noise", the paper's, or "velocity", √ᾱ·z − √(1−ᾱ)·x (Salimans and Ho 2022), to
            which the noise is √(1−ᾱ)·x_t + √ᾱ·velocity. The loss is that of the noise either way. A network whose last
            layer is a norm hardly sees how large its input is; 3×32×32 noises differ by 1.3 % in size, and what it
            misses of that is divided by √ᾱ when DDIM begins. Said as velocity the size is in x_t.
    bound   of the data, 1 for pixels, or None: while it samples, every guess of x is cut to [−bound, bound], as Ho et
            al. do.
    """

    levels = 1000

    def __init__(self, times: str = "uniform", target: str = "noise", bound: float | None = None):
        self.times, self.bound = check_choice("times", times, TIMES), bound
        self.target = check_choice("target", target, TARGETS)
        self.alpha_bar = (1 - torch.linspace(1e-4, 0.02, self.levels, dtype=torch.float64)).cumprod(0)  # ᾱ
        self.copy = self.alpha_bar  # on the device where it was used last

    def loss(self, net: nn.Module, x: Tensor, z: Tensor, t: Tensor | None = None) -> Tensor:
        """Mean squared error of the noise for pairs x, z: (B, ...), at random levels, or at t: (B,) in [0, 1], 0 noise
        and 1 data. A scalar."""
        if t is None:
            t = draw_times(len(x), self.times, x.device)
        level = ((1 - t) * self.levels).long().clamp_(0, self.levels - 1)
        signal = over(self._alpha_bar_on(x.device)[level], x)
        a, b = (signal**0.5).to(x.dtype), ((1 - signal) ** 0.5).to(x.dtype)  # in bf16 1 − ᾱ is 0 near the data
        return F.mse_loss(self._noise(net, a * x + b * z, level.float(), a, b), z)

    def _noise(self, net, x_t, level, a, b):
        """In x_t = a·x + b·z."""
        said = net(x_t, level)
        return said if self.target == "noise" else b * x_t + a * said

    def _alpha_bar_on(self, device) -> Tensor:
        """Kept there: copying it anew each step would make the GPU wait."""
        if self.copy.device != device:
            self.copy = (self.alpha_bar.float() if device.type == "mps" else self.alpha_bar).to(device)  # no float64
        return self.copy

    def path(self, net: nn.Module, z: Tensor, steps: int) -> Iterator[Tensor]:
        """z: (B, ...) → the `steps` + 1 states from z on, (B, ...) each, the last one x. The levels are those of the
        paper, from 0 on at a stride of 1000 / steps, so the first is below pure noise: with 3 steps 666, with 10 steps
        900. BadInput for fewer than 2 steps or more than `levels`."""
        steps = check_count("steps", steps, at_least=2)
        if steps > self.levels:
            raise BadInput(f"steps is {steps}: expected at most {self.levels}, the levels of the diffusion")
        levels = [i * self.levels // steps for i in range(steps)]
        x = z
        yield x
        for i in reversed(range(steps)):
            a, b = self._shares(levels[i])
            noise = self._noise(net, x, torch.full((len(x),), float(levels[i]), device=x.device), a, b)
            clean = (x - b * noise) / a
            if self.bound is not None:
                clean = clean.clamp(-self.bound, self.bound)
                noise = (x - a * clean) / b  # that goes with it
            a, b = self._shares(levels[i - 1]) if i else (1.0, 0.0)
            x = a * clean + b * noise
            yield x

    def _shares(self, level: int) -> tuple[float, float]:
        """Of data and noise at a level: √ᾱ and √(1−ᾱ)."""
        signal = self.alpha_bar[level].item()
        return math.sqrt(signal), math.sqrt(1 - signal)

    def sample(self, net: nn.Module, z: Tensor, steps: int) -> Tensor:
        """x from z in `steps` steps, without gradients."""
        return _end(self.path(net, z, steps))


FLOWS = {"rectified": RectifiedFlow, "diffusion": Diffusion}


@torch.no_grad()
def _end(path: Iterator[Tensor]) -> Tensor:
    return deque(path, maxlen=1).pop()


def path_noise(images: Iterable[int], shape, seed: int = 0, device="cpu") -> Tensor:
    """The noise each image starts from, (len(images), *shape): image 17 is the same in any batch, on any device."""
    draws = [np.random.default_rng([seed, int(image)]).standard_normal(tuple(shape), np.float32) for image in images]
    return torch.from_numpy(np.array(draws, np.float32).reshape(-1, *shape)).to(device)


# ---------------------------------------------------------------------------------------------------
# 3  Network
# ---------------------------------------------------------------------------------------------------


class Norm(nn.GroupNorm):
    """Group norm, SiLU if `silu`, dropout: what stands before a convolution. (B, C, H, W) → the same. At most 32
    groups, of at least 4 channels where `channels` can be divided so."""

    def __init__(self, channels: int, silu: bool = True, dropout: float = 0.0):
        super().__init__(math.gcd(channels, min(channels // 4, 32)), channels, eps=1e-6)
        self.silu, self.dropout = silu, dropout

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        """`shift`: (B, C), added to every pixel first."""
        h = super().forward(x if shift is None else x + shift[:, :, None, None])
        return F.dropout(F.silu(h) if self.silu else h, self.dropout, self.training)


def conv(c_in: int, c_out: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, size, stride, padding=size // 2)


def starting_at_zero(layer: nn.Module) -> nn.Module:
    """Marked so, that its block starts as the identity; `UNet` sets the weights."""
    layer.starts_at_zero = True
    return layer


class ResBlock(nn.Module):
    """Norm, SiLU, convolution, twice; the time is added between. `resample` "up" or "down" halves or doubles the
    image on both branches (BigGAN); `scale` is the factor after the sum. (B, c_in, H, W) → (B, c_out, H', W')."""

    def __init__(self, c_in: int, c_out: int, c_time: int, dropout: float, scale: float = 1.0, resample: str = ""):
        super().__init__()
        self.scale = scale
        self.norm1, self.conv1 = Norm(c_in), conv(c_in, c_out, 3)
        self.time = nn.Linear(c_time, c_out)
        self.norm2, self.conv2 = Norm(c_out, dropout=dropout), starting_at_zero(conv(c_out, c_out, 3))
        self.skip = conv(c_in, c_out, 1) if c_in != c_out or resample else nn.Identity()
        self.resample = {"": nn.Identity(), "up": nn.Upsample(scale_factor=2), "down": nn.AvgPool2d(2)}[resample]

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv1(self.resample(self.norm1(x)))
        h = self.conv2(self.norm2(h, shift=self.time(time)))
        return self.sum(self.skip(self.resample(x)), h)

    def sum(self, x: Tensor, h: Tensor) -> Tensor:
        return (x + h) * self.scale


class Attention(nn.Module):
    """Every pixel looks at every other, one head over all channels. (B, C, H, W) → the same."""

    def __init__(self, channels: int, scale: float = 1.0):
        super().__init__()
        self.scale = scale
        self.norm = Norm(channels, silu=False)
        self.qkv, self.out = conv(channels, 3 * channels, 1), starting_at_zero(conv(channels, channels, 1))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(self.norm(x)), "b (qkv c) h w -> qkv b 1 (h w) c", qkv=3)
        h = rearrange(F.scaled_dot_product_attention(q, k, v), "b 1 (h w) c -> b c h w", h=x.shape[2])
        return self.sum(x, self.out(h))

    sum = ResBlock.sum


class Resample(nn.Module):
    """Half or double the image with a 3×3 convolution, as DDPM does between its levels."""

    def __init__(self, channels: int, way: str):
        super().__init__()
        self.up = way == "up"
        self.conv = conv(channels, channels, 3, stride=1 if self.up else 2)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0) if self.up else x)


class Chain(nn.ModuleList):
    """Layers one after the other, each given the time too."""

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        for layer in self:
            x = layer(x, time)
        return x


class UNet(nn.Module):
    """The paper's networks: (B, channels, size, size) and times (B,) in [0, 999] → (B, channels, size, size).

    `biggan=True` is NCSN++ (Song et al. 2021, as "DDPM++"): halving and doubling inside residual blocks, every
    sum scaled by 1/√2, one attention a level on the way up. `biggan=False` is DDPM's (Ho et al. 2020).

    UNet(channels=4)                                             NCSN++  61,806,724 parameters (4×32×32)
    UNet(channels=4, blocks=2, dropout=0.1, biggan=False)        DDPM    35,748,612 parameters (4×32×32)

    channels     of the images, in and out
    size         of the square images; divisible by 2 once for each level but the first
    width        channels at the first level, `multipliers` times that at the others, a number for each; even
    blocks       residual blocks a level
    attention_at sizes at which there is attention; the middle has it always
    dropout      share of the activations that a residual block drops in training, 0 to 1
    Raises BadInput for sizes that the network cannot have.
    """

    def __init__(self, channels: int = 3, size: int = 32, width: int = 128, multipliers=(1, 2, 2, 2), blocks: int = 4,
                 attention_at=(16,), dropout: float = 0.15, biggan: bool = True):
        super().__init__()
        for name, value in ("channels", channels), ("size", size), ("blocks", blocks), *(
                ("multipliers", each) for each in multipliers):
            check_count(name, value)
        if check_count("width", width, at_least=4) % 2:
            raise BadInput(f"width is {width}: expected an even number")
        if not 0 <= dropout <= 1:
            raise BadInput(f"dropout is {dropout}: expected a share, 0 to 1")
        if not multipliers or size % 2 ** (len(multipliers) - 1):
            raise BadInput(f"the images are {size} pixels wide: expected a multiple of "
                           f"{2 ** max(len(multipliers) - 1, 0)} for a network of {len(multipliers)} levels")
        self.settings = dict(channels=channels, size=size, width=width, multipliers=list(multipliers), blocks=blocks,
                             attention_at=list(attention_at), dropout=dropout, biggan=biggan)
        self.shape = channels, size, size  # of one image
        self.width, c_time = width, 4 * width
        scale = math.sqrt(0.5) if biggan else 1.0

        def res(c_in, c_out, resample=""):
            return ResBlock(c_in, c_out, c_time, dropout, scale, resample)

        def attend(c):
            return [Attention(c, scale)] if size in attention_at else []

        def resample(c, way):
            return res(c, c, way) if biggan else Resample(c, way)

        self.time = nn.Sequential(nn.Linear(width, c_time), nn.SiLU(), nn.Linear(c_time, c_time))
        self.first = conv(channels, width, 3)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        skips, c = [width], width
        for level, multiplier in enumerate(multipliers):
            for _ in range(blocks):
                self.down.append(Chain([res(c, multiplier * width), *attend(multiplier * width)]))
                skips.append(c := multiplier * width)
            if level < len(multipliers) - 1:
                self.down.append(Chain([resample(c, "down")]))
                skips.append(c)
                size //= 2
        self.middle = Chain([res(c, c), Attention(c, scale), res(c, c)])
        for level, multiplier in reversed(list(enumerate(multipliers))):
            for block in range(blocks + 1):
                layers = [res(c + skips.pop(), c := multiplier * width)]
                if not biggan or block == blocks:
                    layers += attend(c)
                self.up.append(Chain(layers))
            if level > 0:
                self.up[-1].append(resample(c, "up"))
                size *= 2
        self.last = nn.Sequential(Norm(c), starting_at_zero(conv(c, channels, 3)))
        self.apply(self._start)

    @staticmethod
    def _start(layer: nn.Module) -> None:
        """Weights as DDPM draws them: uniform, variance 1 / mean of fan-in and fan-out; biases zero."""
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        if getattr(layer, "starts_at_zero", False):
            nn.init.zeros_(layer.weight)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """x: (B, channels, size, size); t: (B,), the time as its flow scales it, 0 to 999 → as x."""
        time = F.silu(self.time(self._waves(t).to(self.first.weight.dtype)))
        skips = [h := self.first(x)]
        for layer in self.down:
            skips.append(h := layer(h, time))
        h = self.middle(h, time)
        for layer in self.up:
            h = layer(torch.cat([h, skips.pop()], 1), time)
        return self.last(h)

    def _waves(self, t: Tensor) -> Tensor:
        """Sinusoidal embedding, t: (B,) → (B, width): wavelengths from 2π to 10,000·2π (Vaswani et al. 2017)."""
        half = self.width // 2
        frequencies = torch.exp(torch.arange(half, device=t.device) * (-math.log(10_000) / (half - 1)))
        angles = t[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], 1)


NETWORKS = {
    "ncsnpp": dict(),
    "ddpm": dict(blocks=2, dropout=0.1, biggan=False),
    "small": dict(width=64, multipliers=(1, 2, 2), blocks=2, dropout=0.0),
}


# ---------------------------------------------------------------------------------------------------
# 4  Training
# ---------------------------------------------------------------------------------------------------


class Training:
    """What a training run changes: the network, its moving average (the one to sample from), the optimizer. A step of
    it is `gradients`, then `update`.

    lr      of Adam; the paper's is 2e-4 for batches of 128
    decay   of the moving average, which warms up as min(decay, (1 + n) / (10 + n))
    clip    the largest norm of the gradient
    """

    def __init__(self, net: nn.Module, lr: float = 2e-4, decay: float = 0.9999, clip: float = 1.0):
        self.net, self.decay, self.clip = net, decay, clip
        self.average = copy.deepcopy(net).eval().requires_grad_(False)
        self.optimizer = torch.optim.Adam(net.parameters(), lr=lr, fused=next(net.parameters()).is_cuda)
        self.step = 0

    def gradients(self, flow, x: Tensor, z: Tensor) -> Tensor:
        """Of the loss of these pairs, left in the weights. Returns the loss, a tensor on the device: reading it each
        step would make the GPU wait."""
        self.optimizer.zero_grad()
        loss = flow.loss(self.net, x, z)
        loss.backward()
        return loss.detach()

    def update(self) -> None:
        """Move the weights by their gradients, and the average after them."""
        nn.utils.clip_grad_norm_(self.net.parameters(), self.clip)
        self.optimizer.step()
        self.step += 1
        update_ema(self.average, self.net, self.decay, self.step)

    def state_dict(self) -> dict:
        return {"net": self.net.state_dict(), "average": self.average.state_dict(),
                "optimizer": self.optimizer.state_dict(), "step": self.step}

    def load_state_dict(self, state: dict) -> None:
        for part in ("net", "average", "optimizer"):
            getattr(self, part).load_state_dict(state[part])
        self.step = state["step"]


@torch.no_grad()
def update_ema(average: nn.Module, net: nn.Module, decay: float, step: int) -> None:
    """Move an average towards the network; after few steps by more, lest it hold on to how they began."""
    share = 1 - min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), list(net.parameters()), share)


def train(run: Training, flow, pairs: Iterable[tuple[Tensor, Tensor]]) -> Iterator[Tensor]:
    """The training loop: one step for each pair (x, z), yielding its loss, for as long as the caller asks.

    Logging, checkpoints and when to stop are the caller's; so is the pairing, which comes in with the data.
    """
    run.net.train()
    for x, z in pairs:
        loss = run.gradients(flow, x, z)
        run.update()
        yield loss


# ---------------------------------------------------------------------------------------------------
# 5  Measuring
# ---------------------------------------------------------------------------------------------------


def path_length(x: Tensor, z: Tensor) -> float:
    """Mean ‖x_i − z_i‖ over pairs (B, ...)."""
    return (x - z).flatten(1).norm(dim=1).mean().item()


def own_noise_nearest(x: Tensor, z: Tensor) -> float:
    """Share of samples in (B, ...) whose own noise is nearer than every other's: the paper's second foundation."""
    nearest = squared_distances(x.float(), z.float()).argmin(1)
    return (nearest == torch.arange(len(x), device=x.device)).cpu().double().mean().item()


def straightness(path: Tensor) -> float:
    """How far a path bends, (steps + 1, B, ...): the mean squared difference of its velocity from that of the
    straight line between its ends (Liu et al. 2022), over that line's own square. 0 is straight; NaN if a path ends
    where it began."""
    path = path.flatten(2)
    steps = path[1:] - path[:-1]
    line = path[-1] - path[0]
    bend = (steps * len(steps) - line).square().sum(2).mean(0)
    return (bend / line.square().sum(1)).mean().item()


@dataclass
class InterPathDistance:
    """Means, in the data's own units; NaN of a single path. t runs from the noise's end, 0, to the data's, 1."""

    mean: float  # of the least distances of all pairs of paths
    mean_t: float  # at which pairs are nearest
    minimum: float  # of the distances of each path to the one that comes nearest
    minimum_t: float  # at which that is


@torch.no_grad()
def inter_path_distance(x: Tensor, z: Tensor, block: int = 1024) -> InterPathDistance:
    """How near the straight paths z_i → x_i come to each other at equal times, over all pairs i ≠ j.

    With U = z_i − z_j and V = x_i − x_j two paths are ‖(1−t)U + tV‖ apart, least at t* = ⟨U, U−V⟩ / ‖U−V‖²,
    clamped to [0, 1]. All products come from one matrix product of block × block paths in float64: beyond the
    input that takes about 100·block² + 64·block·D bytes, whatever the number of paths.   x, z: (B, ...), B ≥ 2.
    """
    if len(x) < 2 or x.shape != z.shape:
        raise BadInput(f"x is {tuple(x.shape)} and z {tuple(z.shape)}: expected at least two paths, equal shapes")
    exact = torch.float32 if x.device.type == "mps" else torch.float64  # Apple's GPUs know no float64
    total = total_t = 0.0
    minimum = torch.full((len(x),), torch.inf, dtype=exact, device=x.device)
    minimum_t = torch.zeros_like(minimum)
    blocks = [slice(start, start + block) for start in range(0, len(x), block)]
    for a, first in enumerate(blocks):
        for second in blocks[a:]:  # (i, j) is (j, i)
            ends = x[first], z[first], x[second], z[second]
            distance, t = _distances_of_paths(*(end.flatten(1).to(exact) for end in ends))
            if first == second:
                distance.fill_diagonal_(torch.inf)  # a path and itself are no pair
            once = torch.ones_like(distance, dtype=torch.bool).triu(1 if first == second else -len(x))
            total, total_t = total + distance[once].sum().item(), total_t + t[once].sum().item()
            for rows, d, times in (first, distance, t), (second, distance.T, t.T):
                nearest, j = d.min(1)
                better = nearest < minimum[rows]
                minimum[rows] = torch.where(better, nearest, minimum[rows])
                minimum_t[rows] = torch.where(better, times.gather(1, j[:, None])[:, 0], minimum_t[rows])
    count = len(x) * (len(x) - 1) / 2
    return InterPathDistance(total / count, total_t / count, minimum.mean().item(), minimum_t.mean().item())


def _distances_of_paths(x1, z1, x2, z2):
    """Least distance and its time for each path of (x1, z1): (A, D) with each of (x2, z2): (B, D) → two (A, B)."""
    products = torch.cat([z1, x1]) @ torch.cat([z2, x2]).T
    zz, zx, xz, xx = (part for half in products.chunk(2) for part in half.chunk(2, 1))
    uu = z1.square().sum(1, keepdim=True) + z2.square().sum(1) - 2 * zz
    vv = x1.square().sum(1, keepdim=True) + x2.square().sum(1) - 2 * xx
    uv = (z1 * x1).sum(1, keepdim=True) + (z2 * x2).sum(1) - zx - xz
    spread = uu - 2 * uv + vv  # ‖U − V‖², 0 for parallel paths, which are as near at t = 0 as anywhere
    t = torch.where(spread > 1e-12 * (uu + vv), (uu - uv) / spread, 0).clamp_(0, 1)
    return (uu - 2 * t * (uu - uv) + t * t * spread).clamp_min_(0).sqrt_(), t


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Between two sets of features (N, D), N ≥ 2, taken as Gaussians: ‖μ_a − μ_b‖² + tr(A + B − 2 (AB)^½).

    (Dowson and Landau 1982; on Inception's features it is called FID, Heusel et al. 2017.) The trace of the
    root is the sum of the singular values of A^½ B^½, which stays accurate when A or B is nearly singular.
    """
    if min(len(a), len(b)) < 2 or a.shape[1:] != b.shape[1:]:
        raise BadInput(f"features are {tuple(a.shape)} and {tuple(b.shape)}: expected at least two each, equally long")
    a, b = a.flatten(1).cpu().double(), b.flatten(1).cpu().double()  # Apple's GPUs know no float64
    (root_a, trace_a), (root_b, trace_b) = _root_of_covariance(a), _root_of_covariance(b)
    overlap = torch.linalg.svdvals(root_a @ root_b).sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + trace_a + trace_b - 2 * overlap).item()


def _root_of_covariance(features):
    values, vectors = torch.linalg.eigh(torch.atleast_2d(torch.cov(features.T)))
    values.clamp_min_(0)
    return vectors * values.sqrt() @ vectors.T, values.sum()


# ---------------------------------------------------------------------------------------------------
# 6  Refusing
# ---------------------------------------------------------------------------------------------------


class DataCheck:
    """Refuses batches that are of another shape or have no distance: integers, NaN, values beyond 1e15.

    A GPU writes what it finds into `found`, which is read when the next batch comes, so that neither waits for the
    other: what is wrong with one batch is said at one of the next. (Where the kernels match they find what makes a
    cost infinite or NaN, which values from about 1e19 on do.)
    """

    def __init__(self, shape, device):
        self.shape, self.device = shape, device
        gpu = device.type == "cuda"
        self.found = torch.zeros(1, dtype=torch.int32, device="cpu", pin_memory=gpu)
        self.ever = torch.zeros(1, dtype=torch.int32, device=device) if gpu else None

    def __reduce__(self):  # a copy needs memory of its own that the GPU can write to
        return DataCheck, (self.shape, self.device)

    def __call__(self, x: Tensor, numbers: bool = True) -> None:
        """`numbers` False: only the form of x, as its matching finds out about the numbers."""
        self.form(x)
        if self.found[0]:
            if self.ever is not None:
                torch.cuda.synchronize(self.ever.device)  # nothing more is on its way
                self.ever.zero_()
            self.found.zero_()
            raise self.unfit("before this one")
        if numbers and x.numel():
            fits = has_distance(x)
            if self.ever is not None and x.is_cuda:
                self.found.copy_(self.ever.logical_or_(~fits), non_blocking=True)
            elif not fits:
                raise self.unfit(f"of shape {tuple(x.shape)}")

    def form(self, x: Tensor) -> None:
        check_tensor(x)
        if x.shape[1:] != self.shape or x.ndim == 0:
            raise BadInput(f"the pool holds noises of shape {tuple(self.shape)}, the batch is {tuple(x.shape)}: "
                           f"expected ({', '.join(['B', *map(str, self.shape)])})")

    def unfit(self, which):
        return BadInput(f"the batch {which} holds NaN, infinite or huge values: expected finite data, below 1e15")


def has_distance(x: Tensor) -> Tensor:
    """Whether all of x is below 1e15, as a tensor: ‖x‖² fits float32 then. NaN is not."""
    return torch.linalg.vector_norm(x.detach(), math.inf) < 1e15


def check_tensor(x) -> None:
    """BadInput for what is no tensor of floating point numbers."""
    if not isinstance(x, Tensor):
        raise BadInput(f"the batch is a {type(x).__name__}: expected a tensor of the samples alone, without labels")
    if not x.is_floating_point():
        raise BadInput(f"the batch is of {x.dtype}: expected floating point data, images in [−1, 1] for instance")


def check_sides(cost: Tensor) -> Tensor:
    """`cost`, or BadInput if it is not (B, M) with a noise for each sample, B ≤ M."""
    if cost.ndim != 2:
        raise BadInput(f"the costs are {tuple(cost.shape)}: expected (samples, noises)")
    samples, noises = cost.shape
    if samples > noises:
        raise BadInput(f"{samples} samples and {noises} noises: expected at least as many noises as samples")
    return cost


def check_costs(cost: Tensor) -> None:
    """BadInput for costs (B, M) that are not all finite."""
    if not cost.isfinite().all():
        samples, noises = cost.shape
        raise BadInput(f"the costs of {samples} samples and {noises} noises hold NaN or infinite values: expected "
                       "finite ones")


def check_shape(shape) -> torch.Size:
    """`shape` as a torch.Size, or BadInput if it is not one or several whole numbers."""
    sizes = (shape,) if isinstance(shape, int) else shape
    try:
        return torch.Size([check_count("shape", size) for size in sizes])
    except (TypeError, BadInput) as error:
        raise BadInput(f"shape is {shape}: expected whole numbers from 1 on, as in (3, 32, 32)") from error


def free_memory(device) -> int:
    """Bytes that could be allocated on the device."""
    if torch.device(device).type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    known = Path("/proc/meminfo")
    if known.exists() and "MemAvailable" in (text := known.read_text()):
        return min(1024 * int(text.split("MemAvailable:")[1].split()[0]), left_to_container())
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 2**62


def left_to_container(group: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that the memory limit of a container leaves, of which the machine's own account knows nothing; files kept
    in memory can go."""
    try:
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        files = int((group / "memory.stat").read_text().split("inactive_file ")[1].split()[0])
    except (OSError, ValueError, IndexError):  # no such account, or no limit, which reads "max"
        return 2**62
    return max(0, limit - used + files)


def check_memory(what: str, needed: int, device) -> None:
    """BadInput if the device has not so many bytes free."""
    if needed > (free := free_memory(device)):
        raise BadInput(f"{what}: that needs {needed / 1e9:,.1f} GB, {device} has {free / 1e9:,.1f} GB free; expected a "
                       "smaller one")


def check_count(name: str, value, at_least: int = 1) -> int:
    """`value` as an int, or BadInput if it is not a whole number from `at_least` on."""
    try:
        whole = not isinstance(value, bool | np.bool_) and int(value) == value and value >= at_least
    except (TypeError, ValueError, OverflowError):
        whole = False
    if not whole:
        given = repr(value) if isinstance(value, str) else value
        raise BadInput(f"{name} is {given}: expected a whole number of at least {at_least}")
    return int(value)


def check_choice(name: str, value, choices):
    """`value`, or BadInput if it is none of `choices`."""
    if value not in choices:
        raise BadInput(f"{name} is {value!r}: expected one of {', '.join(map(str, choices))}")
    return value


# ---------------------------------------------------------------------------------------------------
# 7  Commands
# ---------------------------------------------------------------------------------------------------

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False,
                  help="Pair noise with data by distance, so that samples of few steps get good earlier in training. "
                       "Begin with: dansm toy")
console = Console()

Device = Annotated[Literal["auto", "cpu", "cuda", "mps"], typer.Option(help="auto takes the fastest there is")]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="same seed, same result on the same machine")]
MatchSize = Annotated[int, typer.Option(min=0, help="noises in the pool; 0 or 1 is vanilla training")]
Out = Annotated[Path, typer.Option(help="folder for the results, made if missing")]


@app.command("toy")
def toy_command(
    shape: Annotated[str, typer.Option(
        help="swiss-roll, eight-gaussians, two-moons, checkerboard, pinwheel, or all")] = "swiss-roll",
    match_size: MatchSize = 1000,
    steps: Annotated[int, typer.Option(min=1, help="training steps for each way of pairing")] = 800,
    seeds: Annotated[int, typer.Option(min=1, help="trainings for each way of pairing, for the spread")] = 3,
    seed: Seed = 0,
    device: Device = "cpu",
    out: Out = Path("runs/toy"),
) -> None:
    """See in a minute what matching does: 2D flows, each way of pairing, pictures and a table."""
    from tiny.shapes import SHAPES
    from tiny.toy import run

    check_choice("--shape", shape, (*SHAPES, "all"))
    run(shape, match_size=match_size, steps=steps, seeds=seeds, seed=seed, device=pick_device(device),
        out=make_folder(out))


@app.command("digits")
def digits_command(
    match_size: Annotated[int, typer.Option(min=2, help="noises in the pool; random pairs stand beside it")] = 1000,
    steps: Annotated[int, typer.Option(min=1, help="training steps for each way of pairing")] = 500,
    batch: Annotated[int, typer.Option(min=1, help="images a step; down to 1, where a batch has no choice")] = 64,
    assigned: Annotated[bool, typer.Option("--assigned", help="also linear assignment within each batch")] = False,
    ages: Annotated[int, typer.Option(min=1, help="from 2 on: also so many pools side by side, of different ages")] = 1,
    judge_at: Annotated[str | None, typer.Option(
        help="judge after so many training steps too, parted by commas: a curve of distance against images")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="trainings for each way of pairing, for the spread")] = 2,
    seed: Seed = 0,
    device: Device = "auto",
    out: Out = Path("runs/digits"),
) -> None:
    """First images in three minutes: handwritten digits, paired at random and matched, side by side."""
    from scale.recipe import parse_counts
    from tiny.digits import run

    run(match_size=match_size, steps=steps, batch=batch, assigned=assigned, ages=ages,
        judge_at=parse_counts("--judge-at", judge_at) if judge_at else (), seeds=seeds, seed=seed,
        device=pick_device(device), out=out)


WITH_ANY_OPTIONS = {"allow_extra_args": True, "ignore_unknown_options": True}  # which scale knows, and the help of them


@app.command("train", add_help_option=False, context_settings=WITH_ANY_OPTIONS)
def train_command(context: typer.Context) -> None:
    """Train on images by a recipe. Ctrl-C saves; the same command goes on from there."""
    from scale.command import train

    train(context.args, context.command_path)


def _of_scale(context: typer.Context) -> None:
    """Run one of the commands whose options stand in scale.cli."""
    from scale.cli import run

    run([context.info_name, *context.args], context.parent.command_path)


COMMANDS = {
    "export": "Write the averaged weights alone, as safetensors, with what it takes to sample from them.",
    "encode": "Images to latents by Stable Diffusion's autoencoder, in shards; it goes on where it was stopped.",
    "decode": "Latents to PNG images by Stable Diffusion's autoencoder.",
    "sample": "Draw images from a trained network. Image 17 of a seed is the same whatever --count and --batch.",
    "evaluate": "FID, KID, Inception Score, precision and recall of checkpoints, from the same noise, in one table.",
    "compare": "What several models make of the same noise, and how near it is (the paper's first foundation).",
    "grid": "Samples by counts of steps (rows) and models (columns), all from the same noise.",
    "tsne": "Noises and samples in the plane, random pairs above, the model's own below (its second foundation).",
    "paths": "How long paths are and how near they come to each other: random, matched, and models' own pairs.",
    "loss": "A model's loss by t under random, matched and its own pairs.",
    "theory": "What matching wins along the images' principal directions, and what the prior keeps. No model.",
    "proof": "Does matching pay? Equal runs, paired in many ways; adds what is missing to the tables in --out.",
    "bench": "Time matching, training or judging, against the paper's code, other libraries and the machine's floor.",
}
for _name, _says in COMMANDS.items():
    app.command(_name, help=_says, add_help_option=False, context_settings=WITH_ANY_OPTIONS)(_of_scale)


def pick_device(name: str) -> torch.device:
    """The device of that name, or the fastest there is for "auto"."""
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next(device for device in ("cuda", "mps", "cpu") if there[device])
    if not there[check_choice("--device", name, there)]:
        found = ", ".join(device for device in there if there[device])
        raise BadInput(f"--device is {name}, which this machine has not: expected one of auto, {found}")
    return torch.device(name)


def make_folder(path: Path, option: str = "--out") -> Path:
    """`path` as a folder that can be written into, made if missing. BadInput, which names the option, if it cannot."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / ".writable").touch()
        (path / ".writable").unlink(missing_ok=True)  # another rank may have been quicker
    except (FileExistsError, NotADirectoryError) as error:
        file = next(part for part in (path, *path.parents) if part.exists())
        raise BadInput(f"{option} is {path}: {file} is a file, expected a folder") from error
    except OSError as error:
        raise BadInput(f"{option} is {path}: not writable ({error.strerror}), expected a folder that is") from error
    return path


def hardware(device) -> dict:
    """What the figures of a run depend on, to stand beside them."""
    described = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.split(":")[1].strip() for line in described if line.startswith("model name")]
    gpu = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else None
    return {"device": str(device), "gpu": gpu,
            "cpu": models[0] if models else platform.processor(), "cores": os.cpu_count(),
            "threads": torch.get_num_threads(), "torch": torch.__version__, "python": platform.python_version()}


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` to write into, then moved into its place: stopping at any moment leaves a whole file."""
    beside = path.with_suffix(".part")
    try:
        yield beside
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def write_json(path: Path, content: dict) -> None:
    with replacing(path) as beside:
        beside.write_text(json.dumps(content, indent=1) + "\n")


def write_csv(rows: list[dict], path: Path) -> None:
    """A column for every name that any row has."""
    with replacing(path) as beside, open(beside, "w", newline="") as file:
        lines = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
        lines.writeheader()
        lines.writerows(rows)


def say_files(out: Path, *names: str) -> None:
    say("written:", ", ".join(str(out / name) for name in names))


def say(*words: str) -> None:
    """A line as it is: a path is not broken in two, nor are its [brackets] taken for a style."""
    console.print(*words, soft_wrap=True, markup=False, highlight=False)


def counted(count: int, noun: str) -> str:
    """1 image, 2 images."""
    return f"{count:,} {noun}{('es' if noun.endswith('s') else 's') * (count != 1)}"


def main(arguments: list[str] | None = None, commands: typer.Typer = app) -> None:
    """Run a command. What cannot be done is said in one line, with exit code 2; Ctrl-C is exit code 130."""
    message = ""
    try:
        code = commands(arguments, standalone_mode=False) or 0
    except BadInput as error:
        code, message = 2, str(error)
    except (KeyboardInterrupt, typer.Abort, Stopped) as error:
        code, message = 130, str(error)
    except OSError as error:  # a folder where a file is to be; a full disk, which does not say of what file
        said = error.strerror or error
        code, message = 2, str(error) if error.filename else f"a file cannot be read or written: {said}"
    except Exception as error:
        if lacks_memory(error):
            asked = re.search(r"tried to allocate [\d.]+ \w+", str(error), re.IGNORECASE)  # the rest is torch's advice
            reason = asked[0] if asked else str(error).partition("\n")[0] or "Python asked for it"
            code, message = 2, f"this needs more memory than there is ({reason})"
        elif hasattr(error, "format_message"):  # Typer's own: an unknown option, a value of the wrong kind
            code, message = 2, in_our_words(error)
        else:
            raise
    if code == 130:
        message = message or "stopped"
    if message:
        print("dansm:", " ".join(message.split()), file=sys.stderr)
    sys.exit(code)


def lacks_memory(error: Exception) -> bool:
    """Torch says so in a RuntimeError, by other words for each device."""
    told = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error).lower() for words in told))


def in_our_words(error: Exception) -> str:
    """Typer's message, with the value given and what is expected, which some of its messages leave out."""
    message = error.format_message().removesuffix(".").replace("Value error, ", "")
    message = message.replace("Input should be", "expected")
    message = re.sub(r"expected a valid integer\b.*", "expected a whole number", message)
    if message.startswith("No such command"):
        return f"{message.split('.')[0]}: expected one of {', '.join(error.ctx.command.list_commands(error.ctx))}"
    if message.startswith("Missing ") and getattr(error.param, "help", None):
        return f"{message}: expected {error.param.help}"
    if not hasattr(error.__cause__, "errors"):
        return message
    given = str(error.__cause__.errors()[0]["input"])
    return message if repr(given) in message else f"{message}, given {given}"


if __name__ == "__main__":
    from dansm import main as run  # the module by its name, so that scale and tiny share it with us

    run()
