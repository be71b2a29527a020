"""Images from folders, archives and LSUN's lmdb."""

import gzip
import random
import sys
import tarfile
import warnings
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from support import PACKINGS, PICTURES, as_folder, lsun, noise_image, packed, picture

from dansm import BadInput
from dansm.scale.data import archives, pictures, read
from dansm.scale.data.loader import load_images, stream_images

COMMON = [".zip", ".tar", ".tar.gz"]
NAMES = ["Z.PNG", "a10.png", "a9.png", "b.png", "sub/c.png", "sub/deeper/0.bmp"]  # in the order in which they are read


@pytest.fixture
def folder(tmp_path):
    """Images 6 wide and 4 high, and what is none."""
    for name in NAMES:
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        noise_image(6, 4, seed=sum(map(ord, name))).save(path)
    (tmp_path / "images" / "notes.txt").write_text("no image")
    return tmp_path / "images"


@pytest.fixture
def expected(tmp_path):
    return load_images(str(as_folder(tmp_path / "folder", PICTURES)))


def by_hand(path):
    """Pixel for pixel, as (3, H, W)."""
    image = Image.open(path).convert("RGB")
    out = torch.empty(3, image.height, image.width, dtype=torch.uint8)
    for y in range(image.height):
        for x in range(image.width):
            out[:, y, x] = torch.tensor(image.getpixel((x, y)), dtype=torch.uint8)
    return out


# ------------------------------------------------------------------------------- images


def test_images_come_in_the_order_of_their_names_with_the_subfolders(folder):
    assert [path.relative_to(folder).as_posix() for path in read.files_of(folder)] == NAMES
    images = load_images(str(folder))
    assert (images.shape, images.dtype, images.is_contiguous()) == ((6, 3, 4, 6), torch.uint8, True)
    for name, image in zip(NAMES, images, strict=True):
        assert torch.equal(image, by_hand(folder / name)), name


def test_grayscale_and_palette_images_become_three_channels(tmp_path):
    for mode in ("L", "P", "RGB"):
        noise_image(4, 4, mode=mode).save(tmp_path / f"{mode}.png")
    gray, palette, color = load_images(str(tmp_path))
    assert torch.equal(gray[0], gray[1]) and torch.equal(gray[0], gray[2])
    assert torch.equal(gray[0], torch.from_numpy(np.array(noise_image(4, 4, mode="L"))))
    assert torch.equal(palette, by_hand(tmp_path / "P.png")) and len(palette.unique()) > 2
    assert torch.equal(color, torch.from_numpy(np.array(noise_image(4, 4))).permute(2, 0, 1))


LEVELS = np.arange(256).reshape(16, 16)
DARK = LEVELS // 2  # of 16 bits these are nearly black


