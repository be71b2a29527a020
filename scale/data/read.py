"""What lies in files, one by one: images in folders, archives and LSUN's lmdb, and latents in .npy files."""

from __future__ import annotations

import os
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from io import BytesIO
from pathlib import Path, PurePosixPath, PureWindowsPath
from threading import Lock
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from dansm import BadInput

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")  # zst: Python 3.14 on
LARGEST = 2**30  # bytes of one file in an archive: a hundred times any image to train on
SWELLS = 200  # times its packed size, which no photograph comes near; only for files large enough to hurt
HURTS = 2**24
EXPECTED = "expected a folder of images, a .zip or .tar of them, an LSUN lmdb, .npy latents, or cifar10"


class Unreadable(BadInput):
    """One file that cannot be read. The rest may do without it."""


class Source(NamedTuple):
    """What is to be read: `decode(path, payload)` makes an array (n, C, H, W) of each (place, path, payload).

    count is the length of all arrays together, place is where in it an array begins, and parts is how many there
    are. A path names a file for the user, and may lead into an archive.
    """

    count: int
    parts: int
    entries: Iterable[tuple[int, Path, object]]
    decode: Callable[[Path, object], np.ndarray]


def files_of(source: Path) -> list[Path]:
    """The files that `source` is made of, in the order of their names, without reading them: a file itself, a
    folder's images or latents with its subfolders, an lmdb's data.mdb. BadInput if there are none."""
    if not source.exists():
        raise BadInput(f"{source} does not exist: {EXPECTED}")
    if not source.is_dir():
        if not source.name.lower().endswith((".zip", ".npy", *TARS)):
            raise BadInput(f"{source} is a file: {EXPECTED}")
        return [source]
    if (source / "data.mdb").is_file():
        return [source / "data.mdb"]
    return find_files(source)


def find_files(folder: Path) -> list[Path]:
    """Every image file below `folder`, or every .npy file, in the order of their names."""

    def unreadable(error: OSError):
        raise BadInput(f"{error.filename} cannot be read: {error.strerror}")

    images, latents, archives = [], [], []
    for parent, _, names in os.walk(folder, onerror=unreadable, followlinks=True):
        for name in names:
            if (suffix := os.path.splitext(name)[1].lower()) in SUFFIXES:
                images.append(Path(parent) / name)
            elif suffix == ".npy":
                latents.append(Path(parent) / name)
            elif name.lower().endswith((".zip", *TARS)):
                archives.append(Path(parent) / name)
    if images and latents:
        raise BadInput(f"{folder} holds images ({min(images)}) and latents ({min(latents)}): expected one kind alone")
    if archives and not images and not latents:
        raise BadInput(f"{folder} holds no images, but archives: expected one of them, as {min(archives)}, "
                       "or the folder with them unpacked")
    if not images and not latents:
        raise BadInput(f"{folder} holds no images: expected files ending in {' '.join(sorted(SUFFIXES))}, or .npy")
    return sorted(images or latents)


@contextmanager
def opened(source: Path, files: list[Path], size: int | None) -> Iterator[Source]:
    """What `files_of` found in `source`, ready to be read by several threads at once."""
    image = partial(_decode_image, size=size)
    name = files[0].name.lower()
    if files[0] != source and name == "data.mdb":
        with _lmdb(source) as (count, entries):
            yield Source(count, count, entries, image)
    elif files[0] != source and name.endswith(".npy"):
        yield _latent_files(files, size)
    elif files[0] != source:
        yield Source(len(files), len(files), ((place, path, path) for place, path in enumerate(files)), image)
    elif name.endswith(".zip"):
        with _zip(source) as (count, entries):
            yield Source(count, count, entries, image)
    else:
        names = [member.name for _, member in _tar_members(source)]
        yield Source(len(names), len(names), _tar_entries(source, names), image)


# ------------------------------------------------------------------------------- images


def read_image(path: Path, size: int | None = None, payload=None) -> np.ndarray:
    """One image as (H, W, 3) uint8, of the file `path`, or of the bytes that `payload` is or returns.

    Raises Unreadable, naming it, also for one with more pixels than Pillow takes for an honest image.
    """
    try:
        file = path if payload is None or isinstance(payload, Path) else BytesIO(
            payload if isinstance(payload, bytes) else payload())
        with Image.open(file) as image:
            if image.mode.startswith(("I", "F")):  # more than 8 bits a pixel, which convert would cut off at 255
                image = Image.fromarray(_from_16_bits(np.asarray(image)))
            return square(image.convert("RGB"), size)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise Unreadable(f"{path} has more than the {Image.MAX_IMAGE_PIXELS:,} pixels that an image may have; "
                         "expected one, or --skip-unreadable, which leaves such files out") from error
    except MemoryError:
        raise
    except Exception as error:  # Pillow and the archives raise nearly every kind for what is not theirs
        raise Unreadable(f"{path} cannot be read as an image; expected one, or --skip-unreadable, which leaves such "
                         "files out") from error


