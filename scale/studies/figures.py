"""The figures of dansm compare, grid, tsne, paths and loss. Each writes path.png and .svg, and returns their names."""

import textwrap
from itertools import cycle
from pathlib import Path

import matplotlib
import numpy as np
import torch.nn.functional as F
from einops import rearrange
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from torch import Tensor

from ..base.colours import DATA, NOISE, NOTE, PALE
from ..base.text import counted, shorten
from ..data.pixels import to_uint8
from ..model.load import Model
from .style import COLUMN, PAGE, SERIES, STYLE, save

LINE = dict(linewidth=0.7, linestyle=(0, (4, 2.5)))  # between a noise and its sample
DOT = dict(edgecolors="white", linewidths=0.4, zorder=3)
MATCHED_MARKERS = "sDPXv*"
PANELS = {"path_length": "path length ‖x − z‖", "own_noise_nearest": "own noise is nearest, %",
          "inter_path_mean": "inter-path distance,\nall pairs of paths",
          "inter_path_minimum": "inter-path distance,\neach to its nearest",
          "inter_path_mean_t": "its time t*,\nall pairs of paths",
          "inter_path_minimum_t": "its time t*,\neach to its nearest",
          "straightness": "bend of learned paths\n(0 is straight)"}


def show_images(axes, images: Tensor, columns: int, gap: int = 1) -> None:
    """Show images, (N, C, H, W) in [−1, 1] of one channel or three, in full rows with white lines of `gap` pixels
    between them and without axes; their pixels stay squares, in the SVG too."""
    framed = F.pad(to_uint8(images.cpu()), (0, gap, 0, gap), value=255)
    page = rearrange(framed, "(rows columns) c h w -> (rows h) (columns w) c", columns=columns)[:-gap, :-gap]
    axes.imshow(page.expand(-1, -1, 3).numpy(), interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def name_rows(axes, names: list[str], rows: int, height: int) -> None:
    """The first names beside rows, of this height in pixels each, of `show_images`."""
    shown = [textwrap.shorten(name, 16, placeholder="…") for name in names[:rows]]
    axes.set_yticks([height * row + height / 2 - 1 for row in range(rows)], shown, fontsize=5)
    axes.tick_params(axis="y", length=0, pad=1.5)


@matplotlib.rc_context(STYLE)
def draw_compare(models: list[Model], images: list[Tensor], z: Tensor, pairs: list[dict], path: Path) -> list[str]:
    """Above, a column for each noise z (N, C, H, W): what each model makes of it, unless it makes latents. Below, the
    distances of `commands.compare.compare_images`."""
    rows = [("the noise of each column", (z / 3).clamp(-1, 1))] if models[0].draws_images else []
    rows += [(model.label, x) for model, x in zip(models, images, strict=True) if model.draws_images]
    heights = [((COLUMN - 0.1) / len(z) + 0.19) * len(rows), 0.65 + 0.32 * len(pairs)]
    figure = Figure((COLUMN, sum(heights)), layout="constrained")
    below = figure
    if rows:
        above, below = figure.subfigures(2, 1, height_ratios=heights)
        for axes, (label, row) in zip(above.subplots(len(rows), 1), rows, strict=True):
            show_images(axes, row, len(row), gap=2)
            axes.set_title(shorten(label, 58), loc="left", pad=2, fontsize=7)
    figure.get_layout_engine().set(h_pad=0.015, w_pad=0.03, hspace=0.0)
    draw_distances(below.subplots(), pairs)
    return save(figure, path)


def draw_distances(axes, pairs: list[dict]) -> None:
    places = np.arange(len(pairs))[::-1]
    for key, label, style, shift in (("unequal", "unequal noise", SERIES["random"], -0.14),
                                     ("same", "the same noise", SERIES["own"], 0.14)):
        means, stds = ([pair[key][part] for pair in pairs] for part in ("mean", "std"))
        axes.errorbar(means, places + shift, xerr=stds, fmt=style["marker"], color=style["color"],
                      markersize=4.5, linewidth=1.1, capsize=2.5, label=label)
    labels = [" –\n".join(shorten(name, 16) for name in pair["models"]) for pair in pairs]
    axes.set_yticks(places, labels, fontsize=6.5, linespacing=0.95)
    axes.set_ylim(-0.6, len(pairs) - 0.4)
    axes.set_xlim(left=0)
    axes.set_xlabel("distance ‖a − b‖, mean ± standard deviation", fontsize=7)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, borderaxespad=0.1, handletextpad=0.3)
    axes.grid(axis="x", color=PALE, linewidth=0.5)
    axes.set_axisbelow(True)


