"""Images from files to the device: decoded once, kept as one array, shuffled and flipped there."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dansm import BadInput, check_count

from ..base.machine import free_memory
from ..base.text import say
from ..base.threads import ahead
from .cache import OPTION, SHARED, cached, digest_of_files, find_cached
from .latents import Shards, draw_latents, known_on_disk, open_encoded
from .pixels import from_uint8
from .read import Source, Unreadable, check_finite, check_no_size, files_of, open_latents, opened, square

RESIDENT = 1 / 2  # of the device's free memory may be taken by the data: the rest is for training
AHEAD, READERS = 4, 2  # batches read before they are asked for, and threads that do


def load_images(source: str, *, size: int | None = None, skip_unreadable: bool = False,
                track=lambda images, total: images, left_out: list[Path] | None = None,
                cache: Path | None = None, share: bool = False) -> Tensor | np.ndarray | Shards:
    """All of `source` as one array (N, C, H, W): uint8 for images, float16 or float32 for latents.

    source  images: a folder, read with its subfolders in the order of their names; a .zip, .tar, .tar.gz, .tar.bz2 or
            .tar.xz of them (.tar.zst from Python 3.14 on), read without unpacking; an LSUN lmdb, a folder with
            data.mdb; or "cifar10", which torchvision downloads into data/ at first use.
            Latents: a folder that dansm encode wrote; a .npy file (N, C, H, W), or a folder of .npy files, all
            (C, H, W) or all (n, C, H, W).
    size    shorter side to this many pixels, then the centre square; None takes the images as they are.
    track   wraps what is read while it is read, to show progress: track(images, total) yields what it is given.
    left_out  gets the paths of the files that `skip_unreadable` left out.
    cache   a folder that keeps what was decoded: the array stays on the disk, memory-mapped, and the next call for
            the same files decodes nothing. Of several processes one decodes and the others wait for it.
    share   whether `scale.cache.SHARED` is taken for want of a cache. What lies there already is used anyhow.

    A tensor in memory, or an np.memmap where a cache or a .npy file holds it, or `Shards` where an encode does;
    `batches` takes any. Who needs each image but once takes `stream_images`. Raises BadInput
    for a source that is missing, empty, damaged, encrypted or unsafe, for an unreadable file (named; left out if
    `skip_unreadable`), for unequal sizes (two files named), for latents that are not finite, for an array of more than
    half of the free memory where there is no cache, and for a cache on a disk without room for it.
    """
    if _is_cifar10(source):
        images = _cifar10()
        images = images if size is None else np.stack([square(Image.fromarray(image), size) for image in images])
        return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    source, left_out = Path(source), [] if left_out is None else left_out
    if known := known_on_disk(source):
        check_no_size(size, source)
        return open_encoded(source, known)
    files = files_of(source)
    if files[0] == source and source.suffix.lower() == ".npy":
        return _one_file_of_latents(source, size, track)
    decode = partial(_decode, source, files, size, skip_unreadable, track)
    if cache is not None:
        _check_outside("--cache", source, cache)
        return cached(cache, source, files, size, skip_unreadable, left_out, decode)
    shared = SHARED.expanduser()
    if (found := find_cached(shared, source, files, size, skip_unreadable, left_out)) is None:
        if not share:
            return torch.from_numpy(decode(left_out, _in_memory))
        _check_outside("the folder of decoded images", source, shared, f" ({OPTION})")
        found = cached(shared, source, files, size, skip_unreadable, left_out, decode)
    _say_shared(found)
    return found


def _say_shared(found: np.memmap) -> None:
    kind = "images" if found.dtype == np.uint8 else "latents"
    say(f"decoded {kind}: {found.filename}, {found.nbytes / 1e9:,.1f} GB; every later run of these files finds it",
        "there, delete it if none will")


def check_out(source: str, out: Path) -> None:
    """BadInput if results in `out` would lie in the folder of images: the next run would read samples.png as one."""
    _check_outside("--out", source, out)


def _check_outside(option, source, folder, names_another=""):
    if str(source) and Path(source).is_dir() and folder.resolve().is_relative_to(Path(source).resolve()):
        raise BadInput(f"{option} is {folder}, inside {source}, whose images are read with all its subfolders: "
                       f"expected a folder outside of it{names_another}")


def _is_cifar10(source: str) -> bool:
    if not str(source):
        raise BadInput("the folder of images is '': expected a path, or cifar10")
    return source == "cifar10" and not Path(source).exists()


def _cifar10(root: str = "data") -> np.ndarray:
    """(N, H, W, 3) uint8"""
    from torchvision.datasets import CIFAR10

    try:
        return CIFAR10(root, download=True).data
    except (OSError, RuntimeError) as error:
        raise BadInput(f"CIFAR-10 is not in {root} and could not be downloaded ({error}): expected a connection, or "
                       "the path of a folder of images") from error


def _one_file_of_latents(path: Path, size: int | None, track) -> np.ndarray:
    check_no_size(size, path)
    latents = open_latents(path)
    parts = np.array_split(latents, max(1, latents.nbytes // 2**26))
    starts = np.cumsum([0, *map(len, parts)])

    def check(number):
        check_finite(path, parts[number], starts[number])

    with closing(ahead(check, range(len(parts)), threads=os.cpu_count(), depth=os.cpu_count())) as checked:
        for _ in track(checked, len(parts)):
            pass
    return latents


# ------------------------------------------------------------------------------- one after the other


class Stream(NamedTuple):
    """Images that are decoded as they are read, for what needs each but once: they need not fit in the memory.

    key      of the files and of how they are read
    key_now  called, the same as long as no file is added, removed, renamed or written to
    reading  called, a context with the Source
    skip_unreadable  whether images that cannot be read are left out
    """

    key: str
    key_now: Callable[[], str]
    reading: Callable[[], AbstractContextManager[Source]]
    skip_unreadable: bool


def stream_images(source: str, *, size: int | None = None, skip_unreadable: bool = False,
                  caches: Iterable[Path] = ()) -> Stream:
    """The images of `source`, none of which is decoded here: for `streamed`. Parameters are those of `load_images`,
    and `caches` are folders that may hold them decoded. Raises BadInput for a source that is missing or empty, and for
    latents."""
    if _is_cifar10(source):
        images = _cifar10()
        key = f"cifar10 {size} {hashlib.blake2b(images, digest_size=16).hexdigest()}"
        return Stream(key, lambda: key, partial(_of_arrays, images, source, partial(_resized, size)), False)
    source = Path(source)
    files = [] if known_on_disk(source) else files_of(source)
    if not files or files[0].suffix.lower() == ".npy":
        raise BadInput(f"{source} holds latents: expected images")

    def key(files):
        return f"{source.resolve()} {digest_of_files(source, files, size)} {skip_unreadable}"

    key_then, reading = key(files), partial(opened, source, files, size)  # before a cache is asked for these files
    for cache in (*caches, shared := SHARED.expanduser()):
        if (found := find_cached(cache, source, files, size, skip_unreadable, [])) is not None:
            if cache == shared:
                _say_shared(found)
            reading = partial(_of_arrays, np.asarray(found), source, lambda _, image: image[None])
            break
    return Stream(key_then, lambda: key(files_of(source)), reading, skip_unreadable)


@contextmanager
def _of_arrays(arrays: np.ndarray, source, decode) -> Iterator[Source]:
    """Arrays that are there already, as if each were a file."""
    yield Source(len(arrays), len(arrays), ((place, source, array) for place, array in enumerate(arrays)), decode)


def _resized(size: int | None, _, image: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(square(Image.fromarray(image), size).transpose(2, 0, 1))[None]


@contextmanager
def streamed(stream: Stream, also: Callable[[np.ndarray], object], depth: int) -> Iterator[tuple[int, Iterator]]:
    """How many images there are, with those that turn out unreadable, and each as it comes: (place, path, image
    (1, C, H, W) uint8, also(image)), where image is None if it is left out. An archive may give them in another order
    than that of their places. Threads are up to `depth` images and a few ahead."""

    def work(read, entry):
        place, path, image = decode_one(read, stream.skip_unreadable, entry)
        return place, path, image, None if image is None else also(image)

    with _decoding(stream.reading(), work, depth) as (read, decoded):
        yield read.count, _alike(decoded)


# ------------------------------------------------------------------------------- decoding


def _decode(source, files, size, skip_unreadable, track, left_out, make_array) -> np.ndarray:
    """Every file of `source` in one array, which make_array(source, shape, dtype) makes once their shape is known."""
    def work(read, entry):
        return decode_one(read, skip_unreadable, entry)

    with _decoding(opened(source, files, size), work) as (read, decoded):
        array, there, missing = None, np.zeros(read.count, bool), []
        for place, path, part in _alike(track(decoded, read.parts)):
            if part is None:
                missing.append((place, path))
                continue
            if array is None:
                array = make_array(source, (read.count, *part.shape[1:]), part.dtype)
            array[place : place + len(part)] = part
            there[place : place + len(part)] = True
    if array is None:
        kind = "latent" if files[0].suffix == ".npy" else "image"
        raise BadInput(f"{source} holds {len(missing)} {kind} files, none of them readable")
    left_out += [path for _, path in sorted(missing)]
    if missing:
        for to, place in enumerate(np.flatnonzero(there)):
            array[to] = array[place]
    return array[: there.sum()]


@contextmanager
def _decoding(reading: AbstractContextManager[Source], work: Callable, depth: int = 0) -> Iterator:
    """A Source, and work(source, entry) of each of its entries, begun up to `depth` and a few before it is due."""
    with reading as read, bombs_refused():
        threads, work = os.cpu_count(), partial(work, read)  # decoding leaves Python's lock, so threads do
        with closing(ahead(work, read.entries, threads=threads, depth=4 * threads + depth)) as decoded:
            yield read, decoded


def _alike(decoded: Iterable) -> Iterator:
    """The same; BadInput, naming two, where one is of another shape or type than the first."""
    first = None
    for place, path, part, *more in decoded:
        if part is not None:
            first = first or (path, part)
            if part.shape[1:] != first[1].shape[1:] or part.dtype != first[1].dtype:
                raise _unequal(path, part, *first)
        yield place, path, part, *more


def decode_one(read: Source, skip_unreadable, entry):
    place, path, payload = entry
    try:
        return place, path, read.decode(path, payload)
    except Unreadable:
        if skip_unreadable:
            return place, path, None
        raise


@contextmanager
def bombs_refused():
    """Pillow only warns of an image up to twice its limit."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def _unequal(path, part, first, array) -> BadInput:
    if array.dtype == np.uint8:
        return BadInput(f"{path} is {_pixels(part)}, {first} is {_pixels(array)}: expected images of equal size; "
                        "--size N makes them N pixels square")
    return BadInput(f"{path} holds {part.dtype} {part.shape[1:]}, {first} {array.dtype} {array.shape[1:]}: expected "
                    "latents of equal shape and type")


