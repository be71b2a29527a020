"""Features of real images: the same from any source, and kept so that nothing is measured or decoded twice."""

import json
import os
import random
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from features import PIXELS, SEEN, digits, features_in_batches, seen
from PIL import Image
from support import PICTURES, as_folder, lsun, packed, picture

from dansm import BadInput
from dansm.scale.data import pictures, read
from dansm.scale.data.loader import load_images, stream_images
from dansm.scale.evaluate import real_features as room
from dansm.scale.evaluate.extractors import Extractor
from dansm.scale.evaluate.real_features import real_features

STREAMED = {"folder": lambda at: as_folder(at / "folder", PICTURES), "zip": lambda at: packed(at / "a.zip", PICTURES),
            "tar": lambda at: packed(at / "a.tar", dict(reversed(PICTURES.items()))),
            "lmdb": lambda at: lsun(at / "lsun", {f"{i}": PICTURES[name] for i, name in enumerate(
                sorted(PICTURES, key=Path))})}  # its keys have an order of their own


@pytest.fixture
def counting():
    """An extractor that counts the images it was shown."""
    def extract(images):
        extract.images += len(images)
        return seen(images), None

    extract.images = 0
    return Extractor("counting", "counting", extract)


@pytest.fixture
def folder(tmp_path):
    return as_folder(tmp_path / "folder", PICTURES)


@pytest.fixture
def undecodable(monkeypatch):
    """Called, lets a test fail that decodes an image from then on."""
    return lambda: monkeypatch.setattr(read, "read_image", lambda *_: pytest.fail("decoded"))


def same(real, other):
    return (real.digest, real.count) == (other.digest, other.count) and torch.allclose(
        real.features, other.features, atol=1e-5) and np.allclose(real.mean, other.mean, atol=1e-5) and np.allclose(
        real.covariance, other.covariance, atol=1e-5)


def of_files(source, extractor, cache=None, batch=64, **settings):
    return features_in_batches(batch, stream_images(str(source), **settings), extractor, "cpu", cache=cache)


def kept(cache):
    return list(cache.glob("*.npz"))


def indices(cache):
    return list(cache.glob("*.json"))


def test_statistics_taken_as_batches_come_are_torch_fidelitys():
    from torch_fidelity import metric_fid

    images, _ = digits(300)
    features = PIXELS.extract(images)[0] + 1000  # far from 0, where sums of squares lose their digits
    far = Extractor("far", "far", lambda images: (PIXELS.extract(images)[0] + 1000, None))
    real = features_in_batches(77, images, far, "cpu")
    expected = metric_fid.fid_features_to_statistics(features.double())
    assert np.allclose(real.mean, expected["mu"], rtol=1e-12)
    assert np.allclose(real.covariance, expected["sigma"], atol=1e-9)
    assert real.count == 300 and torch.equal(real.features, features)


def test_of_many_real_images_the_features_of_some_are_kept(monkeypatch):
    monkeypatch.setattr(room, "KEPT", 100)
    images, _ = digits(500)
    real = features_in_batches(64, images, SEEN, "cpu")
    assert (real.count, len(real.features)) == (500, 100)
    assert np.allclose(real.mean, seen(images).mean(0), rtol=1e-5)
    assert {tuple(row) for row in real.features.tolist()} <= {tuple(row) for row in seen(images).tolist()}


# ------------------------------------------------------------------------------- the cache


@pytest.mark.parametrize("form", ["tensor", "array"])
def test_features_of_the_same_real_images_are_measured_once(counting, tmp_path, form):
    images, _ = digits(40)
    images = images if form == "tensor" else images.numpy()
    cache = tmp_path / "new" / "cache"
    first = real_features(images, counting, "cpu", cache=cache)
    again = real_features(images + 0, counting, "cpu", cache=cache)
    assert counting.extract.images == 40 and len(kept(cache)) == 1 and not indices(cache)
    assert first.count == again.count == 40 and torch.equal(first.features, again.features)
    assert (first.mean == again.mean).all() and (first.covariance == again.covariance).all()
    assert first.shape == again.shape == (3, 8, 8)
    images[3, 0, 2, 1] ^= 1
    real_features(images, counting, "cpu", cache=cache)
    real_features(images, counting._replace(key="other"), "cpu", cache=cache)
    assert len(kept(cache)) == 3


