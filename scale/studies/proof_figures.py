"""The figures of `scale.proof`: distance against images and minutes, what share of the images matching needs, and all
ways of pairing side by side."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MultipleLocator, NullLocator

from ..evaluate.evaluate import INCEPTION
from . import proof
from .figures import COLUMN, DATA, INK, NOISE, PAGE, PALE, STYLE, save

LOOKS = {proof.OFF: dict(color=NOISE, marker="o", linestyle=(0, (4, 2))),
         "greedy-1000": dict(color="#e0a458", marker="^", linestyle=(0, (1, 1.2))),
         proof.MATCHED: dict(color=DATA, marker="s", linestyle="-"),
         "greedy-100000": dict(color="#7a4b94", marker="v", linestyle=(0, (1, 1.2))),
         "greedy-1000000": dict(color="#2a7f62", marker="D", linestyle=(0, (1, 1.2)))}
DIFFUSION = {"diffusion-off": LOOKS[proof.OFF], "diffusion-greedy-10000": LOOKS[proof.MATCHED]}
PEERS = ["greedy-1000", proof.MATCHED, "greedy-100000", "greedy-1000000", "optimal-10000", "assigned-256", "nearest-16"]
MARKERS = "osD^v"
SMALL = ["batch8-assigned", "batch8-greedy-10000", "batch1-greedy-10000"]
BY_COST = [proof.MATCHED, "inner-10000", "greedy-100000", "inner-100000"]
CLAIMED = 0.6, 0.7  # of the images, by the paper: 30 to 40 % fewer


def draw(rows: list[dict], speeds: list[dict], out: Path) -> list[str]:
    """Every figure that there are rows for; returns the names of the files."""
    written, (timed, card) = [], at_their_rate(rows, speeds)
    for name, figure in (("images", curves(rows, LOOKS, "images")),
                         ("seconds", curves(timed, LOOKS, "seconds", card)),
                         ("diffusion", curves(rows, DIFFUSION, "images")),
                         ("others", side_by_side(rows, PEERS, proof.MIDDLE)),
                         ("costs", side_by_side(rows, BY_COST, proof.SHORT)),
                         ("small-batches", side_by_side(rows, SMALL, None))):
        if figure is not None:
            written += save(figure, out / name)
    return written


def at_their_rate(rows: list[dict], speeds: list[dict]) -> tuple[list[dict], str]:
    """`rows` with the seconds that their images take at the rate of their run, and the card it is of: the one with most
    rates, as those of two cards do not compare. On the clock one run begins with kernels to be compiled and the next
    with none, and many shared a card. Those of runs that have no rate are left out."""
    cards = [speed["gpu"] for speed in speeds]
    card = max(cards, key=cards.count, default="")
    rates = {speed["run"]: speed["images_per_second"] for speed in speeds if speed["gpu"] == card}
    return [{**row, "seconds": row["images"] / rates[row["run"]]} for row in rows if row["run"] in rates], card


@matplotlib.rc_context(STYLE)
def curves(rows: list[dict], looks: dict[str, dict], along: str, card: str = "") -> Figure | None:
    """Distance against "images" or "seconds" on a `card`, a panel for each count of steps, a line for each run: the
    mean over the seeds that have come farthest, and where there are several a band from the least to the most of all.
    Against images, if there is something to compare with, below it the share of images that each needs."""
    rows = [row for row in rows if row["run"] in looks]
    if not rows:
        return None
    counts = sorted({row["steps"] for row in rows})
    shares = proof.summarize(rows) if along == "images" else []
    figure = Figure((PAGE, 4.3 if shares else 2.6), layout="constrained")
    panels, *below = figure.subplots(2 if shares else 1, len(counts), squeeze=False, sharex=True)
    unit = 1e6 if along == "images" else 60
    for axes, steps in zip(panels, counts, strict=True):
        axes.set(xscale="log", yscale="log")
        _few_plain_numbers(axes.xaxis, (1, 3))
        _few_plain_numbers(axes.yaxis, (1, 1.5, 2, 3, 4, 5, 7))
        for name, look in looks.items():
            _draw_run(axes, [row for row in rows if (row["run"], row["steps"]) == (name, steps)], look, along, unit)
        axes.set_title(f"{steps} steps", pad=3)
    features = rows[0]["features"]
    panels[0].set_ylabel("FID" if features == INCEPTION else f"Fréchet distance\n({features.partition(':')[2]})")
    if shares:
        _draw_shares(below[0], shares, looks, counts)
    figure.supxlabel({"images": f"images trained on, millions{' (lower row: those of random pairs)' if shares else ''}",
                      "seconds": f"minutes of training on one {card}, start not counted"}[along], fontsize=8)
    handles, labels = (of_both[0] + of_both[1] for of_both in zip(
        panels[0].get_legend_handles_labels(), below[0][0].get_legend_handles_labels() if shares else ([], []),
        strict=True))
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False)
    return figure


def _draw_shares(panels, shares: list[dict], looks: dict[str, dict], counts: list[int]) -> None:
    """A row of panels: of the images that random pairs were trained on, the share that a run needs to come to their
    distance. A band is of all pairs of seeds. Hollow, and on no line, is what was reached before anything was measured;
    at the top edge ends what is not reached: by the mean, or, as a line up to there, by a pair of seeds."""
    top = 0.2 + max([1.0, *(1 / row["ratio"] for row in shares if row["ratio"] and row["run"] in looks)])
    for axes, steps in zip(panels, counts, strict=True):
        axes.axhline(1, color=NOISE, linewidth=1.1, linestyle=LOOKS[proof.OFF]["linestyle"])
        axes.axhspan(*CLAIMED, color=PALE, linewidth=0, zorder=0)
        for name, look in looks.items():
            found = [row for row in shares if (row["run"], row["steps"]) == (name, steps)]
            if found:
                _draw_share(axes, found, look, top)
        axes.grid(axis="x", color=PALE, linewidth=0.5)
        axes.sharey(panels[0])
        axes.label_outer()
    panels[0].set_ylim(0, top)
    panels[0].set_ylabel("images to equal quality\n÷ those of random pairs")
    panels[0].fill_between([], [], [], color=PALE, label="the paper: 30–40 % fewer")
    panels[0].plot([], [], "s", color=INK, markerfacecolor="white", markersize=3, label="hollow: at most so many")
    panels[0].plot([], [], "^", color=INK, markersize=4, label="not reached by all")


def _draw_share(axes, found: list[dict], look: dict, top: float) -> None:
    color, place = look["color"], [row["images"] / 1e6 for row in found]
    share = [1 / row["ratio"] if row["ratio"] else top for row in found]
    solid = [height if row["ratio"] and not row["at_least"] else float("nan")
             for row, height in zip(found, share, strict=True)]
    axes.plot(place, solid, linewidth=1.1, markersize=3, **look)
    for x, height, row in zip(place, share, found, strict=True):
        if row["at_least"]:
            axes.plot(x, height, look["marker"], color=color, markersize=3, markerfacecolor="white")
        if not row["ratio"] or (row["seeds"] > 1 and not row["least_ratio"]):
            axes.plot([x, x], [height, top], color=color, linewidth=0.8, linestyle=(0, (1, 1)))
            axes.plot(x, top, "^", color=color, markersize=4, clip_on=False)
    band = [row for row in found if row["least_ratio"] and row["seeds"] > 1 and not row["at_least"]]
    axes.fill_between([row["images"] / 1e6 for row in band], [1 / row["most_ratio"] for row in band],
                      [1 / row["least_ratio"] for row in band], color=color, alpha=0.25, linewidth=0)


def _draw_run(axes, rows: list[dict], look: dict, along: str, unit: float) -> None:
    if not rows:
        return
    name, steps = rows[0]["run"], rows[0]["steps"]
    farthest = proof.reached(proof.curves(rows, name, steps), max(row["images"] for row in rows))
    line = _by_images([row for row in rows if row["seed"] in farthest])  # a mean that some leave half way would jump
    axes.plot([fmean(row[along] for row in of_all) / unit for of_all in line],
              [fmean(row["distance"] for row in of_all) for of_all in line],
              markersize=3, linewidth=1.1, label=proof.RUNS[name].label, **look)
    band = [of_all for of_all in _by_images(rows) if len(of_all) > 1]
    axes.fill_between([fmean(row[along] for row in of_all) / unit for of_all in band],
                      [min(row["distance"] for row in of_all) for of_all in band],
                      [max(row["distance"] for row in of_all) for of_all in band],
                      color=look["color"], alpha=0.25, linewidth=0)


def _by_images(rows: list[dict]) -> list[list[dict]]:
    return [[row for row in rows if row["images"] == images] for images in sorted({row["images"] for row in rows})]


def _few_plain_numbers(axis, leading: tuple[float, ...]) -> None:
    """On a logarithmic axis these times 0.1, 1, 10, … in place of powers of ten."""
    axis.set_major_locator(LogLocator(subs=leading, numticks=8))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())
    axis.grid(color=PALE, linewidth=0.5)


@matplotlib.rc_context(STYLE)
def side_by_side(rows: list[dict], names: list[str], images: int | None) -> Figure | None:
    """Distance of each run as a multiple of that of its own kind with random pairs, after equally many images (None: as
    many as it saw): a dot for each count of steps, and a line from the least to the most of the seeds."""
    found = {name: ratios(rows, name, images) for name in names if any(row["run"] == name for row in rows)}
    found = {name: of_steps for name, of_steps in found.items() if of_steps}
    if not found:
        return None
    counts = sorted({steps for of_steps in found.values() for steps in of_steps})
    figure = Figure((COLUMN, 1.0 + 0.34 * len(found)), layout="constrained")
    axes = figure.subplots()
    for place, of_steps in enumerate(reversed(found.values())):
        for number, steps in enumerate(counts):
            if steps in of_steps:
                y = place + 0.3 - 0.6 * number / max(1, len(counts) - 1)
                color = matplotlib.colormaps["cividis"](number / len(counts))
                axes.plot([min(of_steps[steps]), max(of_steps[steps])], [y, y], color=color, linewidth=1)
                axes.plot(fmean(of_steps[steps]), y, MARKERS[number % len(MARKERS)], color=color, markersize=3.5)
    for number, steps in enumerate(counts):
        axes.plot([], [], MARKERS[number % len(MARKERS)], color=matplotlib.colormaps["cividis"](number / len(counts)),
                  markersize=3.5, label=f"{steps} steps")
    axes.axvline(1, color=INK, linewidth=0.6)
    labels = [_with_seeds(name, of_steps, images) for name, of_steps in reversed(found.items())]
    axes.set_yticks(range(len(found)), labels, fontsize=6.5)
    seen = f"\nafter {images / 1e6:.2f} million images" if images else ""
    axes.set_xlabel(f"distance ÷ that of random pairs\nof the same seed{seen}", fontsize=7)
    axes.xaxis.set_major_locator(MultipleLocator(0.2))
    axes.grid(axis="x", color=PALE, linewidth=0.5)
    figure.legend(loc="outside upper center", ncols=5, frameon=False, handletextpad=0.1, columnspacing=0.8)
    return figure


def _with_seeds(name: str, of_steps: dict[int, list[float]], images: int | None) -> str:
    run, seeds = proof.RUNS[name], min(map(len, of_steps.values()))
    seen = "" if images else f"\nafter {run.images:,} images"
    return run.label + (f", {seeds} seeds" if seeds > 1 else "") + seen


def ratios(rows: list[dict], name: str, images: int | None) -> dict[int, list[float]]:
    """Steps → of each seed its distance over that of its kind's random pairs of the same seed."""
    run = proof.RUNS[name]
    at = [row for row in rows if row["images"] == (images or run.images)]
    off = {(row["steps"], row["seed"]): row["distance"] for row in at if row["run"] == proof.base_of(run)}
    found = {}
    for row in at:
        if row["run"] == name and (row["steps"], row["seed"]) in off:
            found.setdefault(row["steps"], []).append(row["distance"] / off[row["steps"], row["seed"]])
    return found
