"""Grey images: one channel if all of them are grey or --channels says so, from the files to training and samples."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from support import noise_image, packed, state_of

from dansm.scale.data.loader import load_images, stream_images

GREY = {"a": "L", "b": "1", "c": "LA", "d": "I;16"}


def save(folder, **modes):
    """Images 6 wide and 4 high in these modes, by their names."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (name, mode) in enumerate(modes.items()):
        grey = noise_image(6, 4, seed=number, mode="L")
        if mode == "I;16":
            image = Image.fromarray(np.array(grey).astype(np.uint16) * 257)
        else:
            image = noise_image(6, 4, seed=number) if mode == "RGB" else grey.convert(mode)
        image.save(folder / f"{name}.png")
    return folder


@pytest.mark.parametrize("cached", [False, True])
def test_images_stay_one_channel_if_all_are_grey(tmp_path, cached):
    cache = tmp_path / "cache" if cached else None
    source = str(save(tmp_path / "a", **GREY))
    images = load_images(source, cache=cache)
    assert images.shape == (4, 1, 4, 6) and images.dtype in (torch.uint8, np.uint8)
    for image, name in zip(images, "abcd", strict=True):
        expected = np.array(Image.open(tmp_path / "a" / f"{name}.png"))
        expected = expected // 257 if name == "d" else expected * 255 if name == "b" else expected
        assert np.array_equal(image[0], expected[..., 0] if name == "c" else expected)
    assert np.array_equal(load_images(source, channels=3, cache=cache), np.repeat(np.asarray(images), 3, 1))


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("packing", ["", ".tar"])
@pytest.mark.parametrize("place", range(5))
def test_one_image_in_colour_makes_all_three_channels(tmp_path, cached, packing, place):
    modes = [*GREY.values()]
    modes.insert(place, "RGB")
    source = save(tmp_path / "a", **dict(zip("abcde", modes, strict=True)))
    expected = np.stack([np.array(Image.open(path).convert("RGB")) for path in sorted(source.iterdir()) if
                         not Image.open(path).mode.startswith("I")]).transpose(0, 3, 1, 2)
    if packing:
        source = packed(tmp_path / "a.tar", {path.name: path.read_bytes() for path in source.iterdir()})
    images = np.asarray(load_images(str(source), cache=tmp_path / "cache" if cached else None))
    assert images.shape == (5, 3, 4, 6)
    assert np.array_equal(np.delete(images, modes.index("I;16"), 0), expected)


@pytest.mark.parametrize("kind", ["files", "array", "folder of arrays"])
def test_channels_1_makes_colours_grey(tmp_path, kind):
    source = save(tmp_path / "a", a="RGB", b="RGB")
    expected = np.stack([np.array(Image.open(source / f"{name}.png").convert("L")) for name in "ab"])[:, None]
    if kind != "files":
        np.save(tmp_path / "b.npy", np.stack([np.array(Image.open(source / f"{name}.png")) for name in "ab"]))
        source = tmp_path / "b.npy"
    if kind == "folder of arrays":
        (tmp_path / "c").mkdir()
        source = source.rename(tmp_path / "c" / "b.npy").parent
    assert np.array_equal(load_images(str(source), channels=1), expected)
    stream = stream_images(str(source), channels=1)
    with stream.open() as (_, entries):
        assert all(np.array_equal(read()[0], expected[place]) for place, _, read in entries)


def test_grey_over_a_coloured_background_is_no_longer_grey(tmp_path):
    Image.fromarray(np.array([[[50, 255], [9, 0]]], np.uint8), "LA").save(tmp_path / "a.png")
    assert load_images(str(tmp_path)).flatten().tolist() == [50, 255]
    assert load_images(str(tmp_path), background="red").flatten(2).tolist() == [[[50, 255], [50, 0], [50, 0]]]


@pytest.mark.parametrize("channels", [2, -1, 4])
def test_other_channels_are_refused(tmp_path, not_loaded, channels):
    assert f"--channels is {channels}" in not_loaded(save(tmp_path, a="L"), channels=channels)


def test_latents_take_no_channels(tmp_path, not_loaded):
    np.save(tmp_path / "a.npy", np.zeros((2, 4, 2, 2), np.float32))
    message = not_loaded(tmp_path / "a.npy", channels=1)
    assert "--channels is 1" in message and str(tmp_path / "a.npy") in message


@pytest.fixture
def digits(tmp_path):
    """Grey images of a size that a small network takes."""
    (tmp_path / "digits").mkdir()
    for number in range(12):
        noise_image(8, 8, seed=number, mode="L").save(tmp_path / "digits" / f"{number}.png")
    return tmp_path / "digits"


def test_grey_images_are_trained_on_sampled_and_evaluated_with_one_channel(tmp_path, digits, trained, run):
    pytest.importorskip("torch_fidelity")
    (tmp_path / "seen.py").write_text("def seen(images):\n    assert images.shape[1] == 3\n"
                                      "    return images.float().mean((2, 3)) + images.float()[:, :, 0, 0]\n")
    code, out, err = trained(digits, 2, "--evaluate-at", 2, "--evaluate-steps", 2, "--evaluate-count", 4,
                             "--evaluate-features", "seen:seen")
    assert code == 0 and "12 images of 1×8×8" in out, (out, err)
    assert state_of(tmp_path / "run")["network"]["channels"] == 1 and (tmp_path / "run" / "samples.png").exists()
    code, out, err = run("sample", tmp_path / "run", "--count", 3, "--steps", 2, "--files", "--device", "cpu",
                         "--out", tmp_path / "samples")
    assert code == 0, err
    assert Image.open(min((tmp_path / "samples").glob("0*.png"))).mode == "L"
    code, out, err = run("evaluate", tmp_path / "run", "--features", "seen:seen", "--steps", 2, "--count", 4,
                         "--device", "cpu", "--cache", tmp_path / "cache", "--out", tmp_path / "evaluate")
    assert code == 0, err
    rows = json.loads((tmp_path / "evaluate" / "evaluate.json").read_text())["rows"]
    assert all(row["real_images"] == 12 for row in rows)


def test_a_run_in_colour_is_resumed_with_channels_3(digits, trained):
    assert trained(digits, 1, "--channels", 3)[0] == 0
    code, _, err = trained(digits, 2)
    assert code == 2 and "network channels 3 → 1" in err
    assert trained(digits, 2, "--channels", 3)[0] == 0


def test_an_autoencoder_gets_grey_images_as_colours(tmp_path, digits, encoded):
    coloured = tmp_path / "coloured"
    coloured.mkdir()
    for path in digits.iterdir():
        Image.open(path).convert("RGB").save(coloured / path.name)
    a, b = (load_images(str(encoded(name, source=source))) for name, source in (("a", digits), ("b", coloured)))
    assert np.array_equal(a, b)
