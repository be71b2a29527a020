"""dansm evaluate: how close samples are to real images."""

import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import groupby, takewhile
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
import typer

from dansm import BadInput, Diffusion

from ..base.files import make_folder, read_json, write_csv, write_json
from ..base.machine import hardware, number_type, pick_device
from ..base.text import Stopped, console, counted, say, say_files, table, with_bar
from ..base.threads import use_own_stream
from ..data.labels import Labels, load_labels
from ..data.latents import known_on_disk
from ..data.loader import stream_images
from ..data.read import Source
from ..evaluate.by_class import Classes
from ..evaluate.extractors import INCEPTION, LITE0, Extractor, digest_of_weights, features_of_all, load_extractor
from ..evaluate.measures import Reference, floor, score
from ..evaluate.real_features import VERSION, Real, digest_of, real_features
from ..model.load import Model, classes_of, load_models
from ..model.recipe import parse_counts
from ..model.sampling import at_once, sample_images
from . import options

app = options.command_app()


@app.command()
def evaluate(
    models: options.Models,
    data: Annotated[str | None, typer.Option(
        help="the real images: a folder, an archive, cifar10",
        show_default="those of the models' training, or of their latents")] = None,
    steps: Annotated[str, typer.Option(help="comma-separated counts of steps from noise to image")] = "3,4,5,10",
    count: Annotated[int, typer.Option(min=2, help="images drawn for each row of the table")] = 10_000,
    size: Annotated[int | None, typer.Option(min=1, help="make the real images squares of this many pixels")] = None,
    skip_unreadable: options.SkipUnreadable = False,
    background: Annotated[str | None, typer.Option(
        help="colour under transparent pixels of the real images", show_default="as in training, or white")] = None,
    labels: Annotated[str | None, typer.Option(
        help="of the real images, as for dansm train", show_default="as in the models' training, or auto")] = None,
    guidance: options.Guidances = "1",
    guidance_interval: options.GuidanceInterval = "0,1",
    features: Annotated[str, typer.Option(help=f"{INCEPTION}, {LITE0}, or any network as module:callable")] = INCEPTION,
    inception_weights: options.InceptionWeights = None,
    autoencoder: options.DecodeWith = None,
    memory: options.DecodeMemory = None,
    solver: options.Solver = "euler",
    batch: options.SampleBatch = 0,
    precision: options.Precision = "auto",
    seed: options.Seed = 0,
    device: options.Device = "auto",
    cache: Annotated[Path, typer.Option(help="folder that keeps the features of real images")] = Path("~/.cache/dansm"),
    out: options.Out = Path("runs/evaluate"),
) -> None:
    """FID, KID, Inception Score, precision and recall of checkpoints, from the same noise, in one table.

    Networks with classes draw them as often as the real images have them, and each class is measured too.
    Rows that --out has already, of the same weights, images and settings, are not measured again.
    Without a download: --features efficientnet-lite0
    """
    step_counts = parse_counts("--steps", steps, at_most=10_000)
    on = pick_device(device)
    trained = load_models(models, step_counts, solver=solver, guidance=guidance, interval=guidance_interval)
    trained = [model.with_decoder(autoencoder, on, precision, memory) for model in trained]
    make_folder(out)
    known = read_rows(out / "evaluate.json")
    extractor = load_extractor(features, on, inception_weights)
    source, images = find_real(trained, data, skip_unreadable, size=size, background=background)
    names, labelled = find_classes(trained, data, labels, source, images)
    real = real_features(images, extractor, on, cache=cache.expanduser(), check=partial(check_images, trained, source))
    if data is None:
        check_images(trained, source, real.shape, real.count)
    if labelled:
        labelled = labelled._replace(numbers=np.delete(labelled.numbers, real.left_out))
    elif names:
        say(f"without labels of {source} each class is drawn equally often, classes are not measured")
    classes = Classes(names, labelled, real, on) if names else None
    common = {"features": extractor.name, "data": source, "real_images": real.count, "real_digest": real.digest[:8],
              "seed": seed}
    made_from = digest_of("floor", [VERSION, real.digest, count, seed, *([classes.digest] if classes else [])])
    jobs = [(None, {"model": "real images", "made_from": made_from, **common, "count": count})]
    for model in trained:
        jobs += jobs_of(model, step_counts, common, real, classes, count, solver, number_type(precision, on))
    rows = measure_new(jobs, known, out, Reference(real, extractor, seed=seed, device=on), classes, precision, batch)
    report(rows, [model.label if model else "real images" for model, _ in jobs], extractor, count, len(real.mean))
    say_files(out, "evaluate.json", "evaluate.csv")
    if len(rows) < len(jobs):
        raise Stopped(f"stopped; {counted(len(rows), 'row')} of {len(jobs)} kept, the same command resumes")


