"""What a run's folder keeps: it is resumed by the same run alone, and whole whatever stops a run."""

import json
import os

import pytest
import torch
from PIL import Image
from runs import at_step, contents_of, same_run
from support import FAST, TINY, files_of, log_of, make_images, same, state_of

import dansm
from dansm.scale.base.locks import owning
from dansm.scale.model import checkpoint


@pytest.fixture
def train(run, images, tmp_path):
    """Trains the images into the folder `out` by a command that must end well; returns what it printed."""

    def train(*options, data=images, out="out"):
        code, said, err = run("train", data, "--out", tmp_path / out, *FAST, *options)
        assert (code, err) == (0, "")
        return said

    return train


@pytest.fixture
def not_resumed(refused, images, tmp_path):
    """Calls the command again, which must be refused and leave all as it was; returns the message."""

    def not_resumed(*options, data=images):
        before = contents_of(tmp_path / "out")
        said = refused("train", data, "--out", tmp_path / "out", *FAST, *options)
        assert contents_of(tmp_path / "out") == before
        return said

    return not_resumed


# ------------------------------------------------------------------------------- who may resume


CHANGES = [("seed", 0, 1), ("lr", 0.0002, 0.001), ("cost", "priced", "inner"), ("method", "greedy", "random"),
           ("match_size", 10, 11), ("batch", 8, 4), ("flow", "rectified", "diffusion"), ("ema_decay", 0.9999, 0.5),
           ("times", "uniform", "logit-normal"), ("size", 0, 16), ("pool_dtype", "fp32", "bf16")]


def test_a_run_is_not_resumed_with_other_settings_and_both_values_are_named(train, not_resumed, tmp_path):
    train("--steps", 2)
    for name, old, new in CHANGES:
        said = not_resumed("--steps", 4, "--" + name.replace("_", "-"), new)
        assert f"{name} {old} → {new}" in said and "--fresh" in said
        assert str(checkpoint.newest(tmp_path / "out")) in said
    assert "flip True → False" in not_resumed("--steps", 4, "--no-flip")
    assert "width None → 16" in not_resumed("--steps", 4, "--width", 16)


@pytest.mark.parametrize("attention_at", [(), (8,)])
def test_a_run_is_not_resumed_with_images_of_another_size(train, not_resumed, tmp_path, monkeypatch, attention_at):
    monkeypatch.setitem(dansm.NETWORKS, "small", TINY | dict(attention_at=attention_at))
    train("--steps", 1)
    larger = make_images(tmp_path / "larger", width=16, height=16)
    assert "size 8 → 16" in not_resumed("--steps", 2, data=larger)


def test_a_run_is_not_resumed_with_other_images(train, not_resumed, images, tmp_path):
    train("--steps", 1)
    fewer = make_images(tmp_path / "fewer", count=5, width=8, height=8)
    assert "images 24 → 5" in not_resumed("--steps", 2, data=fewer)
    for path in images.iterdir():  # of the same names
        Image.new("RGB", (8, 8)).save(path)
    assert "not the same ones" in not_resumed("--steps", 2)


def test_a_run_is_resumed_where_its_images_have_moved(train, images, tmp_path):
    train("--steps", 1)
    images.rename(tmp_path / "elsewhere")
    train("--steps", 2, data=tmp_path / "elsewhere")
    assert state_of(tmp_path / "out")["training"]["step"] == 2


def change(path, *keys, to):
    """Replace one part of the checkpoint in `path`."""
    state = part = checkpoint.load(path)
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = to
    checkpoint.write(path, state)


def test_a_run_is_not_resumed_on_another_device_or_in_another_precision(train, not_resumed, tmp_path):
    """Precision "auto" is fp16, with a scaler, on cards that have no bf16."""
    train("--steps", 1)
    saved = checkpoint.newest(tmp_path / "out")
    change(saved, "training", "scaler", to=torch.amp.GradScaler("cpu").state_dict())
    assert "precision fp16 → bf16 or fp32" in not_resumed("--steps", 2)
    change(saved, "training", "scaler", to={})
    change(saved, "ranks", 0, "pool", "made_for", "device", to="cuda")
    change(saved, "ranks", 0, "pool", "generator", to=torch.zeros(16, dtype=torch.uint8))  # as CUDA's is
    assert "device cuda → cpu" in not_resumed("--steps", 2)


WRONG_PARTS = [(("network",), {}), (("network", "colour"), 3), (("network", "width"), "x"), (("recipe",), [1]),
               (("training",), {}), (("training", "averages"), [3]), (("training", "averages", 0, "weights"), {}),
               (("training", "step"), None), (("training", "optimizer"), {}), (("training", "net"), {}),
               (("ranks",), 3), (("ranks", 0), {}), (("ranks", 0, "pool", "index"), 3),
               (("ranks", 0, "pool", "made_for"), 3), (("ranks", 0, "random"), {}), (("ranks", 0, "random", "cpu"), 3),
               (("seconds",), "x"), (("look",), None)]


