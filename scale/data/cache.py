"""What was decoded, kept on the disk: an array that is memory-mapped, beside an index of what it was made from."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from dansm import BadInput

from ..base.locks import alone

try:
    import fcntl
except ImportError:  # not on Windows, where two runs must not decode into one cache at once
    fcntl = None

VERSION = 1  # of what a cache holds; another one is decoded anew
SHARED = Path("~/.cache/dansm/images")  # where processes of one machine find what one of them has decoded
OPTION = "--cache of dansm train"  # that names another: there are commands without it, and runs that were given none


def cached(cache: Path, source: Path, files: list[Path], size: int | None, skip_unreadable: bool,
           left_out: list[Path], decode: Callable) -> np.ndarray:
    """What the folder `cache` holds of these very files, memory-mapped; decoded into it first if it does not.

    decode(left_out, make_array) decodes them into the array (N, C, H, W) that make_array(source, shape, dtype) makes,
    returns its part that is filled and adds to left_out the files it left out. Raises BadInput for a folder that
    cannot be written to, and for a full disk.
    """
    kept, digest = _place(cache, source, size), digest_of_files(source, files, size)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with alone(kept.with_suffix(".lock")):
            if (found := _look_up(kept, digest, skip_unreadable, left_out)) is None:
                made_from = {"digest": digest, "source": str(source), "size": size, "files": len(files)}
                _keep(kept, made_from, left_out, decode)
                found = _look_up(kept, digest, skip_unreadable, [])
        return found
    except OSError as error:
        raise BadInput(f"the decoded images cannot be kept in {cache}: {error.strerror}; expected a folder that can be "
                       f"written to, on a disk with room ({OPTION})") from error


def find_cached(cache: Path, source: Path, files: list[Path], size: int | None, skip_unreadable: bool,
                left_out: list[Path]) -> np.ndarray | None:
    """What an earlier call of `cached` has kept of these very files, None if there is nothing. Nothing is written."""
    kept = _place(cache, source, size)
    if not os.path.exists(kept.with_suffix(".json")):  # without a look at each of a million files
        return None
    return _look_up(kept, digest_of_files(source, files, size), skip_unreadable, left_out)


def _place(cache: Path, source: Path, size: int | None) -> Path:
    key = hashlib.blake2b(f"{source.resolve()} {size}".encode(errors="surrogateescape"), digest_size=4).hexdigest()
    return cache / f"{source.name}-{size or 'whole'}-{key}.npy"


def digest_of_files(source: Path, files: list[Path], size: int | None) -> str:
    """Another one as soon as a file is added, removed, renamed or written to."""
    digest = hashlib.blake2b(f"{VERSION} {size}".encode(), digest_size=16)
    for path in files:
        known = path.stat()
        name = str(path)[len(str(source)):]  # the same however the source was named
        digest.update(f"{name}\0{known.st_size}\0{known.st_mtime_ns}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _look_up(kept: Path, digest, skip_unreadable, left_out) -> np.ndarray | None:
    """The array of an earlier call, or None if it is of other files or not whole."""
    try:
        index = json.loads(kept.with_suffix(".json").read_text())
        array = np.load(kept, mmap_mode="c", allow_pickle=False)
        if index["digest"] != digest or (index["left_out"] and not skip_unreadable):
            return None
        if [*array.shape] != index["shape"] or str(array.dtype) != index["dtype"]:
            return None
        left_out += [Path(path) for path in index["left_out"]]
        return array[: index["count"]]
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _keep(kept: Path, made_from: dict, left_out, decode) -> None:
    """Decode into a file beside `kept`, then rename it; the index is written last, so that a kill leaves none."""
    partly, index, missing = kept.with_suffix(".partial"), kept.with_suffix(".json"), []
    try:
        array = decode(missing, partial(_on_disk, partly))
        array.flush()
        whole = np.load(partly, mmap_mode="r")
        index.unlink(missing_ok=True)
        os.replace(partly, kept)
        partly.write_text(json.dumps({
            **made_from, "count": len(array), "shape": whole.shape, "dtype": str(whole.dtype),
            "left_out": [str(path) for path in missing]}))
        os.replace(partly, index)
    finally:
        partly.unlink(missing_ok=True)
    left_out += missing


def _on_disk(path: Path, source: Path, shape: tuple[int, ...], dtype) -> np.memmap:
    """A memory-mapped array with all its room taken at once: a disk that fills up under a map ends the process.
    BadInput at once, before anything is written, where there is not so much room."""
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {
            "descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape})
        needed = int(np.prod(shape)) * dtype.itemsize
        if needed > (free := shutil.disk_usage(path.parent).free):
            raise BadInput(f"{source} takes {needed / 1e9:,.1f} GB decoded, and the disk of {path.parent} has "
                           f"{free / 1e9:,.1f} GB free: expected a folder with room for it ({OPTION}), or smaller "
                           "images (--size)")
        if hasattr(os, "posix_fallocate"):
            file.flush()
            os.posix_fallocate(file.fileno(), 0, file.tell() + needed)
        else:
            for start in range(0, needed, 2**24):
                file.write(bytes(min(2**24, needed - start)))
    return np.load(path, mmap_mode="r+")
