"""Images from archives and LSUN's lmdb, latents, and the cache that keeps what was decoded."""

import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from dansm.scale.data import cache, loader, read
from dansm.scale.data import loader as data
from dansm.scale.data.loader import load_images
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from support import PACKINGS, PICTURES, as_folder, lsun, packed, picture

from dansm import BadInput


@pytest.fixture
def expected(tmp_path):
    return load_images(str(as_folder(tmp_path / "folder", PICTURES)))


# ------------------------------------------------------------------------------- archives


@pytest.mark.parametrize("packing", PACKINGS)
def test_an_archive_gives_the_images_of_the_folder_that_it_packs(tmp_path, expected, packing):
    names = list(PICTURES)
    random.Random(2).shuffle(names)
    content = {"./notes.txt": b"no image", "sub/": b"", **{name: PICTURES[name] for name in names},
               "__MACOSX/sub/._c.png": b"of macOS", "sub/._c.png": b"of macOS"}
    archive = packed(tmp_path / f"images{packing}", content, kinds={"sub/": tarfile.DIRTYPE})
    assert torch.equal(load_images(str(archive)), expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["folder", archive.name])  # nothing unpacked


@pytest.mark.parametrize("packing", PACKINGS)
def test_an_unreadable_image_of_an_archive_is_named_or_left_out(tmp_path, expected, packing):
    names = read.find_files(tmp_path / "folder")
    broken = names[2].relative_to(tmp_path / "folder").as_posix()
    archive = packed(tmp_path / f"images{packing}", {**PICTURES, broken: PICTURES[broken][:30]})
    with pytest.raises(BadInput, match=rf"{archive / broken} cannot be read.*--skip-unreadable"):
        load_images(str(archive))
    left_out = []
    rest = load_images(str(archive), skip_unreadable=True, left_out=left_out)
    assert torch.equal(rest, expected[[0, 1, *range(3, len(expected))]]) and left_out == [archive / broken]


def test_what_is_left_out_of_a_tar_is_told_in_the_order_of_the_names(tmp_path):
    archive, left_out = packed(tmp_path / "a.tar", {"c.png": b"", "b.png": PICTURES["b.png"], "a.png": b""}), []
    load_images(str(archive), skip_unreadable=True, left_out=left_out)
    assert left_out == [archive / "a.png", archive / "c.png"]


def test_a_damaged_byte_in_a_zip_is_told_by_its_checksum(tmp_path):
    archive = packed(tmp_path / "a.zip", {"a.bmp": picture(0, ".bmp"), "b.bmp": picture(1, ".bmp")})
    content = bytearray(archive.read_bytes())
    content[content.index(picture(1, ".bmp")) + 60] ^= 1
    archive.write_bytes(content)
    with pytest.raises(BadInput, match=r"b\.bmp cannot be read"):
        load_images(str(archive))


def test_lsun_gives_its_images_in_the_order_of_the_keys(tmp_path):
    content = {f"{seed * 7919 % 997:040x}": picture(seed, suffix) for seed, suffix in
               enumerate([".webp", ".jpg", ".png"] * 20)}
    folder = as_folder(tmp_path / "folder", {f"{key}.png": payload for key, payload in content.items()})
    assert torch.equal(load_images(str(lsun(tmp_path / "bedroom_train_lmdb", content))), load_images(str(folder)))


def test_an_unreadable_value_of_an_lmdb_is_named_by_its_key_or_left_out(tmp_path):
    folder = lsun(tmp_path / "church", {"0a": PICTURES["b.png"], "0b": b"none", "0c": PICTURES["sub/c.png"]})
    with pytest.raises(BadInput, match=r"church/0b cannot be read"):
        load_images(str(folder))
    left_out = []
    assert len(load_images(str(folder), skip_unreadable=True, left_out=left_out)) == 2
    assert left_out == [folder / "0b"]


def test_a_missing_lmdb_package_is_named(tmp_path, monkeypatch):
    (tmp_path / "data.mdb").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(BadInput, match=r"pip install 'dansm\[lsun\]'"):
        load_images(str(tmp_path))


@pytest.mark.parametrize("size", [0, 1, 100, 4096, 8191, 8192, 20_000, -4096, -1])
def test_an_lmdb_that_is_cut_off_is_refused(tmp_path, size):
    folder = lsun(tmp_path / "church", {f"{seed:04x}": picture(seed, size=(32, 32)) for seed in range(20)})
    whole = (folder / "data.mdb").read_bytes()
    (folder / "data.mdb").write_bytes(whole[:size])
    with pytest.raises(BadInput, match="church"):
        load_images(str(folder))