def test_a_checkpoint_with_wrong_parts_is_refused_by_name(train, not_resumed, tmp_path):
    train("--steps", 1)
    saved = checkpoint.newest(tmp_path / "out")
    whole = saved.read_bytes()
    for keys, to in WRONG_PARTS:
        saved.write_bytes(whole)
        change(saved, *keys, to=to)
        assert str(saved) in not_resumed("--steps", 2), (keys, to)


def test_a_damaged_checkpoint_is_named_and_the_run_is_resumed_from_the_one_before_it(train, tmp_path):
    """It comes to the same end, bit for bit, as if nothing had been damaged."""
    train("--steps", 6, "--log-steps", 1, out="once")
    out = tmp_path / "out"
    train("--steps", 4, "--log-steps", 1, "--save-minutes", 0)
    assert [path.name for path in checkpoint.checkpoints(out)] == [f"checkpoint-0000000{i}.pt" for i in (4, 3, 2)]
    damaged = checkpoint.newest(out)
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    said = train("--steps", 6, "--log-steps", 1)
    assert str(damaged) in said and f"resuming from step 3 of {out / 'checkpoint-00000003.pt'}" in said
    assert same_run(tmp_path / "once", out) and not damaged.exists()


def test_a_run_whose_only_checkpoint_is_damaged_is_refused(train, not_resumed, tmp_path):
    train("--steps", 1)
    saved = checkpoint.newest(tmp_path / "out")
    saved.write_bytes(saved.read_bytes()[:1000])
    assert str(saved) in not_resumed("--steps", 2)


def test_a_second_run_into_a_folder_is_refused_and_changes_nothing(train, not_resumed, tmp_path):
    train("--steps", 2)
    with owning(tmp_path / "out"):
        for option in ((), ("--fresh",)):
            said = not_resumed("--steps", 4, *option)
            assert str(tmp_path / "out") in said and f"process {os.getpid()} on " in said
    train("--steps", 4)  # a command that failed holds no lock either
    not_resumed("--steps", 5, "--lr", 1)
    train("--steps", 5)


# ------------------------------------------------------------------------------- what is kept


def test_a_run_that_is_done_is_left_as_it_is(train, tmp_path):
    train("--steps", 3)
    before = contents_of(tmp_path / "out")
    for steps in (3, 2):
        said = train("--steps", steps)
        assert "resuming" not in said and f"already at step 3 of --steps {steps}" in said
        assert contents_of(tmp_path / "out") == before


def test_a_run_that_is_done_draws_no_samples_again(train, tmp_path):
    train("--steps", 2)
    grid = tmp_path / "out" / "samples.png"
    grid.write_bytes(b"of an earlier checkpoint")
    os.utime(grid, (0, 0))
    train("--steps", 2)
    assert grid.read_bytes() == b"of an earlier checkpoint"
    grid.unlink()
    train("--steps", 2)
    assert not grid.exists()


def test_lines_after_the_last_checkpoint_and_lines_cut_in_half_are_dropped(train, tmp_path):
    train("--steps", 3)
    with open(tmp_path / "out" / "metrics.jsonl", "a") as log:
        log.write('{"step": 50, "loss": 1.0}\n')
        log.write('\n\0\0\n5\n{}\nnull\n{"step": null}\n{"step": 1, "lo\n{"step": 50, "lo')
    train("--steps", 5)
    assert [line["step"] for line in log_of(tmp_path / "out")] == [3, 5]


def test_a_full_disk_leaves_the_last_checkpoint_whole_and_is_told_in_one_line(train, refused, images, tmp_path,
                                                                              monkeypatch):
    out = tmp_path / "out"
    train("--steps", 2)
    before = state_of(out)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "fsync", full)
        said = refused("train", images, "--steps", 4, "--out", out, *FAST)
    assert str(out) in said and "No space left on device" in said
    assert same(state_of(out), before) and not list(out.glob("*.partial"))
    train("--steps", 4)
    assert state_of(out)["training"]["step"] == 4


# ------------------------------------------------------------------------------- fresh


