"""Labels of images or latents: from folders of classes, CIFAR-10, a .npy file, WebDataset's shards, or the index of an
encode."""

import os
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dansm import BadInput

from ..base.text import counted, say, shorten
from .archives import classes_in, names_in
from .arrays import labels_in
from .cifar import open_cifar
from .folder import in_braces, is_hidden
from .latents import known_on_disk
from .read import LABELS, Source, files_of


class Labels(NamedTuple):
    """The label of each image or latent.

    numbers  (N,) int64, from 0 to len(names) − 1
    names    of the classes
    origin   where the labels were found
    """

    numbers: np.ndarray
    names: list[str]
    origin: str


def load_labels(data: str, setting: str, count: int, left_out: Collection[Path] = ()) -> Labels | None:
    """The labels of the images or latents that `load_images` gave for `data`, in their order.

    setting   none     no labels
              auto     those of cifar10, of the index that dansm encode wrote, or of labels.npy in the folder or next to
                       the file; else those of arrays, or of the .cls next to each image of an archive, if there are
                       at least two classes; else each image's first folder, if all are in one of at least two; else
                       none
              folders  each image's first folder, in `data` or in the archive
              a path   of a .npy file with a whole number from 0 on for each image, also for those that are left out
    count     how many images `load_images` gave
    left_out  the files that it left out

    Numbers may have gaps, as those of a subset of ImageNet: classes are the numbers that some image has, ascending, and
    are called by them. Raises BadInput for labels of another length or type, for images without a .cls where others
    have one, and for images outside of the folders of classes.
    """
    labels = _find(data, setting)
    if labels is None:
        return None
    numbers, names, origin = labels
    if len(numbers) != count + len(left_out):
        raise BadInput(f"{origin} holds {counted(len(numbers), 'label')}: expected {count + len(left_out):,}, one for "
                       f"each image or latent of {data}")
    if left_out:
        unreadable = set(left_out)
        numbers = numbers[[path not in unreadable for path in Source(Path(data), files_of(Path(data))).paths()]]
        if len(numbers) != count:
            raise BadInput(f"{data} holds no {min(left_out)}, which was left out: expected the path of that time")
    return Labels(numbers, names, origin)


def _find(data: str, setting: str) -> Labels | None:
    """The labels of all images, also of those that cannot be read."""
    path = Path(data)
    if setting == "none":
        return None
    if setting == "folders":
        return _of_folders(path, asked=True)
    if setting != "auto":
        return _of_file(Path(setting))
    if cifar := open_cifar(data):
        name, dataset = cifar
        return Labels(np.array(dataset.targets), dataset.classes, name)
    index = known_on_disk(path)
    if "labels" in index:
        return _of_index(path / "index.json", index)
    file = (path if path.is_dir() else path.parent) / LABELS
    if file.is_file():
        return _of_file(file)
    return _of_arrays(path) or _of_archives(path) or _of_folders(path, asked=False)


def _files(path: Path) -> list[Path]:
    """The files of the data, none for cifar10."""
    return files_of(path) if path.exists() or in_braces(path) else []


def _of_index(path: Path, index: dict) -> Labels:
    """The labels in the index of an encode."""
    numbers = _whole_numbers(path, np.asarray(index["labels"]))
    names = index.get("classes", [])
    if numbers.max(initial=-1) >= len(names):
        raise BadInput(f"{path} holds labels up to {numbers.max()} and {counted(len(names), 'class')}: expected a "
                       "class for each")
    return Labels(numbers, names, str(path))


def _of_file(path: Path) -> Labels:
    """The labels in a .npy file; the names of the classes are their numbers."""
    if not path.is_file():
        raise BadInput(f"--labels is {path}, which is not a file: expected none, auto, folders, or a .npy file of "
                       "whole numbers")
    try:
        array = np.load(path, allow_pickle=False)
        if not isinstance(array, np.ndarray):
            raise ValueError("an archive")
    except (OSError, ValueError, EOFError) as error:
        why = f" ({error})" if isinstance(error, OSError) else ""  # NumPy's word for any text is that it is a pickle
        raise BadInput(f"{path} cannot be read as labels{why}: expected a .npy file of whole numbers") from error
    return _numbered(str(path), _whole_numbers(path, array))


def _of_arrays(path: Path) -> Labels | None:
    """The labels that lie in the same files as the images or latents, as in an .npz."""
    files = _files(path)
    if not Source(path, files).holds_arrays or labels_in(files[0]) is None:
        return None
    parts = {file: labels_in(file) for file in files}
    if missing := [file for file, part in parts.items() if part is None]:
        raise BadInput(f"{missing[0]} holds no labels, {files[0]} does: expected some in each, or --labels none")
    parts = [_whole_numbers(file, np.atleast_1d(part.squeeze())) for file, part in parts.items()]
    return _numbered(str(path), np.concatenate(parts))


