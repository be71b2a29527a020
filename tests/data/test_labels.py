"""Labels: from folders, archives and files, in the order of the images, and what is refused."""

import json
import types

import numpy as np
import pytest
from support import as_folder, lsun, packed, picture

from dansm import BadInput
from dansm.scale.data import latents
from dansm.scale.data.labels import load_labels
from dansm.scale.data.loader import load_images

CLASSES = ["dog/b.png", "cat/z.png", "bird/a.png", "cat/deep/a.png", "dog/a.png"]
NAMES = ["bird", "cat", "dog"]
NUMBERS = [0, 1, 1, 2, 2]  # in the order of the paths
CONTENT = {name: picture(seed) for seed, name in enumerate(CLASSES)}


@pytest.fixture
def folder(tmp_path):
    return as_folder(tmp_path / "images", CONTENT)


@pytest.fixture
def not_labelled(folder):
    """The line with which the labels of five images are refused."""

    def not_labelled(setting="folders", data=folder, count=5, left_out=()):
        with pytest.raises(BadInput) as refused:
            load_labels(str(data), str(setting), count, left_out)
        assert "\n" not in str(refused.value) and "expected" in str(refused.value)
        return str(refused.value)

    return not_labelled


def write(path, *numbers, dtype=np.int64):
    np.save(path, np.array(numbers, dtype))
    return path


def as_listed(labels):
    return labels.numbers.tolist(), labels.names


# ------------------------------------------------------------------------------- folders of classes


@pytest.mark.parametrize("setting", ["auto", "folders"])
@pytest.mark.parametrize("kind", ["folder", ".zip", ".tar", ".tar.gz"])
def test_the_first_folder_of_an_image_is_its_class(tmp_path, folder, setting, kind):
    source = folder if kind == "folder" else packed(tmp_path / f"a{kind}", {f"./{name}": CONTENT[name]
                                                                           for name in CLASSES})
    labels = load_labels(str(source), setting, len(load_images(str(source))))
    assert as_listed(labels) == (NUMBERS, NAMES) and labels.numbers.dtype == np.int64
    assert str(source) in labels.origin