def test_a_fresh_run_takes_the_place_of_the_other_at_its_first_save(train, images, tmp_path, monkeypatch):
    out, seen = tmp_path / "out", []
    train("--steps", 5, "--save-minutes", 0)
    old = state_of(out)["training"]["net"]

    def look(loss):
        seen.append((files_of(out), [line["step"] for line in log_of(out)]))
        return loss

    with monkeypatch.context() as patch:
        at_step(2, look, patch)
        assert "resuming" not in train("--steps", 2, "--fresh", "--seed", 1)
    ((files, steps),) = seen
    assert "checkpoint-00000005.pt" in files and "metrics.partial" in files and steps == [1, 2, 3, 4, 5]
    assert [path.name[-4:] for path in checkpoint.checkpoints(out)] == ["2.pt"]
    assert [line["step"] for line in log_of(out)] == [2] and "metrics.partial" not in files_of(out)
    assert not same(state_of(out)["training"]["net"], old)


def test_a_fresh_run_that_fails_before_it_saves_leaves_the_other_and_its_log(train, refused, images, tmp_path):
    out = tmp_path / "out"
    train("--steps", 2)
    before = checkpoint.newest(out).read_bytes()
    said = refused("train", images, "--steps", 20, "--lr", 1e30, "--fresh", "--out", out, *FAST)
    assert "--lr is 1e+30" in said and checkpoint.newest(out).read_bytes() == before
    assert [line["step"] for line in log_of(out)] == [2] and (out / "metrics.partial").exists()
    train("--steps", 5)
    assert [line["step"] for line in log_of(out)] == [2, 5] and not (out / "metrics.partial").exists()


def test_a_fresh_run_that_torchrun_restarts_twice_is_resumed_though_its_newest_checkpoint_is_damaged(
        run, train, images, tmp_path, monkeypatch):
    """What torchrun repeats is the same command: with --fresh it must drop another run's checkpoints, never its own."""
    out, command = tmp_path / "out", ("--fresh", "--save-minutes", 0, "--keep", 9)
    train("--steps", 4, *command)
    damaged = checkpoint.newest(out)
    damaged.write_bytes(damaged.read_bytes()[:1000])
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with monkeypatch.context() as patch:
        at_step(1, stop_at_once, patch)  # it ends before it saves: the damaged file is still there
        code, *_ = run("train", images, "--out", out, *FAST, "--steps", 6, *command)
    assert code == 130 and damaged.exists() and "metrics.partial" not in files_of(out)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    assert f"resuming from step 3 of {out / 'checkpoint-00000003.pt'}" in train("--steps", 6, *command)
    assert [path.name[-4:-3] for path in checkpoint.checkpoints(out)] == list("654321")
    assert [line["step"] for line in log_of(out)] == [1, 2, 3, 4, 5, 6]


def stop_at_once(loss):
    raise KeyboardInterrupt


def test_a_new_run_has_its_log_before_any_checkpoint(refused, images, tmp_path):
    refused("train", images, "--steps", 20, "--log-steps", 1, "--lr", 1e30, "--out", tmp_path / "out", *FAST)
    assert files_of(tmp_path / "out") == ["metrics.jsonl"]


def test_the_recipe_of_a_run_resumes_it(run, train, tmp_path):
    train("--steps", 1)
    code, said, _ = run("train", tmp_path / "out" / "recipe.toml", "--steps", 2, "--device", "cpu")
    assert code == 0 and "resuming from step 1" in said
    assert json.loads((tmp_path / "out" / "train.json").read_text())["steps"] == 2


# ------------------------------------------------------------------------------- begun with another's weights


def test_a_new_run_begins_with_the_averaged_weights_of_another_and_needs_them_once(train, tmp_path):
    train("--steps", 3, "--lr", 0.01, "--ema-decay", "0.5,0.9", "--seed", 1, out="first")
    said = train("--steps", 1, "--lr", 1e-9, "--init", tmp_path / "first").replace("\n", " ")
    assert f"begins with the averaged weights of {checkpoint.newest(tmp_path / 'first')}, step 3" in said
    begun, first = (state_of(tmp_path / name)["training"] for name in ("out", "first"))
    torch.testing.assert_close(begun["net"], first["averages"][0]["weights"])
    torch.testing.assert_close(begun["averages"][0]["weights"], first["averages"][0]["weights"])
    (tmp_path / "first").rename(tmp_path / "moved")
    assert "begins with" not in train("--steps", 2, "--lr", 1e-9, "--init", tmp_path / "first")


def test_weights_of_another_network_or_of_nothing_begin_no_run(train, refused, images, tmp_path):
    train("--steps", 1, "--width", 16, out="first")

    def begin(folder, *options):
        line = refused("train", images, "--out", tmp_path / "out", *FAST, "--steps", 1, "--init", folder, *options)
        assert "--init" in line
        return line

    assert "a run of another network (width 16 → " in begin(tmp_path / "first")
    assert "holds no checkpoint: expected the folder" in begin(tmp_path)
    for network in ("auto", "tiny"):  # by auto it is that of the other run
        assert str(tmp_path / "none.pt") in begin(tmp_path / "none.pt", "--network", network)
    assert not (tmp_path / "out").exists()
