"""Trained models by the paths of their runs, checkpoints or exports, as several commands need them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

import dansm
from dansm import BadInput

from ..base.text import counted, say
from ..data.autoencoder import Decoder, read_autoencoder
from ..data.latents import known_on_disk
from . import checkpoint
from .sampling import check_steps


def loaded(paths: Iterable[Path], steps: list[int], device, solver: str = "euler") -> Iterator[
        tuple[dansm.UNet, object, dict]]:
    """Of each path the network on `device`, its flow, and what `checkpoint.load_model` says of it. BadInput for one
    that cannot be read, or takes not so many steps."""
    for path in paths:
        net, flow, about = checkpoint.load_model(path, device, solver, say=say)
        for count in steps:
            check_steps("--steps", count, type(flow))
        yield net, flow, about


def decoder_for(model: Path, channels: int, about: dict, file: Path | None, device: torch.device, precision: str,
                memory: float | None = None):
    """What makes uint8 images (B, 3, H, W) of a network's samples: a decoder of latents within so many gigabytes, None
    for a network of images.
    Raises BadInput where there is no autoencoder, one that is not needed, or another than the data's."""
    if about["latents"] is None:
        if file is None:
            return None
        raise BadInput(f"--autoencoder is {file}, and {model} draws images of {counted(channels, 'channel')}: "
                       "expected none")
    if file is None:
        raise BadInput(f"{model} draws latents of {channels} channels, which are no pictures: expected a "
                       "network of images, or --autoencoder to decode them")
    autoencoder = read_autoencoder(file)
    if autoencoder.channels != channels:
        raise BadInput(f"{model} draws latents of {channels} channels, {file} decodes {autoencoder.channels}: "
                       "expected the autoencoder of its data")
    known = about["latents"] or (known_on_disk(Path(about["data"])) if about["data"] else {})  # runs of old do not say
    autoencoder.check(known, f"{model} draws")
    return Decoder(autoencoder, device, precision, memory)
