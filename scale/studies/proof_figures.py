"""The figures of `proof`: distance against images and minutes, the share of images needed, ways side by side."""

from itertools import chain
from pathlib import Path
from statistics import fmean

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MultipleLocator, NullLocator

from ..base.colours import INK, PALE, POOLS, SEMIDISCRETE
from .proof_runs import MATCHED, MIDDLE, RANDOM, RUNS, SHORT, base_of, summarize
from .style import COLUMN, PAGE, SERIES, STYLE, save

DOTTED = (0, (1, 1.2))
PLAN = dict(color=SEMIDISCRETE, marker="P", linestyle="-")
LOOKS = {RANDOM: SERIES["random"], MATCHED: SERIES["matched"],
         "greedy-100000": dict(color=POOLS[100_000], marker="v", linestyle=DOTTED), "semidiscrete": PLAN}
DIFFUSION = {"diffusion-random": SERIES["random"], "diffusion-greedy-10000": SERIES["matched"],
             "diffusion-priced-10000": dict(color=POOLS[1000], marker="D", linestyle=DOTTED),
             "diffusion-semidiscrete": PLAN}
PEERS = ["greedy-1000", MATCHED, "priced-10000", "greedy-100000", "priced-100000", "greedy-1000000",
         "optimal-10000", "semidiscrete", "assigned-256", "nearest-16"]
BY_COST = [MATCHED, "inner-10000", "greedy-100000", "inner-100000"]
SMALL = ["batch8-assigned", "batch8-greedy-10000", "batch1-greedy-10000"]
MARKERS = "osD^v"
CLAIMED = 0.6, 0.7  # of the images, by the paper: 30 to 40 % fewer
DISTANCES = {"inception": "FID", "efficientnet-lite0": "Fréchet distance\n(EfficientNet-Lite0)"}


def draw(rows: list[dict], speeds: list[dict], out: Path) -> list[str]:
    """Draw every figure that there are rows for, and return the names of the files."""
    timed, card = at_their_rate(rows, speeds)
    figures = {"images": draw_curves(rows, LOOKS), "seconds": draw_curves(timed, LOOKS, card),
               "diffusion": draw_curves(rows, DIFFUSION), "others": side_by_side(rows, PEERS, MIDDLE),
               "costs": side_by_side(rows, BY_COST, SHORT), "small-batches": side_by_side(rows, SMALL, None)}
    return [name for path, figure in figures.items() if figure is not None for name in save(figure, out / path)]


def at_their_rate(rows: list[dict], speeds: list[dict]) -> tuple[list[dict], str]:
    """The rows whose run has a rate, with the seconds that their images take at it (clocks do not compare: some runs
    compiled kernels first, many shared a card), and the card of the rates: the one with most."""
    cards = [speed["gpu"] for speed in speeds]
    card = max(cards, key=cards.count, default="")
    rates = {speed["run"]: speed["images_per_second"] for speed in speeds if speed["gpu"] == card}
    return [{**row, "seconds": row["images"] / rates[row["run"]]} for row in rows if row["run"] in rates], card


