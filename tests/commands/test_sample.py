"""dansm sample: the same images whatever the count and the batch, and no images of two calls in one folder."""

import json

import numpy as np
import pytest
import torch
from models import awake, state_to_save
from PIL import Image
from support import FAST, TINY, files_of

import dansm
from dansm.scale.base.noise import path_noise
from dansm.scale.commands.export import export
from dansm.scale.data.pixels import to_uint8
from dansm.scale.model import checkpoint, sampling


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint of a network that does something: its samples are not the noise alone."""
    net = awake(dansm.UNet(**TINY, channels=3, size=16))
    return checkpoint.save(tmp_path_factory.mktemp("train"), state_to_save(net, recipe={"method": "greedy"}))


def drawn(folder, count):
    return [np.array(Image.open(folder / f"{i:06d}.png")).astype(int) for i in range(count)]


def test_image_7_is_the_same_for_any_count_and_batch(run, trained, tmp_path):
    for out, count, batch in (("few", 8, 3), ("many", 20, 20)):
        command = ["sample", trained, "--count", count, "--batch", batch, "--steps", 3, "--files", "--device", "cpu"]
        code, said, err = run(*command, "--out", tmp_path / out)
        assert (code, err) == (0, "")
        names = [f"{i:06d}.png" for i in range(count)]
        assert files_of(tmp_path / out) == [*names, "sample.json", "samples.png"]
        assert all(str(tmp_path / out / name) in said for name in ("000000.png", "sample.json", "samples.png"))
    few, many = drawn(tmp_path / "few", 8), drawn(tmp_path / "many", 8)
    assert few[7].shape == (16, 16, 3)
    assert all(abs(a - b).max() <= 1 for a, b in zip(few, many, strict=True))  # last bits depend on the batch
    assert abs(few[7] - few[6]).mean() > 20
    z = path_noise([7], (3, 16, 16))
    assert abs(few[7] - to_uint8(z)[0].permute(1, 2, 0).numpy()).mean() > 1
    assert Image.open(tmp_path / "few" / "samples.png").size == (3 * 34 + 2, 3 * 34 + 2)
    assert Image.open(tmp_path / "many" / "samples.png").size == (5 * 34 + 2, 4 * 34 + 2)


def test_sample_describes_itself(run, trained, tmp_path):
    code, *_ = run("sample", trained, "--count", 1, "--steps", 2, "--solver", "heun", "--seed", 5, "--out", tmp_path)
    assert code == 0 and files_of(tmp_path) == ["sample.json", "samples.png"]
    described = json.loads((tmp_path / "sample.json").read_text())
    expected = dict(checkpoint=str(trained), trained_steps=7, count=1, steps=2, solver="heun", seed=5)
    assert expected.items() <= described.items()
    assert described["recipe"]["method"] == "greedy" and {"seconds", "hardware"} < described.keys()
    assert Image.open(tmp_path / "samples.png").size == (32, 32)


def test_the_same_model_and_seed_give_the_same_images_wherever_the_model_lies(run, trained, tmp_path):
    weights = tmp_path / "weights.safetensors"
    export(trained, out=weights)
    images = []
    for model, seed in ((trained, 0), (trained.parent, 0), (weights, 0), (weights, 1)):
        out = tmp_path / str(len(images))
        assert run("sample", model, "--count", 2, "--steps", 2, "--seed", seed, "--out", out)[0] == 0
        images.append((out / "samples.png").read_bytes())
        described = json.loads((out / "sample.json").read_text())
        assert described["checkpoint"] == str(weights if model == weights else trained)
    assert images[0] == images[1] == images[2] != images[3]


def test_numbered_images_are_not_mixed_with_those_of_another_call(run, refused, trained, tmp_path):
    """The same call again writes the same; another would leave images of two models to whoever evaluates the folder."""
    out = tmp_path / "out"
    call = "sample", trained, "--count", 4, "--steps", 2, "--files", "--out", out
    for _ in range(2):
        assert run(*call)[0] == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    for option, value, named in (("--seed", 1, "seed 0 → 1"), ("--steps", 3, "steps 2 → 3"), ("--count", 2, "4 → 2")):
        said = refused(*call, option, value)
        assert str(out) in said and named in said
    assert "steps 2 → 3" in refused("sample", trained, "--count", 4, "--steps", 3, "--out", out)  # without --files too
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert run(*call, "--count", 5)[0] == 0 and len(list(out.glob("0*.png"))) == 5
    for damaged in ("", "{", "[]"):
        (out / "sample.json").write_text(damaged)
        assert str(out / "sample.json") in refused(*call)
        assert (out / "sample.json").read_text() == damaged


def test_samples_of_others_are_kept(refused, images, trained, tmp_path):
    """A run's are not for sample to overwrite, and what no command here wrote is for none."""
    of_run = trained.parent
    (of_run / "samples.png").write_text("of the run")
    assert str(of_run) in refused("sample", trained, "--count", 1, "--steps", 1, "--out", of_run)
    assert (of_run / "samples.png").read_text() == "of the run" and not (of_run / "sample.json").exists()
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "samples.png").write_text("mine")
    for command in (("sample", trained, "--count", 1, "--steps", 1), ("train", images, "--steps", 1, *FAST)):
        said = refused(*command, "--out", mine)
        assert str(mine) in said and "samples.png" in said
    assert files_of(mine) == ["samples.png"] and (mine / "samples.png").read_text() == "mine"


