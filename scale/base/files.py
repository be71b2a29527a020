"""Files that are written whole or not at all, and the folders they go into."""

import csv
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dansm import BadInput


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path next to `path` to write to, and move it into place when the block ends.

    The content is on the disk before the move, so that a kill or a power cut leaves the old file or the new one. If
    the block raises, the old file stays. BadInput for a full or failing disk.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        _flush(partial)
        os.replace(partial, path)
        _flush(path.parent)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if (failure := _disk_failure(error)) is None:
            raise
        raise BadInput(f"{path} cannot be written: {failure.strerror or failure}; what was saved before it is "
                       "untouched") from error


def _flush(path: Path) -> None:
    """Bring a file's content, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _disk_failure(error: BaseException) -> OSError | None:
    """The disk's own error, if that is what stopped the writing. Torch raises a RuntimeError of its own over it."""
    if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
        return error.__context__
    return error if isinstance(error, OSError) else None


def write_json(path: Path, content: dict) -> None:
    with replacing(path) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """The names and values in a JSON file. BadInput, naming the file, if it holds none."""
    try:
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError("no names in it")
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} cannot be read ({error}): expected names and values in JSON") from error
    return content


def write_csv(path: Path, rows: list[dict]) -> None:
    """Write a table with a column for every name that any row has."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with replacing(path) as partial, open(partial, "w", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a table, empty where there is no file."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def make_folder(path: Path, option: str = "--out") -> Path:
    """Make the folder if it is missing and return it. BadInput, naming the option, if it cannot be written to."""
    probe = path / ".writable"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink(missing_ok=True)  # another process may have been faster
    except (FileExistsError, NotADirectoryError) as error:
        file = next(part for part in (path, *path.parents) if part.exists())
        raise BadInput(f"{option} is {path}: {file} is a file, expected a folder") from error
    except OSError as error:
        raise BadInput(f"{option} is {path}: not writable ({error.strerror}), expected a folder that is") from error
    return path
