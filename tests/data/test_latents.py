"""Images to latents and back: JPEG and WebP in an lmdb as LSUN packs it, a small autoencoder, kills and full disks."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from dansm.scale.base.noise import path_noise
from dansm.scale.bench import autoencoder as bench_autoencoder
from PIL import Image
from safetensors.torch import save_file
from support import as_folder, lsun, packed, picture
from test_autoencoder import SMALL, Weights, as_ckpt

from dansm import main

pytest.importorskip("diffusers")

from dansm.scale.data import encode, latents
from dansm.scale.data.autoencoder import FILES, Decoder, Encoder, random_autoencoder, read_autoencoder
from dansm.scale.data.latents import Shards
from dansm.scale.data.loader import batches, load_images
from dansm.scale.data.read import read_image
from dansm.scale.model import checkpoint
from dansm.scale.model.load import load_model
from dansm.scale.model.recipe import load
from dansm.scale.train import fit as trainer

import dansm
from dansm import BadInput

ROOT = Path(__file__).parents[2]
PICTURES = {f"{seed * 7919 % 2**20:05x}": picture(seed, [".jpg", ".webp"][seed % 2], (24 + seed, 20))
            for seed in range(9)}
CPU = torch.device("cpu")
TINY = dict(width=8, multipliers=(1,), blocks=1, attention_at=(), dropout=0.1)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A small autoencoder as Stable Diffusion comes: one .ckpt."""
    made = random_autoencoder(SMALL, 3)
    return as_ckpt(tmp_path_factory.mktemp("weights") / "sd.ckpt", Weights(made.weights))


@pytest.fixture
def source(tmp_path):
    return lsun(tmp_path / "bedroom_lmdb", PICTURES)


@pytest.fixture
def run(capsys):
    """Runs a command in this process: its exit code, and what it printed."""

    def run(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return run


@pytest.fixture
def encoded(run, source, weights, tmp_path):
    """Encodes the source, with more options, into a folder of that name."""

    def encoded(name="latents", *options, expect=0, source=source, weights=weights):
        code, out, err = run("encode", source, "--autoencoder", weights, "--out", tmp_path / name, "--size", 16,
                             "--shard", 4, "--batch", 3, "--device", "cpu", "--workers", 2, *options)
        assert code == expect, (out, err)
        return tmp_path / name if expect == 0 else err

    return encoded


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def expected_latents(weights, flips=False):
    images = [read_image(Path(key), 16, PICTURES[key]).transpose(2, 0, 1) for key in sorted(PICTURES)]
    if flips:
        images = [each for image in images for each in (image, image[..., ::-1])]
    return Encoder(read_autoencoder(weights), CPU).moments(torch.from_numpy(np.stack(images)))


def test_an_lmdb_is_encoded_into_shards_with_an_index(encoded, weights, source):
    out = encoded()
    index = json.loads((out / "index.json").read_text())
    found, wanted = load_images(str(out)), expected_latents(weights)[:, :4]
    assert isinstance(found, Shards) and found.shape == (9, 4, 4, 4) and found.dtype == np.float16
    assert np.allclose(found[:], wanted, atol=2e-3)
    assert sorted(contents(out)) == ["index.json", *(f"latents-0000{i}.npy" for i in range(3))]
    assert [shard["count"] for shard in index["shards"]] == [4, 4, 1]
    assert index["count"] == 9 and index["shape"] == [4, 4, 4] and index["factor"] == 0.18215 and index["size"] == 16
    assert index["autoencoder"] == read_autoencoder(weights).digest and index["source"] == str(source)
    exact = found[:].astype(np.float64)
    assert np.allclose(index["mean"], exact.mean((0, 2, 3))) and np.allclose(index["variance"], exact.var((0, 2, 3)))


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_folders_and_archives_give_the_same_latents(kind, encoded, tmp_path):
    named = {f"{key}{'.webp' if content[8:12] == b'WEBP' else '.jpg'}": content for key, content in PICTURES.items()}
    named = dict(sorted(named.items()))
    other = as_folder(tmp_path / "images", named) if kind == "folder" else packed(tmp_path / f"images.{kind}", named)
    assert np.array_equal(load_images(str(encoded("other", source=other)))[:], load_images(str(encoded()))[:])


def test_flips_follow_each_latent(encoded, weights):
    found = load_images(str(encoded("flipped", "--flips")))
    assert len(found) == 18 and np.allclose(found[:], expected_latents(weights, flips=True)[:, :4], atol=2e-3)
    assert not np.array_equal(found[1], found[0][..., ::-1])  # a mirrored latent is not the latent of the mirrored


def test_a_second_call_does_nothing_and_other_settings_are_refused(encoded, run):
    out = encoded()
    before = contents(out)
    stamps = {path: path.stat().st_mtime_ns for path in out.iterdir() if path.name != ".lock"}
    encoded()
    assert contents(out) == before
    assert stamps == {path: path.stat().st_mtime_ns for path in out.iterdir() if path.name != ".lock"}
    err = encoded("latents", "--size", 24, expect=2)
    assert err.count("\n") == 1 and "size 16 → 24" in err and "another --out" in err
    assert contents(out) == before


def test_another_source_or_autoencoder_is_refused(encoded, weights, tmp_path):
    encoded()
    other = lsun(tmp_path / "other_lmdb", dict(list(PICTURES.items())[:3]))
    assert "of other images" in encoded(expect=2, source=other)
    others = as_ckpt(tmp_path / "other.ckpt", Weights(random_autoencoder(SMALL, 4).weights))
    assert "by another autoencoder" in encoded(expect=2, weights=others)


def test_images_are_no_latents_and_none_is_read(source, weights, tmp_path, run, monkeypatch):
    monkeypatch.setattr(encode.data, "load_images", None)
    code, _, err = run("decode", source, "--autoencoder", weights, "--out", tmp_path / "out")
    assert code == 2 and f"{source} holds images (" in err and err.count("\n") == 1


KILLED = """
import os, signal, sys
import dansm
from dansm.scale.base.noise import path_noise
from dansm.scale.commands.main import main
from test_latents import torch
torch.set_num_threads(1)
replace, times = os.replace, []
def killing(*arguments):
    times.append(0)
    if sys.argv[1] == f"before {len(times)}":
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*arguments)
    if sys.argv[1] == f"after {len(times)}":
        os.kill(os.getpid(), signal.SIGKILL)
os.replace = killing
main(sys.argv[2:])
"""


def test_killed_at_any_moment_it_goes_on_and_ends_with_the_same_bytes(encoded, source, weights, tmp_path):
    whole = contents(encoded())
    command = ["encode", str(source), "--autoencoder", str(weights), "--out", str(tmp_path / "killed"), "--size", "16",
               "--shard", "4", "--batch", "3", "--device", "cpu", "--workers", "2"]
    for moment in ("before 2", "after 2", "after 5"):  # of the files, one after the other
        ended = subprocess.run([sys.executable, "-c", KILLED, moment, *command], cwd=ROOT, capture_output=True,
                               env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}, timeout=120)
        assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert contents(encoded("killed")) == whole


