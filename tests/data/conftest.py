"""What the tests of data share: an lmdb of photographs' formats, a small autoencoder, kills, and encoding both ways."""

import os
import signal

import pytest
import torch
from support import lsun, picture

from dansm import BadInput
from dansm.scale.data import read

IN_LMDB = {f"{seed * 7919 % 2**20:05x}": picture(seed, [".jpg", ".webp"][seed % 2], (24 + seed, 20))
           for seed in range(9)}


@pytest.fixture
def photographs():
    """Nine JPEG and WebP images of different widths, by the keys they have in an lmdb."""
    return dict(IN_LMDB)


@pytest.fixture
def source(tmp_path):
    return lsun(tmp_path / "bedroom_lmdb", IN_LMDB)


@pytest.fixture
def decodes(monkeypatch):
    """The names of the files that were decoded, as they are."""
    decoded, read_image = [], read.read_image

    def watched(path, *arguments):
        decoded.append(path.name)
        return read_image(path, *arguments)

    monkeypatch.setattr(read, "read_image", watched)
    return decoded


@pytest.fixture
def home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def killed():
    """Does work in a process that is killed before or after its n-th file is moved into place."""

    def killed(work, moment, number):
        child = os.fork()
        if not child:
            signal.alarm(60)
            replace, times = os.replace, []

            def killing(*arguments):
                times.append(arguments)
                if (moment, number) == ("before", len(times)):
                    os.kill(os.getpid(), signal.SIGKILL)
                replace(*arguments)
                if (moment, number) == ("after", len(times)):
                    os.kill(os.getpid(), signal.SIGKILL)

            os.replace = killing
            try:
                work()
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status

    return killed


# ------------------------------------------------------------------------------- latents


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """A small autoencoder as Stable Diffusion comes: one .ckpt."""
    pytest.importorskip("diffusers")
    from autoencoders import random_ckpt

    return random_ckpt(tmp_path_factory.mktemp("weights") / "sd.ckpt", 3)


@pytest.fixture
def other_weights(tmp_path):
    from autoencoders import random_ckpt

    return random_ckpt(tmp_path / "other.ckpt", 4)


@pytest.fixture
def encode_command(source, weights, tmp_path):
    """The command that encodes the lmdb, or another source, into a folder of that name."""

    def command(name="latents", *options, source=source, weights=weights):
        return ["encode", source, "--autoencoder", weights, "--out", tmp_path / name, "--size", 16, "--shard", 4,
                "--batch", 3, "--device", "cpu", "--workers", 2, *options]

    return command


@pytest.fixture
def encoded(run, encode_command, tmp_path):
    def encoded(name="latents", *options, **settings):
        code, out, err = run(*encode_command(name, *options, **settings))
        assert code == 0, (out, err)
        return tmp_path / name

    return encoded


@pytest.fixture
def not_encoded(refused, encode_command):
    """The line with which an encode is refused."""

    def not_encoded(name="latents", *options, **settings):
        return refused(*encode_command(name, *options, **settings))

    return not_encoded


@pytest.fixture
def stopped(run, encode_command, monkeypatch, tmp_path):
    """Encodes into a folder of that name, and stops before a shard, by default the second."""
    from dansm.scale.data import latents

    def stopped(name="latents", *options, before=1, **settings):
        write = latents.write_shard

        def stopping(out, number, *rest):
            if number == before:
                raise KeyboardInterrupt
            write(out, number, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(latents, "write_shard", stopping)
            code, out, err = run(*encode_command(name, *options, **settings))
        assert code == 130, (out, err)
        return tmp_path / name

    return stopped


@pytest.fixture
def contents():
    """The bytes of each file in a folder but for the lock."""
    return lambda folder: {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


@pytest.fixture
def trained(run, tmp_path):
    """Trains a small network on data for so many steps in all: exit code, what it printed."""

    def trained(data, steps=1, *options):
        return run("train", data, "--network", "small", "--batch", 4, "--match-size", 4, "--steps", steps, "--device",
                   "cpu", "--sample-steps", 2, "--out", tmp_path / "run", *options)

    return trained


@pytest.fixture
def not_loaded():
    """The line with which a source is refused, which names it."""
    from dansm.scale.data.loader import load_images

    def not_loaded(source, **settings):
        with pytest.raises(BadInput) as refused:
            load_images(str(source), **settings)
        message = str(refused.value)
        assert "\n" not in message and "expected" in message
        return message

    return not_loaded


@pytest.fixture
def cpu():
    return torch.device("cpu")