@matplotlib.rc_context(STYLE)
def draw_grid(images: list[Tensor], models: list[Model], counts: list[int], side: int, path: Path) -> list[str]:
    """Rows of steps, columns of models. images: (rows · side, C, H, W) each, row by row."""
    width = COLUMN if len(models) <= 3 else PAGE
    left = 0.95 if any(model.classes for model in models) else 0.45  # where counts and names are
    cell = (width - left) / max(len(models), 2)
    titles = [textwrap.fill(model.label, max(8, int(cell * 15))) for model in models]
    lines = max(title.count("\n") + 1 for title in titles)
    tall = cell * max(map(len, images)) / side**2
    size = (left + cell * len(models), 0.2 + 0.13 * lines + (tall + 0.03) * len(counts))
    figure = Figure(size, layout="constrained")
    figure.get_layout_engine().set(h_pad=0.03, w_pad=0.03, hspace=0.0, wspace=0.0)
    panels = figure.subplots(len(counts), len(models), squeeze=False)
    named = next((column for column, model in enumerate(models) if model.classes), None)
    for place, (axes, cell_images) in enumerate(zip(panels.flat, images, strict=True)):
        show_images(axes, cell_images, side)
        if place % len(models) == named:  # the first of the models that have a row for each class
            name_rows(axes, models[named].classes, len(cell_images) // side, cell_images.shape[2] + 1)
    for axes, count in zip(panels[:, 0], counts, strict=True):
        axes.set_ylabel(str(count), rotation=0, ha="right", va="center")
    for axes, title in zip(panels[0], titles, strict=True):
        axes.set_title(title, fontsize=7.5, pad=3)
    figure.supylabel("steps", fontsize=8)
    return save(figure, path)


@matplotlib.rc_context(STYLE)
def draw_tsne(panels: list[dict], draws: int, path: Path) -> list[str]:
    """One panel above the other: {"name", "samples", "noises": (N, 2) each, "crossings"; "over_draws", "by_chance":
    mean, std}."""
    figure = Figure((COLUMN, 2.55 * len(panels) + 0.35), layout="constrained")
    figure.get_layout_engine().set(hspace=0.04)
    for axes, panel in zip(figure.subplots(len(panels), 1), panels, strict=True):
        x, z = np.array(panel["samples"]), np.array(panel["noises"])
        axes.add_collection(LineCollection(np.stack([x, z], 1), colors=NOTE, label="pair", **LINE))
        axes.scatter(*z.T, s=22, color=NOISE, marker="o", label="noise", **DOT)
        axes.scatter(*x.T, s=26, color=DATA, marker="^", label="sample", **DOT)
        axes.set_title(f"{shorten(panel['name'], 44)}: {panel['crossings']} crossings", loc="left", pad=13)
        note = "these points paired by chance: {mean:.0f} ± {std:.0f}".format(**panel["by_chance"])
        note = counted(draws, "draw") + ": {mean:.0f} ± {std:.0f}; ".format(**panel["over_draws"]) + note
        axes.text(0, 1.015, note, transform=axes.transAxes, fontsize=7, color=NOTE, va="bottom")
        axes.margins(0.06)
        axes.set(xlabel="t-SNE 1 (no unit)", ylabel="t-SNE 2 (no unit)", xticks=[], yticks=[])
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False,
                  handletextpad=0.4)
    return save(figure, path)


