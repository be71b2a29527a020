"""From a trained network to images: drawn by their numbers, as bytes, as PNG files."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from einops import rearrange
from PIL import Image
from torch import Tensor

import dansm
from scale.data import ahead


def check_steps(option: str, steps: int, flow: type) -> None:
    """BadInput for a count of steps that a diffusion cannot take, before anything is trained or written."""
    if issubclass(flow, dansm.Diffusion) and not 2 <= steps <= flow.levels:
        raise dansm.BadInput(f"{option} is {steps}: expected 2 to {flow.levels:,} for a diffusion")


def sample_images(net, flow, images: range, shape, steps: int, *, seed: int = 0, batch: int = 64,
                  device="cpu", decode=None) -> Iterator[Tensor]:
    """Images by their numbers, `batch` at a time, as uint8 (B, C, H, W) on the CPU, from the noises that
    `dansm.path_noise` draws for them by `seed`: what decode(x, number of x[0]) makes of latents, `to_uint8` if None. A
    GPU works on one batch while the one before is used, and the noises of the next are drawn."""
    parts = (images[start : start + batch] for start in range(0, len(images), batch))
    before = None
    noises = ahead(lambda part: (part[0], dansm.path_noise(part, shape, seed)), parts, threads=1, depth=1)
    with closing(noises):
        for first, z in noises:
            x = flow.sample(net, z.to(device), steps)
            now = decode(x, first) if decode else to_uint8(x)
            if before is not None:
                yield before.cpu()
            before = now
    if before is not None:
        yield before.cpu()


def to_uint8(x: Tensor) -> Tensor:
    """[−1, 1] to the 0 … 255 of an image file; of any shape. Back: `scale.data.from_uint8`."""
    return ((x + 1) * 127.5).round().clamp(0, 255).byte()


def save_grid(images: Tensor, path: Path, enlarge: int = 2) -> None:
    """Write uint8 images (N, C, H, W) as one PNG, about square, each pixel `enlarge` pixels wide; whole or not at
    all."""
    from torchvision.utils import make_grid  # takes a second to import

    large = images.repeat_interleave(enlarge, 2).repeat_interleave(enlarge, 3)
    columns = math.ceil(len(images) ** 0.5)
    grid = large[0] if len(images) == 1 else make_grid(large, columns, padding=2, pad_value=255)
    with dansm.replacing(path) as beside:
        Image.fromarray(rearrange(grid, "c h w -> h w c").numpy().squeeze()).save(beside, "png")
