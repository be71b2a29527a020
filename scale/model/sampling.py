"""From a trained network to images: drawn by their numbers, as bytes, as PNG files."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

import dansm

from ..base.files import replacing
from ..base.machine import free_memory, number_type
from ..base.noise import path_noise
from ..base.threads import ahead
from ..data.pixels import to_uint8


def check_steps(option: str, steps: int, flow: type) -> None:
    """BadInput for a count of steps that a diffusion cannot take, before anything is trained or written."""
    if issubclass(flow, dansm.Diffusion) and not 2 <= steps <= flow.levels:
        raise dansm.BadInput(f"{option} is {steps}: expected 2 to {flow.levels:,} for a diffusion")


def sample_images(net, flow, images: range, shape, steps: int, *, seed: int = 0, batch: int = 64,
                  device="cpu", decode=None) -> Iterator[Tensor]:
    """Images by their numbers, `batch` at a time, as uint8 (B, C, H, W) on the CPU, from the noises that
    `path_noise` draws for them by `seed`: what decode(x, number of x[0]) makes of latents, `to_uint8` if None. A
    GPU works on one batch while the one before is used, and the noises of the next are drawn."""
    parts = (images[start : start + batch] for start in range(0, len(images), batch))
    before = None
    noises = ahead(lambda part: (part[0], path_noise(part, shape, seed)), parts, threads=1, depth=1)
    with closing(noises):
        for first, z in noises:
            x = flow.sample(net, z.to(device), steps)
            now = decode(x, first) if decode else to_uint8(x)
            if before is not None:
                yield before.cpu()
            before = now
    if before is not None:
        yield before.cpu()


def save_grid(images: Tensor, path: Path, enlarge: int = 2) -> None:
    """Write uint8 images (N, C, H, W) as one PNG, about square, each pixel `enlarge` pixels wide; whole or not at
    all."""
    from torchvision.utils import make_grid  # takes a second to import

    large = images.repeat_interleave(enlarge, 2).repeat_interleave(enlarge, 3)
    columns = math.ceil(len(images) ** 0.5)
    grid = large[0] if len(images) == 1 else make_grid(large, columns, padding=2, pad_value=255)
    with replacing(path) as beside:
        Image.fromarray(rearrange(grid, "c h w -> h w c").numpy().squeeze()).save(beside, "png")


def fused(net: dansm.UNet) -> bool:
    """Let the kernels stand in for the network's layers, where there are CUDA and Triton; whether they do."""
    device = next(net.parameters()).device
    if device.type != "cuda":
        return False
    try:
        from ..model.fused import fuse, try_out

        try_out(device)
    except Exception as error:  # Triton missing, too old, without a compiler, on a card it does not know
        warnings.warn(f"the network goes without its kernels, more slowly: {error!r}", stacklevel=2)
        return False
    fuse(net)
    return True


def sampler(net: dansm.UNet, device: torch.device, precision: str = "auto",
            compile: bool = True) -> Callable[[Tensor, Tensor], Tensor]:
    """What a flow samples from in the place of the network, (B, C, H, W) and times (B,) → (B, C, H, W) float32: the
    same, with the kernels where there are any, unless `compile` is False."""
    dtype, compiled = number_type(precision, device), compile and fused(net)

    @torch.no_grad()
    def evaluate(x: Tensor, t: Tensor) -> Tensor:
        nonlocal compiled
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            if compiled:
                from ..base.launch import compiling_ahead

                with compiling_ahead(device):
                    net(x, t)
                compiled = False  # is done
            return net(x, t).float()

    return evaluate


def at_once(net: dansm.UNet, device: torch.device) -> int:
    """Images that are sampled together where nothing else is said: on a GPU as many as half of its free memory holds,
    up to 2,000, since Python takes tens of milliseconds to launch a network's layers, however many images they are of.

    Of an image up to 17 times the numbers of its first level are there at the same moment (both of the paper's
    networks, without gradients); room is taken for 20, of 4 bytes.
    """
    if device.type != "cuda":
        return 64
    image = 20 * 4 * net.width * net.settings["size"] ** 2
    return max(1, min(2000, free_memory(device) // 2 // image))


def operations_per_image(settings: dict) -> float:
    """Of forward and backward, multiplications and additions counted apart: three times those of forward."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        net = dansm.UNet(**settings)
        with FlopCounterMode(display=False) as counter:
            net(torch.empty(1, settings["channels"], settings["size"], settings["size"]), torch.empty(1))
    return 3.0 * counter.get_total_flops()
