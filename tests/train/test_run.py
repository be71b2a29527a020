"""A run from its first step to its last: resumed to the bit, stopped at any moment, and what it reports."""

import itertools
import json
import math
import signal
import sys
import types

import numpy as np
import pytest
import torch
from models import awake
from PIL import Image
from runs import at_step, contents_of, losses_of, same_run
from support import CPU, FAST, TINY, files_of, log_of, same, state_of

import dansm
from dansm.scale.matching import others
from dansm.scale.model import checkpoint, sampling
from dansm.scale.model.recipe import Recipe
from dansm.scale.train import run as training
from dansm.scale.train import watch
from dansm.scale.train.stop import Decide

OFTEN = ("--save-minutes", 1e-9)  # after each step, but not at once


# ------------------------------------------------------------------------------- resumed


@pytest.mark.parametrize(("method", "flow", "grid"), [("greedy", "rectified", ""), ("random", "diffusion", ""),
                                                      ("nearest", "rectified", ""), ("greedy", "diffusion", "4,4")])
def test_a_run_resumed_in_the_middle_is_the_run_that_never_stopped(run, images, tmp_path, method, flow, grid):
    """Weights, optimizer, pool, random numbers and the log, to the last bit; the pool of 10 ends inside batches of 8,
    images are mirrored, and dropout draws random numbers of its own."""
    command = ["train", images, "--method", method, "--flow", flow, "--grid", grid, "--log-steps", 1, "--ema-decay",
               "0.9,0.5", *FAST]
    once, twice = tmp_path / "once", tmp_path / "twice"
    run(*command, "--steps", 12, "--out", once)
    run(*command, "--steps", 5, "--out", twice)
    halfway = state_of(twice)
    code, said, _ = run(*command, "--steps", 12, "--out", twice)
    assert code == 0 and "resuming from step 5" in said
    assert same_run(once, twice) and not same(state_of(twice)["training"], halfway["training"])
    assert [line["step"] for line in log_of(twice)] == list(range(1, 13))
    assert (once / "samples.png").read_bytes() == (twice / "samples.png").read_bytes()


def test_a_run_of_the_version_before_is_resumed_by_the_new_names_of_its_settings(run, images, tmp_path):
    command = ["train", images, "--log-steps", 1, *FAST]
    run(*command, "--steps", 6, "--out", tmp_path / "once")
    run(*command, "--steps", 3, "--out", tmp_path / "twice")
    state = state_of(tmp_path / "twice")
    for old, new in (("pool", "pool_dtype"), ("fast", "tf32"), ("decay", "ema_decay"), ("resident", "data_on_gpu")):
        state["recipe"][old] = state["recipe"].pop(new)
    for name in ("labels", "label_dropout", "match_labels"):  # which it did not have
        del state["recipe"][name]
    checkpoint.write(checkpoint.newest(tmp_path / "twice"), state | {"recipe": state["recipe"] | {"ages": 1}})
    code, said, _ = run(*command, "--steps", 6, "--out", tmp_path / "twice")
    assert code == 0 and "resuming from step 3" in said and same_run(tmp_path / "once", tmp_path / "twice")


def test_seconds_are_those_of_all_calls(run, images, tmp_path):
    out, command = tmp_path / "out", ["train", images, "--out", tmp_path / "out", *FAST]
    run(*command, "--steps", 2)
    checkpoint.save(out, state_of(out) | {"seconds": 1000.0})
    run(*command, "--steps", 5)
    described = json.loads((out / "train.json").read_text())
    for seconds in (described["seconds"], log_of(out)[-1]["seconds"], state_of(out)["seconds"]):
        assert 1000 <= seconds < 1060
    assert described["this_call"]["steps"] == 3 and described["this_call"]["seconds"] < 60


@pytest.mark.parametrize("steps, settings, tries", [
    (training.LONG - 1, {}, False), (training.LONG, {}, True), (training.LONG, {"compile": False}, False)])