def _pixels(images: np.ndarray) -> str:
    return f"{images.shape[3]}×{images.shape[2]}"


def _in_memory(source: Path, shape: tuple[int, ...], dtype) -> np.ndarray:
    needed, free = int(np.prod(shape)) * dtype.itemsize, free_memory("cpu")
    if needed > free / 2:
        raise BadInput(f"{source} takes {needed / 1e9:,.1f} GB decoded, and half of the free memory is "
                       f"{free / 2e9:,.1f} GB: expected smaller images (--size), or a folder to keep them in "
                       f"({OPTION})")
    return np.empty(shape, dtype)


def look(images: Tensor | np.ndarray | Shards) -> list[float]:
    """By which a run knows its data again: the means of 64 images, from the first to the last, white being 1, or of
    latents."""
    white = 255 if str(images.dtype).endswith("uint8") else 1
    places = np.linspace(0, len(images) - 1, 64).round().astype(int)
    return [torch.as_tensor(images[place]).double().mean().item() / white for place in places]


def look_alike(before: list[float], now: list[float]) -> bool:
    """Within one of 255 steps, as two decoders of JPEG do not make the same of a file."""
    return all(abs(one - other) <= 1 / 255 for one, other in zip(before, now, strict=True))


# ------------------------------------------------------------------------------- to the device


