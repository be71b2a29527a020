"""Latents in .npy files."""

from functools import partial
from pathlib import Path

import numpy as np

from dansm import BadInput

from .archives import Opened
from .pictures import Unreadable


def open_npy(path: Path, dims: tuple[int, ...] = (4,)) -> np.ndarray:
    """The latents in a .npy file, left on the disk: float16 or float32, with one of `dims` dimensions.

    Raises Unreadable for what is no such file, and BadInput for any other array; no pickled object is read.
    """
    try:
        array = np.lib.format.open_memmap(path, mode="c")
    except Exception as error:  # a header is parsed as Python
        raise Unreadable(f"{path} cannot be read as latents ({error}): expected a whole .npy file of float16 or "
                         "float32 numbers") from error
    if array.dtype not in (np.float16, np.float32) or array.ndim not in dims or 0 in array.shape:
        shapes = " or ".join({3: "(C, H, W)", 4: "(N, C, H, W)"}[dim] for dim in dims)
        raise BadInput(f"{path} holds {array.dtype} {array.shape}: expected latents {shapes} of float16 or float32")
    return array


def check_finite(path: Path, latents: np.ndarray) -> None:
    """BadInput naming the file and the latent if one of its numbers is not finite."""
    for start in range(0, len(latents), 1024):
        finite = np.isfinite(latents[start : start + 1024])
        if not finite.all():
            wrong = start + int((~finite).any((1, 2, 3)).argmax())
            raise BadInput(f"{path} holds NaN or infinite numbers, in latent {wrong}: expected finite latents")


def open_latents(files: list[Path]) -> Opened:
    """A folder of latents: (C, H, W) each, or (n, C, H, W) each."""
    dims = open_npy(files[0], (3, 4)).ndim

    def read(path: Path) -> np.ndarray:
        array = open_npy(path, (dims,))
        latents = array if dims == 4 else array[None]
        check_finite(path, latents)
        return latents

    lengths = [len(open_npy(path)) if dims == 4 else 1 for path in files]
    places = np.cumsum([0, *lengths]).tolist()
    return places[-1], ((place, path, partial(read, path)) for place, path in zip(places, files, strict=False))
