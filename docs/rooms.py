"""Draw docs/rooms.svg from the imports in the code, in `make docs`. An arrow points from a room to one that it imports;
one that follows from two others is left out. Dashed: lazily."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path
from textwrap import wrap

ROOT = Path(__file__).parents[1]
FOLDERS = [ROOT / "tiny", *sorted(path.parent for path in ROOT.glob("scale/*/__init__.py"))]
FILES = {"dansm.py": ROOT / "dansm.py"} | {folder.name: folder / "__init__.py" for folder in FOLDERS}
WIDE, HIGH, ACROSS, DOWN = 330, 64, 350, 92  # pixels: a box, and from one box to the next
STYLE = """<style>rect{fill:#fff;stroke:#2b2d33}text{font:12px sans-serif;fill:#2b2d33}.name{font:bold 14px sans-serif}
path{stroke:#999;fill:none;marker-end:url(#a)}.lazy{stroke-dasharray:3 4}</style><marker id="a" markerWidth="8"
markerHeight="8" refX="6" refY="3" orient="auto"><path d="M0 0L6 3L0 6z" style="fill:#999;marker-end:none"/></marker>"""


def imported(folder):
    """The rooms that a folder's files import: ..base.files and dansm.scale.base.files are base, dansm is dansm.py."""
    code = "\n".join(path.read_text("utf-8") for path in folder.glob("*.py"))
    for module in re.findall(r"^ *(?:from|import) (?:dansm\b|\.\.)(\S*)", code, re.MULTILINE):
        yield next((part for part in module.split(".") if part in FILES), "dansm.py")


def drawing():
    uses = {"dansm.py": set()} | {folder.name: set(imported(folder)) - {folder.name} for folder in FOLDERS}
    lazy = re.findall(r'scaled\("(\w+)', FILES["dansm.py"].read_text("utf-8"))
    reached, floor = {}, {}
    for room in TopologicalSorter(uses).static_order():  # raises an error that names an import circle
        reached[room] = uses[room].union(*(reached[other] for other in uses[room]))
        floor[room] = max((floor[other] + 1 for other in uses[room]), default=0)
    rows = [[room for room in uses if floor[room] == level] for level in range(max(floor.values()), -1, -1)]
    width = ACROSS * max(map(len, rows))
    place = {room: ((width + ACROSS * (2 * number - len(row))) // 2 + 10, DOWN * down + 10)
             for down, row in enumerate(rows) for number, room in enumerate(row)}
    start_x, start_y = place["dansm.py"]
    lines = []
    for room, (x, y) in place.items():
        for other in sorted(uses[room] - set().union(*(reached[other] for other in uses[room]))):
            to_x, to_y = place[other]
            lines.insert(0, f'<path d="M{x + WIDE // 2} {y + HIGH}L{to_x + WIDE // 2} {to_y - 3}"/>')
        if room in lazy:
            lines.insert(0, f'<path class="lazy" d="M{start_x + 300} {start_y}L{x + 300} {y + HIGH + 3}"/>')
        summary = wrap(ast.get_docstring(ast.parse(FILES[room].read_text("utf-8"))).partition("\n")[0], 50, max_lines=2)
        texts = "".join(f'<text x="10" y="{38 + 16 * number}">{line}</text>' for number, line in enumerate(summary))
        lines.append(f'<g transform="translate({x} {y})"><rect width="{WIDE}" height="{HIGH}"/>'
                     f'<text class="name" x="10" y="20">{room}</text>{texts}</g>')
    lines.insert(0, f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {DOWN * len(rows)}">{STYLE}')
    return "\n".join(lines) + "\n</svg>\n"


if __name__ == "__main__":
    (ROOT / "docs" / "rooms.svg").write_text(drawing(), "utf-8")
