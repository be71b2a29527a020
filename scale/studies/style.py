"""One style for all figures: a column of a paper wide, clear in grey too, saved as PNG and SVG."""

import io
import re
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from ..base.colours import INK, MATCHED, NOTE, RANDOM
from ..base.files import replacing

COLUMN, PAGE = 3.4, 7.0  # inches: one column of a two-column paper, and the whole page
STYLE = {"font.family": "DejaVu Sans", "font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "xtick.labelsize": 7,
         "ytick.labelsize": 7, "legend.fontsize": 7, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": NOTE,
         "xtick.color": NOTE, "ytick.color": NOTE, "xtick.labelcolor": INK, "ytick.labelcolor": INK,
         "axes.linewidth": 0.6, "xtick.major.width": 0.6, "ytick.major.width": 0.6, "axes.spines.top": False,
         "axes.spines.right": False, "figure.facecolor": "white"}
# The pairs that figures compare differ in colour, lightness, marker and dashes.
SERIES = {"random": dict(color=RANDOM, marker="o", linestyle=(0, (4, 2))),
          "matched": dict(color=MATCHED, marker="s", linestyle="-"),
          "own": dict(color=INK, marker="^", linestyle=(0, (1, 1.2)))}


def save(figure: Figure, path: Path) -> list[str]:
    """Write path.png and path.svg, the same bytes for the same figure, and return their names."""
    png, svg = (path.with_name(f"{path.name}.{kind}") for kind in ("png", "svg"))
    with replacing(png) as partial:
        figure.savefig(partial, format="png", dpi=200)
    drawing = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": path.name}):  # without one, ids are random
        figure.savefig(drawing, format="svg", metadata={"Date": None})
    # Clip paths are named by hashes of their places, whose last bits differ between two calls of the layout.
    names = dict.fromkeys(re.findall(r"url\(#(p\w{10})\)", drawing.getvalue()))
    numbers = {name: f"clip{number}" for number, name in enumerate(names)}
    with replacing(svg) as partial:
        numbered = re.sub(r"\bp\w{10}\b", lambda name: numbers.get(name[0], name[0]), drawing.getvalue())
        partial.write_text(numbered, encoding="utf-8")
    return [png.name, svg.name]