def test_a_file_that_is_no_lmdb_and_an_empty_lmdb_are_refused(tmp_path):
    with pytest.raises(BadInput, match=r"holds no images"):
        load_images(str(lsun(tmp_path / "empty", {})))
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "data.mdb").write_bytes(b"a text" * 5000)
    with pytest.raises(BadInput, match=r"text cannot be read"):
        load_images(str(tmp_path / "text"))


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("name", ["../a.png", "/a.png", "sub/../../a.png", "C:\\a.png", "C:a.png", "..\\a.png",
                                  "\\a.png", "../b"])
def test_an_archive_that_points_outside_is_refused(tmp_path, packing, name):
    archive = packed(tmp_path / f"images{packing}", {"b.png": PICTURES["b.png"], name: PICTURES["b.png"]})
    with pytest.raises(BadInput, match=rf"{archive} points outside of itself") as refused:
        load_images(str(archive), skip_unreadable=True)
    assert repr(name) in str(refused.value)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
@pytest.mark.parametrize("packing", [".tar", ".tar.gz"])
def test_a_link_in_a_tar_is_refused(tmp_path, packing, kind):
    archive = packed(tmp_path / f"a{packing}", {"b.png": PICTURES["b.png"], "c.png": b""}, kinds={"c.png": kind})
    with pytest.raises(BadInput, match=r"holds a link \('c\.png'\)"):
        load_images(str(archive))


def test_a_link_in_a_zip_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        link = zipfile.ZipInfo("c.png")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(BadInput, match=r"holds a link \('c\.png'\)"):
        load_images(str(tmp_path / "a.zip"))


def test_an_encrypted_zip_is_refused(tmp_path):
    archive = packed(tmp_path / "a.zip", {"b.png": PICTURES["b.png"]})
    content = bytearray(archive.read_bytes())
    content[6] |= 1
    content[content.index(b"PK\1\2") + 8] |= 1
    archive.write_bytes(content)
    with pytest.raises(BadInput, match=r"a\.zip is encrypted.*password"):
        load_images(str(archive), skip_unreadable=True)


def test_a_zip_that_swells_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    archive = packed(tmp_path / "a.deflated.zip", {"a.png": PICTURES["b.png"], "b.bmp": bytes(read.HURTS + 1)})
    monkeypatch.setattr(zipfile.ZipFile, "open", None)
    with pytest.raises(BadInput, match=r"b\.bmp unpacks to 16,777,217 bytes: expected"):
        load_images(str(archive), skip_unreadable=True)


@pytest.mark.parametrize("packing", [".tar", ".tar.gz"])
def test_a_tar_with_a_member_too_large_is_refused_before_it_is_read(tmp_path, packing):
    header = tarfile.TarInfo("a.png")
    header.size = read.LARGEST + 1
    content = header.tobuf()
    (tmp_path / f"a{packing}").write_bytes(gzip.compress(content) if packing.endswith("gz") else content)
    with pytest.raises(BadInput, match=r"a\.png unpacks to 1,073,741,825 bytes"):
        load_images(str(tmp_path / f"a{packing}"))


def test_a_tar_that_swells_as_a_whole_is_refused(tmp_path, monkeypatch):
    archive = packed(tmp_path / "a.tar.gz", {f"{i}.bmp": bytes(10**6) for i in range(5)})
    monkeypatch.setattr(read, "LARGEST", 3 * 10**6)
    with pytest.raises(BadInput, match=r"[23]\.bmp unpacks to"):
        load_images(str(archive))


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
@pytest.mark.parametrize("first", [True, False])
def test_a_tar_with_a_name_that_fills_the_memory_is_refused(tmp_path, kind, first):
    header = tarfile.TarInfo("name")
    header.size, header.type = 2**40, kind
    before = b"" if first else tarfile.TarInfo("sub/a").tobuf()
    (tmp_path / "a.tar").write_bytes(before + header.tobuf(tarfile.GNU_FORMAT))
    with pytest.raises(BadInput, match=r"a\.tar: .*1,099,511,627,776 bytes"):
        load_images(str(tmp_path / "a.tar"))


