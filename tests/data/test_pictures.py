"""What one image file becomes: the pixels that a viewer shows."""

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from support import noise_image

from dansm.scale.data.loader import load_images, stream_images

UPRIGHT = np.array(noise_image(6, 4))
STORED = {  # what a camera stores by each EXIF orientation
    1: UPRIGHT, 2: UPRIGHT[:, ::-1], 3: UPRIGHT[::-1, ::-1], 4: UPRIGHT[::-1],
    5: UPRIGHT.transpose(1, 0, 2), 6: np.rot90(UPRIGHT), 7: UPRIGHT[::-1, ::-1].transpose(1, 0, 2),
    8: np.rot90(UPRIGHT, -1)}


def save_turned(path, orientation, pixels=UPRIGHT):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.fromarray(np.ascontiguousarray(pixels)).save(path, exif=exif)
    return path


def read_alone(path, **settings):
    """The pixels (H, W, C) of the only image in a folder."""
    (image,) = load_images(str(path.parent), **settings)
    return image.permute(1, 2, 0).numpy()


# ------------------------------------------------------------------------------- EXIF orientation


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("orientation", STORED)
def test_an_image_is_turned_as_its_exif_says(tmp_path, orientation, suffix):
    path = save_turned(tmp_path / f"a{suffix}", orientation, STORED[orientation])
    assert np.array_equal(read_alone(path), UPRIGHT)


def test_16_bits_of_gray_are_turned_too(tmp_path):
    levels = np.arange(24, dtype=np.uint16).reshape(4, 6)
    path = save_turned(tmp_path / "a.png", 6, np.rot90(levels * 257))
    assert np.array_equal(read_alone(path)[..., 0], levels)


def test_turned_and_unturned_photographs_are_one_set_streamed_and_loaded(tmp_path):
    smooth = np.array(noise_image(3, 2).resize((48, 32), Image.Resampling.BICUBIC))
    for orientation in (1, 6, 8):
        turned = {1: smooth, 6: np.rot90(smooth), 8: np.rot90(smooth, -1)}[orientation]
        save_turned(tmp_path / f"{orientation}.jpg", orientation, turned)
    images = load_images(str(tmp_path))
    assert images.shape == (3, 3, 32, 48)
    assert (images.float() - torch.from_numpy(smooth).permute(2, 0, 1)).abs().mean() < 5
    stream = stream_images(str(tmp_path))
    with stream.open() as (_, entries):
        for place, _, image, _ in stream.decoded(entries):
            assert np.array_equal(image[0], images[place])


@pytest.mark.parametrize("exif", [b"", b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"no EXIF at all"])
def test_damaged_exif_leaves_an_image_as_it_is_stored(tmp_path, exif):
    Image.fromarray(UPRIGHT).save(tmp_path / "a.webp", lossless=True, exif=exif)
    assert np.array_equal(read_alone(tmp_path / "a.webp"), UPRIGHT)


# ------------------------------------------------------------------------------- transparent pixels

RED = np.array([255, 0, 0])
COLOURS = {"white": [255, 255, 255], "black": [0, 0, 0], "#1080ff": [16, 128, 255]}


def half_transparent():
    """Left half: opaque red. Right half: transparent, with colours that nobody is to see."""
    pixels = np.array(noise_image(6, 4, mode="RGBA"))
    pixels[:, :3] = (*RED, 255)
    pixels[:, 3:, 3] = 0
    return Image.fromarray(pixels)


@pytest.mark.parametrize("background", COLOURS)
@pytest.mark.parametrize("suffix", [".png", ".webp", ".gif", ".tif"])
def test_transparent_pixels_are_of_the_background(tmp_path, capsys, suffix, background):
    settings = {"lossless": True, "exact": True} if suffix == ".webp" else {}
    half_transparent().save(tmp_path / f"a{suffix}", **settings)
    pixels = read_alone(tmp_path / f"a{suffix}", background=background)
    assert (pixels[:, :3] == RED).all() and (pixels[:, 3:] == COLOURS[background]).all()
    assert f"1 image has transparent pixels, laid over {background} " in capsys.readouterr().out


def test_a_colour_of_a_palette_and_a_grey_may_be_transparent(tmp_path):
    palette = Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P")
    palette.putpalette([255, 0, 0, 7, 8, 9])
    palette.save(tmp_path / "a.png", transparency=1)
    Image.fromarray(np.array([[50, 100]], np.uint8)).save(tmp_path / "b.png", transparency=100)
    Image.fromarray(np.array([[[50, 255], [9, 0]]], np.uint8), "LA").save(tmp_path / "c.png")
    images = load_images(str(tmp_path)).permute(0, 2, 3, 1)
    assert images[0, 0].tolist() == [[255, 0, 0], [255, 255, 255]]
    assert images[1, 0].tolist() == images[2, 0].tolist() == [[50, 50, 50], [255, 255, 255]]


def test_half_transparent_pixels_are_blended_before_an_image_is_resized(tmp_path):
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[..., 3] = 51  # a fifth of black
    Image.fromarray(pixels).save(tmp_path / "a.png")
    for size in (None, 4):
        assert np.unique(read_alone(tmp_path / "a.png", size=size)).tolist() == [204]


@pytest.mark.parametrize("cached", [False, True])
def test_how_many_images_are_transparent_is_told_each_time(tmp_path, capsys, cached):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(3):
        half_transparent().save(folder / f"{number}.png")
    Image.fromarray(np.full((4, 6, 4), 255, np.uint8)).save(folder / "opaque.png")
    cache = tmp_path / "cache" if cached else None
    told = []
    for background in ("white", "white", "black"):
        images = load_images(str(folder), background=background, cache=cache)
        assert images[0, :, 0, 5].tolist() == COLOURS[background]
        told += [line.split(": ", 1)[1] for line in capsys.readouterr().out.splitlines() if "--background" in line]
    assert told == [f"3 images have transparent pixels, laid over {colour} (--background)"
                    for colour in ("white", "white", "black")]


def test_an_unknown_colour_is_refused(tmp_path, not_loaded):
    half_transparent().save(tmp_path / "a.png")
    assert "--background is 'whte'" in not_loaded(tmp_path, background="whte")