@matplotlib.rc_context(STYLE)
def draw_curves(rows: list[dict], looks: dict[str, dict], card: str = "") -> Figure | None:
    """Distance against minutes on a card, or against images, with the share that each run needs below; by steps."""
    rows = [row for row in rows if row["run"] in looks]
    if not rows:
        return None
    counts = sorted({row["steps"] for row in rows})
    shares = [] if card else [row for row in summarize(rows) if row["run"] in looks]
    figure = Figure((PAGE, 4.3 if shares else 2.6), layout="constrained")
    panels, *below = figure.subplots(2 if shares else 1, len(counts), squeeze=False, sharex=True)
    for axes, steps in zip(panels, counts, strict=True):
        axes.set(xscale="log", yscale="log")
        for axis, leading in (axes.xaxis, (1, 3)), (axes.yaxis, (1, 1.5, 2, 3, 4, 5, 7)):
            axis.set_major_locator(LogLocator(subs=leading, numticks=8))  # a few plain numbers, no powers of ten
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_locator(NullLocator())
            axis.grid(color=PALE, linewidth=0.5)
        axes.set_title(f"{steps} sampling steps", pad=3)
        for name, look in looks.items():
            draw_run(axes, [row for row in rows if (row["run"], row["steps"]) == (name, steps)], look,
                     *(("seconds", 60) if card else ("images", 1e6)))
    features = rows[0]["features"]
    panels[0].set_ylabel(DISTANCES.get(features, f"Fréchet distance\n({features.rpartition(':')[2]})"))
    along = f"minutes of training on one {card}, without the start" if card else "training images, millions"
    if shares:
        draw_shares(below[0], shares, looks, counts)
        along += " (lower row: of random pairs)"
    figure.supxlabel(along, fontsize=8)
    legends = [row[0].get_legend_handles_labels() for row in (panels, *below)]
    handles, labels = (list(chain.from_iterable(part)) for part in zip(*legends, strict=True))
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False,
                  columnspacing=1.5)
    return figure


def draw_run(axes: Axes, rows: list[dict], look: dict, column: str, unit: float) -> None:
    """The mean over the seeds that have come farthest, as one that some leave half way would jump; a band over all."""
    groups = [[row for row in rows if row["images"] == images] for images in sorted({row["images"] for row in rows})]
    if not groups:
        return
    farthest = {row["seed"] for row in groups[-1]}
    line = [[row for row in group if row["seed"] in farthest] for group in groups]
    line = [group for group in line if group]
    axes.plot([mean(group, column) / unit for group in line], [mean(group, "distance") for group in line],
              markersize=3, linewidth=1.1, label=RUNS[rows[0]["run"]].label, **look)
    band = [group for group in groups if len(group) > 1]
    axes.fill_between([mean(group, column) / unit for group in band],
                      [min(row["distance"] for row in group) for group in band],
                      [max(row["distance"] for row in group) for group in band],
                      color=look["color"], alpha=0.25, linewidth=0)


def mean(rows: list[dict], column: str) -> float:
    return fmean(row[column] for row in rows)


def draw_shares(panels: list[Axes], shares: list[dict], looks: dict[str, dict], counts: list[int]) -> None:
    """A row of panels: of random pairs' images, the share that a run needs to come to their distance."""
    first = min(row["images"] for row in shares)
    top = 0.2 + max([1.0, *(1 / row["ratio"] for row in shares if row["ratio"])])
    for axes, steps in zip(panels, counts, strict=True):
        axes.axhline(1, linewidth=1.1, **{**SERIES["random"], "marker": ""})
        axes.axhspan(*CLAIMED, color=PALE, linewidth=0, zorder=0)
        for name, look in looks.items():
            draw_share(axes, [row for row in shares if (row["run"], row["steps"]) == (name, steps)], look, top, first)
        axes.grid(axis="x", color=PALE, linewidth=0.5)
        axes.sharey(panels[0])
        axes.label_outer()
    panels[0].set_ylim(0, top)
    panels[0].set_ylabel("share of images needed\nto equal random pairs")
    panels[0].fill_between([], [], [], color=PALE, label="the paper: 30–40 % fewer")
    panels[0].plot([], [], "s", color=INK, markerfacecolor="white", markersize=3, label="hollow: this many or fewer")
    panels[0].plot([], [], "^", color=INK, markersize=4, label="not reached by every seed")


