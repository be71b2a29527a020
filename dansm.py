"""DANSM: match each data sample with a near noise, so that a flow needs less training to sample well in few steps.

A rectified flow learns to carry noise z to data x along straight lines. Usually each x gets a random z, so the lines
cross, and where they cross the network can only learn their average. Distance-aware noise-sample matching (ICLR 2025,
"Easing Training Process of Rectified Flow Models via Lengthening Inter-Path Distance") lets each sample take the
nearest noise left in a pool of `match_size` noises: the lines cross less. Read this file from top to bottom:

    1 matching    cost_matrix, greedy, NoisePool, Semidiscrete, pairs
    2 flows       RectifiedFlow, Diffusion: loss(net, x, z), path and sample(net, z, steps)
    3 network     UNet: the paper's two networks, and two small ones
    4 training    train: the plain loop
    5 checks      what is refused, with a message of one line
    6 commands    main: hands the command line to scale/commands

Names: x is data, z is noise, both (B, C, H, W) or any other (B, ...); t runs from noise (0) to data (1). B is the batch
size, M the pool's match_size, D how many numbers a sample has. Skip each `fast` at first: what follows is the rule.
"""

import copy
import importlib
import math
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

# This file is a package too: dansm.scale and dansm.tiny lie next to it in a checkout, in dansm/ where it is installed.
_here = Path(__file__).parent
__path__ = [str(home) for home in (_here / "dansm", _here) if (home / "scale" / "matching").is_dir()]


class BadInput(ValueError):
    """What was given cannot be used. The commands print the message as one line and exit with code 2."""


def scaled(part: str):
    """`dansm.scale.<part>`, or None where this file stands alone: then everything below goes the plain way."""
    return importlib.import_module(f"dansm.scale.{part}") if __path__ else None


# ------------ 1  Matching ---------------------------------------------------------------------------------------------

METHODS = ("random", "greedy", "semidiscrete", "optimal", "nearest")


def fast_matching():
    """dansm.scale.matching: the same products, assignments and pools, only faster. None if this file stands alone."""
    return scaled("matching")


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32, or float64 if it is float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rows(x: Tensor) -> Tensor:
    """Each sample as one row. (B, ...) → (B, D), where D is 1 for (B,). BadInput for what is not floating point."""
    return check_tensor(x, "samples or noises are").reshape(len(x), x.shape[1:].numel())


def squared_norms(x: Tensor) -> Tensor:
    """‖x_i‖² of each sample. (B, ...) → (B,), in float32 at least."""
    return at_least_float32(rows(x)).square().sum(1)


COSTS = {"squared": squared_norms, "inner": lambda z: 0 * squared_norms(z)}  # of z alone; −2⟨x, z⟩ comes to it


def inner_products(x: Tensor, z: Tensor) -> Tensor:
    """⟨x_i, z_j⟩ for every i and j. x: (B, ...), z: (M, ...) → (B, M), in float32 at least."""
    x, z = rows(x), rows(z)
    if fast := fast_matching():
        return fast.products(x, z)
    exact = torch.float32 if x.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    return (x.to(exact) @ z.to(exact).T).to(torch.promote_types(x.dtype, torch.float32))


def path_length(x: Tensor, z: Tensor) -> float:
    """Mean ‖x_i − z_i‖ over pairs (B, ...)."""
    return rows(check_tensor(x) - check_tensor(z)).norm(dim=1).mean().item()


def cost_matrix(x: Tensor, z: Tensor, cost: str = "squared") -> Tensor:
    """The cost of giving noise j to sample i, lower is better. x: (B, ...), z: (M, ...) → (B, M).

    "squared"  ‖z‖² − 2⟨x, z⟩: the paper's ‖x − z‖² without ‖x‖², which is the same for every noise and, where it is
               large, would only round the rest away. (The paper takes the mean over D, not the sum: the same order.)
    "inner"    −2⟨x, z⟩, as Σ‖z‖² over a whole pool is the same for every pairing. Greedy picks come nearer to the best
               by it, and yet samples of images mostly get worse (docs/results.md).
    """
    check_choice("cost", cost, COSTS)
    return costs_from(inner_products(x, z), COSTS[cost](z))


def costs_from(products: Tensor, own: Tensor) -> Tensor:
    """Turn inner products (B, M) into costs, in place. own: (M,), what each noise costs whoever takes it, by COSTS."""
    return torch.sub(own, products, alpha=2, out=products)


def greedy(cost: Tensor) -> Tensor:
    """The paper's rule: in batch order, each sample takes the nearest noise that is still free.

    cost: (B, M) with B ≤ M; inf forbids a noise. Returns the (B,) int64 indices of the noises
    picked, no index twice. Of equal costs the lower index wins.
    """
    check_sides(cost)
    costs = at_least_float32(cost.detach()).cpu().numpy()
    taken = np.zeros(costs.shape[1], costs.dtype)
    picks = np.empty(len(costs), np.int64)
    for i, row in enumerate(costs):
        picks[i] = (row + taken).argmin()
        if not np.isfinite(row[picks[i]] + taken[picks[i]]):
            raise BadInput("a sample's least cost is NaN or infinite: expected a finite one among the noises left")
        taken[picks[i]] = np.inf
    return torch.from_numpy(picks).to(cost.device)


def noise_generator(seed: int, device="cpu", *stream: int) -> torch.Generator:
    """A generator for one `stream` of a seed. The seed is mixed first: used as it is, data or weights that torch draws
    from it would equal the noise."""
    mixed = np.random.SeedSequence([seed, 0xDA45, *stream]).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(mixed[0]))