def read_rows(path: Path) -> dict[str, dict]:
    """The rows of earlier calls, by what they were made from. BadInput for a file of another program."""
    if not path.exists():
        return {}
    content = read_json(path)
    try:
        return {row["made_from"]: row for row in content["rows"]}
    except (LookupError, TypeError) as error:
        raise BadInput(f"{path} was not written by dansm evaluate ({error}): expected another --out") from error


def find_real(models: list[Model], data: str | None, skip_unreadable: bool, size: int | None,
              background: str | None) -> tuple[str, Source]:
    """The name of the real images, and these: of --data, or what the models were trained on, read as it was then."""
    read_as = {}
    if data is None:
        recipe = read_as = models[0].about["recipe"]
        sources = {os.path.realpath(name): name for name in (str(model.about["data"]) for model in models)}
        if len(sources) > 1 or "" in sources.values():
            raise BadInput(f"the models were trained on {', '.join(sorted(map(repr, sources.values())))}: expected "
                           "--data, the images to compare all of them with")
        (data,) = sources.values()
        size = size or recipe.get("size") or None
        if not models[0].draws_images:
            read_as = known_on_disk(Path(data))
            latents = models[0].about["latents"] or read_as
            if "source" not in latents:
                raise BadInput(f"{data} does not say what images its latents are of: expected --data, those images")
            data, size = latents["source"], size or latents["size"]
            skip_unreadable = skip_unreadable or recipe.get("skip_unreadable", False)
    channels = models[0].shape[0] if models[0].draws_images else 3
    return data, stream_images(data, size=size, channels=channels,
                               background=background or read_as.get("background", "white"),
                               skip_unreadable=skip_unreadable or read_as.get("skip_unreadable", False))


def check_images(models: list[Model], source: str, shape: tuple[int, int, int], count: int | None = None) -> None:
    """BadInput for real images (C, H, W) of another size than a model's, or not as many as it was trained on."""
    for model in models:
        height, width = model.pixels
        if tuple(shape[1:]) != (height, width):
            hint = f"; --size {width} makes the real ones so" if height == width else ""
            raise BadInput(f"{model.path} makes images of {width}×{height} pixels, those of {source} are "
                           f"{shape[2]}×{shape[1]}: expected equal sizes{hint}")
        if count and model.draws_images and model.about["images"] not in (None, count):
            raise BadInput(f"{model.path} was trained on {counted(model.about['images'], 'image')}, {source} holds "
                           f"{count:,} now: expected --data, the images to compare with")


def find_classes(models: list[Model], data: str | None, labels: str | None, source: str,
                 images: Source) -> tuple[list[str], Labels | None]:
    """The names of the models' classes, none for models without, and the labels of all real images, also of those that
    cannot be read. BadInput for models of different classes, and for labels of classes that they do not know."""
    of_classes = [model for model in models if model.classes]
    if labels and not of_classes:
        raise BadInput(f"--labels is {labels}, and {models[0].path} was trained without labels: expected no --labels")
    if not of_classes:
        return [], None
    first, names = of_classes[0], classes_of(models)
    if data is None and first.draws_images:
        labels = labels or first.about["recipe"].get("labels")
    images.labels = labels or "auto"
    with images.open() as (count, _):  # those that cannot be read are counted
        labelled = load_labels(source, images.labels, count)
    Classes(names, labelled)  # refuses unknown classes before anything is measured
    return names, labelled


