"""Features of the real images, kept in a folder between calls.

They are kept by the images' pixels, with a link to them by the files that the images were read from. The same images in
other files are not measured again, unchanged files are not even decoded again, and a changed file never gets the
features of what it held before.
"""

import hashlib
import heapq
import json
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dansm import BadInput

from ..base.files import replacing
from ..base.locks import alone
from ..base.text import counted, say
from ..data.loader import Stream
from ..data.read import Source
from .extractors import MOST_AT_ONCE, Extractor, features_of

VERSION = 1  # a change makes everything be measured again
KEPT = 50_000  # real images of which the features are kept, not only their mean and covariance: 400 MB
DIGEST = 16  # bytes of an image's digest: 48 MB for three million images


class Real(NamedTuple):
    """What is known of the real images.

    digest      of all images in their order, and of the extractor
    shape       (C, H, W) of one image
    mean        (D,) of the features of all, float64
    covariance  (D, D) of them, float64
    features    (M, D) float32 of M images chosen at random: of all, or of KEPT if there are more
    """

    digest: str
    count: int
    shape: tuple[int, int, int]
    mean: np.ndarray
    covariance: np.ndarray
    features: Tensor


def real_features(images: Stream | Tensor | np.ndarray, extractor: Extractor, device: torch.device, *,
                  batch: int | None = None, cache: Path | None = None,
                  track: Callable[[Iterator, int], Iterator] = lambda images, total: images,
                  check: Callable[[tuple[int, int, int]], None] = lambda shape: None) -> Real:
    """Features of all images, 4 or more: uint8 (N, C, H, W), or a Stream that decodes them as they are needed.

    batch  images measured together; None: what `feature_batch` gives
    cache  a folder that keeps features
    track  shows progress: track(images, total) yields what it is given
    check  gets (C, H, W) before anything is measured
    Raises BadInput.
    """
    stream = images if isinstance(images, Stream) else _stream_of(images)
    read = partial(_read, stream, extractor, batch or feature_batch(device), track, check)
    if cache is None:
        return _measure(read, extractor, device)
    link = cache / f"files-{digest_of(stream.key, extractor.key)}.npz"
    with ExitStack() as held:
        with suppress(OSError):  # nothing can be written there, which `_keep` reports
            cache.mkdir(parents=True, exist_ok=True)
            held.enter_context(alone(link.with_suffix(".lock")))  # calls for the same files wait for what one keeps
        real = _find(link)
        if real:
            check(real.shape)
            return real
        path = _look(cache, stream, extractor, read)
        real = path and _find(path)
        if real is None:
            real = _measure(read, extractor, device)
            path = _keep(cache, real, extractor)
        with suppress(OSError, BadInput):  # a file is gone, or the disk is full
            if stream.key_now() == stream.key:  # else a file has changed, and may have been read before that or after
                link.unlink(missing_ok=True)
                link.symlink_to(path.name)
    return real


def feature_batch(device: torch.device | str) -> int:
    """How many real images are measured together. On a CPU fewer, so that the remaining time can be estimated."""
    return MOST_AT_ONCE if torch.device(device).type == "cuda" else 64


def check_real(images: Tensor | np.ndarray) -> None:
    """BadInput for latents, and for too few images."""
    _check_enough(len(images))
    if str(images.dtype).split(".")[-1] != "uint8":
        raise BadInput(f"the images are {images.dtype} of {images.shape[1]} channels, latents: expected images")


def _check_enough(count: int) -> None:
    if count < 4:
        raise BadInput(f"there are {counted(count, 'real image')}: expected at least 4, and thousands for meaningful "
                       "numbers")


def _stream_of(images: Tensor | np.ndarray) -> Stream:
    """Images that are decoded already. They get no link, as their key now is never the key before."""
    check_real(images)
    array = np.asarray(images)
    return Stream(str(array.shape), lambda: "", Source(Path(), [], array=array).open)


def _read(stream: Stream, extractor: Extractor, batch: int, track: Callable, check: Callable,
          use: Callable) -> tuple[str, int, tuple[int, int, int]]:
    """Decode all images and call use(places (B,), lots (B,), images (B, C, H, W)) for one batch after the other.

    An archive gives the images in another order than that of their places. An image's lot is a random number that
    depends on its place alone. Returns digest, count and shape as in `Real`.
    """
    shape = None
    with stream.opened() as opened, closing(opened.decoded(_digest_of_image, depth=batch)) as entries:
        _check_enough(opened.count)
        digests = np.zeros((opened.count, DIGEST), np.uint8)
        lots = np.random.default_rng(0).random(opened.count)
        readable = (entry for entry in track(entries, opened.count) if entry[2] is not None)
        while part := list(islice(readable, batch)):
            places, _, arrays, part_digests = zip(*part, strict=True)
            places, images = np.array(places), np.concatenate(arrays)
            if shape is None:
                shape = images.shape[1:]
                check(shape)
            digests[places] = part_digests
            use(places, lots[places], images)
    digests = digests[digests.any(1)]  # those of unreadable images are still 0
    _check_enough(len(digests))
    pixels = digest_of(shape, hashlib.blake2b(digests, digest_size=DIGEST).hexdigest())
    return digest_of(VERSION, KEPT, extractor.key, pixels), len(digests), shape


