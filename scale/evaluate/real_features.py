"""Features of the real images, kept in a folder between calls.

A file of features is named after the images' pixels, and an index of the files that the images were read from names it.
So the same images elsewhere are not measured again, and unchanged files are not even decoded again.
"""

import hashlib
import heapq
import json
import zipfile
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dansm import BadInput

from ..base.files import replacing, write_json
from ..base.locks import alone
from ..base.text import counted, say, with_bar
from ..data.read import Source, say_transparent
from .extractors import MOST_AT_ONCE, Extractor, features_of

VERSION = 1  # a change makes everything be measured again
KEPT = 50_000  # real images of which the features are kept, not only their mean and covariance: 400 MB
DIGEST = 16  # bytes of an image's digest: 48 MB for three million images


class Real(NamedTuple):
    """What is known of the real images."""

    digest: str  # of all images in their order, and of the extractor
    count: int
    shape: tuple[int, int, int]  # (C, H, W) of one image
    mean: np.ndarray  # (D,) of the features of all, float64
    covariance: np.ndarray  # (D, D) of them, float64
    features: Tensor  # (M, D) float32 of M images chosen at random: of all, or of KEPT if there are more
    left_out: tuple[int, ...] = ()  # places, in the order of names, of the images that could not be read


def real_features(images: Source | Tensor | np.ndarray, extractor: Extractor, device: torch.device, *,
                  cache: Path | None = None, check: Callable[[tuple], None] = lambda shape: None) -> Real:
    """Features of all images, 4 or more: uint8 (N, C, H, W), or a Source that decodes them as they are needed.

    cache  a folder that keeps features
    check  gets (C, H, W) before anything is measured
    Raises BadInput.
    """
    source = images if isinstance(images, Source) else Source(Path(), [], array=np.asarray(images))
    read = partial(_read, source, extractor, feature_batch(device), check)
    if cache is None:
        return _measure(read, extractor, device)
    index = cache / f"{digest_of(source.path.resolve(), source.digest, source.skip_unreadable, extractor.key)}.json"
    with ExitStack() as held:
        with suppress(OSError):  # nothing can be written there, which is said below
            cache.mkdir(parents=True, exist_ok=True)
            held.enter_context(alone(index.with_suffix(".lock")))  # calls for the same files wait for what one keeps
        real = _load_by(index, source.skip_unreadable)
        if real:
            check(real.shape)
            return real
        real = _same_pixels(cache, source, extractor, read) or _measure(read, extractor, device)
        path = cache / _name(extractor, real.count, real.digest)
        try:
            with replacing(path) as partial_path, open(partial_path, "wb") as file:
                arrays = real._replace(features=real.features.numpy())._asdict()
                del arrays["left_out"]  # these images may lie elsewhere without those
                np.savez(file, **arrays)
            if source.files and source.digest_now() == source.digest:  # else a file has changed, maybe before its turn
                write_json(index, {"features": path.name, "left_out": real.left_out})
        except (OSError, BadInput) as error:  # a full disk costs later calls time, not this call its result
            say(f"the features of the real images are not kept: {error}; --cache names another folder")
    return real


def shuffled(features: Tensor, seed: int) -> Tensor:
    """The features, or labels, of the images in a random order."""
    return features[random_order(len(features), seed)]


def random_order(count: int, seed: int) -> Tensor:
    """The numbers from 0 to count − 1 in a random order that depends on the seed and the count alone."""
    return torch.from_numpy(np.random.default_rng([seed, count]).permutation(count))


def feature_batch(device: torch.device | str) -> int:
    """How many real images are measured together: on a CPU fewer, for an estimate of the remaining time."""
    return MOST_AT_ONCE if torch.device(device).type == "cuda" else 64


def check_real(images: Tensor | np.ndarray) -> None:
    """BadInput for latents, and for too few images."""
    if "uint8" not in str(images.dtype) or len(images) < 4:
        raise BadInput(f"there are {counted(len(images), 'sample')} of {images.dtype}: expected 4 images or more")


def kept_places(count: int) -> np.ndarray:
    """The places, in their order, of the images whose features are kept, among the `count` that can be read."""
    return np.sort(np.argsort(_lots(count))[:KEPT])


def _lots(count: int) -> np.ndarray:
    return np.random.default_rng(0).random(count)


