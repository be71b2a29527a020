"""Arrays in files: uint8 images or float latents in .npy, .npz, .safetensors and .pt."""

import pickle
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dansm import BadInput

from ..base.machine import check_memory
from ..base.text import say, shorten
from .archives import Entries, Opened
from .pictures import Reading, Unreadable, as_array

NAMES = "arr_0", "images", "latents"  # of the samples, in a file of several arrays
LABEL_NAMES = "labels", "label", "arr_1"
SHAPES = {"images": "(N, 1 or 3, H, W), (N, H, W, 1 or 3) or (N, H, W)", "latents": "(C, H, W) or (N, C, H, W)"}


# ------------------------------------------------------------------------------- files


def _read_npy(path: Path) -> dict[str, np.ndarray]:
    """Left on the disk."""
    return {"": np.lib.format.open_memmap(path, mode="c")}


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise ValueError("no zip of arrays")
        check_memory(f"{path} unpacked", sum(member.file_size for member in file.zip.infolist()), "cpu")
        return dict(file)


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors.torch import load_file

    return {name: _as_array(tensor) for name, tensor in load_file(path).items()}


def _read_pt(path: Path) -> dict[str, np.ndarray]:
    """A tensor, or a dictionary that holds some. No code in the file is run."""
    mapped = zipfile.is_zipfile(path)  # files of a very old torch are none and cannot be mapped
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    if not isinstance(content, dict | Tensor):
        raise Unreadable(f"{path} holds a {type(content).__name__}: expected a tensor, or a dictionary of some")
    tensors = content if isinstance(content, dict) else {"": content}
    return {str(name): _as_array(tensor) for name, tensor in tensors.items() if isinstance(tensor, Tensor)}


def _as_array(tensor: Tensor) -> np.ndarray:
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).detach().numpy()


READERS = {".npy": _read_npy, ".npz": _read_npz, ".safetensors": _read_safetensors, ".pt": _read_pt, ".pth": _read_pt}
SUFFIXES = frozenset(READERS)


