"""Images to latents and back: JPEG and WebP in an lmdb as LSUN packs it, a small autoencoder, kills and full disks."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_autoencoder import SMALL, as_ckpt
from test_read import as_folder, lsun, packed, picture

pytest.importorskip("diffusers")

import dansm
from dansm import BadInput
from scale import encode, latents
from scale.autoencoder import Decoder, Encoder, random_autoencoder, read_autoencoder
from scale.data import batches, load_images
from scale.latents import Shards
from scale.read import read_image

ROOT = Path(__file__).parent.parent
PICTURES = {f"{seed * 7919 % 2**20:05x}": picture(seed, [".jpg", ".webp"][seed % 2], (24 + seed, 20))
            for seed in range(9)}
CPU = torch.device("cpu")
TINY = dict(width=8, multipliers=(1,), blocks=1, attention_at=(), dropout=0.1)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A small autoencoder as Stable Diffusion comes: one .ckpt."""
    made = random_autoencoder(SMALL, 3)
    return as_ckpt(tmp_path_factory.mktemp("weights") / "sd.ckpt", Network(made.weights))


class Network:
    def __init__(self, weights):
        self.state_dict = lambda: weights


@pytest.fixture
def source(tmp_path):
    return lsun(tmp_path / "bedroom_lmdb", PICTURES)


@pytest.fixture
def run(capsys):
    """Runs a command in this process: its exit code, and what it printed."""

    def run(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            dansm.main([str(argument) for argument in arguments])
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
    assert "source_digest" in encoded(expect=2, source=other)
    others = as_ckpt(tmp_path / "other.ckpt", Network(random_autoencoder(SMALL, 4).weights))
    assert "autoencoder" in encoded(expect=2, weights=others)


KILLED = """
import os, signal, sys
import dansm
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
dansm.main(sys.argv[2:])
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
    whole, save, calls = contents(encoded()), np.save, []

    def full(file, array):
        calls.append(0)
        if len(calls) == 2:
            file.write(b"some")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(file, array)

    monkeypatch.setattr(np, "save", full)
    err = encoded("full", expect=2)
    assert err.count("\n") == 1 and "No space left on device" in err and "1 of 3 shards were written" in err
    assert not list((tmp_path / "full").glob("*.partial"))
    assert len(load_images(str(tmp_path / "full"))) == 4
    monkeypatch.undo()
    assert contents(encoded("full")) == whole


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
    others = as_ckpt(tmp_path / "other.ckpt", Network(random_autoencoder(SMALL, 4).weights))
    assert "expected the same autoencoder" in refused(source=encoded(), autoencoder=others)
    as_folder(tmp_path / "images", {"a.png": picture(0)})
    assert "holds images" in refused(source=tmp_path / "images")


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
    other = as_ckpt(tmp_path / "other.ckpt", Network(random_autoencoder(SMALL, 4).weights))
    code, _, err = run(*sample, "--autoencoder", other)
    assert code == 2 and err.count("\n") == 1 and "expected the same autoencoder" in err
    others = {**SMALL, "latent_channels": 8}
    other = as_ckpt(tmp_path / "eight.ckpt", Network(random_autoencoder(others, 4).weights))
    code, _, err = run(*sample, "--autoencoder", other)
    assert code == 2 and "decodes 8" in err


def test_make_latent_bedroom_runs_every_stage(source, weights, tmp_path):
    pytest.importorskip("torch_fidelity")
    train = "--width 8 --multipliers 1 --blocks 1 --batch 4 --match-size 8 --decay 0.9 --steps 2 --device cpu"
    command = ["make", "-f", ROOT / "Makefile", "latent-bedroom", f"PYTHON={sys.executable}",
               f"DANSM={sys.executable} {ROOT / 'dansm.py'}", f"LSUN={source}", f"AUTOENCODER={weights}",
               "ENCODE=--size 16 --device cpu", f"TRAIN={train}", "SAMPLE=--count 4 --device cpu",
               "EVALUATE=--features test_evaluate:seen --steps 2 --count 4 --device cpu --cache cache"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1"}
    said = subprocess.run(list(map(str, command)), cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert said.returncode == 0, said
    assert "9 latents of 4×4×4" in said.stdout
    assert Image.open(tmp_path / "runs" / "latent-bedroom-samples" / "samples.png").size == (2 * 34 + 2, 2 * 34 + 2)
    rows = json.loads((tmp_path / "runs" / "latent-bedroom-evaluate" / "evaluate.json").read_text())["rows"]
    assert [row.get("trained_steps") for row in rows] == [None, 2]


def test_an_autoencoder_for_a_network_of_images_is_refused(run, weights, tmp_path, monkeypatch):
    monkeypatch.setitem(dansm.NETWORKS, "small", TINY)
    source = as_folder(tmp_path / "images", {f"{i}.png": picture(i, size=(8, 8)) for i in range(4)})
    code, _, err = run("train", source, "--network", "small", "--batch", 4, "--match-size", 4, "--steps", 1,
                       "--sample-steps", 2, "--device", "cpu", "--out", tmp_path / "run")
    assert code == 0, err
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
    from scale import autoencoder, bench_autoencoder

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
    from test_evaluate import SEEN

    from scale import data as scale_data
    from scale import evaluate

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
    net, flow, _ = evaluate.checkpoint.load_model(tmp_path / "run", "cpu", "euler")
    z = dansm.path_noise(range(6), (4, *load_images(str(data)).shape[2:]))
    images = Decoder(read_autoencoder(weights), CPU).decode(flow.sample(net, z, 2))
    real = evaluate.real_features(load_images(str(source), size=16), SEEN, CPU)
    distance = evaluate.frechet_distance(SEEN.extract(images)[0], real)
    assert rows[1]["frechet_distance"] == pytest.approx(distance, rel=1e-3)
    code, _, err = run(*command)
    assert code == 2 and "--autoencoder to decode them" in err
    code, _, err = run("grid", tmp_path / "run", tmp_path / "run", "--steps", "2,3", "--side", 2, "--autoencoder",
                       weights, "--device", "cpu", "--out", tmp_path / "grid")
    assert (code, err) == (0, "") and (tmp_path / "grid" / "grid.png").exists()
    (data / "index.json").unlink()
    code, _, err = run(*command, "--autoencoder", weights)
    assert code == 2 and err.count("\n") == 1 and "expected --data" in err