def jobs_of(model: Model, step_counts: list[int], common: dict, real: Real, classes: Classes | None, count: int,
            solver: str, numbers: torch.dtype) -> list[tuple[Model, dict]]:
    """The rows of a model that are to be measured; "made_from" is a digest of all that their measures depend on."""
    made_from = [VERSION, real.digest, count, common["seed"], digest_of_weights(model.net.state_dict()),
                 [model.about[name] for name in ("network", "flow", "times")], solver, str(numbers)]
    if model.decoder:
        made_from.append(model.decoder.autoencoder.identity)
    if isinstance(model.flow, Diffusion):
        made_from += [model.flow.bound, model.flow.target]
    if model.classes:
        made_from += [classes.digest, model.guidance]
    return [(model, {"model": str(model.path), "steps": steps, "count": count, "file": str(model.about["file"]),
                     "trained_steps": model.about["step"], "solver": solver, **model.guided_by(), **common,
                     "numbers": str(numbers).removeprefix("torch."), "made_from": digest_of(made_from, steps)})
            for steps in step_counts]


class Drawn(NamedTuple):
    """The images of a row, as they are scored."""

    features: torch.Tensor  # (N, D)
    logits: torch.Tensor | None  # (N, classes of the extractor)
    labels: torch.Tensor | None  # (N,) that they were drawn for
    seconds: float  # that drawing took


def measure_new(jobs: list[tuple[Model | None, dict]], known: dict[str, dict], out: Path, reference: Reference,
                classes: Classes | None, precision: str, batch: int) -> list[dict]:
    """Measure the rows of jobs that are not among the `known`, add them to these and to the files in `out`. Returns the
    rows of all jobs, after Ctrl-C those before the first that is missing."""

    def keep(row: dict) -> None:
        known[row["made_from"]] = row
        write_json(out / "evaluate.json", {"rows": list(known.values()), "hardware": hardware(reference.device)})
        write_csv(out / "evaluate.csv", list(known.values()))

    new = {row["made_from"]: (model, row) for model, row in jobs if row["made_from"] not in known}
    drawn = draw_rows(new.values(), reference.extractor, classes, reference.device, precision, batch)
    try:
        score_rows(drawn, reference, classes, keep, ahead=1 if reference.device.type == "cuda" else 0)
    except KeyboardInterrupt:
        if jobs[0][1]["made_from"] not in known:
            raise
    done = takewhile(lambda job: job[1]["made_from"] in known, jobs)
    return [known[row["made_from"]] | {name: row[name] for name in ("model", "data", "file") if name in row}
            for _, row in done]


def score_rows(drawn: Iterable[tuple[dict, Drawn | None]], reference: Reference, classes: Classes | None,
               keep: Callable[[dict], None], ahead: int) -> None:
    """Call `keep` with each row and its measures, in turn. A thread scores while the next `ahead` rows are drawn: 1 for
    a GPU, 0 for a CPU, where they would wait for each other. Rows that are drawn are kept also after Ctrl-C and after
    an error in drawing or keeping."""
    waiting = deque()
    with ThreadPoolExecutor(1, initializer=use_own_stream, initargs=(reference.device,)) as scorer:
        try:
            for row, images in drawn:
                waiting.append(scorer.submit(measure, row, images, reference, classes))
                if len(waiting) > ahead:
                    keep(waiting[0].result())
                    waiting.popleft()
        finally:
            while waiting:
                keep(waiting.popleft().result())