def types_in(path: Path) -> str:
    """The types of numbers that latents in such a file may have: NumPy's have no bfloat16."""
    return "float16 or float32" if path.suffix.lower() in (".npy", ".npz") else "float16, bfloat16 or float32"


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turn any error of a damaged or foreign file into Unreadable with its path."""
    try:
        yield
    except (BadInput, ImportError, MemoryError):
        raise
    except pickle.UnpicklingError as error:
        raise Unreadable(f"{path} holds more than tensors and plain values, which may be code and is not run: expected "
                         "a tensor, or a dictionary of some") from error
    except Exception as error:  # a header is parsed as Python; each format has its own kinds
        raise Unreadable(f"{path} cannot be read as arrays ({' '.join(str(error).split())}): expected a whole "
                         f"{path.suffix} file of images of uint8, or latents of {types_in(path)}") from error


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """All arrays in a file by their names, "" for one without. Raises Unreadable; no code in the file is run."""
    with _naming(path):
        return READERS[path.suffix.lower()](path)


def open_array(path: Path) -> np.ndarray:
    """The images or latents in a file: the only array of 3 or 4 dimensions but for mirrored ones, or the one called as
    in NAMES. It may still be of any type."""
    arrays = read_arrays(path)
    if list(arrays) == [""]:
        return arrays[""]
    found = {name: array for name, array in arrays.items() if array.ndim in (3, 4) and "flip" not in name}
    if len(found) > 1:
        found = {name: array for name, array in found.items() if name in NAMES}
    if len(found) != 1:
        held = ", ".join(f"{name} {array.shape}" for name, array in arrays.items()) or "no array"
        raise BadInput(f"{path} holds {shorten(held, 200)}: expected one array of images or latents, or one called "
                       f"{' or '.join(NAMES)}")
    return next(iter(found.values()))


def labels_in(path: Path) -> np.ndarray | None:
    """The labels that lie next to images or latents in one file, under one of LABEL_NAMES."""
    if path.suffix.lower() == ".npy":
        return None
    arrays = read_arrays(path)
    return next((arrays[name] for name in LABEL_NAMES if name in arrays), None)


# ------------------------------------------------------------------------------- samples


def open_samples(path: Path, dims: tuple[int, ...] = (3, 4)) -> np.ndarray:
    """The images (N, 1 or 3, H, W) uint8, or the latents (N, C, H, W) float16 or float32, in a file. An array of 3
    dimensions is one latent or one image, or grey images. dims: that a file of latents may have.

    Raises Unreadable for what is no such file, and BadInput for any other array.
    """
    array = open_array(path)
    shape = array.shape
    if array.dtype == np.uint8:
        if array.ndim == 3:
            array = array[None] if shape[0] in (1, 3) or shape[2] in (1, 3) else array[:, None]
        if array.ndim == 4 and array.shape[1] not in (1, 3):
            array = array.transpose(0, 3, 1, 2)
        if array.ndim == 4 and array.shape[1] in (1, 3) and 0 not in shape:
            return array
    elif array.dtype in (np.float16, np.float32) and array.ndim in dims and 0 not in shape:
        return array if array.ndim == 4 else array[None]
    latents = "(C, H, W)" if dims == (3,) else "(N, C, H, W)" if dims == (4,) else SHAPES["latents"]
    raise BadInput(f"{path} holds {array.dtype} {shape}: expected images {SHAPES['images']} of uint8, or latents "
                   f"{latents} of {types_in(path)}")


def check_finite(path: Path, latents: np.ndarray) -> None:
    """BadInput naming the file and the latent if one of its numbers is not finite."""
    for start in range(0, len(latents), 1024):
        finite = np.isfinite(latents[start : start + 1024])
        if not finite.all():
            wrong = start + int((~finite).any((1, 2, 3)).argmax())
            raise BadInput(f"{path} holds NaN or infinite numbers, in latent {wrong}: expected finite latents")


def say_pixels(source: Path, latents: np.ndarray | Tensor) -> None:
    """Print a line if the first of these latents (N, C, H, W) looks like the pixels of an image."""
    first = torch.as_tensor(latents[0])
    least, most = first.min().item(), first.max().item()
    if {first.shape[0], first.shape[-1]} & {1, 3} and 0 <= least < most <= 255:
        say(f"{source} holds floating-point numbers from 0 to {1 if most <= 1 else 255}, taken as latents; images are "
            "uint8: save them as such")


def open_latents(files: list[Path], _: Reading) -> Opened:
    """A folder of latents, (C, H, W) each or (n, C, H, W) each, which are taken as they are."""
    first = open_array(files[0]).ndim
    dims = (first,) if first in (3, 4) else (3, 4)

    def read(path: Path) -> np.ndarray:
        latents = open_samples(path, dims)
        check_finite(path, latents)
        return latents

    lengths = [len(open_samples(path, dims)) if dims == (4,) else 1 for path in files]
    places = np.cumsum([0, *lengths]).tolist()
    return places[-1], ((place, path, partial(read, path)) for place, path in zip(places, files, strict=False))


def read_latent(path: Path, read: Callable[[], bytes]) -> np.ndarray:
    """One latent as (1, C, H, W), from the bytes of a .npy file in an archive. Raises Unreadable, and BadInput for any
    other array."""
    with _naming(path):
        array = np.lib.format.read_array(BytesIO(read()), allow_pickle=False)
    one = array.ndim == 3 or (array.ndim == 4 and len(array) == 1)
    if array.dtype not in (np.float16, np.float32) or not one or not array.size:
        raise BadInput(f"{path} holds {array.dtype} {array.shape}: expected one latent (C, H, W) of float16 or float32")
    latent = array.reshape(1, *array.shape[-3:])
    check_finite(path, latent)
    return latent


def open_images(files: list[Path], reading: Reading) -> Opened:
    """The uint8 images of several files, one after the other."""

    def read(path: Path) -> np.ndarray:
        images = open_samples(path)
        if images.dtype != np.uint8:
            raise BadInput(f"{path} holds {images.dtype} {images.shape}, {files[0]} uint8: expected one kind alone")
        return images

    return sum(len(read(path)) for path in files), images_of(((path, read(path)) for path in files), reading)


def images_of(arrays: Iterator[tuple[Path, np.ndarray]], reading: Reading) -> Entries:
    """Each image of arrays (N, C, H, W) uint8, as `Source.open` yields them."""
    place = 0
    for path, images in arrays:
        for image in images:
            yield place, path, partial(_read_pixels, image, reading)
            place += 1


def _read_pixels(pixels: np.ndarray, reading: Reading) -> np.ndarray:
    """(C, H, W) uint8 → (1, C, H, W), of the size and channels that are asked for."""
    if reading.keeps(pixels):
        return pixels[None]
    image = Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    return as_array(image, reading)
