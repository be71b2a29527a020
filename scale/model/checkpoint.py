"""Checkpoints: the last few in a run's folder, each written whole or not at all. Reading one runs no code from it and
refuses a changed bit."""

import hashlib
import os
import pickle
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import torch

from dansm import BadInput

from ..base.files import replacing
from ..base.machine import lacks_memory
from ..base.text import say, shorten
from .recipe import RENAMED

VERSION = 2
NAME = re.compile(r"checkpoint-(\d{8,})\.pt")
MARK = b"sha256:"  # the file ends in this and 64 hexadecimal digits, the checksum of all bytes before the digits
DIGITS = 64
BLOCK = 2**22  # bytes that are hashed at a time
EXPECTED = "expected what dansm train or dansm export wrote"


def save(out: Path, state: dict, keep: int = 3, *, drop: Collection[Path] = ()) -> Path:
    """Write `state` as checkpoint-<step>.pt into the folder `out` and return the file's path.

    state   tensors and plain values, see `RunFolder` and `FastTraining.state_dict`; samples come from the first average
    keep    how many checkpoints to keep, this one included; at least 1
    drop    checkpoints that do not lead to this one: those of another run, or damaged ones
    Older checkpoints stay until this one is on the disk. BadInput for a full or failing disk.
    """
    path = out / f"checkpoint-{state['training']['step']:08d}.pt"
    for unfinished in out.glob("checkpoint-*.partial"):  # of a process that was killed
        unfinished.unlink(missing_ok=True)
    write(path, state)
    newest_first = checkpoints(out)
    earlier = [other for other in newest_first[newest_first.index(path) + 1 :] if other not in drop]
    for other in newest_first:
        if other not in (path, *earlier[: keep - 1]):
            other.unlink(missing_ok=True)
    return path


def write(path: Path, state: dict) -> None:
    """Write `state` to the file `path`, whole or not at all, with a checksum as the zip archive's comment. Torch's own
    checksums leave out the archive's table of contents, where a changed bit can hide a tensor."""
    with replacing(path) as partial, open(partial, "w+b") as file:
        torch.save({"dansm": VERSION, **state}, file)
        file.seek(-2, os.SEEK_END)  # a zip archive ends in the comment's length and the comment
        file.write((len(MARK) + DIGITS).to_bytes(2, "little"))
        file.write(MARK)
        file.write(_digest(file, file.tell()))


def _digest(file: IO[bytes], size: int) -> bytes:
    """The SHA-256 of the first `size` bytes of a file, which is left at their end."""
    digest = hashlib.sha256()
    file.seek(0)
    for start in range(0, size, BLOCK):
        digest.update(file.read(min(BLOCK, size - start)))
    return digest.hexdigest().encode()


def checkpoints(out: Path) -> list[Path]:
    """The checkpoints in the folder `out`, newest first."""
    paths = [path for path in out.glob("checkpoint-*.pt") if NAME.fullmatch(path.name)]
    return sorted(paths, key=lambda path: int(NAME.fullmatch(path.name)[1]), reverse=True)


def newest(out: Path) -> Path | None:
    """The checkpoint of the most steps in the folder `out`, None where there is none."""
    return next(iter(checkpoints(out)), None)


def load_newest(out: Path) -> tuple[Path, dict] | None:
    """The newest checkpoint in the folder `out` that can be read: its path and its state. None where there is none at
    all. Damaged ones are named on the console. Raises BadInput if none can be read."""
    paths = checkpoints(out)
    for path in paths:
        try:
            return path, load(path)
        except BadInput as error:
            say(f"{error}; the checkpoint before it is tried")
    if paths:
        raise BadInput(f"{paths[0]} cannot be used, nor any checkpoint before it: {EXPECTED}")
    return None


def load(path: Path) -> dict:
    """The state in the file `path`, with its tensors on the CPU. No code in the file is run. Raises BadInput for
    anything but a checkpoint that is to the last bit as it was written."""
    with reading(path):
        state = as_written(path)
        if state["dansm"] != VERSION:
            raise BadInput(f"it is of version {state['dansm']!r:.20}, not {VERSION}")
        recipe = {RENAMED.get(name) or name: value for name, value in state["recipe"].items()}
        return state | {"recipe": recipe}


def as_written(path: Path) -> dict:
    """What `write` wrote to the file `path`, its tensors on the CPU. It raises many kinds of errors, see `reading`."""
    with open(path, "rb") as file:
        size = max(0, file.seek(0, os.SEEK_END) - DIGITS)
        if _digest(file, size) != file.read():
            raise BadInput("its checksum is wrong or missing")
    return torch.load(path, map_location="cpu", weights_only=True)


def recipe_in(out: Path) -> dict | None:
    """The recipe of the newest checkpoint in the folder `out` whose recipe can be read; its tensors are not read. None
    where there is none."""
    for path in checkpoints(out):
        with suppress(BadInput), reading(path):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)["recipe"]
    return None


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Raise BadInput with the path for whatever the block raises because a part of the file `path` is not as expected.
    A lack of memory is not the file's fault and stays the error it is."""
    try:
        yield
    except (OSError, LookupError, TypeError, ValueError, AttributeError, RuntimeError, pickle.UnpicklingError) as error:
        if lacks_memory(error) or (isinstance(error, BadInput) and str(path) in str(error)):
            raise
        if isinstance(error, BadInput) and ": expected " in str(error):
            raise BadInput(f"{path} cannot be used: {error}") from error
        reason = getattr(error, "strerror", None) or shorten(" ".join(str(error).split()), 200)
        raise BadInput(f"{path} cannot be used ({reason}): {EXPECTED}") from error