def draw_share(axes: Axes, shares: list[dict], look: dict, top: float, first: int) -> None:
    """One run. What it reached before the first mark of all is hollow and on no line. It is left out at that mark
    itself, and where the run has no evaluation so early: there it tells nothing. What the mean or a pair of seeds does
    not reach ends at the top edge. A band is over all pairs of seeds."""
    color = look["color"]
    solid = [row for row in shares if row["ratio"] and not row["at_least"]]
    gaps = [1 / row["ratio"] if row in solid else float("nan") for row in shares]
    axes.plot([row["images"] / 1e6 for row in shares], gaps, linewidth=1.1, markersize=3, **look)
    for row in shares:
        x, share = row["images"] / 1e6, 1 / row["ratio"] if row["ratio"] else top
        if row["at_least"] and row["images"] > row["images_ours"] == first:
            axes.plot(x, share, look["marker"], color=color, markersize=3, markerfacecolor="white")
        if not row["ratio"] or (row["seeds"] > 1 and not row["least_ratio"]):
            axes.plot([x, x], [share, top], color=color, linewidth=0.8, linestyle=(0, (1, 1)))
            axes.plot(x, top, "^", color=color, markersize=4, clip_on=False)
    band = [row for row in solid if row["least_ratio"] and row["seeds"] > 1]
    axes.fill_between([row["images"] / 1e6 for row in band], [1 / row["most_ratio"] for row in band],
                      [1 / row["least_ratio"] for row in band], color=color, alpha=0.25, linewidth=0)


@matplotlib.rc_context(STYLE)
def side_by_side(rows: list[dict], names: list[str], images: int | None) -> Figure | None:
    """The ratio of each run's distance to that of random pairs, by sampling steps: mean and range over seeds.

    images  training images after which to compare; None: all that the run saw
    """
    ratios = {name: by_steps for name in names if name in RUNS and (by_steps := ratios_of(rows, name, images))}
    if not ratios:
        return None
    counts = sorted({steps for by_steps in ratios.values() for steps in by_steps})
    figure = Figure((COLUMN, 1.1 + 0.34 * len(ratios)), layout="constrained")
    axes = figure.subplots()
    for number, steps in enumerate(counts):
        color = matplotlib.colormaps["cividis"](number / len(counts))
        axes.plot([], [], MARKERS[number % 5], color=color, markersize=3.5, label=steps)
        for place, by_steps in enumerate(reversed(ratios.values())):
            if steps in by_steps:
                y = place + 0.3 - 0.6 * number / max(1, len(counts) - 1)
                axes.plot([min(by_steps[steps]), max(by_steps[steps])], [y, y], color=color, linewidth=1)
                axes.plot(fmean(by_steps[steps]), y, MARKERS[number % 5], color=color, markersize=3.5)
    axes.axvline(1, color=INK, linewidth=0.6)
    labels = []
    for name, by_steps in reversed(ratios.items()):
        seeds = min(map(len, by_steps.values()))
        label = f"{RUNS[name].label}, {seeds} seeds" if seeds > 1 else RUNS[name].label
        labels.append(label if images else f"{label}\nafter {RUNS[name].images:,} images")
    axes.set_yticks(range(len(ratios)), labels, fontsize=6.5)
    after = f"after {images / 1e6:.2f} million training images" if images else "after equally many images"
    figure.supxlabel(f"Fréchet distance ÷ that of random pairs\n(same seed, {after})", fontsize=7)
    axes.xaxis.set_major_locator(MultipleLocator(0.2))
    axes.grid(axis="x", color=PALE, linewidth=0.5)
    figure.legend(title="sampling steps", title_fontsize=7, loc="outside upper center", ncols=4, frameon=False,
                  handletextpad=0.1, columnspacing=0.8)
    return figure


def ratios_of(rows: list[dict], name: str, images: int | None) -> dict[int, list[float]]:
    """Steps → for each seed, the distance of a run ÷ that of random pairs of the same seed, flow and batch."""
    run = RUNS[name]
    rows = [row for row in rows if row["images"] == (images or run.images)]
    base = {(row["steps"], row["seed"]): row["distance"] for row in rows if row["run"] == base_of(run)}
    ratios = {}
    for row in rows:
        if row["run"] == name and (row["steps"], row["seed"]) in base:
            ratios.setdefault(row["steps"], []).append(row["distance"] / base[row["steps"], row["seed"]])
    return ratios
