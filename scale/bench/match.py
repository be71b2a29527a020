"""What matching costs, in one run on one machine: ours, what others do, and what stands between us and the machine.

Every way is timed for one batch against a pool of match_size noises. Ours is timed over a pool's whole life, from one
refill to the next, its draw and its nearly empty end included; linear assignment, which matches match_size samples at
once, counts with the share of one batch.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import os
import resource
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as group
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import dansm

from ..base.files import write_csv, write_json
from ..base.machine import free_memory, hardware
from ..base.processes import processes
from ..base.statistics import squared_distances
from ..base.text import say_files
from ..matching import gpu
from ..matching.products import products

PATIENCE = 20.0  # seconds: a way that would take longer for one call is left out from there on
LOOP, PRODUCT = "paper's loop", "bare product"


def bench_match(match_sizes: list[int], batch: int, shape, *, seed: int, device: torch.device, out: Path,
                console: Console) -> list[dict]:
    """Time one batch for each way and match_size; prints a table, writes match.json, match.csv and match.png."""
    for match_size in match_sizes:  # what does not fit is said before anything is measured
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        dansm.NoisePool(match_size, shape, device=device, dtype=dtype)
    x = image_like(batch, shape, seed, device)
    bench = {"batch": batch, "shape": list(shape), "hardware": hardware(device), "rates": rates(device),
             "train_step": train_step(batch, shape, device), "rows": []}
    gone = {}  # by way: the match_size and the seconds of its last call
    for match_size in track(sorted(match_sizes), "measuring", console=console):
        for way, power, measure in ways(x, match_size, seed):
            size, seconds = gone.get(way, (match_size, 0.0))
            if seconds * (match_size / size) ** power > PATIENCE:
                continue
            row = {"match_size": match_size, "way": way, **measure()}
            gone[way] = match_size, row.pop("seconds", row["median_ms"] / 1000)
            bench["rows"].append(row)
            write_json(out / "match.json", bench)
        compare(bench, match_size)
    write_json(out / "match.json", bench)
    write_csv(out / "match.csv", bench["rows"])
    print_table(bench, console)
    draw(bench, out / "match.png")
    say_files(out, "match.png", "match.csv", "match.json")
    return bench["rows"]


def bench_spread(match_sizes: list[int], batch: int, shape, *, seed: int, device: torch.device, out: Path,
                 console: Console) -> list[dict]:
    """Under torchrun: one pool spread over all ranks, `batch` samples on each, against one process with the joined
    batch. Rank 0 prints and writes spread.json."""
    if "RANK" not in os.environ:
        raise dansm.BadInput("bench is spread: expected several processes, as in torchrun --nproc-per-node 2 dansm.py "
                             "bench spread")
    with processes(device) as device:
        return _bench_spread(match_sizes, batch, shape, seed, device, out, console)


def _bench_spread(match_sizes, batch, shape, seed, device, out, console):
    rows = []
    for match_size in match_sizes:
        settings = dict(match_size=match_size, shape=shape, device=device, seed=seed)
        rows.append({"match_size": match_size, "ranks": group.get_world_size(), "batch_a_rank": batch,
                     **spread_life(batch, **settings), **unlike_one_process(batch, **settings)})
        if group.get_rank() == 0:
            console.print(rows[-1])
            write_json(out / "spread.json", {"shape": list(shape), "hardware": hardware(device),
                                                   "rows": rows})
    if group.get_rank() == 0:
        say_files(out, "spread.json")
    return rows


def spread_life(batch: int, **settings) -> dict:
    """A spread pool's life, after one that is not counted: times of a batch and megabytes that one rank receives."""
    pool = dansm.NoisePool(match_scope="global", **settings)
    x = torch.randn(batch, *pool.shape, device=pool.noise.device)
    times, received = [], []
    for _ in range(2 * -(-pool.match_size // (batch * pool.ranks))):
        before = pool.received
        group.barrier()
        times.append(milliseconds(lambda: pool(x), x.device))
        received.append((pool.received - before) / 1e6)
    half = len(times) // 2
    return {**spread(times[half:]), "received_mb_median": round(statistics.median(received[half:]), 3)}


def unlike_one_process(batch: int, **settings) -> dict:
    """How many samples of one pool get another noise than in one process that has the joined batch."""
    pool, alone = dansm.NoisePool(match_scope="global", **settings), dansm.NoisePool(**settings)
    alone.stream = ()  # it stands for one process, with the noises that one process has
    generator = torch.Generator(alone.noise.device).manual_seed(0)
    other, batches = 0, -(-pool.match_size // (batch * pool.ranks))
    for _ in range(batches):
        x = torch.randn(pool.ranks, batch, *pool.shape, device=alone.noise.device, generator=generator)
        z = pool(x[pool.rank])
        other += (z != alone(x.flatten(0, 1)).unflatten(0, (pool.ranks, batch))[pool.rank]).flatten(1).any(1).sum()
    group.all_reduce(other)
    return {"samples_compared": batches * batch * pool.ranks, "other_than_one_process": other.item()}


# ---------------------------------------------------------------------------------------------------
# The ways
# ---------------------------------------------------------------------------------------------------


def ways(x: Tensor, match_size: int, seed: int) -> Iterator[tuple[str, float, Callable[[], dict]]]:
    """(name, the power of match_size by which it grows, what measures it) for what this machine has."""
    device, gpu = x.device, x.device.type == "cuda"

    def fits(numbers, dtype=torch.float32):
        return 1.1 * numbers * dtype.itemsize < free_memory(device)

    whole = match_size * x[0].numel()
    if fits(whole):
        for cost in dansm.COSTS:
            yield f"ours, {cost}", 1.5, lambda cost=cost: exact_life(x, match_size, seed, cost)
    if gpu and fits(whole):
        yield "ours, tf32", 1.5, lambda: fast_life(x, match_size, seed, tf32=True)
    if gpu and fits(whole, torch.bfloat16):
        yield "ours, bf16", 1.5, lambda: fast_life(x, match_size, seed, dtype=torch.bfloat16)
    if fits(2 * whole):
        yield PRODUCT, 1, lambda: timed_on_noise(x, match_size, lambda x, noise: products(x.flatten(1), noise.flatten(1)), 15)
        yield LOOP, 1, lambda: timed_on_noise(x, match_size, lambda x, noise: paper_loop(x[: len(noise)], noise), 3)
    if fits(3 * whole):
        yield "nearest of k", 1, lambda: timed(lambda: dansm.nearest_of_k(x, match_size), device, 5)
    if fits(3 * match_size**2):
        for name, solve in assignments(device).items():
            yield name, 3, lambda solve=solve: assignment(x, match_size, solve, seed)


def image_like(count: int, shape, seed: int, device) -> Tensor:
    """Samples in [−1, 1] that are smooth and of unequal contrast and brightness, as photographs are: they like the same
    noises, which is harder to match than random numbers."""
    generator = torch.Generator().manual_seed(seed)
    if len(shape) != 3:
        return 0.5 * torch.randn(count, *shape, generator=generator).to(device)
    coarse = torch.randn(count, shape[0], 4, 4, generator=generator)
    contrast = torch.rand(count, 1, 1, 1, generator=generator)
    brightness = 0.4 * torch.randn(count, 1, 1, 1, generator=generator)
    samples = torch.empty(count, *shape, device=device)
    for some in torch.arange(count).split(256):
        smooth = (contrast[some] * coarse[some] + brightness[some]).to(device)
        samples[some] = torch.nn.functional.interpolate(smooth, size=tuple(shape[1:]), mode="bilinear")
    return samples.clamp_(-1, 1)


def paper_loop(x: Tensor, noises: Tensor, cost: str = "squared") -> Tensor:
    """The matching as the paper's code does it: one sample after the other against the whole pool.

    x: (B, ...), noises: (M, ...), B ≤ M → picks (B,). The paper's cost is "squared". As quick as such a loop gets: the
    differences go to one buffer again and again (on a CPU that alone makes it about three times quicker), and what is
    taken is only marked.
    """
    taken = torch.zeros(len(noises), device=x.device, dtype=x.dtype)
    difference = torch.empty_like(noises)
    picks = []
    for sample in x:
        if cost == "squared":
            distances = torch.sub(noises, sample, out=difference).square_().flatten(1).mean(1)
        else:
            distances = -torch.mul(noises, sample, out=difference).flatten(1).sum(1)
        picks.append((distances + taken).argmin())
        taken[picks[-1]] = torch.inf
    return torch.stack(picks)


def timed_on_noise(x: Tensor, match_size: int, work, repeats: int) -> dict:
    """`work` on a full pool."""
    noise = torch.randn(match_size, *x.shape[1:], device=x.device)
    return timed(lambda: work(x, noise), x.device, repeats)


def life_of_a_pool(x: Tensor, match_size: int, seed: int, **settings) -> dict:
    """Every batch of a pool's whole life, from one refill to the next, after one life that is not counted; the first
    batch of a full pool by itself, several times; and the most memory used beyond the noises."""
    device = x.device
    reset_peak(device)
    before = peak_mb(device)
    pool = dansm.NoisePool(match_size, x.shape[1:], device=device, seed=seed, **settings)
    pool(x)
    full = []
    for _ in range(15 if pool.noise.nbytes < 1e9 else 5):
        pool._begin()  # full again, with the noises that it has, whatever moved
        full.append(milliseconds(lambda: pool(x), device))
    batches = max(5, -(-match_size // len(x)))
    several = [image_like(len(x), x.shape[1:], seed + number, device) for number in range(min(batches, 16))]
    for _ in range(batches if device.type == "cuda" else 0):  # there the first calls compile and load kernels
        pool(x)
    while pool.left:
        pool(x[: pool.left])
    start = time.perf_counter()
    times = [milliseconds(lambda n=n: pool(several[n % len(several)]), device) for n in range(batches)]
    seconds = time.perf_counter() - start
    beyond = max(0.0, peak_mb(device) - before - pool.noise.nbytes / 1e6)  # memory used before may serve again
    often = sorted(times)[int(0.99 * (len(times) - 1))]  # the most holds the machine's own hiccups too
    return {**spread(times), "p99_ms": round(often, 4), "full_ms": round(statistics.median(full), 3),
            "dtype": str(pool.noise.dtype)[6:], "tf32": pool.tf32, "pool_mb": round(pool.noise.nbytes / 1e6, 1),
            "beyond_mb": round(beyond, 1), "seconds": seconds}


def exact_life(x: Tensor, match_size: int, seed: int, cost: str) -> dict:
    row = life_of_a_pool(x, match_size, seed, cost=cost)
    if x.device.type == "cuda" and match_size <= 10_000:  # elsewhere the loop is slow, and the tests compare
        row |= unlike_float64(x, match_size, seed, cost)
    return row


def fast_life(x: Tensor, match_size: int, seed: int, **settings) -> dict:
    """A pool's life, and what the quicker product changes: how many samples get another noise than from an exact pool
    of the same draw, and by how much the mean path of that whole pool grows."""
    row = life_of_a_pool(x, match_size, seed, **settings)
    if 8 * match_size * x[0].numel() < free_memory(x.device) and match_size <= 100_000:
        exact = dansm.NoisePool(match_size, x.shape[1:], device=x.device, seed=seed)
        quick = dansm.NoisePool(match_size, x.shape[1:], device=x.device, seed=seed, **settings)
        lengths, other = torch.zeros(2, dtype=torch.float64), 0
        for start in range(0, match_size, len(x)):
            samples = image_like(len(x), x.shape[1:], seed + start, x.device)[: match_size - start]
            z = exact(samples), quick(samples)
            lengths += torch.tensor([dansm.path_length(samples, z_) * len(samples) for z_ in z])
            other += ((z[0] - z[1]).flatten(1).norm(dim=1) > 0.1 * z[0].flatten(1).norm(dim=1)).sum().item()
        row |= {"path_growth": float(f"{lengths[1] / lengths[0] - 1:.2e}"), "other_noise": round(other / match_size, 4)}
    return row


def unlike_float64(x: Tensor, match_size: int, seed: int, cost: str) -> dict:
    """The share of samples that get another noise than from the paper's loop in float64, over eight batches."""
    pool = dansm.NoisePool(match_size, x.shape[1:], device=x.device, seed=seed, cost=cost)
    pool._refill()
    noise, other, samples = pool.noise[:match_size].double(), 0, 0
    for number in range(min(8, match_size // len(x))):
        batch = image_like(len(x), x.shape[1:], seed + number, x.device)
        picks = paper_loop(batch.flatten(1).double(), noise, cost)
        other += (pool(batch).flatten(1) != noise[picks].float()).any(1).sum().item()
        samples += len(batch)
        kept = torch.ones(len(noise), dtype=torch.bool, device=x.device)
        kept[picks] = False
        noise = noise[kept]
    return {"other_than_float64": other, "compared_with_float64": samples}


def assignments(device) -> dict:
    """Solvers of linear assignment, cost matrix → anything, by name; those of others where they are installed."""
    from scipy.optimize import linear_sum_assignment

    solvers = {"scipy, assignment": lambda cost: linear_sum_assignment(cost.cpu().numpy())}
    if gpu.working("auction", device):
        solvers["ours, assignment"] = dansm.optimal
    if pot := _installed("ot"):
        import numpy as np

        solvers["POT emd"] = lambda cost: pot.emd(np.empty(0), np.empty(0), cost.double().cpu().numpy(),
                                                  numItermax=10**8)
    if (theirs := _installed("torch_linear_assignment")) and device.type == "cuda":
        solvers["torch-linear-assignment"] = lambda cost: theirs.batch_linear_assignment(cost[None])
    return solvers


def assignment(x: Tensor, match_size: int, solve, seed: int) -> dict:
    """match_size samples to as many noises, the costs known already; the time of a batch is its share of the whole."""
    samples = image_like(match_size, x.shape[1:], seed, x.device)
    noise = torch.randn(samples.shape, device=x.device, generator=torch.Generator(x.device).manual_seed(seed))
    cost = squared_distances(samples, noise)
    del samples, noise
    answer = solve(cost)
    times = [milliseconds(lambda: solve(cost), x.device)]
    times += [milliseconds(lambda: solve(cost), x.device) for _ in range(4 if times[0] < 1000 else 0)]
    share = len(x) / match_size
    row = {**spread([share * t for t in times]), "whole_ms": round(statistics.median(times), 3),
           "seconds": min(times) / 1000}
    if isinstance(answer, tuple):  # of a random pairing's cost, the share that the assignment saves, and is proven to
        random = cost.mean(dtype=torch.float64).item() * match_size
        ours = isinstance(answer, dansm.Assignment)
        total = answer.total if ours else cost.double().cpu().numpy()[answer].sum()
        row["saved"] = round(1 - total / random, 7)
        row |= {"gap": float(f"{(total - answer.bound) / (random - total):.2e}")} if ours else {}
    return row


def _installed(module):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(module)
    except Exception:  # not there, or not built for this machine
        return None


# ---------------------------------------------------------------------------------------------------
# What the machine can do
# ---------------------------------------------------------------------------------------------------


def rates(device: torch.device) -> dict:
    """Measured: bytes a second in a copy, read and written, and operations a second in a matrix product."""
    gpu = device.type == "cuda"
    source = torch.empty(2**30 if gpu else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = timed(lambda: target.copy_(source), device, 5)["median_ms"] / 1000
    found = {"bytes_per_second": 2 * source.numel() / seconds}
    size = 8192 if gpu else 2048
    for name, dtype, fast in ("float32", torch.float32, False), ("tf32", torch.float32, True), (
            "bfloat16", torch.bfloat16, False):
        if name == "float32" or gpu:
            a = torch.randn(size, size, device=device).to(dtype)
            seconds = timed(lambda a=a, fast=fast: products(a, a, fast), device, 5)["median_ms"] / 1000
            found[f"{name}_operations_per_second"] = 2 * size**3 / seconds
    return {name: float(f"{rate:.3g}") for name, rate in found.items()}


def floor_ms(rates: dict, row: dict, batch: int, numbers: int) -> float:
    """Less than this the median batch of a pool's life cannot take: half of the noises are left, each has to be read
    once, and multiplied with each sample."""
    left, dtype = row["match_size"] / 2, row["dtype"]
    name = "tf32" if row["tf32"] else dtype
    operations = rates.get(f"{name}_operations_per_second", rates["float32_operations_per_second"])
    reading = left * numbers * getattr(torch, dtype).itemsize / rates["bytes_per_second"]
    return 1000 * max(reading, 2 * batch * left * numbers / operations)


def train_step(batch: int, shape, device: torch.device) -> dict | None:
    """Milliseconds of one step of the plain loop with the paper's NCSN++, which matching must not be seen beside."""
    if len(shape) != 3 or shape[1] != shape[2] or shape[1] % 8:
        return None
    samples = batch if device.type == "cuda" else 1  # on a CPU the step of one sample, times the batch
    flow, run = dansm.RectifiedFlow(), dansm.Training(dansm.UNet(shape[0], shape[1]).to(device))
    x, z = torch.randn(2, samples, *shape, device=device)
    steps = dansm.train(run, flow, iter(lambda: (x, z), None))
    try:
        spread = timed(lambda: next(steps), device, 5 if device.type == "cuda" else 2)
    except torch.OutOfMemoryError:
        return None
    return {**{name: round(value * batch / samples, 3) for name, value in spread.items() if name.endswith("_ms")},
            "samples_measured": samples, "network": "ncsnpp", "precision": "float32"}


# ---------------------------------------------------------------------------------------------------
# The clock
# ---------------------------------------------------------------------------------------------------


def timed(work, device: torch.device, repeats: int) -> dict:
    """Milliseconds of `work` over `repeats` calls, or fewer if they take long, after one that is not counted."""
    first = milliseconds(work, device) / 1000
    repeats = max(1, min(repeats, int(PATIENCE / max(first, 1e-9))))
    return spread([milliseconds(work, device) for _ in range(repeats)])


def milliseconds(work, device):
    wait(device)
    start = time.perf_counter()
    work()
    wait(device)
    return 1000 * (time.perf_counter() - start)


def spread(times):
    return {"median_ms": round(statistics.median(times), 4), "mean_ms": round(statistics.fmean(times), 4),
            "least_ms": round(min(times), 4), "most_ms": round(max(times), 4), "calls": len(times)}


def wait(device):
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()


def reset_peak(device):
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    elif Path("/proc/self/clear_refs").exists():  # Linux
        gc.collect()
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc: give back what is free, lest it serve again
        if trim:
            trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak of this process


def peak_mb(device):
    """Most memory since the reset; elsewhere than on Linux since the process began, which can only overstate it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 1e3
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


# ---------------------------------------------------------------------------------------------------
# What is shown
# ---------------------------------------------------------------------------------------------------


def compare(bench: dict, match_size: int) -> None:
    """Beside ours: how many times quicker than the paper's loop, both on a full pool, and how far from the floor."""
    rows = {row["way"]: row for row in bench["rows"] if row["match_size"] == match_size}
    numbers = torch.Size(bench["shape"]).numel()
    for row in rows.values():
        if "full_ms" in row:
            row["floor_ms"] = round(floor_ms(bench["rates"], row, bench["batch"], numbers), 4)
            if LOOP in rows:
                row["times_faster_than_the_paper"] = round(rows[LOOP]["median_ms"] / row["full_ms"], 1)


def _title(bench):
    return f"Matching a batch of {bench['batch']} samples of {'×'.join(map(str, bench['shape']))}"


def hardware_of(bench):
    known = bench["hardware"]
    return known["gpu"] or f"{known['cpu']}, {known['threads']} threads"


def print_table(bench: dict, console: Console) -> None:
    step = bench["train_step"]
    words = ("ours: over the pool's whole life, draw included.  faster: than the paper's loop, both on a full pool "
             "(full_ms of match.csv).  nearest of k: k is match_size.  floor: reading or multiplying half a pool, "
             "whichever takes longer.")
    words += f"  {_step_in_words(step)}, NCSN++ in float32: {step['median_ms']:,.0f} ms" if step else ""
    table = Table(title=f"{_title(bench)}, {hardware_of(bench)}", caption=words, box=box.SIMPLE_HEAD, pad_edge=False)
    for name in "match_size", "way", "median ms", "least", "most", "faster", "floor":
        table.add_column(name, justify="left" if name == "way" else "right", no_wrap=True)
    for row in bench["rows"]:
        times = (number(row[key]) for key in ("median_ms", "least_ms", "most_ms"))
        faster = row.get("times_faster_than_the_paper")
        table.add_row(f"{row['match_size']:,}", row["way"], *times, f"{number(faster)}×" if faster else "",
                      number(row.get("floor_ms")))
    console.print(table)


def _step_in_words(step: dict) -> str:
    """On a CPU one sample stands for the batch, which would be quicker together: that is to be seen."""
    return "A training step" if step["samples_measured"] > 1 else "A training step, as one sample times the batch"


def number(value):
    return "" if value is None else f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 3}f}"


STYLES = {
    LOOP: ("#c44e52", "o-"), PRODUCT: ("#888888", "s:"), "ours, squared": ("#1f5fa8", "o-"),
    "ours, inner": ("#55a3d9", "^-"), "ours, tf32": ("#2a9d6f", "o-"), "ours, bf16": ("#8cc63f", "o-"),
    "nearest of k": ("#b07aa1", "d-"), "ours, assignment": ("#1f5fa8", "P--"), "scipy, assignment": ("#dd8452", "P--"),
    "POT emd": ("#937860", "X--"), "torch-linear-assignment": ("#da8bc3", "v--"),
}


def draw(bench: dict, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8.4, 5.0), layout="constrained")
    for way, (color, style) in STYLES.items():
        rows = [row for row in bench["rows"] if row["way"] == way]
        if rows:
            sizes = [row["match_size"] for row in rows]
            axes.plot(sizes, [row["median_ms"] for row in rows], style, color=color, label=way, markersize=5)
            axes.fill_between(sizes, [row["least_ms"] for row in rows], [row["most_ms"] for row in rows], color=color,
                              alpha=0.12, linewidth=0)
    floors = {}
    for row in bench["rows"]:
        if "floor_ms" in row:
            floors[row["match_size"]] = min(row["floor_ms"], floors.get(row["match_size"], float("inf")))
    axes.plot(list(floors), list(floors.values()), "k--", linewidth=1, label="floor of the quickest of ours")
    if step := bench["train_step"]:
        axes.axhline(step["median_ms"], color="black", linewidth=1)
        words = f"{_step_in_words(step)}, NCSN++ in float32: {step['median_ms']:,.0f} ms"
        axes.annotate(words, (0.99, step["median_ms"]), xycoords=("axes fraction", "data"), fontsize=8, va="bottom",
                      ha="right")
    axes.set(xscale="log", yscale="log", xlabel="match_size (noises in the pool)", ylabel="milliseconds a batch")
    axes.set_title(f"{_title(bench)}: median, least to most\n{hardware_of(bench)}", fontsize=10)
    axes.grid(True, which="major", alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)
