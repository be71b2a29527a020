"""Decoded images kept on the disk: a memory-mapped array, next to an index of what it was made from."""

import hashlib
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from dansm import BadInput

from ..base.files import replacing, write_json
from ..base.locks import alone
from .read import Source

SHARED = Path("~/.cache/dansm/images")  # where processes of one machine find what one of them has decoded
OPTION = "--cache of dansm train"  # names another folder; other commands have no such option

Decoded = tuple[np.ndarray, list[Path]]  # (N, C, H, W), and the files that were left out


def cached(cache: Path, source: Source, decode: Callable[[Callable], Decoded]) -> Decoded:
    """What the folder `cache` holds of these very files, memory-mapped. What is missing is decoded into it first.

    decode(make_array) decodes the source into the array that make_array(shape, dtype) makes. Several processes may
    ask at once: one decodes, the others wait. Raises BadInput if the folder cannot be written to or the disk is full.
    """
    name = f"{source.path.resolve()} {source.size}"
    key = hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=4).hexdigest()
    kept = cache / f"{source.path.name}-{source.size or 'whole'}-{key}.npy"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with alone(kept.with_suffix(".lock")):
            if _find(kept, source) is None:
                _decode_into(kept, source, decode)
            return _find(kept, source)
    except OSError as error:
        raise BadInput(f"the decoded images cannot be kept in {cache}: {error.strerror}; expected a folder that can be "
                       f"written to ({OPTION})") from error


def _find(kept: Path, source: Source) -> Decoded | None:
    """What an earlier call has kept, None if it is of other files or not whole."""
    try:
        index = json.loads(kept.with_suffix(".json").read_text())
        array = np.load(kept, mmap_mode="c", allow_pickle=False)
        if index["digest"] != source.digest or (index["left_out"] and not source.skip_unreadable):
            return None
        return array[: index["count"]], [Path(path) for path in index["left_out"]]
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _decode_into(kept: Path, source: Source, decode: Callable[[Callable], Decoded]) -> None:
    """Write the array, then its index. A kill in between leaves no index of another array."""
    digest = source.digest  # of the files as they are before they are decoded
    with replacing(kept) as part:
        array, left_out = decode(partial(_make_on_disk, part, source))
        array.flush()
        kept.with_suffix(".json").unlink(missing_ok=True)
    write_json(kept.with_suffix(".json"), {
        "digest": digest, "source": str(source.path), "size": source.size, "count": len(array),
        "left_out": [str(path) for path in left_out]})


def _make_on_disk(path: Path, source: Source, shape: tuple[int, ...], dtype: np.dtype) -> np.memmap:
    """A memory-mapped array with all its room taken at once: a disk that fills up under a map ends the process."""
    array = np.lib.format.open_memmap(path, "w+", dtype, shape=shape)
    try:
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:
        raise BadInput(f"{source.path} takes {array.nbytes / 1e9:,.1f} GB decoded, for which {path.parent} has no room "
                       f"({error.strerror}): expected another folder ({OPTION}), or smaller images (--size)") from error
    return array
