"""Latents on the disk as dansm encode leaves them: shards of .npy, and an index of what they are and were made from.

While it encodes, unfinished.json says by which settings, and each shard has its own .json; what has both is finished.
At the end these are joined in index.json, which is written last.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dansm import BadInput
from scale.checkpoint import written
from scale.read import open_latents

VERSION = 1  # of what an encode writes
INDEX, UNFINISHED = "index.json", "unfinished.json"
KNOWN = "autoencoder", "factor", "shift", "moments", "flips", "size", "source"  # that a run keeps of its latents


class Shards:
    """The latents of several files as one array (N, C, h, w) that stays on the disk: indexed, and taken from by
    np.take, as an array is.

    about    what is known of them, see KNOWN
    moments  whether the files hold means and log-variances, (2C, h, w) each. What is indexed are the means; `take` and
             `on` give both, for whoever draws from them.
    """

    ndim = 4

    def __init__(self, files: list[Path], about: dict):
        self.parts, self.about, self.moments = [open_latents(path) for path in files], about, about["moments"]
        first = self.parts[0]
        for path, part in zip(files, self.parts, strict=True):
            if part.shape[1:] != first.shape[1:] or part.dtype != first.dtype:
                raise BadInput(f"{path} holds {part.dtype} {part.shape[1:]}, {files[0]} {first.dtype} "
                               f"{first.shape[1:]}: expected latents of equal shape and type")
        self.ends = np.cumsum([len(part) for part in self.parts])
        self.dtype, self.stored = first.dtype, first.shape[1:]
        self.shape = (int(self.ends[-1]), self.stored[0] // (1 + self.moments), *self.stored[1:])
        self.nbytes = sum(part.nbytes for part in self.parts)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows) -> np.ndarray:
        """rows: a number, a slice or an array of numbers, as of an array."""
        numbers = np.arange(len(self))[rows]
        return self.take(np.atleast_1d(numbers))[:, : self.shape[1]].reshape(*np.shape(numbers), *self.shape[1:])

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return self[:].astype(dtype or self.dtype, copy=False)

    def take(self, rows: np.ndarray, axis: int = 0, out: np.ndarray | None = None, mode: str = "raise") -> np.ndarray:
        """The samples of these numbers, (rows, *stored). Each file is read from once, in its order."""
        rows = np.asarray(rows, dtype=int)
        order = np.argsort(rows, kind="stable")
        in_order = rows[order]
        if len(rows) and not 0 <= in_order[0] <= in_order[-1] < len(self):
            raise IndexError(f"rows {in_order[0]} to {in_order[-1]} of {len(self)}")
        found = np.empty((len(rows), *self.stored), self.dtype)
        bounds = np.searchsorted(in_order, [0, *self.ends])
        for file in np.flatnonzero(np.diff(bounds)):
            part, these = self.parts[file], slice(bounds[file], bounds[file + 1])
            numbers = in_order[these] - (self.ends[file] - len(part))
            np.take(part, numbers, axis=0, out=found[these], mode="clip")  # as raise would copy
        if out is None and np.array_equal(order, np.arange(len(rows))):
            return found
        out = np.empty_like(found) if out is None else out
        out[order] = found
        return out

    def on(self, device: torch.device) -> Tensor:
        """All of it in the memory of a device, (N, *stored)."""
        there = torch.empty(len(self), *self.stored, dtype=getattr(torch, str(self.dtype)), device=device)
        for end, part in zip(self.ends, self.parts, strict=True):
            there[end - len(part) : end] = torch.from_numpy(part).to(device)
        return there


def known_of(images) -> dict | None:
    """What is known of the latents that `data.load_images` gave, {} where nothing is; None of images, which are what is
    uint8 whatever its channels."""
    if str(images.dtype).endswith("uint8"):
        return None
    return getattr(images, "about", {})


def draw(moments: Tensor, noise: Tensor) -> Tensor:
    """Latents of an encoder's posterior. moments (B, 2C, h, w): mean and log-variance; noise (B, C, h, w) normal."""
    mean, log_variance = moments.chunk(2, 1)
    return mean + (log_variance / 2).exp() * noise


# ------------------------------------------------------------------------------- reading


def read_index(folder: Path) -> dict | None:
    """What the latents in `folder` are: None where there is no index of ours, as while it is being encoded."""
    return _read(folder / INDEX)


