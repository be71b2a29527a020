"""The clock of every bench: how long work takes, the memory it takes, and how figures are kept and printed."""

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor

from ..base.colours import INK, RANDOM
from ..base.files import write_csv, write_json
from ..base.machine import hardware, lacks_memory
from ..base.processes import ranks
from ..base.text import console, say, table

PATIENCE = 20.0  # seconds that the calls of one piece of work may take


def run(name: str, device: torch.device, about: dict, parts: Iterable[tuple[str, Iterable[dict]]],
        out: Path) -> dict:
    """Measure one part after the other. Writes name.json after every row, and name.csv at the end.

    about  what the figures depend on, kept next to them
    parts  (name, rows) each. A row is measured when it is asked for. A part that fails, by lack of memory or anything
           else, is named under "left_out", and the others are still measured
    """
    bench = {"hardware": hardware(device), **about, "left_out": {}, "rows": []}
    rank, processes = ranks()

    def write() -> None:
        if rank == 0:
            write_json(out / f"{name}.json", bench)

    for part, rows in track(list(parts), "measuring", console=console):
        try:
            for row in rows:
                bench["rows"].append(row)
                write()
        except Exception as error:
            if processes > 1:  # the others would wait for this one
                raise
            reason = str(error).partition("\n")[0] or type(error).__name__
            bench["left_out"][part] = "not enough memory" if lacks_memory(error) else reason
            say(f"left out: {part}: {bench['left_out'][part]}")
    write()
    if rank == 0:
        write_csv(out / f"{name}.csv", bench["rows"])
    return bench


def milliseconds(device: torch.device, work: Callable, *arguments) -> float:
    """The time of work(*arguments), until the device has done all of it."""
    wait(device)
    start = time.perf_counter()
    work(*arguments)
    wait(device)
    return 1000 * (time.perf_counter() - start)


def timed(device: torch.device, repeats: int, work: Callable, *arguments) -> dict:
    """`spread` of `repeats` calls, or of fewer if they take long, after one that is not counted."""
    first = milliseconds(device, work, *arguments) / 1000
    repeats = max(1, min(repeats, int(PATIENCE / max(first, 1e-9))))
    return spread([milliseconds(device, work, *arguments) for _ in range(repeats)])


def spread(times: list[float]) -> dict:
    """The columns that describe several times in milliseconds."""
    return {"median_ms": round(statistics.median(times), 4), "mean_ms": round(statistics.fmean(times), 4),
            "least_ms": round(min(times), 4), "most_ms": round(max(times), 4), "calls": len(times)}


def rate(count: int, row: dict) -> float:
    """Images a second, if `count` take the row's median time."""
    return round(1000 * count / row["median_ms"], 1)


def wait(device: torch.device) -> None:
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()


def reset_peak(device: torch.device) -> None:
    """Give back what is free, and forget the most memory used so far."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_mb(device: torch.device) -> float | None:
    """The most memory that tensors had on a GPU since the reset; None elsewhere."""
    return round(torch.cuda.max_memory_allocated(device) / 1e6, 1) if device.type == "cuda" else None


def image_like(count: int, shape: tuple[int, ...], seed: int, device: torch.device) -> Tensor:
    """Samples (count, *shape) in [−1, 1], smooth and of unequal contrast and brightness, as photographs are. They want
    the same noises, which is harder to match than random numbers."""
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


def show(title: str, rows: list[dict], columns: dict[str, str], texts: int = 1, caption: str = "") -> None:
    """Print a table. columns: {heading: name in the rows}, the first `texts` of them text."""
    if rows:
        cells = [[cell(row.get(name), name) for name in columns.values()] for row in rows]
        console.print(table(title, list(columns), cells, caption, texts))


def cell(value: str | float | None, name: str = "") -> str:
    """A figure as tables show it: whole from 100 on, and a share in percent."""
    if value is None or isinstance(value, str):
        return value or ""
    if "share" in name or name == "mfu":
        return f"{100 * value:.1f} %"
    if isinstance(value, int):
        return f"{value:,}"
    digits = 0 if value >= 100 else 1 if value >= 10 else 3
    return f"{value:,.{digits}f}"


def hardware_of(bench: dict) -> str:
    machine = bench["hardware"]
    return machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads"


def draw(rows: list[dict], labels: list[str], title: str, path: Path, parts: dict[str, dict[str, float]] | None = None,
         scale: str = "linear") -> None:
    """A bar for each row, as long as its median, with a line from its least to its most and a mark at its floor.

    parts  label → the milliseconds that its bar is cut into, by name
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9.0, 2.0 + 0.32 * len(rows)), layout="constrained")
    names = list(dict.fromkeys(name for part in (parts or {}).values() for name in part))
    bars = {}
    for place, (row, label) in enumerate(zip(reversed(rows), reversed(labels), strict=True)):
        axes.barh(place, row["median_ms"], color=RANDOM)
        end = 0.0
        for name, ms in (parts or {}).get(label, {}).items():
            bars[name] = axes.barh(place, ms, left=end, color=plt.get_cmap("tab20")(names.index(name)))
            end += ms
        axes.plot([row["least_ms"], row["most_ms"]], [place, place], color=INK)
        axes.plot(row.get("floor_ms", math.nan), place, "k|", markersize=14)
        axes.annotate(f"{cell(row['median_ms'])} ms", (row["most_ms"], place), (4, 0), textcoords="offset points",
                      fontsize=7, va="center")
    axes.set_yticks(range(len(rows)), reversed(labels), fontsize=7)
    axes.set(xscale=scale, xlabel="milliseconds: median, least to most; | the machine's floor")
    axes.margins(x=0.15, y=0.01)
    figure.legend(bars.values(), bars, fontsize=7, ncols=4, loc="outside lower center", frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)
    plt.close(figure)
