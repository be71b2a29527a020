"""dansm bench: what matching, training and evaluating cost here."""

from pathlib import Path
from typing import Annotated

import typer

from ..base.files import make_folder
from ..base.machine import pick_device
from ..base.text import say
from ..model.recipe import parse_counts
from .options import Device, Out, Seed, parse_shape

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

OUT = Path("runs/bench")
MatchSizes = Annotated[list[str], typer.Option(help="comma-separated pool sizes")]
Shape = Annotated[str, typer.Option(help="shape of one sample, as CxHxW")]
Batch = Annotated[int, typer.Option(min=1, help="samples in a batch")]


@app.callback()
def describe() -> None:
    """Time matching, training or evaluating against the paper's code, other libraries and the machine's floor."""


@app.command()
def match(match_size: MatchSizes = ("1000,10000",), batch: Batch = 250, shape: Shape = "4x32x32", seed: Seed = 0,
          device: Device = "auto", out: Out = OUT) -> None:
    """What matching one batch costs: the paper's loop, other libraries, ours, and the machine's floor."""
    from ..bench.match import bench_match

    sizes = parse_counts("--match-size", ",".join(match_size), at_least=2)
    bench_match(sizes, batch, parse_shape(shape), seed, pick_device(device), make_folder(out))


@app.command()
def spread(match_size: MatchSizes = ("1000,10000",), batch: Batch = 250, shape: Shape = "4x32x32", seed: Seed = 0,
           device: Device = "auto", out: Out = OUT) -> None:
    """The same with one pool over all processes, under torchrun."""
    from ..bench.match import bench_spread

    sizes = parse_counts("--match-size", ",".join(match_size), at_least=2)
    bench_spread(sizes, batch, parse_shape(shape), seed, pick_device(device), make_folder(out))


@app.command()
def train(
    network: Annotated[str | None, typer.Option(
        help="ncsnpp, ddpm or small, at --batch and --shape [the paper's two at their own]")] = None,
    batch: Annotated[int, typer.Option(min=1, help="images a step, with --network")] = 250,
    shape: Annotated[str, typer.Option(help="shape of one image, as CxHxW, with --network")] = "4x32x32",
    match_size: Annotated[int, typer.Option(min=2, help="noises in the pool")] = 10_000,
    samples: Annotated[int | None, typer.Option(min=1, help="images to sample [10,000, on a CPU 4]")] = None,
    first_step: Annotated[bool, typer.Option("--first-step", help="also run dansm train to its first step")] = False,
    seed: Seed = 0, device: Device = "auto", out: Out = OUT,
) -> None:
    """What training costs: whole steps, input, sampling, and where the time goes. For a GPU."""
    from ..bench.train import bench_train, cases_of

    picked = pick_device(device)
    if picked.type != "cuda":
        say("on a CPU a step of these networks takes a minute and more: this is for a GPU, or --network small")
    cases = cases_of(network, batch, parse_shape(shape), picked)
    bench_train(cases, match_size, samples, first_step, seed, picked, make_folder(out))


@app.command()
def evaluate(
    samples: Annotated[int | None, typer.Option(min=1, help="images to evaluate [50,000, on a CPU 1,000]")] = None,
    seed: Seed = 0, device: Device = "auto", out: Out = OUT,
) -> None:
    """What evaluating costs: the features of many images, and each measure."""
    from ..bench.evaluate import bench_evaluate

    picked = pick_device(device)
    bench_evaluate(samples or (50_000 if picked.type == "cuda" else 1000), seed, picked, make_folder(out))


@app.command()
def autoencoder(
    shape: Annotated[str, typer.Option(help="shape of one latent, as CxHxW")] = "4x32x32",
    samples: Annotated[int | None, typer.Option(min=1, help="image files [8,192, on a CPU 8]")] = None,
    seed: Seed = 0, device: Device = "auto", out: Out = OUT,
) -> None:
    """What encoding and decoding cost, alone and from files to files."""
    from ..bench.autoencoder import bench_autoencoder

    bench_autoencoder(parse_shape(shape), samples, seed, pick_device(device), make_folder(out))
