"""Options that several commands share."""

from pathlib import Path
from typing import Annotated, Literal

import typer


def command_app() -> typer.Typer:
    """The Typer app of one command's file."""
    return typer.Typer(add_completion=False, pretty_exceptions_enable=False)


Device = Annotated[Literal["auto", "cpu", "cuda", "mps"], typer.Option(help="auto: the fastest one available")]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="same seed, same result on the same machine")]
MatchSize = Annotated[int, typer.Option(min=0, help="noises in the pool; 0 or 1: random pairs")]
Out = Annotated[Path, typer.Option(help="folder for the results, made if missing")]

Model = Annotated[Path, typer.Argument(help="folder of a dansm train, one of its checkpoints, or an export")]
Models = Annotated[list[Path], typer.Argument(help="folders of dansm train, their checkpoints, or exports")]
Labels = Annotated[list[str] | None, typer.Option(
    "--name", help="name of a model in the figure: once for each, in their order",
    show_default="their folders' names")]
Data = Annotated[str | None, typer.Option(
    help="images or latents, as for dansm train", show_default="those of the model's training")]
Background = Annotated[str, typer.Option(help="colour under transparent pixels of images, by name or as #rrggbb")]
Size = Annotated[int | None, typer.Option(min=1, help="make images squares of this many pixels")]
SampleSteps = Annotated[int, typer.Option(min=1, help="steps from a noise to the model's sample")]
Batch = Annotated[int, typer.Option(min=1, help="samples drawn together")]
SampleBatch = Annotated[int, typer.Option(
    min=0, help="images drawn together; 0: what half of a GPU's free memory holds, up to 2,000, or 64")]
Solver = Annotated[Literal["euler", "heun"], typer.Option(help="heun takes two evaluations a step")]
Guidance = Annotated[str, typer.Option(
    help="how far a sample goes beyond what its label alone predicts: 1 no further, 0 as without labels")]
Guidances = Annotated[str, typer.Option("--guidance", help="comma-separated, each as for dansm sample")]
GuidanceInterval = Annotated[str, typer.Option(help="first and last time of the guidance; 0 is noise, 1 is data")]
Precision = Annotated[Literal["auto", "bf16", "fp16", "fp32"], typer.Option(
    help="of the network; auto: bf16, on older GPUs fp16, on the CPU fp32")]
Autoencoder = Annotated[Path, typer.Option(
    help="Stable Diffusion's: a diffusers folder, or a .safetensors or .ckpt with keys first_stage_model.…",
    show_default=False)]
DecodeWith = Annotated[Path | None, typer.Option(
    "--autoencoder", help="decodes what a network of latents draws; as for dansm encode")]
DecodeMemory = Annotated[float | None, typer.Option(
    "--memory", min=0.0, help="gigabytes to decode latents in", show_default="a quarter of what is free")]
SkipUnreadable = Annotated[bool, typer.Option("--skip-unreadable", help="leave out images that cannot be read")]
InceptionWeights = Annotated[Path | None, typer.Option(help="file with them, where nothing can be downloaded")]
