"""A folder of archives, such as WebDataset's shards: one set."""

import io
import os
import re
import resource

import numpy as np
import pytest
from support import FAST, PICTURES, as_folder, packed, picture

from dansm import BadInput
from dansm.scale.data.labels import load_labels
from dansm.scale.data.loader import check_latents, load_images, stream_images

SHARDS = {"train-000000": [3, 1, 2], "train-000001": [5, 4], "more/train-000002": [0]}
IN_ORDER = [0, 1, 2, 3, 4, 5]  # by shard, then by name


@pytest.fixture(params=[".tar", ".tar.gz", ".zip"])
def shards(request, tmp_path):
    """Samples as WebDataset packs them: an image, its class and its caption under one name."""
    (tmp_path / "shards" / "more").mkdir(parents=True)
    for name, numbers in SHARDS.items():
        content = {}
        for number in numbers:
            content |= {f"{number:04d}.png": picture(number), f"{number:04d}.cls": b"7", f"{number:04d}.json": b"{}"}
        packed(tmp_path / "shards" / f"{name}{request.param}", content)
    return tmp_path / "shards"


def test_shards_are_one_set_in_the_order_of_shards_and_names(tmp_path, shards, capsys):
    expected = load_images(str(as_folder(tmp_path / "a", {f"{number}.png": picture(number) for number in IN_ORDER})))
    capsys.readouterr()
    for settings in ({}, {"cache": tmp_path / "cache"}, {"cache": tmp_path / "cache"}):
        assert np.array_equal(load_images(str(shards), **settings), expected)
    assert f"{shards}: passed over 6 .cls, 6 .json" in capsys.readouterr().out
    stream = stream_images(str(shards))
    with stream.open() as (count, entries):
        assert count == 6
        assert all(np.array_equal(image[0], expected[place]) for place, _, image, _ in stream.decoded(entries))
    names = [path.name for path in stream.paths()]
    assert names == [f"{number:04d}.png" for number in IN_ORDER]


def test_shards_are_no_classes_and_folders_in_them_are(tmp_path, shards):
    assert load_labels(str(shards), "auto", 6) is None
    (tmp_path / "classes").mkdir()
    for number in range(2):
        content = {f"{name}/{number}{place}.png": picture(place) for name in ("cat", "dog") for place in range(2)}
        packed(tmp_path / "classes" / f"{number}.tar", content)
    for setting in ("auto", "folders"):
        labels = load_labels(str(tmp_path / "classes"), setting, 8)
        assert labels.names == ["cat", "dog"] and labels.numbers.tolist() == [0, 0, 1, 1] * 2


def labelled(path, classes, suffix=".png", folder=""):
    """An archive of an image for each class, the .cls before or behind it; None for an image without."""
    content = {}
    for number, text in classes.items():
        members = {f"{folder}{number}{suffix}": picture(number), f"{folder}{number}.cls": text}
        members = {name: payload for name, payload in members.items() if payload is not None}
        content |= members if number % 2 else dict(reversed(members.items()))
    return packed(path, content)


@pytest.mark.parametrize("packing", [".tar", ".tar.gz", ".zip"])
def test_auto_takes_the_classes_next_to_the_images_in_the_order_of_the_images(tmp_path, packing):
    folder = tmp_path / "data"
    folder.mkdir()
    labelled(folder / f"b{packing}", {3: b"12", 1: b"7\n", 2: b" 0"})
    labelled(folder / f"c{packing}", {9: b"7", 4: b"12"}, suffix=".seg.png", folder="x/")  # named up to the first dot
    packed(folder / f"d{packing}", {"note.txt": b""})
    labels = load_labels(str(folder), "auto", 5)
    assert labels.names == ["0", "7", "12"] and [labels.names[number] for number in labels.numbers] == [
        "7", "0", "12", "12", "7"]
    assert labels.numbers.dtype == np.int64
    alone = load_labels(str(folder / f"b{packing}"), "auto", 3)
    assert alone.names == ["0", "7", "12"] and alone.numbers.tolist() == [1, 0, 2]
    assert load_labels(str(folder), "none", 5) is None


def test_labels_next_to_the_data_go_before_those_in_it(tmp_path):
    labelled(tmp_path / "b.tar", {1: b"0", 2: b"1"})
    np.save(tmp_path / "labels.npy", [1, 0])
    assert load_labels(str(tmp_path), "auto", 2).numbers.tolist() == [1, 0]


