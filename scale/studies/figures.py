"""The figures of `scale.foundations` and `scale.paths`: a column of a paper wide, clear in grey too, PNG and SVG."""

from __future__ import annotations

import io
import textwrap
from pathlib import Path

import matplotlib
import numpy as np
from einops import rearrange
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from ..base.text import counted, shorten
from ..data.pixels import to_uint8

COLUMN, PAGE = 3.4, 7.0  # inches: one column of a paper of two, and both
INK, NOTE, PALE, NOISE, DATA = "#2b2f36", "#5b6470", "#d3d9e0", "#8fa8c4", "#c8441b"  # those of tiny.pictures
STYLE = {"font.family": "DejaVu Sans", "font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "xtick.labelsize": 7,
         "ytick.labelsize": 7, "legend.fontsize": 7, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": NOTE,
         "xtick.color": NOTE, "ytick.color": NOTE, "xtick.labelcolor": INK, "ytick.labelcolor": INK,
         "axes.linewidth": 0.6, "xtick.major.width": 0.6, "ytick.major.width": 0.6, "axes.spines.top": False,
         "axes.spines.right": False, "figure.facecolor": "white"}
# of the random, the matched and the models' own pairs: light, middle and dark, so that grey parts them too
SERIES = {"random": dict(color=NOISE, marker="o", linestyle=(0, (4, 2))),
          "matched": dict(color=DATA, marker="s", linestyle="-"),
          "own": dict(color=INK, marker="^", linestyle=(0, (1, 1.2)))}


def save(figure: Figure, path: Path) -> list[str]:
    """As path.png and path.svg, each drawn before it is opened, and the same bytes of the same figure: what is redrawn
    from unchanged tables is no change. Returns their names."""
    names = []
    for kind, how in (("png", dict(dpi=200)), ("svg", dict(metadata={"Date": None}))):
        buffer = io.BytesIO()
        with matplotlib.rc_context({"svg.hashsalt": path.name}):  # where there is none, ids are drawn anew each time
            figure.savefig(buffer, format=kind, **how)
        target = path.with_name(f"{path.name}.{kind}")
        target.write_bytes(buffer.getvalue())
        names.append(target.name)
    return names


def kind_of(pairs: str) -> str:
    """Which of SERIES "random", "matched, 1,000" or "own, its label" belongs to."""
    return pairs.partition(",")[0]


# ---------------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------------


def pixels(images: Tensor) -> np.ndarray:
    """[−1, 1] (N, C, H, W), of one channel or three → uint8 (N, H, W, 3)."""
    shown = rearrange(to_uint8(images.cpu()), "n c h w -> n h w c").numpy()
    return np.broadcast_to(shown, (*shown.shape[:3], 3))