@pytest.mark.parametrize("limit", [23, 11])  # of 24 pixels: Pillow warns of the one and refuses the other
@pytest.mark.parametrize("packing", ["", ".zip", ".tar"])
def test_an_image_over_pillows_limit_is_refused_or_left_out(tmp_path, monkeypatch, limit, packing):
    content = {"a.png": picture(0, size=(2, 2)), "b.png": picture(0)}
    source = packed(tmp_path / f"a{packing}", content) if packing else as_folder(tmp_path / "a", content)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        with pytest.raises(BadInput, match=rf"b\.png has more than the {limit} pixels"):
            load_images(str(source))
        assert load_images(str(source), skip_unreadable=True).shape == (1, 3, 2, 2)
    assert not warned


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("part", [0, 0.01, 0.3, 0.5, 0.9])
def test_an_archive_that_is_cut_off_is_refused_by_name(tmp_path, packing, part):
    archive = packed(tmp_path / f"images{packing}", {f"{seed}.png": picture(seed, size=(64, 64)) for seed in range(9)})
    content = archive.read_bytes()
    archive.write_bytes(content[: int(part * len(content))])
    with pytest.raises(BadInput, match=rf"{archive} .*expected a whole"):
        load_images(str(archive), skip_unreadable=True)


def test_a_tar_that_is_cut_off_between_two_images_is_refused(tmp_path):
    archive = packed(tmp_path / "a.tar", {f"{seed}.png": picture(seed) for seed in range(9)})
    content = archive.read_bytes()
    for blocks in range(2, 18):
        archive.write_bytes(content[: 512 * blocks])
        with pytest.raises(BadInput, match=r"a\.tar .*expected a whole"):
            load_images(str(archive), skip_unreadable=True)
    archive.write_bytes(content[: 512 * 19])
    assert len(load_images(str(archive))) == 9


@pytest.mark.parametrize("packing", [".zip", ".deflated.zip", ".tar", ".tar.gz", ".tar.xz"])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(places=st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=5), cut=st.booleans(),
       value=st.integers(0, 255))
def test_a_damaged_archive_is_read_or_refused_and_nothing_else(tmp_path, packing, places, cut, value):
    archive = packed(tmp_path / f"images{packing}", PICTURES)
    content = bytearray(archive.read_bytes())
    for place in places:
        content[int(place * len(content))] = value
    archive.write_bytes(content[: int(places[0] * len(content))] if cut else content)
    try:
        assert load_images(str(archive), skip_unreadable=True, size=4).shape[1:] == (3, 4, 4)
    except BadInput as error:
        assert str(archive) in str(error)


@pytest.mark.parametrize("packing", PACKINGS)
def test_an_archive_without_images_is_refused(tmp_path, packing):
    for content in ({}, {"notes.txt": b"none"}):
        with pytest.raises(BadInput, match=r"holds no images"):
            load_images(str(packed(tmp_path / f"images{packing}", content)))


def test_a_file_of_another_kind_is_refused_naming_what_is_expected(tmp_path):
    (tmp_path / "a.rar").write_bytes(b"")
    with pytest.raises(BadInput, match=r"a\.rar is a file: expected a folder of images, a \.zip or \.tar"):
        load_images(str(tmp_path / "a.rar"))
    with pytest.raises(BadInput, match="does not exist"):
        load_images(str(tmp_path / "b.zip"))


# ------------------------------------------------------------------------------- latents


def latents(count, dtype=np.float16, shape=(4, 2, 3), seed=0):
    return np.random.default_rng(seed).standard_normal((count, *shape)).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_one_file_of_latents_stays_on_the_disk(tmp_path, dtype):
    np.save(tmp_path / "a.npy", latents(50, dtype))
    found = load_images(str(tmp_path / "a.npy"))
    assert isinstance(found, np.memmap) and found.dtype == dtype and (found == latents(50, dtype)).all()


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_folder_of_latents_comes_in_the_order_of_the_names_one_a_file_or_many(tmp_path, dtype):
    x = latents(30, dtype)
    for name in ("one", "shards"):
        (tmp_path / name).mkdir()
    for i, latent in enumerate(x):
        np.save(tmp_path / "one" / f"{i:03d}.npy", latent)
    for name, part in (("shards/c", x[17:]), ("shards/a", x[:5]), ("shards/b", np.asfortranarray(x[5:6])),
                       ("shards/bb", x[6:17])):
        np.save(tmp_path / f"{name}.npy", part)
    for folder in ("one", "shards"):
        seen = []

        def track(parts, total, seen=seen):
            for part in parts:
                seen.append(total)
                yield part

        found = load_images(str(tmp_path / folder), track=track)
        assert found.dtype == torch.from_numpy(x).dtype and torch.equal(found, torch.from_numpy(x))
        assert seen == [len(list((tmp_path / folder).glob("*.npy")))] * len(seen) and seen
        assert (load_images(str(tmp_path / folder), cache=tmp_path / "cache") == x).all()


