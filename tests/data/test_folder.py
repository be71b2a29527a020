"""What in a folder or an archive is read, and what is passed over and counted."""

import os

import pytest
from PIL import Image, features
from support import as_folder, noise_image, packed, picture

from dansm.scale.data.loader import load_images
from dansm.scale.data.read import files_of

OTHERS = {"notes.txt": b"", "sub/a.TXT": b"", "a.mp4": b"", "LICENSE": b""}
HIDDEN = {"._a.png": b"of macOS", "sub/._b.png": b"", ".ipynb_checkpoints/a-checkpoint.png": picture(3),
          "sub/.thumbnails/b.png": picture(4), "__MACOSX/a.png": b""}
READ = {"a.png": picture(0), "sub/b.png": picture(1)}


@pytest.fixture
def read(capsys):
    """Loads a source: the count of its images, and the line about what was passed over."""

    def read(source, **settings):
        capsys.readouterr()
        images = load_images(str(source), **settings)
        lines = [line for line in capsys.readouterr().out.splitlines() if "passed over" in line]
        assert len(lines) <= 1
        return len(images), "".join(lines)

    return read


@pytest.mark.parametrize("packing", ["", ".zip", ".tar", ".tar.gz"])
def test_hidden_files_and_other_kinds_are_passed_over_and_counted(tmp_path, read, packing):
    content = {**OTHERS, **HIDDEN, **READ}
    source = packed(tmp_path / f"a{packing}", content) if packing else as_folder(tmp_path / "a", content)
    count, said = read(source)
    assert count == 2
    assert str(source) in said and "5 hidden, 2 .txt, 1 .mp4, 1 without a suffix" in said


def test_nothing_is_said_where_all_is_read_below_a_hidden_folder_too(tmp_path, read):
    for source in (as_folder(tmp_path / ".cache" / "a", READ), packed(tmp_path / ".cache" / "b.tar", READ)):
        assert read(source) == (2, "")


@pytest.mark.parametrize("packing", ["", ".zip", ".tar"])
def test_a_source_without_images_is_refused_with_what_it_holds(tmp_path, not_loaded, packing):
    source = packed(tmp_path / f"a{packing}", OTHERS) if packing else as_folder(tmp_path / "a", OTHERS)
    message = not_loaded(source)
    assert str(source) in message and "2 .txt, 1 .mp4, 1 without a suffix" in message


@pytest.mark.parametrize("suffix", [".jfif", ".JPE", ".tga", ".jp2", ".avif", ".qoi", ".apng"])
def test_what_pillow_opens_is_read(tmp_path, read, suffix):
    needed = {".jp2": "jpg_2000", ".avif": "avif"}.get(suffix)
    if needed and not features.check(needed):
        pytest.skip(f"Pillow without {needed}")
    kind = Image.registered_extensions()[suffix.lower()]
    noise_image(6, 4).save(tmp_path / f"a{suffix}", "PNG" if kind == "QOI" else kind)
    assert read(tmp_path) == (1, "")


@pytest.mark.parametrize("suffix", [".eps", ".h5", ".mpg"])
def test_what_pillow_cannot_decode_by_itself_is_counted(tmp_path, read, suffix):
    as_folder(tmp_path / "a", {**READ, f"c{suffix}": b"%!PS-Adobe"})
    assert f"1 {suffix}" in read(tmp_path / "a")[1]


# ------------------------------------------------------------------------------- links


def test_no_folder_is_read_twice_however_links_lead_to_it(tmp_path, read):
    source = as_folder(tmp_path / "outer" / "images", {"a/x.png": picture(0), "b/y.png": picture(1)})
    as_folder(tmp_path / "outer", {"z.png": picture(2)})
    for link, target in {"up": "..", "self": ".", "a/root": "..", "0": "a", "b/over": "../a"}.items():
        (source / link).symlink_to(target, target_is_directory=True)
    count, said = read(source)
    assert count == 2 and "5 linked twice" in said
    assert files_of(source) == [source / "a" / "x.png", source / "b" / "y.png"]


def test_links_to_each_other_end(tmp_path, read):
    as_folder(tmp_path / "one", READ)
    as_folder(tmp_path / "other", {"c.png": picture(2)})
    (tmp_path / "one" / "other").symlink_to(tmp_path / "other")
    (tmp_path / "other" / "one").symlink_to(tmp_path / "one")
    (tmp_path / "one" / "x").symlink_to("y")
    (tmp_path / "one" / "y").symlink_to("x")
    assert read(tmp_path / "one")[0] == 3


def test_a_folder_elsewhere_is_read_by_its_first_link(tmp_path, read):
    as_folder(tmp_path / "elsewhere", READ)
    (tmp_path / "images").mkdir()
    for name in ("b", "a"):
        (tmp_path / "images" / name).symlink_to(tmp_path / "elsewhere")
    count, said = read(tmp_path / "images")
    assert count == 2 and "1 linked twice" in said
    assert files_of(tmp_path / "images")[0] == tmp_path / "images" / "a" / "a.png"


def test_the_source_may_be_a_link_and_files_may_be_links(tmp_path, read):
    as_folder(tmp_path / "a", READ)
    (tmp_path / "a" / "c.png").symlink_to("a.png")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert read(tmp_path / "link") == (3, "")


@pytest.mark.parametrize("cached", [False, True])
def test_a_link_that_leads_nowhere_is_named_or_left_out(tmp_path, read, not_loaded, cached):
    as_folder(tmp_path / "a", READ)
    (tmp_path / "a" / "c.png").symlink_to("gone.png")
    cache = tmp_path / "cache" if cached else None
    assert str(tmp_path / "a" / "c.png") in not_loaded(tmp_path / "a", cache=cache)
    assert read(tmp_path / "a", cache=cache, skip_unreadable=True)[0] == 2


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
def test_a_pipe_is_not_waited_for(tmp_path, read):
    as_folder(tmp_path / "a", READ)
    os.mkfifo(tmp_path / "a" / "c.png")
    assert read(tmp_path / "a")[0] == 2
