"""What matching a batch costs: ours over a pool's whole life, other libraries, and the machine's own limits."""

import statistics
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial

import torch
import torch.distributed as group
from torch import Tensor

import dansm

from ..base.machine import free_memory
from ..base.statistics import squared_distances
from ..matching import gpu
from ..matching.others import Assignment, nearest_of_k, optimal
from ..matching.pool import FastPool
from ..matching.products import products
from . import clock
from .clock import image_like, milliseconds, spread, timed

LOOP = "paper's loop"
GROUPS = 10


def parts_of(x: Tensor, match_sizes: list[int], seed: int, rates: dict) -> Iterator[tuple[str, Iterator[dict]]]:
    last = {}  # way → match_size, and milliseconds that a call took there
    for match_size in sorted(match_sizes):
        for name, way in ways(x, match_size, seed).items():
            yield f"{name} at {match_size:,}", row_of(name, way, x, match_size, last, rates)


def row_of(name: str, way: tuple, x: Tensor, match_size: int, last: dict, rates: dict) -> Iterator[dict]:
    """The row of one way; none where memory does not suffice, or one call would take longer than PATIENCE."""
    needed, power, measure = way
    size, ms = last.get(name, (match_size, 0.0))
    if 1.1 * needed > free_memory(x.device) or ms * (match_size / size) ** power > 1000 * clock.PATIENCE:
        return
    row = {"match_size": match_size, "way": name, **measure()}
    last[name] = match_size, row.get("whole_ms", row["median_ms"])
    if "full_ms" in row:
        row["floor_ms"] = round(floor_ms(rates, row, len(x), x[0].numel()), 4)
        loop_size, loop_ms = last.get(LOOP, (0, 0.0))
        if loop_size == match_size:
            row["times_faster"] = round(loop_ms / row["full_ms"], 1)
    yield row


def ways(x: Tensor, match_size: int, seed: int) -> dict[str, tuple[int, float, Callable[[], dict]]]:
    """name → the bytes that a way needs, the power of match_size with which its time grows, and what measures it."""
    pool = 4 * match_size * x[0].numel()
    life = partial(life_of_a_pool, x, match_size, seed)

    def on_full_pool(repeats: int, work: Callable[[Tensor, Tensor], Tensor]) -> dict:
        return spread(timed(x.device, repeats, work, x, torch.randn(match_size, *x.shape[1:], device=x.device)))

    found = {LOOP: (2 * pool, 1, lambda: on_full_pool(3, paper_loop))}
    for cost in FastPool.costs:
        found[f"ours, {cost}"] = pool, 1.5, partial(life, cost=cost)
    found[f"ours, {GROUPS} groups"] = pool, 1.5, partial(life_of_groups, x, match_size, seed)
    if x.device.type == "cuda":
        found["ours, tf32"] = pool, 1.5, partial(life, cost="squared", tf32=True)
        found["ours, bf16"] = pool // 2, 1.5, partial(life, cost="squared", dtype=torch.bfloat16)
    found["bare product"] = 2 * pool, 1, lambda: on_full_pool(15, lambda x, z: products(x.flatten(1), z.flatten(1)))
    found["nearest of k"] = 3 * pool, 1, lambda: spread(timed(x.device, 5, nearest_of_k, x, match_size))
    for name, solve in assignments(x.device).items():
        found[name] = 14 * match_size**2, 3, partial(assignment, x, match_size, solve, seed)
    return found


def paper_loop(x: Tensor, noise: Tensor) -> Tensor:
    """The paper's matching, one sample after the other. x: (B, ...), noise: (M, ...) → picks (min(B, M),). It is as
    quick as such a loop gets: one buffer for all differences makes it three times quicker on a CPU."""
    taken = torch.zeros(len(noise), device=x.device, dtype=x.dtype)
    difference = torch.empty_like(noise)
    picks = []
    for sample in x[: len(noise)]:
        distances = torch.sub(noise, sample, out=difference).square_().flatten(1).mean(1)
        picks.append((distances + taken).argmin())
        taken[picks[-1]] = torch.inf
    return torch.stack(picks)


