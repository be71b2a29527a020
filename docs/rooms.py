"""Draw docs/rooms.svg from the code, in `make docs`: each room with its files, above all that it imports."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path
from textwrap import wrap

ROOT = Path(__file__).parents[1]
FOLDERS = [ROOT / "tiny", *sorted(path.parent for path in ROOT.glob("scale/*/__init__.py"))]
FIRST = {"dansm.py": ROOT / "dansm.py"} | {folder.name: folder / "__init__.py" for folder in FOLDERS}
WIDE, GAP, LINE = 350, 16, 16  # pixels: a box, between boxes, a line of text
CHARACTERS = 52  # that fit a box
STYLE = """<style>rect{fill:#fff;stroke:#2b2d33}text{font:12px sans-serif;fill:#2b2d33}.name{font-weight:bold}
.files{fill:#3a5fa8}.uses{fill:#777;font-style:italic}</style>"""
LEGEND = ["A room uses rooms on the floors below alone. In blue its files, without .py.",
          "*: dansm.py asks for matching and commands when they are first used, and does without if it stands alone."]


def imported(folder):
    """The rooms that a folder's files import: ..base.files and dansm.scale.base.files are base, dansm is dansm.py."""
    code = "\n".join(path.read_text("utf-8") for path in folder.glob("*.py"))
    for module in re.findall(r"^ *(?:from|import) (?:dansm\b|\.\.)(\S*)", code, re.MULTILINE):
        yield next((part for part in module.split(".") if part in FIRST), "dansm.py")


def files_of(room):
    """The names of a room's files, or of what is in dansm.py."""
    if room == "dansm.py":
        return re.findall(r"^# -+ \d  (\w+)", FIRST[room].read_text("utf-8"), re.MULTILINE)
    names = [path.stem if path.suffix == ".py" else path.name for path in FIRST[room].parent.glob("*.*")]
    folders = {f"{path.parent.name}/*{path.suffix}" for path in FIRST[room].parent.glob("*/*.toml")}
    return sorted({*names, *folders} - {"__init__"})


def texts_of(room, uses):
    """(class, text) of each line in a room's box."""
    about = ast.get_docstring(ast.parse(FIRST[room].read_text("utf-8"))).partition("\n")[0]
    lazy = re.findall(r'scaled\("(\w+)', FIRST[room].read_text("utf-8")) if room == "dansm.py" else []
    names = sorted(uses) + [f"{other}*" for other in lazy]
    lines = [("name", str(FIRST[room].relative_to(ROOT)).removesuffix("__init__.py"))]
    lines += [("", line) for line in wrap(about, CHARACTERS)]
    lines += [("files", line) for line in wrap(", ".join(files_of(room)), CHARACTERS)]
    return lines + [("uses", line) for line in wrap("uses " + ", ".join(names), CHARACTERS)]


def drawing():
    uses = {"dansm.py": set()} | {folder.name: set(imported(folder)) - {folder.name} for folder in FOLDERS}
    floor = {}
    for room in TopologicalSorter(uses).static_order():  # raises an error that names an import circle
        floor[room] = max((floor[other] + 1 for other in uses[room]), default=0)
    width = (WIDE + GAP) * max(list(floor.values()).count(level) for level in floor.values()) + GAP
    y = GAP
    drawn = []
    for level in range(max(floor.values()), -1, -1):
        row = [room for room in uses if floor[room] == level]
        texts = [texts_of(room, uses[room]) for room in row]
        height = max(map(len, texts)) * LINE + 12
        for number, lines in enumerate(texts):
            x = (width - (WIDE + GAP) * len(row) + GAP) // 2 + (WIDE + GAP) * number
            drawn.append(f'<rect x="{x}" y="{y}" width="{WIDE}" height="{height}"/>')
            drawn += [f'<text class="{kind}" x="{x + 10}" y="{y + 20 + LINE * down}">{text}</text>'
                      for down, (kind, text) in enumerate(lines)]
        y += height + GAP
    drawn += [f'<text x="{GAP}" y="{y + 8 + LINE * down}">{line}</text>' for down, line in enumerate(LEGEND)]
    y += 8 + LINE * len(LEGEND)
    start = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y}">{STYLE}'
    return "\n".join([start, f'<rect width="{width}" height="{y}" style="stroke:none"/>', *drawn]) + "\n</svg>\n"


if __name__ == "__main__":
    (ROOT / "docs" / "rooms.svg").write_text(drawing(), "utf-8")