def _of_archives(path: Path) -> Labels | None:
    """The classes that lie next to the images or latents in archives, if there are two or more."""
    source = Source(path, _files(path))
    if not source.holds_archives:
        return None
    classes = {file: classes_in(file, source.wanted) for file in source.files}
    if not any(of_file.some for of_file in classes.values()):
        return None
    for file, of_file in classes.items():
        if None in of_file.numbers:
            sample = file / names_in(file, source.wanted)[of_file.numbers.index(None)]
            raise BadInput(f"{sample} has no .cls, others do: expected one for each sample, or --labels none")
    numbers = np.array([number for of_file in classes.values() for number in of_file.numbers], np.int64)
    labels = _numbered(f"the .cls of {path}", numbers)
    return labels if len(labels.names) > 1 else None


def _numbered(origin: str, numbers: np.ndarray) -> Labels:
    """Labels whose classes are called by their numbers, of which there may be any."""
    found, places = np.unique(numbers, return_inverse=True)
    return Labels(places.astype(np.int64), list(map(str, found.tolist())), origin)


def _whole_numbers(path: Path, array: np.ndarray) -> np.ndarray:
    """The array as int64. BadInput for anything but (N,) whole numbers from 0 on."""
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise BadInput(f"{path} holds {array.dtype} {array.shape}: expected labels (N,), whole numbers from 0 on")
    if array.min(initial=0) < 0:
        raise BadInput(f"{path} holds labels from {array.min()} on: expected whole numbers from 0 on")
    if array.max(initial=0) >= 2**31:
        raise BadInput(f"{path} holds a label {array.max()}: expected whole numbers from 0 on, below {2**31:,}")
    return array.astype(np.int64)


def _of_folders(path: Path, asked: bool) -> Labels | None:
    """The first folder of each image below what all have in common, unless there are images outside of folders, or
    fewer than two folders. Then None, or BadInput if folders are `asked` for."""
    files = _files(path)
    listed = bool(files) and files[0].name != "data.mdb"  # the images of an lmdb have keys, and there are millions
    source = Source(path, files)
    images = _unpacked(source) if listed else []
    top = Path(os.path.commonpath([image.parent for image in images])) if images else path  # archives often have one
    folders = [_first_folder(image, top) for image in images]
    names, numbers = np.unique(folders, return_inverse=True)
    if len(names) > 1 and "" not in folders:
        on_disk = top.is_dir() and not source.holds_archives
        inside = {folder.name for folder in top.iterdir() if folder.is_dir()} if on_disk else set()
        if empty := {name for name in inside - set(names.tolist()) if not is_hidden(name)}:
            if asked:
                raise BadInput(f"{top / min(empty)} holds no images: expected some in each folder of a class")
            say(f"{top / min(empty)} holds no images: it is no class")
        if below := _folders_in_each(images, folders, top):
            say(f"the classes are the folders {shorten(', '.join(names), 80)}, each of which holds the folders",
                f"{shorten(', '.join(below), 80)}: if these are the classes, name one of the former as the data")
        return Labels(numbers.astype(np.int64), names.tolist(), f"the folders of {path}")
    why = "has fewer than two folders of images"
    if "" in folders and len(names) > 1:
        why = f"has {images[folders.index('')]} in no folder"
        if len(names) > 2 and not asked:
            say(f"{path} {why}: its other folders are not taken for classes")
    if asked:
        raise BadInput(f"--labels is folders, and {path} {why}: expected each image in the folder of its class")
    return None


def _unpacked(source: Source) -> list[Path]:
    """The path of each image, as if all archives of a folder were unpacked there."""
    if source.holds_archives and source.files != [source.path]:
        return [source.path / name for archive in source.files for name in names_in(archive, source.wanted)]
    return source.paths()


def _folders_in_each(images: list[Path], folders: list[str], top: Path) -> list[str]:
    """The names of the folders in every one of `folders`, the first folder of each image below `top`. Empty if they
    differ, if an image lies in none of them, or if there is a single one, as classes often have."""
    below = {folder: set() for folder in folders}
    for image, folder in zip(images, folders, strict=True):
        below[folder].add(_first_folder(image, top / folder))
    first, *others = below.values()
    same = len(first) > 1 and "" not in first and all(names == first for names in others)
    return sorted(first) if same else []


def _first_folder(image: Path, source: Path) -> str:
    """The name of the first folder below the source, empty for an image that is in none."""
    folder, *rest = image.relative_to(source).parts or ("",)
    return folder if rest else ""
