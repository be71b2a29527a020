"""Latents on the disk as dansm encode leaves them: shards of .npy, and an index of what they are and were made from.

While it encodes, unfinished.json says by which settings, and each shard has a note of its own, latents-00000.json; what
has both is finished, and can be read. At the end the notes are joined in index.json, which is written last.
"""

import io
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dansm import BadInput

from ..base.files import replacing, write_json
from ..base.text import say
from .read import Unreadable, check_alike, check_finite, open_npy

VERSION = 1  # of the index
INDEX, UNFINISHED = "index.json", "unfinished.json"
KNOWN = "autoencoder", "factor", "shift", "moments", "flips", "size", "source"  # that a run keeps of its latents


class Shards:
    """The latents of several files as one array (N, C, h, w) that stays on the disk; indexing and np.take read from it.

    about    what is known of them, see KNOWN
    moments  whether the files hold means and log-variances, (2C, h, w) each. Indexing gives the means; `take` and `on`
             give both, to draw latents from.
    """

    ndim = 4

    def __init__(self, files: list[Path], about: dict):
        self.files, self.about, self.moments = files, about, about["moments"]
        self.parts = [_mapped(path) for path in files]
        first = self.parts[0]
        for path, part in zip(files, self.parts, strict=True):
            check_alike(path, part, files[0], first)
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
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"rows {rows.min()} to {rows.max()} of {len(self)}")
        samples = np.empty((len(rows), *self.stored), self.dtype)
        files = np.searchsorted(self.ends, rows, side="right")
        for file in np.unique(files):
            part, places = self.parts[file], np.flatnonzero(files == file)
            samples[places] = part[rows[places] - (self.ends[file] - len(part))]
        return samples

    def check_finite(self) -> None:
        """BadInput naming the file where a number is not finite. They were when they were written."""
        for path, part in zip(self.files, self.parts, strict=True):
            check_finite(path, part)

    def on(self, device: torch.device) -> Tensor:
        """All of it in the memory of a device, (N, *stored)."""
        latents = torch.empty(len(self), *self.stored, dtype=getattr(torch, str(self.dtype)), device=device)
        for end, part in zip(self.ends, self.parts, strict=True):
            latents[end - len(part) : end] = torch.from_numpy(part).to(device)
        return latents


def _mapped(path: Path) -> np.ndarray:
    """Like `open_npy`, but no file stays open: there may be more shards than a process may have open files."""
    array = open_npy(path)
    begin, kind = array.offset // array.itemsize, getattr(torch, str(array.dtype))
    return torch.from_file(str(path), size=begin + array.size, dtype=kind)[begin:].numpy().reshape(array.shape)


def known_of(images) -> dict | None:
    """What is known of the latents that `loader.load_images` gave, {} where nothing is; None for images, which are
    uint8 whatever their channels."""
    if str(images.dtype).endswith("uint8"):
        return None
    return getattr(images, "about", {})


# ------------------------------------------------------------------------------- reading


def known_on_disk(folder: Path) -> dict:
    """What the encode that wrote into `folder` says of its latents, finished or not; {} without an encode."""
    return read_index(folder) or read_index(folder, UNFINISHED) or {}


def read_index(folder: Path, name: str = INDEX) -> dict | None:
    """What the latents in `folder` are, or are to be by UNFINISHED; None if no encode has come to its end there."""
    try:
        content = json.loads((folder / name).read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):  # another program may have files of that name
        return None
    return content if isinstance(content, dict) and "dansm_latents" in content else None


def open_encoded(folder: Path, known: dict) -> Shards:
    """The latents that dansm encode wrote into `folder`, memory-mapped. known: what `known_on_disk` gave. Where an
    encode is unfinished, these are its whole shards, and a line says so.

    Raises BadInput for shards that are missing, cut off or other than the index says.
    """
    shards = _whole_shards(folder, known) if "images" in known else known["shards"]
    expected = (sum(shard["count"] for shard in shards), *shards[0]["shape"])
    try:
        latents = Shards([folder / shard["file"] for shard in shards], {name: known[name] for name in KNOWN})
        if (len(latents), *latents.stored) != expected:
            raise Unreadable(f"{folder} holds latents {(len(latents), *latents.stored)}: expected {expected}")
    except Unreadable as error:
        raise BadInput(f"{error}; the same dansm encode makes again what is missing") from error
    return latents