class Bomb:
    """Pickled, it is the order to create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def bad_latents(folder):
    """Files that are no latents, by what their refusal says."""
    spoiled = {"NaN": latents(2000), "inf": latents(5)}
    spoiled["NaN"][1999, 0, 1, 1], spoiled["inf"][0, 0, 0, 0] = np.nan, -np.inf
    np.save(folder / "nan.npy", spoiled["NaN"])
    np.save(folder / "inf.npy", spoiled["inf"])
    np.save(folder / "integers.npy", latents(5).astype(int))
    np.save(folder / "doubles.npy", latents(5).astype(float))
    np.save(folder / "other order.npy", latents(5).astype(">f4"))
    np.save(folder / "flat.npy", latents(5).reshape(5, -1))
    np.save(folder / "none.npy", latents(0))
    np.save(folder / "code.npy", np.array([[[[Bomb(folder / "bang")]]]], object), allow_pickle=True)
    np.savez(folder / "several.npz", latents(5))
    (folder / "several.npz").rename(folder / "several.npy")
    np.save(folder / "whole.npy", latents(5))
    (folder / "cut.npy").write_bytes((folder / "whole.npy").read_bytes()[:-1])
    (folder / "whole.npy").unlink()
    (folder / "empty.npy").write_bytes(b"")
    (folder / "text.npy").write_bytes(b"a text")
    return sorted(folder.glob("*.npy"))


def test_bad_latents_are_refused_by_name_and_no_code_in_them_runs(tmp_path):
    paths = bad_latents(tmp_path)
    assert len(paths) == 12
    for path in paths:
        with pytest.raises(BadInput, match="expected") as refused:
            load_images(str(path))
        assert str(path) in str(refused.value)
        (folder := tmp_path / path.stem).mkdir()
        np.save(folder / "a.npy", latents(5))
        path.rename(folder / "b.npy")
        with pytest.raises(BadInput, match="expected") as refused:
            load_images(str(folder))
        assert str(folder / "b.npy") in str(refused.value)
    assert not (tmp_path / "bang").exists()


def test_latents_of_unequal_shape_or_type_are_refused_naming_two(tmp_path):
    np.save(tmp_path / "a.npy", latents(2)[0])
    for other in (latents(1, np.float32)[0], latents(1, shape=(4, 3, 3))[0], latents(1)):
        np.save(tmp_path / "b.npy", other)
        with pytest.raises(BadInput, match=r"b\.npy.*expected latents"):
            load_images(str(tmp_path))


def test_latents_are_not_resized(tmp_path):
    np.save(tmp_path / "a.npy", latents(2))
    for source in (tmp_path, tmp_path / "a.npy"):
        with pytest.raises(BadInput, match=r"--size is 64.*latents"):
            load_images(str(source), size=64)


def test_an_unreadable_file_of_latents_may_be_left_out(tmp_path):
    for i in range(3):
        np.save(tmp_path / f"{i}.npy", latents(3)[i])
    (tmp_path / "1.npy").write_bytes(b"")
    left_out = []
    found = load_images(str(tmp_path), skip_unreadable=True, left_out=left_out)
    assert (found.numpy() == latents(3)[[0, 2]]).all() and left_out == [tmp_path / "1.npy"]


def test_images_beside_latents_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", latents(2))
    (tmp_path / "b.png").write_bytes(picture(0))
    with pytest.raises(BadInput, match=r"b\.png.*a\.npy.*expected one kind"):
        load_images(str(tmp_path))


# ------------------------------------------------------------------------------- the cache


@pytest.fixture
def decodes(monkeypatch):
    """The files that were decoded, as they are."""
    decoded, read_image = [], read.read_image

    def watched(path, *arguments):
        decoded.append(path.name)
        return read_image(path, *arguments)

    monkeypatch.setattr(read, "read_image", watched)
    return decoded


SOURCES = {"folder": lambda at: as_folder(at / "folder", PICTURES),
           "zip": lambda at: packed(at / "a.zip", PICTURES),
           "tar.gz": lambda at: packed(at / "a.tar.gz", PICTURES),
           "lmdb": lambda at: lsun(at / "lsun", PICTURES)}


@pytest.mark.parametrize("source", SOURCES)
def test_the_second_call_finds_what_the_first_decoded(tmp_path, decodes, source):
    source, cache = str(SOURCES[source](tmp_path)), tmp_path / "deep" / "cache"
    expected = load_images(source)
    first = load_images(source, cache=cache)
    del decodes[:]
    second = load_images(source, cache=cache, track=None)
    assert not decodes
    for found in (first, second):
        assert isinstance(found, np.memmap) and torch.equal(torch.from_numpy(found), expected)
    assert sorted(path.suffix for path in cache.iterdir()) == [".json", ".lock", ".npy"]
    index = json.loads(next(cache.glob("*.json")).read_text())
    assert (index["source"], index["count"], index["size"]) == (source, len(expected), None)


def test_a_source_named_otherwise_is_found_too(tmp_path, decodes, monkeypatch):
    source, cache = as_folder(tmp_path / "folder", PICTURES), tmp_path / "cache"
    load_images(str(source), cache=cache)
    del decodes[:]
    monkeypatch.chdir(tmp_path)
    for name in ("folder", "./folder/", "../" + tmp_path.name + "/folder"):
        load_images(name, cache=Path("cache"))
    assert not decodes


def test_another_size_is_kept_beside(tmp_path, decodes):
    source, cache = str(as_folder(tmp_path / "folder", PICTURES)), tmp_path / "cache"
    whole, small = load_images(source, cache=cache), load_images(source, cache=cache, size=2)
    del decodes[:]
    assert (load_images(source, cache=cache) == whole).all() and small.shape == (8, 3, 2, 2)
    assert (load_images(source, cache=cache, size=2) == small).all() and not decodes


def changed(folder):
    """What may happen to a folder of images."""
    yield (folder / "b.png").write_bytes(picture(99))
    os.utime(folder / "b.png", ns=(0, 0))
    yield
    yield (folder / "new.png").write_bytes(picture(98))
    yield (folder / "Z.PNG").unlink()
    yield (folder / "c.gif").rename(folder / "d.gif")


def test_a_changed_source_is_decoded_anew(tmp_path, decodes):
    folder, cache = as_folder(tmp_path / "folder", PICTURES), tmp_path / "cache"
    load_images(str(folder), cache=cache)
    for _ in changed(folder):
        expected = load_images(str(folder))
        del decodes[:]
        assert torch.equal(torch.from_numpy(load_images(str(folder), cache=cache)), expected)
        assert len(decodes) == len(expected)
    assert len(list(cache.glob("*.npy"))) == 1


def test_what_was_left_out_is_told_again_and_refused_where_nothing_may_be(tmp_path):
    folder, cache = as_folder(tmp_path / "folder", {**PICTURES, "a9.webp": b""}), tmp_path / "cache"
    expected = load_images(str(folder), skip_unreadable=True)
    for _ in range(2):
        left_out = []
        found = load_images(str(folder), skip_unreadable=True, left_out=left_out, cache=cache)
        assert left_out == [folder / "a9.webp"] and torch.equal(torch.from_numpy(found), expected)
    with pytest.raises(BadInput, match=r"a9\.webp cannot be read"):
        load_images(str(folder), cache=cache)
    assert torch.equal(torch.from_numpy(load_images(str(folder), skip_unreadable=True, cache=cache)), expected)


@pytest.mark.parametrize("damage", ["cut.npy", "gone.npy", "text.npy", "cut.json", "gone.json", "other.json",
                                    "list.json"])
def test_a_damaged_cache_is_decoded_anew(tmp_path, damage):
    folder, cache = as_folder(tmp_path / "folder", PICTURES), tmp_path / "cache"
    expected = load_images(str(folder), cache=cache).copy()
    how, suffix = damage.split(".")
    (path,) = cache.glob(f"*.{suffix}")
    content = path.read_bytes()
    path.unlink()
    if how != "gone":
        path.write_bytes({"cut": content[:-5], "other": b"{}", "list": b"[1]", "text": b"text"}[how])
    assert (load_images(str(folder), cache=cache) == expected).all()


def interrupted(parts, total):
    for i, part in enumerate(parts):
        if i == 3:
            raise KeyboardInterrupt
        yield part


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("with_cache", [True, False])
def test_ctrl_c_stops_decoding_and_leaves_nothing_half(tmp_path, source, with_cache):
    source, cache, before = SOURCES[source](tmp_path), tmp_path / "cache", set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt):
        load_images(str(source), track=interrupted, cache=cache if with_cache else None)
    assert not set(threading.enumerate()) - before
    assert not with_cache or [path.suffix for path in cache.iterdir()] == [".lock"]
    assert len(load_images(str(source), cache=cache)) == len(PICTURES)


KILLED = """
import os, signal, sys
from pathlib import Path
from dansm.scale.data import loader

