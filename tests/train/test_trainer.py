"""The trainer of long runs: its step, runs of several processes, stops at any moment, and what it tells of itself."""

import copy
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import types
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from dansm.scale.base.locks import owning
from dansm.scale.base.machine import number_type, peak
from dansm.scale.data import read
from dansm.scale.data import loader as data
from dansm.scale.model import checkpoint, sampling
from dansm.scale.model import sampling as samples
from dansm.scale.model.load import load_model
from dansm.scale.model.recipe import Recipe
from dansm.scale.model.sampling import operations_per_image
from dansm.scale.studies import foundations
from dansm.scale.train import fit as trainer
from dansm.scale.train.step import FastTraining
from support import (
    FAST,
    TINY,
    ended,
    files_of,
    in_processes,
    log_of,
    make_images,
    needs_gloo,
    same,
    start_processes,
    state_of,
    wait_for,
)

import dansm

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
STEADY = TINY | dict(dropout=0.0)


@pytest.fixture
def images(tmp_path):
    return make_images(tmp_path / "images", width=8, height=8)


# ------------------------------------------------------------------------------- the step


def started(network, **settings):
    """A run by a recipe of those settings, at its beginning."""
    return FastTraining(copy.deepcopy(network), Recipe("images", **{"batch": 8, "lr": 0.01, **settings}), CPU)


def network(**settings):
    return dansm.UNet(channels=1, size=8, **settings)


def batches(count):
    """Pairs (x, z) of eight samples each, one for a step."""
    return [tuple(pair) for pair in torch.randn(count, 2, 8, 1, 8, 8)]


def made(run, pairs, flow=None):
    """The losses of the steps that `run` makes with these pairs, from the same random numbers each time."""
    torch.manual_seed(1)
    return torch.stack(list(dansm.train(run, flow or dansm.RectifiedFlow(), pairs)))


def test_a_step_is_that_of_the_plain_loop_to_the_last_bit():
    net, pairs = network(**TINY), batches(4)
    plain, fast = dansm.Training(copy.deepcopy(net), 0.01, 0.99, 0.5), started(net, decay=[0.99], clip=0.5)
    assert torch.equal(made(plain, pairs), made(fast, pairs))
    for part in ("net", "average", "optimizer"):
        assert same(getattr(plain, part).state_dict(), getattr(fast, part).state_dict())
    assert not same(net.state_dict(), fast.net.state_dict()) and fast.step == 4


def test_a_batch_in_parts_gives_the_step_of_the_whole_batch(monkeypatch):
    times = itertools.chain.from_iterable(itertools.repeat(torch.linspace(0.1, 0.9, 8)))
    monkeypatch.setattr(dansm, "draw_times", lambda count, *_: torch.stack(list(itertools.islice(times, count))))
    net, pairs = network(**STEADY), batches(3)
    whole, parts = started(net), started(net, accumulate=4)
    torch.testing.assert_close(made(whole, pairs), made(parts, pairs))
    for a, b in zip(whole.net.parameters(), parts.net.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)  # Adam divides small gradients by small ones


def test_the_learning_rate_rises_from_the_first_step():
    run, rates = started(network(**STEADY), warmup=4, lr=0.01), []
    for _ in dansm.train(run, dansm.RectifiedFlow(), batches(6)):
        rates.append(run.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01], rel=1e-12)


def test_a_step_at_a_low_rate_moves_less():
    net, pairs = network(**STEADY), batches(1)
    moves = []
    for warmup in (0, 10):
        run = started(net, warmup=warmup)
        made(run, pairs)
        moves.append(sum((a - b).abs().sum().item() for a, b in zip(run.net.parameters(), net.parameters(),
                                                                    strict=True)))
    assert moves[1] == pytest.approx(moves[0] / 10, rel=1e-3)


def test_each_average_follows_its_own_decay():
    run = started(network(**STEADY), decay=[0.9999, 0.3, 0.0])
    follows = [[weight.detach().double().clone() for weight in run.net.parameters()] for _ in range(3)]
    for n, _ in enumerate(dansm.train(run, dansm.RectifiedFlow(), batches(6)), 1):
        for decay, average in zip((0.9999, 0.3, 0.0), follows, strict=True):
            kept = min(decay, (1 + n) / (10 + n))
            for mean, weight in zip(average, run.net.parameters(), strict=True):
                mean.mul_(kept).add_(weight.detach().double(), alpha=1 - kept)
    assert run.average is run.averages[0]
    for mine, theirs in zip(follows, run.averages, strict=True):
        for mean, weight in zip(mine, theirs.parameters(), strict=True):
            torch.testing.assert_close(mean.float(), weight)
    assert same(run.averages[2].state_dict(), run.net.state_dict())
    assert not same(run.averages[0].state_dict(), run.averages[1].state_dict())