@pytest.mark.parametrize(("suffix", "pixels", "expected"), [
    (".png", (LEVELS * 257).astype(np.uint16), LEVELS), (".tiff", (LEVELS * 257).astype(np.uint16), LEVELS),
    (".tiff", (LEVELS * 257).astype(">u2"), LEVELS), (".pgm", (LEVELS * 257).astype(np.uint16), LEVELS),
    (".tiff", (LEVELS * 257).astype(np.int32), LEVELS), (".tiff", (LEVELS * 257 + 256).clip(0, 65535), LEVELS),
    (".tiff", LEVELS.astype(np.int32), LEVELS), (".tiff", DARK.astype(np.int16), DARK),
    (".tiff", DARK.astype(np.uint32), DARK), (".tiff", np.zeros((16, 16), np.int32), np.zeros((16, 16))),
    (".tiff", LEVELS + 1, (LEVELS + 1) // 257), (".png", DARK.astype(np.uint16), np.zeros((16, 16))),
    (".tiff", DARK.astype(np.uint16), np.zeros((16, 16))), (".pgm", DARK.astype(np.uint16), np.zeros((16, 16)))])
def test_pixels_of_16_bits_are_divided_by_257_and_of_32_bits_if_one_is_above_255(tmp_path, suffix, pixels, expected):
    pixels = pixels.astype(np.int32) if pixels.dtype == np.int64 else pixels
    Image.fromarray(pixels).save(tmp_path / f"a{suffix}")
    read = load_images(str(tmp_path))
    assert read.shape == (1, 1, 16, 16) and np.array_equal(read[0, 0], expected)


@pytest.mark.parametrize("pixels", [np.array([[0, -1]], np.int32), np.array([[0, 70000]], np.int32),
                                    np.array([[0, 0.5]], np.float32)])
def test_pixels_of_unknown_range_are_refused(pixels, tmp_path, not_loaded):
    Image.fromarray(pixels).save(tmp_path / "a.tiff")
    assert "a.tiff" in not_loaded(tmp_path)


@pytest.mark.parametrize(("width", "height"), [(12, 4), (4, 12)])
def test_size_takes_the_centre_square(tmp_path, width, height):
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[(height - 4) // 2 : (height + 4) // 2, (width - 4) // 2 : (width + 4) // 2] = (10, 100, 200)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    centre = load_images(str(tmp_path), size=4)  # the shorter side is 4 already: nothing is blended
    assert torch.equal(centre, torch.tensor([10, 100, 200], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 4, 4))


def test_size_scales_the_shorter_side(tmp_path):
    """Left half black and right half white, twice as large: still so, but for the pixels next to the border."""
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:, 8:] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image = load_images(str(tmp_path), size=8)[0]
    assert image.shape == (3, 8, 8)
    assert image[:, :, :2].max() <= 2 and image[:, :, 6:].min() >= 253


def test_images_of_unequal_size_are_refused_naming_two_and_size_makes_them_equal(tmp_path, not_loaded):
    for name, size in (("a", (6, 4)), ("b", (6, 4)), ("c", (5, 7))):
        noise_image(*size).save(tmp_path / f"{name}.png")
    message = not_loaded(tmp_path)
    for told in ("c.png", "(3, 7, 5)", "a.png", "(3, 4, 6)", "--size"):
        assert told in message
    assert load_images(str(tmp_path), size=4).shape == (3, 3, 4, 4)


@pytest.mark.parametrize("broken", [["a9.png"], ["a9.png", "Z.PNG"], ["sub/deeper/0.bmp"]])
def test_an_unreadable_image_is_named_or_left_out(folder, broken, not_loaded):
    for name in broken:
        (folder / name).write_bytes(b"no PNG at all")
    message = not_loaded(folder)
    assert any(str(folder / name) in message for name in broken) and "--skip-unreadable" in message
    left_out = []
    rest = load_images(str(folder), skip_unreadable=True, left_out=left_out)
    assert torch.equal(rest, torch.stack([by_hand(folder / name) for name in NAMES if name not in broken]))
    assert left_out == [folder / name for name in NAMES if name in broken]


def test_a_folder_of_unreadable_images_only_is_refused(tmp_path, not_loaded):
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(b"")
    assert str(tmp_path) in not_loaded(tmp_path, skip_unreadable=True)


@pytest.mark.parametrize("limit", [23, 11])  # of 24 pixels: Pillow warns of the one and refuses the other
@pytest.mark.parametrize("packing", ["", ".zip"])
def test_an_image_over_pillows_limit_is_refused_or_left_out(tmp_path, monkeypatch, limit, packing, not_loaded):
    content = {"a.png": picture(0, size=(2, 2)), "b.png": picture(0)}
    source = packed(tmp_path / f"a{packing}", content) if packing else as_folder(tmp_path / "a", content)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        message = not_loaded(source)
        assert load_images(str(source), skip_unreadable=True).shape == (1, 3, 2, 2)
    assert not warned and "b.png" in message and "exceeds limit" in message


def test_a_file_of_another_kind_and_an_empty_folder_are_refused(tmp_path, not_loaded):
    (tmp_path / "a.rar").write_bytes(b"")
    assert "a.rar" in not_loaded(tmp_path / "a.rar") and "b.zip" in not_loaded(tmp_path / "b.zip")
    assert "''" in not_loaded("")
    (tmp_path / "data").mkdir()
    assert f"{tmp_path / 'data'} holds no images" in not_loaded(tmp_path / "data")
    (tmp_path / "data" / "a.zip").touch()
    (tmp_path / "data" / "x.png").touch()
    assert read.files_of(tmp_path / "data") == [tmp_path / "data" / "x.png"]


def test_cifar10_is_read_as_torchvision_has_it(monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8)
    monkeypatch.setattr("torchvision.datasets.CIFAR10", lambda root, download: type("Data", (), {"data": images}))
    assert torch.equal(load_images("cifar10"), torch.from_numpy(images).permute(0, 3, 1, 2))
    small = load_images("cifar10", size=8)
    assert np.array_equal(small[3].permute(1, 2, 0), pictures.square(Image.fromarray(images[3]), 8))
    stream = stream_images("cifar10", size=8)
    with stream.open() as (count, entries):
        assert count == 5
        assert all(np.array_equal(image[0], small[place]) for place, _, image, _ in stream.decoded(entries))


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


@pytest.mark.parametrize("packing", COMMON)
def test_an_unreadable_image_of_an_archive_is_named_or_left_out(tmp_path, expected, packing, not_loaded):
    content = {**dict(reversed(PICTURES.items())), "a10.jpg": b"", "a9.webp": PICTURES["a9.webp"][:30]}
    archive = packed(tmp_path / f"images{packing}", content)
    assert str(archive / "a") in not_loaded(archive)
    left_out = []
    rest = load_images(str(archive), skip_unreadable=True, left_out=left_out)
    assert torch.equal(rest, expected[[0, *range(3, len(expected))]])
    assert left_out == [archive / "a10.jpg", archive / "a9.webp"]


@pytest.mark.parametrize("packing", COMMON)
def test_names_that_lead_outside_are_names_as_any_other(tmp_path, packing, not_loaded):
    names = ["/a.png", "../b.png", "C:\\c.png"]
    (tmp_path / "in").mkdir()
    archive = packed(tmp_path / "in" / f"images{packing}", {name: PICTURES["b.png"] for name in names})
    assert len(load_images(str(archive))) == 3
    assert [path.name for path in tmp_path.rglob("*")] == ["in", archive.name]
    archive = packed(tmp_path / f"broken{packing}", {"/a.png": b""})
    assert f"{archive}/a.png" in not_loaded(archive)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_a_link_in_a_tar_is_refused(tmp_path, kind, not_loaded):
    archive = packed(tmp_path / "a.tar", {"b.png": PICTURES["b.png"], "c.png": b""}, kinds={"c.png": kind})
    assert "c.png" in not_loaded(archive)


def test_an_encrypted_zip_is_refused(tmp_path, not_loaded):
    archive = packed(tmp_path / "a.zip", {"b.png": PICTURES["b.png"]})
    content = bytearray(archive.read_bytes())
    content[6] |= 1
    content[content.index(b"PK\1\2") + 8] |= 1
    archive.write_bytes(content)
    message = not_loaded(archive)
    assert str(archive / "b.png") in message and "password" in message


def test_a_zip_that_swells_is_refused_before_it_is_unpacked(tmp_path, monkeypatch, not_loaded):
    archive = packed(tmp_path / "a.deflated.zip", {"a.png": PICTURES["b.png"], "b.bmp": bytes(archives.HURTS + 1)})
    monkeypatch.setattr(zipfile.ZipFile, "open", None)
    assert f"{archive / 'b.bmp'} unpacks to 16,777,217 bytes" in not_loaded(archive, skip_unreadable=True)


@pytest.mark.parametrize("packing", [".tar", ".tar.gz"])
def test_a_tar_with_a_member_too_large_is_refused_before_it_is_read(tmp_path, packing, not_loaded):
    header = tarfile.TarInfo("a.png")
    header.size = archives.LARGEST + 1
    content = header.tobuf()
    (tmp_path / f"a{packing}").write_bytes(gzip.compress(content) if packing.endswith("gz") else content)
    assert "a.png unpacks to 1,073,741,825 bytes" in not_loaded(tmp_path / f"a{packing}")


def test_a_tar_that_swells_as_a_whole_is_refused(tmp_path, monkeypatch, not_loaded):
    archive = packed(tmp_path / "a.tar.gz", {f"{i}.bmp": bytes(10**6) for i in range(5)})
    monkeypatch.setattr(archives, "LARGEST", 3 * 10**6)
    assert "2.bmp unpacks to" in not_loaded(archive)


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
@pytest.mark.parametrize("first", [True, False])
def test_a_tar_with_a_name_that_fills_the_memory_is_refused(tmp_path, kind, first, not_loaded):
    header = tarfile.TarInfo("name")
    header.size, header.type = 2**40, kind
    before = b"" if first else tarfile.TarInfo("sub/a").tobuf()
    (tmp_path / "a.tar").write_bytes(before + header.tobuf(tarfile.GNU_FORMAT))
    assert "1,099,511,627,776 bytes" in not_loaded(tmp_path / "a.tar")


@pytest.mark.parametrize("packing", [*COMMON, ".tar.xz"])
@pytest.mark.parametrize("part", [0, 0.01, 0.5, 0.9])
def test_an_archive_that_is_cut_off_is_refused_by_name(tmp_path, packing, part, not_loaded):
    archive = packed(tmp_path / f"images{packing}", {f"{seed}.png": picture(seed, size=(64, 64)) for seed in range(9)})
    content = archive.read_bytes()
    archive.write_bytes(content[: int(part * len(content))])
    assert str(archive) in not_loaded(archive, skip_unreadable=True)


def test_a_tar_that_is_cut_off_between_two_images_is_refused(tmp_path, not_loaded):
    archive = packed(tmp_path / "a.tar", {f"{seed}.png": picture(seed) for seed in range(9)})
    content = archive.read_bytes()
    for blocks in range(2, 18):
        archive.write_bytes(content[: 512 * blocks])
        assert str(archive) in not_loaded(archive, skip_unreadable=True)
    archive.write_bytes(content[: 512 * 19])
    assert len(load_images(str(archive))) == 9


@pytest.mark.parametrize("packing", [".deflated.zip", ".tar", ".tar.gz"])
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


@pytest.mark.parametrize("packing", COMMON)
def test_an_archive_without_images_is_refused(tmp_path, packing, not_loaded):
    for content in ({}, {"notes.txt": b"none"}):
        archive = packed(tmp_path / f"images{packing}", content)
        assert str(archive) in not_loaded(archive)


# ------------------------------------------------------------------------------- lmdb


def test_lsun_gives_its_images_in_the_order_of_the_keys(tmp_path):
    content = {f"{seed * 7919 % 997:040x}": picture(seed, suffix) for seed, suffix in
               enumerate([".webp", ".jpg", ".png"] * 20)}
    folder = as_folder(tmp_path / "folder", {f"{key}.png": payload for key, payload in content.items()})
    assert torch.equal(load_images(str(lsun(tmp_path / "bedroom_train_lmdb", content))), load_images(str(folder)))


def test_an_unreadable_value_of_an_lmdb_is_named_by_its_key_or_left_out(tmp_path, not_loaded):
    folder = lsun(tmp_path / "church", {"0a": PICTURES["b.png"], "0b": b"none", "0c": PICTURES["sub/c.png"]})
    assert str(folder / "0b") in not_loaded(folder)
    left_out = []
    assert len(load_images(str(folder), skip_unreadable=True, left_out=left_out)) == 2
    assert left_out == [folder / "0b"]


def test_a_missing_lmdb_package_is_named(tmp_path, monkeypatch, run):
    (tmp_path / "church").mkdir()
    (tmp_path / "church" / "data.mdb").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "lmdb", None)
    code, _, err = run("train", tmp_path / "church", "--network", "small", "--device", "cpu")
    assert code == 2 and err.count("\n") == 1 and "pip install 'dansm[lsun]'" in err


@pytest.mark.parametrize("size", [0, 100, 8191, 20_000, -4096, -1])
def test_an_lmdb_that_is_cut_off_is_refused(tmp_path, size, not_loaded):
    folder = lsun(tmp_path / "church", {f"{seed:04x}": picture(seed, size=(32, 32)) for seed in range(20)})
    whole = (folder / "data.mdb").read_bytes()
    (folder / "data.mdb").write_bytes(whole[:size])
    assert str(folder) in not_loaded(folder)


def test_a_file_that_is_no_lmdb_and_an_empty_lmdb_are_refused(tmp_path, not_loaded):
    assert "empty" in not_loaded(lsun(tmp_path / "empty", {}))
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "data.mdb").write_bytes(b"a text" * 5000)
    assert str(tmp_path / "text") in not_loaded(tmp_path / "text")