def track(parts, total):
    for i, part in enumerate(parts):
        if i == 3 and sys.argv[3] == "decoding":
            os.kill(os.getpid(), signal.SIGKILL)
        yield part

replace, times = os.replace, []
def killing(*arguments):
    times.append(0)
    if f"replace {len(times)}" == sys.argv[3]:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*arguments)

os.replace = killing
loader.load_images(sys.argv[1], cache=Path(sys.argv[2]), track=track)
"""


@pytest.mark.parametrize("moment", ["decoding", "replace 1", "replace 2"])
def test_a_decode_that_is_killed_is_begun_anew(tmp_path, decodes, moment):
    folder, cache = as_folder(tmp_path / "folder", PICTURES), tmp_path / "cache"
    ended = subprocess.run([sys.executable, "-c", KILLED, str(folder), str(cache), moment],
                           cwd=Path(loader.__file__).parent.parent)
    assert ended.returncode == -signal.SIGKILL
    expected = load_images(str(folder))
    del decodes[:]
    assert torch.equal(torch.from_numpy(load_images(str(folder), cache=cache)), expected)
    assert len(decodes) == len(PICTURES)
    assert sorted(path.suffix for path in cache.iterdir()) == [".json", ".lock", ".npy"]


def test_a_kill_between_array_and_index_leaves_no_index_of_another_array(tmp_path, monkeypatch):
    folder, cache, replace, calls = as_folder(tmp_path / "folder", PICTURES), tmp_path / "cache", os.replace, []
    before = load_images(str(folder), cache=cache).copy()
    was = (folder / "b.png").stat()

    def killed_the_second_time(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise SystemExit("killed")
        replace(*arguments)

    (folder / "b.png").write_bytes(picture(99))
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(os, "replace", killed_the_second_time)
        load_images(str(folder), cache=cache)
    (folder / "b.png").write_bytes(PICTURES["b.png"])
    os.utime(folder / "b.png", ns=(was.st_atime_ns, was.st_mtime_ns))
    assert (load_images(str(folder), cache=cache) == before).all()


@pytest.mark.skipif(cache.fcntl is None, reason="no locks between processes")
def test_of_several_at_once_one_decodes(tmp_path, decodes):
    folder, cache, found = as_folder(tmp_path / "folder", PICTURES), tmp_path / "cache", []

    def slowly(parts, total):
        for part in parts:
            time.sleep(0.01)
            yield part

    threads = [threading.Thread(target=lambda: found.append(load_images(str(folder), cache=cache, track=slowly)))
               for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and all((images == found[0]).all() for images in found)
    assert len(decodes) == len(PICTURES)


def test_what_does_not_fit_in_memory_is_refused_or_goes_to_the_cache(tmp_path, monkeypatch):
    folder = as_folder(tmp_path / "folder", PICTURES)
    needed = len(PICTURES) * 3 * 4 * 6
    monkeypatch.setattr(data, "free_memory", lambda _: 2 * needed)
    expected = load_images(str(folder))
    monkeypatch.setattr(data, "free_memory", lambda _: 2 * needed - 2)
    with pytest.raises(BadInput, match=r"takes .* GB decoded.*--cache"):
        load_images(str(folder))
    assert torch.equal(torch.from_numpy(load_images(str(folder), cache=tmp_path / "cache")), expected)


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="room is taken otherwise")
def test_a_full_disk_is_told_and_the_cache_left_empty(tmp_path, monkeypatch):
    folder, cache = as_folder(tmp_path / "folder", PICTURES), tmp_path / "cache"

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(BadInput, match=rf"kept in {cache}: No space left on device.*--cache of dansm train"):
        load_images(str(folder), cache=cache)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]
    monkeypatch.delattr(os, "posix_fallocate")
    assert torch.equal(torch.from_numpy(load_images(str(folder), cache=cache)), load_images(str(folder)))


def test_a_cache_among_the_images_or_in_a_file_is_refused(tmp_path):
    folder = as_folder(tmp_path / "folder", PICTURES)
    with pytest.raises(BadInput, match=r"--cache is .*inside"):
        load_images(str(folder), cache=folder / "cache")
    with pytest.raises(BadInput, match=r"cannot be kept in .*b\.png.*--cache"):
        load_images(str(folder / "sub"), cache=folder / "b.png")


def test_a_disk_without_room_for_all_is_told_before_it_is_filled(tmp_path, monkeypatch):
    folder, cache, needed = as_folder(tmp_path / "folder", PICTURES), tmp_path / "cache", len(PICTURES) * 3 * 4 * 6
    free = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: free._replace(free=needed - 1))
        patch.setattr(os, "posix_fallocate", lambda *_: pytest.fail("filled"), raising=False)
        with pytest.raises(BadInput, match=rf"folder takes .* GB decoded, and the disk of {cache} has .*--cache"):
            load_images(str(folder), cache=cache)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free._replace(free=needed))
    assert len(load_images(str(folder), cache=cache)) == len(PICTURES)


@pytest.fixture
def home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))  # the same on Windows
    return tmp_path / "home"


@pytest.mark.parametrize("source", SOURCES)
def test_what_processes_share_is_told_and_found_by_those_who_name_no_cache(tmp_path, home, decodes, source, capsys):
    source = str(SOURCES[source](tmp_path))
    expected = load_images(source)
    assert not home.exists() and "decoded" not in capsys.readouterr().out
    load_images(source, share=True)
    (kept,) = home.rglob("*.npy")
    line = capsys.readouterr().out
    assert line.startswith(f"decoded images: {kept}, 0.0 GB;") and line.count("\n") == 1 and "delete" in line
    del decodes[:]
    for share in (False, True):
        assert torch.equal(torch.from_numpy(load_images(source, share=share)), expected) and not decodes
        assert capsys.readouterr().out == line
    assert isinstance(load_images(source, size=2), torch.Tensor) and decodes  # is not there, nor comes there unasked
    assert load_images(source, cache=tmp_path / "own").filename.parent == tmp_path / "own"
    assert list(home.rglob("*.npy")) == [kept] and capsys.readouterr().out == ""


def test_a_changed_source_is_not_taken_from_what_processes_share(tmp_path, home):
    folder = as_folder(tmp_path / "folder", PICTURES)
    shared = load_images(str(folder), share=True)
    for _ in changed(folder):
        found = load_images(str(folder))
        assert isinstance(found, torch.Tensor) and not np.array_equal(found, shared)


def test_no_error_about_what_processes_share_speaks_of_an_option_that_nobody_gave(tmp_path, home, monkeypatch):
    folder = as_folder(home / "pictures", PICTURES)
    (home / ".cache").write_text("a file")
    with pytest.raises(BadInput, match=rf"kept in {home}/\.cache/dansm/images: .*--cache of dansm train") as refused:
        load_images(str(folder), share=True)
    assert "--cache is" not in str(refused.value)
    (home / ".cache").unlink()
    as_folder(home, {"a.png": PICTURES["b.png"]})
    with pytest.raises(BadInput, match=rf"folder of decoded images is {home}.*inside {home}, .*--cache") as refused:
        load_images(str(home), share=True)
    assert "--cache is" not in str(refused.value)
    free = shutil.disk_usage(home)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free._replace(free=9))
    with pytest.raises(BadInput, match=rf"the disk of {home}/.* has 0\.0 GB free.*--cache") as refused:
        load_images(str(folder), share=True)
    assert "--cache is" not in str(refused.value)


def test_a_folder_of_archives_alone_names_one(tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("b.tar.gz", "a.zip"):
        (tmp_path / "data" / name).touch()
    with pytest.raises(BadInput, match=r"holds no images, but archives: expected one of them, as .*a\.zip"):
        read.find_files(tmp_path / "data")
    (tmp_path / "data" / "x.png").touch()
    assert read.find_files(tmp_path / "data") == [tmp_path / "data" / "x.png"]