def test_a_state_gives_back_every_part():
    run = started(network(**STEADY), decay=[0.9, 0.3], warmup=3)
    made(run, batches(5))
    other = started(network(**STEADY), decay=[0.9, 0.3], warmup=3)
    other.load_state_dict(copy.deepcopy(run.state_dict()))
    assert same(run.state_dict(), other.state_dict())
    pairs = batches(2)
    assert torch.equal(made(run, pairs), made(other, pairs)) and same(run.state_dict(), other.state_dict())


def test_the_gradient_is_clipped_over_all_parts_of_a_batch():
    class Steep(dansm.RectifiedFlow):
        def loss(self, *arguments):
            return 1e4 * super().loss(*arguments)

    for accumulate in (1, 4):
        run = started(network(**STEADY), clip=0.25, accumulate=accumulate)
        made(run, batches(1), Steep())
        norm = torch.cat([weight.grad.flatten() for weight in run.net.parameters()]).norm().item()
        assert norm == pytest.approx(0.25, rel=1e-4)


def test_bf16_trains_weights_of_float32():
    net, pairs = network(**STEADY), batches(1) * 40
    half, full = started(net, precision="bf16"), started(net, precision="fp32")
    losses, exact = made(half, pairs), made(full, pairs)
    assert all(weight.dtype == torch.float32 for weight in half.net.parameters())
    assert not torch.equal(losses, exact) and losses[0].item() == pytest.approx(exact[0].item(), rel=0.05)
    assert losses[-10:].mean() < 0.9 * losses[:3].mean()


def test_the_number_type_is_the_devices(monkeypatch):
    cuda = torch.device("cuda")
    for new, wanted in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda emulated=True, new=new: emulated or new)
        assert number_type("auto", cuda) == wanted
    assert number_type("auto", CPU) == number_type("fp32", cuda) == torch.float32
    assert number_type("bf16", CPU) == torch.bfloat16 and number_type("fp16", cuda) == torch.float16


def test_fp16_without_a_gpu_is_refused(refused, images, tmp_path):
    said = refused("train", images, "--precision", "fp16", "--out", tmp_path / "out", *FAST)
    assert "precision is fp16, on cpu: expected bf16 or fp32" in said


def test_what_cannot_be_done_here_is_told_before_the_data_is_read(refused, images, tmp_path, monkeypatch):
    monkeypatch.setattr("scale.command.read", lambda recipe: pytest.fail("the data was read"))
    for option, value, says in (("--precision", "fp16", "precision is fp16, on cpu: expected"),
                                ("--accumulate", 3, "--batch is 8: expected a multiple of 3"),
                                ("--match-scope", "global", "--match-scope is global, for several processes")):
        assert says in refused("train", images, option, value, "--out", tmp_path / "out", *FAST)
        assert not (tmp_path / "out").exists()


def test_the_operations_of_the_papers_network():
    assert operations_per_image(dansm.UNet(channels=4).settings) == pytest.approx(65.09e9, rel=1e-3)


@pytest.mark.parametrize(("name", "wanted"), [
    ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA A100-SXM4-40GB", 312), ("NVIDIA L4", 121),
    ("NVIDIA L40S", 362), ("NVIDIA RTX A4000", None), ("NVIDIA A10G", None), ("Tesla T4", 65), ("", None)])
def test_the_peak_is_of_the_gpu_named_and_of_no_other(monkeypatch, name, wanted):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert peak(torch.device("cuda")) == (wanted and wanted * 1e12) and peak(CPU) is None


# ------------------------------------------------------------------------------- stopping in the middle


def at_step(number, act, monkeypatch):
    """Do `act` within the step of that number in this call."""
    loss, calls = dansm.RectifiedFlow.loss, itertools.count(1)
    monkeypatch.setattr(dansm.RectifiedFlow, "loss", lambda *arguments: (
        act(loss(*arguments)) if next(calls) == number else loss(*arguments)))


def test_sigterm_saves_once_and_for_all_and_the_same_command_goes_on(run, images, tmp_path, monkeypatch):
    """A cluster sends SIGTERM to all processes and torchrun passes it on: the second comes within the save."""
    command = ["train", images, "--log-steps", 1, "--steps", 9, *FAST]
    run(*command, "--out", tmp_path / "once")

    def stopped(loss):
        signal.raise_signal(signal.SIGTERM)
        return loss

    def save(*arguments, **settings):
        signal.raise_signal(signal.SIGTERM)
        return write(*arguments, **settings)

    write = checkpoint.save
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
    assert (code, err) == (0, "") and "stopped at step 4 of 9, saved; the same command goes on" in said
    code, said, _ = run(*command, "--out", tmp_path / "twice")
    assert code == 0 and "going on from step 4" in said
    assert same_run(tmp_path / "once", tmp_path / "twice")


def test_a_second_ctrl_c_does_not_wait_for_the_step():
    with pytest.raises(KeyboardInterrupt), trainer.Interrupt(lambda: None):
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)


