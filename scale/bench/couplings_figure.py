"""The figure of dansm bench couplings: what a coupling gains against what a batch costs."""

import math
from itertools import product
from pathlib import Path

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from matplotlib.transforms import Bbox

from ..base.colours import INK, MATCHED, NOTE, OPTIMAL, PALE, POOLS, RANDOM, SEMIDISCRETE
from ..studies.style import PAGE, STYLE, save

EXACT = 1e-3  # p from which noises count as N(0, I): of a thousand exact couplings at most one has less
FAMILIES = {"random": (RANDOM, "o"), "nearest": (NOTE, "v"), "assigned": (OPTIMAL, "D"), "c2ot": (OPTIMAL, "P"),
            "sinkhorn": (OPTIMAL, "X"), "pool": (MATCHED, "s"), "coarse": (POOLS[1000], "s"),
            "semidiscrete": (SEMIDISCRETE, "^"), "own": (INK, "*")}
LABEL = 6.5  # points
NEAR = [(math.cos(angle), math.sin(angle)) for angle in (0, math.pi, 0.6, -0.6, 2.5, -2.5, math.pi / 2, -math.pi / 2)]


@matplotlib.rc_context(STYLE)
def draw(bench: dict, path: Path) -> list[str]:
    """Write path.png and path.svg from what `clock.run` returned: a mark for each row, filled as far as its noises are
    N(0, I), and its name next to it."""
    figure = Figure((PAGE, 4.4), layout="constrained")
    FigureCanvasAgg(figure)  # tells how large texts are
    axes = figure.subplots()
    rows = bench["rows"]
    for row in rows:
        colour, marker = FAMILIES[row["family"]]
        axes.plot(row["batch_mean_ms"], 100 * row["gain_share"], marker, color=colour, markersize=6.5,
                  fillstyle=filled(row), markerfacecoloralt="white", markeredgewidth=1.2)
    axes.axhline(0, color=PALE, linewidth=0.8, zorder=0)
    axes.axhline(100, color=PALE, linewidth=0.8, zorder=0)
    axes.set(xscale="log", xlabel=f"milliseconds for a batch of {bench['batch']}, mean over whole pools",
             ylabel=f"gain in ⟨x, z⟩, % of an assignment over {bench['optimal_of']:,}")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.12, y=0.08)
    axes.set_title(f"{bench['title']}. Better: up and to the left\nfilled: noises are N(0, I) in a batch and over a "
                   "whole pool; half: over a whole pool alone; hollow: in neither", loc="left", fontsize=7)
    figure.draw_without_rendering()  # which settles where the axes are
    figure.set_layout_engine("none")
    name_marks(axes, rows)
    return save(figure, path)


def filled(row: dict) -> str:
    """How to fill the mark of a row: "full", "bottom" where batches are not N(0, I), or "none"."""
    batch, life = (row[name] is None or row[name] >= EXACT for name in ("batch_p", "life_p"))
    return "none" if not life else "full" if batch else "bottom"


def name_marks(axes, rows: list[dict]) -> None:
    """Write the name of each row next to its mark, or at the end of a line where others are in the way."""
    point = axes.figure.dpi / 72  # pixels
    marks = [axes.transData.transform((row["batch_mean_ms"], 100 * row["gain_share"])) for row in rows]
    taken = [Bbox.from_bounds(x - 4 * point, y - 4 * point, 8 * point, 8 * point) for x, y in marks]
    for row, (x, y) in sorted(zip(rows, marks, strict=True), key=lambda pair: -pair[1][1]):
        text = axes.annotate(row["coupling"], (row["batch_mean_ms"], 100 * row["gain_share"]), (0, 0),
                             textcoords="offset points", fontsize=LABEL, ha="center", va="center", zorder=1.5,
                             bbox={"facecolor": "white", "edgecolor": "none", "pad": 0})
        size = text.get_window_extent()
        found = [place(x, y, size, distance * point, way, taken, axes.bbox)
                 for distance, way in product((7, 14, 24, 36, 50, 66), NEAR)]
        _, distance, box = min(found, key=lambda place: place[0])
        taken.append(box)
        middle = (box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2
        text.set_position(((middle[0] - x) / point, (middle[1] - y) / point))
        if distance > 10 * point:
            end = min(max(x, box.x0), box.x1), min(max(y, box.y0), box.y1)
            axes.plot(*zip(*axes.transData.inverted().transform([(x, y), end]), strict=True), color=NOTE, linewidth=0.5,
                      zorder=1, scalex=False, scaley=False)


def place(x: float, y: float, size: Bbox, distance: float, way: tuple[float, float], taken: list[Bbox],
          inside: Bbox) -> tuple[float, float, Bbox]:
    """A box of this size in one direction from a mark, its distance, and how bad it is: pixels that it shares with
    others or has outside, before its distance."""
    right, up = way
    centre_x = x + right * (distance + size.width / 2 * abs(right) ** 0.5)
    centre_y = y + up * (distance + size.height / 2)
    box = Bbox.from_bounds(centre_x - size.width / 2, centre_y - size.height / 2, size.width, size.height)
    shared = sum(area for other in taken if (common := Bbox.intersection(box, other)) and (area := common.width
                                                                                           * common.height))
    within = Bbox.intersection(box, inside)
    outside = size.width * size.height - (within.width * within.height if within else 0)
    return 1e3 * (shared + outside) + distance, distance, box
