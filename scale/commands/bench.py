"""dansm bench: what matching, training and evaluating cost here."""

import importlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Literal
from unittest.mock import patch

import torch
import torch.distributed as group
import typer
from torch import Tensor

import dansm
from dansm import BadInput

from ..base.machine import pick_device
from ..base.processes import processes, quiet
from ..base.text import console, say
from ..bench import clock
from ..model.recipe import parse_counts
from .options import Device, Out, Seed, Size

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def parse_shape(text: str) -> tuple[int, ...]:
    sizes = text.lower().split("x")
    if len(sizes) != 3 or not all(size.isdecimal() and 0 < int(size) < 2**16 for size in sizes):
        raise BadInput(f"--shape is {text!r}: expected whole numbers from 1 to 65,535 as CxHxW, such as 4x32x32")
    return tuple(map(int, sizes))


def parse_square(text: str) -> tuple[int, ...]:
    shape = parse_shape(text)
    if shape[1] != shape[2]:
        raise BadInput(f"--shape is {text!r}: expected that of square images or latents, such as 4x32x32")
    return shape


OUT = Path("runs/bench")
MatchSizes = Annotated[list[str], typer.Option(
    help="comma-separated pool sizes", callback=lambda sizes: parse_counts("--match-size", ",".join(sizes), 2))]
Batch = Annotated[int, typer.Option(min=1, help="samples in a batch")]
Shape = Annotated[str, typer.Option(help="shape of one image or latent, as CxHxW", callback=parse_shape)]
Square = Annotated[str, typer.Option(help="shape of one square image or latent, as CxHxW", callback=parse_square)]


@app.callback()
def describe() -> None:
    """Time matching, training or evaluating against the paper's code, other libraries and the machine's floor."""


