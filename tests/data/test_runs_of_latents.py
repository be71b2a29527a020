"""From images to latents to a model and back: runs know their latents, and models the autoencoder that decodes them."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from support import ROOT, as_folder, picture, state_of

import dansm
from dansm.scale.data import loader
from dansm.scale.data.loader import load_images
from dansm.scale.model import checkpoint

pytest.importorskip("diffusers")

from autoencoders import as_folder_of_diffusers, random_ckpt

from dansm.scale.data.autoencoder import Decoder, read_autoencoder


def drawing(model, *options):
    return ["sample", model, "--count", 5, "--batch", 2, "--steps", 2, "--device", "cpu", "--out", "samples", *options]


@pytest.mark.parametrize("kind", ["plain", "moments"])
def test_the_whole_chain_from_an_lmdb_to_pictures(kind, encoded, trained, run, refused, weights, other_weights,
                                                  tmp_path):
    code, said, err = trained(encoded("latents", *["--moments"] * (kind == "moments")), 3, "--no-flip")
    assert code == 0 and "9 latents of 4×4×4" in said, err
    code, _, err = run(*drawing(tmp_path / "run", "--files", "--autoencoder", weights))
    assert code == 0, err
    assert Image.open(tmp_path / "samples" / "000004.png").size == (16, 16)
    assert json.loads((tmp_path / "samples" / "sample.json").read_text())["autoencoder"] == str(weights)
    assert "--autoencoder" in refused(*drawing(tmp_path / "run"))
    for other in (other_weights, random_ckpt(tmp_path / "eight.ckpt", 4, latent_channels=8)):
        assert str(other) in refused(*drawing(tmp_path / "run", "--autoencoder", other))


def test_a_recipe_for_latents_takes_no_images(refused, source, tmp_path):
    for data, told in ((source, "holds images"), (tmp_path / "nowhere", "does not exist")):
        message = refused("train", "latent-bedroom", "--data", data, "--device", "cpu", "--out", tmp_path / "run")
        assert f"{data} {told}" in message and "dansm encode" in message
    assert not (tmp_path / "run").exists()


def test_latents_of_classes_train_a_network_that_knows_them(encoded, trained, photographs, tmp_path):
    content = {f"{name}/{key}.jpg": photographs[key] for name, key in zip("abcaabbcc", photographs, strict=True)}
    data = encoded(source=as_folder(tmp_path / "classes", content))
    code, said, err = trained(data, 3, "--labels", "auto")
    assert code == 0 and "3 classes" in said and str(data / "index.json") in said, err
    assert state_of(tmp_path / "run")["classes"] == ["a", "b", "c"]
    assert "labels" not in state_of(tmp_path / "run")["latents"]


def test_a_run_of_an_unfinished_encode_does_not_go_on_with_the_whole(encoded, stopped, trained, refused, tmp_path):
    code, said, err = trained(stopped("part"))
    assert code == 0 and "4 of 9 images" in said and "4 latents of 4×4×4" in said, err
    code, _, err = trained(encoded("part"), 2)
    assert code == 2 and "4 → 9" in err


def test_a_run_resumes_where_its_latents_have_moved_and_on_no_others(encoded, trained):
    latents = encoded()
    assert trained(latents)[0] == 0
    moved = latents.rename(latents.with_name("elsewhere"))
    assert trained(moved, 2)[0] == 0
    first = moved / "latents-00000.npy"
    np.save(first, np.load(first) + np.float16(0.5))
    code, _, err = trained(moved, 3)
    assert code == 2 and err.count("\n") == 1


@pytest.mark.parametrize(("name", "setting"), [("factor", "scaling_factor"), ("shift", "shift_factor")])
def test_latents_of_another_factor_are_told_by_the_run_itself(name, setting, run, refused, encoded, trained, source,
                                                              tmp_path):
    ours = as_folder_of_diffusers(tmp_path / "ours", **{setting: 0.5})
    other = as_folder_of_diffusers(tmp_path / "other", **{setting: 0.25})
    data = encoded("latents", weights=ours)
    code, _, err = trained(data)
    assert code == 0, err
    known = {"moments": False, "flips": False, "size": 16, **read_autoencoder(ours).identity, "source": str(source)}
    assert state_of(tmp_path / "run")["latents"] == known
    assert run("export", tmp_path / "run", "--out", tmp_path / "w.safetensors")[0] == 0
    shutil.rmtree(data)
    encoded("latents", weights=other)
    code, _, err = trained(data, 2)
    assert code == 2 and err.count("\n") == 1 and name in err, err
    shutil.rmtree(data)
    for model in (tmp_path / "run", tmp_path / "w.safetensors"):
        for command in (drawing(model), ["grid", model, "--steps", 2, "--side", 1, "--device", "cpu", "--out", "grid"]):
            message = refused(*command, "--autoencoder", other)
            assert str(other) in message and f"{name} {known[name]}" in message
            assert run(*command, "--autoencoder", ours)[0] == 0


def test_latents_of_three_channels_are_no_pictures(run, refused, encoded, trained, tmp_path):
    weights = random_ckpt(tmp_path / "3.ckpt", 3, latent_channels=3)
    code, said, err = trained(encoded("three", weights=weights), 1, "--flow", "diffusion")
    assert code == 0 and "9 latents of 3×4×4" in said and not list((tmp_path / "run").glob("*.png")), err
    assert "3 channels" in refused(*drawing(tmp_path / "run"))
    assert run(*drawing(tmp_path / "run", "--autoencoder", weights))[0] == 0


@pytest.mark.parametrize("kinds", [("images", "latents"), ("latents", "images")])
def test_a_run_of_images_does_not_go_on_with_latents_nor_the_other_way_round(kinds, trained, tmp_path):
    data, codes = tmp_path / "data", []
    for steps, kind in enumerate(kinds, 1):
        shutil.rmtree(data, ignore_errors=True)
        data.mkdir()
        for number in range(4):
            if kind == "images":
                (data / f"{number}.png").write_bytes(picture(number, size=(8, 8)))
            else:
                np.save(data / f"{number}.npy", np.zeros((3, 8, 8), np.float32))
        code, _, err = trained(data, steps, "--no-flip")
        codes.append(code)
    assert codes == [0, 2] and f"{kinds[0]} → {kinds[1]}" in err


@pytest.mark.parametrize(("given", "mirrored"), [((), False), (("--flip",), True), (("--no-flip",), False)])
def test_latents_are_mirrored_only_where_that_is_asked_for(given, mirrored, encoded, trained, tmp_path, monkeypatch):
    served, real = [], loader.batches

    def seen(*arguments, **settings):
        for x in (batches := real(*arguments, **settings)):
            served.extend(x.clone())
            yield x
        batches.close()

    monkeypatch.setattr(loader, "batches", seen)
    code, _, err = trained(encoded(), 9, *given)
    assert code == 0, err
    known = {tuple(latent.ravel()) for latent in load_images(str(tmp_path / "latents"))[:].astype(np.float32)}
    assert ({tuple(latent.flatten().tolist()) for latent in served} <= known) != mirrored
    assert state_of(tmp_path / "run")["recipe"]["flip"] == mirrored


def test_latents_are_decoded_in_the_memory_that_is_given(run, encoded, trained, weights, tmp_path, monkeypatch):
    sizes, real = [], Decoder.decode_at_once

    def counting(self, latents, *rest):
        sizes.append(len(latents))
        return real(self, latents, *rest)

    assert trained(encoded())[0] == 0
    monkeypatch.setattr(Decoder, "decode_at_once", counting)
    for memory, batch in ((1e-6, 1), (7 * 32 * 16**2 * 4 * 2.5 / 1e9, 2), (1, 4)):
        sizes.clear()
        code, _, err = run("sample", tmp_path / "run", "--count", 4, "--steps", 2, "--autoencoder", weights, "--device",
                           "cpu", "--out", tmp_path / f"out-{batch}", "--memory", memory)
        assert code == 0 and sizes == [batch] * (4 // batch), err


def test_a_latent_that_is_nan_is_named_with_its_file_by_the_training(encoded, trained):
    shard = encoded() / "latents-00001.npy"
    array = np.load(shard)
    array[2, 0, 1, 1] = np.nan
    np.save(shard, array)
    code, _, err = trained(shard.parent, 9)
    assert code == 2 and err.count("\n") == 1 and str(shard) in err and "latent 2" in err, err


def test_a_sample_that_is_nan_is_named_by_its_number(refused, encoded, trained, weights, tmp_path, monkeypatch):
    assert trained(encoded())[0] == 0
    real, drawn = dansm.RectifiedFlow.sample, []

    def broken(self, net, z, steps):
        x = real(self, net, z, steps)
        drawn.extend(x)
        if len(drawn) == 4:
            x[-1] = np.nan
        return x

    monkeypatch.setattr(dansm.RectifiedFlow, "sample", broken)
    assert "latent 3 holds NaN" in refused(*drawing(tmp_path / "run", "--autoencoder", weights))


def test_an_autoencoder_for_a_network_of_images_is_refused(refused, trained, weights, tmp_path):
    source = as_folder(tmp_path / "images", {f"{i}.png": picture(i, size=(8, 8)) for i in range(4)})
    code, _, err = trained(source)
    assert code == 0 and state_of(tmp_path / "run")["recipe"]["flip"], err  # as images are where nothing is said
    assert f"--autoencoder is {weights}" in refused(*drawing(tmp_path / "run", "--autoencoder", weights))


def evaluating(model, *options):
    return ["evaluate", model, "--features", "autoencoders:corners", "--steps", 2, "--count", 6, "--device", "cpu",
            "--cache", "cache", "--out", "evaluated", *options]


def test_a_model_of_latents_is_evaluated_against_the_images_it_was_encoded_from(run, refused, encoded, trained, weights,
                                                                               source, tmp_path, monkeypatch):
    data = encoded()
    assert trained(data, 2)[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr("dansm.scale.base.machine.free_memory", lambda _: 0)  # images need not fit
        code, said, err = run(*evaluating(tmp_path / "run", "--autoencoder", weights))
    assert (code, err) == (0, ""), said
    rows = json.loads((tmp_path / "evaluated" / "evaluate.json").read_text())["rows"]
    assert [(row["data"], row["real_images"], row.get("steps")) for row in rows] == [
        (str(source), 9, steps) for steps in (None, 2)]
    assert "--autoencoder" in refused(*evaluating(tmp_path / "run"))
    (data / "index.json").unlink()  # the run itself knows what images its latents are of
    assert run(*evaluating(tmp_path / "run", "--autoencoder", weights))[0] == 0


def test_other_factors_make_other_rows(run, refused, trained, source, tmp_path):
    """Any autoencoder may decode latents of which nothing is known."""
    np.save(tmp_path / "a.npy", np.random.default_rng(0).normal(size=(9, 4, 4, 4)).astype(np.float32))
    assert trained(tmp_path / "a.npy")[0] == 0
    for number, settings in enumerate(({}, {"scaling_factor": 0.5}, {"shift_factor": 0.1})):
        weights = as_folder_of_diffusers(tmp_path / str(number), **settings)
        code, _, err = run(*evaluating(tmp_path / "run", "--autoencoder", weights, "--data", source, "--size", 16))
        assert code == 0, err
    rows = json.loads((tmp_path / "evaluated" / "evaluate.json").read_text())["rows"]
    assert len(rows) == len({row["frechet_distance"] for row in rows}) == 4
    assert "--data" in refused(*evaluating(tmp_path / "run", "--autoencoder", weights))


@pytest.mark.slow
def test_make_latent_bedroom_runs_every_stage(source, weights, tmp_path):
    train = "--width 8 --multipliers 1 --blocks 1 --batch 4 --match-size 8 --ema-decay 0.9 --device cpu --steps"
    command = ["make", "-f", ROOT / "Makefile", "latent-bedroom", f"PYTHON={sys.executable}",
               f"DANSM={sys.executable} {ROOT / 'dansm.py'}", f"LSUN={source}", f"AUTOENCODER={weights}",
               "ENCODE=--size 16 --device cpu", "SAMPLE=--count 4 --device cpu",
               "EVALUATE=--features autoencoders:corners --steps 2 --count 4 --device cpu --cache cache"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1"}

    def made(steps):
        return subprocess.run([*map(str, command), f"TRAIN={train} {steps}"], cwd=tmp_path, env=environment,
                              capture_output=True, text=True)

    said = made("100000 --minutes 0.000001")
    assert said.returncode, said  # as by Ctrl-C: there is nothing to evaluate
    assert (tmp_path / "runs" / "latent-bedroom").exists()
    assert not (tmp_path / "runs" / "latent-bedroom-samples").exists()
    said = made(2)
    assert said.returncode == 0 and "9 latents of 4×4×4" in said.stdout, said
    assert Image.open(tmp_path / "runs" / "latent-bedroom-samples" / "samples.png").size == (2 * 34 + 2, 2 * 34 + 2)
    rows = json.loads((tmp_path / "runs" / "latent-bedroom-evaluate" / "evaluate.json").read_text())["rows"]
    assert [row.get("trained_steps") for row in rows] == [None, 2]
    assert checkpoint.newest(tmp_path / "runs" / "latent-bedroom")
