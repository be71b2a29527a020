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
from torch import Tensor

from dansm import BadInput

from ..base.files import make_folder, write_json
from ..base.locks import owning
from ..base.processes import processes, quiet, ranks, wait_for_all
from ..base.text import counted, say, say_files, shorten, with_bar
from . import latents
from .archives import Entries
from .autoencoder import Autoencoder, Encoder
from .labels import load_labels
from .loader import check_out, stream_images
from .read import Source, say_transparent


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
    background: str = "white"
    labels: str = "none"  # may change: the latents do not depend on them


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
            "size": settings.size, "background": settings.background, "flips": settings.flips,
            "moments": settings.moments, **encoder.autoencoder.identity, "precision": encoder.precision,
            "batch": self.batch, "shard": settings.shard}

    def missing(self, images: int) -> list[int]:
        """The numbers of the shards that are missing, or not whole, where the source has this many images."""
        numbers = range(math.ceil(images / self.settings.shard))
        return [number for number in numbers if not latents.is_whole(latents.shard_path(self.out, number))]


def encode(source: Path, autoencoder: Autoencoder, device: torch.device, out: Path, settings: Settings) -> None:
    """Encode all images of `source` into `out`. The same call resumes one that was stopped, makes lost shards again,
    and does nothing where all are there."""
    check_out(str(source), out)
    images = stream_images(str(source), size=settings.size, background=settings.background,
                           skip_unreadable=settings.skip_unreadable, labels=settings.labels)
    if settings.size % autoencoder.shrinks:
        raise BadInput(f"--size is {settings.size}: expected a multiple of {autoencoder.shrinks}, as it gets divided")
    make_folder(out)
    with processes(device) as device:
        first = ranks()[0] == 0
        with owning(out, "encoded") if first else nullcontext(), quiet(not first):
            job = Job(images, Encoder(autoencoder, device, settings.precision), out, settings)
            before = latents.known_on_disk(out)
            latents.check_same(out, _adopted(job, before), job.described, "*.npy")
            if "shards" in before:
                wait_for_all()  # all have read it, before it is changed
                if first:
                    latents.renew(out, before)
                wait_for_all()
            if before and not job.missing(before["images"]):
                say(f"{out} holds the latents of all {counted(before['images'], 'image')} already: nothing to do")
            else:
                _encode(job)
            if first:
                _keep_labels(job)


def _adopted(job: Job, before: dict) -> dict:
    """The index of an encode; if an earlier version of `Source.digest` finished it with the same files, with today's
    digest."""
    read_as = {f"1 {job.settings.size}": "did not turn images by EXIF, nor lay them over a background",
               f"2 {job.source.reading}": "read 32-bit TIFFs of values up to 255 as black"}
    earlier = {job.source.digest_for(version): how for version, how in read_as.items()}
    how = earlier.get(before.get("source_digest"))
    if how is None or job.source.digest == before["source_digest"] or job.missing(before["images"]):
        return before
    say(f"{job.out} is from an earlier version, which {how}")
    return before | {"source_digest": job.source.digest}


def _keep_labels(job: Job) -> None:
    """Add the labels of all latents to the index, and the names of their classes."""
    index, notes = latents.known_on_disk(job.out), latents.read_notes(job.out)
    left_out = [Path(path) for note in notes for path in note["left_out"]]
    labels = load_labels(str(job.source.path), job.settings.labels, index["images"] - len(left_out), left_out)
    if labels:
        numbers = labels.numbers.repeat(1 + index["flips"]).tolist()
        if index != (labelled := index | {"labels": numbers, "classes": labels.names}):
            write_json(job.out / "index.json", labelled)
        say(f"{counted(len(labels.names), 'class')} by {labels.origin}, for dansm train --labels auto")