def test_a_signal_within_the_last_save_does_not_lose_it(run, images, tmp_path, monkeypatch):
    def save(*arguments, **settings):
        signal.raise_signal(signal.SIGINT)
        return write(*arguments, **settings)

    write = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", save)
    code, _, _ = run("train", images, "--steps", 2, "--out", tmp_path / "out", *FAST)
    assert code == 0 and state_of(tmp_path / "out")["training"]["step"] == 2


def same_run(one, other):
    """Whether two folders hold the same run to the last bit, all but its seconds: newest checkpoint and log."""
    states = [{**state_of(out), "seconds": 0} for out in (one, other)]
    told = [[(line["step"], line["loss"], line["distance"], line["distance_unmatched"]) for line in log_of(out)]
            for out in (one, other)]
    return same(*states) and told[0] == told[1]


def test_a_nan_between_two_lines_of_the_log_is_told_with_its_step(run, refused, images, tmp_path, monkeypatch):
    command = ["train", images, "--log-steps", 5, "--steps", 20, "--out", tmp_path / "out", *FAST]
    run(*command, "--steps", 3)
    before = {name: (tmp_path / "out" / name).read_bytes() for name in files_of(tmp_path / "out")}
    with monkeypatch.context() as patch:
        at_step(7 - 3, lambda loss: loss * math.nan, patch)
        said = refused(*command)
    assert "the loss became nan at step 7," in said and "untouched" in said
    after = {name: (tmp_path / "out" / name).read_bytes() for name in files_of(tmp_path / "out")}
    assert {**after, "metrics.jsonl": b""} == {**before, "metrics.jsonl": b""}
    assert [line["step"] for line in log_of(tmp_path / "out")] == [3, 5]
    assert run(*command)[0] == 0 and state_of(tmp_path / "out")["training"]["step"] == 20


def test_no_checkpoint_of_nan_is_saved_where_the_log_is_silent(refused, images, tmp_path, monkeypatch):
    at_step(3, lambda loss: loss * math.nan, monkeypatch)
    said = refused("train", images, "--steps", 4, "--save-minutes", 0, "--out", tmp_path / "out", *FAST)
    assert "at step 3," in said and state_of(tmp_path / "out")["training"]["step"] == 2


def test_deterministic_is_the_same_twice(run, images, tmp_path, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    try:
        for out in ("a", "b"):
            run("train", images, "--deterministic", "--steps", 4, "--log-steps", 1, "--out", tmp_path / out, *FAST)
            assert torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark
    finally:
        torch.use_deterministic_algorithms(False)
    assert same_run(tmp_path / "a", tmp_path / "b")


# ------------------------------------------------------------------------------- what it tells


@pytest.mark.parametrize("method", dansm.METHODS)
def test_a_line_of_the_log_has_what_it_says_whatever_the_method(run, images, tmp_path, method):
    """Also of "optimal", which takes several batches before it gives the first, and then gives several."""
    code, _, err = run("train", images, "--method", method, "--log-steps", 1, "--steps", 7, "--match-size", 20,
                       "--out", tmp_path / "out", *FAST[:4], *FAST[6:])
    assert (code, err) == (0, "")
    lines = log_of(tmp_path / "out")
    assert [(line["step"], line["images"]) for line in lines] == [(step, 8 * step) for step in range(1, 8)]
    names = ["step", "images", "seconds", "loss", "loss_mean", "images_per_second", "matching", "distance",
             "distance_unmatched"]
    assert all(list(line) == names for line in lines)
    assert all(0 <= line["matching"] < 1 and line["images_per_second"] > 0 for line in lines)
    assert sum(line["matching"] for line in lines) > 0
    assert [line["seconds"] for line in lines] == sorted(line["seconds"] for line in lines)


def test_the_share_of_matching_is_the_time_it_took(run, images, tmp_path, monkeypatch):
    """Of "optimal" too: what is solved for three batches counts once, where it is solved."""
    now = [0.0]
    solve, loss = dansm.optimal, dansm.RectifiedFlow.loss

    def takes(seconds, function):
        def call(*arguments, **settings):
            now[0] += seconds
            return function(*arguments, **settings)
        return call

    clock = types.SimpleNamespace(monotonic=lambda: now[0], perf_counter=lambda: now[0])
    monkeypatch.setattr(trainer, "time", clock)
    monkeypatch.setattr(dansm, "optimal", takes(30, solve))
    monkeypatch.setattr(dansm.RectifiedFlow, "loss", takes(10, loss))
    run("train", images, "--method", "optimal", "--match-size", 24, "--log-steps", 3, "--steps", 6, "--save-minutes",
        1e6, "--out", tmp_path / "out", *FAST[:4], *FAST[6:])
    assert [line["matching"] for line in log_of(tmp_path / "out")] == [0.5, 0.5]
    assert [line["images_per_second"] for line in log_of(tmp_path / "out")] == [0.4, 0.4]


class Board:
    """In the place of TensorBoard's writer."""

    made: list = []  # noqa: RUF012

    def __init__(self, folder, purge_step):
        self.folder, self.purge_step, self.told, self.closed = folder, purge_step, [], False
        self.made.append(self)

    def add_scalar(self, name, value, step):
        self.told.append((name, value, step))

    def close(self):
        self.closed = True


def test_tensorboard_is_told_the_log_and_forgets_what_a_kill_lost(run, refused, images, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Board))
    monkeypatch.setattr(Board, "made", [])
    command = ["train", images, "--out", tmp_path / "out", *FAST]
    run(*command, "--steps", 3)
    run(*command, "--steps", 5)
    refused("train", images, "--steps", 20, "--lr", 1e30, "--out", tmp_path / "lost", *FAST)
    assert [board.purge_step for board in Board.made] == [1, 4, 1]
    assert all(board.closed for board in Board.made) and Board.made[0].folder == str(tmp_path / "out" / "tensorboard")
    lines = log_of(tmp_path / "out")
    told = [(name, value, line["step"]) for line in lines for name, value in line.items()]
    assert Board.made[0].told + Board.made[1].told == told