@pytest.mark.parametrize("form", ["array", "files"])
def test_calls_side_by_side_measure_the_real_images_once(counting, folder, tmp_path, form):
    begun, extract = threading.Barrier(3), counting.extract
    images = stream_images(str(folder)) if form == "files" else digits(8)[0]

    def slowly(images):
        time.sleep(0.2)
        return extract(images)

    def call():
        begun.wait()
        return real_features(images, counting._replace(extract=slowly), "cpu", cache=tmp_path / "cache")

    with ThreadPoolExecutor(3) as threads:
        results = [call.result() for call in [threads.submit(call) for _ in range(3)]]
    assert extract.images == 8 and all(torch.equal(real.features, results[0].features) for real in results)


@pytest.mark.parametrize("damage", [lambda whole: whole[:-100], lambda whole: b"",
                                    lambda whole: whole[:900] + b"x" * 99 + whole[999:]])
def test_a_damaged_cache_is_measured_again(counting, folder, tmp_path, damage):
    cache = tmp_path / "cache"
    first = of_files(folder, counting, cache)
    (file,) = kept(cache)
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    again = of_files(folder, counting, cache)
    assert counting.extract.images == 2 * len(PICTURES) and torch.equal(first.features, again.features)
    assert kept(cache) == [file] and file.read_bytes() == whole


