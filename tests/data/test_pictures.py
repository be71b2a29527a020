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