def test_without_tensorboard_there_is_the_log_alone(run, images, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert run("train", images, "--steps", 1, "--out", tmp_path / "out", *FAST)[0] == 0
    assert not (tmp_path / "out" / "tensorboard").exists()


OFTEN = ("--save-minutes", 1e-9)  # after each step, but not at once


def test_grids_are_of_the_same_noise_and_change_nothing(run, images, tmp_path, monkeypatch):
    command = ["train", images, "--lr", 1e-9, "--log-steps", 1, "--steps", 4, *OFTEN, *FAST]
    monkeypatch.setattr(trainer, "GRID_SHARE", 0)
    run(*command, "--out", tmp_path / "without")
    monkeypatch.setattr(trainer, "GRID_SHARE", 1e15)
    run(*command, "--out", tmp_path / "with")
    names = [f"samples-{number:08d}.png" for number in (1, 2, 3)]  # the last is sampling.png
    assert [name for name in files_of(tmp_path / "with") if name.startswith("samples-")] == names
    assert not [name for name in files_of(tmp_path / "without") if name.startswith("samples-")]
    pictures = {(tmp_path / "with" / name).read_bytes() for name in (*names, "samples.png")}
    assert len(pictures) == 1  # at that rate the network stays as it is, so the noise is all that could change them
    assert same_run(tmp_path / "with", tmp_path / "without")


def test_grids_take_no_part_of_the_seconds(run, images, tmp_path, monkeypatch):
    paused, depth, seen = {kind: kind.paused for kind in (trainer.Keeper, trainer.Watch)}, [], []

    for kind, real in paused.items():
        @contextmanager
        def counted(self, real=real, kind=kind):
            depth.append(kind)
            with real(self):
                yield
            depth.remove(kind)

        monkeypatch.setattr(kind, "paused", counted)
    monkeypatch.setattr(trainer.Keeper, "grid", lambda *_: seen.append(set(depth)))
    monkeypatch.setattr(trainer, "GRID_SHARE", 1e15)
    run("train", images, "--steps", 2, *OFTEN, "--out", tmp_path / "out", *FAST)
    assert seen == [{trainer.Keeper, trainer.Watch}]


def test_a_grid_takes_no_more_at_once_than_a_step(run, images, tmp_path, monkeypatch):
    draw, sizes = sampling.sample_images, []
    monkeypatch.setattr(samples, "sample_images", lambda *given, **settings: (
        sizes.append(settings.get("batch")) or draw(*given, **settings)))
    monkeypatch.setattr(trainer, "GRID_SHARE", 1e15)
    run("train", images, "--steps", 2, "--accumulate", 2, *OFTEN, "--out", tmp_path / "out", *FAST)
    assert sizes[0] == 4


def test_as_many_checkpoints_are_kept_as_said(run, images, tmp_path):
    run("train", images, "--steps", 5, "--keep", 2, "--save-minutes", 0, "--out", tmp_path / "out", *FAST)
    assert [path.name for path in checkpoint.checkpoints(tmp_path / "out")] == [
        "checkpoint-00000005.pt", "checkpoint-00000004.pt"]


def test_fresh_keeps_the_other_run_until_its_own_first_save(run, images, tmp_path, monkeypatch):
    out, seen = tmp_path / "out", []
    command = ["train", images, "--out", out, *FAST]
    run(*command, "--steps", 3)
    old = checkpoint.newest(out)

    def look(loss):
        seen.append((files_of(out), [line["step"] for line in log_of(out)]))
        return loss

    with monkeypatch.context() as patch:
        at_step(2, look, patch)
        run(*command, "--steps", 2, "--fresh", "--seed", 1)
    ((files, steps),) = seen
    assert old.name in files and "metrics.partial" in files and steps == [3]
    assert [path.name[-4:] for path in checkpoint.checkpoints(out)] == ["2.pt"]
    assert [line["step"] for line in log_of(out)] == [2] and "metrics.partial" not in files_of(out)


# ------------------------------------------------------------------------------- latents


@pytest.fixture
def latents(tmp_path):
    numbers = np.random.default_rng(0).normal(size=(20, 4, 8, 8)).astype("float32")
    np.save(tmp_path / "latents.npy", numbers)
    return tmp_path / "latents.npy"


def test_latents_train_and_are_no_picture(run, latents, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "GRID_SHARE", 1e15)
    code, said, err = run("train", latents, "--steps", 3, *OFTEN, "--out", tmp_path / "out", *FAST)
    assert (code, err) == (0, "") and ".png" not in said
    assert not [name for name in files_of(tmp_path / "out") if name.endswith(".png")]
    assert state_of(tmp_path / "out")["network"]["channels"] == 4


def test_a_network_of_latents_draws_no_pictures(run, refused, latents, tmp_path):
    said = run("train", latents, "--steps", 1, "--out", tmp_path / "out", *FAST)[1]
    assert "dansm sample" not in said
    assert "latents of 4 channels" in refused("sample", tmp_path / "out", "--out", tmp_path / "samples")
    assert not (tmp_path / "samples").exists()


def test_a_batch_that_no_memory_holds_is_refused(refused, images, tmp_path):
    said = refused("train", images, "--out", tmp_path / "out", *FAST, "--batch", 10**12)
    assert "--batch is 1,000,000,000,000" in said


def test_going_on_with_another_width_names_the_width_alone(run, refused, images, tmp_path):
    run("train", images, "--steps", 1, "--out", tmp_path / "out", *FAST, "--width", 8)
    said = refused("train", images, "--steps", 2, "--out", tmp_path / "out", *FAST, "--width", 16)
    assert "(width 8 → 16)" in said


def test_a_recipe_of_the_papers_runs_with_data_and_a_width_of_ones_own(run, latents, tmp_path):
    code, _, err = run("train", "latent-bedroom", "--data", latents, "--width", 8, "--blocks", 1, "--batch", 4,
                       "--match-size", 8, "--steps", 2, "--device", "cpu")
    assert (code, err) == (0, "")
    state = state_of(tmp_path / "runs" / "latent-bedroom")
    assert state["training"]["step"] == 2 and state["recipe"]["flip"] is False and state["recipe"]["lr"] == 1e-4
    assert state["network"]["width"] == 8 and state["network"]["multipliers"] == [1, 2, 2, 2]


def test_a_run_begun_with_a_scaler_goes_on_only_where_there_is_one(run, refused, images, tmp_path):
    """As where precision is auto, and the card it goes on with knows bf16."""
    out = tmp_path / "out"
    assert run("train", images, "--steps", 2, "--out", out, *FAST)[0] == 0
    state = state_of(out)
    state["training"]["scaler"] = torch.amp.GradScaler("cpu").state_dict()
    checkpoint.save(out, state)
    said = refused("train", images, "--steps", 4, "--out", out, *FAST)
    assert "precision fp16 → bf16 or fp32" in said and "--fresh" in said


# ------------------------------------------------------------------------------- several processes


def keep_pairs(rank, folder):
    """Write what each process trains on, and the averaged network that it ends with, to `folder`."""
    pairs, fit = trainer.Watch.paired, trainer.fit

    def kept(self, matched):
        for number, pair in enumerate(pairs(self, matched)):
            torch.save(pair, folder / f"pair-{number}-{rank}.pt")
            yield pair

    def fitted(*arguments, **settings):
        summary, net, flow = fit(*arguments, **settings)
        torch.save(net.state_dict(), folder / f"average-{rank}.pt")
        return summary, net, flow

    trainer.Watch.paired, trainer.fit = kept, fitted


@needs_gloo
@pytest.mark.parametrize("match_scope", ["rank", "global"])
def test_two_processes_resumed_are_the_run_that_never_stopped(refused, images, tmp_path, match_scope):
    command = ["train", images, "--match-scope", match_scope, "--accumulate", 2, "--decay", "0.99,0.5", "--warmup", 4,
               "--log-steps", 1, *FAST]
    once, twice = tmp_path / "once", tmp_path / "twice"
    codes, said = in_processes(tmp_path, [*command, "--steps", 8, "--out", once],
                               [*command, "--steps", 3, "--out", twice], [*command, "--steps", 8, "--out", twice],
                               hook=keep_pairs)
    assert codes == [[0, 0, 0]] * 2, said
    assert "going on from step 3" in said[0] and said[1] == ""  # one speaks
    assert same_run(once, twice)
    state = state_of(once)
    assert len(state["ranks"]) == 2 and len(state["training"]["averages"]) == 2
    random = [ours["random"]["cpu"] for ours in state["ranks"]]
    assert not torch.equal(*random) and not same(state["ranks"][0]["pool"], state["ranks"][1]["pool"])
    averages = [torch.load(tmp_path / f"average-{rank}.pt") for rank in range(2)]
    assert same(*averages) and same(averages[0], state["training"]["averages"][0]["weights"])
    described = json.loads((once / "train.json").read_text())
    assert described["processes"] == 2 and described["images"] == 64
    if match_scope == "rank":
        assert "(processes 2 → 1)" in refused(*command, "--steps", 9, "--out", once)


def pairs_of(folder, number, ranks):
    """x and z of a step, joined over all processes."""
    parts = [torch.load(folder / f"pair-{number}-{rank}.pt") for rank in range(ranks)]
    return [torch.cat(part) for part in zip(*parts, strict=True)]


@needs_gloo
def test_processes_that_share_a_pool_train_on_the_pairs_of_one_process(images, tmp_path):
    command = ["train", images, "--steps", 7, *FAST]
    commands = {"one": [*command, "--out", tmp_path / "1"],
                "global": [*command, "--match-scope", "global", "--out", tmp_path / "2"],
                "rank": [*command, "--out", tmp_path / "3"]}
    for name in commands:
        (tmp_path / name).mkdir()
        codes, said = in_processes(tmp_path / name, commands[name], count=1 if name == "one" else 2, hook=keep_pairs)
        assert {code for each in codes for code in each} == {0}, said
    for number in range(7):
        (x, z), *others = [pairs_of(tmp_path / name, number, count) for name, count in
                           (("one", 1), ("global", 2), ("rank", 2))]
        assert x.shape == (8, 3, 8, 8)
        assert torch.equal(x, others[0][0]) and torch.equal(z, others[0][1])
        assert torch.equal(x, others[1][0]) and not torch.equal(z, others[1][1])


def test_a_pool_of_bfloat16_trains_on_other_noises_and_goes_on_only_as_that(run, refused, images, tmp_path):
    command = ["train", images, "--steps", 2, *FAST, "--log-steps", 1]
    for pool in ("fp32", "bf16"):
        assert run(*command, "--pool", pool, "--out", tmp_path / pool)[0] == 0
    kept = {pool: state_of(tmp_path / pool)["ranks"][0]["pool"]["made_for"]["dtype"] for pool in ("fp32", "bf16")}
    assert kept == {"fp32": "torch.float32", "bf16": "torch.bfloat16"}
    distances = [[line["distance"] for line in log_of(tmp_path / pool)] for pool in ("fp32", "bf16")]
    assert distances[0] != distances[1] and distances[0] == pytest.approx(distances[1], rel=0.05)
    assert "pool fp32 → bf16" in refused(*command, "--pool", "bf16", "--out", tmp_path / "fp32")


@pytest.mark.parametrize("resident", ["yes", "no"])
def test_where_the_data_lives_changes_no_batch_and_may_change_when_a_run_goes_on(run, images, tmp_path, resident):
    command = ["train", images, *FAST, "--log-steps", 1]
    assert run(*command, "--steps", 4, "--out", tmp_path / "auto")[0] == 0
    assert run(*command, "--steps", 2, "--out", tmp_path / "other")[0] == 0
    assert run(*command, "--steps", 4, "--resident", resident, "--out", tmp_path / "other")[0] == 0
    assert same(*(state_of(tmp_path / name)["training"] for name in ("auto", "other")))


def count_decoded(rank, folder):
    """Leave a file for each image that this process decodes."""
    read_image = read.read_image

    def counted(path, *arguments):
        (folder / f"decoded-{rank}-{path.name}").touch()
        return read_image(path, *arguments)

    read.read_image = counted


@needs_gloo
def test_of_two_processes_one_decodes_and_the_next_run_decodes_nothing(images, tmp_path, monkeypatch):
    command = ["train", images, "--steps", 1, *FAST]
    codes, said = in_processes(tmp_path, [*command, "--out", tmp_path / "a"], hook=count_decoded)
    assert codes == [[0], [0]], said
    count = len(list(Path(images).rglob("*.png")))
    assert len(list(tmp_path.glob("decoded-*"))) == count > 1
    for note in tmp_path.glob("decoded-*"):
        note.unlink()
    codes, said = in_processes(tmp_path, [*command, "--out", tmp_path / "b"], hook=count_decoded)
    assert codes == [[0], [0]], said
    assert not list(tmp_path.glob("decoded-*"))
    assert said[0].count(f"decoded images: {tmp_path}/.cache/dansm/images/") == 1 and not said[1]
    monkeypatch.setenv("HOME", str(tmp_path))  # as the processes had it
    monkeypatch.setattr(read, "read_image", lambda *_: pytest.fail("decoded"))
    about = load_model(tmp_path / "b").about
    model = foundations.Model("b", None, None, (3, 8, 8), about)
    assert len(foundations.load_data(None, [model], count=2)) == count


@needs_gloo
def test_what_processes_cannot_do_together_is_refused_by_each(images, tmp_path):
    command = ["train", images, "--steps", 2, *FAST]
    for rank, count in enumerate((20, 24)):  # of files, as where they are still being written
        make_images(tmp_path / f"images-{rank}", width=8, height=8, count=count)
    codes, said = in_processes(
        tmp_path, [*command, "--batch", 9, "--out", tmp_path / "a"],
        [*command, "--batch", 10, "--accumulate", 2, "--out", tmp_path / "b"],
        [*command, "--out", tmp_path / "of-{rank}"], [*command, "--out", tmp_path / "of-1", "--steps", 4],
        [*command, "--out", tmp_path / "of-{rank}", "--steps", 4],
        ["train", tmp_path / "images-{rank}", "--steps", 2, *FAST, "--out", tmp_path / "c"])
    assert codes == [[2, 2, 0, 0, 2, 2]] * 2, said
    for each in said:
        errors = [line for line in each.splitlines() if line.startswith("dansm: ")]
        assert "--batch is 9: expected a multiple of 2, 2 processes times --accumulate 1" in errors[0]
        assert "--batch is 10: expected a multiple of 4, 2 processes times --accumulate 2" in errors[1]
        assert "find checkpoint-00000002.pt, checkpoint-00000004.pt there, expected one folder" in errors[2]
        assert "the processes find 20, 24 there, expected one folder that all of them see" in errors[3]
        assert len(errors) == 4 and "Traceback" not in each


def test_as_many_are_sampled_at_once_as_half_of_the_free_memory_holds(monkeypatch):
    from dansm.scale.model.sampling import at_once

    with torch.device("meta"):
        nets = [dansm.UNet(**settings) for settings in ({}, dict(width=64), dict(size=256, attention_at=()))]
    assert at_once(nets[0], torch.device("cpu")) == 64
    found = []
    for free in (4e9, 80e9, 1e6):
        monkeypatch.setattr(dansm, "free_memory", lambda device, free=free: int(free))
        found.append([at_once(net, torch.device("cuda")) for net in nets])
    assert found == [[190, 381, 2], [2000, 2000, 59], [1, 1, 1]]


@needs_gloo
def test_a_run_of_two_processes_into_a_folder_in_use_ends_both_in_one_line_each(images, tmp_path):
    (tmp_path / "out").mkdir()
    with owning(tmp_path / "out"):
        codes, said = in_processes(tmp_path, ["train", images, "--out", tmp_path / "out", "--steps", 2, *FAST])
    assert codes == [[2], [2]] and "Traceback" not in "".join(said), said
    assert "is being trained into" in said[0] and said[1].startswith("dansm: another process of this run has")


def restarted_on_the_second_node(rank, folder):
    os.environ |= {"GROUP_WORLD_SIZE": "2", "TORCHELASTIC_RESTART_COUNT": str(rank)}


@needs_gloo
def test_a_restart_on_one_node_is_one_of_all(images, tmp_path):
    command = ["train", images, "--fresh", "--out", tmp_path / "out", *FAST]
    assert in_processes(tmp_path, [*command, "--steps", 2])[0] == [[0], [0]]
    codes, said = in_processes(tmp_path, [*command, "--steps", 4], hook=restarted_on_the_second_node)
    assert codes == [[0], [0]] and "going on from step 2" in said[0], said


@needs_gloo
def test_half_of_torchruns_environment_is_refused(refused, images, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    said = refused("train", images, "--out", tmp_path / "out", *FAST)
    assert "RANK is 0" in said and "WORLD_SIZE expected" in said


def nan_in_the_second_process(rank, folder):
    if rank == 1:
        at_step(7, lambda loss: loss * math.nan, pytest.MonkeyPatch())


@needs_gloo
def test_a_nan_in_one_process_stops_all_with_its_step(images, tmp_path):
    codes, said = in_processes(
        tmp_path, ["train", images, "--steps", 20, "--log-steps", 5, "--out", tmp_path / "out", *FAST],
        hook=nan_in_the_second_process)
    assert codes == [[2], [2]], said
    assert all("the loss became nan at step 7," in each and "Traceback" not in each for each in said)


@needs_gloo
def test_sigterm_to_one_process_stops_all_with_a_save_and_the_same_command_goes_on(images, tmp_path):
    out = tmp_path / "out"
    command = ["train", images, "--steps", 10**6, "--out", out, *FAST]
    children = start_processes(tmp_path, command)
    wait_until_logged(out, lambda: all(child.is_alive() for child in children))
    os.kill(children[1].pid, signal.SIGTERM)
    codes, said = ended(children, tmp_path)
    assert codes == [[0], [0]], said
    described = json.loads((out / "train.json").read_text())
    assert described["stopped_early"] and "saved; the same command goes on" in said[0]
    assert "samples.png" not in files_of(out)  # who stops does not wait for images
    steps = state_of(out)["training"]["step"]
    assert described["steps"] == log_of(out)[-1]["step"] == steps
    codes, said = in_processes(tmp_path, [*command, "--steps", steps + 2])
    assert codes == [[0], [0]] and f"going on from step {steps:,}" in said[0]


def wait_until_logged(out, running, seconds=60):
    end = time.monotonic() + seconds
    while not any(log.stat().st_size for log in out.glob("metrics.*")):
        assert running() and time.monotonic() < end
        time.sleep(0.05)


# ------------------------------------------------------------------------------- torchrun


def torchrun(folder, command, *options, before=""):
    """The command in two processes, started; `before` are lines that each of them runs first, with its `rank`."""
    script = folder / "script.py"
    script.write_text(f"import os, sys, pathlib, dansm\nfrom scale import trainer\nrank = int(os.environ['RANK'])\n"
                      f"dansm.NETWORKS['small'] = {TINY!r}\n{before}\ndansm.main(sys.argv[1:])\n")
    environment = {**os.environ, "HOME": str(folder), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
                   "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone",
         *map(str, options), str(script), *map(str, command)], text=True,
        env=environment, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)


def said_by(process, seconds=90):
    """What it said until it ended by itself."""
    try:
        return process.communicate(timeout=seconds)[0]
    finally:
        if process.poll() is None:
            process.terminate()  # torchrun takes its processes along


@needs_gloo
def test_ctrl_c_at_torchrun_saves(images, tmp_path):
    out = tmp_path / "out"
    process = torchrun(tmp_path, ["train", images, "--steps", 10**6, "--out", out, *FAST])
    wait_for(lambda: any(log.stat().st_size for log in out.glob("metrics.*")), process)
    os.killpg(process.pid, signal.SIGINT)
    said = said_by(process)
    steps = state_of(out)["training"]["step"]
    assert f"stopped at step {steps:,} of 1,000,000, saved; the same command goes on" in said
    assert json.loads((out / "train.json").read_text())["steps"] == steps == log_of(out)[-1]["step"]


FAILS = """
loss, calls = dansm.RectifiedFlow.loss, []
def failing(*arguments):
    calls.append(1)
    if rank == 1 and len(calls) == {step}:
        {act}
    return loss(*arguments)
dansm.RectifiedFlow.loss = failing
trainer.AGREE = 0
"""


@needs_gloo
def test_a_process_that_fails_ends_all_and_is_heard(images, tmp_path):
    process = torchrun(tmp_path, ["train", images, "--steps", 10**6, "--out", tmp_path / "out", *FAST],
                       before=FAILS.format(step=3, act="raise RuntimeError('the second one fell')"))
    said = said_by(process)
    assert process.returncode not in (0, None) and "RuntimeError: the second one fell" in said


@needs_gloo
def test_torchruns_restart_goes_on_from_the_last_checkpoint_even_of_a_fresh_run(run, images, tmp_path):
    out = tmp_path / "out"
    run("train", images, "--steps", 30, "--out", out, *FAST)  # in the way
    once = "if not pathlib.Path('fell').exists(): pathlib.Path('fell').touch(); os._exit(7)"
    process = torchrun(
        tmp_path, ["train", images, "--steps", 8, "--fresh", "--save-minutes", 0, "--out", out, *FAST],
        "--max-restarts", 1, "--monitor-interval", 0.1, before=FAILS.format(step=5, act=once))
    said = said_by(process)
    assert process.returncode == 0 and (tmp_path / "fell").exists(), said
    assert re.search(r"going on from step [34] of", said), said
    assert checkpoint.newest(out).name == "checkpoint-00000008.pt" and len(state_of(out)["ranks"]) == 2
    assert [line["step"] for line in log_of(out)] == list(range(1, 9))


def test_a_step_through_copies_of_the_weights_is_autocasts_to_the_bit():
    """What one process on a GPU does: all weights to bf16 at once, and all gradients back."""
    def trained(copies):
        torch.manual_seed(0)
        run = FastTraining(dansm.UNet(2, 8, width=8, multipliers=(1, 2), blocks=1, attention_at=(4,)),
                           Recipe("x", batch=4, precision="bf16"), torch.device("cpu"))
        run.compiled = copies
        run.copies, run.compiled = trainer._copies_of_weights(), False
        run.net.train()
        losses = []
        for _ in range(4):
            losses.append(run.gradients(dansm.RectifiedFlow(), *torch.randn(2, 4, 2, 8, 8).unbind()))
            run.update()
        return len(run.copies), torch.stack(losses), [weight.detach() for weight in run.net.parameters()]

    (count, losses, weights), (none, as_autocast, others) = trained(True), trained(False)
    assert count > 20 and none == 0
    assert torch.equal(losses, as_autocast)
    assert all(torch.equal(one, other) for one, other in zip(weights, others, strict=True))