def _whole_shards(folder: Path, unfinished: dict) -> list[dict]:
    """The notes of an unfinished encode's shards that hold latents. A line says how many images they are of."""
    notes = [note for path in sorted(folder.glob("latents-*.json")) if (note := read_note(path))]
    filled = [note for note in notes if note["count"]]
    done = sum(note["count"] // (1 + unfinished["flips"]) + len(note["left_out"]) for note in notes)
    so_far = f"{folder}: {done:,} of {unfinished['images']:,} images encoded so far; the same dansm encode resumes"
    if not filled:
        raise BadInput(f"{so_far}, expected some")
    say(so_far)
    return filled


OTHERS = {"source_digest": "of other images, by the names, sizes or times of their files",  # digests mean nothing
          "latents": "of other latents", "autoencoder": "by another autoencoder"}


def check_same(out: Path, before: dict, now: dict) -> None:
    """BadInput if what `out` holds was made otherwise, by its note of `before`, than what is to be made now."""
    differing = [OTHERS.get(name) or f"{name} {before.get(name)} → {value}" for name, value in now.items()
                 if name != "source" and before.get(name) != value]
    if differing:
        raise BadInput(f"{out} holds results that were made otherwise ({', '.join(differing)}): expected the same "
                       "settings, or another --out")


# ------------------------------------------------------------------------------- writing


def shard_path(out: Path, number: int) -> Path:
    return out / f"latents-{number:05d}.npy"


def read_note(path: Path) -> dict | None:
    """The note of a shard that is as noted; None for one without a note, missing or cut off."""
    path = path.with_suffix(".json")
    note = json.loads(path.read_text()) if path.exists() else None
    return note if note and is_as_noted(path.parent, note) else None


def is_as_noted(folder: Path, note: dict) -> bool:
    """Whether a shard exists, as large as was noted. Where no image was readable there is a note alone."""
    if not note["count"]:
        return True
    try:
        return open_npy(folder / note["file"]).shape == (note["count"], *note["shape"])
    except BadInput:
        return False


def write_shard(out: Path, number: int, latents: np.ndarray, channels: int, left_out: list[Path]) -> None:
    """Latents (n, C or 2C, h, w) float16, whole or not at all, then what the index is to know of them."""
    path, means = shard_path(out, number), latents[:, :channels].astype(np.float64)
    if len(latents):
        content = io.BytesIO()  # np.save into a file hides why a disk takes no more
        np.save(content, latents)
        with replacing(path) as partial:
            partial.write_bytes(content.getbuffer())
    write_json(path.with_suffix(".json"), {
        "file": path.name, "count": len(latents), "shape": latents.shape[1:], "sum": means.sum((0, 2, 3)).tolist(),
        "sum_of_squares": np.square(means).sum((0, 2, 3)).tolist(), "left_out": [str(image) for image in left_out]})


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


def reopen(out: Path, index: dict, settings: dict) -> None:
    """Make a finished encode an unfinished one of the shards that are whole; the others will be made again."""
    for note in index["shards"]:
        if is_as_noted(out, note):
            write_json((out / note["file"]).with_suffix(".json"), note)
    images = index["count"] // (1 + index["flips"]) + len(index["left_out"])
    write_json(out / UNFINISHED, {**settings, "images": images})
    (out / INDEX).unlink()


def remove_notes(out: Path) -> None:
    """Remove what only an unfinished encode needs."""
    for note in out.glob("latents-*.json"):
        note.unlink()
    (out / UNFINISHED).unlink(missing_ok=True)
