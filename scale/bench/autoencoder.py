"""What encoding and decoding cost, with an autoencoder of Stable Diffusion's size and random weights, as fast as any:
each half alone, by batch and by way, and the commands from JPEG files to latents and from latents to PNG files."""

from __future__ import annotations

import io
import statistics
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

import dansm

from ..base.files import write_csv, write_json
from ..base.machine import hardware, lacks_memory, peak
from ..base.processes import quiet
from ..base.text import say_files
from ..data import encode
from ..data.autoencoder import Autoencoder, Decoder, Encoder, random_autoencoder
from .match import hardware_of, number, peak_mb, reset_peak, timed

BATCHES = {"cuda": (16, 64), "cpu": (1, 4)}
FILES = {"cuda": 8192, "cpu": 8}  # images that go through the commands
DIFFERENT = 256  # images among these, so that making them takes no time
REPEATS = 20, 3  # of a half alone, and of a command


def bench_autoencoder(shape: tuple[int, ...], *, samples: int | None, seed: int, device: torch.device, out: Path,
                      console: Console, settings: dict | None = None) -> list[dict]:
    """Time both halves on latents of `shape` (C, h, w) and the images of these; prints a table, writes
    autoencoder.json and autoencoder.csv. settings: of another network than Stable Diffusion's."""
    if len(shape) != 3 or shape[1] != shape[2]:
        raise dansm.BadInput(f"--shape is {'x'.join(map(str, shape))}: expected that of square latents, as 4x32x32")
    autoencoder = random_autoencoder({"latent_channels": shape[0], **(settings or {})}, seed)
    samples = samples or FILES.get(device.type, 8)
    bench = {"shape": list(shape), "size": shape[1] * autoencoder.shrinks, "parameters": sum(
        weight.numel() for weight in autoencoder.weights.values()), "files": samples,
        "workers": encode.cores(), "hardware": hardware(device), "rows": []}
    for row in (*halves(autoencoder, shape, device, console), *commands(autoencoder, bench["size"], samples, device)):
        bench["rows"].append(row)
        write_json(out / "autoencoder.json", bench)
        console.print(f"{row['what']}, {row['way']}, batch {row['batch']}: {row['images_per_second']:,.1f} images/s")
    write_csv(out / "autoencoder.csv", bench["rows"])
    print_table(bench, console)
    say_files(out, "autoencoder.csv", "autoencoder.json")
    return bench["rows"]


def halves(autoencoder: Autoencoder, shape, device, console) -> Iterator[dict]:
    """A row for each half, way and batch; a batch that does not fit is left out, and said."""
    size = shape[1] * autoencoder.shrinks
    for what, half in {"encode": Encoder, "decode": Decoder}.items():
        for way in ("contiguous", "channels last") if device.type == "cuda" else ("contiguous",):
            one = prepared(half(autoencoder, device), way)
            operations = operations_of(autoencoder, half, shape)
            for batch in BATCHES.get(device.type, (1,)):
                images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, device=device)
                latents = torch.randn(batch, *shape, device=device)
                work = (lambda: one.moments(images)) if what == "encode" else (lambda: one.decode_at_once(latents))  # noqa: B023
                try:
                    measured = measure(work, device)
                except RuntimeError as error:
                    if not lacks_memory(error):
                        raise
                    console.print(f"{what}, {way}, batch {batch}: does not fit into memory")
                    break
                yield row_of(what, way, batch, one.dtype, measured, operations, device)


def prepared(half: Encoder | Decoder, way: str) -> Encoder | Decoder:
    """The half, its tensors laid out as the way says."""
    half.layout = torch.contiguous_format if way == "contiguous" else torch.channels_last
    half.net = half.net.to(memory_format=half.layout)
    return half


def measure(work: Callable[[], Tensor], device) -> dict:
    reset_peak(device)
    work()  # what picks its algorithms does so now
    return {**timed(work, device, REPEATS[0]), "peak_mb": round(peak_mb(device))}