class _Features:
    """Collects the features of batches. Sums are float64 and taken at once: three million features fit in no memory."""

    def __init__(self, extractor: Extractor, device: torch.device):
        self.extractor, self.device = extractor, device
        self.total, self.products = 0, 0
        self.shift = None  # the first batch's mean, which is subtracted so that squares do not get large, losing digits
        self.sample = []  # a heap of (-lot, place, features) of the KEPT images with the least lots

    def add(self, places: np.ndarray, lots: np.ndarray, images: np.ndarray) -> None:
        features, _ = features_of(torch.from_numpy(images), self.extractor, self.device)
        exact = features.double() if features.is_cuda else features.cpu().double()  # Apple's GPUs have no float64
        if self.shift is None:
            self.shift = exact.mean(0)
        exact = exact - self.shift
        self.total = self.total + exact.sum(0)
        self.products = self.products + exact.T @ exact
        for lot, place, row in zip(lots.tolist(), places.tolist(), features.cpu().numpy(), strict=True):
            push = heapq.heappush if len(self.sample) < KEPT else heapq.heappushpop
            push(self.sample, (-lot, place, row.copy()))


def _measure(read: Callable, extractor: Extractor, device: torch.device) -> Real:
    features = _Features(extractor, device)
    digest, count, shape = read(features.add)
    mean = features.total / count + features.shift
    covariance = (features.products - torch.outer(features.total, features.total) / count) / (count - 1)
    by_place = sorted(features.sample, key=lambda drawn: drawn[1])
    drawn = torch.from_numpy(np.stack([row for _, _, row in by_place]))
    return Real(digest, count, shape, mean.cpu().numpy(), covariance.cpu().numpy(), drawn)


def _look(cache: Path, stream: Stream, extractor: Extractor, read: Callable) -> Path | None:
    """Where features of these pixels are kept, if they are. Reading pixels takes less time than features, and is not
    done if no features of as many images are kept."""
    with stream.opened() as opened:
        if not any(cache.glob(_name(extractor, opened.count, "*"))):
            return None
    digest, count, _ = read(lambda *_: None)
    return cache / _name(extractor, count, digest)


def _find(path: Path) -> Real | None:
    """The features that an earlier call kept. None if there are none, or the file is damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return Real(str(file["digest"]), int(file["count"]), tuple(file["shape"].tolist()), file["mean"],
                        file["covariance"], torch.from_numpy(file["features"]))
    except (OSError, ValueError, LookupError, EOFError, zipfile.BadZipFile):
        return None


def _keep(cache: Path, real: Real, extractor: Extractor) -> Path:
    """Keep features for later calls. A full disk costs them time, not this call its result."""
    path = cache / _name(extractor, real.count, real.digest)
    try:
        with replacing(path) as partial_path, open(partial_path, "wb") as file:
            np.savez(file, **real._replace(features=real.features.numpy())._asdict())
    except (OSError, BadInput) as error:
        say(f"the features of the real images are not kept: {error}; --cache names another folder")
    return path


def _name(extractor: Extractor, count: int, digest: str) -> str:
    return f"real-{digest_of(extractor.key)[:8]}-{count}-{digest}.npz"


def _digest_of_image(image: np.ndarray) -> np.ndarray:
    """(DIGEST,) uint8"""
    return np.frombuffer(hashlib.blake2b(np.ascontiguousarray(image), digest_size=DIGEST).digest(), np.uint8)


def digest_of(*parts) -> str:
    return hashlib.blake2b(json.dumps(parts, default=str).encode(), digest_size=DIGEST).hexdigest()


def digest_of_images(images: np.ndarray) -> str:
    """The digest by which the tables of `dansm proof` name their images (N, C, H, W), which may exceed the memory."""
    digest = hashlib.blake2b(f"{tuple(images.shape)}".encode(), digest_size=16)
    for start in range(0, len(images), 4096):
        digest.update(np.ascontiguousarray(images[start : start + 4096]))
    return digest.hexdigest()