def _encode(job: Job) -> None:
    """Encode the shards that are missing, on each process its part of them."""
    start = time.perf_counter()
    rank, process_count = ranks()
    with job.source.open() as (count, entries):
        missing = job.missing(count)
        left = sum(min(job.settings.shard, count - number * job.settings.shard) for number in missing)
        needed, free = 2 * left * (1 + job.settings.flips) * math.prod(job.shape), shutil.disk_usage(job.out).free
        if needed > free:
            raise BadInput(f"--out is {job.out}: the latents of {counted(left, 'image')} take {needed / 1e9:,.1f} GB, "
                           f"its disk has {free / 1e9:,.1f} GB free; expected room for them")
        if rank == 0:
            load_labels(str(job.source.path), job.settings.labels, count)  # else refused after hours
        say(f"{counted(count, 'image')}, {left:,} of them to encode")
        wait_for_all()  # all have the same list, before it is changed
        if rank == 0:
            index = {**job.described, "images": count, "skip_unreadable": job.settings.skip_unreadable}
            write_json(job.out / "index.json", index)
            for number in missing:  # what is left of a damaged encode stays usable while it is mended
                latents.shard_path(job.out, number).with_suffix(".json").unlink(missing_ok=True)
        wait_for_all()
        _encode_shards(job, count, entries, missing[rank::process_count])
    wait_for_all()
    seconds = time.perf_counter() - start
    notes = latents.read_notes(job.out)
    made = sum(note["count"] for note in notes)
    left_out = [name for note in notes for name in note["left_out"]]
    if not made:
        raise BadInput(f"{job.source.path} holds no readable image: expected at least one")
    if left_out:
        say(f"left out {counted(len(left_out), 'image')}, not readable: {shorten(', '.join(left_out), 200)}")
    say_transparent(job.source, sum(note.get("transparent", 0) for note in notes))
    say(f"{counted(made, 'latent')} of {'×'.join(map(str, job.shape))};",
        f"this time {counted(left, 'image')} in {seconds:.1f} s, {left / seconds:,.1f} a second")
    say_files(job.out, "index.json", next(note["file"] for note in notes if note["count"]))


def _encode_shards(job: Job, count: int, entries: Entries, numbers: list[int]) -> None:
    """Encode the shards of these numbers, each written as soon as it is whole."""
    shard, wanted = job.settings.shard, set(numbers)
    total = sum(min(shard, count - number * shard) for number in numbers)
    entries = ((number, path, read) for number, (_, path, read) in enumerate(entries) if number // shard in wanted)
    images = job.source.decoded(entries, threads=job.settings.workers or cores(), depth=job.batch)
    with closing(images), closing(with_bar(images, "encoding", total)) as tracked:
        try:
            for number, of_shard in groupby(tracked, lambda image: image[0] // shard):
                latents.write_shard(job.out, number, *_encode_shard(job, of_shard))
        except (BadInput, KeyboardInterrupt):
            say("whole shards are kept; the same command resumes")
            raise


def cores() -> int:
    """Cores of this machine for each of its processes."""
    return max(1, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def _encode_shard(job: Job, images: Iterator[tuple]) -> tuple[np.ndarray, list[Path], int]:
    """Latents (n, C or 2C, h, w) float16 of one shard's images, the paths of those that could not be read, and how many
    let the background show through."""
    made = [torch.empty(0, *job.shape, dtype=torch.float16, device=job.encoder.device)]
    sides, names, left_out = 1 + job.settings.flips, [], []

    def readable() -> Iterator[np.ndarray]:
        for _, path, image, _ in images:
            (left_out if image is None else names).append(path)
            if image is not None:
                yield image

    parts = readable()
    while part := list(islice(parts, max(1, job.batch // sides))):
        made.append(_encode_batch(job, np.concatenate(part)))
    result = torch.cat(made).cpu()
    finite = result.isfinite().flatten(1).all(1)
    if not finite.all():
        raise BadInput(f"{names[finite.int().argmin() // sides]} encodes to NaN or infinite numbers in "
                       f"{job.encoder.precision}: expected finite ones, which --precision fp32 may give")
    return result.numpy(), left_out, len(job.source.transparent.intersection(names))


def _encode_batch(job: Job, images: np.ndarray) -> Tensor:
    """uint8 (B, 3, H, W) → (B or 2B, C or 2C, h, w) float16 on the device, which may still be at work on it. With flips
    each latent is followed by that of the mirrored image."""
    x = torch.from_numpy(images)
    x = (x.pin_memory() if job.encoder.device.type == "cuda" else x).to(job.encoder.device, non_blocking=True)
    if job.settings.flips:
        x = torch.stack([x, x.flip(3)], 1).flatten(0, 1)
    return job.encoder.moments(x)[:, : job.shape[0]].half()
