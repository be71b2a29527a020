"""All images of a source decoded into one array: in memory, or in a folder that keeps it for the next call."""

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dansm import BadInput

from ..base.files import replacing, write_json
from ..base.locks import alone
from ..base.machine import check_memory
from ..base.text import with_bar
from .read import Source


class Decoded(NamedTuple):
    """All images of a source.

    array        (N, C, H, W)
    left_out     files that could not be read
    transparent  how many images let the background show through
    """

    array: np.ndarray
    left_out: list[Path]
    transparent: int


def _decode_all(source: Source, make_array: Callable[[tuple[int, ...], np.dtype], np.ndarray]) -> Decoded:
    """Decode every file into one array, which `make_array` makes once the shape is known."""
    array, missing = None, []
    with source.open() as (count, entries), closing(source.decoded(entries)) as parts:
        filled = np.zeros(count, bool)
        files = len(source.files) if source.holds_arrays and source.holds_latents else count
        for place, path, part, _ in with_bar(parts, "reading", files):
            if part is None:
                missing.append((place, path))
                continue
            if array is None:
                array = make_array((count, *part.shape[1:]), part.dtype)
            elif part.shape[1] > array.shape[1]:  # the first image in colour after grey ones
                grey, array = array, make_array((count, *part.shape[1:]), part.dtype)
                for before in np.flatnonzero(filled):
                    array[before] = grey[before]
            array[place : place + len(part)] = part
            filled[place : place + len(part)] = True
    if array is None:
        raise BadInput(f"{source.path} holds {len(missing)} files, none of them readable: expected images or latents")
    if missing:
        for to, place in enumerate(np.flatnonzero(filled)):
            array[to] = array[place]
    return Decoded(array[: filled.sum()], [path for _, path in sorted(missing)], len(source.transparent))


def decode_into_memory(source: Source) -> Decoded:
    """Decode all of a source. BadInput if it takes more than half of the free memory."""
    return _decode_all(source, partial(_make_in_memory, source.path))


def _make_in_memory(source: Path, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    what = f"{source} decoded, and as much again to work with (--cache keeps it on the disk, --size makes it smaller)"
    check_memory(what, 2 * int(np.prod(shape)) * dtype.itemsize, "cpu")
    return np.empty(shape, dtype)


def decode_into_cache(cache: Path, source: Source) -> Decoded:
    """What the folder `cache` holds of these very files, memory-mapped. What is missing is decoded into it first. Of
    several processes that ask at once one decodes, the others wait."""
    name = f"{source.path.resolve()} {source.reading}"
    key = hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=4).hexdigest()
    kept = cache / f"{source.path.name}-{source.reading.size or 'whole'}-{key}.npy"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with alone(kept.with_suffix(".lock")):
            if _find(kept, source) is None:
                _decode_into(kept, source)
            return _find(kept, source)
    except OSError as error:
        raise BadInput(f"the decoded images cannot be kept in {cache}: {error.strerror}; expected a folder that can be "
                       "written to (--cache)") from error


def _find(kept: Path, source: Source) -> Decoded | None:
    """What an earlier call has kept, None if it is of other files or not whole."""
    try:
        index = json.loads(kept.with_suffix(".json").read_text())
        array = np.load(kept, mmap_mode="c", allow_pickle=False)
        if index["digest"] != source.digest or (index["left_out"] and not source.skip_unreadable):
            return None
        left_out = [source.path / Path(path).relative_to(index["source"]) for path in index["left_out"]]
        return Decoded(array[: index["count"]], left_out, index["transparent"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _decode_into(kept: Path, source: Source) -> None:
    """Write the array, then its index. A kill in between leaves no index of another array."""
    digest = source.digest  # of the files as they are before they are decoded
    with replacing(kept) as part:
        array, left_out, transparent = _decode_all(source, partial(_make_on_disk, part))
        array.flush()
        kept.with_suffix(".json").unlink(missing_ok=True)
    write_json(kept.with_suffix(".json"), {
        "digest": digest, "source": str(source.path), "size": source.reading.size, "count": len(array),
        "transparent": transparent, "left_out": [str(path) for path in left_out]})


def _make_on_disk(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> np.memmap:
    """A memory-mapped array with all its room taken at once: a disk that fills up under a map ends the process."""
    path.unlink(missing_ok=True)  # an array that was made there stays whole for who reads it
    array = np.lib.format.open_memmap(path, "w+", dtype, shape=shape)
    try:
        with open(path, "r+b") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
            else:  # on macOS
                file.seek(array.offset)
                for start in range(0, array.nbytes, 2**24):
                    file.write(bytes(min(2**24, array.nbytes - start)))
    except OSError as error:
        raise BadInput(f"the decoded images take {array.nbytes / 1e9:,.1f} GB, {path.parent} has no room for them "
                       f"({error.strerror}): expected another --cache, or smaller images (--size)") from error
    return array
