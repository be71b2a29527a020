"""The cache that keeps what was decoded: found again, shared, never stale, whole after a kill."""

import json
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from support import PICTURES, as_folder, lsun, packed, picture

from dansm.scale.data import cache as kept
from dansm.scale.data.loader import load_images, stream_images
from dansm.scale.data.pictures import Reading
from dansm.scale.data.read import Source, files_of

SOURCES = {"folder": lambda at: as_folder(at / "folder", PICTURES),
           "zip": lambda at: packed(at / "a.zip", PICTURES),
           "tar.gz": lambda at: packed(at / "a.tar.gz", PICTURES),
           "lmdb": lambda at: lsun(at / "lsun", PICTURES)}


@pytest.fixture
def folder(tmp_path):
    return as_folder(tmp_path / "folder", PICTURES)


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def changes(folder):
    """What may happen to a folder of images."""
    yield (folder / "b.png").write_bytes(picture(99))
    os.utime(folder / "b.png", ns=(0, 0))
    yield
    yield (folder / "new.png").write_bytes(picture(98))
    yield (folder / "Z.PNG").unlink()
    yield (folder / "c.gif").rename(folder / "d.gif")


@pytest.mark.parametrize("source", SOURCES)
def test_the_second_call_finds_what_the_first_decoded(tmp_path, decodes, source):
    source, cache = str(SOURCES[source](tmp_path)), tmp_path / "deep" / "cache"
    expected = load_images(source)
    first = load_images(source, cache=cache)
    del decodes[:]
    second = load_images(source, cache=cache)
    assert not decodes
    for found in (first, second):
        assert isinstance(found, np.memmap) and torch.equal(torch.from_numpy(found), expected)
    assert sorted(path.suffix for path in cache.iterdir()) == [".json", ".lock", ".npy"]
    index = json.loads(next(cache.glob("*.json")).read_text())
    assert (index["source"], index["count"], index["size"]) == (source, len(expected), None)


def test_a_stream_has_a_digest_that_its_files_change(folder):
    stream = stream_images(str(folder))
    with stream.open() as (count, entries):
        assert [place for place, _, _, _ in stream.decoded(entries)] == [*range(count)]
    assert stream.digest == stream.digest_now() == stream_images(str(folder)).digest
    (folder / "b.png").write_bytes(picture(99))
    assert stream.digest != stream.digest_now()


def test_a_source_named_otherwise_is_found_too(folder, tmp_path, decodes):
    load_images(str(folder), cache=tmp_path / "cache")
    del decodes[:]
    for name in ("folder", "./folder/", "../" + tmp_path.name + "/folder"):
        load_images(name, cache=Path("cache"))
    assert not decodes


def test_a_changed_source_is_decoded_again(folder, cache, decodes):
    load_images(str(folder), cache=cache)
    for _ in changes(folder):
        expected = load_images(str(folder))
        del decodes[:]
        assert torch.equal(torch.from_numpy(load_images(str(folder), cache=cache)), expected)
        assert len(decodes) == len(expected)
    assert len(list(cache.glob("*.npy"))) == 1


@pytest.mark.parametrize("kind", ["images", "arrays"])
def test_what_version_2_decoded_is_decoded_again_but_for_arrays(tmp_path, cache, kind):
    """Version 3 reads some TIFFs otherwise, and arrays as before."""
    if kind == "images":
        source = as_folder(tmp_path / "old", {"a.png": picture(0)})
    else:
        source = tmp_path / "old"
        source.mkdir()
        np.save(source / "a.npy", np.zeros((3, 8, 8), np.uint8))
    load_images(str(source), cache=cache)
    (index,) = cache.glob("*.json")
    old = Source(source, files_of(source)).digest_for(f"2 {Reading()}")
    index.write_text(json.dumps(json.loads(index.read_text()) | {"digest": old}))
    before = index.stat().st_mtime_ns
    load_images(str(source), cache=cache)
    assert (index.stat().st_mtime_ns == before) == (kind == "arrays")


def test_what_was_left_out_is_told_again_and_refused_where_nothing_may_be(folder, cache, not_loaded):
    (folder / "a9.webp").write_bytes(b"")
    expected = load_images(str(folder), skip_unreadable=True)
    for _ in range(2):
        left_out = []
        found = load_images(str(folder), skip_unreadable=True, left_out=left_out, cache=cache)
        assert left_out == [folder / "a9.webp"] and torch.equal(torch.from_numpy(found), expected)
    assert "a9.webp" in not_loaded(folder, cache=cache)
    assert torch.equal(torch.from_numpy(load_images(str(folder), skip_unreadable=True, cache=cache)), expected)


def test_a_file_that_changes_while_it_is_decoded_is_decoded_again(folder, cache, decodes, monkeypatch):
    def changing(parts, *_):
        (folder / "b.png").write_bytes(picture(99))
        return parts

    with monkeypatch.context() as patch:
        patch.setattr(kept, "with_bar", changing)
        load_images(str(folder), cache=cache)
    expected = load_images(str(folder))
    del decodes[:]
    assert (load_images(str(folder), cache=cache) == expected.numpy()).all() and decodes


@pytest.mark.parametrize("damage", ["cut.npy", "gone.npy", "text.npy", "cut.json", "gone.json", "other.json",
                                    "list.json"])
