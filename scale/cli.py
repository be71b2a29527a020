"""The options of the commands that work on images and models. What each does stands where it is imported from; what it
is for is said in dansm.py, which lists them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

import dansm
from dansm import BadInput, Device, Out, Seed

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


NO_DOWNLOAD = "\n\nWithout a download: --features scale.evaluate:efficientnet_lite0"  # whole on a screen of 80 columns


def _command(name: str, more: str = ""):
    return app.command(name, help=dansm.COMMANDS[name] + more)


def run(arguments: list[str], called: str) -> None:
    """The command that the first of the arguments names; `called` is what stands before it in the help."""
    code = typer.main.get_command(app)(arguments, standalone_mode=False, prog_name=called)
    if code == 130:  # what newer Typers make of Ctrl-C
        raise KeyboardInterrupt


Models = Annotated[list[Path], typer.Argument(
    help="the folders of dansm train, their checkpoints, or exports")]
Labels = Annotated[list[str] | None, typer.Option(
    "--label", help="what the figure calls a model: once for each, in their order; without it their folders' names")]
Data = Annotated[str | None, typer.Option(
    help="images or latents, as for dansm train; without it those that the model was trained on")]
Size = Annotated[int | None, typer.Option(min=1, help="make images squares of so many pixels")]
OwnSteps = Annotated[int, typer.Option(min=1, help="steps from a noise to the model's own sample")]
Batch = Annotated[int, typer.Option(min=1, help="samples at a time")]
Precision = Annotated[Literal["auto", "bf16", "fp16", "fp32"], typer.Option(
    help="auto: bf16, on older GPUs fp16, on the CPU fp32")]

AModel = Annotated[Path, typer.Argument(help="the folder of a dansm train, one of its checkpoints, or an export")]
Solver = Annotated[Literal["euler", "heun"], typer.Option(help="heun takes two evaluations a step")]
OwnBatch = Annotated[int, typer.Option(
    min=0, help="images at a time; 0: what half of a GPU's free memory holds, up to 2,000, or 64")]
Autoencoder = Annotated[Path, typer.Option(
    help="Stable Diffusion's: a diffusers folder, or a .safetensors or .ckpt with keys first_stage_model.…",
    show_default=False)]
ForLatents = Annotated[Path | None, typer.Option(
    "--autoencoder", help="that decodes what a network of latents draws, as for dansm encode")]
Memory = Annotated[float | None, typer.Option(
    min=0.0, help="gigabytes to decode latents in; without it a quarter of what is free")]


def parse_shape(text: str) -> tuple[int, ...]:
    """4x32x32 → (4, 32, 32)."""
    sizes = text.lower().split("x")
    if not all(size.isdecimal() and 0 < int(size) < 2**16 for size in sizes):
        raise BadInput(f"--shape is {text!r}: expected whole numbers from 1 to 65,535, as in 4x32x32")
    return tuple(map(int, sizes))


@_command("export")
def export_command(
    run: Annotated[Path, typer.Argument(help="the folder of a dansm train, or one of its checkpoints")],
    average: Annotated[int, typer.Option(min=0, help="which moving average, where a run keeps several")] = 0,
    out: Annotated[Path | None, typer.Option(
        help="file to write; without it weights.safetensors in the run's folder")] = None,
) -> None:
    from scale.checkpoint import export

    out = out or (run if run.is_dir() else run.parent) / "weights.safetensors"
    about = export(run, out, average, dansm.say)
    dansm.say(f"step {about['step']:,} of {about['file']}, average of decay {about['decay']}")
    dansm.say_files(out.parent, out.name)


@_command("sample")
def sample_command(
    model: AModel,
    count: Annotated[int, typer.Option(min=1, help="how many images")] = 64,
    steps: Annotated[int, typer.Option(min=1, help="steps from noise to image; more is better and slower")] = 20,
    solver: Solver = "euler",
    batch: OwnBatch = 0,
    files: Annotated[bool, typer.Option(help="also write every image as a file of its own")] = False,
    precision: Precision = "auto",
    autoencoder: ForLatents = None,
    memory: Memory = None,
    seed: Seed = 0,
    device: Device = "auto",
    out: Out = Path("runs/sample"),
) -> None:
    from scale.command import sample

    sample(model, dansm.pick_device(device), out, count=count, steps=steps, solver=solver, batch=batch,
           files=files, precision=precision, seed=seed, autoencoder=autoencoder, memory=memory)


@_command("evaluate", NO_DOWNLOAD)
def evaluate_command(
    models: Annotated[list[Path], typer.Argument(help="folders of dansm train, checkpoints, or exports")],
    data: Annotated[str | None, typer.Option(
        help="the real images: a folder, an archive, cifar10; else what the models were trained on, or what their "
             "latents are of")] = None,
    steps: Annotated[str, typer.Option(help="counts of steps from noise to image, parted by commas")] = "3,4,5,10",
    count: Annotated[int, typer.Option(min=2, help="images drawn for each row of the table")] = 10_000,
    size: Annotated[int | None, typer.Option(min=1, help="make the real images so many pixels square")] = None,
    skip_unreadable: Annotated[bool, typer.Option("--skip-unreadable", help="leave out what cannot be read")] = False,
    features: Annotated[str, typer.Option(
        help="inception, or any other network as module:callable")] = "inception",
    inception_weights: Annotated[Path | None, typer.Option(help="its weights, where nothing can be downloaded")] = None,
    autoencoder: ForLatents = None,
    memory: Memory = None,
    solver: Solver = "euler",
    batch: OwnBatch = 0,
    precision: Annotated[Literal["auto", "bf16", "fp16", "fp32"], typer.Option(
        help="of the generator; auto: bf16, on older GPUs fp16, on the CPU fp32")] = "auto",
    seed: Seed = 0,
    device: Device = "auto",
    cache: Annotated[Path, typer.Option(help="folder that keeps the features of real images")] = Path("~/.cache/dansm"),
    out: Out = Path("runs/evaluate"),
) -> None:
    from scale.evaluate import evaluate

    evaluate(models, data, dansm.pick_device(device), out, steps=steps, count=count, size=size, features=features,
             weights=inception_weights, solver=solver, batch=batch, precision=precision, seed=seed,
             cache=cache.expanduser(), autoencoder=autoencoder, memory=memory, skip_unreadable=skip_unreadable)


bench = typer.Typer(no_args_is_help=True)
app.add_typer(bench, name="bench", help=dansm.COMMANDS["bench"])

Pools = Annotated[list[str], typer.Option(help="sizes of the pool, parted by commas")]
OwnShape = Annotated[str, typer.Option(help="of one sample, as CxHxW")]
Timed = Annotated[int, typer.Option(min=1, help="samples a batch")]


@bench.command("match")
def bench_match_command(match_size: Pools = ("1000,10000",), batch: Timed = 250, shape: OwnShape = "4x32x32",
                        seed: Seed = 0, device: Device = "auto", out: Out = Path("runs/bench")) -> None:
    """What pairing one batch costs: the paper's loop, other libraries, ours, and the machine's floor."""
    from scale.bench import bench_match

    _bench_pools(bench_match, match_size, batch, shape, seed, device, out)


@bench.command("spread")
def bench_spread_command(match_size: Pools = ("1000,10000",), batch: Timed = 250, shape: OwnShape = "4x32x32",
                         seed: Seed = 0, device: Device = "auto", out: Out = Path("runs/bench")) -> None:
    """The same with one pool over all processes, under torchrun."""
    from scale.bench import bench_spread

    _bench_pools(bench_spread, match_size, batch, shape, seed, device, out)


def _bench_pools(measure, match_size, batch, shape, seed, device, out):
    from scale.recipe import parse_counts

    sizes = parse_counts("--match-size", ",".join(match_size), at_least=2)
    measure(sizes, batch, parse_shape(shape), seed=seed, device=dansm.pick_device(device), out=dansm.make_folder(out),
            console=dansm.console)


@bench.command("train")
def bench_train_command(
    network: Annotated[str | None, typer.Option(
        help="ncsnpp, ddpm or small, at --batch and --shape, in place of the paper's two at theirs")] = None,
    batch: Annotated[int, typer.Option(min=1, help="images a step, with --network")] = 250,
    shape: Annotated[str, typer.Option(help="of one image, as CxHxW, with --network")] = "4x32x32",
    match_size: Annotated[int, typer.Option(min=2, help="noises in the pool")] = 10_000,
    samples: Annotated[int | None, typer.Option(min=1, help="images to sample; without it 10,000, on a CPU 4")] = None,
    first_step: Annotated[bool, typer.Option("--first-step", help="also run dansm train to its first step")] = False,
    seed: Seed = 0,
    device: Device = "auto",
    out: Out = Path("runs/bench"),
) -> None:
    """What training costs: whole steps, input, sampling, and where the time goes. For a GPU."""
    from scale.bench_train import bench_train, cases

    if dansm.pick_device(device).type != "cuda":
        dansm.say("on a CPU a step of these networks takes a minute and more: this is for a GPU, or --network small")
    chosen = cases(network, batch, parse_shape(shape), dansm.pick_device(device))
    bench_train(chosen, match_size, samples=samples, first_step=first_step, seed=seed,
                device=dansm.pick_device(device), out=dansm.make_folder(out), console=dansm.console)


@bench.command("evaluate")
def bench_evaluate_command(
    samples: Annotated[int | None, typer.Option(min=1, help="images to judge; without it 50,000, on a CPU 1,000")] = (
        None),
    seed: Seed = 0,
    device: Device = "auto",
    out: Out = Path("runs/bench"),
) -> None:
    """What judging costs: features of many images, and each measure."""
    from scale.bench_evaluate import bench_evaluate

    device = dansm.pick_device(device)
    bench_evaluate(samples or (50_000 if device.type == "cuda" else 1000), seed=seed, device=device,
                   out=dansm.make_folder(out), console=dansm.console)


@bench.command("autoencoder")
def bench_autoencoder_command(
    shape: Annotated[str, typer.Option(help="of one latent, as CxHxW")] = "4x32x32",
    samples: Annotated[int | None, typer.Option(min=1, help="image files; without it 8,192, on a CPU few")] = None,
    seed: Seed = 0,
    device: Device = "auto",
    out: Out = Path("runs/bench"),
) -> None:
    """What encoding and decoding cost, alone and from files to files."""
    from scale.bench_autoencoder import bench_autoencoder

    bench_autoencoder(parse_shape(shape), samples=samples, seed=seed, device=dansm.pick_device(device),
                      out=dansm.make_folder(out), console=dansm.console)


@_command("proof")
def proof_command(
    data: Annotated[str, typer.Option(help="images, as for dansm train")] = "cifar10",
    only: Annotated[str | None, typer.Option(
        help="those of these names, parted by commas; prior tests the noises, rates times each run; a wrong name lists "
             "all")] = None,
    minutes: Annotated[float, typer.Option(min=0, help="end this call after so many; 0: when all is done")] = 0.0,
    work: Annotated[Path | None, typer.Option(help="folder of the runs themselves; else runs in --out")] = None,
    cache: Annotated[Path | None, typer.Option(help="folder that keeps the decoded images")] = None,
    features: Annotated[str, typer.Option(
        help="inception makes the distances standard FIDs; else they are on EfficientNet-Lite0",
        show_default=False)] = "scale.evaluate:efficientnet_lite0",
    inception_weights: Annotated[Path | None, typer.Option(help="its weights, where nothing can be downloaded")] = None,
    device: Device = "auto",
    out: Annotated[Path, typer.Option(help="folder of the tables, which are added to, and the figures")] = (
        Path("runs/proof")),
) -> None:
    from scale.proof import RUNS, prove

    known = [*RUNS, "prior", "rates"]
    names = known if only is None else only.split(",")
    for name in names:
        dansm.check_choice("--only", name, known)
    prove(data, dansm.make_folder(out), work or out / "runs", dansm.pick_device(device), names=names, minutes=minutes,
          cache=cache, more={"evaluate_features": features, "inception_weights": str(inception_weights or "")})


@_command("theory")
def theory_command(
    data: Annotated[str, typer.Option(help="4,000 images or more, as for dansm train")] = "cifar10",
    draws: Annotated[int, typer.Option(min=2, help="times it is measured, for the spread")] = 3,
    out: Out = Path("runs/theory"),
) -> None:
    from scale.theory import theory

    theory(data, draws, out)


@_command("encode")
def encode_command(
    source: Annotated[Path, typer.Argument(
        help="a folder of images (with subfolders), a zip or tar of them, or an LSUN lmdb")],
    autoencoder: Autoencoder,
    size: Annotated[int, typer.Option(min=1, help="shorter side to so many pixels, then the centre square")] = 256,
    flips: Annotated[bool, typer.Option("--flips", help="after each latent, that of the mirrored image")] = False,
    moments: Annotated[bool, typer.Option(
        "--moments", help="mean and log-variance of each, for training to draw from; else the mean alone")] = False,
    batch: Annotated[int, typer.Option(min=0, help="latents at a time; 0: 64 on a GPU, or 8")] = 0,
    shard: Annotated[int, typer.Option(min=1, help="images a file; what a kill can lose")] = 4096,
    workers: Annotated[int, typer.Option(min=0, help="threads that read images, of each process; 0: the cores")] = 0,
    precision: Precision = "auto",
    skip_unreadable: Annotated[bool, typer.Option("--skip-unreadable", help="leave out what cannot be read")] = False,
    device: Device = "auto",
    out: Out = Path("data/latents"),
) -> None:
    from scale.encode import cores, encode

    encode(source, autoencoder, dansm.pick_device(device), out, size=size, flips=flips, moments=moments, batch=batch,
           shard=shard, workers=workers or cores(), precision=precision, skip_unreadable=skip_unreadable)


@_command("decode")
def decode_command(
    source: Annotated[Path, typer.Argument(
        help="latents times the factor: a .npy file, a folder of them, or what dansm encode wrote")],
    autoencoder: Autoencoder,
    count: Annotated[int | None, typer.Option(min=1, help="only the first so many")] = None,
    batch: Annotated[int, typer.Option(min=0, help="latents at a time at most; 0: what --memory holds")] = 0,
    memory: Memory = None,
    precision: Precision = "auto",
    device: Device = "auto",
    out: Out = Path("runs/decode"),
) -> None:
    from scale.encode import decode

    decode(source, autoencoder, dansm.pick_device(device), out, count=count, batch=batch, memory=memory,
           precision=precision)


@_command("compare")
def compare_command(
    models: Models,
    count: Annotated[int, typer.Option(min=2, help="noises")] = 256,
    shown: Annotated[int, typer.Option(min=1, max=16, help="of these in the picture")] = 8,
    steps: OwnSteps = 20,
    label: Labels = None,
    batch: Batch = 64,
    precision: Precision = "auto",
    seed: Seed = 0,
    device: Device = "auto",
    out: Out = Path("runs/compare"),
) -> None:
    from scale.foundations import compare

    compare(models, count=count, pictured=min(shown, count), steps=steps, labels=label, batch=batch,
            precision=precision, seed=seed, device=dansm.pick_device(device), out=out)


@_command("grid")
def grid_command(
    models: Models,
    steps: Annotated[str, typer.Option(help="counts of steps, a row each, parted by commas")] = "3,4,5,10",
    side: Annotated[int, typer.Option(min=1, max=16, help="samples a side of each cell")] = 3,
    autoencoder: ForLatents = None,
    memory: Memory = None,
    label: Labels = None,
    batch: Batch = 64,
    precision: Precision = "auto",
    seed: Seed = 0,
    device: Device = "auto",
    out: Out = Path("runs/grid"),
) -> None:
    from scale.foundations import grid

    grid(models, step_counts=steps, side=side, labels=label, batch=batch, precision=precision, seed=seed,
         device=dansm.pick_device(device), out=out, autoencoder=autoencoder, memory=memory)


@_command("tsne")
def tsne_command(
    model: Annotated[Path | None, typer.Argument(
        help="the folder of a dansm train, one of its checkpoints, or an export; without it matched pairs")] = None,
    data: Annotated[str | None, typer.Option(
        help="images or latents for the random pairs; without it the model's own samples")] = None,
    size: Size = None,
    pairs: Annotated[int, typer.Option(min=2, help="pairs of noise and sample; the paper shows 20 to 23")] = 23,
    draws: Annotated[int, typer.Option(min=1, help="pictures; crossings are counted in all, the median is kept")] = 10,
    perplexity: Annotated[float, typer.Option(help="of t-SNE, less than twice the pairs; the paper's 22 to 30")] = 22,
    match_size: Annotated[int, typer.Option(min=2, help="without a model: noises in the pool")] = 1000,
    steps: OwnSteps = 50,
    label: Annotated[str | None, typer.Option(help="what the figure calls the model")] = None,
    batch: Batch = 64,
    precision: Precision = "auto",
    seed: Seed = 0,
    device: Device = "auto",
    out: Out = Path("runs/tsne"),
) -> None:
    from scale.foundations import tsne

    tsne(model, source=data, size=size, pairs=pairs, draws=draws, perplexity=perplexity, match_size=match_size,
         steps=steps, label=label, batch=batch, precision=precision, seed=seed, device=dansm.pick_device(device),
         out=out)


@_command("paths")
def paths_command(
    models: Annotated[list[Path] | None, typer.Argument(
        help="the folders of dansm train, their checkpoints, or exports: rows of their own pairs")] = None,
    data: Data = None,
    size: Size = None,
    match_size: Annotated[str | None, typer.Option(
        help="pools, a row each, parted by commas; without it 100,1000,10000, as far as there is data")] = None,
    count: Annotated[int, typer.Option(min=2, help="paths that are measured")] = 1000,
    steps: OwnSteps = 50,
    seeds: Annotated[int, typer.Option(min=1, help="times it is measured, for the spread")] = 3,
    label: Labels = None,
    batch: Batch = 64,
    precision: Precision = "auto",
    seed: Seed = 0,
    device: Device = "auto",
    out: Out = Path("runs/paths"),
) -> None:
    from scale.paths import paths

    paths(models or [], source=data, size=size, match_size=match_size, count=count, steps=steps, seeds=seeds,
          labels=label, batch=batch, precision=precision, seed=seed, device=dansm.pick_device(device), out=out)


@_command("loss")
def loss_command(
    model: AModel,
    data: Data = None,
    size: Size = None,
    match_size: Annotated[str | None, typer.Option(
        help="pools, a curve each, parted by commas; without it 10000, or as many as there is data")] = None,
    count: Annotated[int, typer.Option(min=2, help="pairs of each kind")] = 512,
    steps: OwnSteps = 50,
    label: Annotated[str | None, typer.Option(help="what the table calls the model")] = None,
    batch: Batch = 64,
    precision: Precision = "auto",
    seed: Seed = 0,
    device: Device = "auto",
    out: Out = Path("runs/loss"),
) -> None:
    from scale.paths import loss

    loss(model, source=data, size=size, match_size=match_size, count=count, steps=steps, label=label, batch=batch,
         precision=precision, seed=seed, device=dansm.pick_device(device), out=out)
