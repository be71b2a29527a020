"""What judging costs, without sampling: the features of many images and each measure on them, in one run."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import torch
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ..base.files import write_csv, write_json
from ..base.machine import hardware
from ..base.text import say_files
from ..evaluate import evaluate
from .match import hardware_of

SHAPE = 3, 32, 32
COMPARED = 10_000  # generated images that are scored against all


def bench_evaluate(count: int, *, seed: int, device: torch.device, out: Path, console: Console) -> None:
    """Time features of `count` images of 3×32×32 and the measures; prints a table, writes evaluate.json and .csv.

    The Inception network has the weights it is born with: what it says means nothing, how long it takes does.
    """
    images = torch.randint(256, (count, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    bench = {"images": count, "compared": min(count, COMPARED), "hardware": hardware(device), "rows": []}
    for features in track([evaluate.LITE0, evaluate.INCEPTION], "measuring", console=console):
        with tempfile.TemporaryDirectory() as folder:
            weights = untrained_inception(Path(folder)) if features == evaluate.INCEPTION else None
            extractor = evaluate.load_extractor(features, device, weights)
        bench["rows"].append({"features": features, **seconds_of(images, extractor, seed, device)})
        write_json(out / "evaluate.json", bench)
    write_csv(out / "evaluate.csv", bench["rows"])
    console.print(_table(bench))
    say_files(out, "evaluate.csv", "evaluate.json")


def seconds_of(images, extractor: evaluate.Extractor, seed: int, device) -> dict:
    """features_s        of all images, from uint8 in memory to their mean and covariance
    frechet_s            the distance of as many images as are compared to all, from their features
    kernel_s, reach_s    the kernel distance; precision and recall
    within_s             features of all and the Fréchet distance
    """
    batch = evaluate.seen_at_once(device)
    evaluate.features_of(images[:batch], extractor, device)  # what is loaded and chosen at the first call
    seconds, real = _timed(lambda: evaluate.real_features(images, extractor, device, batch=batch))
    features = evaluate.shuffled(real.features, seed)[:COMPARED]
    taken = {"features_s": seconds,
             "frechet_s": _timed(lambda: evaluate.frechet_distance(features, real))[0],
             "kernel_s": _timed(lambda: evaluate.kernel_distance(features, real.features, "kernel"))[0],
             "reach_s": _timed(lambda: evaluate.precision_recall(features, features, device))[0]}
    return {"dimensions": features.shape[1], "batch": batch, "images_per_second": round(len(images) / seconds, 1),
            **{name: round(value, 2) for name, value in taken.items()},
            "within_s": round(taken["features_s"] + taken["frechet_s"], 2)}


def _timed(call):
    begin = time.perf_counter()
    found = call()  # each ends on the CPU, so nothing is left under way
    return time.perf_counter() - begin, found


def untrained_inception(folder: Path) -> Path:
    """A file of weights for torch-fidelity's Inception network, as they are before any training."""
    import torch_fidelity.feature_extractor_inceptionv3 as theirs

    with patch.object(theirs, "load_state_dict_from_url", lambda *_, **__: {}), \
            patch.object(theirs.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None):
        state = theirs.FeatureExtractorInceptionV3("", ["2048"], verbose=False).state_dict()
    torch.save(state, folder / "weights.pth")
    return folder / "weights.pth"


def _table(bench) -> Table:
    shape = "×".join(map(str, SHAPE))
    table = Table(title=f"Judging {bench['images']:,} images of {shape}, seconds ({hardware_of(bench)})",
                  title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("features", overflow="fold")
    for heading in ("images/s", "features", "Fréchet", "kernel", "precision", "features + Fréchet"):
        table.add_column(heading, justify="right")
    for row in bench["rows"]:
        table.add_row(row["features"], f"{row['images_per_second']:,.0f}",
                      *(f"{row[name]:.1f}" for name in ("features_s", "frechet_s", "kernel_s", "reach_s", "within_s")))
    return table
