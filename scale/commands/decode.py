"""dansm decode: latents to images."""

from pathlib import Path
from typing import Annotated

import typer

from ..base.machine import pick_device
from .options import Autoencoder, DecodeMemory, Device, Out, Precision, command_app

app = command_app()


@app.command()
def decode(
    source: Annotated[Path, typer.Argument(
        help="latents times the factor: a .npy file, a folder of them, or what dansm encode wrote")],
    autoencoder: Autoencoder,
    count: Annotated[int | None, typer.Option(min=1, help="decode only the first N", show_default="all")] = None,
    batch: Annotated[int, typer.Option(min=0, help="most latents decoded together; 0: what --memory holds")] = 0,
    memory: DecodeMemory = None,
    precision: Precision = "auto",
    device: Device = "auto",
    out: Out = Path("runs/decode"),
) -> None:
    """Decode latents to PNG images by Stable Diffusion's autoencoder. A stopped decode resumes."""
    from ..data.autoencoder import Decoder, read_autoencoder
    from ..data.decode import decode

    decode(source, Decoder(read_autoencoder(autoencoder), pick_device(device), precision, memory), out, count, batch)