# ------------------------------------------------------------------------------- classes


NAMES = ["cat", "dog", "owl"]


@pytest.fixture(scope="module")
def of_classes(tmp_path_factory):
    """A checkpoint of a network with labels, whose samples differ by them."""
    net = awake(dansm.UNet(**TINY, channels=3, size=16, classes=3))
    return checkpoint.save(tmp_path_factory.mktemp("of_classes"), state_to_save(net, classes=NAMES))


def test_classes_are_drawn_in_turn_or_those_that_are_named(run, of_classes, tmp_path):
    options = "--steps", 2, "--files", "--device", "cpu"
    code, said, _ = run("sample", of_classes, "--count", 6, *options, "--out", tmp_path / "all")
    assert code == 0 and "cat, dog, owl" in said
    assert Image.open(tmp_path / "all" / "samples.png").size == (3 * 34 + 2, 2 * 34 + 2)
    turn = drawn(tmp_path / "all", 6)
    for names, count, shared in (("dog", 5, (1, 4)), ("1", 5, (1, 4)), ("owl,dog,0", 6, (1, 4)), ("0,owl", 6, (0, 5))):
        out = tmp_path / names
        code, said, _ = run("sample", of_classes, "--count", count, "--class", names, *options, "--out", out)
        assert code == 0 and ("dog" in said) == (names != "0,owl")
        same = [number for number, (a, b) in enumerate(zip(drawn(out, count), turn, strict=False))
                if abs(a - b).max() <= 1]
        assert same == list(shared)


def test_guidance_changes_the_images_and_1_does_not(run, of_classes, tmp_path):
    def images(*options):
        out = tmp_path / "-".join(options)
        assert run("sample", of_classes, "--count", 4, "--steps", 4, "--device", "cpu", *options, "--out", out)[0] == 0
        return (out / "samples.png").read_bytes()

    plain = images()
    assert images("--guidance", "1") == plain
    assert len({plain, images("--guidance", "3"), images("--guidance", "0"),
                images("--guidance", "3", "--guidance-interval", "0,0.5")}) == 4


def test_images_of_another_class_or_guidance_are_not_mixed_in(run, refused, of_classes, tmp_path):
    call = ("sample", of_classes, "--count", 4, "--steps", 2, "--files", "--guidance", 2, "--class", "dog",
            "--out", tmp_path / "out")
    for _ in range(2):
        assert run(*call)[0] == 0
    described = json.loads((tmp_path / "out" / "sample.json").read_text())
    assert (described["class"], described["guidance"], described["guidance_interval"]) == ("dog", 2, "0,1")
    for option, value, named in (("--class", "cat", "class dog → cat"), ("--guidance", 1, "guidance 2.0 → 1.0"),
                                 ("--guidance-interval", "0,0.5", "guidance_interval 0,1 → 0,0.5")):
        assert named in refused(*call, option, value)
    assert run(*call, "--class", "1")[0] == 0  # the same class


