"""Sources of images and latents: folders, archives, LSUN's lmdb and .npy files, read file by file without unpacking."""

import hashlib
import os
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from io import BytesIO
from pathlib import Path, PurePosixPath
from threading import Lock

import numpy as np
from PIL import Image, ImageOps

from dansm import BadInput

from ..base.threads import ahead

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")  # zst: Python 3.14 on
LARGEST = 2**30  # bytes of one file in an archive: a hundred times any image to train on
SWELLS = 200  # times its packed size, which no photograph comes near; only for files large enough to hurt
HURTS = 2**24
EXPECTED = "expected a folder of images, a .zip or .tar of them, an LSUN lmdb, .npy latents, or cifar10"
LABELS = "labels.npy"  # in a folder of images or latents, whose labels it holds
VERSION = 2  # a change makes all caches decode again

# (place in the order of names, path for the user, which may lead into an archive, what reads it) of each file
Entries = Iterable[tuple[int, Path, Callable]]
Opened = tuple[int, Entries]  # with how many images or latents there are, also those that turn out unreadable


class Unreadable(BadInput):
    """One file that cannot be read. The rest may do without it."""


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
            yield _open_latents(self.files)
            return
        if self.files[0].name == "data.mdb":
            opened = _open_lmdb(self.path)
        elif self.files[0] != self.path:
            opened = nullcontext((len(self.files), ((place, path, path.read_bytes)
                                                    for place, path in enumerate(self.files))))
        else:
            opened = _open_zip(self.path) if self.path.suffix.lower() == ".zip" else _open_tar(self.path)
        with opened as (count, files), warnings.catch_warnings():
            if not count:
                raise BadInput(f"{self.path} holds no images: expected files ending in {' '.join(sorted(SUFFIXES))}")
            warnings.filterwarnings("ignore", module="PIL")  # of damaged EXIF, of palettes
            warnings.simplefilter("error", Image.DecompressionBombWarning)  # for images up to twice Pillow's limit
            yield count, ((place, path, partial(read_image, path, read, self.size)) for place, path, read in files)

    def paths(self) -> list[Path]:
        """The path of each image or latent, which may lead into an archive, in their order. No image is read."""
        if self.files == [self.path] and self.path.name.lower().endswith(TARS):
            return [self.path / name.lstrip("/") for name in sorted(_names_in_tar(self.path), key=PurePosixPath)]
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


# ------------------------------------------------------------------------------- images


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


# ------------------------------------------------------------------------------- archives


@contextmanager
def _naming(archive: Path) -> Iterator[None]:
    """Turn any error of a damaged, cut off or foreign archive into BadInput with the archive's path."""
    try:
        yield
    except (BadInput, MemoryError):
        raise
    except Exception as error:  # each packer has its own kinds
        raise BadInput(f"{archive} cannot be read, or is cut off ({' '.join(str(error).split())}): expected a whole "
                       "zip, tar or lmdb of images") from error


@contextmanager
def _open_zip(source: Path) -> Iterator[Opened]:
    with _naming(source):
        archive = zipfile.ZipFile(source)
    alone = Lock()  # a ZipFile's count of its open members is not safe among threads

    def read(member: zipfile.ZipInfo) -> bytes:
        with alone:
            return archive.read(member)

    with archive:
        members = sorted((member for member in archive.infolist() if _is_image(member.filename)),
                         key=lambda member: PurePosixPath(member.filename))
        for member in members:
            if member.file_size > min(LARGEST, max(HURTS, SWELLS * member.compress_size)):
                raise _bomb(source / member.filename.lstrip("/"), member.file_size)
        yield len(members), ((place, source / member.filename.lstrip("/"), partial(read, member))
                             for place, member in enumerate(members))


class _Header(tarfile.TarInfo):
    """Refuses a long name, or what else stands before a file, that would not fit in memory."""

    def _proc_member(self, archive):  # where tarfile has a subclass come in, once it has read a header
        if not self.isreg() and self.size > HURTS:
            raise ValueError(f"it names a file by {self.size:,} bytes")
        return super()._proc_member(archive)


@contextmanager
def _open_tar(source: Path) -> Iterator[Opened]:
    """The images of a tar, read in one go, as a compressed one can be; each image's place is that of its name."""
    names = _names_in_tar(source)
    places = np.empty(len(names), int)
    places[sorted(range(len(names)), key=lambda number: PurePosixPath(names[number]))] = np.arange(len(names))

    def entries() -> Entries:
        with _naming(source):
            for place, (name, file) in zip(places.tolist(), _tar_members(source), strict=False):
                yield place, source / name.lstrip("/"), partial(bytes, file.read())

    yield len(names), entries()


def _names_in_tar(source: Path) -> list[str]:
    with _naming(source):
        return [name for name, _ in _tar_members(source)]


def _tar_members(source: Path) -> Iterator[tuple[str, tarfile.ExFileObject]]:
    """The images in a tar in the order they lie there. That it is cut off is noticed at its end only."""
    with tarfile.open(source, "r:*", tarinfo=_Header) as archive:
        packed = source.stat().st_size
        while (member := archive.next()) is not None:
            archive.members.clear()  # it keeps all that it has passed: a gigabyte for a million
            if member.size > LARGEST or member.offset_data + member.size > max(LARGEST, SWELLS * packed):
                raise _bomb(source / member.name.lstrip("/"), member.size)
            if member.issym() or member.islnk():
                raise BadInput(f"{source} holds a link ({member.name}): expected files and folders alone")
            if member.isreg() and _is_image(member.name):
                yield member.name, archive.extractfile(member)
        archive.fileobj.seek(archive.offset)  # tarfile takes a damaged header, or none, for the end
        if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise BadInput(f"{source} ends in the middle, or is damaged there: expected a whole tar")


def _is_image(name: str) -> bool:
    path = PurePosixPath(name)
    from_macos = path.name.startswith("._") or "__MACOSX" in path.parts  # bears an image's name and is none
    return path.suffix.lower() in SUFFIXES and not from_macos and not name.endswith("/")


def _bomb(path: Path, size: int) -> BadInput:
    return BadInput(f"{path} unpacks to {size:,} bytes: expected images of at most {LARGEST:,}, packed at most "
                    f"{SWELLS} times smaller")


@contextmanager
def _open_lmdb(folder: Path) -> Iterator[Opened]:
    """The images of an LSUN lmdb, whose values are image files, in the order of its keys."""
    import lmdb

    def entries() -> Entries:
        with _naming(folder):
            for place, (key, value) in enumerate(transaction.cursor()):
                yield place, folder / bytes(key).decode("ascii", "backslashreplace"), partial(bytes, value)

    with _naming(folder):
        store = lmdb.open(str(folder), readonly=True, lock=False, readahead=False)
    with closing(store), store.begin(buffers=True) as transaction:  # values are views of the file, until it ends
        needed = (store.info()["last_pgno"] + 1) * store.stat()["psize"]
        if (folder / "data.mdb").stat().st_size < needed:  # to touch a page that is not there ends the process
            raise BadInput(f"{folder / 'data.mdb'} is cut off: expected {needed:,} bytes")
        yield store.stat()["entries"], entries()


# ------------------------------------------------------------------------------- latents


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


def _open_latents(files: list[Path]) -> Opened:
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