@pytest.mark.parametrize("packing", [".tar", ".zip"])
@pytest.mark.parametrize(("text", "named"), [
    (b"cat", "2.cls"), (b"-1", "2.cls"), (b"1.5", "2.cls"), (b"", "2.cls"), (b"%d" % 2**31, "2.cls"),
    (b"7" * 64 + b"8" * 100, "2.cls"), (b"7" + b" " * 5000, "2.cls"), (b"1" + b" " * 5000 + b"2", "2.cls"),
    (None, "2.png")])
def test_an_image_without_a_class_and_a_class_that_is_no_number_are_refused_by_name(tmp_path, packing, text, named):
    shard = labelled(tmp_path / f"a{packing}", {1: b"0", 2: text, 3: b"1"})
    with pytest.raises(BadInput, match=rf"{shard}/{named}.*--labels none"):
        load_labels(str(shard), "auto", 3)


@pytest.mark.parametrize("text", [b"%d" % (2**31 - 1), b"\r\n" + b"0" * 80 + b"5" + b" " * 80])
def test_any_whole_number_below_two_to_31_is_a_class(tmp_path, text):
    shard = labelled(tmp_path / "a.tar", {1: b"0", 2: text})
    assert load_labels(str(shard), "auto", 2).names == ["0", str(int(text))]


@pytest.mark.parametrize("first", [True, False])
def test_where_one_shard_has_classes_all_need_some_whichever_comes_first(tmp_path, first):
    classes = {"a": {1: b"0", 2: b"1"}, "b": {3: None, 4: None}}
    (tmp_path / "data").mkdir()
    with_some, without = ("a", "b") if first else ("b", "a")
    labelled(tmp_path / "data" / f"{with_some}.tar", classes["a"])
    labelled(tmp_path / "data" / f"{without}.tar", classes["b"])
    with pytest.raises(BadInput, match=rf"{without}.tar/3.png.*--labels none"):
        load_labels(str(tmp_path / "data"), "auto", 4)


def test_classes_of_no_image_are_no_reason_to_learn_none(tmp_path):
    shard = packed(tmp_path / "a.tar", {"images/1.png": picture(1), "images/2.png": picture(2), "cls/1.cls": b"0"})
    with pytest.raises(BadInput, match=rf"{shard}/images/1.png.*--labels none"):
        load_labels(str(shard), "auto", 2)


def test_a_run_on_shards_learns_their_classes(tmp_path, run):
    labelled(tmp_path / "a.tar", {number: b"3" if number % 2 else b"5" for number in range(8)})
    code, said, err = run("train", tmp_path / "a.tar", "--labels", "auto", "--size", 8, "--steps", 1, "--out",
                          tmp_path / "out", *FAST, "--batch", 4)
    assert code == 0, err
    assert "2 classes" in said and "(3, 5)" in said and ".cls, " not in said and "passed over" not in said
    code, said, err = run("train", tmp_path / "a.tar", "--size", 8, "--steps", 1, "--out", tmp_path / "none", *FAST)
    assert code == 0 and "passed over 8 .cls" in said, err


# ------------------------------------------------------------------------------- latents


def npy(array):
    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue()


def latents(count, dtype=np.float16):
    return np.random.default_rng(0).standard_normal((count, 4, 8, 8)).astype(dtype)


