"""From a trained network to images: drawn by their numbers, as bytes, as PNG files."""

import math
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

import dansm
from dansm import BadInput

from ..base.copies import copy_to_cpu
from ..base.files import replacing
from ..base.launch import compiling_ahead
from ..base.machine import free_memory, number_type
from ..base.noise import path_noise
from ..base.text import counted, shorten, warn
from ..base.threads import ahead
from ..data.pixels import to_uint8
from .replay import Replayed

ROWS = 10  # of a grid by classes, at most
MOST = 2000  # images that are sampled together on a GPU
NUMBER = re.compile(r"\d+(\.\d*)?|\.\d+")


def check_steps(option: str, steps: int, flow: type) -> None:
    """BadInput for a count of steps that the flow cannot take."""
    if issubclass(flow, dansm.Diffusion) and not 2 <= steps <= flow.levels:
        raise BadInput(f"{option} is {steps}: expected 2 to {flow.levels:,} for a diffusion")


class Guidance(NamedTuple):
    """How far samples go beyond what a network predicts for their labels (Ho and Salimans 2022).

    weight    0: as without labels, 1: as with labels, above 1: further in that direction
    interval  first and last time, from 0 (noise) to 1 (data), at which the weight holds (Kynkäänniemi et al. 2024); at
              others it is 1
    """

    weight: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)


UNGUIDED = Guidance()


def parse_guidance(weights: str, interval: str) -> list[Guidance]:
    """A guidance for each weight of --guidance, once and in their order, with that --guidance-interval. BadInput for
    anything but numbers of at least 0, and two times in [0, 1]."""
    values, times = ([float(part) if NUMBER.fullmatch(part.strip()) else -1.0 for part in text.split(",")]
                     for text in (weights, interval))
    if min(values) < 0:
        raise BadInput(f"--guidance is {weights!r}: expected comma-separated numbers of at least 0, as in 1,1.5,2")
    if len(times) != 2 or not 0 <= times[0] <= times[1] <= 1:
        raise BadInput(f"--guidance-interval is {interval!r}: expected two times from 0 (noise) to 1 (data), as in "
                       "0.2,0.8")
    if times != [0, 1] and set(values) == {1}:
        raise BadInput(f"--guidance-interval is {interval} with --guidance 1, which has no effect: expected another "
                       "--guidance too")
    return [UNGUIDED if weight == 1 else Guidance(weight, tuple(times)) for weight in dict.fromkeys(values)]


