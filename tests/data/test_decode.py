"""dansm decode: latents of every form to PNG files, resumed, and of one origin."""

import errno
import os

import numpy as np
import pytest
import torch
from PIL import Image
from support import CPU, as_folder, picture

from dansm.scale.data import decode
from dansm.scale.data.loader import load_images

pytest.importorskip("diffusers")

from autoencoders import as_folder_of_diffusers

from dansm.scale.data.autoencoder import Decoder, read_autoencoder


@pytest.fixture
def decode_command(encoded, weights, tmp_path):
    """The command that decodes the encoded lmdb, or another source, into a folder images."""
    latents = encoded()

    def command(*options, source=latents, weights=weights):
        return ["decode", source, "--autoencoder", weights, "--out", tmp_path / "images", "--device", "cpu", *options]

    return command


@pytest.fixture
def decoded(run, decode_command):
    def decoded(*options, **settings):
        code, said, err = run(*decode_command(*options, **settings))
        assert code == 0, (said, err)
        return said

    return decoded


def stamps(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.png")}


def pixels(folder):
    return {path.name: np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))}


def test_decode_writes_what_the_decoder_makes(decoded, weights, tmp_path):
    assert "9 images" in decoded("--batch", 4)
    written = pixels(tmp_path / "images")
    assert list(written) == [f"{i:06d}.png" for i in range(9)]
    latents = torch.from_numpy(load_images(str(tmp_path / "latents"))[:])
    expected = Decoder(read_autoencoder(weights), CPU).decode(latents)
    found = np.stack(list(written.values())).transpose(0, 3, 1, 2)
    assert abs(found.astype(int) - expected.numpy()).max() <= 1


@pytest.mark.parametrize("kind", ["one", "several", "folder", "moments"])
def test_decode_takes_every_form_of_latents(kind, encoded, decoded, tmp_path):
    array = np.random.default_rng(0).normal(size=(3, 4, 4, 4)).astype(np.float32)
    source = tmp_path / "latents.npy"
    np.save(source, array[0] if kind == "one" else array)
    if kind == "folder":
        source = tmp_path / "folder"
        source.mkdir()
        for number, latent in enumerate(array):
            np.save(source / f"{number}.npy", latent)
    elif kind == "moments":
        source = encoded("moments", "--moments")
    decoded("--count", 3, "--memory", 0.001, source=source)
    assert len(list((tmp_path / "images").glob("*.png"))) == (1 if kind == "one" else 3)


@pytest.mark.parametrize(("array", "told"), [
    (np.zeros((2, 3, 4, 4), np.float16), "3 channels"), (np.full((2, 4, 4, 4), np.nan, np.float16), "NaN"),
    (np.full((4, 4, 4), np.inf, np.float16), "NaN"), (np.full((2, 4, 4, 4), 3e38, np.float32), "decodes to NaN")])
def test_latents_that_cannot_be_decoded_are_refused(array, told, decode_command, refused, tmp_path):
    np.save(tmp_path / "a.npy", array)
    assert told in refused(*decode_command(source=tmp_path / "a.npy"))


def test_what_is_no_latents_or_anothers_is_refused_unread(decode_command, refused, stopped, other_weights, source,
                                                          tmp_path, monkeypatch):
    as_folder(tmp_path / "pictures", {"a.png": picture(0)})
    part = stopped("part")
    monkeypatch.setattr(decode, "load_images", None)
    assert "nowhere" in refused(*decode_command(source=tmp_path / "nowhere"))
    for images in (source, tmp_path / "pictures"):
        assert f"{images} holds images" in refused(*decode_command(source=images))
    for latents in (tmp_path / "latents", part):
        message = refused(*decode_command(source=latents, weights=other_weights))
        assert str(latents) in message and str(other_weights) in message


def test_what_is_decoded_already_is_left_as_it_is(decoded, tmp_path):
    images = tmp_path / "images"
    decoded("--count", 5, "--batch", 2)
    before = stamps(images)
    assert len(before) == 5
    assert "nothing to do" in decoded("--count", 5) and stamps(images) == before
    (images / "000001.png").unlink()
    assert "5 images in" in decoded("--batch", 4)
    after = stamps(images)
    kept = {name for name in before if before[name] == after[name]}
    assert len(after) == 9 and kept == before.keys() - {"000001.png"}
    assert not list(images.glob("*.partial"))


def test_images_of_a_resumed_call_are_those_of_one_call(run, decode_command, decoded, tmp_path, monkeypatch):
    decoded()
    whole = pixels(tmp_path / "images")
    for name in list(whole)[::2]:
        (tmp_path / "images" / name).unlink()
    save = decode._save

    def stopping(out, numbered):
        if numbered[0] == 6:
            raise KeyboardInterrupt
        save(out, numbered)

    with monkeypatch.context() as patch:
        patch.setattr(decode, "_save", stopping)
        code, said, _ = run(*decode_command("--batch", 2))
    assert code == 130 and "the same command resumes" in said
    before = stamps(tmp_path / "images")
    decoded()
    assert before.items() <= stamps(tmp_path / "images").items()
    assert all(np.array_equal(image, whole[name]) for name, image in pixels(tmp_path / "images").items())


def test_images_of_other_latents_are_no_part_of_these(decode_command, decoded, refused, encoded, tmp_path):
    decoded("--count", 1)
    before = stamps(tmp_path / "images")
    other = as_folder_of_diffusers(tmp_path / "other", scaling_factor=0.5)
    assert "precision float32 → bfloat16" in refused(*decode_command("--precision", "bf16"))
    for settings in (dict(weights=other, source=encoded("b", weights=other)),
                     dict(source=encoded("flipped", "--flips"))):
        message = refused(*decode_command(**settings))
        assert str(tmp_path / "images") in message and "--out" in message
    assert stamps(tmp_path / "images") == before
    (tmp_path / "images" / "decode.json").unlink()
    assert "000000.png" in refused(*decode_command())


def test_a_damaged_note_of_decoded_images_is_named(decode_command, decoded, refused, tmp_path):
    decoded("--count", 1)
    (tmp_path / "images" / "decode.json").write_text("")
    assert str(tmp_path / "images" / "decode.json") in refused(*decode_command())


def test_a_full_disk_while_decoding_is_one_line(decode_command, refused, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Image.Image, "save", full)
    message = refused(*decode_command())
    assert "No space left" in message and ".png" in message
