"""Images from files to the device: decoded once, kept as one uint8 array, shuffled and flipped there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import count
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from dansm import BadInput

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}


def load_images(source: str, *, size: int | None = None, skip_unreadable: bool = False, root: str = "data",
                track=lambda paths, total: paths, left_out: list[Path] | None = None) -> Tensor:
    """All images of `source` as one uint8 array (N, 3, H, W).

    source  a folder, read with its subfolders in the order of their names; or "cifar10", which torchvision
            downloads into `root` at first use.
    size    shorter side to this many pixels, then the centre square; None takes the images as they are.
    track   wraps the files while they are read, to show progress: track(paths, total) yields the paths.
    left_out  gets the paths of the images that `skip_unreadable` left out.
    Raises BadInput for a folder that is missing, empty or unreadable, for an unreadable image (named; left
    out if `skip_unreadable`), and for images of unequal size (two of them named).
    """
    if not str(source):
        raise BadInput("the folder of images is '': expected a path, or cifar10")
    if source == "cifar10" and not Path(source).exists():
        return _cifar10(root, size)
    paths = find_images(Path(source))
    images, first, found = None, None, 0
    left_out = [] if left_out is None else left_out
    readers = ThreadPoolExecutor(os.cpu_count())  # decoding leaves Python's lock, so threads do
    try:
        decoded = readers.map(lambda path: read_image(path, size, skip_unreadable), paths)
        for path in track(paths, len(paths)):
            image = next(decoded)
            if image is None:
                left_out.append(path)
                continue
            if images is None:
                images, first = np.empty((len(paths), *image.shape), np.uint8), path
            if image.shape != images.shape[1:]:
                raise BadInput(f"{path} is {_pixels(image)}, {first} is {_pixels(images[0])}: expected images of "
                               "equal size; --size N makes them N pixels square")
            images[found] = image
            found += 1
    finally:
        readers.shutdown(wait=False, cancel_futures=True)
    if images is None:
        raise BadInput(f"{source} holds {len(paths)} image files, none of them readable")
    return torch.from_numpy(images[:found]).permute(0, 3, 1, 2).contiguous()


def check_out(source: str, out: Path) -> None:
    """BadInput if results in `out` would lie in the folder of images: the next run would read samples.png as one."""
    if str(source) and Path(source).is_dir() and out.resolve().is_relative_to(Path(source).resolve()):
        raise BadInput(f"--out is {out}, inside {source}, whose images are read with all its subfolders: expected a "
                       "folder outside of it")


def find_images(folder: Path) -> list[Path]:
    """Every image file below `folder`, in the order of their names."""
    if not folder.exists():
        raise BadInput(f"{folder} does not exist: expected a folder of images, or cifar10")
    if not folder.is_dir():
        raise BadInput(f"{folder} is a file: expected a folder of images")

    def unreadable(error: OSError):
        raise BadInput(f"{error.filename} cannot be read: {error.strerror}")

    paths = [Path(parent) / name for parent, _, names in os.walk(folder, onerror=unreadable, followlinks=True)
             for name in names if Path(name).suffix.lower() in SUFFIXES]
    if not paths:
        raise BadInput(f"{folder} holds no images: expected files ending in {' '.join(sorted(SUFFIXES))}")
    return sorted(paths)


def read_image(path: Path, size: int | None = None, skip_unreadable: bool = False) -> np.ndarray | None:
    """One image as (H, W, 3) uint8; None for an unreadable one if it may be skipped, else BadInput naming it."""
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):  # more than 8 bits a pixel, which convert would cut off at 255
                image = Image.fromarray(_from_16_bits(np.asarray(image)))
            return _square(image.convert("RGB"), size)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # what Pillow raises
        if skip_unreadable:
            return None
        raise BadInput(f"{path} cannot be read as an image; --skip-unreadable leaves such files out") from error


def batches(images: Tensor, batch: int, *, seed: int = 0, flip: bool = True, start: int = 0) -> Iterator[Tensor]:
    """Endless batches (batch, C, H, W) in [−1, 1] from uint8 images (N, C, H, W), on the images' device.

    Each epoch is a permutation, with its own mirrored half, that depends on seed and epoch alone: batch
    number `start` is the same for a run that is resumed there. A batch may end one epoch and begin the next.
    """

    @lru_cache(maxsize=2)
    def shuffled(epoch):
        draw = np.random.default_rng([seed, epoch])
        return draw.permutation(len(images)), draw.random(len(images)) < (0.5 if flip else 0)

    for number in count(start):
        epoch, place = np.divmod(np.arange(number * batch, (number + 1) * batch), len(images))
        rows = np.concatenate([shuffled(e)[0][place[epoch == e]] for e in np.unique(epoch)])
        mirrored = np.concatenate([shuffled(e)[1][place[epoch == e]] for e in np.unique(epoch)])
        x = images[torch.from_numpy(rows).to(images.device)]
        mirrored = torch.from_numpy(mirrored).to(images.device)[:, None, None, None]
        yield torch.where(mirrored, x.flip(3), x).float() / 127.5 - 1


def _from_16_bits(pixels: np.ndarray) -> np.ndarray:
    if pixels.dtype.kind == "f" or pixels.min() < 0 or pixels.max() > 65535:
        raise ValueError("neither 8 nor 16 bits a pixel: what is white is not known")
    return (pixels // 257).astype(np.uint8)


def _square(image: Image.Image, size: int | None) -> np.ndarray:
    return np.asarray(image if size is None else ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS))


def _pixels(image: np.ndarray) -> str:
    return f"{image.shape[1]}×{image.shape[0]}"


def _cifar10(root: str, size: int | None) -> Tensor:
    from torchvision.datasets import CIFAR10

    try:
        images = CIFAR10(root, download=True).data
    except (OSError, RuntimeError) as error:
        raise BadInput(f"CIFAR-10 is not in {root} and could not be downloaded ({error}): expected a network, or "
                       "the path of a folder of images") from error
    images = images if size is None else np.stack([_square(Image.fromarray(image), size) for image in images])
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