def test_killed_before_the_notes_are_removed(encoded, monkeypatch):
    monkeypatch.setattr(latents, "remove_notes", lambda *_: None)
    out = encoded()
    assert (out / "unfinished.json").exists()
    monkeypatch.undo()
    encoded()
    assert "unfinished.json" not in contents(out)


def test_ctrl_c_keeps_the_shards_and_the_rest_follows(encoded, tmp_path, monkeypatch):
    whole, write = contents(encoded()), latents.write_shard

    def stopping(out, number, *rest):
        if number == 1:
            raise KeyboardInterrupt
        write(out, number, *rest)

    monkeypatch.setattr(latents, "write_shard", stopping)
    err = encoded("stopped", expect=130)
    assert "1 of 3 shards were written" in err
    monkeypatch.undo()
    assert len(load_images(str(tmp_path / "stopped"))) == 4  # what is there is usable
    assert contents(encoded("stopped")) == whole


def test_a_full_disk_is_one_line_and_what_was_encoded_is_usable(encoded, tmp_path, monkeypatch):
    whole, sync, calls = contents(encoded()), os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 7:  # after the settings, a shard and its note, each with its folder
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    err = encoded("full", expect=2)
    assert err.count("\n") == 1 and "No space left on device" in err and "1 of 3 shards were written" in err
    assert not list((tmp_path / "full").glob("*.partial"))
    assert len(load_images(str(tmp_path / "full"))) == 4
    monkeypatch.undo()
    assert contents(encoded("full")) == whole


