"""What dansm encode and dansm decode do: images through the autoencoder's encoder to shards of latents, and latents
through its decoder to images."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby, islice
from pathlib import Path

import numpy as np
import torch
import torch.distributed as group
from PIL import Image
from rich.progress import Progress, track
from torch import Tensor

from dansm import BadInput

from ..base.files import make_folder
from ..base.locks import owning as lock
from ..base.processes import processes, quiet, ranks
from ..base.text import Stopped, console, counted, say, say_files
from ..base.threads import ahead
from . import latents, loader
from .autoencoder import LARGEST, Autoencoder, Decoder, Encoder, read_autoencoder
from .cache import digest_of_files
from .read import Source, check_finite, files_of, open_latents, opened

BATCH = {"cuda": 64, "cpu": 8}  # the same whatever the memory: another one may give other last bits


@dataclass(frozen=True)
class Plan:
    """All that the latents of an encode depend on."""

    source: str
    source_digest: str  # another one as soon as a file of the source is another
    size: int
    flips: bool
    moments: bool
    autoencoder: str  # SHA-256 of its weights
    factor: float
    shift: float
    precision: str
    batch: int  # latents made at a time
    shard: int  # images

    def settings(self) -> dict:
        return {"dansm_latents": latents.VERSION, **asdict(self)}


def encode(source: Path, weights: Path | Autoencoder, device: torch.device, out: Path, *, size: int, flips: bool,
           moments: bool, batch: int, shard: int, workers: int, precision: str, skip_unreadable: bool) -> None:
    """Encode all images of `source` into `out`, on as many processes as torchrun started. The same call goes on where
    an earlier one was ended, and does nothing where one came to its end."""
    loader.check_out(str(source), out)
    files = _image_files(source)
    autoencoder = weights if isinstance(weights, Autoencoder) else read_autoencoder(weights)
    if size % autoencoder.shrinks:
        raise BadInput(f"--size is {size}: expected a multiple of {autoencoder.shrinks}, which the autoencoder divides "
                       "it by")
    out = make_folder(out)
    with processes(device) as device:
        encoder = Encoder(autoencoder, device, precision)
        plan = Plan(str(source), digest_of_files(source, files, size), size, flips, moments, autoencoder.digest,
                    autoencoder.factor, autoencoder.shift, str(encoder.dtype).removeprefix("torch."),
                    batch or BATCH.get(device.type, 8), shard)
        first = ranks()[0] == 0
        with lock(out, "encoded") if first else nullcontext(), quiet(not first):
            index = _check_earlier(out, plan)
            _wait_for_all()  # to have read it before it is changed
            if first and index:
                _check_shards(out, index, plan)
            _wait_for_all()
            if latents.read_index(out) is None:
                _encode(source, files, encoder, plan, out, workers, skip_unreadable, first)


def _wait_for_all() -> None:
    """For the other processes, where there are any."""
    if group.is_initialized():
        group.barrier()


def cores() -> int:
    """Of this machine for each of its processes."""
    return max(1, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def _image_files(source: Path) -> list[Path]:
    if not source.exists() or (not source.is_dir() and source.suffix.lower() == ".npy"):
        what = "holds latents" if source.exists() else "does not exist"
        raise BadInput(f"{source} {what}: expected a folder of images, a .zip or .tar of them, or an LSUN lmdb")
    files = files_of(source)
    if files[0].suffix.lower() == ".npy":
        raise BadInput(f"{source} holds latents ({files[0]}): expected images")
    return files


def _check_earlier(out: Path, plan: Plan) -> dict | None:
    """The index of an encode that came to its end in `out`, None where none did; BadInput if it is of other latents."""
    finished = latents.read_index(out)
    before = finished or latents.read_unfinished(out)
    if before is None:
        if strange := min(out.glob("*.npy"), default=None):
            raise BadInput(f"--out is {out}, which holds {strange.name} of another origin, or of an encode whose "
                           f"{latents.INDEX} is gone: expected another --out, or one without .npy files")
        return None
    if differing := _differences(before, plan.settings()):
        raise BadInput(f"{out} holds latents that were made otherwise ({', '.join(differing)}): expected the same "
                       "settings, or another --out")
    return finished


def _check_shards(out: Path, index: dict, plan: Plan) -> None:
    """Say that all latents are there; or make of the encode an unfinished one, if a shard is missing or cut off."""
    damaged = [note["file"] for note in index["shards"] if not latents.is_as_noted(out, note)]
    if damaged:
        say(f"{out} has lost {counted(len(damaged), 'shard')} of {len(index['shards']):,}, missing or cut off",
            f"({', '.join(damaged[:3])}{', …' * (len(damaged) > 3)}): made anew")
        latents.reopen(out, index, plan.settings())
        return
    latents.remove_notes(out)  # of an encode that was killed after its last shard
    say(f"{out} holds all {counted(index['count'], 'latent')} already: nothing to do")


def _encode(source, files, encoder, plan, out, workers, skip_unreadable, first):
    begin = time.perf_counter()
    with opened(source, files, plan.size) as read, loader.bombs_refused():
        shards = math.ceil(read.count / plan.shard)
        missing = [number for number in range(shards) if not latents.is_finished(out, number)]
        if first:
            _begin(out, plan, read.count, len(missing), encoder.autoencoder)
        _wait_for_all()  # all have the same list, and the settings are there, before the first shard is
        rank, processes = ranks()
        _work(read, encoder, plan, out, missing[rank::processes], workers, skip_unreadable)
    _wait_for_all()
    if first:
        _end(out, plan, shards, min(read.count, len(missing) * plan.shard), time.perf_counter() - begin)


def _begin(out, plan, count, missing, autoencoder):
    for half_written in out.glob("*.partial"):
        half_written.unlink(missing_ok=True)
    latents.begin(out, plan.settings(), count)
    left = min(count, missing * plan.shard)
    needed = left * (1 + plan.flips) * 2 * math.prod(_shape(plan, autoencoder))
    if needed > (free := shutil.disk_usage(out).free):
        raise BadInput(f"--out is {out}: the latents of {counted(left, 'image')} take {needed / 1e9:,.1f} GB, its disk "
                       f"has {free / 1e9:,.1f} GB free; expected room for them")
    say(f"{counted(count, 'image')}" + f", {left:,} of them still to encode" * (left < count))


def _end(out, plan, shards, images, seconds):
    index = latents.write_index(out, plan.settings(), shards)
    if index["left_out"]:
        say(f"left out {counted(len(index['left_out']), 'image')}, not readable:",
            ", ".join(index["left_out"][:3]) + ", …" * (len(index["left_out"]) > 3))
    say(f"{counted(index['count'], 'latent')} of {'×'.join(map(str, index['shape']))};",
        f"this time {counted(images, 'image')} in {seconds:.1f} s, {images / max(seconds, 1e-9):,.1f} a second")
    more = " and so on" * (len(index["shards"]) > 1)
    say_files(out, latents.INDEX, index["shards"][0]["file"] + more)


def _work(read: Source, encoder: Encoder, plan: Plan, out: Path, mine: list[int], workers: int,
          skip_unreadable: bool) -> None:
    """Encode the shards of these numbers, each written as soon as it is whole."""
    done, wanted = 0, set(mine)
    total = sum(min(plan.shard, read.count - number * plan.shard) for number in mine)
    numbered = ((place // plan.shard, entry) for place, entry in enumerate(read.entries))
    entries = ((number, entry) for number, entry in numbered if number in wanted)
    bar = Progress(*Progress.get_default_columns(), console=console)
    with bar, closing(ahead(partial(_decode, read, skip_unreadable), entries, threads=workers,
                                 depth=4 * workers + plan.batch)) as decoded:
        task = bar.add_task("encoding", total=total)
        try:
            for number, images in groupby(decoded, lambda image: image[0]):
                made, left_out = _encode_shard(images, encoder, plan, lambda count: bar.advance(task, count))
                latents.write_shard(out, number, made, encoder.autoencoder.channels, left_out)
                done += 1
        except BadInput as error:
            raise BadInput(f"{error}; {done} of {counted(len(mine), 'shard')} were written and are kept") from error
        except KeyboardInterrupt as stop:
            raise Stopped(f"stopped; {done} of {counted(len(mine), 'shard')} were written, the same command goes "
                                "on") from stop


def _decode(read, skip_unreadable, entry):
    number, one = entry
    _, path, image = loader.decode_one(read, skip_unreadable, one)
    return number, path, image


def _encode_shard(images, encoder: Encoder, plan: Plan, advance) -> tuple[np.ndarray, list[Path]]:
    """Latents (n, C or 2C, h, w) float16 of one shard's images, and the paths of those that could not be read."""
    none = torch.empty(0, *_shape(plan, encoder.autoencoder), dtype=torch.float16, device=encoder.device)
    made, names, left_out = [none], [], []
    readable = _readable(images, left_out, advance)
    while some := list(islice(readable, max(1, plan.batch // (1 + plan.flips)))):
        names += [path for path, _ in some]
        made.append(_latents(np.concatenate([image for _, image in some]), encoder, plan))
        advance(len(some))
    found = torch.cat(made).cpu()
    finite = found.isfinite().flatten(1).all(1)
    if not finite.all():
        name = names[int((~finite).nonzero()[0]) // (1 + plan.flips)]
        raise BadInput(f"{name} encodes to NaN or infinite numbers in {plan.precision}: expected finite latents; "
                       "--precision fp32 may give them")
    return found.numpy(), left_out


def _shape(plan: Plan, autoencoder: Autoencoder) -> tuple[int, ...]:
    """Of one latent as it is stored."""
    return autoencoder.channels * (1 + plan.moments), *[plan.size // autoencoder.shrinks] * 2


def _readable(images, left_out: list[Path], advance) -> Iterator[tuple[Path, np.ndarray]]:
    for _, path, image in images:
        if image is None:
            left_out.append(path)
            advance(1)
        else:
            yield path, image


def _latents(images: np.ndarray, encoder: Encoder, plan: Plan) -> Tensor:
    """uint8 (B, 3, H, W) → (B or 2B, C or 2C, h, w) float16 on the device, which need not have come to its end. After
    each latent, that of the mirrored image, if those are asked for."""
    x = torch.from_numpy(images)
    x = (x.pin_memory() if encoder.device.type == "cuda" else x).to(encoder.device, non_blocking=True)
    if plan.flips:
        x = torch.stack([x, x.flip(3)], 1).flatten(0, 1)
    moments = encoder.moments(x)
    return (moments if plan.moments else moments[:, : encoder.autoencoder.channels]).half()


# ------------------------------------------------------------------------------- and back


def decode(source: Path, weights: Path | Autoencoder, device: torch.device, out: Path, *, count: int | None, batch: int,
           memory: float | None, precision: str) -> None:
    """Write the first `count` latents of `source`, or all, as 000000.png and so on into `out`. The same call goes on
    where an earlier one was ended.

    memory  gigabytes to decode in; None for a quarter of what the device has free
    batch   latents at a time at most; 0 for what fits
    """
    loader.check_out(str(source), out)
    autoencoder = weights if isinstance(weights, Autoencoder) else read_autoencoder(weights)
    found = read_latents(source, autoencoder)
    decoder, out = Decoder(autoencoder, device, precision, memory), make_folder(out)
    _check_decoded(out, source, decoder)
    batch, count = min(batch or LARGEST[1], decoder.fits(max(found.shape[2:]))), min(count or len(found), len(found))
    there, begin = set(os.listdir(out)), time.perf_counter()
    missing = [number for number in range(count) if _name(number) not in there]
    if not missing:
        say(f"{out} holds {counted(count, 'image')} already: nothing to do")
        return
    done = count - len(missing)
    try:
        images = _decoded(found, decoder, missing, batch)
        with closing(ahead(partial(_save, out), images, threads=os.cpu_count(), depth=batch)) as writing:
            for _ in track(writing, "decoding", total=len(missing), console=console):
                done += 1
    except KeyboardInterrupt as stop:
        raise Stopped(f"stopped; {done:,} of {counted(count, 'image')} are written, the same command goes on"
                            ) from stop
    except OSError as error:
        raise BadInput(f"{out} cannot be written to: {error.strerror or error}; {done:,} of {counted(count, 'image')} "
                       "are there, expected room for all") from error
    seconds = time.perf_counter() - begin
    say(f"{counted(len(missing), 'image')} in {seconds:.1f} s, {batch} at a time")
    say_files(out, _name(0) + " and so on" * (count > 1))


def _check_decoded(out: Path, source: Path, decoder: Decoder) -> None:
    """Note in decode.json what images are to be decoded from; BadInput if `out` holds those of anything else."""
    made_from = {"source": str(source), "latents": digest_of_files(source, files_of(source), None),
                 **decoder.autoencoder.identity, "precision": str(decoder.dtype).removeprefix("torch.")}
    note = out / "decode.json"
    try:
        before = json.loads(note.read_text())
    except (OSError, ValueError):
        before = None
    if isinstance(before, dict):
        if differing := _differences(before, made_from):
            raise BadInput(f"{out} holds images that were decoded otherwise ({', '.join(differing)}): expected the "
                           "same latents and settings, or another --out")
        return
    if strange := min(out.glob("[0-9]*.png"), default=None):
        raise BadInput(f"--out is {out}, which holds {strange.name} of another origin: expected one without images")
    latents.write_json(note, made_from)


# Digests tell nobody anything
OTHERS = {"source_digest": "of other images, by the names, sizes or times of their files",
          "latents": "of other latents", "autoencoder": "by another autoencoder"}


def _differences(before: dict, now: dict) -> list[str]:
    """What was noted before and is another one now, but for where it lies."""
    return [OTHERS.get(name) or f"{name} {before.get(name)} → {value}" for name, value in now.items()
            if name != "source" and before.get(name) != value]


def _decoded(found, decoder: Decoder, missing: list[int], batch: int) -> Iterator[tuple[int, Tensor]]:
    """The missing images by their numbers. They are decoded in the batches of all, of which some may be there."""
    for number, of_batch in groupby(missing, lambda number: number // batch):
        start, numbers = number * batch, list(of_batch)
        some = found[start : numbers[-1] + 1]
        images = decoder.decode(some if isinstance(some, Tensor) else torch.from_numpy(np.array(some)), start).cpu()
        yield from ((number, images[number - start]) for number in numbers)


def _name(number: int) -> str:
    return f"{number:06d}.png"


def _save(out: Path, numbered: tuple[int, Tensor]) -> None:
    """Whole or not at all."""
    number, image = numbered
    partial = out / f"{number:06d}.partial"
    try:
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(partial, "PNG")
        os.replace(partial, out / _name(number))
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def read_latents(source: Path, autoencoder: Autoencoder):
    """Latents (N, C, h, w) of an encode's folder, of a .npy file, (N, C, h, w) or (C, h, w), or of a folder of these;
    BadInput for those of another autoencoder."""
    if not source.exists():
        raise BadInput(f"{source} does not exist: expected latents, a .npy file, a folder of them or of dansm encode")
    if (first := files_of(source)[0]).suffix.lower() != ".npy":
        raise BadInput(f"{source} holds images ({first}): expected latents, which are .npy files")
    autoencoder.check(latents.known_on_disk(source), f"{source} holds")
    if source.is_file() and source.suffix.lower() == ".npy" and open_latents(source, (3, 4)).ndim == 3:
        found = open_latents(source, (3,))[None]
        check_finite(source, found)
    else:
        found = loader.load_images(str(source))
    if str(found.dtype).endswith("uint8"):
        raise BadInput(f"{source} holds images: expected latents, which are .npy files")
    if found.shape[1] != autoencoder.channels:
        raise BadInput(f"{source} holds latents of {found.shape[1]} channels, {autoencoder.path} decodes "
                       f"{autoencoder.channels}: expected the same")
    return found