def known_on_disk(folder: Path) -> dict:
    """What the encode that wrote into `folder` says of its latents, finished or not; {} of what is none."""
    return read_index(folder) or read_unfinished(folder) or {}


def read_unfinished(folder: Path) -> dict | None:
    """By which settings the latents in `folder` are being encoded, None if none are."""
    return _read(folder / UNFINISHED)


def _read(path: Path) -> dict | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}; expected it as dansm encode wrote it") from error
    except ValueError:  # another's, of that name: ours are written whole or not at all
        return None
    if not isinstance(content, dict) or "dansm_latents" not in content:
        return None
    if content["dansm_latents"] != VERSION:
        raise BadInput(f"{path} is of version {content['dansm_latents']}: expected {VERSION}; encode them again")
    return content


def open_encoded(folder: Path, index: dict) -> Shards:
    """The latents of a finished encode, memory-mapped. Raises BadInput for shards that are missing, cut off or others
    than the index says."""
    try:
        files = [folder / shard["file"] for shard in index["shards"]]
        shards, expected = Shards(files, {name: index[name] for name in KNOWN}), (index["count"], *index["shape"])
    except (LookupError, TypeError) as error:
        raise BadInput(f"{folder / INDEX} lacks {error}: expected it as dansm encode wrote it") from error
    if (len(shards), *shards.stored) != expected:
        raise BadInput(f"{folder} holds latents {(len(shards), *shards.stored)}: expected {expected}, as its {INDEX} "
                       "says")
    return shards


# ------------------------------------------------------------------------------- writing


def shard_path(out: Path, number: int) -> Path:
    return out / f"latents-{number:05d}.npy"


def is_finished(out: Path, number: int) -> bool:
    path = shard_path(out, number)
    return path.is_file() and path.with_suffix(".json").is_file()


def write_shard(out: Path, number: int, latents: np.ndarray, channels: int, left_out: list[Path]) -> None:
    """Latents (n, C or 2C, h, w) float16, whole or not at all, then what the index is to know of them."""
    path = shard_path(out, number)
    with written(path) as partial, open(partial, "wb") as file:
        np.save(file, latents)
        file.flush()
        os.fsync(file.fileno())
    means = latents[:, :channels].astype(np.float64)
    write_json(path.with_suffix(".json"), {
        "count": len(latents), "shape": latents.shape[1:], "sum": means.sum((0, 2, 3)).tolist(),
        "sum_of_squares": np.square(means).sum((0, 2, 3)).tolist(), "left_out": [str(each) for each in left_out]})


def write_index(out: Path, settings: dict, shards: int) -> dict:
    """Join what the shards' own files say, remove these, and return it: `settings` and

    count, shape     of the latents: shape is that of one, of its mean and log-variance together where both are kept
    mean, variance   of each channel, of the means where log-variances are kept too
    shards           the files and how many latents each has
    left_out         the images that could not be read
    """
    about = [json.loads(shard_path(out, number).with_suffix(".json").read_text()) for number in range(shards)]
    filled = [number for number in range(shards) if about[number]["count"]]
    count = sum(each["count"] for each in about)
    if not count:
        raise BadInput(f"{settings['source']} holds no readable image: expected at least one")
    shape = about[filled[0]]["shape"]
    numbers = count * int(np.prod(shape[1:]))
    mean = np.sum([each["sum"] for each in about], axis=0) / numbers
    variance = np.sum([each["sum_of_squares"] for each in about], axis=0) / numbers - mean**2
    index = {**settings, "count": count, "shape": shape, "dtype": "float16", "mean": mean.tolist(),
             "variance": variance.tolist(), "left_out": [name for each in about for name in each["left_out"]],
             "shards": [{"file": shard_path(out, n).name, "count": about[n]["count"]} for n in filled]}
    write_json(out / INDEX, index)
    remove_notes(out)
    return index


def remove_notes(out: Path) -> None:
    """What only an unfinished encode needs, and the shards of which no image was readable."""
    for note in out.glob("latents-*.json"):
        if not json.loads(note.read_text())["count"]:
            note.with_suffix(".npy").unlink(missing_ok=True)
        note.unlink()
    (out / UNFINISHED).unlink(missing_ok=True)


def write_json(path: Path, content: dict) -> None:
    """As dansm.write_json, and brought to the disk."""
    with written(path) as partial, open(partial, "w") as file:
        json.dump(content, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