def square(image: Image.Image, size: int | None) -> np.ndarray:
    """The centre square of `image`, `size` pixels wide, or all of it for None, as (H, W, 3) uint8."""
    return np.asarray(image if size is None else ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS))


def _decode_image(path: Path, payload, size: int | None) -> np.ndarray:
    return np.ascontiguousarray(read_image(path, size, payload).transpose(2, 0, 1))[None]


def _from_16_bits(pixels: np.ndarray) -> np.ndarray:
    if pixels.dtype.kind == "f" or pixels.min() < 0 or pixels.max() > 65535:
        raise ValueError("neither 8 nor 16 bits a pixel: what is white is not known")
    return (pixels // 257).astype(np.uint8)


# ------------------------------------------------------------------------------- archives


@contextmanager
def _whole(archive: Path) -> Iterator[None]:
    """BadInput with its name for whatever an archive that is damaged, cut off or none at all leads to."""
    try:
        yield
    except MemoryError:
        raise
    except BadInput as error:
        if str(archive) in str(error):
            raise
        raise BadInput(f"{archive}: {error}") from error
    except Exception as error:  # each packer has its own kinds
        raise BadInput(f"{archive} cannot be read, or is cut off ({' '.join(str(error).split())}): expected a whole "
                       "zip, tar or lmdb of images") from error


@contextmanager
def _zip(source: Path) -> Iterator[tuple[int, Iterator[tuple[int, Path, Callable[[], bytes]]]]]:
    """The images of a zip, in the order of their names."""
    with _whole(source):
        archive = zipfile.ZipFile(source)
    counting = Lock()  # a ZipFile's count of its open members is not safe among threads, reading them is

    def read(member):
        with counting:
            file = archive.open(member)
        try:
            return file.read()
        finally:
            with counting:
                file.close()

    with archive:
        with _whole(source):
            members = _zip_members(source, archive)
        yield len(members), ((place, source / member.filename, partial(read, member))
                             for place, member in enumerate(members))


def _zip_members(source: Path, archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    for member in archive.infolist():
        _check_member(source, member.filename, stat.S_ISLNK(member.external_attr >> 16))
        if member.flag_bits & 1:
            raise BadInput(f"{source} is encrypted ({member.filename}): expected an archive without a password")
        if member.file_size > LARGEST or member.file_size > max(HURTS, SWELLS * member.compress_size):
            raise _bomb(source / member.filename, member.file_size)
    members = [member for member in archive.infolist() if _is_image(member.filename)]
    if not members:
        raise _empty(source)
    return sorted(members, key=lambda member: PurePosixPath(member.filename))


class _Header(tarfile.TarInfo):
    """Refuses a long name, or what else stands before a file, that would not fit in memory."""

    @classmethod
    def frombuf(cls, *arguments):
        header = super().frombuf(*arguments)
        if not header.isreg() and header.size > HURTS:
            raise BadInput(f"it names a file by {header.size:,} bytes: expected names that are shorter")
        return header


def _tar_members(source: Path) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """The images in a tar in the order they lie there. Only those who read on know whether it is whole."""
    found = False
    with _whole(source), closing(tarfile.open(source, "r:*", tarinfo=_Header)) as archive:
        packed = source.stat().st_size
        while (member := archive.next()) is not None:
            archive.members.clear()  # it keeps all that it has passed: a gigabyte for a million
            _check_member(source, member.name, member.issym() or member.islnk())
            if member.size > LARGEST or member.offset_data + member.size > max(LARGEST, SWELLS * packed):
                raise _bomb(source / member.name, member.size)
            if member.isreg() and _is_image(member.name):
                found = True
                yield archive, member
        archive.fileobj.seek(archive.offset)  # tarfile takes a damaged header, or none, for the end
        if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise BadInput(f"{source} ends in the middle, or is damaged there: expected a whole tar")
    if not found:
        raise _empty(source)


def _tar_entries(source: Path, names: list[str]) -> Iterator[tuple[int, Path, bytes]]:
    """Read in one go, as a compressed tar can be; each image's place is that of its name."""
    places = np.empty(len(names), int)
    places[sorted(range(len(names)), key=lambda i: PurePosixPath(names[i]))] = np.arange(len(names))
    for place, (archive, member) in zip(places, _tar_members(source), strict=False):
        with _whole(source):
            content = archive.extractfile(member).read()
        yield int(place), source / member.name, content


def _check_member(source: Path, name: str, is_link: bool) -> None:
    path = PureWindowsPath(name)  # takes both kinds of slash
    if path.root or path.drive or ".." in path.parts:
        raise BadInput(f"{source} points outside of itself ({name!r}): expected relative paths without ..")
    if is_link:
        raise BadInput(f"{source} holds a link ({name!r}): expected files and folders alone")


def _is_image(name: str) -> bool:
    path = PurePosixPath(name)
    from_macos = path.name.startswith("._") or "__MACOSX" in path.parts  # bears an image's name and is none
    return path.suffix.lower() in SUFFIXES and not from_macos and not name.endswith("/")


def _bomb(path: Path, size: int) -> BadInput:
    return BadInput(f"{path} unpacks to {size:,} bytes: expected images of at most {LARGEST:,}, packed at most "
                    f"{SWELLS} times smaller")


def _empty(source: Path) -> BadInput:
    return BadInput(f"{source} holds no images: expected files ending in {' '.join(sorted(SUFFIXES))}")


@contextmanager
def _lmdb(folder: Path) -> Iterator[tuple[int, Iterator[tuple[int, Path, Callable[[], bytes]]]]]:
    """The images of an LSUN lmdb, whose values are image files, in the order of its keys."""
    try:
        import lmdb
    except ImportError as error:
        raise BadInput(f"{folder} is an lmdb, and the package that reads it is missing: expected lmdb installed "
                       "(pip install 'dansm[lsun]', or lmdb)") from error
    with _whole(folder):
        store = lmdb.open(str(folder), readonly=True, lock=False, readahead=False)

    def value(key):
        with store.begin() as transaction:
            return transaction.get(key)

    def entries():
        with _whole(folder), store.begin() as transaction, transaction.cursor() as cursor:
            for place, key in enumerate(cursor.iternext(values=False)):
                yield place, folder / key.decode("ascii", "backslashreplace"), partial(value, key)

    with closing(store):
        needed = (store.info()["last_pgno"] + 1) * store.stat()["psize"]
        if (folder / "data.mdb").stat().st_size < needed:  # to touch a page that is not there ends the process
            raise BadInput(f"{folder / 'data.mdb'} is cut off: expected {needed:,} bytes")
        if not (count := store.stat()["entries"]):
            raise BadInput(f"{folder} holds no images: expected an lmdb with some")
        with closing(entries()) as each:
            yield count, each


# ------------------------------------------------------------------------------- latents


def open_latents(path: Path, dims: tuple[int, ...] = (4,)) -> np.ndarray:
    """The array in a .npy file, left on the disk: float16 or float32, with one of `dims` dimensions.

    Raises Unreadable for what is no such file, and BadInput for any other array; no pickled object is read.
    """
    try:
        array = np.load(path, mmap_mode="c", allow_pickle=False)
    except MemoryError:
        raise
    except Exception as error:  # a header is parsed as Python
        reason = f" ({error.strerror})" if isinstance(error, OSError) and error.strerror else ""
        raise Unreadable(f"{path} cannot be read as latents{reason}: expected a whole .npy file of float16 or float32 "
                         "numbers") from error
    if not isinstance(array, np.ndarray) or array.dtype not in (np.float16, np.float32):
        raise BadInput(f"{path} holds {getattr(array, 'dtype', 'several arrays')}: expected latents of float16 or "
                       "float32")
    if array.ndim not in dims or 0 in array.shape:
        shapes = " or ".join({3: "(C, H, W)", 4: "(N, C, H, W)"}[dim] for dim in dims)
        raise BadInput(f"{path} holds an array {array.shape}: expected latents {shapes}")
    return array


def check_finite(path: Path, latents: np.ndarray, first: int = 0) -> None:
    """BadInput naming the file and the latent if one of its numbers is not finite. first: the number of latents[0]."""
    for start in range(0, len(latents), 1024):
        finite = np.isfinite(latents[start : start + 1024])
        if not finite.all():
            wrong = first + start + int((~finite).any((1, 2, 3)).argmax())
            raise BadInput(f"{path} holds NaN or infinite numbers, in latent {wrong}: expected finite latents")


def check_no_size(size: int | None, path: Path) -> None:
    if size is not None:
        raise BadInput(f"--size is {size}, and {path} holds latents, which are taken as they are: expected none")


def _latent_files(files: list[Path], size: int | None) -> Source:
    """A folder of latents: (C, H, W) each, or (n, C, H, W) each."""
    check_no_size(size, files[0])
    lengths = [1] * len(files)
    if (dims := open_latents(files[0], (3, 4)).ndim) == 4:
        lengths = [len(open_latents(path)) for path in files]
    places = np.cumsum([0, *lengths]).tolist()

    def decode(path, _):
        array = open_latents(path, (dims,))
        array = array if dims == 4 else array[None]
        check_finite(path, array)
        return array

    return Source(places[-1], len(files), zip(places, files, files, strict=False), decode)
