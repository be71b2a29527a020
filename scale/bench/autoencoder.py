"""What encoding and decoding cost, with an autoencoder of Stable Diffusion's size and random weights, as fast as any:
each half alone, and the commands from JPEG files to latents and from latents to PNG files.
"""

import io
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from dansm import BadInput

from ..base.machine import peak
from ..base.processes import quiet
from ..base.text import say_files
from ..data import decode, encode
from ..data.autoencoder import Autoencoder, Decoder, Encoder, random_autoencoder
from ..data.pixels import to_uint8
from . import clock
from .clock import image_like, milliseconds, spread, timed

BATCHES = {"cuda": (16, 64), "cpu": (1, 4)}
FILES = {"cuda": 8192, "cpu": 8}  # images that go through the commands
DIFFERENT = 256  # images among these, so that making them takes no time
REPEATS, COMMANDS = 20, 3  # of a half alone, and of a command


def bench_autoencoder(shape: tuple[int, ...], samples: int | None, seed: int, device: torch.device, out: Path) -> None:
    """Time both halves on latents of `shape` (C, h, w) and their images, and the commands on `samples` files. Prints a
    table, writes autoencoder.json and autoencoder.csv."""
    if len(shape) != 3 or shape[1] != shape[2]:
        raise BadInput(f"--shape is {'x'.join(map(str, shape))}: expected that of square latents, as 4x32x32")
    autoencoder = random_autoencoder({"latent_channels": shape[0]}, seed)
    size = shape[1] * autoencoder.shrinks
    files = samples or FILES.get(device.type, 8)
    parameters = sum(weight.numel() for weight in autoencoder.network.parameters())
    parts = [("encode", half_rows(autoencoder, Encoder, (3, size, size), device)),
             ("decode", half_rows(autoencoder, Decoder, shape, device)),
             ("the commands", command_rows(autoencoder, size, files, device))]
    about = {"shape": list(shape), "size": size, "parameters": parameters, "files": files, "workers": encode.cores()}
    bench = clock.run("autoencoder", device, about, parts, out)
    title = f"Autoencoder, {parameters / 1e6:.1f} M parameters, images of {size}², {clock.hardware_of(bench)}"
    clock.show(title, bench["rows"], {
        "what": "what", "way": "way", "batch": "batch", "images/s": "images_per_second", "least": "least_per_second",
        "most": "most_per_second", "MB": "peak_mb", "MFU": "mfu"}, texts=2)
    say_files(out, "autoencoder.csv", "autoencoder.json")


def half_rows(autoencoder: Autoencoder, half: type, shape: tuple[int, ...], device: torch.device) -> Iterator[dict]:
    """A row for each batch of one half, whose input has this shape."""
    part = half(autoencoder, device)
    operations = operations_of(half(autoencoder, torch.device("meta")).net, shape)
    for batch in BATCHES.get(device.type, (1,)):
        if half is Encoder:
            work = part.moments
            x = torch.randint(0, 256, (batch, *shape), dtype=torch.uint8, device=device)
        else:
            work = part.decode_at_once
            x = torch.randn(batch, *shape, device=device)
        clock.reset_peak(device)
        work(x)  # its algorithms are picked now
        times = timed(device, REPEATS, work, x)
        row = {"what": "encode" if half is Encoder else "decode", "way": "alone", "precision": part.precision,
               "batch": batch, **rates(batch, times), **times, "peak_mb": clock.peak_mb(device),
               "operations_per_image": operations}
        if best := peak(device):
            row["mfu"] = round(row["images_per_second"] * operations / best, 4)
        yield row


def rates(count: int, times: dict) -> dict:
    """Images a second in the median, slowest and quickest of times in which `count` are done."""
    columns = {"images_per_second": "median_ms", "least_per_second": "most_ms", "most_per_second": "least_ms"}
    return {name: round(1000 * count / times[time], 2) for name, time in columns.items()}


def operations_of(net: nn.Module, shape: tuple[int, ...]) -> float:
    """For one input, multiplications and additions counted apart. net: on the meta device."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.empty(1, *shape, device="meta"))
    return float(counter.get_total_flops())


def command_rows(autoencoder: Autoencoder, size: int, count: int, device: torch.device) -> Iterator[dict]:
    """dansm encode of a zip of JPEG images, and dansm decode of what it wrote, several times."""
    encoding, decoding = [], []
    with tempfile.TemporaryDirectory() as folder, quiet(True):
        source = zip_of_photographs(Path(folder) / "images.zip", size, count)
        for repeat in range(COMMANDS):
            latents, images = Path(folder) / f"latents-{repeat}", Path(folder) / f"images-{repeat}"
            encoding.append(milliseconds(device, lambda to: encode.encode(
                source, autoencoder, device, to, encode.Settings(size, shard=4096)), latents))
            decoding.append(milliseconds(device, lambda latents, to: decode.decode(
                latents, Decoder(autoencoder, device), to), latents, images))
    for what, way, times in ("dansm encode", "JPEG files", encoding), ("dansm decode", "PNG files", decoding):
        yield {"what": what, "way": way, "batch": count, **rates(count, spread(times)), **spread(times)}


def zip_of_photographs(path: Path, size: int, count: int) -> Path:
    """JPEG images about as LSUN has them: shorter side as asked for, 4:3, smooth with some grain."""
    images = image_like(min(count, DIFFERENT), (3, size, size * 4 // 3), 0, torch.device("cpu"))
    files = []
    for image in to_uint8(images + 0.1 * torch.rand_like(images)).permute(0, 2, 3, 1).numpy():
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=75)
        files.append(file.getvalue())
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(count):
            archive.writestr(f"{number:06d}.jpg", files[number % len(files)])
    return path
