"""CIFAR-10 and CIFAR-100 in a folder as torchvision leaves them."""

import hashlib
import pickle

import numpy as np
import pytest
import torchvision.datasets
from support import as_folder, picture

from dansm.scale.data.labels import load_labels
from dansm.scale.data.loader import load_images, stream_images

BATCHES = {"CIFAR10": {"data_batch_1": 3, "data_batch_2": 2, "test_batch": 2}, "CIFAR100": {"train": 4, "test": 2}}


@pytest.fixture(params=BATCHES)
def cifar(request, tmp_path, monkeypatch):
    """A folder with a few images of the set, and the images and labels that are for training."""
    dataset = getattr(torchvision.datasets, request.param)
    folder = tmp_path / "cifar10" / dataset.base_folder
    folder.mkdir(parents=True)
    numbers, labels = np.random.default_rng(0), "labels" if request.param == "CIFAR10" else "fine_labels"
    images, classes, listed = [], [], {}

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        listed[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()

    for name, count in BATCHES[request.param].items():
        data = numbers.integers(0, 256, (count, 3072), np.uint8)
        write(name, {"data": data, labels: [place % 2 for place in range(count)]})
        if "test" not in name:
            images.append(data.reshape(count, 3, 32, 32))
            classes += [place % 2 for place in range(count)]
    write(dataset.meta["filename"], {dataset.meta["key"]: ["cat", "dog"]})
    monkeypatch.setattr(dataset, "meta", dataset.meta | {"md5": listed.pop(dataset.meta["filename"])})
    tests = [name for name in listed if "test" in name]
    monkeypatch.setattr(dataset, "test_list", [[name, listed.pop(name)] for name in tests])
    monkeypatch.setattr(dataset, "train_list", list(map(list, listed.items())))
    return folder, np.concatenate(images), classes


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("renamed", [False, True])
def test_the_folder_or_the_one_around_it_is_the_set(cifar, inside, renamed):
    folder, images, classes = cifar
    if renamed:
        folder = folder.rename(folder.with_name("mine"))
    (folder.parent / ".DS_Store").touch()
    if not renamed:
        (folder.parent / f"{folder.name.replace('-batches-py', '').replace('-python', '')}-python.tar.gz").touch()
    source = str(folder if inside or renamed else folder.parent)
    assert np.array_equal(load_images(source), images)
    labels = load_labels(source, "auto", len(images))
    assert labels.numbers.tolist() == classes and labels.names == ["cat", "dog"] and "CIFAR-10" in labels.origin
    assert load_images(source, size=8).shape == (len(images), 3, 8, 8)
    stream = stream_images(source)
    assert stream.digest == stream.digest_now()
    with stream.open() as (count, entries):
        assert count == len(images) and all(np.array_equal(read()[0], images[place]) for place, _, read in entries)


def test_a_link_to_the_folder_and_the_folder_one_stands_in_are_the_set(cifar, tmp_path, monkeypatch):
    folder, images, _ = cifar
    real = folder.rename(tmp_path / "elsewhere")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / folder.name).symlink_to(real)
    for source in (tmp_path / "links", tmp_path / "links" / folder.name):
        assert np.array_equal(load_images(str(source)), images)
    monkeypatch.chdir(real)
    assert np.array_equal(load_images("."), images)


def test_by_that_name_a_folder_here_is_taken_and_nothing_downloaded(cifar):
    assert np.array_equal(load_images("cifar10"), cifar[1])  # tests run in tmp_path


def test_damaged_or_missing_files_are_refused_by_name_and_no_code_runs(cifar, not_loaded):
    folder, _, _ = cifar
    names = ("batches.meta", "data_batch_1", "test_batch") if "10-" in folder.name else ("meta", "train", "test")
    meta, batch, test = (folder / name for name in names)
    for path in (meta, batch):
        whole = path.read_bytes()
        path.write_bytes(b"cos\nsystem\n(S'touch bang'\ntR.")
        line = not_loaded(folder.parent)
        assert f"{folder} holds" in line and f"{path.name} is damaged" in line and "download" not in line
        path.write_bytes(whole)
    assert not (folder.parents[1] / "bang").exists()
    test.unlink()
    assert f"{test.name} is missing" in not_loaded(folder)


def test_next_to_images_the_batches_are_files_of_another_kind(cifar, capsys):
    as_folder(cifar[0].parent, {"a.png": picture(0)})
    assert len(load_images("cifar10")) == 1 and "without a suffix" in capsys.readouterr().out