def life_of_a_pool(x: Tensor, match_size: int, seed: int, **settings) -> dict:
    """Time every batch of a pool's whole life, after one life that is not counted. full_ms: of a full pool's first."""
    device = x.device
    clock.reset_peak(device)
    pool = dansm.NoisePool(match_size, x.shape[1:], device=device, seed=seed, **settings)
    pool(x)
    full = []
    for _ in range(15 if pool.noise.nbytes < 1e9 else 5):
        pool._begin()  # full again, with the noises that it has, whatever moved
        full.append(milliseconds(device, pool, x))
    batches = max(5, -(-match_size // len(x)))
    samples = [image_like(len(x), x.shape[1:], seed + number, device) for number in range(min(batches, 16))]
    for _ in range(batches if device.type == "cuda" else 0):  # there the first calls compile and load kernels
        pool(x)
    while pool.left:
        pool(x[: pool.left])
    times = [milliseconds(device, pool, samples[number % len(samples)]) for number in range(batches)]
    often = sorted(times)[int(0.99 * (len(times) - 1))]  # the most holds the machine's own hiccups too
    return {**spread(times), "p99_ms": round(often, 4), "full_ms": round(statistics.median(full), 3),
            "whole_ms": round(sum(times), 3), "dtype": str(pool.noise.dtype)[6:], "tf32": pool.tf32,
            "pool_mb": round(pool.noise.nbytes / 1e6, 1), "peak_mb": clock.peak_mb(device)}


def life_of_groups(x: Tensor, match_size: int, seed: int) -> dict:
    """Time batches of all groups, whose pools hold match_size noises together, after a life that is not counted."""
    pool = dansm.NoisePool(max(2, match_size // GROUPS), x.shape[1:], cost="squared", device=x.device, seed=seed,
                           groups=GROUPS)
    batches = max(5, -(-match_size // len(x)))
    samples = [image_like(len(x), x.shape[1:], seed + number, x.device) for number in range(min(batches, 16))]
    labels = torch.randint(GROUPS, (len(x),), generator=torch.Generator().manual_seed(seed))
    times = [milliseconds(x.device, pool, samples[number % len(samples)], labels) for number in range(2 * batches)]
    pool_mb = sum(group.noise.nbytes for group in pool.pools.values()) / 1e6
    return {**spread(times[batches:]), "whole_ms": round(sum(times[batches:]), 3), "pool_mb": round(pool_mb, 1)}


def assignments(device: torch.device) -> dict[str, Callable[[Tensor], object]]:
    """Solvers of linear assignment by name, cost matrix → anything; those of other libraries where installed."""
    from scipy.optimize import linear_sum_assignment

    solvers = {"scipy, assignment": lambda cost: linear_sum_assignment(cost.cpu().numpy())}
    if device.type == "cpu" or gpu.working("auction", device):
        solvers["ours, assignment"] = optimal
    with suppress(ImportError):
        import ot

        solvers["POT emd"] = lambda cost: ot.emd([], [], cost.double().cpu().numpy(), numItermax=10**8)
    with suppress(ImportError):
        from torch_linear_assignment import batch_linear_assignment

        if device.type == "cuda":
            solvers["torch-linear-assignment"] = lambda cost: batch_linear_assignment(cost[None])
    return solvers


def assignment(x: Tensor, match_size: int, solve: Callable[[Tensor], object], seed: int) -> dict:
    """Assign match_size noises to as many samples, with the costs known already. A batch counts with its share. saved:
    of a random pairing's cost, the share that the assignment saves; gap: the share of that which is not proven."""
    samples = image_like(match_size, x.shape[1:], seed, x.device)
    noise = torch.randn(samples.shape, device=x.device, generator=torch.Generator(x.device).manual_seed(seed))
    cost = squared_distances(samples, noise)
    del samples, noise
    answers = deque(maxlen=1)
    times = timed(x.device, 5, lambda: answers.append(solve(cost)))
    row = {**spread([len(x) / match_size * whole for whole in times]), "whole_ms": round(statistics.median(times), 3)}
    answer, random = answers[0], cost.mean(dtype=torch.float64).item() * match_size
    if isinstance(answer, Assignment):
        row["gap"] = float(f"{(answer.total - answer.bound) / (random - answer.total):.2e}")
        answer = torch.arange(match_size), answer.picks.cpu()
    if isinstance(answer, tuple):  # rows and columns
        row["saved"] = round(1 - cost.double().cpu().numpy()[answer].sum() / random, 7)
    return row


def rates(device: torch.device) -> dict[str, float]:
    """Measured: bytes a second in a copy, read and written, and operations a second in a matrix product."""
    gpu = device.type == "cuda"
    source = torch.empty(2**30 if gpu else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    measured = {"bytes_per_second": 2 * source.numel() / statistics.median(timed(device, 5, target.copy_, source))}
    size = 8192 if gpu else 2048
    for name in ("float32", "tf32", "bfloat16") if gpu else ("float32",):
        a = torch.randn(size, size, device=device).to(getattr(torch, name.replace("tf32", "float32")))
        times = timed(device, 5, products, a, a, name == "tf32")
        measured[f"{name}_operations_per_second"] = 2 * size**3 / statistics.median(times)
    return {name: float(f"{1000 * number:.3g}") for name, number in measured.items()}


def floor_ms(rates: dict, row: dict, batch: int, numbers: int) -> float:
    """The least time of the median batch of a pool's life: half of its noises are read once and multiplied."""
    left = row["match_size"] / 2 * numbers
    reading = left * getattr(torch, row["dtype"]).itemsize / rates["bytes_per_second"]
    operations = rates[f"{'tf32' if row['tf32'] else row['dtype']}_operations_per_second"]
    return 1000 * max(reading, 2 * batch * left / operations)


def spread_life(x: Tensor, match_size: int, seed: int) -> Iterator[dict]:
    """The row of the life of a pool over all ranks, after one that is not counted: times, and megabytes received."""
    pool = dansm.NoisePool(match_size, x.shape[1:], cost="squared", device=x.device, seed=seed, match_scope="global")
    batches = -(-match_size // (len(x) * pool.ranks))
    times, received = [], []
    for _ in range(2 * batches):
        before = pool.received
        group.barrier()
        times.append(milliseconds(x.device, pool, x))
        received.append((pool.received - before) / 1e6)
    yield {"match_size": match_size, "ranks": pool.ranks, "batch_a_rank": len(x), **spread(times[batches:]),
           "received_mb_median": round(statistics.median(received[batches:]), 3)}
