"""The images or latents of a zip or tar, and the images of an LSUN lmdb, read without unpacking."""

import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import closing, contextmanager
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import NamedTuple

import numpy as np

from dansm import BadInput

from ..base.text import shorten
from .folder import HIDDEN, is_hidden, kind_of
from .pictures import suffixes

TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")  # zst: Python 3.14 on
LARGEST = 2**30  # bytes of one file in an archive: a hundred times any image to train on
SWELLS = 200  # times its packed size, which no photograph comes near; only for files large enough to hurt
HURTS = 2**24
CLASS, LONGEST = ".cls", 1024  # of WebDataset: suffix of a class, and bytes that one may have, blanks included
LATENT = ".npy"  # and of a latent
OPEN = 32  # zips that are kept open at once: some systems allow a process 256 files

# (place in the order of names, path for the user, which may lead into an archive, what reads it) of each file
Entries = Iterable[tuple[int, Path, Callable]]
Opened = tuple[int, Entries]  # with how many images or latents there are, also those that turn out unreadable


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


def is_archive(path: Path) -> bool:
    return path.name.lower().endswith((".zip", *TARS))


def hold_latents(archives: list[Path]) -> bool:
    """Whether the first zip or tar with images or latents holds latents alone. Next to images .npy are other things."""
    for archive in archives:
        with _naming(archive):
            found = (PurePosixPath(name).suffix.lower() for name, _ in _members(archive, {*suffixes(), LATENT}))
            if first := next(found, None):
                return first == LATENT and all(suffix == LATENT for suffix in found)
    return False


def names_in(archive: Path, wanted: Collection[str]) -> list[PurePosixPath]:
    """The names of the files of wanted suffixes in a zip or tar, in the order in which they are counted."""
    with _naming(archive):
        names = sorted((name for name, _ in _members(archive, wanted)), key=PurePosixPath)
    return [PurePosixPath(name.lstrip("/")) for name in names]


class Classes(NamedTuple):
    """The .cls of an archive.

    numbers  the class of each image, in their order; None for images without one
    some     whether there are any .cls, be it of no image
    """

    numbers: list[int | None]
    some: bool


def classes_in(archive: Path, wanted: Collection[str]) -> Classes:
    """The classes of the files of wanted suffixes in a zip or tar, as WebDataset keeps them: the whole number in the
    .cls of the same name up to its first dot. BadInput for a .cls that holds no whole number below 2**31."""
    names, classes = [], {}
    with _naming(archive):
        for name, read in _members(archive, {*wanted, CLASS}):
            if not name.lower().endswith(CLASS):
                names.append(name)
                continue
            text = read(LONGEST + 1)
            if len(text) > LONGEST or not text.strip().isdigit() or int(text) >= 2**31:
                raise BadInput(f"{archive / name.lstrip('/')} holds {shorten(repr(text), 60)}: expected a whole number "
                               f"below {2**31:,}, the class, or --labels none")
            classes[_sample_of(name)] = int(text)
    return Classes([classes.get(_sample_of(name)) for name in sorted(names, key=PurePosixPath)], bool(classes))


def _members(archive: Path, wanted: Collection[str]) -> Iterator[tuple[str, Callable[[int], bytes]]]:
    """The name of each file of wanted suffixes in a zip or tar, and what reads it up to so many bytes."""
    if archive.suffix.lower() != ".zip":
        yield from ((name, file.read) for name, file in _tar_members(archive, wanted, Counter()))
        return
    with zipfile.ZipFile(archive) as opened:
        for member in _zip_members(opened, wanted, Counter()):
            yield member.filename, partial(_start_of, opened, member)


def _start_of(archive: zipfile.ZipFile, member: zipfile.ZipInfo, most: int) -> bytes:
    with archive.open(member) as file:
        return file.read(most)


