"""Latents on the disk as dansm encode leaves them: index.json, which says what they were made from, and shards.

Each shard is a .npy file, with a note in a .json file of the same name, which is written last.
"""

import io
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dansm import BadInput

from ..base.files import read_json, replacing, write_json
from ..base.text import say
from .arrays import check_finite, open_samples

VERSION = 2  # of the index
KNOWN = "autoencoder", "factor", "shift", "moments", "flips", "size", "source"  # that a run keeps of its latents
NOTED = {"file", "count", "shape", "left_out"}  # of a shard
OTHERS = {"source_digest": "of other images, or begun by an earlier version",  # digests mean nothing
          "latents": "of other latents", "autoencoder": "by another autoencoder"}


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
        self.ends = np.cumsum([len(part) for part in self.parts])
        self.dtype, self.stored = self.parts[0].dtype, self.parts[0].shape[1:]
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
    """Like `open_samples`, but no file stays open: there may be more shards than a process may have open files."""
    array = open_samples(path, (4,))
    begin = array.offset // array.itemsize
    numbers = torch.from_file(str(path), size=begin + array.size, dtype=getattr(torch, str(array.dtype)))
    return numbers[begin:].numpy().reshape(array.shape)


def known_of(images) -> dict | None:
    """What is known of the latents that `loader.load_images` gave, {} where nothing is; None for images, which are
    uint8 whatever their channels."""
    return None if str(images.dtype).endswith("uint8") else getattr(images, "about", {})


def known_on_disk(folder: Path) -> dict:
    """The index of the encode that wrote into `folder`, finished or not; {} without an encode. Version 1 joined the
    notes of all shards in it, as "shards". BadInput for one of another version, or damaged."""
    path = folder / "index.json"
    try:
        index = read_json(path)
        version = index["dansm_latents"]
    except (FileNotFoundError, NotADirectoryError, ValueError, LookupError, TypeError):  # or it is another program's
        return {}
    if version not in (1, VERSION):
        raise BadInput(f"{folder} holds latents of version {version}: expected {VERSION}, encode the images again")
    names = *KNOWN, *(("count", "left_out", "shards") if version == 1 else ("images",))
    if missing := [name for name in names if name not in index]:
        raise BadInput(f"{path} lacks {', '.join(missing)}: expected it as dansm encode wrote it")
    if version == 1:
        images = index["count"] // (1 + index["flips"]) + len(index["left_out"])
        index |= {"dansm_latents": VERSION, "images": images}
    return {"background": "white"} | index


def renew(folder: Path, index: dict) -> None:
    """Give latents of version 1 the files of this one: a note for each shard, and an index without notes."""
    for note in index.pop("shards"):
        write_json((folder / note["file"]).with_suffix(".json"), note)
    write_json(folder / "index.json", index)


def open_encoded(folder: Path, index: dict) -> Shards:
    """The latents that dansm encode wrote into `folder`, memory-mapped; of an unfinished one the shards so far, and a
    line says so. index: see `known_on_disk`. BadInput for shards that are missing or cut off."""
    try:
        notes = index.get("shards") or read_notes(folder)
        files = [folder / note["file"] for note in notes if note["count"]]
        shards = Shards(files, {name: index[name] for name in KNOWN}) if files else None
    except BadInput as error:
        raise BadInput(f"{error}; the same dansm encode makes again what is missing") from error
    done = sum(note["count"] // (1 + index["flips"]) + len(note["left_out"]) for note in notes)
    so_far = f"{folder}: {done:,} of {index['images']:,} images encoded so far; the same dansm encode resumes"
    if shards is None:
        raise BadInput(f"{so_far}, expected some")
    if done < index["images"] and "shards" not in index:  # version 1 has no notes of shards without a latent
        say(so_far)
    return shards


def check_same(out: Path, before: dict, now: dict, files: str) -> None:
    """BadInput if what `out` holds was made otherwise, by its note of `before`, than what is to be made now, or if it
    holds files of that pattern and no note."""
    strange = min(out.glob(files), default=None)
    if strange and not before:
        raise BadInput(f"--out is {out}, which holds {strange.name} and no note of what it was made from: expected a "
                       f"folder without {files}")
    differing = [OTHERS.get(name) or f"{name} {before.get(name)} → {value}" for name, value in now.items()
                 if name != "source" and before and before.get(name) != value]
    if differing:
        raise BadInput(f"{out} holds results that were made otherwise ({', '.join(differing)}): expected the same "
                       "settings, or another --out")


def shard_path(out: Path, number: int) -> Path:
    return out / f"latents-{number:05d}.npy"


def write_shard(out: Path, number: int, latents: np.ndarray, left_out: list[Path], transparent: int = 0) -> None:
    """Latents (n, C or 2C, h, w) float16, whole or not at all, then their note."""
    path = shard_path(out, number)
    if len(latents):
        content = io.BytesIO()  # np.save into a file hides why a disk takes no more
        np.save(content, latents)
        with replacing(path) as partial:
            partial.write_bytes(content.getbuffer())
    write_json(path.with_suffix(".json"), {"file": path.name, "count": len(latents), "shape": latents.shape[1:],
                                           "left_out": [str(image) for image in left_out], "transparent": transparent})


def read_notes(folder: Path) -> list[dict]:
    """The notes of the shards in `folder`: the file, how many latents it has, the shape of one, images left out."""
    return [_read_note(path) for path in sorted(folder.glob("latents-*.json"))]


def _read_note(path: Path) -> dict:
    note = read_json(path)
    if not isinstance(note, dict) or not note.keys() >= NOTED:
        raise BadInput(f"{path} is not the note of a shard: expected {', '.join(sorted(NOTED))} in it")
    return note


def is_whole(path: Path) -> bool:
    """Whether a shard has a note and is as noted. Where no image was readable there is a note alone."""
    try:
        note = _read_note(path.with_suffix(".json"))
        return not note["count"] or open_samples(path, (4,)).shape == (note["count"], *note["shape"])
    except (FileNotFoundError, ValueError, TypeError):
        return False