def measure(row: dict, drawn: Drawn | None, reference: Reference, classes: Classes | None) -> dict:
    """The row with its measures, in how many seconds and on which GPU: calls on several machines add up. None for
    `drawn` measures real images."""
    begin = time.monotonic()
    distance = reference.extractor.distances[0]
    if drawn is None:
        measures = floor(reference, row["count"])
        if classes:
            measures |= classes.floor(measures["count"], row["seed"], distance)
    else:
        measures = score(drawn.features, reference, logits=drawn.logits)
        if drawn.labels is not None:
            measures |= classes.score(drawn.features, drawn.labels, distance)
    seconds = time.monotonic() - begin + (drawn.seconds if drawn else 0)
    return {**row, **measures, "seconds": round(seconds, 2), "gpu": hardware(reference.device)["gpu"] or "CPU"}


def draw_rows(jobs: Iterable[tuple[Model | None, dict]], extractor: Extractor, classes: Classes | None,
              device: torch.device, precision: str, batch: int) -> Iterator[tuple[dict, Drawn | None]]:
    """Yield each row with its images; with None for the row of real images. One of the networks is on the device at a
    time, for all its rows."""
    for net, group in groupby(jobs, lambda job: job[0] and job[0].net):
        of_net = list(group)
        if net is None:
            yield from ((row, None) for _, row in of_net)
            continue
        predict = of_net[0][0].on(device, precision).net
        # asked for all rows before the first is drawn: the graphs' memory counts as free later
        together = batch or min(at_once(net, device, model.guidance) for model, _ in of_net)
        for model, row in of_net:
            yield row, draw_row(predict, model, row, extractor, classes, device, together)
        del predict  # and its graphs, before the weights that they read
        net.cpu()


def draw_row(predict: Callable[..., torch.Tensor], model: Model, row: dict, extractor: Extractor,
             classes: Classes | None, device: torch.device, batch: int) -> Drawn:
    """Draw the images of a model's row by its network as `Model.on` prepares it, `batch` at a time."""
    begin = time.monotonic()
    labels = classes.drawn(range(row["count"]), row["seed"]) if model.classes else None
    images = sample_images(predict, model.flow, range(row["count"]), model.shape, row["steps"], seed=row["seed"],
                           batch=batch, device=device, decode=model.decode, labels=labels, guidance=model.guidance,
                           to_cpu=False)
    bar = with_bar(images, f"{model.label}, {counted(row['steps'], 'step')}", math.ceil(row["count"] / batch))
    features, logits = features_of_all(bar, extractor, device)
    return Drawn(features, logits, labels, time.monotonic() - begin)


def report(rows: list[dict], labels: list[str], extractor: Extractor, count: int, dimensions: int) -> None:
    """Print the table, and what a reader must know to interpret it."""
    frechet, kernel = extractor.distances
    inception = extractor.name == INCEPTION
    by_class = {f"{frechet}_class_mean": (".2f", "by class"), "label_accuracy": (".1%", "labels")}
    by_class = {name: column for name, column in by_class.items() if any(name in row for row in rows)}
    lines = []
    for label, row in zip(labels, rows, strict=False):  # Ctrl-C leaves out the last rows
        numbers = [f"{number:.2f}" if number < 1e6 else f"{number:.2e}" for number in (row[frechet], 1e3 * row[kernel])]
        if inception:
            numbers.append(f"{row['inception_score']:.2f}" if "inception_score" in row else "")
        lines.append([label, str(row.get("steps", "")), f"{row['count']:,}", *numbers, f"{row['precision']:.3f}",
                      f"{row['recall']:.3f}",
                      *(format(row[name], style) if name in row else "" for name, (style, _) in by_class.items())])
    measures = ["FID", "KID × 1,000", "IS"] if inception else ["Fréchet", "kernel × 1,000"]
    available, taken = rows[0]["real_images"], rows[0]["count"]
    console.print(table(f"Distances by {extractor.name} to {available:,} images of {rows[0]['data']}",
                        ["model", "steps", "images", *measures, "precision", "recall",
                         *(title for _, title in by_class.values())], lines))
    say(f"real images: {taken:,} of the {available:,} at random, against all")
    if min(count, available) < dimensions:
        say(f"{min(count, available):,} images are fewer than the {dimensions:,} features: distances are much too "
            "large; compare only those of equally many images")
