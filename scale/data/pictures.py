"""One image file to pixels."""

from collections.abc import Callable
from functools import cache
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from dansm import BadInput

# formats that Pillow opens and cannot decode by itself, or that are programs
NO_PICTURES = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}


class Unreadable(BadInput):
    """One file that cannot be read. The rest may do without it."""


@cache
def suffixes() -> frozenset[str]:
    """The suffixes of images: all formats that this Pillow opens, as .png, .jfif, .avif and .jp2."""
    formats = Image.registered_extensions()
    return frozenset(suffix for suffix, name in formats.items() if name in Image.OPEN and name not in NO_PICTURES)


def read_image(path: Path, read: Callable[[], bytes], size: int | None = None) -> np.ndarray:
    """One image as (1, 3, H, W) uint8, from the bytes that `read` returns. size: see `square`.

    Raises Unreadable, naming the path, also for an image with more pixels than Pillow takes for an honest one.
    """
    try:
        with Image.open(BytesIO(read())) as opened:
            image = _upright(opened)
            if image.mode.startswith(("I", "F")):  # more than 8 bits a pixel, which convert would cut off at 255
                pixels = np.asarray(image)
                if pixels.dtype.kind == "f" or pixels.min() < 0 or pixels.max() > 65535:
                    raise ValueError("neither 8 nor 16 bits a pixel: the value of white is unknown")
                image = Image.fromarray((pixels // 257).astype(np.uint8))
            return np.ascontiguousarray(square(image.convert("RGB"), size).transpose(2, 0, 1))[None]
    except MemoryError:
        raise
    except Exception as error:  # Pillow and the archives raise nearly every kind for damaged data
        reason = str(error).partition(" <_io")[0]  # without the address of the BytesIO
        raise Unreadable(f"{path} cannot be read as an image ({reason}); expected one, or --skip-unreadable, which "
                         "leaves such files out") from error


def _upright(image: Image.Image) -> Image.Image:
    """The image as a viewer shows it: turned and mirrored by its EXIF orientation, where that can be read."""
    try:
        image.getexif()
    except Exception:  # damaged EXIF raises nearly every kind; the pixels may be whole
        return image
    return ImageOps.exif_transpose(image)


def square(image: Image.Image, size: int | None) -> np.ndarray:
    """The centre square of `image`, `size` pixels wide, or all of it for None, as (H, W, 3) uint8."""
    return np.asarray(image if size is None else ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS))
