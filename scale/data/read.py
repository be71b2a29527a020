"""Sources of images and latents: folders, archives, LSUN's lmdb and .npy files, read file by file without unpacking."""

import hashlib
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from dansm import BadInput

from ..base.threads import ahead
from .archives import TARS, Entries, Opened, names_in_tar, open_lmdb, open_tar, open_zip
from .arrays import open_latents
from .pictures import SUFFIXES, Unreadable, read_image

EXPECTED = "expected a folder of images, a .zip or .tar of them, an LSUN lmdb, .npy latents, or cifar10"
LABELS = "labels.npy"  # in a folder of images or latents, whose labels it holds
VERSION = 2  # a change makes all caches decode again


@dataclass
class Source:
    """Images or latents, and how they are to be read.

    files  see `files_of`; none for cifar10
    size   pixels on each side of the square that an image is made; None leaves images as they are
    skip_unreadable  leaves out images that cannot be read
    array  the images (N, C, H, W), where they are decoded already
    """

    path: Path
    files: list[Path]
    size: int | None = None
    skip_unreadable: bool = False
    array: np.ndarray | None = None

    @property
    def holds_latents(self) -> bool:
        return bool(self.files) and self.files[0].suffix.lower() == ".npy"

    @cached_property
    def digest(self) -> str:
        """Another one as soon as a file is added, removed, renamed or written to. It is that of its first use."""
        digest = hashlib.blake2b(f"{VERSION} {self.size}".encode(), digest_size=16)
        for path in self.files:
            state = path.stat()
            name = str(path)[len(str(self.path)):]  # the same however the source was named
            digest.update(f"{name}\0{state.st_size}\0{state.st_mtime_ns}\0".encode(errors="surrogateescape"))
        return digest.hexdigest()

    def digest_now(self) -> str:
        """The digest of the files as they are now."""
        return replace(self, files=files_of(self.path)).digest

    @contextmanager
    def open(self) -> Iterator[Opened]:
        """Open the source for `decoded`, in several threads at once."""
        if self.array is not None:
            yield len(self.array), ((place, self.path, partial(np.expand_dims, image, 0))
                                    for place, image in enumerate(self.array))
            return
        if self.holds_latents:
            yield open_latents(self.files)
            return
        if self.files[0].name == "data.mdb":
            opened = open_lmdb(self.path)
        elif self.files[0] != self.path:
            opened = nullcontext((len(self.files), ((place, path, path.read_bytes)
                                                    for place, path in enumerate(self.files))))
        else:
            opened = open_zip(self.path) if self.path.suffix.lower() == ".zip" else open_tar(self.path)
        with opened as (count, files), warnings.catch_warnings():
            if not count:
                raise BadInput(f"{self.path} holds no images: expected files ending in {' '.join(sorted(SUFFIXES))}")
            warnings.filterwarnings("ignore", module="PIL")  # of damaged EXIF, of palettes
            warnings.simplefilter("error", Image.DecompressionBombWarning)  # for images up to twice Pillow's limit
            yield count, ((place, path, partial(read_image, path, read, self.size)) for place, path, read in files)

    def paths(self) -> list[Path]:
        """The path of each image or latent, which may lead into an archive, in their order. No image is read."""
        if self.files == [self.path] and self.path.name.lower().endswith(TARS):
            return [self.path / name.lstrip("/") for name in sorted(names_in_tar(self.path), key=PurePosixPath)]
        with self.open() as (count, entries):
            named = [(place, path) for place, path, _ in entries]
        ends = [place for place, _ in named[1:]] + [count]
        return [path for (place, path), end in zip(named, ends, strict=True) for _ in range(place, end)]

    def decoded(self, entries: Entries, work: Callable | None = None, threads: int = 0,
                depth: int = 0) -> Iterator[tuple]:
        """Yield (place, path, array (n, C, H, W), work(array)) of each entry, computed by threads up to `depth` and a
        few ahead. The array is None for a file that is left out. BadInput for arrays that differ in shape or type."""

        def decode(entry: tuple) -> tuple:
            place, path, read = entry
            try:
                array = read()
            except Unreadable:
                if not self.skip_unreadable:
                    raise
                return place, path, None, None
            return place, path, array, work(array) if work else None

        first = None
        threads = threads or os.cpu_count()  # decoding leaves Python's lock, so threads do
        with closing(ahead(decode, entries, threads=threads, depth=4 * threads + depth)) as results:
            for place, path, array, result in results:
                if array is not None:
                    first = first or (path, array)
                    check_alike(path, array, *first)
                yield place, path, array, result


def check_alike(path: Path, array: np.ndarray, first_path: Path, first: np.ndarray) -> None:
    """BadInput if the images or latents of two files differ in shape or type."""
    if array.shape[1:] != first.shape[1:] or array.dtype != first.dtype:
        raise BadInput(f"{path} holds {array.dtype} {array.shape[1:]}, {first_path} {first.dtype} {first.shape[1:]}: "
                       "expected equal shapes; --size N makes images N pixels square")


def files_of(source: Path) -> list[Path]:
    """The files that `source` is made of, in the order of their names, without reading them: a file itself, a
    folder's images or .npy files with its subfolders, an lmdb's data.mdb. BadInput if there are none."""
    if (source / "data.mdb").is_file():
        return [source / "data.mdb"]
    if not source.is_dir():
        if not source.exists() or not source.name.lower().endswith((".zip", ".npy", *TARS)):
            raise BadInput(f"{source} {'is a file' if source.exists() else 'does not exist'}: {EXPECTED}")
        return [source]

    def refuse(error: OSError):
        raise error

    files = []
    for folder, folders, names in os.walk(source, onerror=refuse, followlinks=True):
        folders[:] = [name for name in folders if name[0] != "."]  # .thumbnails, .ipynb_checkpoints
        files += [Path(folder) / name for name in names if name[0] != "."]
    images = [path for path in files if path.suffix.lower() in SUFFIXES]
    latents = [path for path in files if path.suffix.lower() == ".npy" and path != source / LABELS]
    if images and latents:
        raise BadInput(f"{source} holds images ({min(images)}) and latents ({min(latents)}): expected one kind alone")
    if not images and not latents:
        raise BadInput(f"{source} holds no images: expected files ending in {' '.join(sorted(SUFFIXES))}, or .npy, or "
                       "the path of an archive")
    return sorted(images or latents)
