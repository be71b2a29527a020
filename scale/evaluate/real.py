"""What is known of real images and kept between calls: features by the pixels they are of, pixels by the files they
were read from. Files that have changed are read anew; the same pixels in other files have the same features."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dansm import BadInput

from ..base.files import write_json
from ..base.locks import alone
from ..base.text import say
from ..base.threads import ahead
from ..data.loader import Stream

DIGEST = 16  # bytes of an image's: 48 MB for three million
AT_ONCE = 256  # images of which a thread takes the digests


class Pixels(NamedTuple):
    """The digest of all pixels in their order, how many images that is, and (C, H, W) of each."""

    digest: str
    count: int
    shape: tuple[int, int, int]


class Real(NamedTuple):
    """What is known of the real images: count of them, mean (D,) and covariance (D, D) of their features in float64,
    and the features (M, D) float32 of some of them, chosen at random. `digest` is that of images and extractor."""

    digest: str
    count: int
    mean: np.ndarray
    covariance: np.ndarray
    features: Tensor


# ------------------------------------------------------------------------------- pixels


def digest_of_image(image: np.ndarray) -> np.ndarray:
    """(DIGEST,) uint8"""
    digest = hashlib.blake2b(np.ascontiguousarray(image), digest_size=DIGEST).digest()
    return np.frombuffer(digest, np.uint8)


def digests_of(images: np.ndarray) -> np.ndarray:
    """Those of each image, (N, DIGEST) uint8, in threads and in parts, as they may be larger than the memory."""
    def some(start):
        return np.stack([digest_of_image(image) for image in images[start : start + AT_ONCE]])

    threads = os.cpu_count()
    with closing(ahead(some, range(0, len(images), AT_ONCE), threads=threads, depth=2 * threads)) as digests:
        return np.concatenate(list(digests))


def pixels_of(digests: np.ndarray, shape) -> Pixels:
    """Of images in their order, by the digest of each: an archive does not give them in that order."""
    shape = tuple(map(int, shape))
    return Pixels(digest(shape, hashlib.blake2b(digests, digest_size=DIGEST).hexdigest()), len(digests), shape)


def digest(*parts) -> str:
    return hashlib.blake2b(json.dumps(parts, default=str).encode(), digest_size=DIGEST).hexdigest()


# ------------------------------------------------------------------------------- pixels by files


def read_note(cache: Path, images: Stream) -> Pixels | None:
    """What an earlier call found in these very files, None if there is no whole note of that."""
    try:
        found, count, shape = json.loads(_note(cache, images).read_text())["pixels"]
        return Pixels(str(found), int(count), tuple(map(int, shape)))
    except (OSError, ValueError, LookupError, TypeError):
        return None


def write_note(cache: Path, images: Stream, pixels: Pixels) -> None:
    """Nothing is written if a file has become another while they were read: it is not known which of the two was."""
    try:
        if images.key_now() == images.key:
            write_json(_note(cache, images), {"pixels": pixels})
    except (OSError, BadInput):  # a file is gone; or the disk is full, which `keep` has told
        pass


def _note(cache: Path, images: Stream) -> Path:
    return cache / f"files-{digest(images.key)}.json"


# ------------------------------------------------------------------------------- features by pixels


def find(cache: Path, name: str, pixels: Pixels, extractor: str) -> Real | None:
    """What an earlier call kept under this digest, None if there is nothing whole. extractor: its key."""
    try:
        with np.load(_place(cache, name, pixels, extractor), allow_pickle=False) as file:
            return Real(name, int(file["count"]), file["mean"], file["covariance"], torch.from_numpy(file["features"]))
    except (OSError, ValueError, LookupError, EOFError, zipfile.BadZipFile):
        return None


def keep(cache: Path, real: Real, pixels: Pixels, extractor: str) -> None:
    """Written beside and moved into place. A disk that takes nothing costs the next call its time, not this one."""
    path = _place(cache, real.digest, pixels, extractor)
    beside = path.with_suffix(f".{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "wb") as file:
            np.savez(file, count=real.count, mean=real.mean, covariance=real.covariance,
                     features=real.features.numpy())
        os.replace(beside, path)
    except OSError as error:
        say(f"the features of the real images are not kept, {path.parent} cannot be used ({error.strerror}): --cache "
            "names another folder")
    finally:
        if beside.exists():
            beside.unlink()


@contextmanager
def turn(cache: Path, name: str, pixels: Pixels, extractor: str) -> Iterator[None]:
    """Of calls side by side one measures, and the others wait for what it keeps; none where nothing can be kept."""
    lock = _place(cache, name, pixels, extractor).with_suffix(".lock")
    with ExitStack() as held:
        with suppress(OSError):
            cache.mkdir(parents=True, exist_ok=True)
            held.enter_context(alone(lock))
        yield
    with suppress(OSError):  # if one waits for it still, the next measures beside it, and keeps the same
        lock.unlink()


def sizes(cache: Path, extractor: str) -> set[tuple[int, ...]]:
    """(N, C, H, W) of the images whose features by this extractor are kept."""
    names = [path.name.split("-") for path in cache.glob(f"real-*-{_short(extractor)}-*.npz")]
    return {tuple(map(int, size.split("x"))) for _, size, *_ in names if size.replace("x", "").isdecimal()}


def _place(cache: Path, name: str, pixels: Pixels, extractor: str) -> Path:
    return cache / f"real-{'x'.join(map(str, (pixels.count, *pixels.shape)))}-{_short(extractor)}-{name}.npz"


def _short(extractor: str) -> str:
    return digest(extractor)[:8]
