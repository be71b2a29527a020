"""Images and latents that are not square: trained on, sampled and evaluated, or refused with what helps."""

import numpy as np
import pytest
from PIL import Image
from support import make_images, state_of

import dansm
from dansm.scale.model.load import load_model


@pytest.fixture
def three_levels(monkeypatch):
    monkeypatch.setitem(dansm.NETWORKS, "small", dansm.NETWORKS["small"] | {"multipliers": (1, 1, 1)})


def test_rectangular_images_are_trained_on_resumed_sampled_and_evaluated(tmp_path, three_levels, trained, run):
    pytest.importorskip("torch_fidelity")
    data = make_images(tmp_path / "images", width=12, height=8)
    code, out, err = trained(data, 2)
    assert code == 0 and "24 images of 3×8×12" in out, (out, err)
    code, out, err = trained(data, 3)
    assert code == 0 and "resuming from step 2" in out, (out, err)
    assert state_of(tmp_path / "run")["network"]["size"] == [8, 12]
    code, _, err = run("sample", tmp_path / "run", "--count", 3, "--steps", 2, "--files", "--device", "cpu", "--out",
                       tmp_path / "samples")
    assert code == 0 and Image.open(tmp_path / "samples" / "000000.png").size == (12, 8), err
    code, _, err = run("export", tmp_path / "run", "--out", tmp_path / "a.safetensors")
    assert code == 0 and load_model(tmp_path / "a.safetensors").shape == (3, 8, 12), err
    evaluate = ["evaluate", tmp_path / "run", "--features", "features:seen", "--steps", 2, "--count", 4, "--device",
                "cpu", "--cache", tmp_path / "cache", "--out", tmp_path / "evaluate"]
    code, out, err = run(*evaluate)
    assert code == 0, err
    code, _, err = run(*evaluate, "--data", make_images(tmp_path / "others", width=8, height=12))
    assert code == 2 and "makes images of 12×8 pixels" in err and "8×12" in err and "--size" not in err


def test_rectangular_latents_are_trained_on(tmp_path, three_levels, trained):
    np.save(tmp_path / "a.npy", np.random.default_rng(0).standard_normal((8, 4, 12, 8)).astype(np.float16))
    code, out, err = trained(tmp_path / "a.npy", 1)
    assert code == 0 and "8 latents of 4×12×8" in out, (out, err)
    assert load_model(tmp_path / "run").shape == (4, 12, 8)


@pytest.mark.parametrize(("height", "width", "fewer"), [(12, 10, "1,1"), (9, 12, "1")])
def test_what_a_network_cannot_halve_is_refused_with_options_that_help(tmp_path, three_levels, trained, height, width,
                                                                       fewer):
    images, latents = make_images(tmp_path / "images", width=width, height=height), tmp_path / "latents.npy"
    np.save(latents, np.zeros((8, 4, height, width), np.float16))
    for data in (images, latents):
        code, _, err = trained(data, 1)
        assert code == 2 and err.count("\n") == 1
        assert str(data) in err and f"{height}×{width}" in err and "multiples of 4" in err
        assert f"--multipliers {fewer} " in err and ("--size" in err) == (data == images)
        assert trained(data, 1, "--multipliers", fewer)[0] == 0
        for path in (tmp_path / "run").iterdir():
            path.unlink()
    assert trained(images, 1, "--size", 8)[0] == 0


def test_latents_of_unequal_shapes_are_not_sent_to_size(tmp_path, not_loaded):
    for number, height in enumerate((4, 6)):
        np.save(tmp_path / f"{number}.npy", np.zeros((4, height, 4), np.float16))
    message = not_loaded(tmp_path)
    assert "1.npy" in message and "--size" not in message