def tile(images: np.ndarray, columns: int, gap: int = 1) -> np.ndarray:
    """uint8 (N, H, W, 3) → one picture, `columns` a row, white lines of `gap` pixels between."""
    n, height, width, _ = images.shape
    rows = -(-n // columns)
    page = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for i, image in enumerate(images):
        y, x = i // columns * (height + gap), i % columns * (width + gap)
        page[y : y + height, x : x + width] = image
    return page


def show(axes, picture: np.ndarray) -> None:
    """A picture without axes, its pixels as squares in the PNG and in the SVG."""
    axes.imshow(picture, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_visible(False)


@matplotlib.rc_context(STYLE)
def draw_compare(images: dict[str, Tensor], z: Tensor, found: list[dict], path: Path) -> list[str]:
    """Above a column for each noise z: (N, C, H, W), of what each model makes of it, `images`; none for latents. Below
    the distances of `found`, see `foundations.compare_images`. Writes path.png and path.svg, returns their names."""
    rows = {"the noise of each column": (z / 3).clamp(-1, 1), **images} if images else {}
    heights = [((COLUMN - 0.1) / len(z) + 0.19) * len(rows), 0.65 + 0.32 * len(found)]
    figure = Figure((COLUMN, sum(heights)), layout="constrained")
    below = figure
    if rows:
        above, below = figure.subfigures(2, 1, height_ratios=heights)
        for one, (label, row) in zip(above.subplots(len(rows), 1), rows.items(), strict=True):
            show(one, tile(pixels(row), len(row), gap=2))
            one.set_title(shorten(label, 58), loc="left", pad=2, fontsize=7)
    figure.get_layout_engine().set(h_pad=0.015, w_pad=0.03, hspace=0.0)
    _draw_distances(below.subplots(), found)
    return save(figure, path)


def _draw_distances(axes, found: list[dict]) -> None:
    places = np.arange(len(found))[::-1]
    for key, style, shift in (("unequal", SERIES["random"], -0.14), ("same", SERIES["own"], 0.14)):
        axes.errorbar([pair[key]["mean"] for pair in found], places + shift, xerr=[pair[key]["std"] for pair in found],
                      fmt=style["marker"], color=style["color"], markersize=4.5, linewidth=1.1, capsize=2.5,
                      label=f"{'the same' if key == 'same' else 'unequal'} noise")
    labels = [" –\n".join(shorten(name, 16) for name in pair["models"]) for pair in found]
    axes.set_yticks(places, labels, fontsize=6.5, linespacing=0.95)
    axes.set(ylim=(-0.6, len(found) - 0.4), xlabel="distance ‖a − b‖, mean ± standard deviation")
    axes.set_xlim(left=0)
    axes.xaxis.label.set_fontsize(7)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, borderaxespad=0.1, handletextpad=0.3)
    axes.grid(axis="x", color=PALE, linewidth=0.5)
    axes.set_axisbelow(True)


@matplotlib.rc_context(STYLE)
def draw_grid(images: list[list[Tensor]], labels: list[str], counts: list[int], side: int, path: Path) -> list[str]:
    """images[row][column]: (side², C, H, W), of the model labels[column] in counts[row] steps."""
    width = COLUMN if len(labels) <= 3 else PAGE
    cell = (width - 0.45) / max(len(labels), 2)
    words = [textwrap.fill(label, max(8, int(cell * 15))) for label in labels]
    lines = max(word.count("\n") + 1 for word in words)
    size = (0.45 + cell * len(labels), 0.2 + 0.13 * lines + (cell + 0.03) * len(counts))
    figure = Figure(size, layout="constrained")
    figure.get_layout_engine().set(h_pad=0.03, w_pad=0.03, hspace=0.0, wspace=0.0)
    axes = figure.subplots(len(counts), len(labels), squeeze=False)
    for row, of_row, count in zip(axes, images, counts, strict=True):
        for one, cell_images in zip(row, of_row, strict=True):
            show(one, tile(pixels(cell_images), side))
        row[0].set_ylabel(str(count), rotation=0, ha="right", va="center")
    for one, word in zip(axes[0], words, strict=True):
        one.set_title(word, fontsize=7.5, pad=3)
    figure.supylabel("steps", fontsize=8)
    return save(figure, path)


# ---------------------------------------------------------------------------------------------------
# Pairs in the plane
# ---------------------------------------------------------------------------------------------------


@matplotlib.rc_context(STYLE)
def draw_tsne(panels: list[dict], draws: int, path: Path) -> list[str]:
    """One panel above the other: {"name", "samples", "noises": (N, 2) each, "crossings"; "over_draws", "by_chance":
    mean, std}."""
    figure = Figure((COLUMN, 2.55 * len(panels) + 0.35), layout="constrained")
    figure.get_layout_engine().set(hspace=0.04)
    for one, panel in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
        x, z = np.array(panel["samples"]), np.array(panel["noises"])
        one.add_collection(LineCollection(np.stack([x, z], 1), colors=NOTE, linewidths=0.7, linestyles=(0, (4, 2.5))))
        one.scatter(*z.T, s=22, color=NOISE, marker="o", edgecolors="white", linewidths=0.4, zorder=3)
        one.scatter(*x.T, s=26, color=DATA, marker="^", edgecolors="white", linewidths=0.4, zorder=3)
        chance, usual = panel["by_chance"], panel["over_draws"]
        one.set_title(f"{shorten(panel['name'], 44)}: {panel['crossings']} crossings", loc="left", pad=13)
        of_draws = f"{counted(draws, 'draw')}: {usual['mean']:.0f} ± {usual['std']:.0f}; " if draws > 1 else ""
        one.text(0, 1.015, f"{of_draws}these points paired by chance: {chance['mean']:.0f} ± {chance['std']:.0f}",
                 transform=one.transAxes, fontsize=7, color=NOTE, va="bottom")
        one.margins(0.06)
        one.set(xlabel="t-SNE 1 (no unit)", ylabel="t-SNE 2 (no unit)", xticks=[], yticks=[])
    handles = [Line2D([], [], color=DATA, marker="^", linestyle="", markersize=5, label="sample"),
               Line2D([], [], color=NOISE, marker="o", linestyle="", markersize=5, label="noise"),
               Line2D([], [], color=NOTE, linewidth=0.7, linestyle=(0, (4, 2.5)), label="pair")]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, handletextpad=0.4)
    return save(figure, path)


# ---------------------------------------------------------------------------------------------------
# Paths and loss
# ---------------------------------------------------------------------------------------------------


