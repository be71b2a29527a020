"""Latents through the autoencoder's decoder to PNG files."""

import os
import time
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from itertools import groupby
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from dansm import BadInput

from ..base.files import make_folder, read_json, replacing, write_json
from ..base.text import counted, say, say_files, with_bar
from ..base.threads import ahead
from . import latents
from .autoencoder import Autoencoder, Decoder
from .loader import check_out, load_images
from .read import Source, files_of


def decode(source: Path, decoder: Decoder, out: Path, count: int | None = None, batch: int = 0) -> None:
    """Write the first `count` latents of `source`, or all, as 000000.png and so on into `out`, up to `batch` at a
    time (0: as many as fit). The same call resumes one that was stopped."""
    check_out(str(source), out)
    files = Source(source, files_of(source))
    encoded = read_latents(files, decoder.autoencoder)
    _check_decoded(make_folder(out), files, decoder)
    begin = time.perf_counter()
    batch = min(batch or decoder.batch, decoder.fits(max(encoded.shape[2:])))
    existing = set(os.listdir(out))
    missing = [number for number in range(len(encoded))[:count] if f"{number:06d}.png" not in existing]
    if not missing:
        say(f"{out} holds all images already: nothing to do")
        return
    images = _decoded(encoded, decoder, missing, batch)
    try:
        with closing(ahead(partial(_save, out), images, threads=os.cpu_count(), depth=batch)) as writing:
            for _ in with_bar(writing, "decoding", len(missing)):
                pass
    except (BadInput, KeyboardInterrupt):
        say(f"images that are done are kept in {out}; the same command resumes")
        raise
    say(f"{counted(len(missing), 'image')} in {time.perf_counter() - begin:.1f} s, {batch} at a time")
    say_files(out, "000000.png")


def read_latents(source: Source, autoencoder: Autoencoder):
    """Latents (N, C, h, w), see `load_images`; BadInput for images, and for latents of another autoencoder."""
    if not source.holds_latents:
        raise BadInput(f"{source.path} holds images ({source.files[0]}): expected latents")
    autoencoder.check(latents.known_on_disk(source.path), f"{source.path} holds")
    encoded = load_images(str(source.path))
    if encoded.shape[1] != autoencoder.channels:
        raise BadInput(f"{source.path} holds latents of {encoded.shape[1]} channels, {autoencoder.path} decodes "
                       f"{autoencoder.channels}: expected the same")
    return encoded


def _check_decoded(out: Path, source: Source, decoder: Decoder) -> None:
    """Note in decode.json what images are to be decoded from; BadInput if `out` holds those of anything else."""
    made_from = {"source": str(source.path), "latents": source.digest, **decoder.autoencoder.identity,
                 "precision": decoder.precision}
    note = out / "decode.json"
    before = read_json(note) if note.exists() else {}
    latents.check_same(out, before, made_from, "[0-9]*.png")
    write_json(note, made_from)


def _decoded(encoded, decoder: Decoder, missing: list[int], batch: int) -> Iterator[tuple[int, Tensor]]:
    """The missing images by their numbers. They are decoded in the batches of all, of which some may exist."""
    for number, of_batch in groupby(missing, lambda number: number // batch):
        numbers = list(of_batch)
        start = number * batch
        images = decoder.decode(torch.as_tensor(encoded[start : numbers[-1] + 1]), start).cpu()
        yield from ((number, images[number - start]) for number in numbers)


def _save(out: Path, numbered: tuple[int, Tensor]) -> None:
    number, image = numbered
    with replacing(out / f"{number:06d}.png") as partial:
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(partial, "PNG")
