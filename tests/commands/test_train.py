"""dansm train run for real, on images so small that it takes no time; and what it refuses."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import urllib.error
from pathlib import Path

import pytest
from PIL import Image
from support import FAST, ROOT, TINY, files_of, log_of, make_images, noise_image, state_of, wait_for

import dansm
from dansm.scale.model import sampling
from dansm.scale.model.recipe import Recipe, load


@pytest.mark.parametrize(("method", "flow"), [("random", "rectified"), ("greedy", "diffusion"),
                                              ("optimal", "rectified"), ("nearest", "diffusion")])
def test_it_writes_what_it_says(run, images, tmp_path, method, flow):
    out = tmp_path / "out" / "deep"
    code, said, err = run("train", images, "--flow", flow, "--method", method, "--steps", 4, "--out", out, *FAST)
    assert (code, err) == (0, "")
    names = ["checkpoint-00000004.pt", "metrics.jsonl", "recipe.toml", "samples.png", "train.json"]
    assert files_of(out) == names
    assert all(str(out / name) in said for name in names) and f"dansm sample {out}\n" in said
    rows = 6  # of 16 pixels, each two wide; in two steps each, they take as long as 32 images of training
    assert Image.open(out / "samples.png").size == (8 * 34 + 2, rows * 34 + 2)
    described = json.loads((out / "train.json").read_text())
    assert described["data"] == str(images) and described["data_images"] == 24
    assert (described["steps"], described["images"], described["stopped_early"]) == (4, 32, False)
    assert described["hardware"]["device"] == "cpu" and described["parameters"] > 1000
    assert described["unreadable_images"] == 0 and described["this_call"]["images_per_second"] > 0
    given = dict(flip=True, network="small", flow=flow, method=method, match_size=10, batch=8, steps=4, sample_steps=2)
    recipe = Recipe(str(images), **given)
    assert described["recipe"] == json.loads(json.dumps(dataclasses.asdict(recipe)))
    assert load(str(out / "recipe.toml")) == recipe
    (line,) = log_of(out)
    assert (line["step"], line["images"]) == (4, 32)
    assert line["distance"] > 0 and 0.5 < line["loss"] < 5
    assert method == "random" or line["distance"] < 0.995 * line["distance_random"]
    state = state_of(out)
    assert (state["data"], state["images"], state["recipe"]) == (str(images), 24, dataclasses.asdict(recipe))
    assert (state["training"]["step"], state["training"]["averages"][0]["decay"]) == (4, 0.9999)
    moved = [weight for weight in state["training"]["net"].values() if weight.ndim > 1]
    assert all(weight.isfinite().all() and weight.any() for weight in moved)


def test_on_a_cpu_it_is_said_which_network_is_made_for_one(run, images, tmp_path, monkeypatch):
    monkeypatch.setitem(dansm.NETWORKS, "ddpm", dansm.NETWORKS["small"])
    options = "train", images, "--steps", 1, "--out", tmp_path / "out", *FAST
    for network, hint in (("small", False), ("ddpm", True)):
        code, said, _ = run(*options, "--network", network, "--fresh")
        assert code == 0 and ("--network tiny" in said) == hint


def test_it_is_said_if_the_pool_outlasts_the_training(run, images, tmp_path):
    """What a pool hands out before it is empty is not N(0, I)."""
    for steps, method, hint in ((1, "greedy", True), (2, "greedy", False), (1, "nearest", False)):
        out = tmp_path / f"{method}-{steps}"
        said = run("train", images, *FAST, "--steps", steps, "--method", method, "--out", out)[1]
        assert ("--match-size" in said) == hint
    assert "--match-size 3 " in run("train", images, *FAST, "--match-size", 80, "--steps", 4, "--out", tmp_path)[1]


def test_the_exit_code_tells_who_asks_whether_all_steps_are_done(run, images, tmp_path):
    command = ["train", images, "--out", tmp_path / "out", *FAST]
    code, said, err = run(*command, "--steps", 10**6, "--minutes", 1e-6, "--all-steps")
    assert code == 130 and "--all-steps" in err and "stopped at step 1 " in said
    for steps in (3, 2):  # makes them, has made them
        assert run(*command, "--steps", steps, "--all-steps")[::2] == (0, "")


# ------------------------------------------------------------------------------- stopped


def start(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", *map(str, arguments)], text=True, env=environment,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.slow
def test_ctrl_c_saves_and_the_same_command_resumes(images, tmp_path, run):
    """In a process of its own, as from a keyboard: the step is finished, all files are written, the exit is clean."""
    out = tmp_path / "out"
    command = ["train", images, "--out", out, "--steps", 10**6, *FAST]
    process = start(f"import dansm; dansm.NETWORKS['small'] = {TINY!r}; dansm.main({list(map(str, command))!r})")
    try:
        wait_for(lambda: any(log.stat().st_size for log in out.glob("metrics.*")), process)
        process.send_signal(signal.SIGINT)
        said, err = process.communicate(timeout=60)
    finally:
        process.kill()  # a test that fails leaves nothing running
    assert (process.returncode, err) == (0, "")
    described = json.loads((out / "train.json").read_text())
    steps = described["steps"]
    assert described["stopped_early"] and f"stopped at step {steps:,} of 1,000,000, saved" in said
    names = [f"checkpoint-{steps:08d}.pt", "metrics.jsonl", "recipe.toml", "train.json"]
    assert files_of(out) == names  # images take long: who stops does not wait
    assert log_of(out)[-1]["step"] == steps == state_of(out)["training"]["step"] < 10**6
    code, said, _ = run("train", images, "--out", out, "--steps", steps + 2, *FAST)
    assert code == 0 and f"resuming from step {steps:,}" in said
    assert state_of(out)["training"]["step"] == steps + 2


@pytest.mark.slow
def test_a_second_ctrl_c_of_the_keyboard_ends_with_130_and_one_line(images, tmp_path):
    """In a process of its own: newer Typers swallow it."""
    command = ["train", images, "--out", tmp_path / "out", "--steps", 10**6, "--log-steps", 1, *FAST]
    process = start("import os, signal, dansm\nfrom dansm.scale.train.watch import Watch\n"
                    f"dansm.NETWORKS['small'] = {TINY!r}\n"
                    "def line(self):\n    for _ in range(2):\n        os.kill(os.getpid(), signal.SIGINT)\n"
                    f"Watch.line = line\ndansm.main({list(map(str, command))!r})")
    try:
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and err.startswith("dansm: stopped") and err.count("\n") == 1


def test_ctrl_c_while_it_samples_keeps_the_run(run, images, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(sampling, "sample_images", stop)  # the grid of samples comes after the last save
    code, _, err = run("train", images, "--out", tmp_path / "out", "--steps", 2, *FAST)
    assert code == 130 and err.startswith("dansm: stopped")
    assert json.loads((tmp_path / "out" / "train.json").read_text())["steps"] == 2
    assert state_of(tmp_path / "out")["training"]["step"] == 2


# ------------------------------------------------------------------------------- where it writes


def test_a_run_that_is_refused_leaves_nothing(run, refused, images, tmp_path):
    out = tmp_path / "deep" / "out"
    assert "multiple of 2" in refused("train", images, "--batch", 9, "--accumulate", 2, "--out", out)
    assert not out.exists()
    assert run("train", images, "--steps", 1, "--out", out, *FAST)[0] == 0
    before = files_of(out)
    refused("train", images, "--steps", 2, "--out", out, *FAST, "--batch", 4)
    assert files_of(out) == before


def test_a_run_is_no_data(run, refused, images, tmp_path):
    assert run("train", images, "--steps", 1, "--out", tmp_path / "out", *FAST)[0] == 0
    assert str(tmp_path / "out" / "recipe.toml") in refused("train", tmp_path / "out")


def test_an_out_inside_the_images_is_refused(refused, images, tmp_path, monkeypatch):
    before = files_of(images)
    for out in (images, images / "run", images / "deep" / ".." / "run", "run"):
        monkeypatch.chdir(images)
        said = refused("train", images, "--steps", 1, "--out", out, *FAST)
        assert f"--out is {out}, inside {images}" in said and files_of(images) == before


def test_an_out_that_may_not_be_written_into_is_refused(refused, images, tmp_path, monkeypatch):
    def denied(self, *_, **__):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "touch", denied)
    said = refused("train", images, "--out", tmp_path / "out", *FAST)
    assert f"--out is {tmp_path / 'out'}" in said and "Permission denied" in said


# ------------------------------------------------------------------------------- bad images


def test_what_is_no_folder_of_images_is_refused_by_name(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a")
    (tmp_path / "file.png").write_bytes(b"")
    for name in ("missing", "empty", "texts", "file.png"):
        assert str(tmp_path / name) in refused("train", tmp_path / name, "--out", tmp_path / "out", *FAST)
    assert "''" in refused("train", "", "--out", tmp_path / "out", *FAST)
    assert files_of(tmp_path / "out") == []


def test_a_folder_that_may_not_be_read_is_refused_by_name(refused, images, tmp_path, monkeypatch):
    list_folder = os.scandir

    def denied(path="."):
        if Path(path) == images / "private":
            raise PermissionError(13, "Permission denied", str(path))
        return list_folder(path)

    (images / "private").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", denied)
        said = refused("train", images, "--out", tmp_path / "out", *FAST)
    assert str(images / "private") in said and "Permission denied" in said
    assert files_of(tmp_path / "out") == []


def break_image(path, how):
    whole = noise_image(16, 16)
    if how == "truncated JPEG":
        whole.save(path, "JPEG", quality=95)
        path.write_bytes(path.read_bytes()[:-300])
    elif how == "link to nothing":
        path.symlink_to("nowhere")
    else:
        path.write_bytes(b"a text")


@pytest.mark.parametrize("how", ["truncated JPEG", "text", "link to nothing"])
def test_an_unreadable_image_among_many_is_named_or_left_out(run, refused, images, tmp_path, how):
    name = "bad.jpg" if "JPEG" in how else "bad.png"
    break_image(images / name, how)
    command = ["train", images, "--steps", 1, "--out", tmp_path / "out", *FAST]
    said = refused(*command)
    assert str(images / name) in said and "--skip-unreadable" in said
    assert files_of(tmp_path / "out") == []
    code, said, _ = run(*command, "--skip-unreadable")
    assert code == 0 and "1 of 25 images" in said and str(images / name) in said
    described = json.loads((tmp_path / "out" / "train.json").read_text())
    assert (described["data_images"], described["unreadable_images"]) == (24, 1)


def test_of_many_unreadable_images_three_are_named(run, images, tmp_path):
    for i in range(5):
        (images / f"bad{i}.png").write_text("a text")
    _, said, _ = run("train", images, "--steps", 1, "--skip-unreadable", "--out", tmp_path / "out", *FAST)
    assert "5 of 29 images" in said and str(images / "bad2.png") in said and "bad3.png" not in said


def test_images_of_unequal_size_are_refused_and_size_makes_them_equal(run, refused, images, tmp_path):
    noise_image(17, 20).save(images / "other.png")
    said = refused("train", images, "--out", tmp_path / "out", *FAST)
    assert all(word in said for word in ("other.png", "17", "20", "00.png", "16", "--size"))
    assert files_of(tmp_path / "out") == []
    code, _, _ = run("train", images, "--size", 8, "--steps", 1, "--out", tmp_path / "out", *FAST)
    assert code == 0 and state_of(tmp_path / "out")["network"]["size"] == 8


def test_images_that_no_network_takes_are_refused(refused, images, tmp_path, monkeypatch):
    monkeypatch.setitem(dansm.NETWORKS, "small", TINY | dict(multipliers=(1, 1, 1)))
    said = refused("train", images, "--size", 18, "--out", tmp_path / "out", *FAST)
    assert "18×18" in said and "multiples of 4" in said and "--size" in said
    wide = make_images(tmp_path / "wide", width=17, height=16)
    said = refused("train", wide, "--steps", 1, "--out", tmp_path / "out", *FAST)
    assert "16×17" in said and "--size" in said
    assert files_of(tmp_path / "out") == []


def test_cifar10_without_a_network_is_refused(refused, tmp_path, monkeypatch):
    from torchvision.datasets import cifar

    def no_network(*_, **__):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(cifar, "download_and_extract_archive", no_network)
    said = refused("train", "cifar10", "--out", tmp_path / "out", *FAST)
    assert "CIFAR-10" in said and "Name or service not known" in said
    assert files_of(tmp_path / "out") == []


def test_a_grid_that_a_diffusion_cannot_draw_is_refused_before_it_is_trained(refused, images, tmp_path):
    command = ["train", images, "--flow", "diffusion", "--steps", 1, "--out", tmp_path / "out", *FAST]
    for steps in (1, 1001):
        assert f"--sample-steps is {steps}" in refused(*command, "--sample-steps", steps)
    assert files_of(tmp_path / "out") == []
