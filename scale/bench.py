"""What matching costs, in one run on one machine: the paper's loop, ours, and the matrix product alone."""

from __future__ import annotations

import resource
import statistics
import time
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import dansm


def paper_loop(x: Tensor, noises: Tensor) -> Tensor:
    """The matching as the paper's code does it: one sample after the other against the whole pool.

    x: (B, ...), noises: (M, ...), B ≤ M → picks (B,). As quick as such a loop gets: the differences go to one buffer
    again and again (on a CPU that alone makes it about three times quicker), and what is taken is only marked.
    """
    taken = torch.zeros(len(noises), device=x.device, dtype=x.dtype)
    difference = torch.empty_like(noises)
    picks = []
    for sample in x:
        distances = torch.sub(noises, sample, out=difference).square_().flatten(1).mean(1)
        picks.append((distances + taken).argmin())
        taken[picks[-1]] = torch.inf
    return torch.stack(picks)


def bench_match(match_sizes: list[int], batch: int, shape, *, seed: int, device: torch.device, out: Path,
                console: Console) -> list[dict]:
    """Time one batch for each match_size; prints a table, writes match.json and match.png into `out`.

    On a full pool, like with like: the paper's loop, the matrix product that any exact matching needs, and ours.
    Then ours over a pool's whole life, its draw and its nearly empty end included.
    """
    x = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed)).to(device)
    rows = []
    for match_size in track(match_sizes, "measuring", console=console):
        life = {cost: life_of_a_pool(x, match_size, cost, seed, device) for cost in dansm.COSTS}
        noises = torch.randn(match_size, *shape, device=device)
        full = [{"match_size": match_size, "pool": "full", "way": way, **timed(work, device, repeats)}
                for way, repeats, work in _ways(x[:match_size], noises)]
        for row in full:
            row["times_faster_than_the_paper"] = round(full[-1]["median_ms"] / row["median_ms"], 1)
        rows += full
        rows += [{"match_size": match_size, "pool": "life", "way": f"ours, {cost}", **life[cost]} for cost in life]
        del noises
        dansm.write_json(out / "match.json", {"batch": batch, "shape": list(shape), "rows": rows,
                                              "hardware": dansm.hardware(device)})
    _print(rows, batch, shape, console)
    _draw(rows, batch, shape, out / "match.png")
    dansm.say_files(out, "match.png", "match.json")
    return rows


def _ways(x, noises):
    """(name, calls, work) for a full pool, the paper's loop last."""
    squared = noises.flatten(1).square().sum(1)  # once in a pool's life: its time is in that of the whole life
    return [
        ("bare product", 15, lambda: x.flatten(1) @ noises.flatten(1).T),
        ("ours, squared", 15, lambda: dansm.greedy(dansm.cost_matrix(x, noises, "squared", squared))),
        ("ours, inner", 15, lambda: dansm.greedy(dansm.cost_matrix(x, noises, "inner"))),
        ("paper's loop", 3, lambda: paper_loop(x, noises)),
    ]


def timed(work, device: torch.device, repeats: int) -> dict:
    """Milliseconds of `work` over `repeats` calls, after one that is not counted."""
    work()
    return _spread([_milliseconds(work, device) for _ in range(repeats)])


def life_of_a_pool(x: Tensor, match_size: int, cost: str, seed: int, device: torch.device) -> dict:
    """Every batch of a pool's whole life, from one refill to the next, and the most memory used beyond the pool."""
    _reset_peak(device)
    before = _peak_mb(device)
    pool = dansm.NoisePool(match_size, x.shape[1:], cost=cost, device=device, seed=seed)
    pool(x)
    times = [_milliseconds(lambda: pool(x), device) for _ in range(max(5, -(-match_size // len(x))))]
    beyond = max(0.0, _peak_mb(device) - before - pool.noise.nbytes / 1e6)  # memory used before may serve again
    return {**_spread(times), "memory_beyond_pool_mb": round(beyond, 1)}


def _milliseconds(work, device):
    _wait(device)
    start = time.perf_counter()
    work()
    _wait(device)
    return 1000 * (time.perf_counter() - start)


def _spread(times):
    return {"median_ms": round(statistics.median(times), 3), "mean_ms": round(statistics.fmean(times), 3),
            "least_ms": round(min(times), 3), "most_ms": round(max(times), 3), "calls": len(times)}


def _wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reset_peak(device):
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak of this process


def _peak_mb(device):
    """Most memory since the reset; elsewhere than on Linux since the process began, which can only overstate it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 1e3
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def _title(batch, shape):
    return f"Matching a batch of {batch} samples of {'×'.join(map(str, shape))}"


def _print(rows, batch, shape, console):
    table = Table(title=_title(batch, shape), caption="faster: than the paper's loop.  MB: the most memory beyond the "
                  "pool.  life: from one refill to the next, draw included", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in "match_size", "pool", "way", "median ms", "least", "most", "faster", "MB":
        table.add_column(name, justify="left" if name in ("pool", "way") else "right", no_wrap=True)
    for row in rows:
        faster, memory = row.get("times_faster_than_the_paper"), row.get("memory_beyond_pool_mb")
        times = (f"{row[key]:,.{1 if row[key] < 100 else 0}f}" for key in ("median_ms", "least_ms", "most_ms"))
        table.add_row(f"{row['match_size']:,}", row["pool"], row["way"], *times, f"{faster}×" if faster else "",
                      "" if memory is None else f"{memory:,.0f}")
    console.print(table)


def _draw(rows, batch, shape, path):
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    styles = {"paper's loop": ("#c44e52", "o-"), "bare product": ("#999999", "s--"),
              "ours, squared": ("#1f5fa8", "o-"), "ours, inner": ("#55a3d9", "^-")}
    for way, (color, style) in styles.items():
        of_way = [row for row in rows if row["way"] == way and row["pool"] == "full"]
        sizes, medians = [row["match_size"] for row in of_way], [row["median_ms"] for row in of_way]
        axes.plot(sizes, medians, style, color=color, label=way, markersize=5)
        least, most = [row["least_ms"] for row in of_way], [row["most_ms"] for row in of_way]
        axes.fill_between(sizes, least, most, color=color, alpha=0.15)
    axes.set(xscale="log", yscale="log", xlabel="match_size (noises in a full pool)", ylabel="milliseconds a batch")
    axes.set_title(f"{_title(batch, shape)}: median, least to most", fontsize=10)
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
