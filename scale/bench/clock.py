"""The clock of every bench: how long work takes, and how measurements become files, a table and a figure."""

import gc
import json
import math
import statistics
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dansm import BadInput

from ..base import colours, files, machine, text
from ..base.processes import ranks

PATIENCE = 20.0  # seconds that the calls of one piece of work may take


def run(name: str, title: str, parts: Iterable[tuple[str, Iterable[dict]]], device: torch.device, out: Path,
        columns: str = "", caption: str = "", resumable: Collection[str] = (), **about) -> dict:
    """Measure the rows of one part after the other. Writes name.json and name.csv after every row into `out` and prints
    a table of `columns`. A part that fails is named under "left_out", and the others are still measured, but
    a missing package or bad input ends the bench.
    about: what the figures depend on, kept next to them. The title is completed by the hardware.
    resumable: parts that the same call takes over if it was stopped before; Ctrl-C raises Stopped then."""
    files.make_folder(out)
    hardware = machine.hardware(device)
    cpu = f"{hardware['cpu']}, {text.counted(hardware['threads'], 'thread')}"
    title = f"{title}, {hardware['gpu'] or cpu}"
    bench = {"title": title, "hardware": hardware, **about, "left_out": {}, "rows": []}
    known = unfinished(out / f"{name}.json", bench) if resumable else {}
    rank, processes = ranks()

    def write(**more) -> None:
        if rank == 0:
            files.write_json(out / f"{name}.json", bench | more)
            files.write_csv(out / f"{name}.csv", bench["rows"])

    measured, parts = {}, list(parts)
    if known := {part: rows for part, rows in known.items() if part in resumable}:
        text.say(f"resuming: {text.counted(len(known), 'part')} of {len(parts)} are in {out / name}.json")
    for part, rows in text.with_bar(parts, "measuring"):
        before = len(bench["rows"])
        try:
            for row in known.get(part, rows):
                bench["rows"].append(row)
                write(measured=measured)
            measured[part] = bench["rows"][before:]
            write(measured=measured)
        except KeyboardInterrupt as interrupt:
            if not resumable:
                raise
            kept = f"{out / name}.json has {text.counted(len(measured), 'part')} of {len(parts)}"
            raise text.Stopped(f"stopped; {kept if measured else 'nothing is measured yet'}, the same command "
                               f"{'resumes' if measured else 'begins again'}") from interrupt
        except Exception as error:
            if processes > 1 or isinstance(error, ModuleNotFoundError | BadInput):  # other processes would wait
                raise
            reason = str(error).partition("\n")[0] or type(error).__name__
            bench["left_out"][part] = "not enough memory" if machine.lacks_memory(error) else reason
            text.say(f"left out: {part}: {bench['left_out'][part]}")
    write()  # with what was left out, which may be all
    show(title, bench["rows"], columns, caption)
    text.say_files(out, f"{name}.csv", f"{name}.json")
    return bench


def unfinished(path: Path, bench: dict) -> dict[str, list[dict]]:
    """The rows by part that a stopped call for the same bench has measured; empty if there was none."""
    try:
        found = files.read_json(path)
        about = json.loads(json.dumps({key: value for key, value in bench.items() if key not in ("left_out", "rows")}))
        same = all(found.get(key) == value for key, value in about.items())
        return found.get("measured", {}) if same else {}
    except (BadInput, FileNotFoundError):
        return {}


def milliseconds(device: torch.device, work: Callable, *arguments) -> float:
    """The time of work(*arguments), until the device has done all of it."""
    wait(device)
    start = time.perf_counter()
    work(*arguments)
    wait(device)
    return 1000 * (time.perf_counter() - start)


def timed(device: torch.device, repeats: int, work: Callable, *arguments) -> list[float]:
    """The milliseconds of `repeats` calls, or of fewer if they take long, after one that is not counted."""
    first = milliseconds(device, work, *arguments) / 1000
    repeats = max(1, min(repeats, int(PATIENCE / max(first, 1e-9))))
    return [milliseconds(device, work, *arguments) for _ in range(repeats)]


def spread(times: Sequence[float], images: int = 0) -> dict:
    """The columns that describe several times in milliseconds, and the rate if each of them is that of `images`."""
    row = {"median_ms": round(statistics.median(times), 4), "mean_ms": round(statistics.fmean(times), 4),
           "least_ms": round(min(times), 4), "most_ms": round(max(times), 4), "calls": len(times)}
    return row | {"images_per_second": round(1000 * images / row["median_ms"], 1)} if images else row


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
    """Samples (count, C, H, W) in [−1, 1], smooth and of unequal brightness: as photographs, they want equal noises."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, shape[0], 4, 4, generator=generator)
    contrast = torch.rand(count, 1, 1, 1, generator=generator)
    brightness = 0.4 * torch.randn(count, 1, 1, 1, generator=generator)
    samples = torch.empty(count, *shape, device=device)
    for some in torch.arange(count).split(256):
        smooth = (contrast[some] * coarse[some] + brightness[some]).to(device)
        samples[some] = torch.nn.functional.interpolate(smooth, size=tuple(shape[1:]), mode="bilinear")
    return samples.clamp_(-1, 1)


def show(title: str, rows: list[dict], columns: str, caption: str = "") -> None:
    """Print a table of the columns of these names."""
    names = columns.split()
    if rows and names:
        texts = sum(isinstance(rows[0].get(name), str) for name in names)
        cells = [[cell(row.get(name), name) for name in names] for row in rows]
        text.console.print(text.table(title, [name.replace("_", "\n") for name in names], cells, caption, texts))


def cell(value: str | float | None, name: str = "") -> str:
    """A figure as tables show it: whole from 100 on, and a share in percent."""
    if value is None or isinstance(value, str):
        return value or ""
    if "share" in name or name == "mfu":
        return f"{100 * value:.1f} %"
    return f"{value:,.0f}" if isinstance(value, int) or value >= 100 else f"{value:,.3f}"


def draw(title: str, rows: dict[str, dict], kinds: dict[str, dict[str, float]], path: Path, scale="linear") -> None:
    """A bar for each row by its label, as long as its median, with a line from its least to its most and a mark at its
    floor. kinds: label → the milliseconds that its bar is cut into, by name."""
    import matplotlib.pyplot as plt

    median, least, most, floor = ([row.get(f"{name}_ms", math.nan) for row in rows.values()]
                                  for name in ("median", "least", "most", "floor"))
    figure, axes = plt.subplots(figsize=(9.0, 2.0 + 0.32 * len(rows)), layout="constrained")
    spans = [np.subtract(median, least), np.subtract(most, median)]
    bars = axes.barh(list(rows), median, xerr=spans, color=colours.RANDOM, ecolor=colours.INK)
    axes.bar_label(bars, [f"{cell(ms)} ms" for ms in median], padding=4, fontsize=7)
    ends = np.zeros(len(kinds))
    for number, name in enumerate(dict.fromkeys(name for parts in kinds.values() for name in parts)):
        widths = [parts.get(name, 0) for parts in kinds.values()]
        axes.barh(list(kinds), widths, left=ends, color=plt.get_cmap("tab20")(number), label=name)
        ends += widths
    axes.plot(floor, list(rows), "k|", markersize=14)
    axes.invert_yaxis()
    axes.tick_params("y", labelsize=7)
    axes.set(xscale=scale, xlabel="milliseconds: median, least to most; | the machine's floor")
    axes.margins(x=0.15, y=0.01)
    figure.legend(*axes.get_legend_handles_labels(), fontsize=7, ncols=4, loc="outside lower center", frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    text.say("written:", str(path))