@matplotlib.rc_context(STYLE)
def draw_paths(summary: list[dict], seeds: int, path: Path) -> list[str]:
    """A panel for each measure of the summary of `dansm paths`, a line in it for each way of pairing."""
    panels = [key for key in PANELS if any(key in row for row in summary)]
    lines = -(-len(panels) // 2)
    figure = Figure((COLUMN, lines * (0.58 + 0.19 * len(summary)) + 0.25), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03, wspace=0.02, hspace=0.03)
    all_axes = figure.subplots(lines, 2, sharey=True).ravel()
    for axes, key in zip(all_axes, panels, strict=False):
        draw_measure(axes, key, summary, seeds)
    for axes in all_axes[len(panels) :]:
        axes.set_visible(False)
    spread = f"bars: standard deviation over {seeds} draws\n" if seeds > 1 else ""
    figure.supxlabel(f"{spread}±%: against random pairs of the same samples", fontsize=6.5, color=NOTE)
    return save(figure, path)


def draw_measure(axes, key: str, summary: list[dict], seeds: int) -> None:
    places = range(len(summary))[::-1]
    factor = 100 if key == "own_noise_nearest" else 1
    for place, row in zip(places, summary, strict=True):
        if key in row:
            look = SERIES[row["pairs"].partition(",")[0]]
            mean, std = (factor * row[key][part] for part in ("mean", "std"))
            axes.errorbar(mean, place, xerr=std if seeds > 1 else None, fmt=look["marker"], color=look["color"],
                          markersize=4.5, linewidth=1, capsize=2)
        if key in row.get("over_random", ()):
            growth = f"{row['over_random'][key]['mean']:+.1%}".replace("-", "−")
            axes.annotate(growth, (row[key]["mean"], place), (0, 3.2), textcoords="offset points", fontsize=6,
                          ha="center", va="bottom", color=NOTE)
    axes.set_title(PANELS[key], fontsize=7, pad=3, loc="left")
    axes.set_ylim(-0.6, len(summary) - 0.4)
    axes.set_yticks(list(places), [shorten(row["pairs"], 17) for row in summary])
    axes.grid(color=PALE, linewidth=0.5)
    axes.set_axisbelow(True)
    axes.locator_params(axis="x", nbins=3)
    axes.margins(x=0.12)
    axes.ticklabel_format(axis="x", useOffset=False)
    if key == "straightness":
        axes.set_xlim(0, 1.3 * max(row[key]["mean"] + row[key]["std"] for row in summary if key in row) or 1)


@matplotlib.rc_context(STYLE)
def draw_loss(times: list[float], curves: dict[str, dict], flow: str, path: Path) -> list[str]:
    """The loss at each time, mean and standard error, of each way of pairing. `curves`: see `loss_by_time`."""
    figure = Figure((COLUMN, 2.6), layout="constrained")
    axes = figure.subplots()
    markers, alphas = cycle(MATCHED_MARKERS), iter(np.linspace(1, 0.45, max(1, len(curves) - 2))[::-1])
    for name, curve in curves.items():
        kind, _, size = name.partition(", ")
        look = dict(SERIES[kind])
        label = {"random": "random pairs", "own": "the model's own pairs", "matched": f"match size {size}"}[kind]
        if kind == "matched":
            look |= {"marker": next(markers), "alpha": next(alphas)}
        mean, error = np.array(curve["mean"]), np.array(curve["error"])
        axes.fill_between(times, mean - error, mean + error, color=look["color"], alpha=0.25, linewidth=0)
        axes.plot(times, mean, **look, markersize=3.2, linewidth=1.1, label=label)
    means = [mean for curve in curves.values() for mean in curve["mean"]]
    if 0 < min(means) * 12 < max(means):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
    else:
        axes.set_ylim(bottom=0)
    target = "velocity x − z" if flow == "rectified" else "noise z"
    axes.set(xlim=(0, 1), xlabel="time t (0 is noise, 1 is data)")
    axes.set_ylabel(f"mean squared error of the {target}", fontsize=7)
    axes.grid(color=PALE, linewidth=0.5)
    figure.legend(loc="outside upper center", ncols=2, frameon=False, handlelength=3)
    return save(figure, path)
