"""CIFAR-10 and CIFAR-100 as torchvision leaves them: pickled batches, whose MD5 it checks before it reads them."""

from pathlib import Path
from typing import NamedTuple

from dansm import BadInput

from .folder import is_hidden


class Cifar(NamedTuple):
    """One of the two sets: its class in torchvision, folder and archive as this leaves them, files in the folder."""

    name: str
    dataset: str
    folder: str
    archive: str
    files: tuple[str, ...]


CIFARS = (
    Cifar("CIFAR-10", "CIFAR10", "cifar-10-batches-py", "cifar-10-python.tar.gz", ("data_batch_1", "batches.meta")),
    Cifar("CIFAR-100", "CIFAR100", "cifar-100-python", "cifar-100-python.tar.gz", ("train", "meta")))


def find_cifar(path: Path) -> tuple[Cifar, Path] | None:
    """The set and the folder of its batches: `path` itself, or in a `path` that holds nothing else but the archive."""
    for cifar in CIFARS:
        for folder in (path, path / cifar.folder):
            if all((folder / file).is_file() for file in cifar.files):
                shown = {entry.name for entry in path.iterdir() if not is_hidden(entry.name)}
                return (cifar, folder) if folder == path or shown <= {cifar.folder, cifar.archive} else None
    return None


def open_cifar(data: str) -> tuple[str, object] | None:
    """Name and torchvision's dataset of the training images in the folder `data`. "cifar10", if that is no path, is
    downloaded into data/ at first use. None for other data. BadInput for damaged files, or without a connection."""
    found = find_cifar(Path(data))
    if not found and (data != "cifar10" or Path(data).exists()):
        return None
    import torchvision.datasets  # takes a second

    if not found:
        try:
            return "CIFAR-10", torchvision.datasets.CIFAR10("data", download=True)
        except (OSError, RuntimeError) as error:
            raise BadInput(f"CIFAR-10 is not in data/ and could not be downloaded ({error}): expected a connection, or "
                           "the path of a folder of images") from error
    cifar, folder = found[0], found[1].resolve()
    dataset = type(cifar.dataset, (getattr(torchvision.datasets, cifar.dataset),), {"base_folder": folder.name})
    try:
        return cifar.name, dataset(folder.parent)
    except (OSError, RuntimeError) as error:  # torchvision's advice is to download it, and names no file
        why = error if isinstance(error, OSError) else _wrong_file(folder, dataset)
        raise BadInput(f"{folder} holds files of {cifar.name}, and {why}: expected the folder as torchvision leaves "
                       "it") from error


def _wrong_file(folder: Path, dataset: type) -> str:
    """The first file of torchvision's set that is missing or damaged in the folder, and which of both."""
    from torchvision.datasets.utils import check_integrity

    files = *dataset.train_list, *dataset.test_list, (dataset.meta["filename"], dataset.meta["md5"])
    wrong = next(name for name, digest in files if not check_integrity(folder / name, digest))
    return f"{wrong} is {'damaged' if (folder / wrong).exists() else 'missing'}"
