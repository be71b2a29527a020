"""Images from files to the device: decoded once, kept as one array, shuffled and flipped there."""

from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dansm import BadInput

from ..base.machine import free_memory
from ..base.text import say
from ..base.threads import ahead
from .arrays import check_finite, open_samples, say_pixels
from .cache import decode_into_cache, decode_into_memory
from .cifar import open_cifar
from .latents import Shards, known_on_disk, open_encoded
from .pictures import Reading
from .pixels import from_uint8
from .read import Source, files_of, list_files, say_passed_over, say_transparent

SHARED = Path("~/.cache/dansm/images")  # where processes of one machine find what one of them has decoded
RESIDENT = 1 / 2  # share of the device's free memory that the data may take: the rest is for training
CPU = torch.device("cpu")
AHEAD, READERS = 4, 2  # batches read before they are asked for, and threads that read them


def load_images(source: str, *, size: int | None = None, background: str = "white", channels: int = 0,
                skip_unreadable: bool = False, left_out: list[Path] | None = None, cache: Path | None = None,
                share: bool = False, labels: str = "none") -> Tensor | np.ndarray | Shards:
    """All of `source` as one array (N, C, H, W): uint8 for images, float16 or float32 for latents.

    source  images: a folder with its subfolders, in the order of their names; a .zip, .tar, .tar.gz, .tar.bz2, .tar.xz
            (from Python 3.14 on also .tar.zst) of them, read without unpacking; an LSUN lmdb, a folder with data.mdb;
            "cifar10", which torchvision downloads into data/ at first use; or the folder in which it leaves CIFAR-10 or
            CIFAR-100.
            Arrays: uint8 images or latents in a .npy, .npz, .safetensors or .pt file, see `arrays.open_samples`, or a
            folder of such files. Latents: also a folder that dansm encode wrote, and archives of .npy files (C, H, W)
            without images.
    size    shorter side to this many pixels, then the centre square; None takes the images as they are.
    background  colour under transparent pixels, by name or as #rrggbb.
    channels  1 makes images grey, 3 coloured; 0: one if all are grey, else three.
    left_out  gets the paths of the files that `skip_unreadable` left out.
    cache   a folder that keeps what was decoded, memory-mapped: the next call for the same files decodes nothing.
    share   use SHARED if no cache is given.
    labels  the setting that `load_labels` is to be called with, so that a line tells only what nobody reads.

    Returns a tensor in memory, an np.memmap of a cache or a .npy file, or the `Shards` of an encode; `batches` takes
    any of them. Raises BadInput for a source that is missing, empty, damaged, of unequal shapes, not finite, or larger
    than half of the free memory (without a cache), and for an unreadable file, which it names.
    """
    reading = Reading(size, background, channels)
    encoded = known_on_disk(Path(source)) if source else {}
    files = None if encoded else find_source(source, reading, skip_unreadable, labels)
    if encoded or files.holds_latents:
        for option, value in {"--size": size, "--channels": channels}.items():
            if value:
                raise BadInput(f"{option} is {value}, and {source} holds latents, which are taken as they are: "
                               f"expected no {option}")
    if encoded:
        return open_encoded(Path(source), encoded)
    if files.array is not None and reading.keeps(files.array):
        if files.holds_latents:
            check_finite(files.path, files.array)
            say_pixels(files.path, files.array)
        return files.array if isinstance(files.array, np.memmap) else torch.from_numpy(files.array)
    if cache is None and not share:
        array, missing, transparent = decode_into_memory(files)
        array = torch.from_numpy(array)
    else:
        folder = cache or SHARED.expanduser()
        check_out(files.path, folder, "--cache")
        array, missing, transparent = decode_into_cache(folder, files)
        if cache is None:
            say(f"decoded images: {array.filename}, {array.nbytes / 1e9:,.1f} GB; every later run of several processes",
                "finds it there, delete it if none will")
    say_transparent(files, transparent)
    if files.holds_latents:
        say_pixels(files.path, array)
    if left_out is not None:
        left_out += missing
    return array


def check_latents(source: str) -> None:
    """BadInput if the data of a recipe for latents is missing, or is images."""
    path = Path(source)
    if not source or not path.exists():
        found = "does not exist"
    elif known_on_disk(path) or Source(path, files_of(path)).holds_latents:
        return
    else:
        found = "holds images"
    raise BadInput(f"{source} {found}: expected latents, which dansm encode makes of images; --data names them")


def find_source(name: str, reading: Reading, skip_unreadable: bool, labels: str = "none") -> Source:
    """The source of that name, or cifar10. BadInput for one that is missing or empty."""
    if not name:
        raise BadInput("the folder of images is '': expected a path, or cifar10")
    path = Path(name)
    if cifar := open_cifar(name):
        images = np.ascontiguousarray(cifar[1].data.transpose(0, 3, 1, 2))
        return Source(path, files_of(path) if path.exists() else [], reading, array=images)
    files, passed_over = list_files(path)
    say_passed_over(path, passed_over)
    source = Source(path, files, reading, skip_unreadable, labels=labels)
    if source.holds_arrays and files == [path]:
        source.array = open_samples(path)
    return source


