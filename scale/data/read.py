"""Sources of images and latents: folders, archives, LSUN's lmdb and arrays, read file by file without unpacking."""

import hashlib
import os
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
from PIL import Image

from dansm import BadInput

from ..base.text import counted, say
from ..base.threads import ahead
from . import arrays
from .archives import CLASS, LATENT, Entries, Opened, hold_latents, is_archive, names_in, open_archives, open_lmdb
from .cifar import find_cifar
from .folder import in_braces, in_words, is_hidden, kind_of, list_folder
from .pictures import Reading, Unreadable, read_image, suffixes

ARRAYS = "arrays (.npy, .npz, .safetensors, .pt)"
EXPECTED = f"expected a folder of images, .zip or .tar files of them, an LSUN lmdb, {ARRAYS}, or cifar10"
LABELS = "labels.npy"  # in a folder of images or latents, whose labels it holds
VERSION, OF_ARRAYS = 3, 2  # of how image files and arrays are read: a change makes caches of these be made again


@dataclass
class Source:
    """Images or latents, and how they are to be read.

    files  see `files_of`; none for cifar10
    reading  how each image is read
    skip_unreadable  leaves out images that cannot be read
    array  images or latents (N, C, H, W) that are decoded already
    """

    path: Path
    files: list[Path]
    reading: Reading = field(default_factory=Reading)
    skip_unreadable: bool = False
    array: np.ndarray | None = None
    told: bool = False  # what it passes over
    labels: str = "none"  # the setting of `load_labels`: by auto .cls are read, not passed over
    transparent: set[Path] = field(default_factory=set)  # what was read and let the background show through

    @property
    def holds_archives(self) -> bool:
        return bool(self.files) and is_archive(self.files[0])

    @property
    def holds_arrays(self) -> bool:
        return bool(self.files) and self.files[0].suffix.lower() in arrays.SUFFIXES

    @cached_property
    def holds_latents(self) -> bool:
        """Whether these are latents, not images: by the first file."""
        if self.holds_archives:
            return hold_latents(self.files)
        if self.array is None and not self.holds_arrays:
            return False
        first = arrays.open_array(self.files[0]) if self.array is None else self.array
        return first.dtype != np.uint8

    @property
    def wanted(self) -> Collection[str]:
        """The suffixes of the files that are read in archives."""
        return {LATENT} if self.holds_latents else suffixes()

    @cached_property
    def digest(self) -> str:
        """Another one as soon as a file is added, removed, renamed or written to. It is that of its first use."""
        return self.digest_for(f"{OF_ARRAYS if self.holds_arrays else VERSION} {self.reading}")

    def digest_for(self, read_as: str) -> str:
        """The digest of the files as they are now, if they are read in this way."""
        digest = hashlib.blake2b(read_as.encode(), digest_size=16)
        start = len(str(self.path if self.path.exists() else self.path.parent))  # else it is a pattern
        for path in self.files:
            state = path.stat() if path.exists() else path.lstat()  # a link that leads nowhere
            name = str(path)[start:]  # the same however the source was named
            digest.update(f"{name}\0{state.st_size}\0{state.st_mtime_ns}\0".encode(errors="surrogateescape"))
        return digest.hexdigest()

    def digest_now(self) -> str:
        """The digest of the files as they are now."""
        return replace(self, files=files_of(self.path)).digest

    @contextmanager
    def open(self) -> Iterator[Opened]:
        """Open the source for `decoded`, in several threads at once."""
        if self.array is not None:
            yield len(self.array), arrays.images_of([(self.path, self.array)], self.reading)
            return
        if self.holds_arrays:
            opened = arrays.open_latents if self.holds_latents else arrays.open_images
            yield opened(self.files, self.reading)
            return
        passed_over = Counter()
        if self.files[0].name == "data.mdb":
            opened = open_lmdb(self.path)
        elif self.holds_archives:
            opened = open_archives(self.files, self.wanted, passed_over)
        else:
            opened = nullcontext((len(self.files), ((place, path, path.read_bytes)
                                                    for place, path in enumerate(self.files))))
        with opened as (count, files), warnings.catch_warnings():
            if not count:
                raise no_images(self.path, passed_over, ", or latents in .npy" if self.holds_archives else "")
            if not self.told:
                if self.labels == "auto":
                    passed_over.pop(CLASS, None)
                say_passed_over(self.path, passed_over)
            self.told = True
            warnings.filterwarnings("ignore", module="PIL")  # of damaged EXIF, of palettes
            warnings.simplefilter("error", Image.DecompressionBombWarning)  # for images up to twice Pillow's limit
            yield count, ((place, path, partial(arrays.read_latent, path, read) if self.holds_latents else
                           partial(read_image, path, read, self.reading, self.transparent))
                          for place, path, read in files)

    def paths(self) -> list[Path]:
        """The path of each image or latent, which may lead into an archive, in their order. No image is read."""
        if self.holds_archives:
            return [archive / name for archive in self.files for name in names_in(archive, self.wanted)]
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
    """BadInput if the images or latents of two files differ in shape or type. Grey and coloured images may mix."""
    start = 2 if array.dtype == np.uint8 else 1
    alike = array.dtype == first.dtype
    if array.shape[start:] != first.shape[start:] or not alike:
        hint = "; --size N makes them N pixels square" if alike and first.dtype == np.uint8 else ""
        raise BadInput(f"{path} holds {array.dtype} {array.shape[1:]}, {first_path} {first.dtype} {first.shape[1:]}: "
                       f"expected equal {'shapes' if alike else 'types of numbers'}{hint}")