@contextmanager
def small_disk(folder):
    """A folder on a disk of 64 KB, and what fills that up."""
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("no file system may be mounted here")

    def fill():
        with pytest.raises(OSError, match="No space left"), open(folder / "filling", "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        os.truncate(folder / "filling", (folder / "filling").stat().st_size - 4096)  # a shard begins and does not end

    try:
        yield fill
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_disk_that_really_is_full_is_called_so(encoded, tmp_path, monkeypatch):
    large, write = ["--size", 64, "--shard", 8], latents.write_shard
    whole = contents(encoded("whole", *large))

    def filling(out, number, *rest):
        if number == 0:
            fill()
        write(out, number, *rest)

    with small_disk(tmp_path / "disk") as fill:
        monkeypatch.setattr(latents, "write_shard", filling)
        err = encoded("disk/latents", *large, expect=2)
        assert err.count("\n") == 1 and "No space left on device" in err and "0 of 2 shards" in err
        monkeypatch.undo()
        (tmp_path / "disk" / "filling").unlink()
        assert contents(encoded("disk/latents", *large)) == whole


def test_a_file_that_may_not_grow_is_called_so(encoded):
    """As on a full disk the system takes a part of what is written, and then no more."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        err = encoded("latents", "--size", 64, "--shard", 8, expect=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert err.count("\n") == 1 and "File too large" in err and "0 of 2 shards were written" in err


def test_a_shard_is_the_file_that_numpy_writes(tmp_path):
    array = np.random.default_rng(0).normal(size=(3, 4, 5, 5)).astype(np.float16)
    latents.write_shard(tmp_path, 7, array, 4, [])
    np.save(tmp_path / "numpy.npy", array)
    assert latents.shard_path(tmp_path, 7).read_bytes() == (tmp_path / "numpy.npy").read_bytes()


@pytest.fixture
def stopped(encoded, monkeypatch, tmp_path):
    """Encodes with more options into a folder of that name, and stops before the second shard."""

    def stopped(name, *options, **settings):
        write = latents.write_shard

        def stopping(out, number, *rest):
            if number == 1:
                raise KeyboardInterrupt
            write(out, number, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(latents, "write_shard", stopping)
            encoded(name, *options, expect=130, **settings)
        return tmp_path / name

    return stopped


@pytest.mark.parametrize("options", [(), ("--moments",), ("--flips",), ("--moments", "--flips")])
def test_what_an_unfinished_encode_has_is_read_as_what_it_is(options, encoded, stopped, trained, tmp_path):
    part, whole = stopped("part", *options), load_images(str(encoded("whole", *options)))
    found = load_images(str(part))
    assert found.shape == (4 * (1 + ("--flips" in options)), 4, 4, 4) and found.moments == ("--moments" in options)
    assert np.array_equal(found[:], whole[: len(found)]) and found.about == whole.about
    code, said, err = trained(part)
    assert code == 0 and "part: 4 of 9 images encoded so far; the same dansm encode goes on" in said, err
    assert f"{len(found)} latents of 4×4×4" in said
    state = checkpoint.load(checkpoint.newest(tmp_path / "run"))
    assert state["network"]["channels"] == 4 and state["latents"] == whole.about


def test_a_run_of_a_part_does_not_go_on_with_the_whole(encoded, stopped, trained):
    assert trained(stopped("part"))[0] == 0
    code, _, err = trained(encoded("part"), 2)
    assert code == 2 and "(images 4 → 9)" in err


def test_an_unfinished_encode_knows_its_autoencoder(stopped, run, tmp_path):
    part, other = stopped("part", weights=as_weights(tmp_path / "ours")), as_weights(tmp_path / "x", scaling_factor=0.5)
    code, _, err = run("decode", part, "--autoencoder", other, "--device", "cpu", "--out", tmp_path / "out")
    assert code == 2 and "holds latents made with factor 0.18215" in err
    assert run("decode", part, "--autoencoder", tmp_path / "ours", "--device", "cpu", "--out", tmp_path / "out")[0] == 0
    assert len(list((tmp_path / "out").glob("*.png"))) == 4


def test_an_encode_of_no_whole_shard_cannot_be_read_yet(stopped):
    part = stopped("part")
    (part / "latents-00000.json").unlink()
    with pytest.raises(BadInput, match="0 of 9 images encoded so far; expected some, the same dansm encode goes on"):
        load_images(str(part))


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("how", [Path.unlink, cut, lambda path: path.write_bytes(b""),
                                 lambda path: np.save(path, np.zeros((3, 4, 4, 4), np.float16))])
@pytest.mark.parametrize("finished", [True, False])
def test_a_shard_that_is_lost_or_cut_off_is_made_anew_and_no_other(how, finished, encoded, stopped, run, weights,
                                                                   source):
    out, whole = encoded() if finished else stopped("latents"), contents(encoded("whole"))
    lost = out / f"latents-0000{int(finished)}.npy"
    how(lost)
    kept = {path: path.stat().st_mtime_ns for path in out.glob("*.npy") if path != lost}
    with pytest.raises(BadInput, match="the same dansm encode"):
        load_images(str(out))
    code, said, err = run("encode", source, "--autoencoder", weights, "--out", out, "--size", 16, "--shard", 4,
                          "--batch", 3, "--device", "cpu")
    assert code == 0 and contents(out) == whole, err
    assert ("has lost 1 shard of 3, missing or cut off (latents-00001.npy)" in said) == finished
    assert f"this time {4 if finished else 9} images" in said
    assert kept == {path: path.stat().st_mtime_ns for path in kept}


def test_what_is_left_of_a_damaged_encode_stays_usable_while_it_is_mended(encoded, monkeypatch):
    out = encoded()
    (out / "latents-00000.npy").unlink()

    def stopping(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(latents, "write_shard", stopping)
        encoded(expect=130)
    assert len(load_images(str(out))) == 5
    assert len(load_images(str(encoded()))) == 9


def test_shards_without_their_index_are_refused_with_what_to_do(encoded):
    out = encoded()
    (out / "index.json").unlink()
    err = encoded(expect=2)
    assert "latents-0000" in err and "whose index.json is gone: expected another --out, or one without .npy" in err


def test_more_shards_than_a_process_may_have_files_open(encoded):
    out = encoded("many", "--shard", 1, "--batch", 1)
    limit, opened = resource.getrlimit(resource.RLIMIT_NOFILE), len(os.listdir("/dev/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 4, limit[1]))
    try:
        shards = load_images(str(out))
        served = batches(shards, 9, flip=False)
        assert len(next(served)) == len(shards.on(CPU)) == 9
        served.close()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)


def test_a_file_that_cannot_be_opened_says_why(encoded, monkeypatch):
    def failing(*_, **__):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    out = encoded()
    monkeypatch.setattr(np, "load", failing)
    with pytest.raises(BadInput, match=r"cannot be read as latents \(Too many open files\)"):
        load_images(str(out))


def test_a_disk_without_room_for_all_is_told_before_anything_is_encoded(encoded, monkeypatch):
    monkeypatch.setattr(encode.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    err = encoded(expect=2)
    assert err.count("\n") == 1 and "the latents of 9 images take 0.0 GB" in err


def test_an_unreadable_image_is_named_or_left_out(encoded, tmp_path):
    broken = lsun(tmp_path / "broken_lmdb", {**PICTURES, "00000": b"no image", "fffff": PICTURES["00000"][:90]})
    assert "00000 cannot be read as an image" in encoded("latents", expect=2, source=broken)
    out = encoded("others", "--skip-unreadable", source=broken)
    index = json.loads((out / "index.json").read_text())
    assert index["count"] == 8 and len(index["left_out"]) == 2 and index["left_out"][0].endswith("00000")
    assert [shard["count"] for shard in index["shards"]] == [3, 4, 1]


def test_what_an_unreadable_image_stopped_goes_on_without_it(encoded, tmp_path):
    broken = lsun(tmp_path / "broken_lmdb", {**PICTURES, "fffff": b"no image"})
    err = encoded("latents", expect=2, source=broken)
    assert "fffff cannot be read" in err and "2 of 3 shards were written" in err
    out = encoded("latents", "--skip-unreadable", source=broken)
    assert contents(out) == contents(encoded("at once", "--skip-unreadable", source=broken))
    assert len(load_images(str(out))) == 9


def test_a_shard_without_a_readable_image_is_left_out(encoded, tmp_path):
    broken = lsun(tmp_path / "broken_lmdb", {**dict.fromkeys(("!0", "!1", "!2", "!3"), b"none"), **PICTURES})
    out = encoded("others", "--skip-unreadable", source=broken)
    assert [shard["file"] for shard in json.loads((out / "index.json").read_text())["shards"]] == [
        f"latents-0000{i}.npy" for i in (1, 2, 3)]
    assert len(load_images(str(out))) == 9 and "latents-00000.npy" not in contents(out)
    broken = lsun(tmp_path / "none_lmdb", {"0": b"none"})
    assert "no readable image" in encoded("none", "--skip-unreadable", expect=2, source=broken)


def test_latents_that_are_not_finite_name_the_image(encoded, monkeypatch):
    real = Encoder.moments

    def broken(self, images):
        found = real(self, images)
        found[-1] = torch.nan
        return found

    monkeypatch.setattr(Encoder, "moments", broken)
    err = encoded(expect=2)
    assert err.count("\n") == 1 and f"{sorted(PICTURES)[2]} encodes to NaN" in err


def test_what_cannot_be_encoded_is_refused(encoded, source, tmp_path):
    assert "--size is 18: expected a multiple of 4" in encoded("x", "--size", 18, expect=2)
    np.save(tmp_path / "a.npy", np.zeros((2, 4, 4, 4), np.float16))
    assert "holds latents" in encoded(expect=2, source=tmp_path / "a.npy")
    assert "does not exist" in encoded(expect=2, source=tmp_path / "nowhere")
    (source / "data.mdb").write_bytes((source / "data.mdb").read_bytes()[:9000])
    assert "is cut off" in encoded(expect=2)
    (tmp_path / "strange").mkdir()
    np.save(tmp_path / "strange" / "a.npy", np.zeros((2, 4, 4, 4), np.float16))
    lsun(tmp_path / "whole", PICTURES)
    assert "a.npy of another origin" in encoded("strange", expect=2, source=tmp_path / "whole")


# ------------------------------------------------------------------------------- read back


def test_batches_of_shards_are_those_of_one_array(encoded):
    shards = load_images(str(encoded()))
    for resident in (None, True, False):
        ours, plain = batches(shards, 4, resident=resident), batches(torch.from_numpy(shards[:]), 4)
        for _ in range(5):
            assert torch.equal(next(ours), next(plain))
        ours.close(), plain.close()


def test_shards_are_indexed_as_an_array(encoded):
    shards = load_images(str(encoded()))
    array = np.asarray(shards)
    assert array.shape == shards.shape and len(shards) == 9 and shards.nbytes == array.nbytes
    for rows in (3, -1, slice(2, 7), slice(None, None, 3), np.array([8, 0, 8, 4])):
        assert np.array_equal(shards[rows], array[rows])
    assert np.array_equal(np.take(shards, [7, 1], axis=0), array[[7, 1]])
    assert len(np.take(shards, [], axis=0)) == 0
    for wrong in ([9], [-1], [0, 12]):
        with pytest.raises(IndexError):
            shards.take(wrong)


def test_damaged_shards_are_refused(encoded):
    out = encoded()
    with pytest.raises(BadInput, match=r"taken as they are"):
        load_images(str(out), size=16)
    np.save(out / "latents-00001.npy", np.zeros((4, 4, 4, 5), np.float16))
    with pytest.raises(BadInput, match=r"latents-00001\.npy holds float16 \(4, 4, 5\)"):
        load_images(str(out))
    np.save(out / "latents-00001.npy", np.zeros((3, 4, 4, 4), np.float16))
    with pytest.raises(BadInput, match=r"holds latents \(8, 4, 4, 4\): expected \(9, 4, 4, 4\)"):
        load_images(str(out))
    (out / "latents-00001.npy").unlink()
    with pytest.raises(BadInput, match=r"latents-00001\.npy cannot be read"):
        load_images(str(out))
    (out / "index.json").write_text('{"dansm_latents": 1}')
    with pytest.raises(BadInput, match=r"lacks 'shards'"):
        load_images(str(out))
    (out / "index.json").write_text('{"dansm_latents": 99}')
    with pytest.raises(BadInput, match=r"version 99"):
        load_images(str(out))


def test_the_papers_layout_is_read_also_beside_an_index_of_anothers(tmp_path):
    (tmp_path / "index.json").write_text("no JSON")
    array = np.random.default_rng(0).normal(size=(3, 4, 4, 4)).astype(np.float32)
    for number, latent in enumerate(array):
        np.save(tmp_path / f"{number}.npy", latent)
    assert np.array_equal(load_images(str(tmp_path)), array)


def test_moments_are_drawn_from_anew_and_the_same_for_any_count_of_ranks(encoded, weights):
    shards = load_images(str(encoded("moments", "--moments")))
    assert shards.shape == (9, 4, 4, 4) and shards.moments and shards.stored == (8, 4, 4)
    wanted = expected_latents(weights)
    assert np.allclose(shards.take(np.arange(9)), wanted, atol=2e-2)
    assert np.allclose(shards[:], wanted[:, :4], atol=2e-3)
    alone = batches(shards, 6, flip=False, seed=1)
    several = [batches(shards, 6, flip=False, seed=1, rank=rank, ranks=2, resident=True) for rank in range(2)]
    first = [next(alone) for _ in range(4)]
    assert all(torch.equal(x, torch.cat([next(each) for each in several])) for x in first)
    assert torch.equal(next(batches(shards, 6, flip=False, seed=1, start=2)), first[2])
    order = np.random.default_rng([1, 0]).permutation(9)[:6]
    mean, log_variance = torch.from_numpy(shards.take(order)).float().chunk(2, 1)
    noise = (first[0] - mean) / (log_variance / 2).exp()
    assert first[0].shape == (6, 4, 4, 4) and abs(noise.mean()) < 0.3 and abs(noise.std() - 1) < 0.2


# ------------------------------------------------------------------------------- and back


def test_decode_writes_what_the_decoder_makes(encoded, run, weights, tmp_path):
    out = encoded()
    code, said, err = run("decode", out, "--autoencoder", weights, "--out", tmp_path / "images", "--batch", 4,
                          "--device", "cpu")
    assert code == 0, err
    written = sorted((tmp_path / "images").glob("*.png"))
    assert [path.name for path in written] == [f"{i:06d}.png" for i in range(9)] and "9 images" in said
    wanted = Decoder(read_autoencoder(weights), CPU).decode(torch.from_numpy(load_images(str(out))[:]))
    found = np.stack([np.asarray(Image.open(path)) for path in written]).transpose(0, 3, 1, 2)
    assert abs(found.astype(int) - wanted.numpy()).max() <= 1


@pytest.mark.parametrize("kind", ["one", "several", "folder", "moments"])
def test_decode_takes_every_form_of_latents(kind, encoded, run, weights, tmp_path):
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
    code, _, err = run("decode", source, "--autoencoder", weights, "--out", tmp_path / "images", "--device", "cpu",
                       "--count", 3, "--memory", 0.001)
    assert code == 0 and len(list((tmp_path / "images").glob("*.png"))) == (1 if kind == "one" else 3), err


def test_latents_that_cannot_be_decoded_are_refused(encoded, run, weights, tmp_path):
    def refused(array=None, source=tmp_path / "a.npy", autoencoder=weights):
        if array is not None:
            np.save(source, array)
        code, _, err = run("decode", source, "--autoencoder", autoencoder, "--out", tmp_path / "x", "--device", "cpu")
        assert code == 2 and err.count("\n") == 1, err
        return err

    assert "3 channels" in refused(np.zeros((2, 3, 4, 4), np.float16))
    assert "NaN" in refused(np.full((2, 4, 4, 4), np.nan, np.float16))
    assert "NaN" in refused(np.full((4, 4, 4), np.inf, np.float16))
    assert "decodes to NaN" in refused(np.full((2, 4, 4, 4), 3e38, np.float32))
    assert "does not exist" in refused(source=tmp_path / "nowhere")
    others = as_ckpt(tmp_path / "other.ckpt", Weights(random_autoencoder(SMALL, 4).weights))
    assert "expected the same autoencoder" in refused(source=encoded(), autoencoder=others)
    as_folder(tmp_path / "images", {"a.png": picture(0)})
    assert "holds images" in refused(source=tmp_path / "images")


def stamps(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.png")}


@pytest.fixture
def decoded(run, encoded, weights, tmp_path):
    """Decodes the encoded source into a folder, with more options."""
    source = encoded()

    def decoded(*options, expect=0, source=source, weights=weights):
        code, said, err = run("decode", source, "--autoencoder", weights, "--out", tmp_path / "images", "--device",
                              "cpu", *options)
        assert code == expect, (said, err)
        return said if expect == 0 else err

    return decoded


def test_what_is_decoded_already_is_left_as_it_is(decoded, tmp_path):
    images = tmp_path / "images"
    decoded("--count", 5, "--batch", 2)
    before = stamps(images)
    assert len(before) == 5
    assert "images holds 5 images already: nothing to do" in decoded("--count", 5)
    (images / "000001.png").unlink()
    assert "5 images in" in decoded("--batch", 4)
    after = stamps(images)
    kept = {name for name in before if before[name] == after[name]}
    assert len(after) == 9 and kept == before.keys() - {"000001.png"}
    assert not list(images.glob("*.partial"))


def test_images_that_go_on_are_those_of_one_call(decoded, tmp_path):
    decoded()
    whole = {path.name: np.asarray(Image.open(path)) for path in (tmp_path / "images").glob("*.png")}
    for name in list(whole)[::2]:
        (tmp_path / "images" / name).unlink()
    decoded()
    for name, image in whole.items():
        assert np.array_equal(image, np.asarray(Image.open(tmp_path / "images" / name)))


def test_images_of_other_latents_are_no_part_of_these(decoded, encoded, weights, tmp_path):
    decoded("--count", 1)
    before = stamps(tmp_path / "images")
    other = as_weights(tmp_path / "other", scaling_factor=0.5)
    assert "precision float32 → bfloat16" in decoded("--precision", "bf16", expect=2)
    for options in (dict(weights=other, source=encoded("b", weights=other)),
                    dict(source=encoded("flipped", "--flips"))):
        err = decoded(expect=2, **options)
        assert err.count("\n") == 1 and "images that were decoded otherwise" in err and "another --out" in err
    assert stamps(tmp_path / "images") == before
    (tmp_path / "images" / "decode.json").unlink()
    assert "000000.png of another origin" in decoded(expect=2)


def test_decoding_stopped_by_ctrl_c_goes_on(decoded, tmp_path, monkeypatch):
    save = encode._save

    def stopping(out, numbered):
        if numbered[0] == 6:
            raise KeyboardInterrupt
        save(out, numbered)

    with monkeypatch.context() as patch:
        patch.setattr(encode, "_save", stopping)
        assert "of 9 images are written, the same command goes on" in decoded("--batch", 2, expect=130)
    before = stamps(tmp_path / "images")
    decoded()
    after = stamps(tmp_path / "images")
    assert len(after) == 9 and before.items() <= after.items()


def test_a_full_disk_while_decoding_is_one_line(encoded, run, weights, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    out = encoded()
    monkeypatch.setattr(Image.Image, "save", full)
    code, _, err = run("decode", out, "--autoencoder", weights, "--out", tmp_path / "x", "--device", "cpu")
    assert code == 2 and err.count("\n") == 1 and "No space left" in err and "0 of 9 images" in err


@pytest.mark.parametrize("kind", ["plain", "moments"])
def test_the_whole_chain_from_an_lmdb_to_pictures(kind, encoded, run, weights, tmp_path, monkeypatch):
    monkeypatch.setitem(dansm.NETWORKS, "small", TINY)
    out = encoded("latents", *["--moments"] * (kind == "moments"))
    code, said, err = run("train", out, "--network", "small", "--batch", 6, "--match-size", 6, "--steps", 3,
                          "--sample-steps", 2, "--device", "cpu", "--out", tmp_path / "run", "--no-flip")
    assert code == 0 and "9 latents of 4×4×4" in said, err
    sample = ["sample", tmp_path / "run", "--count", 5, "--batch", 2, "--steps", 2, "--device", "cpu", "--files",
              "--out", tmp_path / "samples"]
    code, _, err = run(*sample, "--autoencoder", weights)
    assert code == 0, err
    assert Image.open(tmp_path / "samples" / "000004.png").size == (16, 16)
    assert json.loads((tmp_path / "samples" / "sample.json").read_text())["autoencoder"] == str(weights)
    code, _, err = run(*sample)
    assert code == 2 and "4 channels" in err and "--autoencoder" in err
    other = as_ckpt(tmp_path / "other.ckpt", Weights(random_autoencoder(SMALL, 4).weights))
    code, _, err = run(*sample, "--autoencoder", other)
    assert code == 2 and err.count("\n") == 1 and "expected the same autoencoder" in err
    others = {**SMALL, "latent_channels": 8}
    other = as_ckpt(tmp_path / "eight.ckpt", Weights(random_autoencoder(others, 4).weights))
    code, _, err = run(*sample, "--autoencoder", other)
    assert code == 2 and "decodes 8" in err


def test_make_latent_bedroom_runs_every_stage(source, weights, tmp_path):
    pytest.importorskip("torch_fidelity")
    train = "--width 8 --multipliers 1 --blocks 1 --batch 4 --match-size 8 --decay 0.9 --device cpu --steps"
    command = ["make", "-f", ROOT / "Makefile", "latent-bedroom", f"PYTHON={sys.executable}",
               f"DANSM={sys.executable} {ROOT / 'dansm.py'}", f"LSUN={source}", f"AUTOENCODER={weights}",
               "ENCODE=--size 16 --device cpu", "SAMPLE=--count 4 --device cpu",
               "EVALUATE=--features test_evaluate:seen --steps 2 --count 4 --device cpu --cache cache"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1"}

    def made(steps):
        return subprocess.run([*map(str, command), f"TRAIN={train} {steps}"], cwd=tmp_path, env=environment,
                              capture_output=True, text=True)

    said = made("100000 --minutes 0.000001")
    assert said.returncode and "not all steps are made" in said.stderr, said  # as by Ctrl-C: there is nothing to judge
    assert (tmp_path / "runs" / "latent-bedroom").exists()
    assert not (tmp_path / "runs" / "latent-bedroom-samples").exists()
    said = made(2)
    assert said.returncode == 0 and "going on from step 1" in said.stdout, said
    assert "9 latents of 4×4×4" in said.stdout
    assert Image.open(tmp_path / "runs" / "latent-bedroom-samples" / "samples.png").size == (2 * 34 + 2, 2 * 34 + 2)
    rows = json.loads((tmp_path / "runs" / "latent-bedroom-evaluate" / "evaluate.json").read_text())["rows"]
    assert [row.get("trained_steps") for row in rows] == [None, 2]


OWN = {"moments": False, "flips": False, "size": 16}


def as_weights(path, **settings):
    """A diffusers folder with the weights of the fixture, and these settings."""
    made = random_autoencoder(SMALL, 3)
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL", **made.settings, **settings}))
    save_file(made.weights, path / FILES[0])
    return path


@pytest.fixture
def trained(run, monkeypatch, tmp_path):
    """Trains a small network on data for so many steps in all: exit code, what it printed."""
    monkeypatch.setitem(dansm.NETWORKS, "small", TINY)

    def trained(data, steps=1, *options):
        return run("train", data, "--network", "small", "--batch", 4, "--match-size", 4, "--steps", steps, "--device",
                   "cpu", "--sample-steps", 2, "--out", tmp_path / "run", *options)

    return trained


def test_a_run_goes_on_where_its_latents_have_moved_and_on_no_others(encoded, trained):
    latents = encoded()
    assert trained(latents)[0] == 0
    moved = latents.rename(latents.with_name("elsewhere"))
    assert trained(moved, 2)[0] == 0
    first = moved / "latents-00000.npy"
    np.save(first, np.load(first) + np.float16(0.5))
    code, _, err = trained(moved, 3)
    assert code == 2 and "as many images, but not the same ones" in err


@pytest.mark.parametrize(("name", "ours", "other"), [("factor", 0.5, 0.25), ("shift", 0.1, 0.0)])
def test_latents_of_another_factor_are_told_by_the_run_itself(name, ours, other, run, encoded, trained, source,
                                                              tmp_path):
    pytest.importorskip("torch_fidelity")
    named = {"factor": "scaling_factor", "shift": "shift_factor"}[name]
    ours, other = as_weights(tmp_path / "ours", **{named: ours}), as_weights(tmp_path / "other", **{named: other})
    data = encoded("latents", weights=ours)
    code, _, err = trained(data)
    assert code == 0, err
    state = checkpoint.load(checkpoint.newest(tmp_path / "run"))
    known = {**OWN, **read_autoencoder(ours).identity, "source": str(source)}
    assert state["latents"] == known
    assert run("export", tmp_path / "run", "--out", tmp_path / "w.safetensors")[0] == 0
    assert load_model(tmp_path / "w.safetensors").about["latents"] == known
    shutil.rmtree(data)
    encoded("latents", weights=other)
    code, _, err = trained(data, 2)
    assert code == 2 and err.count("\n") == 1 and f"(latents of {name} {known[name]} → " in err, err
    measured = ["--data", source, "--size", 16, "--features", "test_evaluate:seen", "--cache", tmp_path / "cache"]
    for gone in (False, True):
        if gone:
            shutil.rmtree(data)
        for model in (tmp_path / "run", tmp_path / "w.safetensors"):
            for command in (["sample", model, "--count", 2, "--steps", 2], ["grid", model, "--steps", 2, "--side", 1],
                            ["evaluate", model, "--count", 6, "--steps", 2, *measured]):
                command += ["--device", "cpu", "--out", tmp_path / "out", "--autoencoder"]
                code, _, err = run(*command, other)
                assert code == 2 and f"draws latents made with {name} {known[name]}" in err, err
        assert run(*command, ours)[0] == 0


def test_other_factors_make_other_rows(run, trained, source, tmp_path):
    """Of latents of which nothing is known, which any autoencoder may decode."""
    pytest.importorskip("torch_fidelity")
    np.save(tmp_path / "a.npy", np.random.default_rng(0).normal(size=(9, 4, 4, 4)).astype(np.float32))
    assert trained(tmp_path / "a.npy")[0] == 0
    for number, settings in enumerate(({}, {"scaling_factor": 0.5}, {"shift_factor": 0.1})):
        weights = as_weights(tmp_path / str(number), **settings)
        code, _, err = run("evaluate", tmp_path / "run", "--autoencoder", weights, "--data", source, "--size", 16,
                           "--features", "test_evaluate:seen", "--steps", 2, "--count", 6, "--device", "cpu", "--cache",
                           tmp_path / "cache", "--out", tmp_path / "evaluated")
        assert code == 0, err
    rows = json.loads((tmp_path / "evaluated" / "evaluate.json").read_text())["rows"]
    assert len(rows) == len({row["frechet_distance"] for row in rows}) == 4


def test_latents_of_three_channels_are_no_pictures(run, encoded, trained, tmp_path):
    weights = as_ckpt(tmp_path / "3.ckpt", Weights(random_autoencoder({**SMALL, "latent_channels": 3}, 3).weights))
    code, said, err = trained(encoded("three", weights=weights), 1, "--flow", "diffusion")
    assert code == 0 and "9 latents of 3×4×4" in said and "dansm sample" not in said, err
    assert not list((tmp_path / "run").glob("*.png"))
    assert load_model(tmp_path / "run").flow.bound is None
    sample = ["sample", tmp_path / "run", "--count", 2, "--steps", 2, "--device", "cpu", "--out", tmp_path / "out"]
    code, _, err = run(*sample)
    assert code == 2 and "draws latents of 3 channels" in err
    assert run(*sample, "--autoencoder", weights)[0] == 0
    assert Image.open(tmp_path / "out" / "samples.png").size == (2 * 34 + 2, 36)


@pytest.mark.parametrize("kind", ["images", "latents"])
def test_a_run_of_images_does_not_go_on_with_latents_nor_the_other_way_round(kind, trained, tmp_path):
    data, made = tmp_path / "data", []
    for each in ((kind, "latents" if kind == "images" else "images")):
        shutil.rmtree(data, ignore_errors=True)
        data.mkdir()
        for number in range(4):
            if each == "images":
                (data / f"{number}.png").write_bytes(picture(number, size=(8, 8)))
            else:
                np.save(data / f"{number}.npy", np.zeros((3, 8, 8), np.float32))
        made.append(trained(data, 1 + len(made), "--no-flip"))
    assert made[0][0] == 0 and made[1][0] == 2
    assert f"({kind} → {'latents' if kind == 'images' else 'images'})" in made[1][2]


@pytest.mark.parametrize(("given", "mirrored"), [((), False), (("--flip",), True), (("--no-flip",), False)])
def test_latents_are_mirrored_only_where_that_is_asked_for(given, mirrored, encoded, trained, tmp_path, monkeypatch):
    served, real = [], trainer.data.batches

    def seen(*arguments, **settings):
        for x in (made := real(*arguments, **settings)):
            served.append(x.clone())
            yield x
        made.close()

    monkeypatch.setattr(trainer.data, "batches", seen)
    code, said, err = trained(encoded(), 9, *given)
    assert code == 0 and ("half are mirrored" in said) == mirrored, err
    known = {tuple(latent.ravel()) for latent in load_images(str(tmp_path / "latents"))[:].astype(np.float32)}
    assert ({tuple(latent.flatten().tolist()) for latent in torch.cat(served)} <= known) != mirrored
    assert load(str(tmp_path / "run" / "recipe.toml")).flip == mirrored


def test_latents_are_decoded_in_the_memory_that_is_given(run, encoded, trained, weights, tmp_path, monkeypatch):
    pytest.importorskip("torch_fidelity")
    sizes, real = [], Decoder.decode_at_once

    def counting(self, latents, *rest):
        sizes.append(len(latents))
        return real(self, latents, *rest)

    assert trained(encoded())[0] == 0
    monkeypatch.setattr(Decoder, "decode_at_once", counting)
    model, both = tmp_path / "run", ["--autoencoder", weights, "--device", "cpu", "--out", tmp_path / "out"]
    for command in (["sample", model, "--count", 4, "--steps", 2], ["grid", model, "--steps", 2, "--side", 2],
                    ["evaluate", model, "--count", 4, "--steps", 2, "--features", "test_evaluate:seen", "--cache",
                     tmp_path / "cache"]):
        for memory, batch in ((1e-6, 1), (7 * 32 * 16**2 * 4 * 2.5 / 1e9, 2), (1, 4)):
            sizes.clear()
            shutil.rmtree(tmp_path / "out", ignore_errors=True)
            code, _, err = run(*command, *both, "--memory", memory)
            assert code == 0 and sizes == [batch] * (4 // batch), err


@pytest.mark.parametrize("method", ["greedy", "random"])
def test_a_latent_that_is_nan_is_named_with_its_file_by_the_training(method, encoded, trained):
    shard = encoded() / "latents-00001.npy"
    array = np.load(shard)
    array[2, 0, 1, 1] = np.nan
    np.save(shard, array)
    code, _, err = trained(shard.parent, 9, "--method", method)
    assert code == 2 and err.count("\n") == 1, err
    assert f"{shard} holds NaN or infinite numbers, in latent 2: expected finite latents; without this file" in err
    code, _, err = trained(encoded("whole"), 9, "--lr", 1e30)
    assert code == 2 and "--lr is 1e+30" in err


def test_a_latent_of_one_large_file_is_named_by_its_number(tmp_path):
    array = np.zeros((3000, 4, 64, 64), np.float16)
    array[2345, 3, 9, 9] = np.inf
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(BadInput, match=r"a\.npy holds NaN or infinite numbers, in latent 2345: expected"):
        load_images(str(tmp_path / "a.npy"))


def test_a_sample_that_is_nan_is_named_by_its_number(run, encoded, trained, weights, tmp_path, monkeypatch):
    assert trained(encoded())[0] == 0
    real, drawn = dansm.RectifiedFlow.sample, []

    def broken(self, net, z, steps):
        x = real(self, net, z, steps)
        drawn.extend(x)
        if len(drawn) == 12:
            x[-1] = torch.nan
        return x

    monkeypatch.setattr(dansm.RectifiedFlow, "sample", broken)
    code, _, err = run("sample", tmp_path / "run", "--autoencoder", weights, "--device", "cpu", "--count", 16,
                       "--batch", 4, "--steps", 2, "--out", tmp_path / "out")
    assert code == 2 and "latent 11 holds NaN" in err


def test_an_autoencoder_for_a_network_of_images_is_refused(run, weights, tmp_path, monkeypatch):
    monkeypatch.setitem(dansm.NETWORKS, "small", TINY)
    source = as_folder(tmp_path / "images", {f"{i}.png": picture(i, size=(8, 8)) for i in range(4)})
    code, _, err = run("train", source, "--network", "small", "--batch", 4, "--match-size", 4, "--steps", 1,
                       "--sample-steps", 2, "--device", "cpu", "--out", tmp_path / "run")
    assert code == 0, err
    assert load(str(tmp_path / "run" / "recipe.toml")).flip  # as images are where nothing is said
    code, _, err = run("sample", tmp_path / "run", "--autoencoder", weights, "--device", "cpu", "--out", tmp_path / "x")
    assert code == 2 and err.count("\n") == 1 and "draws images of 3 channels: expected none" in err


# ------------------------------------------------------------------------------- several processes


def test_two_processes_write_the_bytes_of_one(encoded, source, weights, tmp_path):
    from test_trainer import in_processes

    whole = contents(encoded())
    command = ["encode", source, "--autoencoder", weights, "--out", tmp_path / "both", "--size", 16, "--shard", 4,
               "--batch", 3, "--device", "cpu", "--workers", 1]
    codes, said = in_processes(tmp_path, command)
    assert codes == [[0], [0]], said
    assert contents(tmp_path / "both") == whole and "9 latents" in said[0] and not said[1].strip()


# ------------------------------------------------------------------------------- how fast


def test_the_bench_times_both_halves_and_the_commands(run, tmp_path, monkeypatch):
    from dansm.scale.bench import autoencoder
    from dansm.scale.data import autoencoder

    monkeypatch.setattr(autoencoder, "SETTINGS", {**autoencoder.SETTINGS, **SMALL})
    monkeypatch.setattr(bench_autoencoder, "REPEATS", (2, 2))
    code, out, err = run("bench", "autoencoder", "--shape", "4x4x4", "--samples", 5, "--device", "cpu",
                         "--out", tmp_path)
    assert code == 0, err
    rows = json.loads((tmp_path / "autoencoder.json").read_text())["rows"]
    assert [(row["what"], row["batch"]) for row in rows] == [
        ("encode", 1), ("encode", 4), ("decode", 1), ("decode", 4), ("dansm encode", 5), ("dansm decode", 5)]
    assert all(row["images_per_second"] > 0 for row in rows) and rows[0]["operations_per_image"] > 1e6
    assert "images/s" in out and (tmp_path / "autoencoder.csv").read_text().count("\n") == 7
    code, _, err = run("bench", "autoencoder", "--shape", "4x4", "--device", "cpu", "--out", tmp_path)
    assert code == 2 and "expected that of square latents" in err


def test_a_model_of_latents_is_evaluated_against_the_images_it_was_encoded_from(run, encoded, weights, source, tmp_path,
                                                                               monkeypatch):
    pytest.importorskip("torch_fidelity")
    from dansm.scale.data import loader as scale_data
    from dansm.scale.evaluate import evaluate
    from test_evaluate import SEEN

    monkeypatch.setitem(dansm.NETWORKS, "small", TINY)
    monkeypatch.setattr(evaluate, "SUBSETS", 5)
    data = encoded()
    code, _, err = run("train", data, "--network", "small", "--batch", 4, "--match-size", 10, "--steps", 2, "--device",
                       "cpu", "--out", tmp_path / "run")
    assert code == 0, err
    command = ["evaluate", tmp_path / "run", "--features", "test_evaluate:seen", "--steps", "2,3", "--count", 6,
               "--device", "cpu", "--cache", tmp_path / "cache", "--out", tmp_path / "evaluated"]
    with monkeypatch.context() as patch:
        patch.setattr(scale_data, "free_memory", lambda _: 0)  # three million images do not fit, and need not
        code, said, err = run(*command, "--autoencoder", weights)
    assert (code, err) == (0, ""), said
    rows = json.loads((tmp_path / "evaluated" / "evaluate.json").read_text())["rows"]
    assert [(row["data"], row["real_images"], row.get("steps")) for row in rows] == [
        (str(source), len(PICTURES), steps) for steps in (None, 2, 3)]
    model = load_model(tmp_path / "run")
    z = path_noise(range(6), (4, *load_images(str(data)).shape[2:]))
    images = Decoder(read_autoencoder(weights), CPU).decode(model.flow.sample(model.net, z, 2))
    real = evaluate.real_features(load_images(str(source), size=16), SEEN, CPU)
    distance = evaluate.frechet_distance(SEEN.extract(images)[0], real)
    assert rows[1]["frechet_distance"] == pytest.approx(distance, rel=1e-3)
    code, _, err = run(*command)
    assert code == 2 and "--autoencoder to decode them" in err
    code, _, err = run("grid", tmp_path / "run", tmp_path / "run", "--steps", "2,3", "--side", 2, "--autoencoder",
                       weights, "--device", "cpu", "--out", tmp_path / "grid")
    assert (code, err) == (0, "") and (tmp_path / "grid" / "grid.png").exists()
    (data / "index.json").unlink()  # the run says itself what images its latents are of
    assert run(*command, "--autoencoder", weights)[0] == 0
    np.save(tmp_path / "plain.npy", np.asarray(load_images(str(data))))
    assert run("train", tmp_path / "plain.npy", "--network", "small", "--batch", 4, "--match-size", 10, "--steps", 1,
               "--device", "cpu", "--out", tmp_path / "of-plain")[0] == 0
    code, _, err = run("evaluate", tmp_path / "of-plain", *command[2:], "--autoencoder", weights)
    assert code == 2 and err.count("\n") == 1 and "expected --data" in err