def test_what_classes_and_guidance_cannot_be_is_refused(refused, of_classes, trained, tmp_path):
    no_dropout = awake(dansm.UNet(**TINY, channels=3, size=16, classes=3, label_dropout=0.0))
    no_dropout = checkpoint.save(tmp_path, state_to_save(no_dropout, classes=NAMES))
    for model, options, named in (
            (of_classes, ("--class", "cow"), "--class is 'cow': expected one of cat, dog, owl"),
            (of_classes, ("--guidance", "1,2"), "--guidance is 1,2"), (trained, ("--class", "cat"), "--class is cat"),
            (of_classes, ("--guidance", "2", "--guidance-interval", "1"), "--guidance-interval is '1'"),
            (of_classes, ("--guidance", "2", "--guidance-interval", "0.97,1"), "0.97,1, and in 20 steps"),
            (trained, ("--guidance", "2"), "trained without labels"),
            (no_dropout, ("--guidance", "2"), "--label-dropout 0")):
        said = refused("sample", model, *options, "--out", tmp_path / "out")
        assert named in said and "expected" in said
    assert not (tmp_path / "out").exists()


def test_the_same_call_repeats_after_a_kill(run, trained, tmp_path, monkeypatch):
    call = "sample", trained, "--count", 4, "--batch", 2, "--steps", 2, "--files", "--out", tmp_path / "out"
    save = sampling.save_grid

    def killed_at_the_end(images, path, **settings):
        if path.name == "samples.png":
            raise KeyboardInterrupt
        save(images, path, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(sampling, "save_grid", killed_at_the_end)
        assert run(*call)[0] == 130
    assert len(list((tmp_path / "out").glob("0*.png"))) == 4
    assert run(*call)[0] == 0


def test_ctrl_c_keeps_what_is_drawn(run, trained, tmp_path, monkeypatch):
    draw = sampling.sample_images

    def stopped_after_two_batches(*arguments, **settings):
        draws = draw(*arguments, **settings)
        yield next(draws)
        yield next(draws)
        raise KeyboardInterrupt

    monkeypatch.setattr(sampling, "sample_images", stopped_after_two_batches)
    command = "sample", trained, "--count", 9, "--batch", 3, "--steps", 2, "--files", "--out", tmp_path / "out"
    code, _, err = run(*command)
    assert code == 130 and "6 of 9 images" in err
    assert json.loads((tmp_path / "out" / "sample.json").read_text())["count"] == 6
    assert files_of(tmp_path / "out") == [*(f"{i:06d}.png" for i in range(6)), "sample.json", "samples.png"]


def test_an_out_that_is_or_lies_below_a_file_is_refused(refused, trained, tmp_path):
    (tmp_path / "file").write_text("precious")
    for out in ("file", "file/below"):
        assert f"--out is {tmp_path / out}" in refused("sample", trained, "--out", tmp_path / out)
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize(("recipe", "latents", "options", "named"), [
    ({"flow": "diffusion"}, None, ("--solver", "heun"), "--solver is heun"),
    ({"flow": "diffusion"}, None, ("--steps", 1), "--steps is 1"),
    ({"flow": "diffusion"}, None, ("--steps", 1001), "--steps is 1001"),
    ({"flow": "curved"}, None, (), "checkpoint-00000007.pt"),
    ({}, {}, (), "--autoencoder"),
    ({}, None, ("--autoencoder", "x"), "--autoencoder is x"),
])
def test_what_cannot_be_sampled_is_refused_and_nothing_written(refused, tmp_path, recipe, latents, options, named):
    saved = checkpoint.save(tmp_path, state_to_save(recipe=recipe, latents=latents))
    assert named in refused("sample", saved, *options, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_no_checkpoint_is_refused_by_name(refused, tmp_path):
    torch.save({"dansm": checkpoint.VERSION}, tmp_path / "hollow.pt")
    for model in ("hollow.pt", "missing", "weights.safetensors"):
        assert model in refused("sample", tmp_path / model, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
