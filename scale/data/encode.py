"""Images through the autoencoder's encoder to shards of latents, on as many processes as torchrun started."""

import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from dansm import BadInput

from ..base.files import make_folder
from ..base.locks import owning
from ..base.processes import processes, quiet, ranks, wait_for_all
from ..base.text import console, counted, say, say_files, shorten
from . import latents
from .autoencoder import Autoencoder, Encoder
from .loader import check_out
from .read import Opened, Source, files_of


@dataclass(frozen=True)
class Settings:
    """How images are encoded, as the options of dansm encode have it."""

    size: int
    shard: int  # images in each file
    flips: bool = False
    moments: bool = False
    batch: int = 0
    workers: int = 0
    precision: str = "auto"
    skip_unreadable: bool = False


class Job:
    """One call of dansm encode.

    batch      latents made at a time: the same whatever the memory, as another count may give other last bits
    shape      of one latent as it is stored
    described  all that the latents depend on, for their index
    """

    def __init__(self, source: Source, encoder: Encoder, out: Path, settings: Settings):
        self.source, self.encoder, self.out, self.settings = source, encoder, out, settings
        self.batch = settings.batch or encoder.batch
        side = settings.size // encoder.autoencoder.shrinks
        self.shape = encoder.autoencoder.channels * (1 + settings.moments), side, side
        self.described = {
            "dansm_latents": latents.VERSION, "source": str(source.path), "source_digest": source.digest,
            "size": settings.size, "flips": settings.flips, "moments": settings.moments,
            **encoder.autoencoder.identity, "precision": encoder.precision, "batch": self.batch,
            "shard": settings.shard}


def encode(source: Path, autoencoder: Autoencoder, device: torch.device, out: Path, settings: Settings) -> None:
    """Encode all images of `source` into `out`. The same call resumes one that was stopped, and does nothing where one
    came to its end."""
    check_out(str(source), out)
    images = Source(source, files_of(source), settings.size, settings.skip_unreadable)
    if images.holds_latents:
        raise BadInput(f"{source} holds latents ({images.files[0]}): expected images")
    if settings.size % autoencoder.shrinks:
        raise BadInput(f"--size is {settings.size}: expected a multiple of {autoencoder.shrinks}, as it gets divided")
    make_folder(out)
    with processes(device) as device:
        job = Job(images, Encoder(autoencoder, device, settings.precision), out, settings)
        first = ranks()[0] == 0
        with owning(out, "encoded") if first else nullcontext(), quiet(not first):
            index = _read_earlier(job)
            wait_for_all()  # to have read it before it is changed
            if first and index:
                _check_shards(job, index)
            wait_for_all()
            if latents.read_index(out) is None:
                _encode(job, first)


def _read_earlier(job: Job) -> dict | None:
    """The index of an encode that came to its end in `out`, None where none did; BadInput if it is of other latents."""
    out = job.out
    finished = latents.read_index(out)
    before = finished or latents.read_index(out, latents.UNFINISHED)
    if before is None:
        strange = min(out.glob("*.npy"), default=None)
        if strange:
            raise BadInput(f"--out is {out}, which holds {strange.name} of another origin, or of an encode whose "
                           f"{latents.INDEX} is gone: expected another --out, or one without .npy files")
        return None
    latents.check_same(out, before, job.described)
    return finished


def _check_shards(job: Job, index: dict) -> None:
    """Say that all latents are there; or make of the encode an unfinished one, if a shard is missing or cut off."""
    damaged = [note["file"] for note in index["shards"] if not latents.is_as_noted(job.out, note)]
    if damaged:
        say(f"{job.out} has lost {counted(len(damaged), 'shard')} of {len(index['shards']):,}, made again:",
            shorten(", ".join(damaged), 100))
        latents.reopen(job.out, index, job.described)
        return
    latents.remove_notes(job.out)  # of an encode that was killed after its last shard
    say(f"{job.out} holds all {counted(index['count'], 'latent')} already: nothing to do")


def _encode(job: Job, first: bool) -> None:
    start, shard = time.perf_counter(), job.settings.shard
    with job.source.open() as opened:
        shards = math.ceil(opened.count / shard)
        missing = [number for number in range(shards) if not latents.read_note(latents.shard_path(job.out, number))]
        left = min(opened.count, len(missing) * shard)
        if first:
            _begin(job, opened.count, left)
        wait_for_all()  # all have the same list, and the settings are there, before the first shard is
        rank, count = ranks()
        _encode_shards(job, opened, missing[rank::count])
    wait_for_all()
    if first:
        _end(job, shards, left, time.perf_counter() - start)


