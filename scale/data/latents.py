"""Latents on the disk as dansm encode leaves them: shards of .npy, and an index of what they are and were made from.

While it encodes, unfinished.json says by which settings, and each shard has a note of its own, latents-00000.json; what
has both is finished, and can be read. At the end the notes are joined in index.json, which is written last.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dansm import BadInput

from ..base.files import replacing, write_json
from ..base.text import say
from .read import Unreadable, check_finite, open_latents

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
        self.files, self.about, self.moments = files, about, about["moments"]
        self.parts = [_mapped(path) for path in files]
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

    def check_finite(self) -> None:
        """BadInput naming the file where a number is not finite. They were when they were written."""
        for path, part in zip(self.files, self.parts, strict=True):
            try:
                check_finite(path, part)
            except BadInput as error:
                raise BadInput(f"{error}; without this file the same dansm encode makes it anew") from error

    def on(self, device: torch.device) -> Tensor:
        """All of it in the memory of a device, (N, *stored)."""
        there = torch.empty(len(self), *self.stored, dtype=getattr(torch, str(self.dtype)), device=device)
        for end, part in zip(self.ends, self.parts, strict=True):
            there[end - len(part) : end] = torch.from_numpy(part).to(device)
        return there


def _mapped(path: Path) -> np.ndarray:
    """As `open_latents`, but without a file that stays open: there may be more shards than a process may have open."""
    array = open_latents(path)
    if not array.flags.c_contiguous:  # none of ours
        return array
    begin, kind = array.offset // array.itemsize, getattr(torch, str(array.dtype))
    try:
        return torch.from_file(str(path), size=begin + array.size, dtype=kind)[begin:].numpy().reshape(array.shape)
    except RuntimeError as error:  # the system takes some 65,000 mappings
        raise BadInput(f"{path} cannot be mapped ({str(error).partition(chr(10))[0]}): expected fewer shards, as a "
                       "larger --shard of dansm encode makes") from error


def known_of(images) -> dict | None:
    """What is known of the latents that `data.load_images` gave, {} where nothing is; None of images, which are what is
    uint8 whatever its channels."""
    if str(images.dtype).endswith("uint8"):
        return None
    return getattr(images, "about", {})


def draw_latents(moments: Tensor, noise: Tensor) -> Tensor:
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


def open_encoded(folder: Path, known: dict) -> Shards:
    """The latents that dansm encode wrote into `folder`, memory-mapped. known: what `known_on_disk` says of them. Of an
    unfinished encode those of its whole shards, which is said.

    Raises BadInput for shards that are missing, cut off or others than the index says.
    """
    try:
        shards = _whole_shards(folder, known) if "images" in known else known["shards"]
        files, expected = [folder / shard["file"] for shard in shards], sum(shard["count"] for shard in shards)
        found, expected = Shards(files, {name: known[name] for name in KNOWN}), (expected, *shards[0]["shape"])
    except (LookupError, TypeError) as error:
        raise BadInput(f"{folder} lacks {error} in what dansm encode says of it: expected it as it was written"
                       ) from error
    except Unreadable as error:
        raise BadInput(f"{error}; the same dansm encode makes anew what is missing") from error
    if (len(found), *found.stored) != expected:
        raise BadInput(f"{folder} holds latents {(len(found), *found.stored)}: expected {expected}, as its {INDEX} "
                       "says; the same dansm encode makes anew what is missing")
    return found


def _whole_shards(folder: Path, unfinished: dict) -> list[dict]:
    """The notes of the shards of an unfinished encode, and a word on how many there are."""
    notes = [note for each in sorted(folder.glob("latents-*.json")) if (note := _whole(each.with_suffix(".npy")))]
    done = sum(note["count"] // (1 + unfinished["flips"]) + len(note["left_out"]) for note in notes)
    so_far = f"{done:,} of {unfinished['images']:,} images encoded so far"
    if not (filled := [note for note in notes if note["count"]]):
        raise BadInput(f"{folder}: {so_far}; expected some, the same dansm encode goes on")
    say(f"{folder}: {so_far}; the same dansm encode goes on")
    return filled


# ------------------------------------------------------------------------------- writing


def shard_path(out: Path, number: int) -> Path:
    return out / f"latents-{number:05d}.npy"


def is_finished(out: Path, number: int) -> bool:
    return _whole(shard_path(out, number)) is not None


def _whole(path: Path) -> dict | None:
    """The note of a shard that is as its note says; None where it has none, is missing or cut off."""
    try:
        note = json.loads(path.with_suffix(".json").read_text())
        return note if is_as_noted(path.parent, note) else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


def is_as_noted(folder: Path, note: dict) -> bool:
    """Whether a shard is there and as large as was noted. Where no image was readable there is a note alone."""
    if not note["count"]:
        return True
    try:
        return open_latents(folder / note["file"]).shape == (note["count"], *note["shape"])
    except BadInput:
        return False


def write_shard(out: Path, number: int, latents: np.ndarray, channels: int, left_out: list[Path]) -> None:
    """Latents (n, C or 2C, h, w) float16, whole or not at all, then what the index is to know of them."""
    path, means = shard_path(out, number), latents[:, :channels].astype(np.float64)
    if len(latents):
        _write_npy(path, latents)
    write_json(path.with_suffix(".json"), {
        "file": path.name, "count": len(latents), "shape": latents.shape[1:], "sum": means.sum((0, 2, 3)).tolist(),
        "sum_of_squares": np.square(means).sum((0, 2, 3)).tolist(), "left_out": [str(each) for each in left_out]})


def _write_npy(path: Path, array: np.ndarray) -> None:
    """As np.save, which does not tell a full disk from others."""
    form = np.lib.format
    with replacing(path) as partial, open(partial, "wb") as file:
        form.write_array_header_1_0(file, form.header_data_from_array_1_0(array))
        file.write(np.ascontiguousarray(array).data)
        file.flush()
        os.fsync(file.fileno())


def write_index(out: Path, settings: dict, shards: int) -> dict:
    """Join the notes of the shards, remove them, and return it: `settings` and

    count, shape     of the latents: shape is that of one, of its mean and log-variance together where both are kept
    mean, variance   of each channel, of the means where log-variances are kept too
    shards           the notes: the file, how many latents it has, their sums
    left_out         the images that could not be read
    """
    notes = [json.loads(shard_path(out, number).with_suffix(".json").read_text()) for number in range(shards)]
    filled = [note for note in notes if note["count"]]
    count = sum(note["count"] for note in notes)
    if not count:
        raise BadInput(f"{settings['source']} holds no readable image: expected at least one")
    shape = filled[0]["shape"]
    numbers = count * int(np.prod(shape[1:]))
    mean = np.sum([note["sum"] for note in notes], axis=0) / numbers
    variance = np.sum([note["sum_of_squares"] for note in notes], axis=0) / numbers - mean**2
    index = {**settings, "count": count, "shape": shape, "dtype": "float16", "mean": mean.tolist(),
             "variance": variance.tolist(), "left_out": [name for note in notes for name in note["left_out"]],
             "shards": filled}
    write_json(out / INDEX, index)
    remove_notes(out)
    return index


def begin(out: Path, settings: dict, images: int) -> None:
    """Say by which settings and of how many images latents are to be encoded into `out`."""
    write_json(out / UNFINISHED, {**settings, "images": images})


def reopen(out: Path, index: dict, settings: dict) -> None:
    """Make a finished encode an unfinished one of the shards that are whole, for the others to be made anew."""
    for note in index["shards"]:
        if is_as_noted(out, note):
            write_json((out / note["file"]).with_suffix(".json"), note)
    begin(out, settings, index["count"] // (1 + index["flips"]) + len(index["left_out"]))
    (out / INDEX).unlink()


def remove_notes(out: Path) -> None:
    """What only an unfinished encode needs."""
    for note in out.glob("latents-*.json"):
        note.unlink()
    (out / UNFINISHED).unlink(missing_ok=True)
