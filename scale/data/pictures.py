"""One image file to pixels."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor, ImageOps

from dansm import BadInput

GREY = {"1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "F"}  # modes of Pillow
# formats that Pillow opens and cannot decode by itself, or that are programs
NO_PICTURES = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
OF_16_BITS = {"PNG", "PPM"}  # formats of which Pillow opens 16 bits as mode I, or did


class Unreadable(BadInput):
    """One file that cannot be read. The rest may do without it."""


@dataclass(frozen=True)
class Reading:
    """How image files become arrays that are alike.

    size        pixels on each side of the square that an image is made; None leaves images as they are
    background  colour under transparent pixels, by name or as #rrggbb
    channels    1 makes images grey, 3 coloured; 0: one for grey files, three for others
    Raises BadInput for an unknown colour, and for other channels.
    """

    size: int | None = None
    background: str = "white"
    channels: int = 0

    def __post_init__(self):
        if self.channels not in (0, 1, 3):
            raise BadInput(f"--channels is {self.channels}: expected 1 (grey), 3, or 0 (grey if all images are)")
        try:
            ImageColor.getrgb(self.background)
        except ValueError as error:
            raise BadInput(f"--background is {self.background!r}: expected a colour, as white or #ff8000") from error

    def keeps(self, pixels: np.ndarray) -> bool:
        """Whether pixels (…, C, H, W) stay as they are."""
        return self.size is None and self.channels in (0, pixels.shape[-3])


@cache
def suffixes() -> frozenset[str]:
    """The suffixes of images: all formats that this Pillow opens, as .png, .jfif, .avif and .jp2."""
    formats = Image.registered_extensions()
    return frozenset(suffix for suffix, name in formats.items() if name in Image.OPEN and name not in NO_PICTURES)


def read_image(path: Path, read: Callable[[], bytes], reading: Reading, transparent: set[Path]) -> np.ndarray:
    """One image as (1, 1 or 3, H, W) uint8, from the bytes that `read` returns. Adds the path to `transparent` if the
    background shows through it. Each file of more than 8 bits a pixel is scaled by itself, see `_as_8_bits`.

    Raises Unreadable, naming the path, also for an image with more pixels than Pillow takes for an honest one.
    """
    try:
        with Image.open(BytesIO(read())) as opened:
            image = _upright(opened)
            is_grey = image.mode in GREY
            if image.mode.startswith(("I", "F")):  # more than 8 bits a pixel, which convert would cut off at 255
                of_16_bits = image.mode != "I" or opened.format in OF_16_BITS
                image = Image.fromarray(_as_8_bits(np.asarray(image), of_16_bits))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                if image.getextrema()[3][0] < 255:
                    transparent.add(path)
                    image = Image.alpha_composite(Image.new("RGBA", image.size, reading.background), image)
                    is_grey &= len(set(ImageColor.getrgb(reading.background)[:3])) == 1
            return as_array(image.convert("L" if is_grey else "RGB"), reading)
    except MemoryError:
        raise
    except Exception as error:  # Pillow and the archives raise nearly every kind for damaged data
        reason = str(error).partition(" <_io")[0]  # without the address of the BytesIO
        raise Unreadable(f"{path} cannot be read as an image ({reason}); expected one, or --skip-unreadable, which "
                         "leaves such files out") from error


def _as_8_bits(pixels: np.ndarray, of_16_bits: bool) -> np.ndarray:
    """Grey pixels (H, W) of more than 8 bits as uint8. 16 bits are divided by 257, which makes white 255. 32 bits, as
    a TIFF may have, are kept if no pixel of the file is above 255, else taken for 16. ValueError for negative pixels,
    for some above 65,535, and for fractions: nobody knows what white is."""
    if pixels.dtype.kind == "f" or pixels.min() < 0 or pixels.max() > 65535:
        raise ValueError("neither 8 nor 16 bits a pixel: the value of white is unknown")
    return (pixels if not of_16_bits and pixels.max() <= 255 else pixels // 257).astype(np.uint8)


def as_array(image: Image.Image, reading: Reading) -> np.ndarray:
    """An image of mode L or RGB as (1, C, H, W) uint8."""
    mode = {0: image.mode, 1: "L", 3: "RGB"}[reading.channels]
    pixels = square(image.convert(mode), reading.size)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1) if mode == "RGB" else pixels[None])[None]


def _upright(image: Image.Image) -> Image.Image:
    """The image as a viewer shows it: turned and mirrored by its EXIF orientation, where that can be read."""
    try:
        image.getexif()
    except Exception:  # damaged EXIF raises nearly every kind; the pixels may be whole
        return image
    return ImageOps.exif_transpose(image)


def square(image: Image.Image, size: int | None) -> np.ndarray:
    """The centre square of `image`, `size` pixels wide, or all of it for None, as (H, W) or (H, W, 3) uint8."""
    return np.asarray(image if size is None else ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS))