def test_a_cache_that_cannot_be_written_costs_a_line(counting, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    real_features(digits(40)[0], counting, "cpu", cache=tmp_path / "file" / "cache")
    said = capsys.readouterr().out
    assert "not kept" in said and "--cache" in said

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(room.np, "savez", full)
    real = real_features(digits(40)[0], counting, "cpu", cache=tmp_path / "cache")
    said = capsys.readouterr().out
    assert "No space left on device" in said and "--cache" in said and real.count == 40
    assert not kept(tmp_path / "cache")


# ------------------------------------------------------------------------------- images that come one by one


@pytest.mark.parametrize(("source", "size"), [("folder", None), ("zip", 4), ("tar", None), ("lmdb", 4)])
def test_images_that_come_one_by_one_are_known_as_those_of_an_array(tmp_path, source, size):
    source = str(STREAMED[source](tmp_path))
    expected = real_features(load_images(source, size=size), SEEN, "cpu")
    shapes = []
    real = features_in_batches(3, stream_images(source, size=size), SEEN, "cpu", check=shapes.append)
    assert same(real, expected) and shapes == [(3, 4, size or 6)]
    assert not same(of_files(source, SEEN, size=5), expected)


def test_no_more_images_than_a_few_batches_are_there_at_once(tmp_path, monkeypatch):
    folder, alive, most = as_folder(tmp_path / "folder", {f"{i:03d}.png": picture(i) for i in range(300)}), set(), []
    square = pictures.square

    def counted(*arguments):
        image = np.array(square(*arguments))
        alive.add(id(image))
        weakref.finalize(image, alive.discard, id(image))
        most.append(len(alive))
        return image

    monkeypatch.setattr(pictures, "square", counted)
    monkeypatch.setattr(read.os, "cpu_count", lambda: 2)
    monkeypatch.setattr("dansm.scale.base.machine.free_memory", lambda _: 0)
    real = of_files(folder, SEEN, batch=10)
    assert real.count == len(most) == 300 and max(most) < 4 * 2 + 3 * 10


def test_files_that_are_as_they_were_are_not_decoded_again(counting, folder, tmp_path, undecodable):
    cache, shapes = tmp_path / "cache", []
    first = of_files(folder, counting, cache)
    undecodable()
    again = real_features(stream_images(str(folder)), counting, "cpu", cache=cache, check=shapes.append)
    assert same(again, first) and shapes == [(3, 4, 6)] and counting.extract.images == len(PICTURES)


def changes(folder):
    yield (folder / "b.png").write_bytes(picture(99))
    os.utime(folder / "b.png", ns=(0, 0))
    yield
    yield (folder / "new.png").write_bytes(picture(98))
    yield (folder / "Z.PNG").unlink()
    yield (folder / "c.gif").rename(folder / "d.gif")


def test_a_changed_file_never_has_the_features_of_what_it_was(counting, folder, tmp_path):
    cache, known = tmp_path / "cache", SEEN._replace(key=counting.key)
    of_files(folder, counting, cache)
    for _ in changes(folder):
        expected = real_features(load_images(str(folder)), known, "cpu")
        assert same(of_files(folder, counting, cache), expected)
    assert of_files(folder, counting, cache, size=4).digest != expected.digest


def test_another_folder_with_equal_names_sizes_and_dates_has_features_of_its_own(counting, tmp_path):
    folders = []
    for name in ("train", "test"):
        folders.append(as_folder(tmp_path / name, PICTURES))
        for path in folders[-1].rglob("*.*"):
            Image.fromarray(np.full((4, 6, 3), 9 * len(path.name) + len(name), np.uint8)).save(path, "bmp")
            os.utime(path, ns=(0, 0))
    first, second = (of_files(folder, counting, tmp_path / "cache") for folder in folders)
    assert first.digest != second.digest and counting.extract.images == 2 * len(PICTURES)


def test_a_file_that_changes_while_it_is_read_leaves_no_index_of_the_files(counting, folder, tmp_path):
    cache, was = tmp_path / "cache", (folder / "b.png").stat()

    def changing(images):
        (folder / "b.png").write_bytes(picture(99))
        return counting.extract(images)

    of_files(folder, counting._replace(extract=changing), cache)
    assert len(kept(cache)) == 1 and not indices(cache)
    (folder / "b.png").write_bytes(PICTURES["b.png"])
    os.utime(folder / "b.png", ns=(was.st_atime_ns, was.st_mtime_ns))
    assert same(of_files(folder, counting, cache),
                real_features(load_images(str(folder)), SEEN._replace(key=counting.key), "cpu"))


@pytest.mark.parametrize("source", ["array", *STREAMED])
def test_the_same_images_elsewhere_have_the_features_that_are_kept(counting, tmp_path, undecodable, source):
    moved, cache = as_folder(tmp_path / "moved" / "folder", PICTURES), tmp_path / "cache"
    (tmp_path / "source").mkdir()
    first = load_images(str(moved)) if source == "array" else stream_images(str(STREAMED[source](tmp_path / "source")))
    first = real_features(first, counting, "cpu", cache=cache)
    again = of_files(moved, counting, cache)
    assert counting.extract.images == len(PICTURES) and len(kept(cache)) == 1
    assert again.digest == first.digest and (again.mean == first.mean).all()  # the very same: rows are not to differ
    undecodable()
    of_files(moved, counting, cache)


def test_images_of_another_count_than_all_that_are_kept_are_decoded_once(counting, folder, tmp_path, monkeypatch):
    decoded = []
    read_image = read.read_image
    monkeypatch.setattr(read, "read_image", lambda *arguments: decoded.append(0) or read_image(*arguments))
    of_files(folder, counting, tmp_path / "cache")
    assert len(decoded) == 8
    of_files(as_folder(tmp_path / "more", PICTURES | {"d.png": picture(9)}), counting, tmp_path / "cache")
    assert len(decoded) == 8 + 9


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_unreadable_images_are_left_out_and_do_not_change_what_the_others_are(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(room, "KEPT", 10)
    broken = {f"{i:02d}.png": picture(i) if i % 3 else b"" for i in range(40)}
    reversed_ = dict(reversed(broken.items()))
    source = as_folder(tmp_path / "a", broken) if kind == "folder" else packed(tmp_path / "a.tar", reversed_)
    with pytest.raises(BadInput, match=r"\.png cannot be read.*--skip-unreadable"):
        of_files(source, SEEN)
    real = of_files(source, SEEN, tmp_path / "cache", batch=7, skip_unreadable=True)
    rest = load_images(str(source), skip_unreadable=True)
    expected = real_features(rest, SEEN, "cpu")
    assert real.digest == expected.digest and (real.count, len(real.features)) == (26, 10)
    assert same(real, expected) and torch.allclose(real.features, seen(rest[room.kept_places(26)]), atol=1e-5)
    again = of_files(source, SEEN, tmp_path / "cache", skip_unreadable=True)
    assert real.left_out == again.left_out == tuple(range(0, 40, 3)) and expected.left_out == ()
    with pytest.raises(BadInput, match="cannot be read"):  # what was left out is not forgotten
        of_files(source, SEEN, tmp_path / "cache")


def forget_what_was_left_out(cache):
    """Leave the index as an earlier version wrote it."""
    (index,) = indices(cache)
    index.write_text(json.dumps({"features": json.loads(index.read_text())["features"]}))


def test_an_index_that_does_not_tell_what_was_left_out_is_made_again(counting, tmp_path):
    source, cache = as_folder(tmp_path / "broken", PICTURES | {"x.png": b""}), tmp_path / "cache"
    of_files(source, counting, cache, skip_unreadable=True)
    forget_what_was_left_out(cache)
    for _ in range(2):
        assert of_files(source, counting, cache, skip_unreadable=True).left_out == (8,)
    assert counting.extract.images == 2 * 8


def test_an_index_of_an_earlier_version_holds_where_nothing_may_be_left_out(folder, tmp_path, undecodable):
    real = of_files(folder, SEEN, tmp_path / "cache")
    forget_what_was_left_out(tmp_path / "cache")
    undecodable()
    assert same(of_files(folder, SEEN, tmp_path / "cache"), real)


@pytest.mark.parametrize("source", ["tar", "zip"])
def test_the_images_that_are_kept_do_not_depend_on_the_order_they_come_in(tmp_path, monkeypatch, source):
    monkeypatch.setattr(room, "KEPT", 5)
    content = {f"{i:02d}.png": picture(i) for i in range(40)}
    folder, names = as_folder(tmp_path / "folder", content), list(content)
    random.Random(1).shuffle(names)
    archive = packed(tmp_path / f"a.{source}", {name: content[name] for name in names})
    of_folder = of_files(folder, SEEN, batch=7)
    assert same(of_folder, of_files(archive, SEEN, batch=9))
    assert same(of_folder, real_features(load_images(str(folder)), SEEN, "cpu"))
    assert len(of_folder.features) == 5


def test_bad_images_that_come_one_by_one_are_refused_by_name(tmp_path):
    def refused(source, **settings):
        with pytest.raises(BadInput) as refusal:
            of_files(source, SEEN, batch=2, **settings)
        return str(refusal.value)

    mixed = as_folder(tmp_path / "mixed", {"a.png": picture(0), "c.png": picture(2, size=(5, 4))} | {
        f"d{i}.png": picture(i) for i in range(9)})
    said = refused(mixed)
    assert str(mixed / "a.png") in said and str(mixed / "c.png") in said
    few = as_folder(tmp_path / "few", {f"{i}.png": picture(i) if i < 3 else b"" for i in range(9)})
    assert "3 real images" in refused(few, skip_unreadable=True)
    assert "0 real images" in refused(as_folder(tmp_path / "none", {f"{i}.png": b"" for i in range(9)}),
                                      skip_unreadable=True)
    np.save(tmp_path / "a.npy", np.zeros((9, 4, 4, 4), np.float16))
    assert "latents" in refused(tmp_path / "a.npy")


@pytest.mark.parametrize("source", ["folder", "zip", "tar"])
def test_ctrl_c_stops_what_is_decoded_and_keeps_nothing_half(tmp_path, source):
    source, cache, before = STREAMED[source](tmp_path), tmp_path / "cache", set(threading.enumerate())

    def interrupted(images):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        of_files(source, SEEN._replace(extract=interrupted), cache, batch=2)
    after = {thread for thread in threading.enumerate() if "Refresh" not in type(thread).__name__}  # of the bar
    assert not after - before and [path.suffix for path in cache.iterdir()] == [".lock"]