def guided(net, labels: Tensor | None, guidance: Guidance, flow, steps: int) -> Callable[[Tensor, Tensor], Tensor]:
    """The network for these labels (B,), as `flow.sample` calls it to take `steps` steps; without labels the network as
    it is. Where the guidance has an effect, one call of twice the batch predicts with the labels and without."""
    if labels is None:
        return net
    if guidance.weight == 1:
        return lambda x, t: net(x, t, labels)
    first, last = guidance.interval
    inside = cycle([first <= t <= last for t in times_of(flow, steps)])
    both = torch.cat([labels, torch.full_like(labels, net.classes)])

    def evaluate(x: Tensor, t: Tensor) -> Tensor:
        if not next(inside):
            return net(x, t, labels)
        with_labels, without = net(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        return without + guidance.weight * (with_labels - without)

    return evaluate


def check_interval(guidance: Guidance, flow, steps: int) -> None:
    """BadInput if the guidance holds at none of the times at which `flow` calls the network to take `steps` steps."""
    if guidance.interval == UNGUIDED.interval:
        return
    first, last = guidance.interval
    times = dict.fromkeys(times_of(flow, steps))
    if not any(first <= t <= last for t in times):
        listed = shorten(", ".join(f"{t:g}" for t in times), 200)
        raise BadInput(f"--guidance-interval is {first:g},{last:g}, and in {counted(steps, 'step')} the network is "
                       f"called at the times {listed}: expected an interval with one of them")


def times_of(flow, steps: int) -> list[float]:
    """The time, from 0 (noise) to 1 (data), of each call of the network while `flow` takes `steps` steps. To read them
    from the calls themselves would make a GPU wait."""
    levels = []

    def called(x: Tensor, level: Tensor) -> Tensor:
        levels.append(level.item())
        return x

    flow.sample(called, torch.zeros(1), steps)
    if isinstance(flow, dansm.Diffusion):
        return [round(1 - level / flow.levels, 6) for level in levels]
    return [round((level / 999 - flow.first_t) / (1 - flow.first_t), 6) for level in levels]


def labels_in_turn(images: Sequence[int], classes: Sequence[int]) -> Tensor:
    """A label for each image, of the classes in turn by the image's number: (len(images),) int64."""
    return torch.tensor([classes[image % len(classes)] for image in images])


def rows_of_classes(classes: int, columns: int) -> tuple[list[int], Tensor]:
    """The images' numbers and labels for a grid with a row for each class, at most ROWS. In a column all have one
    number, and so one noise."""
    rows = min(classes, ROWS)
    return [*range(columns)] * rows, torch.arange(rows).repeat_interleave(columns)


def sample_images(net, flow, images: Sequence[int], shape, steps: int, *, seed: int = 0, batch: int = 64, device="cpu",
                  decode: Callable[[Tensor, int], Tensor] | None = None, labels: Tensor | None = None,
                  guidance: Guidance = UNGUIDED, to_cpu: bool = True) -> Iterator[Tensor]:
    """Draw images by their numbers, `batch` at a time: uint8 (B, C, H, W).

    shape   (C, H, W) of one sample
    seed    decides, with an image's number, the noise that it starts from (see `path_noise`)
    decode  makes images of latents x (B, C, H, W) and the number of x[0]; None for a model of images
    labels  (len(images),) of the images; None for a network without classes
    to_cpu  False leaves images on the device
    A GPU draws one batch while the caller uses the one before and threads draw the noises of the next.
    """
    device = torch.device(device)
    parts = [images[start : start + batch] for start in range(0, len(images), batch)]
    labels_of_parts = [None] * len(parts) if labels is None else labels.to(device).split(batch)
    waiting = deque()

    def draw_noise(part: Sequence[int]) -> Tensor:
        noise = path_noise(part, shape, seed)
        return noise.pin_memory() if device.type == "cuda" else noise  # so that its copy waits for nothing

    with closing(ahead(draw_noise, parts, threads=1, depth=1)) as noises:
        for part, of_part, noise in zip(parts, labels_of_parts, noises, strict=True):
            z = noise.to(device, non_blocking=noise.is_pinned())
            x = flow.sample(guided(net, of_part, guidance, flow, steps), z, steps)
            drawn = decode(x, part[0]) if decode else to_uint8(x)
            if not to_cpu:
                yield drawn
                continue
            waiting.append(copy_to_cpu(drawn))
            if len(waiting) > 1:
                yield waiting.popleft()()
    for copied in waiting:
        yield copied()


def save_grid(images: Tensor, path: Path, enlarge: int = 2, columns: int | None = None) -> None:
    """Write uint8 images (N, C, H, W) as one PNG, about square without `columns`, each pixel `enlarge` pixels wide."""
    from torchvision.utils import make_grid  # takes a second to import

    large = images.repeat_interleave(enlarge, 2).repeat_interleave(enlarge, 3)
    columns = columns or math.ceil(len(images) ** 0.5)
    grid = large[0] if len(images) == 1 else make_grid(large, columns, padding=2, pad_value=255)
    with replacing(path) as partial:
        Image.fromarray(rearrange(grid, "c h w -> h w c").numpy().squeeze()).save(partial, "png")


def fused(net: dansm.UNet) -> bool:
    """Replace the network's layers by kernels, where there are CUDA and Triton. Returns whether it did."""
    if next(net.parameters()).device.type != "cuda":
        return False
    try:
        from .fused import fuse

        fuse(net)
    except Exception as error:  # Triton is missing, too old, without a compiler, or does not know the GPU
        warn(f"the network runs without its kernels, more slowly: {error!r}")
        return False
    return True


def sampler(net: dansm.UNet, device: torch.device, precision: str = "auto",
            compile: bool = True) -> Callable[..., Tensor]:
    """The network as a flow samples from it: (B, C, H, W), times (B,) and maybe labels (B,) → (B, C, H, W) float32.

    compile  use the kernels, if there are any, and on a GPU CUDA graphs, see `Replayed`
    Make a new sampler after the weights change. The network may not be moved while a sampler is in use.
    """
    dtype = number_type(precision, device)
    to_compile = compile and fused(net)
    copies = weights_in(dtype, net)

    def predict(x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        nonlocal to_compile
        with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            if to_compile:
                with compiling_ahead(device):
                    net(x, t, labels)
                to_compile = False
            if copies:
                return torch.func.functional_call(net, copies, (x, t, labels)).float()
            return net(x, t, labels).float()

    if compile and device.type == "cuda":
        predict = Replayed(predict)
    predict.classes = net.classes
    return predict


def weights_in(dtype: torch.dtype, net: dansm.UNet) -> dict[str, Tensor]:
    """Copies of the weights that autocast would convert to `dtype` in each call, by name; none for float32. Biases are
    summed in float32 first."""
    if dtype == torch.float32:
        return {}
    return {name: weight.detach().to(dtype) for name, weight in net.named_parameters()
            if weight.ndim > 1 and name != "label.weight"}


def at_once(net: dansm.UNet, device: torch.device, guidance: Guidance = UNGUIDED) -> int:
    """How many images to sample together: on a GPU those that half of its free memory holds, up to MOST."""
    if device.type != "cuda":
        return 64
    image = 20 * 4 * net.width * math.prod(net.shape[1:])  # bytes; the paper's networks take 17 times the first level
    image *= 1 if guidance.weight == 1 else 2
    return max(1, min(MOST, free_memory(device) // 2 // image))


def operations_per_image(settings: dict) -> float:
    """Multiplications and additions of a training step: three times those of the forward pass."""
    with torch.random.fork_rng([]):  # which its weights are drawn from
        narrow = dansm.UNet(**settings | {"width": 4}).eval()  # the same layers at the same sizes of the image
    pixels = {}
    for name, layer in narrow.named_modules():
        layer.register_forward_hook(lambda _, x, y, name=name: pixels.update({name: y[0, 0].numel()}))
    with torch.no_grad():
        narrow(torch.zeros(1, *narrow.shape), torch.zeros(1))
    with torch.device("meta"):
        layers = dict(dansm.UNet(**settings).named_modules())
    forward = sum(2 * layer.weight.numel() * pixels[name] for name, layer in layers.items()
                  if isinstance(layer, (nn.Conv2d, nn.Linear)))
    forward += sum(4 * pixels[name] ** 2 * layer.out.in_channels for name, layer in layers.items()
                   if isinstance(layer, dansm.Attention))
    return 3.0 * forward
