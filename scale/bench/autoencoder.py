"""What an autoencoder of Stable Diffusion's size costs: each half alone, and the commands from files to files."""

import tempfile
import zipfile
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path

import torch
from PIL import Image

from ..base.machine import peak
from ..base.processes import quiet
from ..data import decode, encode
from ..data.autoencoder import Autoencoder, Decoder, Encoder
from ..data.pixels import to_uint8
from . import clock

BATCHES = {"cuda": (16, 64), "cpu": (1, 4)}
DIFFERENT = 256  # images among the files of the commands, so that making them takes no time
REPEATS, COMMANDS = 20, 3  # of a half alone, and of a command


def half_rows(autoencoder: Autoencoder, half: type, shape: tuple[int, ...], device: torch.device) -> Iterator[dict]:
    """A row for each batch of one half, whose input has this shape."""
    from torch.utils.flop_counter import FlopCounterMode

    part = half(autoencoder, device)
    work = part.moments if half is Encoder else part.decode_at_once
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        half(autoencoder, torch.device("meta")).net(torch.empty(1, *shape, device="meta"))
    operations = float(counter.get_total_flops())
    for batch in BATCHES.get(device.type, (1,)):
        x = torch.rand(batch, *shape, device=device)
        x = (255 * x).byte() if half is Encoder else x
        clock.reset_peak(device)
        work(x)  # its algorithms are picked now
        times = clock.timed(device, REPEATS, work, x)
        row = {"what": "encode" if half is Encoder else "decode", "way": "alone", "precision": part.precision,
               "batch": batch, **clock.spread(times, batch), "peak_mb": clock.peak_mb(device),
               "operations_per_image": operations}
        if best := peak(device):
            row["mfu"] = round(row["images_per_second"] * operations / best, 4)
        yield row


def command_rows(autoencoder: Autoencoder, size: int, count: int, device: torch.device) -> Iterator[dict]:
    """dansm encode of a zip of JPEG images, and dansm decode of what it wrote, several times."""
    encoding, decoding = [], []
    with tempfile.TemporaryDirectory() as folder, quiet(True):
        source = zip_of_photographs(Path(folder) / "images.zip", size, count)
        settings = encode.Settings(size, shard=4096)
        for repeat in range(COMMANDS):
            latents, images = Path(folder) / f"latents-{repeat}", Path(folder) / f"images-{repeat}"
            encoding.append(clock.milliseconds(device, encode.encode, source, autoencoder, device, latents, settings))
            decoding.append(clock.milliseconds(device, decode.decode, latents, Decoder(autoencoder, device), images))
    for what, way, times in ("dansm encode", "JPEG files", encoding), ("dansm decode", "PNG files", decoding):
        yield {"what": what, "way": way, "batch": count, **clock.spread(times, count)}


def zip_of_photographs(path: Path, size: int, count: int) -> Path:
    """JPEG images about as LSUN has them: shorter side as asked for, 4:3, smooth with some grain."""
    images = clock.image_like(min(count, DIFFERENT), (3, size, size * 4 // 3), 0, torch.device("cpu"))
    images = to_uint8(images + 0.1 * torch.rand_like(images)).permute(0, 2, 3, 1).numpy()
    with zipfile.ZipFile(path, "w") as archive:
        for number, image in enumerate(islice(cycle(images), count)):
            with archive.open(f"{number:06d}.jpg", "w") as file:
                Image.fromarray(image).save(file, "JPEG", quality=75)
    return path
