"""A folder of archives, such as WebDataset's shards: one set."""

import os
import resource

import numpy as np
import pytest
from support import PICTURES, as_folder, packed, picture

from dansm.scale.data.labels import load_labels
from dansm.scale.data.loader import load_images, stream_images

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