def check_out(source: str | Path, out: Path, option: str = "--out") -> None:
    """BadInput if results in `out` would lie in the folder of images: the next run would read samples.png as one."""
    if str(source) and Path(source).is_dir() and out.resolve().is_relative_to(Path(source).resolve()):
        raise BadInput(f"{option} is {out}, inside {source}, whose images are read with all its subfolders: expected a "
                       "folder outside of it")


def stream_images(source: str, *, size: int | None = None, background: str = "white", channels: int = 3,
                  skip_unreadable: bool = False, labels: str = "none") -> Source:
    """The images of `source`, to be decoded as they are read: they need not fit in the memory. labels: as of
    `load_images`. BadInput for latents, and for a source that is missing or empty."""
    images = find_source(source, Reading(size, background, channels), skip_unreadable, labels)
    if images.holds_latents:
        raise BadInput(f"{source} holds latents: expected images")
    return images


def look(images: Tensor | np.ndarray | Shards) -> list[float]:
    """What a run recognises its data by: the means of 64 images, from the first to the last, white being 1, or of
    latents."""
    white = 255 if str(images.dtype).endswith("uint8") else 1
    places = np.linspace(0, len(images) - 1, 64).round().astype(int)
    return [torch.as_tensor(images[place]).double().mean().item() / white for place in places]


def look_alike(before: list[float], now: list[float]) -> bool:
    """Within one of 255 steps, as two decoders of JPEG do not make the same of a file."""
    return all(abs(one - other) <= 1 / 255 for one, other in zip(before, now, strict=True))


def batches(images: Tensor | np.ndarray | Shards, batch: int, *, seed: int = 0, flip: bool = True, start: int = 0,
            rank: int = 0, ranks: int = 1, device=None, resident: bool | None = None,
            labels: np.ndarray | None = None) -> Iterator:
    """Endless batches (batch / ranks, C, H, W) float32 on `device`, by default where the images are.

    images    (N, C, H, W) uint8, served in [−1, 1], or float16 or float32 latents, served as they are; from `Shards`
              of moments new latents are drawn each time, by seed and number of the batch.
    rank      gets its part of each batch: the parts of all `ranks` joined in order are the batch of one process.
    resident  whether the images live on the device; None: if they take up to half of its free memory. Those
              that do not are read by threads a few batches ahead. The batches are the same to the last bit.
    labels    (N,) int64: a batch is then (x, labels), whose labels are on the CPU, pinned where x is on a GPU, so that
              no one waits for the GPU to read them.

    Each epoch is a permutation, with its own mirrored half, that depends on seed and epoch alone: batch
    number `start` is the same for a run that is resumed there. A batch may end one epoch and begin the next.
    Raises BadInput for images of another type, and for a batch that `ranks` does not divide.
    """
    if batch < 1 or start < 0 or not 0 <= rank < ranks or batch % ranks:
        raise BadInput(f"batch is {batch}, from {start} on, for rank {rank} of {ranks}: expected a batch that {ranks} "
                       f"divides, and a rank below {ranks}")
    device = torch.device(device or getattr(images, "device", "cpu"))
    share = batch // ranks
    shares = partial(_shares, len(images), seed, flip, start * batch + rank * share, share, batch)
    served = serve(images, shares, batch, seed=seed, start=start, rank=rank, ranks=ranks, device=device,
                   resident=resident)
    if labels is None:
        return served
    return _labelled(served, torch.from_numpy(labels), shares(CPU, None), pinned=device.type == "cuda")


