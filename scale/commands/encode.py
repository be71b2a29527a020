"""dansm encode: images to latents."""

from pathlib import Path
from typing import Annotated

import typer

from ..base.machine import pick_device
from .options import Autoencoder, Background, Device, Out, Precision, SkipUnreadable, command_app

app = command_app()


@app.command()
def encode(
    source: Annotated[Path, typer.Argument(
        help="a folder of images (with subfolders), a zip or tar of them, an LSUN lmdb, or uint8 arrays")],
    autoencoder: Autoencoder,
    size: Annotated[int, typer.Option(min=1, help="pixels of the shorter side, then the centre square")] = 256,
    flips: Annotated[bool, typer.Option("--flips", help="after each latent, that of the mirrored image")] = False,
    moments: Annotated[bool, typer.Option(
        "--moments", help="keep mean and log-variance, for training to draw from; else the mean alone")] = False,
    batch: Annotated[int, typer.Option(min=0, help="latents made together; 0: 64 on a GPU, or 8")] = 0,
    shard: Annotated[int, typer.Option(min=1, help="images in each file, and what a kill can lose")] = 4096,
    workers: Annotated[int, typer.Option(min=0, help="threads of each process that read images; 0: its cores")] = 0,
    precision: Precision = "auto",
    skip_unreadable: SkipUnreadable = False,
    background: Background = "white",
    labels: Annotated[str, typer.Option(
        help="kept in the index, for dansm train --labels auto: none, auto, folders or a file, as there")] = "auto",
    device: Device = "auto",
    out: Out = Path("data/latents"),
) -> None:
    """Encode images to latents by Stable Diffusion's autoencoder, in shards. A stopped encode resumes."""
    from ..data.autoencoder import read_autoencoder
    from ..data.encode import Settings, encode

    settings = Settings(size, shard, flips, moments, batch, workers, precision, skip_unreadable, background, labels)
    encode(source, read_autoencoder(autoencoder), pick_device(device), out, settings)