def batches(images: Tensor | np.ndarray | Shards, batch: int, *, seed: int = 0, flip: bool = True, start: int = 0,
            rank: int = 0, ranks: int = 1, device=None, resident: bool | None = None) -> Iterator[Tensor]:
    """Endless batches (batch / ranks, C, H, W) float32 on `device`, by default where the images are.

    images    (N, C, H, W) uint8, served in [−1, 1], or float16 or float32 latents, served as they are; of `Shards` of
              moments, latents drawn anew each time, by seed and number of the batch.
    rank      of `ranks` gets its part of each batch: the parts joined in their order are the batch of one process.
    resident  whether the images live on the device; None: if they take up to half of its free memory. Those
              that do not are read by threads a few batches ahead. The batches are the same to the last bit.

    Each epoch is a permutation, with its own mirrored half, that depends on seed and epoch alone: batch
    number `start` is the same for a run that is resumed there. A batch may end one epoch and begin the next.
    Raises BadInput for images of another type, and for a batch that `ranks` does not divide.
    """
    if images.ndim != 4 or 0 in images.shape or str(images.dtype).split(".")[-1] not in ("uint8", "float16", "float32"):
        raise BadInput(f"the images are {images.dtype} {tuple(images.shape)}: expected uint8, float16 or float32 "
                       "(N, C, H, W)")
    batch, ranks = check_count("batch", batch), check_count("ranks", ranks)
    start, rank = check_count("start", start, 0), check_count("rank", rank, 0)
    if batch % ranks or rank >= ranks:
        raise BadInput(f"batch is {batch}, for rank {rank} of {ranks}: expected a batch that {ranks} divides, and a "
                       f"rank below {ranks}")
    if device is None:
        device = images.device if isinstance(images, Tensor) else "cpu"
    device = torch.device(device)
    side = torch.cuda.Stream(device) if device.type == "cuda" else None
    device = side.device if side else device  # cuda:0 for cuda, as the threads know no current device
    if resident is None:
        resident = _may_live_on(device, images)
    shares = partial(_shares, len(images), batch, seed, flip, start, rank, ranks)
    if resident:
        there = images.on(device) if isinstance(images, Shards) else _tensor(images).to(device)
        served = _served_there(there, shares(device, side))
    else:
        images = images.cpu().numpy() if isinstance(images, Tensor) else images
        served = _read_ahead(images, shares(torch.device("cpu"), None), device, side)
    if isinstance(images, Shards) and images.moments:
        return _drawn(served, batch, seed, start, rank * (batch // ranks), device)
    return served


def _may_live_on(device: torch.device, images) -> bool:
    if isinstance(images, Tensor) and images.device == device:
        return True
    if device.type == "cpu":
        return not isinstance(images, np.memmap | Shards)
    return images.nbytes <= RESIDENT * free_memory(device)


def _tensor(images: Tensor | np.ndarray) -> Tensor:
    if isinstance(images, Tensor):
        return images
    return torch.from_numpy(images if images.flags.writeable else images.copy())  # torch warns of what is read-only


def _served_there(images: Tensor, shares) -> Iterator[Tensor]:
    with closing(shares):
        for rows, mirrored in shares:
            yield _finished(images.index_select(0, rows), mirrored)


def _read_ahead(images: np.ndarray, shares, device, side) -> Iterator[Tensor]:
    def gather(share):
        rows, mirrored = share
        by_place = np.argsort(rows.numpy())  # in the order of the file: fewer, longer reads
        sorted_rows = np.take(images, rows.numpy()[by_place], axis=0)
        x = torch.empty(sorted_rows.shape, dtype=getattr(torch, str(images.dtype)), pin_memory=side is not None)
        np.take(sorted_rows, np.argsort(by_place), axis=0, out=x.numpy(), mode="clip")  # as raise would copy
        return _send((x, mirrored), device, side)

    with closing(shares), closing(ahead(gather, shares, threads=READERS, depth=AHEAD)) as gathered:
        for sent in gathered:
            yield _finished(*_received(*sent))


def _drawn(served, batch, seed, start, first, device) -> Iterator[Tensor]:
    """Latents of the means and log-variances that are served. Every rank draws the noises of the whole batch and keeps
    its own, from `first` on, so that it is the batch of one process."""
    numbers = torch.Generator(device)
    with closing(served):
        for number, moments in enumerate(served, start):
            numbers.manual_seed(int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0]) >> 1)
            channels, *size = moments.shape[1:]
            noise = torch.randn(batch, channels // 2, *size, device=device, generator=numbers)
            yield draw_latents(moments, noise[first : first + len(moments)])


def _finished(x: Tensor, mirrored: Tensor) -> Tensor:
    x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
    return from_uint8(x) if x.dtype == torch.uint8 else x.float()


def _shares(length, batch, seed, flip, start, rank, ranks, device, side) -> Iterator[list[Tensor]]:
    """One rank's part of each batch: rows (batch / ranks,) int64 and whether each is mirrored, on `device`.

    The next epoch is drawn in a thread while this one is served: three million images take a quarter of a second.
    """

    def draw(epoch):
        numbers = np.random.default_rng([seed, epoch])
        rows, mirrored = numbers.permutation(length), numbers.random(length) < (0.5 if flip else 0)
        return _send((torch.from_numpy(rows), torch.from_numpy(mirrored)), device, side)

    share = batch // ranks
    first = start * batch + rank * share
    epoch, order = first // length - 1, None
    with closing(ahead(draw, count(epoch + 1), threads=1, depth=1)) as epochs:
        for place in count(first, batch):
            parts, end = [], place + share
            while place < end:
                while epoch < place // length:
                    epoch, order = epoch + 1, _received(*next(epochs))
                begin = place % length
                taken = min(length - begin, end - place)
                parts.append([part[begin : begin + taken] for part in order])
                place += taken
            yield parts[0] if len(parts) == 1 else [torch.cat(part) for part in zip(*parts, strict=True)]


def _send(tensors, device, side):
    """The tensors on `device`, on a GPU by a stream of its own, and the event that tells when they are there."""
    if side is None:
        return [tensor.to(device) for tensor in tensors], None
    with torch.cuda.stream(side):
        return [tensor.pin_memory().to(device, non_blocking=True) for tensor in tensors], side.record_event()


def _received(tensors, sent) -> list[Tensor]:
    """What `_send` gave, safe to use on the stream at work here: the GPU waits, the thread does not."""
    if sent is not None:
        current = torch.cuda.current_stream(tensors[0].device)
        current.wait_event(sent)
        for tensor in tensors:
            tensor.record_stream(current)
    return tensors