def serve(images: Tensor | np.ndarray | Shards, shares: Callable[..., Iterator[list]], batch: int, *, seed: int,
          start: int, rank: int, ranks: int, device: torch.device, resident: bool | None) -> Iterator[Tensor]:
    """The batches of `batches` with the samples that `shares` chooses.

    shares  is called with the device where its tensors are to be and, for a GPU, a stream to send them by. It yields
            for each batch rows (B,) and whether each is mirrored (B,), and may add what `on_its_way` gave.
    """
    if images.ndim != 4 or 0 in images.shape or str(images.dtype).split(".")[-1] not in ("uint8", "float16", "float32"):
        raise BadInput(f"the images are {images.dtype} {tuple(images.shape)}: expected uint8, float16 or float32 "
                       "(N, C, H, W)")
    side = torch.cuda.Stream(device) if device.type == "cuda" else None
    device = side.device if side else device  # cuda:0 for cuda, as the threads know no current device
    if resident or (resident is None and _may_live_on(device, images)):
        images_there = images.on(device) if isinstance(images, Shards) else torch.as_tensor(images).to(device)
        served = _served_there(images_there, shares(device, side))
    else:
        images = images.cpu().numpy() if isinstance(images, Tensor) else images
        served = _read_ahead(images, shares(CPU, None), device, side)
    if isinstance(images, Shards) and images.moments:
        served = _drawn(served, batch, seed, start, rank * (batch // ranks), device)
    return served


def _may_live_on(device: torch.device, images: Tensor | np.ndarray | Shards) -> bool:
    if torch.device(getattr(images, "device", "cpu")) == device:
        return not isinstance(images, np.memmap | Shards)
    return images.nbytes <= RESIDENT * free_memory(device)


def _served_there(images: Tensor, shares: Iterator[list[Tensor]]) -> Iterator[Tensor]:
    with closing(shares):
        for rows, mirrored in shares:
            yield _finished(images.index_select(0, rows), mirrored)


def _read_ahead(images: np.ndarray | Shards, shares: Iterator[list], device: torch.device, side) -> Iterator[Tensor]:
    def gather(share: list):
        rows, mirrored, *sent = share
        for event in sent:
            event.synchronize()
        order = np.argsort(rows.numpy())
        in_order = np.take(images, rows.numpy()[order], axis=0)  # in the order of the file: fewer, longer reads
        x = torch.empty(in_order.shape, dtype=getattr(torch, str(images.dtype)), pin_memory=side is not None)
        x.numpy()[order] = in_order
        return _send([x, mirrored], device, side)

    with closing(shares), closing(ahead(gather, shares, threads=READERS, depth=AHEAD)) as gathered:
        for sent in gathered:
            yield _finished(*_received(*sent))


def _drawn(served: Iterator[Tensor], batch: int, seed: int, start: int, first: int,
           device: torch.device) -> Iterator[Tensor]:
    """Latents of the means and log-variances that are served. Every rank draws the noises of the whole batch and keeps
    its own, from `first` on, so that it is the batch of one process."""
    numbers = torch.Generator(device)
    with closing(served):
        for number, moments in enumerate(served, start):
            numbers.manual_seed(int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0]) >> 1)
            channels, *size = moments.shape[1:]
            noise = torch.randn(batch, channels // 2, *size, device=device, generator=numbers)
            mean, log_variance = moments.chunk(2, 1)
            yield mean + (log_variance / 2).exp() * noise[first : first + len(moments)]


def _labelled(served: Iterator[Tensor], labels: Tensor, shares: Iterator[list[Tensor]],
              pinned: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Each batch with the labels of its rows, which a second row of epochs on the CPU gives: a GPU would make wait."""
    with closing(served), closing(shares):
        for x, (rows, _) in zip(served, shares, strict=False):
            yield x, labels[rows].pin_memory() if pinned else labels[rows]


def _finished(x: Tensor, mirrored: Tensor) -> Tensor:
    x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
    return from_uint8(x) if x.dtype == torch.uint8 else x.float()


def _shares(length: int, seed: int, flip: bool, first: int, share: int, batch: int, device: torch.device,
            side) -> Iterator[list[Tensor]]:
    """One rank's part of each batch: rows (share,) int64 and whether each is mirrored, on `device`. The parts begin at
    `first` in the endless row of epochs, and every `batch` from there.

    The next epoch is drawn in a thread while this one is served: three million images take a quarter of a second.
    """

    def draw(epoch: int):
        numbers = np.random.default_rng([seed, epoch])
        rows = numbers.permutation(length)
        mirrored = numbers.random(length) < (0.5 if flip else 0)
        return _send([torch.from_numpy(rows), torch.from_numpy(mirrored)], device, side)

    with closing(ahead(draw, count(first // length), threads=1, depth=1)) as epochs:
        order = _received(*next(epochs))
        begin = first % length
        while True:
            while len(order[0]) < begin + share:
                order = [torch.cat(parts) for parts in zip(order, _received(*next(epochs)), strict=True)]
            yield [part[begin : begin + share] for part in order]
            served = min(begin + batch, len(order[0]))
            order = [part[served:] for part in order]
            begin += batch - served


def _send(tensors: list[Tensor], device: torch.device, side):
    """The tensors on `device`, on a GPU by a stream of its own, and the event that tells when they are there."""
    if side is None:
        return [tensor.to(device) for tensor in tensors], None
    with torch.cuda.stream(side):
        return [tensor.pin_memory().to(device, non_blocking=True) for tensor in tensors], side.record_event()


def on_its_way(tensors: list[Tensor]) -> list:
    """The tensors of a GPU on the CPU, and the event that tells when they are there: it is for threads to wait."""
    if not tensors[0].is_cuda:
        return [tensor.cpu() for tensor in tensors]
    here = [tensor.to("cpu", non_blocking=True) for tensor in tensors]  # in pinned memory
    return [*here, torch.cuda.current_stream(tensors[0].device).record_event(torch.cuda.Event(blocking=True))]


def _received(tensors: list[Tensor], sent) -> list[Tensor]:
    """What `_send` gave, safe to use on the stream at work here: the GPU waits, the thread does not."""
    if sent is not None:
        current = torch.cuda.current_stream(tensors[0].device)
        current.wait_event(sent)
        for tensor in tensors:
            tensor.record_stream(current)
    return tensors
