"""The files of a folder, each folder once, without hidden ones; and those of a pattern such as a-{000..009}.tar."""

import os
import re
from collections import Counter
from pathlib import Path, PurePath

from dansm import BadInput

RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")  # in braces, as WebDataset's users write it
HIDDEN, TWICE = "hidden", "linked twice"  # why something is passed over


def list_folder(source: Path) -> tuple[list[Path], Counter]:
    """All files below `source`, in the order of their names, and how many files and folders were passed over, by why.

    Links are followed, but no folder is read twice: neither one that holds `source`, nor one that several links lead
    to. A folder that lies below `source` is preferred to a link to it.
    """
    files, passed_over = [], Counter()
    seen = set(source.resolve().parents)
    folders, links = [source], []
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        if folder.resolve() in seen:
            passed_over[TWICE] += 1
            continue
        seen.add(folder.resolve())
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                is_link = entry.is_symlink()
                if is_hidden(entry.name):
                    passed_over[HIDDEN] += 1
                elif os.path.isdir(entry.path) if is_link else entry.is_dir():
                    (links if is_link else folders).append(Path(entry.path))
                elif is_link or entry.is_file():  # no pipe, which would make a reader wait for ever
                    files.append(Path(entry.path))
    return sorted(files), passed_over


def is_hidden(name: str) -> bool:
    """Whether a file or folder of that name is hidden. macOS puts ._x.png next to x.png, or into __MACOSX."""
    return (name.startswith(".") and name not in (".", "..")) or name == "__MACOSX"


def kind_of(path: PurePath) -> str:
    """A file that is passed over, by its suffix."""
    return path.suffix.lower() or "without a suffix"


def in_words(passed_over: Counter) -> str:
    """What was passed over and how often, as in "3 hidden, 12 .txt, 1 without a suffix"."""
    first = [reason for reason in (HIDDEN, TWICE) if passed_over[reason]]
    others = sorted(passed_over.keys() - {HIDDEN, TWICE}, key=lambda suffix: (-passed_over[suffix], suffix))
    return ", ".join(f"{passed_over[reason]:,} {reason}" for reason in first + others)


def in_braces(pattern: Path) -> list[Path]:
    """The files that a-{000..009}.tar names, in their order; none for a path that is there or has no such range.
    BadInput if some are missing."""
    bounds, files = RANGE.search(str(pattern)), []
    if not bounds or pattern.exists():
        return []
    for number in range(int(bounds[1]), int(bounds[2]) + 1):
        file = Path(RANGE.sub(f"{number:0{len(bounds[1])}}", str(pattern), count=1))
        more = in_braces(file)
        if not more and not file.is_file():
            raise BadInput(f"{file} is missing: expected all files that {pattern} names")
        files += more or [file]
    if not files:
        raise BadInput(f"{pattern} has the range {bounds[0]}: expected the lower number first")
    return files