def test_the_folders_of_this_folder_are_found(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert as_listed(load_labels(".", "folders", 5)) == (NUMBERS, NAMES)


def test_latents_in_folders_have_a_label_each_where_a_file_holds_several(tmp_path):
    for name, count in (("b/0", 2), ("a/0", 1), ("b/1", 3)):
        (tmp_path / "latents" / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(tmp_path / "latents" / f"{name}.npy", np.zeros((count, 4, 2, 2), np.float32))
    source = str(tmp_path / "latents")
    assert as_listed(load_labels(source, "auto", len(load_images(source)))) == ([0, 1, 1, 1, 1, 1], ["a", "b"])


def test_none_gives_none_and_auto_takes_no_folders_that_may_be_no_classes(folder, not_labelled, capsys):
    assert load_labels(str(folder), "none", 5) is None
    (folder / "e.png").write_bytes(picture(9))
    assert capsys.readouterr().out == "" and load_labels(str(folder), "auto", 6) is None
    stray = f"{folder} has {folder / 'e.png'} in no folder"
    assert stray in capsys.readouterr().out.replace("\n", "") and stray in not_labelled(count=6)


@pytest.mark.parametrize("setting", ["auto", "folders"])
def test_hidden_folders_and_files_are_neither_classes_nor_images(folder, setting, capsys):
    as_folder(folder, {".thumbnails/a.png": picture(0), "dog/.ipynb_checkpoints/b.png": picture(1), ".a.png": b"",
                       "__MACOSX/dog/._b.png": b""})
    assert len(load_images(str(folder))) == 5
    capsys.readouterr()
    assert as_listed(load_labels(str(folder), setting, 5)) == (NUMBERS, NAMES)
    assert capsys.readouterr().out == ""


def test_a_folder_around_the_classes_is_no_class(tmp_path):
    source = as_folder(tmp_path / "one", {f"train/{name}": content for name, content in CONTENT.items()})
    archive = packed(tmp_path / "a.tar", {f"a/train/{name}": content for name, content in CONTENT.items()})
    for data in (source, archive):
        assert as_listed(load_labels(str(data), "auto", 5)) == (NUMBERS, NAMES)


SPLITS = [f"{split}/{name}/{number}.png" for split in ("train", "val") for name in NAMES for number in range(2)]


@pytest.mark.parametrize("setting", ["auto", "folders"])
@pytest.mark.parametrize("kind", ["folder", ".tar"])
def test_folders_that_hold_the_same_folders_are_classes_with_a_warning(tmp_path, capsys, setting, kind):
    content = {name: picture(0) for name in SPLITS}
    source = as_folder(tmp_path / "set", content) if kind == "folder" else packed(tmp_path / f"a{kind}", content)
    assert load_labels(str(source), setting, 12).names == ["train", "val"]
    (said,) = capsys.readouterr().out.splitlines()
    assert "folders train, val," in said and "folders bird, cat, dog:" in said


@pytest.mark.parametrize("names", [
    CLASSES, SPLITS[:-2], [*SPLITS, "val/x.png"], [*SPLITS, "test/bird/0.png"],
    [f"{name}/images/{number}.png" for name in NAMES for number in range(2)], [name[6:] for name in SPLITS[:6]]])
def test_nothing_is_said_of_folders_that_hold_different_folders_or_one(tmp_path, capsys, names):
    source = as_folder(tmp_path / "set", {name: picture(0) for name in names})
    assert len(load_labels(str(source), "folders", len(names)).names) > 1
    assert capsys.readouterr().out == ""


def test_one_folder_is_no_classes(tmp_path, not_labelled):
    source = as_folder(tmp_path / "one", {f"dog/{number}.png": picture(number) for number in range(5)})
    assert load_labels(str(source), "auto", 5) is None
    assert f"{source} has fewer than two folders" in not_labelled(data=source)


def test_a_folder_of_a_class_without_images_is_named(folder, not_labelled, capsys):
    (folder / ".hidden").mkdir()
    assert load_labels(str(folder), "folders", 5)
    (folder / "fish").mkdir()
    assert f"{folder / 'fish'} holds no images" in not_labelled()
    capsys.readouterr()
    assert as_listed(load_labels(str(folder), "auto", 5)) == (NUMBERS, NAMES)
    assert f"{folder / 'fish'} holds no images" in capsys.readouterr().out.replace("\n", "")


def test_labels_of_images_that_are_left_out_are_left_out(folder, tmp_path, not_labelled):
    (folder / "cat" / "deep" / "a.png").write_bytes(b"")
    for given in ({}, {"cache": tmp_path / "cache"}, {"cache": tmp_path / "cache"}):
        left_out = []
        images = load_images(str(folder), skip_unreadable=True, left_out=left_out, **given)
        assert as_listed(load_labels(str(folder), "folders", len(images), left_out)) == ([0, 1, 2, 2], NAMES)
    file = write(tmp_path / "numbers.npy", 0, 1, 1, 0, 1)
    assert as_listed(load_labels(str(folder), str(file), 4, left_out)) == ([0, 1, 0, 1], ["0", "1"])
    left_out.append(folder / "bird" / "a.png")
    assert as_listed(load_labels(str(folder), "folders", 3, left_out)) == ([1, 2, 2], NAMES)
    assert "was left out" in not_labelled(count=2, left_out=[*left_out, folder / "cat.png"])


def test_a_cache_that_was_made_under_another_name_gives_the_labels_too(folder, tmp_path):
    (folder / "cat" / "deep" / "a.png").write_bytes(b"")
    load_images(str(folder), skip_unreadable=True, cache=tmp_path / "cache")
    left_out = []
    load_images("images", skip_unreadable=True, left_out=left_out, cache=tmp_path / "cache")
    assert as_listed(load_labels("images", "folders", 4, left_out)) == ([0, 1, 2, 2], NAMES)


# ------------------------------------------------------------------------------- files


@pytest.mark.parametrize("kind", ["images", "folder of latents", "file of latents", "zip"])
def test_labels_npy_is_found_next_to_the_data_and_is_no_latent(tmp_path, kind):
    home = tmp_path / "home"
    home.mkdir()
    source = home
    if kind == "images":
        as_folder(home, CONTENT)
    elif kind == "zip":
        source = packed(home / "a.zip", CONTENT)
    else:
        array = np.zeros((5, 4, 2, 2), np.float32)
        np.save(home / "latents.npy", array)
        source = home / "latents.npy" if kind == "file of latents" else home
    write(home / "labels.npy", 1, 0, 2, 3, 3, dtype=np.uint8)
    labels = load_labels(str(source), "auto", len(load_images(str(source))))
    assert as_listed(labels) == ([1, 0, 2, 3, 3], ["0", "1", "2", "3"]) and labels.numbers.dtype == np.int64
    assert str(home / "labels.npy") in labels.origin


def test_an_lmdb_has_the_labels_that_a_file_gives(tmp_path):
    source = lsun(tmp_path / "lsun", {f"{i}": picture(i) for i in range(3)})
    assert load_labels(str(source), "auto", 3) is None
    write(source / "labels.npy", 1, 0, 1)
    assert as_listed(load_labels(str(source), "auto", len(load_images(str(source))))) == ([1, 0, 1], ["0", "1"])


@pytest.mark.parametrize(("numbers", "dtype", "told"), [
    ([0, 1, 1], np.int64, "3 labels"), ([0, 1, 1, 0, -1], np.int64, "from -1"),
    ([0, 1, 1, 0, 1], np.float32, "float32"),
    ([True, False, True, True, True], bool, "bool"), ([[0, 1, 1, 0, 1]], np.int64, "(1, 5)"),
    ([2**62, 1, 0, 0, 0], np.uint64, f"label {2**62}"),
    ([2**64 - 9, 1, 0, 0, 0], np.uint64, f"label {2**64 - 9}"), ([], np.int64, "0 labels")])
def test_wrong_labels_are_refused_by_the_name_of_their_file(tmp_path, not_labelled, numbers, dtype, told):
    np.save(tmp_path / "a.npy", np.array(numbers, dtype))
    message = not_labelled(tmp_path / "a.npy")
    assert str(tmp_path / "a.npy") in message and told in message


def test_numbers_may_have_gaps_and_the_classes_keep_their_numbers_as_names(tmp_path, folder):
    file = write(tmp_path / "numbers.npy", 7, 207, 11, 11, 7)
    assert as_listed(load_labels(str(folder), str(file), 5)) == ([0, 2, 1, 1, 0], ["7", "11", "207"])
    np.savez(tmp_path / "a.npz", images=np.zeros((3, 8, 8), np.uint8), labels=np.array([5, 0, 5]))
    assert as_listed(load_labels(str(tmp_path / "a.npz"), "auto", 3)) == ([1, 0, 1], ["0", "5"])


def test_what_is_no_file_of_labels_is_refused(tmp_path, not_labelled):
    assert "--labels is foldres" in not_labelled("foldres")
    (tmp_path / "a.npy").write_bytes(b"\x93NUMPY")
    assert str(tmp_path / "a.npy") in not_labelled(tmp_path / "a.npy")
    np.save(tmp_path / "b.npy", np.array([{}]), allow_pickle=True)
    assert str(tmp_path / "b.npy") in not_labelled(tmp_path / "b.npy")
    np.savez(tmp_path / "c.npz", labels=np.zeros(5, int))
    assert "c.npz cannot be read as labels: expected a .npy file" in not_labelled(tmp_path / "c.npz")
    (tmp_path / "a.txt").write_text("0\n1\n")
    assert "pickle" not in not_labelled(tmp_path / "a.txt")


# ------------------------------------------------------------------------------- CIFAR-10 and encoded latents


def test_cifar10_has_its_own(monkeypatch, not_labelled):
    own = types.SimpleNamespace(targets=[1, 0, 1], classes=["airplane", "automobile"])
    monkeypatch.setattr("torchvision.datasets.CIFAR10", lambda *_, **__: own)
    assert as_listed(load_labels("cifar10", "auto", 3)) == ([1, 0, 1], ["airplane", "automobile"])
    assert "cifar10" in not_labelled("folders", data="cifar10")


@pytest.fixture
def index(tmp_path):
    """Writes latents with an index that says the same of them as an encode's, and this of their labels."""

    def index(**labels):
        out = tmp_path / "latents"
        out.mkdir(exist_ok=True)
        latents.write_shard(out, 0, np.zeros((5, 4, 2, 2), np.float16), [])
        known = {name: 0 for name in latents.KNOWN}
        (out / "index.json").write_text(json.dumps({"dansm_latents": 2, "images": 5, **known, **labels}))
        return out

    return index


def test_encoded_latents_have_those_of_their_index(index):
    data = index(labels=NUMBERS, classes=[*NAMES, "fish"])  # of which no image could be read
    labels = load_labels(str(data), "auto", len(load_images(str(data))))
    assert as_listed(labels) == (NUMBERS, [*NAMES, "fish"])
    assert load_labels(str(index()), "auto", 5) is None


@pytest.mark.parametrize("labels", [NUMBERS[:4], [*NUMBERS[:4], 9], [*NUMBERS[:4], "cat"], 3, [*NUMBERS[:4], -1]])
def test_a_damaged_index_is_named(index, not_labelled, labels):
    data = index(labels=labels, classes=NAMES)
    assert str(data / "index.json") in not_labelled("auto", data=data)