def process_number() -> int:
    """The rank of this process under torch.distributed, else 0."""
    group = torch.distributed
    return group.get_rank() if group.is_available() and group.is_initialized() else 0


class NoisePool:
    """A pool of `match_size` noises: call it with a batch, get the noises matched to it.

        pool = NoisePool(10_000, x.shape[1:], device=x.device)      # once
        z = pool(x)                                                 # was: z = torch.randn_like(x)

    Samples are served in batch order: each takes the nearest noise, which then leaves the pool. An empty pool is
    refilled, in the middle of a batch if need be, so the batch size does not matter and may be 1. Over a whole pool
    the noises handed out are exactly those drawn: the prior stays N(0, I).

    match_size, shape  number of noises, 0 or 1 for random pairs; shape of one sample, (C, H, W) or any other
    cost        "squared", the paper's, or "inner", see `cost_matrix`; in scale/ also "priced", the default there
    device, dtype  of the noises: float32 (M × D × 4 bytes), float64, or bfloat16, which takes half the memory
    seed        None: from torch's generator. By torch.distributed each process has its own noises from the same seed
    groups      of samples, such as classes: a pool for each, and z = pool(x, labels); in scale/
    scale/ has a faster subclass with more options, dansm.scale.matching.pool.FastPool. BadInput for what cannot be.
    """

    dtypes = (torch.float32, torch.float64, torch.bfloat16)  # float16 overflows in the products of long samples
    grouped = False  # whether it is called with labels
    costs = tuple(COSTS)  # the first is the default
    numbers_per_chunk = 2**23  # each chunk of a pool has a random stream of its own and can be drawn by itself

    def __new__(cls, *args, **settings):
        fast = fast_matching() if cls is NoisePool else None
        return super().__new__(fast.pool_class(*args, **settings) if fast else cls)  # whose __init__ Python calls

    def __init__(self, match_size: int, shape, *, cost: str | None = None, device="cpu", dtype=torch.float32,
                 seed: int | None = None, groups: int | None = None):
        self.match_size, self.shape = check_count("match_size", match_size, at_least=0), check_shape(shape)
        self.cost = check_choice("cost", cost or self.costs[0], self.costs)
        if groups is not None:
            raise BadInput(f"groups is {groups}: expected None where dansm.py is alone, pools for groups are in scale/")
        self.seed = torch.randint(2**31, ()).item() if seed is None else check_count("seed", seed, at_least=0)
        process = process_number()
        self.stream = (process,) if process else ()  # pools of several processes must not be equal
        self.generator = noise_generator(self.seed, device, 0, process)  # of `fresh`
        self.number = 0  # of the pool: the first is 1, as stream 0 is that of `fresh`
        self.noise = torch.empty(0, self.shape.numel(), device=device, dtype=check_choice("dtype", dtype, self.dtypes))
        self.index = torch.empty(0, device=device, dtype=torch.int32)  # of each free noise in the pool as it was drawn

    @torch.no_grad()
    def __call__(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Match x: (B, *shape), of any B, dtype and device → z like x, z_i matched to x_i."""
        if labels is not None:
            raise BadInput("labels are given to a pool without groups: expected NoisePool(…, groups=N), or x alone")
        self.check(x)
        if self.match_size <= 1:
            return self.fresh(x)
        return self._match(x.detach().reshape(len(x), self.noise.shape[1]).to(self.noise)).view(x.shape).to(x)

    def _match(self, samples: Tensor) -> Tensor:
        """Match samples (B, D) → (B, D), refilling the pool where it ends."""
        z = [samples[:0]]
        while len(samples):
            if len(self.noise) == 0:
                self._refill()
            now, samples = samples[: len(self.noise)], samples[len(self.noise) :]
            z.append(self._take(now))
        return torch.cat(z)

    def _take(self, samples: Tensor) -> Tensor:
        """The nearest free noises, (B, D) → (B, D), which leave the pool."""
        picks = greedy(cost_matrix(samples, self.noise, self.cost))
        taken = self.noise[picks]
        free = torch.ones(len(self.noise), dtype=torch.bool, device=picks.device)
        free[picks] = False
        self.noise, self.index = self.noise[free], self.index[free]
        return taken

    def _refill(self) -> None:
        self.number += 1
        self.noise = self._drawn(self.number)
        self.index = torch.arange(self.match_size, device=self.noise.device, dtype=torch.int32)

    def _drawn(self, number: int) -> Tensor:
        """All noises of pool `number`, (match_size, D)."""
        noise = self.noise.new_empty(self.match_size, self.noise.shape[1])
        for chunk, part in enumerate(noise.split(max(1, self.numbers_per_chunk // self.noise.shape[1]))):
            part.normal_(generator=noise_generator(self.seed, noise.device, number, chunk, *self.stream))
        return noise

    def fresh(self, x: Tensor) -> Tensor:
        """Unmatched noise for x from the pool's generator, like `torch.randn_like(x)`."""
        return torch.randn(check_tensor(x).shape, device=self.noise.device, generator=self.generator).to(x)

    def check(self, x: Tensor) -> None:
        check_batch(x, self.shape)
        check_finite_batch(x)

    def state_dict(self) -> dict:
        """What a checkpoint needs to resume with the same noises: at most 4 bytes a noise, as the pool is drawn again
        from its seed. Each of several processes has a state of its own."""
        return {"made_for": self._made_for(), "seed": self.seed, "number": self.number, "index": self.index.clone(),
                "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict) -> None:
        """Resume where `state_dict` was taken, by a pool made with the same arguments, of any seed."""
        check_state(state, self._made_for())
        self.seed, self.number = state["seed"], state["number"]
        self.generator.set_state(state["generator"].cpu())
        self.index = state["index"].to(self.noise.device).sort().values  # the kernels' pools leave it unsorted
        self.noise = self._drawn(self.number)[self.index.long()] if len(self.index) else self.noise[:0]

    def _made_for(self) -> dict:
        made_for = {"match_size": self.match_size, "shape": list(self.shape), "cost": self.cost, "rank": 0, "ranks": 1,
                    "dtype": str(self.noise.dtype), "device": self.noise.device.type}  # a SpreadPool has more ranks
        return made_for | ({"process": self.stream[0]} if self.stream else {})


class Semidiscrete:
    """Noises for data that are known: each fresh noise z takes the sample x_j of the largest ⟨z, x_j⟩ − b_j.

        coupling = Semidiscrete(data, groups=labels)      # data: (n, ...); labels: (n,) whole numbers from 0, or None
        coupling.solve()                                  # first: else shares are uneven, after it within 10 % (rms)
        z, taken = coupling.draw(256)                     # (256, ...), and the numbers of their samples: data[taken]
        z, taken = coupling.draw(256, labels)             # of samples with these labels (256,)

    Every batch is N(0, I), nothing is left over, and no process needs another's noises. Of all plans that take every
    sample equally often, that of least E‖x − z‖² has this form: one number b_j for each sample, its potential, is all
    that must be found (Aurenhammer et al. 1998, Genevay et al. 2016). `solve` finds them in random steps:

    - ⟨z, x_j⟩ is normal with deviation ‖x_j‖, and the largest of n such is near ‖x_j‖·√(2 ln n). So potentials begin
      there: from zeros, the longest samples would take nearly all noises.
    - Where a sample is taken twice as often as it should be, b_j rises by ‖x_j‖/√(2 ln n): large values thin out at
      that scale, so this is Newton's step if the others stand still. Later steps are shorter.
    - A mean of later steps is kept. Each follows the chance of its own noises, the mean does not (Polyak and Juditsky
      1992): after N noises shares are off by about √(n/N).

    groups  of samples, such as classes: the noises of each are N(0, I) by themselves. seed  as of `NoisePool`
    scale/ has a faster one with more options, in dansm.scale.matching.semidiscrete. BadInput for what cannot be.
    """

    def __new__(cls, *args, **settings):
        fast = fast_matching() if cls is Semidiscrete else None
        return super().__new__(fast.semidiscrete_class(*args, **settings) if fast else cls)

    def __init__(self, data: Tensor, groups: Tensor | None = None, *, seed: int | None = None):
        check_tensor(data, "the data are")
        if not data.ndim or not len(data):
            raise BadInput(f"the data are of shape {tuple(data.shape)}: expected (n, ...) with a sample or more")
        check_finite_batch(data, "a sample of the data")
        x = at_least_float32(rows(data.detach()))
        self.shape, self.x = data.shape[1:], x - x.mean(0)  # what all have in common decides nothing
        self.seed = torch.randint(2**31, ()).item() if seed is None else check_count("seed", seed, at_least=0)
        self.generator = noise_generator(self.seed, x.device, 2**31, process_number())  # a stream that no pool has
        self.labels = torch.zeros(len(x), dtype=torch.int64) if groups is None else groups
        self.members = members_of(self.labels, len(x), 2**31, "groups, a label for each sample, are")
        self.potentials = self.x.norm(dim=1)
        for samples in self.members.values():
            self.potentials[samples] *= math.sqrt(2 * math.log(len(samples)))

    @torch.no_grad()
    def solve(self, error: float = 0.1, most: int = 1000) -> None:
        """Find the potentials, until shares are off by `error` (rms) or `most` noises are drawn for each sample."""
        for group, samples in self.members.items():
            x, n, noises, steps = self.x[samples], len(samples), 0, 8
            scale = (x.norm(dim=1) + x.norm(dim=1).mean()) / 2 / math.sqrt(2 * math.log(max(n, 2)))  # none stands still
            b = mean = self.potentials[samples]
            generator, batch = noise_generator(self.seed, x.device, 2**31 + 1, group), min(256, 4 * n)
            while noises < most * n:
                taken, total, steps = 0, 0, 2 * steps  # more than all before them
                for _ in range(steps):
                    values = torch.randn(batch, x.shape[1], generator=generator, device=x.device).to(x) @ x.T
                    taken += (values - mean).argmax(1).bincount(minlength=n)  # noises that `mean` does not know
                    share = (values - b).argmax(1).bincount(minlength=n) / batch
                    b = b + max(1 / (1 + noises / (2 * n)), 0.03) * (n * share - 1) * scale
                    total, noises = total + b, noises + batch
                found = taken / taken.sum()
                by_chance = found * (1 - found) / (taken.sum() - 1)  # the variance of what is found
                off = n * ((found - 1 / n).square() - by_chance).sum().item()  # of `mean`, squared; its deviation too:
                if off + 2 * math.sqrt(2 / n) * (max(off, 0) + n / taken.sum()) <= error**2:
                    break
                mean = total / steps
            self.potentials[samples] = mean

    @torch.no_grad()
    def draw(self, count: int, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Fresh noises (count, ...), and the numbers (count,) int64 of the samples that they take: those of these
        labels (count,), or of labels as often as the data have them."""
        z = torch.randn(count, self.x.shape[1], generator=self.generator, device=self.x.device)
        if labels is None:
            labels = self.labels[torch.randint(len(self.x), (count,), generator=self.generator, device=z.device).cpu()]
        taken = torch.empty(count, dtype=torch.int64, device=z.device)
        for group, noises in members_of(labels, count, 2**31).items():
            if group not in self.members:
                raise BadInput(f"no sample of the data has label {group}: expected labels that some have")
            samples = self.members[group]
            values = z[noises].to(self.x) @ self.x[samples].T - self.potentials[samples]
            taken[noises] = samples.to(z.device)[values.argmax(1)]
        return z.view(count, *self.shape), taken


def members_of(labels: Tensor | None, samples: int, groups: int, told: str = "the labels are") -> dict[int, Tensor]:
    """The numbers of the samples of each group that comes: (B of the group,), ascending."""
    labels = check_labels(labels, samples, groups, told).cpu()
    return {group: (labels == group).nonzero()[:, 0] for group in labels.unique().tolist()}


def pairs(batches: Iterable, method: str = "greedy", match_size: int = 10_000, *, cost: str | None = None,
          seed: int | None = None, pool: NoisePool | None = None, groups: int | None = None) -> Iterator[tuple]:
    """Pair every batch x with noises z and yield (x, z), or (x, z, labels), the same batches in the same order.

    batches     tensors x: (B, ...) of data or latents, or tuples (x, labels) with labels: (B,)
    method      "random"   a fresh noise for each sample
                "greedy"   `NoisePool`, the paper's method
                "semidiscrete"  `Semidiscrete`: as many batches, of all samples in them, each as often as noises take it
                "optimal"  linear assignment of match_size samples to as many noises, or "nearest", the nearest of
                           match_size fresh ones: to compare with. These three are in dansm.scale.matching.others
    match_size  noises in the pool, samples assigned at once, or noises drawn for each sample, by method
    cost, seed  see `cost_matrix`, `NoisePool`; None: the pool's default, "squared" for "optimal" and "nearest"
    pool        to use, as when a run resumes: "greedy" takes its match_size and cost too, others its generator alone
    groups      match within labels from 0 to groups − 1 ("random" and "nearest" need not); None: whatever the labels
    Raises BadInput for an unknown method or cost, a match_size that is no whole number, a batch of another shape.
    """
    check_choice("method", method, METHODS)
    check_choice("cost", cost, (None, "priced", *COSTS))
    match_size = check_count("match_size", match_size, at_least=method in ("optimal", "nearest"))
    groups = groups if groups is None else check_count("groups", groups)
    if method == "greedy" and pool is not None and groups not in (None, getattr(pool, "groups", None)):
        raise BadInput(f"groups is {groups}, of the pool {getattr(pool, 'groups', None)}: expected a pool of as many")
    if method in ("random", "greedy"):
        return _pairs(iter(batches), method, match_size, cost, seed, pool, groups)  # else checked when first asked
    if not (fast := fast_matching()):
        raise BadInput(f"method is {method!r}, which is in scale/: expected random or greedy where dansm.py is alone")
    return fast.pairs_to_compare(iter(batches), method, match_size, cost, seed, pool, groups)


def _pairs(batches: Iterator, method: str, match_size: int, cost: str | None, seed: int | None, pool: NoisePool | None,
           groups: int | None) -> Iterator[tuple]:
    for batch in batches:
        x, *labels = parts_of(batch)
        if pool is None:
            check_tensor(x)
            size = match_size if method == "greedy" else 0
            pool = NoisePool(size, x.shape[1:], cost=cost, device=x.device, seed=seed, groups=groups)
        if method == "greedy" or (pool.grouped and pool.match_size == 0):  # which looks at the labels
            yield x, pool(x, *labels if pool.grouped else ()), *labels
        else:
            pool.check(x)
            yield x, pool.fresh(x), *labels


# ------------ 2  Flows ------------------------------------------------------------------------------------------------

TIMES = ("uniform", "logit-normal")
TARGETS = ("noise", "velocity")


def draw_times(count: int, times: str, device=None) -> Tensor:
    """Times in [0, 1): uniform as in the paper, or the sigmoid of a standard normal, which favours the middle,
    where paths are nearest to each other (Esser et al. 2024)."""
    return torch.rand(count, device=device) if times == "uniform" else torch.randn(count, device=device).sigmoid()


def over(t: Tensor, x: Tensor) -> Tensor:
    """t: (B,) shaped to multiply x: (B, ...)."""
    return t.reshape(-1, *[1] * (x.ndim - 1))


class Flow:
    @torch.no_grad()
    def sample(self, net: nn.Module, z: Tensor, steps: int) -> Tensor:
        """x from z, both (B, ...), in `steps` steps, without gradients."""
        return deque(self.path(net, z, steps), maxlen=1).pop()  # keeps only the last state


class RectifiedFlow(Flow):
    """Straight paths x_t = t·x + (1 − t)·z, along which the network learns the velocity x − z (Liu et al. 2022).

    times   how training times are distributed: "uniform" or "logit-normal"
    solver  "euler", or "heun" (second order, two evaluations a step)
    """

    first_t = 1e-3  # the paper keeps away from t = 0, in training and in sampling

    def __init__(self, times: str = "uniform", solver: str = "euler"):
        self.times = check_choice("times", times, TIMES)
        self.solver = check_choice("solver", solver, ("euler", "heun"))

    def loss(self, net: nn.Module, x: Tensor, z: Tensor, t: Tensor | None = None) -> Tensor:
        """Mean squared error of the velocity for pairs x, z: (B, ...), a scalar; at random times, or at t: (B,) in
        [0, 1], moved to [0.001, 1]. The network is given 999·t, the range of a diffusion's levels."""
        x, z = map(check_tensor, (x, z))
        t = self._shifted(draw_times(len(x), self.times, x.device) if t is None else t)
        x_t = (over(t, x) * x + over(1 - t, x) * z).to(x.dtype)
        return F.mse_loss(net(x_t, 999 * t), x - z)

    def path(self, net: nn.Module, z: Tensor, steps: int) -> Iterator[Tensor]:
        """Yield the `steps` + 1 states from z: (B, ...) to x, each (B, ...). BadInput for fewer than 1 step."""
        steps = check_count("steps", steps)
        x, dt = z, 1 / steps
        yield x
        for i in range(steps):
            v = self._velocity(net, x, i * dt)
            if self.solver == "heun":  # the mean of the slopes at both ends of the step
                v = (v + self._velocity(net, x + v * dt, (i + 1) * dt)) / 2
            x = x + v * dt
            yield x

    def _velocity(self, net, x, t):
        return net(x, 999 * self._shifted(torch.full((len(x),), t, device=x.device)))

    def _shifted(self, t):
        return t * (1 - self.first_t) + self.first_t


class Diffusion(Flow):
    """Denoising diffusion: the network learns the noise in √ᾱ·x + √(1−ᾱ)·z (DDPM, Ho et al. 2020), and DDIM takes few
    steps back without randomness (Song et al. 2020). Of its 1,000 levels of noise level 0 is almost data, level 999
    almost noise: β rises from 1e-4 to 0.02, and ᾱ is the running product of 1 − β.

    times   as in `RectifiedFlow`
    target  what the network predicts: "noise", as in the paper, or "velocity", √ᾱ·z − √(1−ᾱ)·x (Salimans and Ho 2022;
            towards noise, unlike RectifiedFlow's), from which the noise is √(1−ᾱ)·x_t + √ᾱ·velocity: a network of
            norms hardly sees the size of x_t, and here has it for nothing. The loss is that of the noise either way
    bound   of the data, 1 for pixels, or None: while sampling, each estimate of x is cut to [−bound, bound]
    """

    levels = 1000

    def __init__(self, times: str = "uniform", target: str = "noise", bound: float | None = None):
        self.times = check_choice("times", times, TIMES)
        self.target = check_choice("target", target, TARGETS)
        self.bound = bound
        self.alpha_bar = (1 - torch.linspace(1e-4, 0.02, self.levels, dtype=torch.float64)).cumprod(0)  # ᾱ
        self.alpha_bar_on_device = self.alpha_bar  # on the device where it was used last

    def loss(self, net: nn.Module, x: Tensor, z: Tensor, t: Tensor | None = None) -> Tensor:
        """Mean squared error of the noise for pairs x, z: (B, ...), a scalar; at random levels, or at t: (B,) in
        [0, 1], where 0 is noise."""
        x, z = map(check_tensor, (x, z))
        t = draw_times(len(x), self.times, x.device) if t is None else t
        level = ((1 - t) * self.levels).long().clamp_(0, self.levels - 1)
        signal = over(self._alpha_bar_on(x.device)[level], x)
        a = (signal**0.5).to(x.dtype)
        b = ((1 - signal) ** 0.5).to(x.dtype)  # from float64: in bf16 1 − ᾱ is 0 near the data
        return F.mse_loss(self._noise(net, a * x + b * z, level.float(), a, b), z)

    def _noise(self, net, x_t, level, a, b):
        """The network's estimate of z in x_t = a·x + b·z."""
        output = net(x_t, level)
        return output if self.target == "noise" else b * x_t + a * output

    def _alpha_bar_on(self, device) -> Tensor:
        """ᾱ on the device. It stays there: copying it in each step would make a GPU wait."""
        if self.alpha_bar_on_device.device != device:
            exact = self.alpha_bar.float() if device.type == "mps" else self.alpha_bar  # Apple's GPUs have no float64
            self.alpha_bar_on_device = exact.to(device)
        return self.alpha_bar_on_device

    def path(self, net: nn.Module, z: Tensor, steps: int) -> Iterator[Tensor]:
        """Yield the `steps` + 1 states from z: (B, ...) to x, each (B, ...). As in the paper, levels start at 0 with a
        stride of 1000 / steps, so the first one used lies below pure noise: 666 with 3 steps, 900 with 10. BadInput for
        fewer than 2 steps, as 1 would use level 0 alone, or more than 1,000."""
        steps = check_count("steps", steps, at_least=2)
        if steps > self.levels:
            raise BadInput(f"steps is {steps}: expected at most {self.levels}, the levels of the diffusion")
        visited = [i * self.levels // steps for i in range(steps)]
        x = z
        yield x
        for i in reversed(range(steps)):
            a, b = self._shares(visited[i])
            noise = self._noise(net, x, torch.full((len(x),), float(visited[i]), device=x.device), a, b)
            clean = (x - b * noise) / a
            if self.bound is not None:
                clean = clean.clamp(-self.bound, self.bound)
                noise = (x - a * clean) / b  # the noise that goes with it
            a_next, b_next = self._shares(visited[i - 1]) if i else (1.0, 0.0)
            x = a_next * clean + b_next * noise
            yield x

    def _shares(self, level: int) -> tuple[float, float]:
        """How much of data and of noise there is at a level: √ᾱ and √(1−ᾱ)."""
        signal = self.alpha_bar[level].item()
        return math.sqrt(signal), math.sqrt(1 - signal)


# ------------ 3  Network ----------------------------------------------------------------------------------------------


class Norm(nn.GroupNorm):
    """Group norm, then SiLU if `silu`, then dropout: what stands before a convolution. (B, C, H, W) → the same. There
    are gcd(channels, channels // 4) groups, at most 32."""

    def __init__(self, channels: int, silu: bool = True, dropout: float = 0.0):
        super().__init__(math.gcd(channels, min(channels // 4, 32)), channels, eps=1e-6)
        self.silu, self.dropout = silu, dropout

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        """shift: (B, C), added to every pixel first."""
        if shift is not None:
            x = x + shift[:, :, None, None]
        h = super().forward(x)
        return F.dropout(F.silu(h) if self.silu else h, self.dropout, self.training)


def conv(c_in: int, c_out: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, size, stride, padding=size // 2)


class ResBlock(nn.Module):
    """Twice norm, SiLU and convolution, with the time added in between, and a skip connection around them.

    (B, c_in, H, W), time (B, c_time) → (B, c_out, H', W'). `resample` "up" or "down" doubles or halves the image on
    both branches (BigGAN); `scale` multiplies their sum.
    """

    def __init__(self, c_in: int, c_out: int, c_time: int, dropout: float, scale: float = 1.0, resample: str = ""):
        super().__init__()
        self.scale = scale
        self.norm1 = Norm(c_in)
        self.conv1 = conv(c_in, c_out, 3)
        self.time = nn.Linear(c_time, c_out)
        self.norm2 = Norm(c_out, dropout=dropout)
        self.conv2 = conv(c_out, c_out, 3)
        self.skip = conv(c_in, c_out, 1) if c_in != c_out or resample else nn.Identity()
        self.resample = {"": nn.Identity(), "up": nn.Upsample(scale_factor=2), "down": nn.AvgPool2d(2)}[resample]

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv1(self.resample(self.norm1(x)))
        h = self.conv2(self.norm2(h, shift=self.time(time)))
        return (self.skip(self.resample(x)) + h) * self.scale


class Attention(nn.Module):
    """Self-attention between all pixels, one head over all channels. (B, C, H, W) → the same."""

    def __init__(self, channels: int, scale: float = 1.0):
        super().__init__()
        self.scale = scale
        self.norm = Norm(channels, silu=False)
        self.qkv = conv(channels, 3 * channels, 1)
        self.out = conv(channels, channels, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(self.norm(x)), "b (qkv c) h w -> qkv b 1 (h w) c", qkv=3)
        h = rearrange(F.scaled_dot_product_attention(q, k, v), "b 1 (h w) c -> b c h w", h=x.shape[2])
        return (x + self.out(h)) * self.scale


class Resample(nn.Module):
    """Double ("up") or halve ("down") the image with a 3×3 convolution, as DDPM does between its resolutions."""

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
    """The paper's networks: (B, channels, height, width) and times (B,) in [0, 999] → (B, channels, height, width).

    `biggan=True` is NCSN++ (as Song et al. 2021's DDPM++): images are halved and doubled inside residual blocks, sums
    are scaled by 1/√2, and a level has one attention on the way up, not one a block. `False` is DDPM (Ho et al. 2020).

    channels      of the images, in and out
    size          height and width of the images, one number for squares; divisible by 2 for each level but the first
    width         channels at the first level, even, at least 4; times one of the multipliers at each level
    blocks        residual blocks a level
    attention_at  lengths of the longer side at which there is attention; the middle always has it
    dropout       share of the activations that a residual block drops in training, 0 to 1
    classes       of images: forward takes labels too, each a learned vector that is added to the time's
    label_dropout share of the labels that training leaves out, for guidance
    Raises BadInput for numbers that no network can have.
    """

    def __init__(self, channels: int = 3, size=32, width: int = 128, multipliers=(1, 2, 2, 2), blocks: int = 4,
                 attention_at=(16,), dropout: float = 0.15, biggan: bool = True, classes: int = 0,
                 label_dropout: float = 0.1):
        super().__init__()
        channels, blocks = map(check_count, ("channels", "blocks"), (channels, blocks))
        sides = [check_count("size", side) for side in (size if isinstance(size, list | tuple) else (size, size))]
        width = check_count("width", width, at_least=4)
        multipliers = [check_count("multipliers", multiplier) for multiplier in multipliers]
        if width % 2:
            raise BadInput(f"width is {width}: expected an even number")
        if not 0 <= dropout <= 1 or not 0 <= label_dropout <= 1:
            raise BadInput(f"dropout is {dropout}, label_dropout {label_dropout}: expected shares, 0 to 1")
        least = 2 ** max(len(multipliers) - 1, 0)
        if not multipliers or len(sides) != 2 or any(side % least for side in sides):
            raise BadInput(f"size is {size}: expected multiples of {least} for a network of {len(multipliers)} levels")
        self.settings = dict(channels=channels, size=sides[0] if sides[0] == sides[1] else sides, width=width,
                             multipliers=multipliers, blocks=blocks, attention_at=list(attention_at), dropout=dropout,
                             biggan=biggan)
        self.shape, self.width, size = (channels, *sides), width, max(sides)  # shape of one image
        c_time = 4 * width
        scale = math.sqrt(0.5) if biggan else 1.0

        def res(c_in, c_out, resample=""):
            return ResBlock(c_in, c_out, c_time, dropout, scale, resample)

        self.time = nn.Sequential(nn.Linear(width, c_time), nn.SiLU(), nn.Linear(c_time, c_time))
        self.first = conv(channels, width, 3)
        self.down = nn.ModuleList()
        self.up = nn.ModuleList()
        c, skips = width, [width]  # channels, and those of each state that the way up takes from the way down
        for level, multiplier in enumerate(multipliers):  # `size` and `c` are now those of the level
            for _ in range(blocks):
                layers = Chain([res(c, multiplier * width)])
                c = multiplier * width
                if size in attention_at:
                    layers.append(Attention(c, scale))
                self.down.append(layers)
                skips.append(c)
            if level < len(multipliers) - 1:
                self.down.append(Chain([res(c, c, "down") if biggan else Resample(c, "down")]))
                skips.append(c)
                size //= 2
        self.middle = Chain([res(c, c), Attention(c, scale), res(c, c)])
        for level, multiplier in reversed(list(enumerate(multipliers))):
            for block in range(blocks + 1):
                layers = Chain([res(c + skips.pop(), multiplier * width)])
                c = multiplier * width
                if size in attention_at and (block == blocks or not biggan):
                    layers.append(Attention(c, scale))
                self.up.append(layers)
            if level > 0:
                self.up[-1].append(res(c, c, "up") if biggan else Resample(c, "up"))
                size *= 2
        self.last = nn.Sequential(Norm(c), conv(c, channels, 3))
        self._initialise()
        self.classes, self.label_dropout = check_count("classes", classes, at_least=0), label_dropout
        if classes:
            self.label = nn.Embedding(classes + 1, c_time)  # the last one: no label
            self.settings |= dict(classes=classes, label_dropout=label_dropout)

    def _initialise(self) -> None:
        """Draw weights as DDPM does: uniform, with variance 1 / mean of fan-in and fan-out; biases are zero. The last
        layer of each block, and of the network, is zero too: a block starts as its skip path alone."""
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        last_layers = [block.conv2 for block in self.modules() if isinstance(block, ResBlock)]
        last_layers += [block.out for block in self.modules() if isinstance(block, Attention)]
        for layer in (*last_layers, self.last[1]):
            nn.init.zeros_(layer.weight)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """x: (B, channels, H, W), t: (B,) from 0 to 999, labels: (B,) up to `classes`, which is "none" → as x."""
        time = self._embedding(t, labels, x)
        h = self.first(x)
        skips = [h]
        for layer in self.down:
            h = layer(h, time)
            skips.append(h)
        h = self.middle(h, time)
        for layer in self.up:
            h = layer(torch.cat([h, skips.pop()], 1), time)
        return self.last(h)

    def _embedding(self, t: Tensor, labels: Tensor | None, x: Tensor) -> Tensor:
        """What the blocks are given of times and labels: (B, 4 · width)."""
        time = self.time(self._waves(t).to(self.first.weight.dtype))
        if self.classes:
            time = time + self.label(self._known(labels, x))
        elif labels is not None:
            raise BadInput("the network has no classes: expected UNet(classes=…), or no labels")
        return F.silu(time)

    def _known(self, labels: Tensor | None, x: Tensor) -> Tensor:
        """The labels, of which training leaves some out."""
        if labels is None and not self.training:
            return torch.full((len(x),), self.classes, device=x.device)
        if not (isinstance(labels, Tensor) and labels.is_cuda):  # to look at those on a GPU would wait for it
            labels = check_labels(labels, len(x), self.classes + 1)
        labels = labels.to(x.device).long()
        if not self.training:
            return labels
        return labels.masked_fill(torch.rand(len(x), device=x.device) < self.label_dropout, self.classes)

    def _waves(self, t: Tensor) -> Tensor:
        """Sinusoidal embedding of t: (B,) → (B, width), with wavelengths from 2π to 10,000·2π (Vaswani et al. 2017)."""
        half = self.width // 2
        frequencies = torch.exp(torch.arange(half, device=t.device) * (-math.log(10_000) / (half - 1)))
        angles = t[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], 1)


NETWORKS = {
    "ncsnpp": dict(multipliers=(1, 2, 2, 2)),  # the paper's NCSN++: 61,806,724 parameters with 4 channels
    "ddpm": dict(multipliers=(1, 2, 2, 2), blocks=2, dropout=0.1, biggan=False),  # the paper's DDPM: 35,748,612
    "small": dict(width=64, multipliers=(1, 2, 2), blocks=2, dropout=0.0),  # ours, for quick runs on a GPU
    "tiny": dict(width=32, multipliers=(1, 1, 2), blocks=1, attention_at=(), dropout=0.0, biggan=False),  # on a CPU
}


# ------------ 4  Training ---------------------------------------------------------------------------------------------


class Training:
    """The state of a run: network, moving average (to sample from), optimizer. A step is `gradients`, then `update`.

    lr     learning rate of Adam; the paper's is 2e-4 for batches of 128
    decay  of the moving average, which warms up as min(decay, (1 + n) / (10 + n)) after n steps
    clip   largest norm of the gradient
    """

    def __init__(self, net: nn.Module, lr: float = 2e-4, decay: float = 0.9999, clip: float = 1.0):
        self.net, self.decay, self.clip = net, decay, clip
        self.average = copy.deepcopy(net).eval().requires_grad_(False)
        self.optimizer = torch.optim.Adam(net.parameters(), lr=lr, fused=next(net.parameters()).is_cuda)
        self.step = 0

    def gradients(self, flow, x: Tensor, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Compute the gradients for pairs x, z: (B, ...) of these labels (B,), and return the loss, on the device."""
        self.optimizer.zero_grad()
        net = self.net if labels is None else partial(self.net, labels=labels)
        loss = flow.loss(net, x, z)
        loss.backward()
        return loss.detach()

    def update(self) -> None:
        """Take a step of Adam, and move the average after it."""
        nn.utils.clip_grad_norm_(self.net.parameters(), self.clip)
        self.optimizer.step()
        self.step += 1
        update_ema(self.average, self.net, self.decay, self.step)


@torch.no_grad()
def update_ema(average: nn.Module, net: nn.Module, decay: float, step: int) -> None:
    """Move an average towards the network, by more after few steps, so that it forgets the initial weights."""
    share = 1 - min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), list(net.parameters()), share)


def train(run: Training, flow, pairs: Iterable[tuple[Tensor, ...]]) -> Iterator[Tensor]:
    """The training loop: a step for each (x, z) or (x, z, labels), yielding its loss. The caller logs, saves, stops."""
    run.net.train()
    for x, z, *labels in pairs:
        loss = run.gradients(flow, x, z, *labels)
        run.update()
        yield loss


# ------------ 5  Checks -----------------------------------------------------------------------------------------------


def check_tensor(x, told: str = "the batch is") -> Tensor:
    """x. BadInput for anything but a tensor of floating point numbers, `told` as what it is."""
    if not isinstance(x, Tensor):
        raise BadInput(f"{told} a {type(x).__name__}: expected a tensor of the samples alone")
    if not x.is_floating_point() or x.element_size() < 2:  # float8
        raise BadInput(f"{told} of {x.dtype}: expected floating point data, images in [−1, 1] for instance")
    return x


def parts_of(batch) -> tuple:
    """(x,) or (x, labels) of what a data loader gives. BadInput for more parts, or none."""
    parts = tuple(batch) if isinstance(batch, tuple | list) else (batch,)
    if not 1 <= len(parts) <= 2:
        raise BadInput(f"the batch has {len(parts)} parts: expected the samples, or (samples, labels)")
    return parts


def check_batch(x, shape: torch.Size) -> None:
    """BadInput for a batch that is not (B, *shape)."""
    check_tensor(x)
    if x.shape[1:] != shape or x.ndim == 0:
        raise BadInput(f"the pool holds noises of shape {tuple(shape)}, the batch is {tuple(x.shape)}: expected "
                       f"({', '.join(['B', *map(str, shape)])})")


def check_labels(labels, samples: int, groups: int, told: str = "the labels are") -> Tensor:
    """The labels as int64. BadInput for anything but a whole number from 0 to groups − 1 for each sample."""
    given = "missing" if labels is None else f"of type {type(labels).__name__}"
    if isinstance(labels, Tensor):
        given = f"{labels.dtype} of shape {tuple(labels.shape)}"
        if not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool):
            labels = labels.long()
            if labels.shape == (samples,) and (labels < groups).all() and (labels >= 0).all():
                return labels
            given += f", from {labels.min().item()} to {labels.max().item()}" if labels.numel() else ""
    raise BadInput(f"{told} {given}: expected a tensor ({samples},) of whole numbers from 0 to {groups - 1}")


NO_DISTANCE = "holds NaN, infinite or huge values: expected finite data, in size below 1e15"


def has_distances(x: Tensor) -> Tensor:
    """Whether all of x is in size below 1e15, so that ‖x‖² fits float32, as a bool tensor. NaN is not."""
    return torch.linalg.vector_norm(x.detach(), math.inf) < 1e15


def check_finite_batch(x: Tensor, told: str | None = None) -> None:
    """BadInput for a batch with NaN, infinity or values from 1e15 on in size."""
    if x.numel() and not has_distances(x):
        raise BadInput(f"{told or f'the batch of shape {tuple(x.shape)}'} {NO_DISTANCE}")


def check_state(state, made_for: dict) -> None:
    """BadInput for anything but the state of a pool that was made for the same."""
    if not isinstance(state, dict) or not {"made_for", "seed", "number", "index", "generator"} <= state.keys():
        raise BadInput(f"the state is a {type(state).__name__}: expected what NoisePool.state_dict() returned")
    if state["made_for"] != made_for:
        raise BadInput(f"the saved pool is {state['made_for']}, this one {made_for}: expected the same")


def check_sides(cost: Tensor) -> None:
    """BadInput for costs that are not real numbers (B, M) with at least as many noises as samples."""
    if not isinstance(cost, Tensor) or cost.is_complex() or (cost.is_floating_point() and cost.element_size() < 2):
        raise BadInput(f"cost is {cost.dtype if isinstance(cost, Tensor) else type(cost)}: expected a float32 tensor")
    if cost.ndim != 2 or len(cost) > cost.shape[1]:
        raise BadInput(f"the costs are {tuple(cost.shape)}: expected (samples, noises), samples ≤ noises")


def check_shape(shape) -> torch.Size:
    """The shape as a torch.Size. BadInput for anything but whole numbers from 1 on, or one of them."""
    try:
        return torch.Size([check_count("shape", size) for size in ((shape,) if isinstance(shape, int) else shape)])
    except (TypeError, BadInput) as error:
        raise BadInput(f"shape is {shape}: expected whole numbers from 1 on, as in (3, 32, 32)") from error


def check_count(name: str, value, at_least: int = 1) -> int:
    """The value as an int. BadInput if it is not a whole number from `at_least` on."""
    try:
        whole = not isinstance(value, bool | np.bool_) and int(value) == value and value >= at_least
    except (TypeError, ValueError, OverflowError):
        whole = False
    if not whole:
        given = repr(value) if isinstance(value, str) else value
        raise BadInput(f"{name} is {given}: expected a whole number of at least {at_least}")
    return int(value)


def check_choice(name: str, value, choices):
    """The value. BadInput if it is none of `choices`."""
    if value not in choices:
        raise BadInput(f"{name} is {value!r}: expected one of {', '.join(map(str, choices))}")
    return value


# ------------ 6  Commands ---------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> None:
    """Run a command of scale/commands, by the command line unless `arguments` are given. `dansm --help` lists them."""
    commands = scaled("commands.main")
    if commands is None:
        print("dansm: this file stands alone, its commands are in scale/: expected an install", file=sys.stderr)
        sys.exit(2)
    commands.run(arguments)


if __name__ == "__main__":
    from dansm import main as main_of_module  # the module by its name, so that scale/ and tiny/ share it

    main_of_module()