def test_a_damaged_cache_is_decoded_again(folder, cache, damage):
    expected = load_images(str(folder), cache=cache).copy()
    how, suffix = damage.split(".")
    (path,) = cache.glob(f"*.{suffix}")
    content = path.read_bytes()
    path.unlink()
    if how != "gone":
        path.write_bytes({"cut": content[:-5], "other": b"{}", "list": b"[1]", "text": b"text"}[how])
    assert (load_images(str(folder), cache=cache) == expected).all()


def interrupted(parts, *_):
    for i, part in enumerate(parts):
        if i == 3:
            raise KeyboardInterrupt
        yield part


@pytest.mark.parametrize("source", ["folder", "tar.gz"])
@pytest.mark.parametrize("with_cache", [True, False])
def test_ctrl_c_stops_decoding_and_leaves_nothing_half(tmp_path, cache, source, with_cache, monkeypatch):
    source, before = SOURCES[source](tmp_path), set(threading.enumerate())
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(kept, "with_bar", interrupted)
        load_images(str(source), cache=cache if with_cache else None)
    assert not set(threading.enumerate()) - before
    assert not with_cache or [path.suffix for path in cache.iterdir()] == [".lock"]
    assert len(load_images(str(source), cache=cache)) == len(PICTURES)


@pytest.mark.parametrize(("moment", "number"), [("before", 1), ("after", 1), ("before", 2)])
def test_a_decode_that_is_killed_is_begun_again(folder, cache, decodes, killed, moment, number):
    killed(lambda: load_images(str(folder), cache=cache), moment, number)
    expected = load_images(str(folder))
    del decodes[:]
    assert torch.equal(torch.from_numpy(load_images(str(folder), cache=cache)), expected)
    assert len(decodes) == len(PICTURES)
    assert sorted(path.suffix for path in cache.iterdir()) == [".json", ".lock", ".npy"]


def test_a_kill_between_array_and_index_leaves_no_index_of_another_array(folder, cache, killed):
    before = load_images(str(folder), cache=cache).copy()
    was = (folder / "b.png").stat()
    (folder / "b.png").write_bytes(picture(99))
    killed(lambda: load_images(str(folder), cache=cache), "before", 2)
    (folder / "b.png").write_bytes(PICTURES["b.png"])
    os.utime(folder / "b.png", ns=(was.st_atime_ns, was.st_mtime_ns))
    assert (load_images(str(folder), cache=cache) == before).all()


def test_of_several_at_once_one_decodes(folder, cache, decodes, monkeypatch):
    found = []

    def slowly(parts, *_):
        for part in parts:
            time.sleep(0.01)
            yield part

    monkeypatch.setattr(kept, "with_bar", slowly)
    threads = [threading.Thread(target=lambda: found.append(load_images(str(folder), cache=cache))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and all((images == found[0]).all() for images in found)
    assert len(decodes) == len(PICTURES)


def test_what_does_not_fit_in_memory_is_refused_or_goes_to_the_cache(folder, cache, monkeypatch, not_loaded):
    needed = len(PICTURES) * 3 * 4 * 6
    monkeypatch.setattr("dansm.scale.base.machine.free_memory", lambda _: 2 * needed)
    expected = load_images(str(folder))
    monkeypatch.setattr("dansm.scale.base.machine.free_memory", lambda _: 2 * needed - 2)
    message = not_loaded(folder)
    assert str(folder) in message and "--cache" in message
    assert torch.equal(torch.from_numpy(load_images(str(folder), cache=cache)), expected)


def test_a_disk_without_room_is_told_and_the_cache_left_empty(folder, cache, monkeypatch, not_loaded):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full, raising=False)
        message = not_loaded(folder, cache=cache)
    for told in (cache, "--cache", "No space left on device"):
        assert str(told) in message
    assert [path.suffix for path in cache.iterdir()] == [".lock"]
    assert len(load_images(str(folder), cache=cache)) == len(PICTURES)


def test_room_is_taken_also_where_the_system_cannot_reserve_it(folder, cache, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    assert torch.equal(torch.from_numpy(load_images(str(folder), cache=cache)), load_images(str(folder)))


def test_a_cache_among_the_images_or_in_a_file_is_refused(folder, not_loaded):
    assert f"--cache is {folder / 'cache'}" in not_loaded(folder, cache=folder / "cache")
    message = not_loaded(folder / "sub", cache=folder / "b.png")
    assert str(folder / "b.png") in message and "--cache" in message


@pytest.mark.parametrize("source", ["folder", "zip"])
def test_what_processes_share_is_told_and_found(tmp_path, home, decodes, source, capsys):
    source = str(SOURCES[source](tmp_path))
    expected = load_images(source)
    assert not home.exists() and "decoded" not in capsys.readouterr().out
    load_images(source, share=True)
    (kept,) = home.rglob("*.npy")
    assert str(kept) in capsys.readouterr().out
    del decodes[:]
    assert torch.equal(torch.from_numpy(load_images(source, share=True)), expected) and not decodes
    assert isinstance(load_images(source), torch.Tensor) and decodes
    assert load_images(source, share=True, cache=tmp_path / "own").filename.parent == tmp_path / "own"
    assert list(home.rglob("*.npy")) == [kept]