def _begin(job: Job, count: int, left: int) -> None:
    latents.begin(job.out, job.described, count)
    needed, free = left * (1 + job.settings.flips) * 2 * math.prod(job.shape), shutil.disk_usage(job.out).free
    if needed > free:
        raise BadInput(f"--out is {job.out}: the latents of {counted(left, 'image')} take {needed / 1e9:,.1f} GB, its "
                       f"disk has {free / 1e9:,.1f} GB free; expected room for them")
    still = f", {left:,} of them still to encode" if left < count else ""
    say(f"{counted(count, 'image')}{still}")


def _end(job: Job, shards: int, images: int, seconds: float) -> None:
    index = latents.write_index(job.out, job.described, shards)
    if index["left_out"]:
        names = shorten(", ".join(index["left_out"]), 200)
        say(f"left out {counted(len(index['left_out']), 'image')}, not readable: {names}")
    say(f"{counted(index['count'], 'latent')} of {'×'.join(map(str, index['shape']))};",
        f"this time {counted(images, 'image')} in {seconds:.1f} s, {images / max(seconds, 1e-9):,.1f} a second")
    say_files(job.out, latents.INDEX, *(shard["file"] for shard in index["shards"][:1]))


def _encode_shards(job: Job, opened: Opened, numbers: list[int]) -> None:
    """Encode the shards of these numbers, each written as soon as it is whole."""
    shard, written = job.settings.shard, 0
    wanted, total = set(numbers), sum(min(shard, opened.count - number * shard) for number in numbers)
    entries = ((number, path, payload) for number, (_, path, payload) in enumerate(opened.entries)
               if number // shard in wanted)
    images = opened._replace(entries=entries).decoded(threads=job.settings.workers or cores(), depth=job.batch)
    with closing(images), closing(track(images, "encoding", total=total, console=console)) as tracked:
        try:
            for number, of_shard in groupby(tracked, lambda image: image[0] // shard):
                made, left_out = _encode_shard(job, of_shard)
                latents.write_shard(job.out, number, made, job.encoder.autoencoder.channels, left_out)
                written += 1
        except (BadInput, KeyboardInterrupt):
            say(f"{written} of {counted(len(numbers), 'shard')} are done and kept; the same command resumes")
            raise


def cores() -> int:
    """Cores of this machine for each of its processes."""
    return max(1, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def _encode_shard(job: Job, images: Iterator[tuple]) -> tuple[np.ndarray, list[Path]]:
    """Latents (n, C or 2C, h, w) float16 of one shard's images, and the paths of those that could not be read."""
    made = [torch.empty(0, *job.shape, dtype=torch.float16, device=job.encoder.device)]
    names, left_out = [], []

    def readable() -> Iterator[np.ndarray]:
        for _, path, image, _ in images:
            (left_out if image is None else names).append(path)
            if image is not None:
                yield image

    parts = readable()
    while part := list(islice(parts, max(1, job.batch // (1 + job.settings.flips)))):
        made.append(_encode_batch(job, np.concatenate(part)))
    result = torch.cat(made).cpu()
    finite = result.isfinite().flatten(1).all(1)
    if not finite.all():
        name = names[int((~finite).nonzero()[0]) // (1 + job.settings.flips)]
        raise BadInput(f"{name} encodes to NaN or infinite numbers in {job.encoder.precision}: expected finite ones, "
                       "which --precision fp32 may give")
    return result.numpy(), left_out


def _encode_batch(job: Job, images: np.ndarray) -> Tensor:
    """uint8 (B, 3, H, W) → (B or 2B, C or 2C, h, w) float16 on the device, which may still be at work on it. With flips
    each latent is followed by that of the mirrored image."""
    x = torch.from_numpy(images)
    x = (x.pin_memory() if job.encoder.device.type == "cuda" else x).to(job.encoder.device, non_blocking=True)
    if job.settings.flips:
        x = torch.stack([x, x.flip(3)], 1).flatten(0, 1)
    moments = job.encoder.moments(x)
    return (moments if job.settings.moments else moments[:, : job.encoder.autoencoder.channels]).half()