@pytest.mark.parametrize("packing", [".tar", ".tar.gz", ".zip"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_shards_of_latents_are_one_set_with_their_classes(tmp_path, packing, dtype, capsys):
    x, folder = latents(6, dtype), tmp_path / "data"
    folder.mkdir()
    for shard, numbers in enumerate(([2, 0, 1], [4, 3], [5])):
        content = {}
        for number in numbers:
            latent = x[number][None] if number == 4 else x[number]  # as an autoencoder gives a batch of one
            content |= {f"{number}.npy": npy(latent), f"{number}.cls": b"%d" % (number % 2), f"{number}.json": b"{}"}
        packed(folder / f"{shard}{packing}", content)
    packed(folder / f"00{packing}", {"note.txt": b""})
    check_latents(str(folder))
    for settings in ({}, {"cache": tmp_path / "cache"}, {"cache": tmp_path / "cache"}):
        found = load_images(str(folder), labels="auto", **settings)
        assert np.array_equal(found, x) and np.asarray(found).dtype == dtype
    assert "passed over 6 .json, 1 .txt" in capsys.readouterr().out
    assert load_labels(str(folder), "auto", 6).numbers.tolist() == [0, 1, 0, 1, 0, 1]
    assert np.array_equal(load_images(str(folder / f"1{packing}")), x[3:5])
    with pytest.raises(BadInput, match="holds latents: expected images"):
        stream_images(str(folder))


def test_arrays_next_to_images_in_a_shard_are_no_latents(tmp_path, capsys):
    content = {"0.npy": npy(latents(1)[0]), "0.png": picture(0), "1.npy": npy(latents(1)[0]), "1.png": picture(1)}
    assert len(load_images(str(packed(tmp_path / "a.tar", content)))) == 2
    assert "passed over 2 .npy" in capsys.readouterr().out


@pytest.mark.parametrize("packing", [".tar", ".zip"])
@pytest.mark.parametrize(("array", "said"), [
    (np.zeros((3, 8, 8), np.uint8), r"uint8 \(3, 8, 8\)"), (np.zeros((2, 4, 8, 8), np.float16), r"\(2, 4, 8, 8\)"),
    (np.zeros((77, 768), np.float16), r"\(77, 768\)"), (np.zeros((4, 8, 8)), "float64"), (np.zeros(3), r"\(3,\)"),
    (np.full((4, 8, 8), np.nan, np.float16), "NaN"), (np.zeros((4, 8, 9), np.float16), r"\(4, 8, 8\)"),
    (np.array([[[None]]]), "allow_pickle"), (np.zeros((4, 0, 8), np.float16), r"\(4, 0, 8\)"),
    (np.zeros((77, 8), np.float16), r"\(77, 8\)"), (np.zeros(8, np.float16), r"\(8,\)"),
    (np.zeros((), np.float32), r"\(\)")], ids=str)
def test_arrays_that_are_no_latents_are_named_with_their_shard(tmp_path, not_loaded, packing, array, said):
    shard = packed(tmp_path / f"a{packing}", {"0.npy": npy(latents(1)[0]), "1.npy": npy(array)})
    assert re.search(rf"{shard}/1.npy (holds|cannot be read).*{said}", not_loaded(shard))


def test_a_damaged_latent_is_named_and_may_be_left_out(tmp_path, not_loaded):
    x = latents(3)
    shard = packed(tmp_path / "a.tar", {f"{number}.npy": npy(latent) for number, latent in enumerate(x)} |
                   {"1.npy": npy(x[1])[:-3]})
    assert f"{shard}/1.npy cannot be read" in not_loaded(shard)
    left_out = []
    assert np.array_equal(load_images(str(shard), skip_unreadable=True, left_out=left_out), x[[0, 2]])
    assert left_out == [shard / "1.npy"]


def test_shards_of_other_files_are_refused_by_what_they_hold_and_what_is_read(tmp_path, not_loaded):
    message = not_loaded(packed(tmp_path / "a.tar", {"0.pth": b"", "1.pth": b""}))
    assert f"{tmp_path / 'a.tar'} holds no images (2 .pth): expected" in message and ".npy" in message


def test_a_run_on_shards_of_latents_learns_their_classes(tmp_path, run, refused):
    for shard in range(2):
        packed(tmp_path / f"{shard}.tar", {f"{number}.{kind}": content for number, latent in enumerate(latents(4))
                                           for kind, content in (("npy", npy(latent)), ("cls", b"%d" % (number % 2)))})
    command = ["train", tmp_path / "{0..1}.tar", "--labels", "auto", "--out", tmp_path / "out", *FAST, "--batch", 4]
    assert "--size" in refused(*command, "--steps", 1, "--size", 8)
    code, said, err = run(*command, "--steps", 1)
    assert code == 0 and "8 latents of" in said and "2 classes" in said and "passed over" not in said, err


# ------------------------------------------------------------------------------- damage


def test_an_unreadable_image_and_a_damaged_shard_are_named(tmp_path, shards, not_loaded):
    shard = packed(shards / "x.tar", {"a.png": b"", "b.png": PICTURES["b.png"]})
    assert str(shard / "a.png") in not_loaded(shards)
    left_out = []
    assert len(load_images(str(shards), skip_unreadable=True, left_out=left_out)) == 7
    assert left_out == [shard / "a.png"]
    shard.write_bytes(shard.read_bytes()[:700])
    assert str(shard) in not_loaded(shards, skip_unreadable=True)


def test_a_changed_shard_is_decoded_again(tmp_path, shards):
    load_images(str(shards), cache=tmp_path / "cache")
    packed(shards / "x.tar", {"a.png": picture(9)})
    assert len(load_images(str(shards), cache=tmp_path / "cache")) == 7


def test_next_to_images_archives_are_files_of_another_kind(shards, capsys):
    (shards / "a.png").write_bytes(picture(0))
    assert len(load_images(str(shards))) == 1
    assert "passed over 3" in capsys.readouterr().out


@pytest.mark.parametrize("packing", [".zip", ".tar"])
def test_there_may_be_more_shards_than_files_that_may_be_open(tmp_path, packing):
    count = 400
    for number in range(count):
        packed(tmp_path / f"{number:03d}{packing}", {f"{name}/a.png": picture(number) for name in "ab"})
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/dev/fd"))) + 200, limits[1]))
    try:
        images = load_images(str(tmp_path))
        labels = load_labels(str(tmp_path), "auto", 2 * count)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert labels.numbers.tolist() == [0, 1] * count and np.array_equal(images[::2], images[1::2])
    alone = load_images(str(tmp_path / f"399{packing}"))
    assert np.array_equal(images[-2:], alone)


# ------------------------------------------------------------------------------- patterns


@pytest.fixture
def numbered(tmp_path):
    """Ten shards of one image each, and one that no pattern below names."""
    (tmp_path / "data").mkdir()
    for number in range(11):
        labelled(tmp_path / "data" / f"a-{number:03d}.tar", {number: b"%d" % (number % 2)})
    return tmp_path / "data"


@pytest.mark.parametrize(("pattern", "named"), [
    ("a-{000..009}.tar", range(10)), ("a-{008..010}.tar", range(8, 11)), ("a-00{3..4}.tar", [3, 4]),
    ("a-{000..000}.tar", [0]), ("a-{00..01}{0..0}.tar", [0, 10])])
def test_a_pattern_is_the_shards_that_it_names(numbered, tmp_path, pattern, named):
    source, alone = str(numbered / pattern), [f"a-{number:03d}.tar" for number in named]
    expected = np.concatenate([load_images(str(numbered / name)) for name in alone])
    for settings in ({}, {"cache": tmp_path / "cache"}, {"cache": tmp_path / "cache"}):
        assert np.array_equal(load_images(source, **settings), expected)
    assert [path.parent.name for path in stream_images(source).paths()] == alone
    labels = load_labels(source, "auto", len(expected))
    if len(named) > 1 and pattern != "a-{00..01}{0..0}.tar":
        assert labels.numbers.tolist() == [number % 2 for number in named]


@pytest.mark.parametrize(("pattern", "missing"), [("a-{000..011}.tar", "a-011.tar"), ("a-{0..1}.tar", "a-0.tar"),
                                                  ("b-{000..001}{0..1}.tar", "b-0000.tar"),
                                                  ("a-{0000000000..9999999999}.tar", "a-0000000000.tar")])
def test_of_a_pattern_a_shard_that_is_missing_is_named(numbered, refused, pattern, missing, not_loaded):
    assert f"{numbered / missing} is missing" in not_loaded(numbered / pattern)
    said = refused("train", numbered / pattern, "--out", "out", *FAST)
    assert str(numbered / missing) in said and "does not exist" not in said


def test_a_range_that_names_nothing_is_refused_and_a_file_of_that_name_is_a_file(numbered, not_loaded):
    assert "{9..3}" in not_loaded(numbered / "a-{9..3}.tar")
    packed(numbered / "a-{000..001}.tar", {"x.png": picture(5), "y.png": picture(6)})
    assert len(load_images(str(numbered / "a-{000..001}.tar"))) == 2


def test_a_moved_pattern_is_the_same_data_and_another_one_is_not(numbered, tmp_path):
    before = stream_images(str(numbered / "a-{000..001}.tar")).digest
    moved = numbered.rename(tmp_path / "moved")
    assert stream_images(str(moved / "a-{000..001}.tar")).digest == before
    assert stream_images(str(moved / "a-{001..002}.tar")).digest != before


def test_a_run_on_a_pattern_is_named_without_it_and_resumes(numbered, tmp_path, run):
    command = ["train", numbered / "a-{000..009}.tar", "--labels", "auto", "--size", 8, *FAST, "--batch", 4]
    for steps in (1, 2):
        code, said, err = run(*command, "--steps", steps)
        assert code == 0 and "10 images" in said and "2 classes" in said, err
    assert (tmp_path / "runs" / "a" / "checkpoint-00000002.pt").exists()