def files_of(source: Path) -> list[Path]:
    """The files that `source` is made of, in the order of their names, without reading them: a file itself, a
    folder's images, arrays or archives with its subfolders, those of a pattern, an lmdb's data.mdb. BadInput if there
    are none."""
    return list_files(source)[0]


def list_files(source: Path) -> tuple[list[Path], Counter]:
    """`files_of` a source, and how many others a folder holds, by why they are passed over."""
    if (source / "data.mdb").is_file():
        return [source / "data.mdb"], Counter()
    if cifar := find_cifar(source):
        return sorted(path for path in cifar[1].iterdir() if not is_hidden(path.name)), Counter()
    files, passed_over = in_braces(source), Counter()
    if not files and not source.is_dir():
        if not source.exists() or not (is_archive(source) or source.suffix.lower() in arrays.SUFFIXES):
            raise BadInput(f"{source} {'is a file' if source.exists() else 'does not exist'}: {EXPECTED}")
        return [source], Counter()
    if not files:
        files, passed_over = list_folder(source)
    by_sort = {"images": [], "arrays": [], "archives": [], "other files": []}
    for path in files:
        if path != source / LABELS:
            by_sort[_sort_of(path)].append(path)
    pictures, of_arrays, archives, _ = by_sort.values()
    if pictures and of_arrays:
        raise BadInput(f"{source} holds images ({pictures[0]}) and arrays ({of_arrays[0]}): expected one kind alone")
    wanted = pictures or of_arrays or archives
    passed_over += Counter(kind_of(path) for paths in by_sort.values() if paths is not wanted for path in paths)
    if not wanted:
        raise no_images(source, passed_over, f", {ARRAYS}, or archives")
    return wanted, passed_over


def _sort_of(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix in suffixes():
        return "images"
    if suffix in arrays.SUFFIXES:
        return "arrays"
    return "archives" if is_archive(path) else "other files"


def no_images(source: Path, passed_over: Counter, or_else: str = "") -> BadInput:
    there = f" ({in_words(passed_over)})" if passed_over else ""
    return BadInput(f"{source} holds no images{there}: expected .png, .jpg or others that Pillow opens{or_else}")


def say_transparent(source: Source, count: int) -> None:
    if count:
        images = counted(count, "image") + (" has" if count == 1 else " have")
        say(f"{source.path}: {images} transparent pixels, laid over {source.reading.background} (--background)")


def say_passed_over(source: Path, passed_over: Counter) -> None:
    if passed_over:
        say(f"{source}: passed over {in_words(passed_over)}")