@app.command()
def match(match_size: MatchSizes = ("1000,10000",), batch: Batch = 250, shape: Shape = "4x32x32", seed: Seed = 0,
          device: Device = "auto", out: Out = OUT) -> None:
    """What matching one batch costs: the paper's loop, other libraries, ours, and the machine's floor."""
    from ..bench.match import parts_of, rates

    importlib.import_module("matplotlib")  # if it is missing, that is told before anything is measured
    device = pick_device(device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    dansm.NoisePool(max(match_size), shape, device=device, dtype=dtype)  # refused before anything is measured
    x = clock.image_like(batch, shape, seed, device)
    measured = rates(device)
    bench = clock.run("match", f"Matching a batch of {batch} samples of {'×'.join(map(str, shape))}",
                      parts_of(x, match_size, seed, measured), device, out,
                      "way match_size median_ms least_ms most_ms times_faster floor_ms",
                      "ours: over a pool's life. times faster: than the paper's loop, both on a full pool (full_ms). "
                      "floor: reading or multiplying half a pool", batch=batch, shape=shape, rates=measured)
    rows = {f"{row['way']}, {row['match_size']:,}": row for row in bench["rows"]}
    clock.draw(bench["title"], rows, {}, out / "match.png", scale="log")


@app.command()
def spread(match_size: MatchSizes = ("1000,10000",), batch: Batch = 250, shape: Shape = "4x32x32", seed: Seed = 0,
           device: Device = "auto", out: Out = OUT) -> None:
    """The same with one pool over all processes, under torchrun."""
    from ..bench.match import spread_life

    if "RANK" not in os.environ:
        raise BadInput("bench is spread: expected several processes, as in torchrun --nproc-per-node 2 dansm.py bench "
                       "spread")
    with processes(pick_device(device)) as device, quiet(group.get_rank() > 0):
        x = clock.image_like(batch, shape, seed + group.get_rank(), device)
        parts = [(f"{size:,}", spread_life(x, size, seed)) for size in match_size]
        clock.run("spread", f"One pool over {group.get_world_size()} processes", parts, device, out,
                  "match_size batch_a_rank median_ms least_ms most_ms received_mb_median", shape=shape)


@app.command()
def train(
    network: Annotated[Literal["ncsnpp", "ddpm", "small", "tiny"] | None, typer.Option(
        help="at --batch and --shape", show_default="the paper's two at their own")] = None,
    batch: Annotated[int, typer.Option(min=1, help="images a step, with --network")] = 250,
    shape: Square = "4x32x32",
    match_size: Annotated[int, typer.Option(min=2, help="noises in the pool")] = 10_000,
    samples: Annotated[int | None, typer.Option(min=1, help="images to sample [10,000, on a CPU 4]")] = None,
    first_step: Annotated[bool, typer.Option("--first-step", help="also run dansm train to its first step")] = False,
    seed: Seed = 0, device: Device = "auto", out: Out = OUT,
) -> None:
    """What training costs: whole steps, input, sampling, and where the time goes. For a GPU."""
    from ..bench.train import OURS, PAPER, TABLES, Case, parts_of

    importlib.import_module("matplotlib")
    device = pick_device(device)
    cases = [Case(network, shape, batch)] if network else PAPER
    if device.type != "cuda":
        say("on a CPU a step of these networks takes a minute and more: this is for a GPU, or --network tiny")
        cases = cases if network else [case._replace(batch=2) for case in PAPER]
    for case in cases:  # refuse what does not fit before anything is measured
        dansm.NoisePool(match_size, case.shape, device=device)
        with torch.device("meta"):
            dansm.UNet(**case.settings)
    samples = samples or (10_000 if device.type == "cuda" else 4)
    bench = clock.run("train", f"Training with matching at {match_size:,}",
                      parts_of(cases, match_size, samples, first_step, seed, device), device, out,
                      match_size=match_size)
    console.print(bench["title"])
    bars, kinds = {}, {}
    for case in cases:
        rows = [row for row in bench["rows"] if row["case"] == case.name]
        for part, (heading, columns) in TABLES.items():
            clock.show(f"{case.name}: {heading}", [row for row in rows if row["part"] == part], columns)
        bars |= {f"{row['way']}\n{case.name}": row for row in rows if row["part"] == "steps"}
        kinds[f"{OURS}\n{case.name}"] = {row["kind"]: row["ms"] for row in rows if row["part"] == "profile"}
    clock.draw(bench["title"], bars, kinds, out / "train.png")


@app.command()
def evaluate(
    samples: Annotated[int | None, typer.Option(min=4, help="images to evaluate [50,000, on a CPU 1,000]")] = None,
    seed: Seed = 0, device: Device = "auto", out: Out = OUT,
) -> None:
    """What evaluating costs: the features of many images, and each measure."""
    device = pick_device(device)
    count = samples or (50_000 if device.type == "cuda" else 1000)
    images = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    names = "efficientnet-lite0", "inception"
    parts = [(features, evaluation_row(features, images, seed, device)) for features in names]
    clock.run("evaluate", f"Evaluating {count:,} images of 3×32×32", parts, device, out,
              "features images_per_second features_s frechet_s kernel_s reach_s within_s", images=count)


def evaluation_row(features: str, images: Tensor, seed: int, device: torch.device) -> Iterator[dict]:
    """Seconds for the features of all images with their mean and covariance, and for each measure on them. Inception's
    weights are untrained. reach: precision and recall; within: features and Fréchet distance."""
    from ..evaluate import measures
    from ..evaluate.extractors import features_of, load_extractor
    from ..evaluate.real_features import feature_batch, real_features

    def seconds(work: Callable, *arguments) -> float:
        return round(clock.milliseconds(device, work, *arguments) / 1000, 4)

    inception = "torch_fidelity.feature_extractor_inceptionv3"
    with patch(f"{inception}.load_state_dict_from_url", lambda *_, **__: {}), \
            patch(f"{inception}.FeatureExtractorInceptionV3.load_state_dict"):
        extractor = load_extractor(features, device)
    features_of(images[: feature_batch(device)], extractor, device)  # what is loaded and chosen at the first call
    measured = []
    row = {"features": features, "features_s": seconds(
        lambda: measured.append(real_features(images, extractor, device)))}
    real = measured[0]
    reference = measures.Reference(real, extractor, seed=seed, device=device)
    some = reference.drawn(slice(10_000))  # generated images are scored against all
    row |= {"frechet_s": seconds(measures.frechet_distance, some, reference),
            "kernel_s": seconds(measures.kernel_distance, some, real.features, "kernel", device),
            "reach_s": seconds(measures.precision_recall, some, len(some), reference)}
    yield {**row, "within_s": round(row["features_s"] + row["frechet_s"], 4), "dimensions": some.shape[1],
           "images_per_second": round(len(images) / row["features_s"], 1)}


@app.command()
def autoencoder(
    shape: Square = "4x32x32",
    samples: Annotated[int | None, typer.Option(min=1, help="image files [8,192, on a CPU 8]")] = None,
    seed: Seed = 0, device: Device = "auto", out: Out = OUT,
) -> None:
    """What encoding and decoding cost, alone and from files to files."""
    from ..bench.autoencoder import command_rows, half_rows
    from ..data import autoencoder, encode

    device = pick_device(device)
    network = autoencoder.random_autoencoder({"latent_channels": shape[0]}, seed)
    size = shape[1] * network.shrinks
    count = samples or (8192 if device.type == "cuda" else 8)
    parameters = sum(weight.numel() for weight in network.network.parameters())
    parts = [("encode", half_rows(network, autoencoder.Encoder, (3, size, size), device)),
             ("decode", half_rows(network, autoencoder.Decoder, shape, device)),
             ("the commands", command_rows(network, size, count, device))]
    clock.run("autoencoder", f"Autoencoder, {parameters / 1e6:.1f} M parameters, images of {size}²", parts, device, out,
              "what way batch images_per_second median_ms least_ms most_ms peak_mb mfu", shape=shape, size=size,
              parameters=parameters, files=count, workers=encode.cores())


@app.command()
def couplings(
    data: Annotated[str | None, typer.Option(
        help="images or latents, as for dansm train", show_default="cifar10, or synthetic ones without it")] = None,
    couplings: Annotated[str | None, typer.Option(
        help="comma-separated names, or module:function of your own; a wrong name lists all",
        show_default="all, within classes only those with prices")] = None,
    labels: Annotated[str, typer.Option(help="classes of the data, as for dansm train")] = "auto",
    size: Size = None,
    batch: Annotated[int, typer.Option(min=2, help="samples in a batch")] = 256,
    count: Annotated[int | None, typer.Option(
        min=2, help="samples that are paired, at random", show_default="100,000, on a CPU 2,048, or all")] = None,
    seed: Seed = 0, device: Device = "auto", out: Out = OUT,
) -> None:
    """Compare ways of pairing noise with data: their cost, what they keep of the prior, and what they gain."""
    from ..bench import couplings as bench
    from ..bench.couplings_figure import draw
    from ..bench.ways import chosen

    device = pick_device(device)
    if count and count < batch:
        raise BadInput(f"--count is {count}, --batch {batch}: expected a --count of at least {batch}")
    samples, source = bench.load(data, labels, size, count, batch, seed, device)
    ways = chosen(couplings, samples.labels is not None, source)
    about = bench.about(samples, source)
    costs, quality = bench.captions(about)
    for kind in ("png", "svg"):  # of an earlier call
        (out / f"couplings.{kind}").unlink(missing_ok=True)
    found = clock.run("couplings", f"Pairing {about['samples']:,} samples of {Path(source).name}",
                      bench.parts_of(ways, samples, batch), device, out, bench.COSTS, costs,
                      [name for name, way in ways.items() if way.family != "own"], batch=batch, seed=seed, **about)
    clock.show("Prior, classes and gain", found["rows"], bench.QUALITY, quality)
    say("written:", *(str(out / name) for name in draw(found, out / "couplings")))