def _read(source: Source, extractor: Extractor, batch: int, check: Callable, use: Callable,
          left_out: tuple[int, ...] = ()) -> tuple[str, int, tuple[int, int, int], tuple[int, ...]]:
    """Decode all images, call use(places (B,), lots (B,), images (B, C, H, W)) for each batch, and return digest,
    count, shape and left_out as in `Real`. Places are those in the order of names, lots random numbers that depend on
    an image's place among the images that can be read, where `left_out` holds the places of all others."""
    shape = None
    with source.open() as (count, files), closing(source.decoded(files, _digest_of_image, depth=batch)) as entries:
        digests = np.zeros((count, DIGEST), np.uint8)
        lots = np.ones(count)
        lots[np.delete(np.arange(count), left_out)] = _lots(count - len(left_out))
        readable = (entry for entry in with_bar(entries, "real images", count) if entry[2] is not None)
        while part := list(islice(readable, batch)):
            places, _, arrays, part_digests = zip(*part, strict=True)
            places, images = np.array(places), np.concatenate(arrays)
            if shape is None:
                shape = images.shape[1:]
                check(shape)
            digests[places] = part_digests
            use(places, lots[places], images)
    say_transparent(source, len(source.transparent))
    left_out = tuple(np.flatnonzero(~digests.any(1)).tolist())  # their digests are still 0
    digests = np.delete(digests, left_out, axis=0)
    if len(digests) < 4:
        raise BadInput(f"there are {counted(len(digests), 'real image')}: expected at least 4, better thousands")
    pixels = digest_of(shape, hashlib.blake2b(digests, digest_size=DIGEST).hexdigest())
    return digest_of(VERSION, KEPT, extractor.key, pixels), len(digests), shape, left_out


def _measure(read: Callable, extractor: Extractor, device: torch.device, left_out: tuple[int, ...] = ()) -> Real:
    """Measure what `read` decodes. Sums are float64, taken batch by batch: three million features fit in no memory.
    Where not all features are kept and others than `left_out` cannot be read, measure again with their places known, so
    that the images kept are those of `kept_places`."""
    total = products = 0
    shift = None  # the first batch's mean, which is subtracted so that squares do not get large, losing digits
    sample = []  # a heap of (-lot, place, features) of the KEPT images with the least lots

    def add(places: np.ndarray, lots: np.ndarray, images: np.ndarray) -> None:
        nonlocal total, products, shift
        features, _ = features_of(torch.from_numpy(images), extractor, device)
        exact = features.double() if features.is_cuda else features.cpu().double()  # Apple's GPUs have no float64
        if shift is None:
            shift = exact.mean(0)
        exact = exact - shift
        total = total + exact.sum(0)
        products = products + exact.T @ exact
        for lot, place, row in zip(lots.tolist(), places.tolist(), features.cpu().numpy(), strict=True):
            push = heapq.heappush if len(sample) < KEPT else heapq.heappushpop
            push(sample, (-lot, place, row.copy()))

    digest, count, shape, unreadable = read(add, left_out)
    if unreadable != left_out and count > KEPT:
        return _measure(read, extractor, device, unreadable)
    mean = total / count + shift
    covariance = (products - torch.outer(total, total) / count) / (count - 1)
    rows = [row for _, _, row in sorted(sample, key=lambda drawn: drawn[1])]
    return Real(digest, count, shape, mean.cpu().numpy(), covariance.cpu().numpy(), torch.from_numpy(np.stack(rows)),
                unreadable)


def _same_pixels(cache: Path, source: Source, extractor: Extractor, read: Callable) -> Real | None:
    """The features of these pixels, if they are kept. Pixels are read only if features of as many images are kept."""
    with source.open() as (count, _):
        if not any(cache.glob(_name(extractor, count, "*"))):
            return None
    digest, count, _, left_out = read(lambda *_: None)
    real = _load(cache / _name(extractor, count, digest))
    return real and real._replace(left_out=left_out)


def _load_by(index: Path, skip_unreadable: bool) -> Real | None:
    """The features in the file that an index names. None if there are none, a file is damaged, or the index does not
    tell which images were left out."""
    try:
        known = json.loads(index.read_text())
        left_out = known["left_out"] if skip_unreadable else []
        real = _load(index.with_name(known["features"]))
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return real and real._replace(left_out=tuple(left_out))


def _load(path: Path) -> Real | None:
    """The features in a file. None if there is none, or it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return Real(str(file["digest"]), int(file["count"]), tuple(file["shape"].tolist()), file["mean"],
                        file["covariance"], torch.from_numpy(file["features"]))
    except (OSError, ValueError, LookupError, EOFError, zipfile.BadZipFile):
        return None


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