def _sample_of(name: str) -> str:
    """What files of one sample have in common, by WebDataset's rule."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


@contextmanager
def open_archives(files: list[Path], wanted: Collection[str], passed_over: Counter) -> Iterator[Opened]:
    """The files of wanted suffixes in several zips and tars, one after the other. Counts in `passed_over` what else
    they hold."""
    opened_zip = lru_cache(OPEN)(_opened_zip)
    opened = [_open_zip(path, opened_zip, wanted, passed_over) if path.suffix.lower() == ".zip" else
              _open_tar(path, wanted, passed_over) for path in files]
    starts = np.cumsum([0, *(count for count, _ in opened)]).tolist()
    try:
        yield starts[-1], ((start + place, path, read) for start, (_, entries) in zip(starts, opened, strict=False)
                           for place, path, read in entries)
    finally:
        opened_zip.cache_clear()


def _opened_zip(source: Path) -> tuple[zipfile.ZipFile, Lock]:
    """A zip and its lock, as a ZipFile's count of its open members is not safe among threads. It closes once nobody
    holds it."""
    return zipfile.ZipFile(source), Lock()


def _open_zip(source: Path, opened_zip: Callable, wanted: Collection[str], passed_over: Counter) -> Opened:
    """The files of wanted suffixes in a zip, in the order of their names."""
    with _naming(source):
        members = _zip_members(opened_zip(source)[0], wanted, passed_over)
    members.sort(key=lambda member: PurePosixPath(member.filename))
    for member in members:
        if member.file_size > min(LARGEST, max(HURTS, SWELLS * member.compress_size)):
            raise _bomb(source / member.filename.lstrip("/"), member.file_size)

    def read(member: zipfile.ZipInfo) -> bytes:
        archive, alone = opened_zip(source)
        with alone:
            return archive.read(member)

    return len(members), ((place, source / member.filename.lstrip("/"), partial(read, member))
                          for place, member in enumerate(members))


def _zip_members(archive: zipfile.ZipFile, wanted: Collection[str], passed_over: Counter) -> list[zipfile.ZipInfo]:
    return [member for member in archive.infolist()
            if not member.is_dir() and _is_wanted(member.filename, wanted, passed_over)]


class _Header(tarfile.TarInfo):
    """Refuses a long name, or what else stands before a file, that would not fit in memory."""

    def _proc_member(self, archive):  # where tarfile has a subclass come in, once it has read a header
        if not self.isreg() and self.size > HURTS:
            raise ValueError(f"it names a file by {self.size:,} bytes")
        return super()._proc_member(archive)


def _open_tar(source: Path, wanted: Collection[str], passed_over: Counter) -> Opened:
    """The files of wanted suffixes in a tar, read in one go, as a compressed one can be; each one's place is that of
    its name."""
    with _naming(source):
        names = [name for name, _ in _tar_members(source, wanted, passed_over)]
    places = np.empty(len(names), int)
    places[sorted(range(len(names)), key=lambda number: PurePosixPath(names[number]))] = np.arange(len(names))

    def entries() -> Entries:
        with _naming(source):
            members = _tar_members(source, wanted, Counter())
            for place, (name, file) in zip(places.tolist(), members, strict=False):
                yield place, source / name.lstrip("/"), partial(bytes, file.read())

    return len(names), entries()


def _tar_members(source: Path, wanted: Collection[str],
                 passed_over: Counter) -> Iterator[tuple[str, tarfile.ExFileObject]]:
    """The files of wanted suffixes in a tar in the order they lie there. That it is cut off is noticed at its end only.
    """
    with tarfile.open(source, "r:*", tarinfo=_Header) as archive:
        packed = source.stat().st_size
        while (member := archive.next()) is not None:
            archive.members.clear()  # it keeps all that it has passed: a gigabyte for a million
            if member.size > LARGEST or member.offset_data + member.size > max(LARGEST, SWELLS * packed):
                raise _bomb(source / member.name.lstrip("/"), member.size)
            if member.issym() or member.islnk():
                raise BadInput(f"{source} holds a link ({member.name}): expected files and folders alone")
            if member.isreg() and _is_wanted(member.name, wanted, passed_over):
                yield member.name, archive.extractfile(member)
        archive.fileobj.seek(archive.offset)  # tarfile takes a damaged header, or none, for the end
        if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise BadInput(f"{source} ends in the middle, or is damaged there: expected a whole tar")


def _is_wanted(name: str, wanted: Collection[str], passed_over: Counter) -> bool:
    """Whether a file of that name has a wanted suffix and is not hidden. If not, count it."""
    path = PurePosixPath(name)
    hidden = any(map(is_hidden, path.parts))
    if path.suffix.lower() in wanted and not hidden:
        return True
    passed_over[HIDDEN if hidden else kind_of(path)] += 1
    return False


def _bomb(path: Path, size: int) -> BadInput:
    return BadInput(f"{path} unpacks to {size:,} bytes: expected images of at most {LARGEST:,}, packed at most "
                    f"{SWELLS} times smaller")


@contextmanager
def open_lmdb(folder: Path) -> Iterator[Opened]:
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