@matplotlib.rc_context(STYLE)
def draw_paths(summary: list[dict], seeds: int, path: Path) -> list[str]:
    """A panel for each measure of `paths.summarize`, a line in it for each way of pairing."""
    has_bend = any("straightness" in row for row in summary)
    panels = [("path_length", "path length ‖x − z‖", 1), ("own_noise_nearest", "own noise is nearest, %", 100),
              ("inter_path_mean", "inter-path distance,\nall pairs of paths", 1),
              ("inter_path_minimum", "inter-path distance,\neach to its nearest", 1),
              ("inter_path_mean_t", "its time t*,\nall pairs of paths", 1),
              ("inter_path_minimum_t", "its time t*,\neach to its nearest", 1)]
    panels += [("straightness", "bend of learned paths\n(0 is straight)", 1)] if has_bend else []
    rows = -(-len(panels) // 2)
    figure = Figure((COLUMN, rows * (0.58 + 0.19 * len(summary)) + 0.25), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03, wspace=0.02, hspace=0.03)
    axes = figure.subplots(rows, 2, squeeze=False, sharey=True).ravel()
    places = range(len(summary))[::-1]
    for one, (key, title, factor) in zip(axes, panels, strict=False):
        for place, row in zip(places, summary, strict=True):
            if key in row:
                style = SERIES[kind_of(row["pairs"])]
                one.errorbar(factor * row[key]["mean"], place, xerr=factor * row[key]["std"] if seeds > 1 else None,
                             fmt=style["marker"], color=style["color"], markersize=4.5, linewidth=1, capsize=2)
            if key in row.get("over_random", ()):
                growth = f"{row['over_random'][key]['mean']:+.1%}".replace("-", "−")
                one.annotate(growth, (row[key]["mean"], place), (0, 3.2), textcoords="offset points", fontsize=6,
                             ha="center", va="bottom", color=NOTE)
        one.set_title(title, fontsize=7, pad=3, loc="left")
        one.set(ylim=(-0.6, len(summary) - 0.4))
        one.set_yticks(list(places), [shorten(row["pairs"], 17) for row in summary])
        one.grid(color=PALE, linewidth=0.5)
        one.set_axisbelow(True)
        one.locator_params(axis="x", nbins=3)
        one.margins(x=0.12)
        one.ticklabel_format(axis="x", useOffset=False)
        if key == "straightness":
            one.set_xlim(0, 1.3 * max(row[key]["mean"] + row[key]["std"] for row in summary if key in row) or 1)
    for one in axes[len(panels) :]:
        one.set_visible(False)
    spread = f"bars: standard deviation over {seeds} draws\n" if seeds > 1 else ""
    figure.supxlabel(f"{spread}±%: against random pairs of the same samples", fontsize=6.5, color=NOTE)
    return save(figure, path)


@matplotlib.rc_context(STYLE)
def draw_loss(times: list[float], curves: dict[str, dict], flow: str, path: Path) -> list[str]:
    """The loss at each time, mean and standard error, of each way of pairing. `curves`: see
    `paths.loss_by_time`."""
    figure = Figure((COLUMN, 2.6), layout="constrained")
    axes = figure.subplots()
    several = sum(kind_of(name) == "matched" for name in curves)
    matched = 0
    for name, curve in curves.items():
        style = dict(SERIES[kind_of(name)])
        if kind_of(name) == "matched":
            style["marker"] = "sDPXv*"[matched % 6]
            style["alpha"] = 1 if several == 1 else 0.45 + 0.55 * matched / (several - 1)
            matched += 1
        mean, error = np.array(curve["mean"]), np.array(curve["error"])
        label = {"random": "random pairs", "own": "the model's own pairs"}.get(name, f"match size {name[9:]}")
        axes.fill_between(times, mean - error, mean + error, color=style["color"], alpha=0.25, linewidth=0)
        axes.plot(times, mean, **style, markersize=3.2, linewidth=1.1, label=label)
    lowest = min(min(curve["mean"]) for curve in curves.values())
    highest = max(max(curve["mean"]) for curve in curves.values())
    if 0 < lowest * 12 < highest:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
    else:
        axes.set_ylim(bottom=0)
    target = "velocity x − z" if flow == "rectified" else "noise z"
    axes.set(xlim=(0, 1), xlabel="time t (0 is noise, 1 is data)", ylabel=f"mean squared error of the {target}")
    axes.yaxis.label.set_fontsize(7)
    axes.grid(color=PALE, linewidth=0.5)
    figure.legend(loc="outside upper center", ncols=2, frameon=False, handlelength=3)
    return save(figure, path)