def test_cudnn_tries_its_ways_where_that_pays(steps, settings, tries, monkeypatch):
    """It takes seconds before the first step, and makes the others a little faster."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", not tries)
    recipe = Recipe("images", network="tiny", match_size=16, batch=8, steps=steps, **settings)
    training.begin(torch.zeros(20, 3, 8, 8, dtype=torch.uint8), recipe, CPU)
    assert torch.backends.cudnn.benchmark == tries


def test_deterministic_is_the_same_twice(run, images, tmp_path, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    try:
        for out in ("a", "b"):
            run("train", images, "--deterministic", "--steps", 4, "--log-steps", 1, "--out", tmp_path / out, *FAST)
            assert torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark
    finally:
        torch.use_deterministic_algorithms(False)
    assert same_run(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("place", ["yes", "no"])
def test_where_the_data_lives_changes_no_batch_and_may_change_when_a_run_is_resumed(run, images, tmp_path, place):
    command = ["train", images, *FAST, "--log-steps", 1]
    assert run(*command, "--steps", 4, "--out", tmp_path / "auto")[0] == 0
    assert run(*command, "--steps", 2, "--out", tmp_path / "other")[0] == 0
    assert run(*command, "--steps", 4, "--data-on-gpu", place, "--out", tmp_path / "other")[0] == 0
    assert same(*(state_of(tmp_path / name)["training"] for name in ("auto", "other")))


def test_a_pool_of_bfloat16_hands_out_other_noises_that_are_as_near(run, images, tmp_path):
    command = ["train", images, "--steps", 2, *FAST, "--log-steps", 1]
    for dtype in ("fp32", "bf16"):
        assert run(*command, "--pool-dtype", dtype, "--out", tmp_path / dtype)[0] == 0
    dtypes = [state_of(tmp_path / name)["ranks"][0]["pool"]["made_for"]["dtype"] for name in ("fp32", "bf16")]
    assert dtypes == ["torch.float32", "torch.bfloat16"]
    distances = [[line["distance"] for line in log_of(tmp_path / name)] for name in ("fp32", "bf16")]
    assert distances[0] != distances[1] and distances[0] == pytest.approx(distances[1], rel=0.05)


# ------------------------------------------------------------------------------- stopped


def test_sigterm_saves_once_and_for_all_and_the_same_command_resumes(run, images, tmp_path, monkeypatch):
    """A cluster sends SIGTERM to all processes and torchrun passes it on: the second comes within the save."""
    command = ["train", images, "--log-steps", 1, "--steps", 9, *FAST]
    run(*command, "--out", tmp_path / "once")
    write = checkpoint.save

    def stopped(loss):
        signal.raise_signal(signal.SIGTERM)
        return loss

    def save(*arguments, **settings):
        signal.raise_signal(signal.SIGTERM)
        return write(*arguments, **settings)

    def killed(*_):
        raise AssertionError("the run would have been killed")

    before = signal.signal(signal.SIGTERM, killed)
    try:
        with monkeypatch.context() as patch:
            at_step(4, stopped, patch)
            patch.setattr(checkpoint, "save", save)
            code, said, err = run(*command, "--out", tmp_path / "twice")
        assert signal.getsignal(signal.SIGTERM) is killed
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (code, err) == (0, "") and "stopped at step 4 of 9, saved" in said
    assert "samples.png" not in files_of(tmp_path / "twice")  # who stops does not wait for images
    code, said, _ = run(*command, "--out", tmp_path / "twice")
    assert code == 0 and "resuming from step 4" in said
    assert same_run(tmp_path / "once", tmp_path / "twice")


def test_ctrl_c_is_answered_before_the_step_ends_and_a_second_one_stops_at_once():
    said = []
    run = types.SimpleNamespace(step=0)
    with pytest.raises(KeyboardInterrupt), Decide(run, lambda: said.append("stopping")) as decide:
        assert not decide.interrupted
        signal.raise_signal(signal.SIGTERM)
        assert decide.interrupted and said == ["stopping"]
        signal.raise_signal(signal.SIGINT)


def test_a_signal_within_the_last_save_does_not_lose_it(run, images, tmp_path, monkeypatch):
    def save(*arguments, **settings):
        signal.raise_signal(signal.SIGINT)
        return write(*arguments, **settings)

    write = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", save)
    code, _, _ = run("train", images, "--steps", 2, "--out", tmp_path / "out", *FAST)
    assert code == 0 and state_of(tmp_path / "out")["training"]["step"] == 2


def test_minutes_stop_a_run_that_has_steps_left(run, images, tmp_path):
    code, _, _ = run("train", images, "--steps", 10**9, "--minutes", 0.002, "--out", tmp_path / "out", *FAST)
    described = json.loads((tmp_path / "out" / "train.json").read_text())
    assert code == 0 and 0 < described["steps"] < 10**6 and described["recipe"]["minutes"] == 0.002
    assert "minutes = 0.0\n" in (tmp_path / "out" / "recipe.toml").read_text()  # they were this call's


def test_a_nan_between_two_lines_of_the_log_is_told_with_its_step(run, refused, images, tmp_path, monkeypatch):
    command = ["train", images, "--log-steps", 5, "--steps", 20, "--out", tmp_path / "out", *FAST]
    run(*command, "--steps", 3)
    before = contents_of(tmp_path / "out")
    with monkeypatch.context() as patch:
        at_step(7 - 3, lambda loss: loss * math.nan, patch)
        said = refused(*command)
    assert "--lr is 0.0002" in said and "nan at step 7," in said
    assert {**contents_of(tmp_path / "out"), "metrics.jsonl": b""} == {**before, "metrics.jsonl": b""}
    assert [line["step"] for line in log_of(tmp_path / "out")] == [3, 5]
    assert run(*command)[0] == 0 and state_of(tmp_path / "out")["training"]["step"] == 20


def test_no_checkpoint_of_nan_is_saved_where_the_log_is_silent(refused, images, tmp_path, monkeypatch):
    at_step(3, lambda loss: loss * math.nan, monkeypatch)
    said = refused("train", images, "--steps", 4, "--save-minutes", 0, "--out", tmp_path / "out", *FAST)
    assert "at step 3," in said and state_of(tmp_path / "out")["training"]["step"] == 2


def test_no_checkpoint_of_infinite_weights_is_saved(refused, images, tmp_path, monkeypatch):
    def overflow(average, net, decay, step):
        for weight in net.parameters():
            weight.data.fill_(math.inf)

    monkeypatch.setattr(dansm, "update_ema", overflow)
    said = refused("train", images, *FAST, "--steps", 1, "--out", tmp_path / "out")
    assert "--lr is 0.0002" in said and "step 1," in said and not checkpoint.checkpoints(tmp_path / "out")


# ------------------------------------------------------------------------------- what it reports


@pytest.mark.parametrize("method", dansm.METHODS)
def test_a_line_of_the_log_has_the_same_fields_for_every_method(run, images, tmp_path, method):
    """Also for "optimal", which takes several batches before it gives the first, and then gives several."""
    code, _, err = run("train", images, "--method", method, "--log-steps", 1, "--steps", 7, "--match-size", 20,
                       "--out", tmp_path / "out", *FAST[:4], *FAST[6:])
    assert (code, err) == (0, "")
    lines = log_of(tmp_path / "out")
    assert [(line["step"], line["images"]) for line in lines] == [(step, 8 * step) for step in range(1, 8)]
    names = ["step", "images", "seconds", "loss", "loss_mean", "images_per_second", "matching", "distance",
             "distance_random"]
    assert all(list(line) == names for line in lines)
    assert all(0 <= line["matching"] < 1 and line["images_per_second"] > 0 for line in lines)
    assert sum(line["matching"] for line in lines) > 0
    assert [line["seconds"] for line in lines] == sorted(line["seconds"] for line in lines)


def test_there_is_a_line_for_each_log_steps_and_one_for_the_last(run, images, tmp_path):
    run("train", images, "--steps", 13, "--log-steps", 6, "--out", tmp_path / "out", *FAST)
    assert [line["step"] for line in log_of(tmp_path / "out")] == [6, 12, 13]


def test_the_share_of_matching_is_the_time_it_took(run, images, tmp_path, monkeypatch):
    """For "optimal" too: what is solved for three batches counts once, where it is solved."""
    now = [0.0]

    def takes(seconds, function):
        def call(*arguments, **settings):
            now[0] += seconds
            return function(*arguments, **settings)
        return call

    monkeypatch.setattr(watch, "time", types.SimpleNamespace(monotonic=lambda: now[0], perf_counter=lambda: now[0]))
    monkeypatch.setattr(others, "optimal", takes(30, others.optimal))
    monkeypatch.setattr(dansm.RectifiedFlow, "loss", takes(10, dansm.RectifiedFlow.loss))
    run("train", images, "--method", "optimal", "--match-size", 24, "--log-steps", 3, "--steps", 6, "--save-minutes",
        1e6, "--out", tmp_path / "out", *FAST[:4], *FAST[6:])
    assert [line["matching"] for line in log_of(tmp_path / "out")] == [0.5, 0.5]
    assert [line["images_per_second"] for line in log_of(tmp_path / "out")] == [0.4, 0.4]


def test_tensorboard_gets_the_log_and_forgets_what_a_kill_lost(run, refused, images, tmp_path, monkeypatch):
    boards = []

    class Board:
        def __init__(self, folder, purge_step):
            self.folder, self.purge_step, self.scalars, self.closed = folder, purge_step, [], False
            boards.append(self)

        def add_scalar(self, *scalar):
            self.scalars.append(scalar)

        def close(self):
            self.closed = True

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Board))
    command = ["train", images, "--out", tmp_path / "out", *FAST]
    run(*command, "--steps", 3)
    run(*command, "--steps", 5)
    refused("train", images, "--steps", 20, "--lr", 1e30, "--out", tmp_path / "lost", *FAST)
    assert [board.purge_step for board in boards] == [1, 4] and all(board.closed for board in boards)
    assert not (tmp_path / "lost" / "tensorboard").exists()  # there was no line before
    assert boards[0].folder == str(tmp_path / "out" / "tensorboard")
    scalars = [(name, value, line["step"]) for line in log_of(tmp_path / "out") for name, value in line.items()]
    assert boards[0].scalars + boards[1].scalars == scalars


def test_without_tensorboard_there_is_the_log_alone(run, images, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert run("train", images, "--steps", 1, "--out", tmp_path / "out", *FAST)[0] == 0
    assert not (tmp_path / "out" / "tensorboard").exists()


def test_grids_of_samples_are_of_the_same_noise_and_change_nothing(run, images, tmp_path, monkeypatch):
    """On a GPU each timed checkpoint has one; this lets the CPU draw them."""
    command = ["train", images, "--lr", 1e-9, "--log-steps", 1, "--steps", 4, "--accumulate", 2, *OFTEN, *FAST]
    run(*command, "--out", tmp_path / "without")
    assert not [name for name in files_of(tmp_path / "without") if name.startswith("samples-")]
    draw, batches, now = sampling.sample_images, [], itertools.count()

    def draw_slowly(*given, batch, **settings):
        batches.append(batch)
        for _ in range(1000):  # by this clock
            next(now)
        return draw(*given, batch=batch, **settings)

    monkeypatch.setattr(training, "GRID_DEVICES", ("cpu",))
    monkeypatch.setattr(sampling, "sample_images", draw_slowly)
    monkeypatch.setattr(watch, "time", types.SimpleNamespace(monotonic=lambda: next(now), perf_counter=lambda: 0.0))
    run(*command, "--out", tmp_path / "with")
    names = [f"samples-{number:08d}.png" for number in (1, 2, 3)]  # the last is samples.png
    assert [name for name in files_of(tmp_path / "with") if name.startswith("samples-")] == names
    pictures = {(tmp_path / "with" / name).read_bytes() for name in (*names, "samples.png")}
    assert len(pictures) == 1  # at that rate the network stays as it is, so the noise is all that could change them
    assert same_run(tmp_path / "with", tmp_path / "without")
    assert batches[:3] == [4, 4, 4]  # a step had memory for as many
    assert log_of(tmp_path / "with")[-1]["seconds"] < 1000  # grids are no training


def test_a_grid_of_classes_has_a_row_for_each_with_the_same_noise_in_a_column(tmp_path, monkeypatch):
    net = awake(dansm.UNet(**TINY, channels=3, size=8, classes=3)).eval()
    settings = Recipe(data="x", sample_steps=2)

    def pixels():
        training.draw_grid(net, dansm.RectifiedFlow(), settings, CPU, tmp_path / "grid.png", batch=5)
        grid = np.array(Image.open(tmp_path / "grid.png")).astype(int)
        return grid[2:].reshape(3, 18, 8 * 18 + 2, 3)  # a line between images is two pixels wide

    cat, dog, owl = pixels()
    assert abs(cat - dog).max() > 1 and abs(dog - owl).max() > 1
    with torch.no_grad():
        net.label.weight[:] = net.label.weight[0].clone()
    for row in pixels():
        assert abs(row - cat).max() <= 1


def test_as_many_checkpoints_are_kept_as_said(run, images, tmp_path):
    run("train", images, "--steps", 5, "--keep", 2, "--save-minutes", 0, "--out", tmp_path / "out", *FAST)
    assert [path.name for path in checkpoint.checkpoints(tmp_path / "out")] == [
        "checkpoint-00000005.pt", "checkpoint-00000004.pt"]


# ------------------------------------------------------------------------------- latents and other settings


@pytest.fixture
def latents(tmp_path):
    numbers = np.random.default_rng(0).normal(size=(20, 4, 8, 8)).astype("float32")
    np.save(tmp_path / "latents.npy", numbers)
    return tmp_path / "latents.npy"


def test_latents_train_and_are_no_picture(run, refused, latents, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "GRID_DEVICES", ("cpu",))
    code, said, err = run("train", latents, "--steps", 3, *OFTEN, "--out", tmp_path / "out", *FAST)
    assert (code, err) == (0, "") and ".png" not in said and "dansm sample" not in said
    assert not [name for name in files_of(tmp_path / "out") if name.endswith(".png")]
    assert state_of(tmp_path / "out")["network"]["channels"] == 4
    assert state_of(tmp_path / "out")["recipe"]["flip"] is False


def test_a_recipe_of_the_papers_runs_with_data_and_a_width_of_ones_own(run, latents, tmp_path):
    code, _, err = run("train", "latent-bedroom", "--data", latents, "--width", 8, "--blocks", 1, "--batch", 4,
                       "--match-size", 8, "--steps", 2, "--device", "cpu")
    assert (code, err) == (0, "")
    state = state_of(tmp_path / "runs" / "latent-bedroom")
    assert state["training"]["step"] == 2 and state["recipe"]["lr"] == 1e-4
    assert state["network"]["width"] == 8 and state["network"]["multipliers"] == [1, 2, 2, 2]


def test_random_pairs_need_no_room_for_a_pool(run, images, tmp_path):
    command = ["train", images, "--method", "random", *FAST, "--match-size", 10**11, "--steps", 1]
    assert run(*command, "--out", tmp_path / "out")[0] == 0
    assert state_of(tmp_path / "out")["ranks"][0]["pool"]["made_for"]["match_size"] == 0


def test_a_grid_is_the_pools_and_has_no_effect_on_other_methods(run, images, tmp_path):
    command = ["train", images, *FAST, "--steps", 1, "--grid", "4,4"]
    for method, made_for, told in (("greedy", [None, 4, 4], False), ("random", None, True)):
        code, said, _ = run(*command, "--method", method, "--out", tmp_path / method)
        assert code == 0 and ("--grid has no effect with --method random" in said) == told
        assert state_of(tmp_path / method)["ranks"][0]["pool"]["made_for"].get("grid") == made_for


@pytest.mark.parametrize(("option", "value", "named"), [
    ("--batch", 10**12, "1,000,000,000,000"), ("--match-size", 10**13, "10,000,000,000,000"),
    ("--precision", "fp16", "fp16"), ("--accumulate", 3, "multiple of 3"), ("--match-scope", "global", "global"),
    ("--grid", "8,8,8,8", "(8, 8, 8, 8)")])
def test_what_cannot_be_done_here_is_refused_before_a_step(refused, images, tmp_path, option, value, named):
    said = refused("train", images, *FAST, option, value, "--out", tmp_path / "out").replace("_", "-")
    assert option[2:] in said and named in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("option", "value"), [("--accumulate", 3), ("--match-scope", "global"), ("--precision", "x"),
                                               ("--grid", "8,0"), ("--grid", "8x8")])
def test_what_cannot_be_done_here_is_refused_before_the_data_is_read(refused, tmp_path, option, value):
    (tmp_path / "empty").mkdir()
    assert option in refused("train", tmp_path / "empty", option, value, "--out", tmp_path / "out")


def test_the_log_of_batches_of_one_compares_with_the_noise_before(run, images, tmp_path):
    run("train", images, "--steps", 9, "--log-steps", 1, *FAST, "--batch", 1, "--out", tmp_path / "out")
    lines = losses_of(tmp_path / "out")
    assert lines[0][-1] == lines[0][-2] and all(line[-1] != line[-2] for line in lines[1:])