def row_of(what, way, batch, dtype, measured, operations, device) -> dict:
    row = {"what": what, "way": way, "precision": str(dtype).removeprefix("torch."), "batch": batch,
           "images_per_second": round(1000 * batch / measured["median_ms"], 2),
           "least_per_second": round(1000 * batch / measured["most_ms"], 2),
           "most_per_second": round(1000 * batch / measured["least_ms"], 2), **measured,
           "operations_per_image": operations}
    if best := peak(device):
        row["mfu"] = round(row["images_per_second"] * operations / best, 4)
    return row


def operations_of(autoencoder: Autoencoder, half: type, shape) -> float:
    """Of one image, multiplications and additions counted apart."""
    from torch.utils.flop_counter import FlopCounterMode

    size = shape[1] * autoencoder.shrinks
    x = torch.empty(1, *(shape if half is Decoder else (3, size, size)), device="meta")
    net = half(autoencoder, torch.device("meta")).net
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(x)
    return float(counter.get_total_flops())


def commands(autoencoder: Autoencoder, size: int, count: int, device) -> Iterator[dict]:
    """dansm encode of a zip of JPEG images, and dansm decode of what it wrote, several times."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        source = zip_of_photographs(folder / "images.zip", size, count)
        seconds = {"dansm encode": [], "dansm decode": []}
        for repeat in range(REPEATS[1]):
            latents, images = folder / f"latents-{repeat}", folder / f"images-{repeat}"
            with quiet(True):
                seconds["dansm encode"].append(_seconds(lambda: encode.encode(
                    source, autoencoder, device, latents, size=size, flips=False, moments=False, batch=0, shard=4096,  # noqa: B023
                    workers=encode.cores(), precision="auto", skip_unreadable=False)))
                seconds["dansm decode"].append(_seconds(lambda: encode.decode(
                    latents, autoencoder, device, images, count=None, batch=0, memory=None, precision="auto")))  # noqa: B023
        for what, times in seconds.items():
            yield {"what": what, "way": "JPEG files" if "encode" in what else "PNG files", "batch": count,
                   "images_per_second": round(count / statistics.median(times), 2),
                   "least_per_second": round(count / max(times), 2), "most_per_second": round(count / min(times), 2),
                   "median_ms": round(1000 * statistics.median(times), 1), "calls": len(times)}


def _seconds(work) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def zip_of_photographs(path: Path, size: int, count: int) -> Path:
    """JPEG images about as LSUN has them: shorter side as asked for, 4:3, smooth with some grain."""
    numbers, files = np.random.default_rng(0), []
    for _ in range(min(count, DIFFERENT)):
        coarse = Image.fromarray(numbers.integers(0, 256, (max(2, size // 16), max(2, size // 12), 3), np.uint8))
        smooth = np.asarray(coarse.resize((size * 4 // 3, size), Image.Resampling.BICUBIC), np.int16)
        grain = numbers.integers(-12, 13, smooth.shape)
        file = io.BytesIO()
        Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=75)
        files.append(file.getvalue())
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(count):
            archive.writestr(f"{number:06d}.jpg", files[number % len(files)])
    return path


def print_table(bench: dict, console: Console) -> None:
    known = f"{bench['parameters'] / 1e6:.1f} M parameters, images of {bench['size']}²"
    table = Table(title=f"Autoencoder, {known}, {hardware_of(bench)}", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in "what", "way", "batch", "images/s", "least", "most", "MB", "MFU":
        table.add_column(name, justify="left" if name in ("what", "way") else "right", no_wrap=True)
    for row in bench["rows"]:
        rates = (number(row[key]) for key in ("images_per_second", "least_per_second", "most_per_second"))
        table.add_row(row["what"], row["way"], str(row["batch"]), *rates, number(row.get("peak_mb")),
                      f"{row['mfu']:.0%}" if "mfu" in row else "")
    console.print(table)
