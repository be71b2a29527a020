"""Every command run for real, on images so small that it takes no time; and what each says of bad input."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
from pathlib import Path

import pytest
import torch
from dansm.scale.base.locks import owning
from dansm.scale.commands.main import main
from dansm.scale.model import checkpoint
from dansm.scale.model import sampling as samples
from dansm.scale.model.recipe import Recipe, load
from dansm.scale.train import fit as trainer
from PIL import Image
from support import FAST, TINY, files_of, log_of, make_images, noise_image, same, state_of, wait_for

import dansm

ROOT = Path(__file__).parents[2]


# ------------------------------------------------------------------------------- train


@pytest.mark.parametrize("flow", dansm.FLOWS)
@pytest.mark.parametrize("method", dansm.METHODS)
def test_train_writes_what_it_says(run, images, tmp_path, flow, method):
    out = tmp_path / "out" / "deep"
    code, said, err = run("train", images, "--flow", flow, "--method", method, "--steps", 4, "--out", out, *FAST)
    assert (code, err) == (0, "")
    names = ["checkpoint-00000004.pt", "metrics.jsonl", "recipe.toml", "samples.png", "train.json"]
    assert files_of(out) == names
    assert all(str(out / name) in said for name in names)
    assert Image.open(out / "samples.png").size == (8 * 34 + 2, 8 * 34 + 2)  # 64 of 16 pixels, each two wide
    described = json.loads((out / "train.json").read_text())
    assert described["data"] == str(images) and described["data_images"] == 24
    assert (described["steps"], described["images"], described["stopped_early"]) == (4, 32, False)
    assert described["hardware"]["device"] == "cpu" and described["parameters"] > 1000
    assert described["unreadable_images"] == 0 and described["this_call"]["images_per_second"] > 0
    assert f"dansm sample {out}\n" in said
    given = dict(flip=True, network="small", flow=flow, method=method, match_size=10, batch=8, steps=4, sample_steps=2)
    recipe = dataclasses.asdict(Recipe(str(images), **given))
    assert described["recipe"] == json.loads(json.dumps(recipe))
    assert load(str(out / "recipe.toml")) == Recipe(str(images), **given)
    (line,) = log_of(out)
    assert (line["step"], line["images"]) == (4, 32)
    assert line["distance"] > 0 and 0.5 < line["loss"] < 5
    assert method == "random" or line["distance"] < 0.995 * line["distance_unmatched"]
    state = state_of(out)
    assert (state["data"], state["training"]["averages"][0]["decay"]) == (str(images), 0.9999)
    assert state["training"]["step"] == 4 and state["recipe"] == recipe and state["images"] == 24
    moved = [w for w in state["training"]["net"].values() if w.ndim > 1]
    assert all(weight.isfinite().all() and weight.any() for weight in moved)


def test_a_run_that_is_refused_leaves_nothing(run, refused, images, tmp_path):
    out = tmp_path / "deep" / "out"
    assert "expected a multiple" in refused("train", images, "--batch", 9, "--accumulate", 2, "--out", out)
    assert not out.exists()
    assert run("train", images, "--steps", 1, "--out", out, *FAST)[0] == 0
    before = files_of(out)
    refused("train", images, "--steps", 2, "--out", out, *FAST, "--batch", 4)
    assert files_of(out) == before


def test_a_run_is_no_data(run, refused, images, tmp_path):
    assert run("train", images, "--steps", 1, "--out", tmp_path / "out", *FAST)[0] == 0
    assert f"expected its recipe, {tmp_path / 'out' / 'recipe.toml'}" in refused("train", tmp_path / "out")


def test_the_log_has_a_line_each_fifty_steps_and_one_for_the_last(run, images, tmp_path):
    run("train", images, "--steps", 103, "--out", tmp_path / "out", *FAST)
    assert [line["step"] for line in log_of(tmp_path / "out")] == [50, 100, 103]


def test_on_a_cpu_it_is_said_which_network_is_made_for_one(run, images, tmp_path, monkeypatch):
    monkeypatch.setitem(dansm.NETWORKS, "ddpm", dansm.NETWORKS["small"])
    options = "train", images, "--steps", 1, "--out", tmp_path / "out", *FAST
    for network, hint in (("small", False), ("ddpm", True)):
        code, said, _ = run(*options, "--network", network, "--fresh")
        assert code == 0 and ("--network small is made for one" in said) == hint


def test_it_is_said_if_the_pool_outlasts_the_training(run, images, tmp_path):
    """What a pool hands out before it is empty is not N(0, I)."""
    for steps, method, told in ((1, "greedy", True), (2, "greedy", False), (1, "nearest", False)):
        out = tmp_path / f"{method}-{steps}"
        said = run("train", images, *FAST, "--steps", steps, "--method", method, "--out", out)[1]
        assert ("the pool of 10 noises outlasts the 8 images of all steps" in said) == told


def test_minutes_stop_a_run_that_has_steps_left(run, images, tmp_path):
    code, _, _ = run("train", images, "--steps", 10**9, "--minutes", 0.002, "--out", tmp_path / "out", *FAST)
    described = json.loads((tmp_path / "out" / "train.json").read_text())
    assert code == 0 and 0 < described["steps"] < 10**6 and described["seconds"] < 60


def test_who_waits_for_all_steps_is_told_by_the_exit_code_that_some_are_left(run, images, tmp_path):
    command = ["train", images, "--out", tmp_path / "out", *FAST]
    code, said, err = run(*command, "--steps", 10**6, "--minutes", 1e-6, "--all-steps")
    assert code == 130 and "not all steps are made, as --all-steps asks for" in err and "stopped at step 1 " in said
    for steps in (3, 2):  # makes them, has made them
        assert run(*command, "--steps", steps, "--all-steps")[::2] == (0, "")


def test_size_trains_on_images_of_unequal_size(run, refused, images, tmp_path):
    noise_image(17, 20).save(images / "other.png")
    said = refused("train", images, "--out", tmp_path / "out", *FAST)
    assert "other.png is 17×20" in said and "00.png is 16×16" in said and "--size" in said
    assert files_of(tmp_path / "out") == []
    code, _, _ = run("train", images, "--size", 8, "--steps", 1, "--out", tmp_path / "out", *FAST)
    assert code == 0 and state_of(tmp_path / "out")["network"]["size"] == 8


# ------------------------------------------------------------------------------- going on


RUNS = [("greedy", "rectified"), ("greedy", "diffusion"), ("random", "rectified"), ("nearest", "rectified")]


@pytest.mark.parametrize(("method", "flow"), RUNS)
def test_a_run_resumed_in_the_middle_is_the_run_that_never_stopped(run, images, tmp_path, method, flow):
    """Weights, optimizer, pool, random numbers and the log, to the last bit; the pool of 10 ends inside batches of 8,
    images are mirrored, and dropout draws random numbers of its own."""
    command = ["train", images, "--method", method, "--flow", flow, "--log-steps", 1, *FAST]
    once, twice = tmp_path / "once", tmp_path / "twice"
    run(*command, "--steps", 12, "--out", once)
    run(*command, "--steps", 5, "--out", twice)
    halfway = state_of(twice)
    code, said, _ = run(*command, "--steps", 12, "--out", twice)
    assert code == 0 and "going on from step 5" in said
    whole, resumed = (state_of(out) for out in (once, twice))
    assert whole.pop("seconds") != resumed.pop("seconds")  # the one thing that may differ
    assert same(whole, resumed) and not same(whole, halfway)
    told = [[(line["step"], line["loss"], line["distance"], line["distance_unmatched"]) for line in log_of(out)]
            for out in (once, twice)]
    assert told[0] == told[1] and [line[0] for line in told[0]] == list(range(1, 13))
    assert (once / "samples.png").read_bytes() == (twice / "samples.png").read_bytes()


def test_a_run_that_is_done_is_left_as_it_is(run, images, tmp_path):
    command = ["train", images, "--out", tmp_path / "out", *FAST]
    run(*command, "--steps", 3)
    before = {name: (tmp_path / "out" / name).read_bytes() for name in files_of(tmp_path / "out")}
    for steps in (3, 2):
        code, said, err = run(*command, "--steps", steps)
        assert (code, err) == (0, "") and "going on" not in said
        assert f"already at step 3 of --steps {steps}: nothing to do; a larger --steps goes on" in said
        assert {name: (tmp_path / "out" / name).read_bytes() for name in files_of(tmp_path / "out")} == before


def test_a_run_that_is_done_gets_the_samples_that_it_lacks(run, images, tmp_path):
    command = ["train", images, "--steps", 2, "--out", tmp_path / "out", *FAST]
    run(*command)
    grid, saved = tmp_path / "out" / "samples.png", checkpoint.newest(tmp_path / "out")
    drawn = grid.read_bytes()
    grid.unlink()
    assert run(*command)[0] == 0 and grid.read_bytes() == drawn
    grid.write_bytes(b"of an earlier checkpoint")
    os.utime(grid, (0, saved.stat().st_mtime - 10))
    assert run(*command)[0] == 0 and grid.read_bytes() == drawn


def test_seconds_are_those_of_all_calls(run, images, tmp_path):
    out, command = tmp_path / "out", ["train", images, "--out", tmp_path / "out", *FAST]
    run(*command, "--steps", 2)
    state = state_of(out)
    assert 0 < state["seconds"] < 60
    checkpoint.save(out, state | {"seconds": 1000.0})
    run(*command, "--steps", 5)
    described = json.loads((out / "train.json").read_text())
    assert 1000 <= described["seconds"] < 1060 and 1000 < log_of(out)[-1]["seconds"] < 1060
    assert described["this_call"]["steps"] == 3 and described["this_call"]["seconds"] < 60
    assert 1000 < state_of(out)["seconds"] < 1060


def test_what_a_failed_fresh_run_left_is_not_taken_for_the_log(run, refused, images, tmp_path):
    out = tmp_path / "out"
    run("train", images, "--steps", 2, "--out", out, *FAST)
    refused("train", images, "--steps", 20, "--lr", 1e30, "--fresh", "--out", out, *FAST)
    assert (out / "metrics.partial").exists()
    run("train", images, "--steps", 5, "--out", out, *FAST)
    assert [line["step"] for line in log_of(out)] == [2, 5] and not (out / "metrics.partial").exists()


def test_fresh_begins_anew(run, images, tmp_path):
    command = ["train", images, "--steps", 2, "--out", tmp_path / "out", *FAST]
    run(*command)
    before = state_of(tmp_path / "out")
    code, said, _ = run(*command, "--fresh", "--seed", 1)
    after = state_of(tmp_path / "out")
    assert code == 0 and "going on" not in said
    assert after["training"]["step"] == 2 and not same(before["training"]["net"], after["training"]["net"])
    assert [line["step"] for line in log_of(tmp_path / "out")] == [2]
    assert len(checkpoint.checkpoints(tmp_path / "out")) == 1


def test_a_fresh_run_of_fewer_steps_leaves_no_checkpoint_of_the_one_before(run, images, tmp_path):
    command = ["train", images, "--save-minutes", 0, "--out", tmp_path / "out", *FAST]
    run(*command, "--steps", 5)
    run(*command, "--steps", 2, "--fresh")
    assert [path.name[-4:] for path in checkpoint.checkpoints(tmp_path / "out")] == ["2.pt", "1.pt"]


def test_lines_that_a_killed_run_wrote_after_its_last_checkpoint_are_dropped(run, images, tmp_path):
    out = tmp_path / "out"
    run("train", images, "--steps", 3, "--out", out, *FAST)
    with open(out / "metrics.jsonl", "a") as log:
        log.write('{"step": 50, "loss": 1.0}\n')
    run("train", images, "--steps", 5, "--out", out, *FAST)
    assert [line["step"] for line in log_of(out)] == [3, 5]


def test_a_line_that_a_kill_cut_in_half_is_dropped_too(run, images, tmp_path):
    out = tmp_path / "out"
    run("train", images, "--steps", 3, "--out", out, *FAST)
    with open(out / "metrics.jsonl", "a") as log:
        log.write('\n\0\0\n{}\n7\n{"step": null}\n{"step": 1, "lo\n{"step": 50, "lo')
    run("train", images, "--steps", 5, "--out", out, *FAST)
    assert [line["step"] for line in log_of(out)] == [3, 5]


CHANGES = [("seed", 0, 1), ("lr", 0.0002, 0.001), ("cost", "squared", "inner"), ("method", "greedy", "random"),
           ("match_size", 10, 11), ("batch", 8, 4), ("flow", "rectified", "diffusion"), ("decay", 0.9999, 0.5),
           ("times", "uniform", "logit-normal"), ("size", 0, 8)]


def test_going_on_with_another_setting_is_refused_naming_both_values(run, refused, images, tmp_path):
    out = tmp_path / "out"
    run("train", images, "--steps", 2, "--out", out, *FAST)
    before = {name: (out / name).read_bytes() for name in files_of(out)}
    for name, old, new in CHANGES:
        option = "--" + name.replace("_", "-")
        said = refused("train", images, "--steps", 4, "--out", out, *FAST, option, new)
        assert f"{name} {old} → {new}" in said and str(checkpoint.newest(out)) in said and "--fresh" in said
    said = refused("train", images, "--steps", 4, "--out", out, *FAST, "--no-flip")
    assert "flip True → False" in said
    assert {name: (out / name).read_bytes() for name in files_of(out)} == before


@pytest.mark.parametrize("attention_at", [(), (8,)])
def test_going_on_with_images_of_another_size_is_refused(run, refused, images, tmp_path, monkeypatch, attention_at):
    monkeypatch.setitem(dansm.NETWORKS, "small", TINY | dict(attention_at=attention_at))
    run("train", images, "--steps", 1, "--out", tmp_path / "out", *FAST)
    smaller = make_images(tmp_path / "smaller", width=8, height=8)
    said = refused("train", smaller, "--steps", 2, "--out", tmp_path / "out", *FAST)
    assert "16" in said and "8" in said


def test_a_full_disk_leaves_the_last_checkpoint_whole_and_is_said_in_one_line(
    run, refused, images, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    run("train", images, "--steps", 2, "--out", out, *FAST)
    before = state_of(out)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "fsync", full)
        said = refused("train", images, "--steps", 4, "--out", out, *FAST)
    assert "checkpoint-00000004.pt" in said and "No space left on device" in said
    assert same(state_of(out), before) and not list(out.glob("*.partial"))
    assert run("train", images, "--steps", 4, "--out", out, *FAST)[0] == 0
    assert state_of(out)["training"]["step"] == 4


def test_ctrl_c_saves_and_the_same_command_goes_on(images, tmp_path, run):
    """In a process of its own, as from a keyboard: the step is finished, all files are written, the exit is clean."""
    out = tmp_path / "out"
    command = ["train", images, "--out", out, "--steps", 10**6, *FAST]
    script = f"import dansm; dansm.NETWORKS['small'] = {TINY!r}; main({list(map(str, command))!r})"
    process = start("-c", script)
    try:
        wait_for(lambda: any(log.stat().st_size for log in out.glob("metrics.*")), process)  # .partial until saved
        process.send_signal(signal.SIGINT)
        said, err = process.communicate(timeout=60)
    finally:
        process.kill()  # a test that fails leaves nothing running
    assert (process.returncode, err) == (0, "")
    stopped = json.loads((out / "train.json").read_text())
    steps = stopped["steps"]
    assert stopped["stopped_early"]
    assert f"stopped at step {steps:,} of 1,000,000, saved; the same command goes on" in said
    assert f"dansm sample {out}\n" in said
    names = [f"checkpoint-{steps:08d}.pt", "metrics.jsonl", "recipe.toml", "train.json"]
    assert files_of(out) == names  # images take long: who stops does not wait
    assert log_of(out)[-1]["step"] == steps == state_of(out)["training"]["step"] < 10**6
    code, said, _ = run("train", images, "--out", out, "--steps", steps + 2, *FAST)
    assert code == 0 and f"going on from step {steps:,}" in said
    assert state_of(out)["training"]["step"] == steps + 2


def test_a_second_ctrl_c_stops_at_once_with_exit_code_130_and_what_was_saved(run, images, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(samples, "sample_images", stop)  # the grid of samples comes after the last save
    code, _, err = run("train", images, "--out", tmp_path / "out", "--steps", 2, *FAST)
    assert (code, err) == (130, f"dansm: stopped; the run is saved in {checkpoint.newest(tmp_path / 'out')}\n")
    assert json.loads((tmp_path / "out" / "train.json").read_text())["steps"] == 2
    assert state_of(tmp_path / "out")["training"]["step"] == 2


def test_ctrl_c_is_answered_before_the_step_ends():
    said = []
    with trainer.Interrupt(lambda: said.append("stopping")) as interrupt:
        assert not interrupt
        signal.raise_signal(signal.SIGINT)
        assert interrupt and said == ["stopping"]


def test_a_command_that_is_stopped_says_so(run, monkeypatch):
    def stop(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(dansm, "pick_device", stop)
    assert run("bench", "match") == (130, "", "dansm: stopped\n")


def start(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, *map(str, arguments)], text=True, env=environment,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


# ------------------------------------------------------------------------------- bench, toy, digits


def test_bench_measures_each_way_at_each_match_size(run, tmp_path):
    command = ["bench", "match", "--batch", 8, "--match-size", "16,40", "--shape", "1x4x4"]
    code, said, err = run(*command, "--out", tmp_path / "out")
    assert (code, err) == (0, "")
    assert files_of(tmp_path / "out") == ["match.csv", "match.json", "match.png"]
    assert all(str(tmp_path / "out" / name) in said for name in files_of(tmp_path / "out"))
    described = json.loads((tmp_path / "out" / "match.json").read_text())
    assert (described["batch"], described["shape"]) == (8, [1, 4, 4]) and described["hardware"]["device"] == "cpu"
    assert described["train_step"] is None  # the paper's network halves its images three times
    ways = ["ours, squared", "ours, inner", "bare product", "paper's loop", "nearest of k", "scipy, assignment"]
    found = {(row["match_size"], row["way"]): row for row in described["rows"]}
    assert {(match_size, way) for match_size in (16, 40) for way in ways} <= found.keys()  # POT, where it is installed
    for row in described["rows"]:
        assert 0 < row["least_ms"] <= row["median_ms"] <= row["most_ms"] and row["calls"] >= 1
    ours, loop = found[40, "ours, squared"], found[40, "paper's loop"]
    assert ours["calls"] == 5 and ours["pool_mb"] == round(48 * 16 * 4 / 1e6, 1)
    faster = loop["median_ms"] / ours["full_ms"]
    assert ours["times_faster_than_the_paper"] == pytest.approx(faster, rel=0.01, abs=0.051)
    lines = (tmp_path / "out" / "match.csv").read_text().splitlines()
    assert len(lines) == 1 + len(described["rows"]) and lines[0].startswith("match_size,way,median_ms")
    assert Image.open(tmp_path / "out" / "match.png").width > 100


def test_bench_leaves_out_what_would_take_too_long(run, tmp_path, monkeypatch):
    monkeypatch.setattr("scale.bench.PATIENCE", 1e-9)
    command = ["bench", "match", "--batch", 8, "--match-size", 16, "--match-size", 40, "--shape", "1x4x4"]
    run(*command, "--out", tmp_path)
    rows = json.loads((tmp_path / "match.json").read_text())["rows"]
    assert {row["match_size"] for row in rows} == {16}


def test_bench_refuses_a_pool_that_does_not_fit_before_it_measures(run, tmp_path):
    code, _, err = run("bench", "match", "--match-size", 10**10, "--shape", "4x8x8", "--out", tmp_path)
    assert code == 2 and "match_size is 10,000,000,000: the pool needs" in err and files_of(tmp_path) == []


def test_bench_of_a_spread_pool(run, tmp_path, monkeypatch):
    """A group of one: the whole way, which several ranks take in tests/test_spread.py."""
    command = ["bench", "spread", "--batch", 8, "--match-size", 16, "--shape", "1x4x4", "--out", tmp_path]
    code, _, err = run(*command)
    assert code == 2 and "torchrun" in err
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}.items():
        monkeypatch.setenv(name, str(value))
    code, said, err = run(*command)
    assert (code, err) == (0, "") and "spread.json" in said
    (row,) = json.loads((tmp_path / "spread.json").read_text())["rows"]
    assert row["other_than_one_process"] == 0 and row["samples_compared"] == 16


def test_the_loop_of_the_bench_is_the_papers():
    from dansm.scale.bench.match import paper_loop

    x, z = torch.randn(6, 1, 3), torch.randn(20, 1, 3)
    for cost in dansm.COSTS:
        assert torch.equal(paper_loop(x, z, cost), dansm.greedy(dansm.cost_matrix(x, z, cost)))


def test_toy_runs(run, tmp_path, monkeypatch):
    monkeypatch.setattr("tiny.toy.POINTS", 200)  # W2² between a thousand takes seconds
    out = tmp_path / "out"
    code, said, err = run("toy", "--shape", "two-moons", "--steps", 2, "--seeds", 1, "--match-size", 8, "--out", out)
    assert (code, err) == (0, "")
    assert files_of(out) == ["flow.gif", "pairs.png", "paths.png", "results.csv", "samples.png", "toy.json"]
    assert all(name in said for name in files_of(out)) and str(out) in said.replace("\n", "")
    assert json.loads((out / "toy.json").read_text())["shape"] == "two-moons"
    assert all(Image.open(out / name).width > 100 for name in files_of(out) if name.endswith(("png", "gif")))


def test_digits_runs(run, tmp_path, monkeypatch):
    from dansm.tiny import digits

    few = digits.load_digits()[:100]
    monkeypatch.setattr(digits, "load_digits", lambda: few)
    out = tmp_path / "out"
    code, said, err = run("digits", "--steps", 2, "--seeds", 1, "--match-size", 70, "--device", "cpu", "--out", out)
    assert (code, err) == (0, "")
    assert files_of(out) == ["digits.json", "digits.png"]
    assert all(str(out / name) in said for name in files_of(out))
    described = json.loads((out / "digits.json").read_text())
    assert (described["steps"], described["match_size"]) == (2, 70)
    assert [run["method"] for run in described["runs"]] == ["random", "greedy"]
    assert described["runs"][1]["path_length"] < described["runs"][0]["path_length"]
    assert all(value > described["real_half_against_half"] for run in described["runs"]
               for value in run["distance"].values())
    assert Image.open(out / "digits.png").width > 500


def test_digits_judged_on_the_way_are_trained_alike(run, refused, tmp_path, monkeypatch):
    from dansm.tiny import digits

    few = digits.load_digits()[:100]
    monkeypatch.setattr(digits, "load_digits", lambda: few)
    options = "digits", "--seeds", 1, "--match-size", 70, "--device", "cpu"
    found = {}
    for name, more in (("whole", (4, "--judge-at", "2,4,1")), ("two", (2,)), ("four", (4,))):
        assert run(*options, "--steps", *more, "--out", tmp_path / name)[0] == 0
        runs = json.loads((tmp_path / name / "digits.json").read_text())["runs"]
        found[name] = {(run["method"], run["trained_steps"]): run["distance"] for run in runs}
    assert found["whole"].keys() == {(way, step) for way in ("random", "greedy") for step in (1, 2, 4)}
    assert found["two"].items() <= found["whole"].items() and found["four"].items() <= found["whole"].items()
    assert files_of(tmp_path / "whole") == ["curve.png", "digits.json", "digits.png"]
    assert "--judge-at is '2,x'" in refused(*options, "--judge-at", "2,x")
    assert "--judge-at is 9: expected at most --steps, 4" in refused(*options, "--steps", 4, "--judge-at", "9,1")
    assert "'--match-size': expected greater than or equal to 2" in refused(*options[:-4], "--match-size", 1)
    assert run(*options, "--steps", 4, "--out", tmp_path / "whole")[0] == 0
    assert files_of(tmp_path / "whole") == ["digits.json", "digits.png"]  # the curve was of the call before


def test_digits_that_are_stopped_say_what_is_kept(run, tmp_path, monkeypatch):
    from dansm.tiny import digits

    few, draw = digits.load_digits()[:100], digits.draw_samples
    monkeypatch.setattr(digits, "load_digits", lambda: few)

    def stopped(net, count, steps, seed, device):
        if seed == stop_at:
            raise KeyboardInterrupt
        return draw(net, count, steps, seed, device)

    monkeypatch.setattr(digits, "draw_samples", stopped)
    options = "digits", "--steps", 1, "--seeds", 2, "--match-size", 70, "--device", "cpu", "--out", tmp_path / "out"
    stop_at = 0
    code, said, err = run(*options)
    assert (code, err) == (130, "dansm: stopped before the first seed was done, nothing is kept\n")
    stop_at = 1
    code, said, err = run(*options)
    assert (code, err) == (130, f"dansm: stopped: 1 of 2 seeds in {tmp_path / 'out' / 'digits.json'}\n")
    assert "random, seed 0: trained\ngreedy, seed 0: trained\n" in said
    assert len(json.loads((tmp_path / "out" / "digits.json").read_text())["runs"]) == 2


def test_digits_in_batches_of_one_and_assigned_within_batches(run, tmp_path, monkeypatch):
    """In a batch of one nothing can be assigned: the paths are those of random pairs, where the pool's are shorter."""
    from dansm.tiny import digits

    few = digits.load_digits()[:100]
    monkeypatch.setattr(digits, "load_digits", lambda: few)
    options = "digits", "--assigned", "--seeds", 1, "--match-size", 70, "--device", "cpu", "--steps", 40
    lengths = {}
    for batch in (1, 16):
        assert run(*options, "--batch", batch, "--judge-at", 20, "--out", tmp_path / f"{batch}")[0] == 0
        described = json.loads((tmp_path / f"{batch}" / "digits.json").read_text())
        assert (described["batch"], described["ways"]) == (batch, ["random", "optimal", "greedy"])
        lengths[batch] = {run["method"]: run["path_length"] for run in described["runs"] if run["trained_steps"] == 40}
    assert lengths[1]["optimal"] == pytest.approx(lengths[1]["random"], rel=0.03)
    assert lengths[1]["greedy"] < 0.98 * lengths[1]["random"]
    assert max(lengths[16]["optimal"], lengths[16]["greedy"]) < 0.97 * lengths[16]["random"]


def test_digits_of_pools_side_by_side(run, refused, tmp_path, monkeypatch):
    from dansm.tiny import digits

    few = digits.load_digits()[:100]
    monkeypatch.setattr(digits, "load_digits", lambda: few)
    options = "digits", "--seeds", 1, "--match-size", 70, "--device", "cpu", "--steps", 30, "--judge-at", 10
    out = tmp_path / "out"
    assert run(*options, "--ages", 3, "--out", out)[0] == 0
    assert files_of(out) == ["curve.png", "digits.json", "digits.png"]
    described = json.loads((out / "digits.json").read_text())
    assert (described["ages"], described["ways"]) == (3, ["random", "greedy", "ages"])
    one, side = ([run for run in described["runs"] if run["method"] == way and run["trained_steps"] == 30]
                 for way in ("greedy", "ages"))
    assert side[0]["distance"] != one[0]["distance"]
    assert side[0]["path_length"] == pytest.approx(one[0]["path_length"], rel=0.02)
    z = next(iter(digits.paired(few, "ages", 70, 64, 3, 5)))[1]
    pool = SideBySide(3, 70, (1, 8, 8), seed=5)
    assert torch.equal(z, pool(next(digits.batches(few, 64, 5))))
    assert "--ages is 71: expected at most --match-size, 70" in refused(*options, "--ages", 71, "--out", out)


# ------------------------------------------------------------------------------- help, and as a script

OPTIONS = {
    "toy": ["--shape", "--match-size", "--steps", "--seeds", "--seed", "--device", "--out"],
    "digits": ["--match-size", "--steps", "--batch", "--assigned", "--ages", "--judge-at", "--seeds", "--seed",
               "--device", "--out"],
    "train": ["--network", "--flow", "--method", "--match-size", "--cost", "--batch", "--steps", "--minutes",
              "--save-minutes", "--lr", "--decay", "--no-flip", "--size", "--skip-unreadable", "--fresh", "--seed",
              "--device", "--out"],
    "export": ["--average", "--out"],
    "sample": ["--count", "--steps", "--solver", "--batch", "--files", "--seed", "--device", "--out"],
    "bench match": ["--match-size", "--batch", "--shape", "--seed", "--device", "--out"],
    "bench spread": ["--match-size", "--batch", "--shape", "--seed", "--device", "--out"],
    "bench train": ["--network", "--batch", "--shape", "--match-size", "--samples", "--first-step", "--seed",
                    "--device", "--out"],
    "bench evaluate": ["--samples", "--seed", "--device", "--out"],
    "bench autoencoder": ["--shape", "--samples", "--seed", "--device", "--out"],
    "compare": ["--count", "--shown", "--steps", "--label", "--batch", "--precision", "--seed", "--device", "--out"],
    "grid": ["--steps", "--side", "--label", "--batch", "--precision", "--seed", "--device", "--out"],
    "tsne": ["--data", "--size", "--pairs", "--draws", "--perplexity", "--match-size", "--steps", "--label", "--seed",
             "--device", "--out"],
    "paths": ["--data", "--size", "--match-size", "--count", "--steps", "--seeds", "--label", "--seed", "--device",
              "--out"],
    "loss": ["--data", "--size", "--match-size", "--count", "--steps", "--label", "--seed", "--device", "--out"],
}


@pytest.mark.parametrize("command", OPTIONS)
def test_help_names_the_options(run, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "200")
    code, said, err = run(*command.split(), "--help")
    assert (code, err) == (0, "")
    assert [option for option in OPTIONS[command] if option not in said] == []


def test_help_names_the_commands_and_no_command_is_help(run):
    code, said, err = run("--help")
    assert (code, err) == (0, "")
    names = {command.partition(" ")[0] for command in OPTIONS}
    assert [name for name in names if f" {name} " not in said] == []
    code, out, err = run()
    assert code == 2 and all(f" {name} " in out + err for name in names)


def test_bench_alone_names_its_kinds(run):
    code, out, err = run("bench")
    kinds = [command.partition(" ")[2] for command in OPTIONS if command.startswith("bench ")]
    assert code == 2 and all(f" {kind} " in out + err for kind in kinds) and len(kinds) == 5


def test_help_is_quick_nothing_heavy_is_imported_for_it(tmp_path):
    script = """if True:
        import sys, dansm
        try:
            main(["--help"])
        except SystemExit as ended:
            heavy = ["torchvision", "matplotlib", "sklearn", "scipy.optimize", "PIL", "scale", "tiny"]
            print("exit", ended.code, [name for name in heavy if name in sys.modules])
    """
    out, err = start("-c", script).communicate(timeout=60)
    assert (out.splitlines()[-1], err) == ("exit 0 []", "")


def test_as_a_script_it_gives_the_same_line(refused, tmp_path):
    """The script is another module than `dansm`: its BadInput must be the same class."""
    here = refused("sample", "missing.pt", "--device", "cpu")
    process = start(ROOT / "dansm.py", "sample", "missing.pt", "--device", "cpu")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (2, "", here)


# ------------------------------------------------------------------------------- bad options

BAD_OPTIONS = [
    (("train", "x", "--match-size", "-1"), "--match-size", "-1"),
    (("train", "x", "--match-size", "2.5"), "--match-size", "2.5"),
    (("train", "x", "--match-size", "many"), "--match-size", "many"),
    (("train", "x", "--method", "hungarian"), "--method", "hungarian"),
    (("train", "x", "--flow", "curved"), "--flow", "curved"),
    (("train", "x", "--network", "vit"), "--network", "vit"),
    (("train", "x", "--cost", "euclid"), "--cost", "euclid"),
    (("train", "x", "--times", "cosine"), "--times", "cosine"),
    (("train", "x", "--steps", "0"), "--steps", "0"),
    (("train", "x", "--batch", "0"), "--batch", "0"),
    (("train", "x", "--seed", "-1"), "--seed", "-1"),
    (("train", "x", "--size", "-1"), "--size", "-1"),
    (("train", "x", "--lr", "0"), "--lr", "0"),
    (("train", "x", "--lr", "nan"), "--lr", "nan"),
    (("train", "x", "--decay", "1.5"), "--decay", "1.5"),
    (("train", "x", "--minutes", "-1"), "--minutes", "-1"),
    (("train", "x", "--device", "tpu"), "--device", "tpu"),
    (("train", "x", "--colour", "red"), "--colour", ""),
    (("train",), "RECIPE", ""),
    (("sample", "x", "--count", "0"), "--count", "0"),
    (("sample", "x", "--steps", "0"), "--steps", "0"),
    (("sample", "x", "--solver", "rk4"), "--solver", "rk4"),
    (("bench", "match", "--match-size", "1"), "--match-size", "1"),
    (("bench", "sample"), "sample", "match, spread, train, evaluate, autoencoder"),
    (("bench", "evaluate", "--batch", "4"), "--batch", ""),
    (("bench", "match", "--shape", "4xfoo"), "--shape", "4xfoo"),
    (("bench", "match", "--shape", "4x0"), "--shape", "4x0"),
    (("bench", "match", "--shape", ""), "--shape", "''"),
    (("toy", "--steps", "0"), "--steps", "0"),
    (("toy", "--seeds", "-2"), "--seeds", "-2"),
    (("digits", "--match-size", "-1"), "--match-size", "-1"),
    (("toys",), "toys", "expected one of"),
]


@pytest.mark.parametrize(("command", "option", "value"), BAD_OPTIONS)
def test_a_bad_option_is_named_with_its_value_and_nothing_is_written(refused, tmp_path, command, option, value):
    said = refused(*command)
    assert option in said and value in said
    assert [name for name in files_of(tmp_path) if (tmp_path / name).is_file()] == []


WORDS = [
    (("train", "x", "--method", "magic"), "--method.*magic.*nearest$"),
    (("train", "x", "--match-size", "1.5"), "--match-size.*(whole number|integer)"),
    (("train",), "'?RECIPE'?: expected a recipe.*a folder of images .*cifar10"),
    (("sample",), "'?model'?: expected the folder of a dansm train, one of its checkpoints, or an export"),
]


@pytest.mark.parametrize(("command", "words"), WORDS)
def test_what_typer_says_is_said_once_and_with_what_is_expected(refused, command, words):
    """Loosely, as its words change with its versions."""
    said = refused(*command)
    assert re.search(words, said, re.IGNORECASE) and "unable to parse" not in said
    assert len(command) < 4 or said.count(command[-1]) == 1


MEMORY = [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has …"), "allocate 2.00 GiB"),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried to allocate "
                  "4000 bytes. Error code 12"), "tried to allocate 4000 bytes"),
    (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."), "allocate 8 bytes"),
    (RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"), "MPS allocated: 1 GB"),
    (MemoryError(), "more memory than there is"),
]


@pytest.mark.parametrize(("error", "words"), MEMORY)
def test_memory_that_is_not_there_is_one_line(refused, monkeypatch, error, words):
    def fail(_):
        raise error

    monkeypatch.setattr(dansm, "pick_device", fail)
    said = refused("bench", "match")
    assert "this needs more memory than there is" in said and words in said and "GPU 0" not in said


def test_another_error_of_torch_is_not_hidden(monkeypatch):
    def fail(_):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(dansm, "pick_device", fail)
    with pytest.raises(RuntimeError, match="mat1"):
        main(["bench", "match"])


@pytest.mark.parametrize("command", [("toy",), ("digits",), ("train", "x"), ("bench", "match")])
def test_a_gpu_that_is_not_there_is_refused_naming_what_is(refused, tmp_path, monkeypatch, command):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = refused(*command, "--device", "cuda", "--out", tmp_path / "out")
    assert "--device is cuda" in said and re.search(r"expected one of auto, cpu\b", said)
    assert files_of(tmp_path) == []


@pytest.mark.parametrize("shape", ["circle", "two moons", ""])
def test_a_shape_of_toy_that_is_not_there_lists_those_that_are(refused, tmp_path, shape):
    said = refused("toy", "--shape", shape, "--out", tmp_path / "out")
    assert f"shape is {shape!r}" in said and "eight-gaussians, two-moons" in said and "all" in said
    assert files_of(tmp_path / "out") == []


def test_a_shape_of_toy_is_named_as_the_option_it_is(refused, tmp_path):
    assert "--shape is" in refused("toy", "--shape", "circle", "--out", tmp_path / "out")


def test_toy_takes_the_match_size_0_that_its_help_offers(run, tmp_path, monkeypatch):
    monkeypatch.setattr("tiny.toy.POINTS", 50)
    monkeypatch.setattr("tiny.toy.draw", lambda *_: None)  # pictures take seconds and are tested above
    code, _, _ = run("toy", "--match-size", 0, "--steps", 1, "--seeds", 1, "--out", tmp_path / "out")
    trainings = json.loads((tmp_path / "out" / "toy.json").read_text())["trainings"]
    assert code == 0 and [training["match_size"] for training in trainings] == [1] * len(dansm.METHODS)


OUTS = [("toy", "--steps", 1), ("digits", "--steps", 1), ("train", "images"), ("bench", "match")]


@pytest.mark.parametrize("command", OUTS)
@pytest.mark.parametrize("out", ["file", "file/below", "file/below/deep"])
def test_an_out_that_is_or_lies_below_a_file_is_refused(refused, images, tmp_path, command, out):
    (tmp_path / "file").write_text("precious")
    said = refused(*command, "--out", tmp_path / out)
    assert f"--out is {tmp_path / out}: {tmp_path / 'file'} is a file, expected a folder" in said
    assert (tmp_path / "file").read_text() == "precious"


def test_an_out_that_may_not_be_written_into_is_refused(refused, images, tmp_path, monkeypatch):
    def denied(self, *_, **__):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "touch", denied)
    said = refused("train", images, "--out", tmp_path / "out", *FAST)
    assert f"--out is {tmp_path / 'out'}: not writable (Permission denied)" in said


# ------------------------------------------------------------------------------- bad images


def bad_data(tmp_path):
    """(what is given, what must be said of it)."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a")
    (tmp_path / "file.png").write_bytes(b"")
    return [("missing", "missing does not exist"), ("empty", "empty holds no images"), ("texts", ".png"),
            ("file.png", "file.png is a file: expected a folder")]


def test_what_is_no_folder_of_images_is_refused_by_name(refused, tmp_path):
    for name, expected in bad_data(tmp_path):
        said = refused("train", tmp_path / name, "--out", tmp_path / "out", *FAST)
        assert expected in said and str(tmp_path / name) in said
    assert files_of(tmp_path / "out") == []


def test_an_out_inside_the_images_is_refused(refused, images, tmp_path, monkeypatch):
    before = files_of(images)
    for out in (images, images / "run", images / "deep" / ".." / "run", "run"):
        monkeypatch.chdir(images)
        said = refused("train", images, "--steps", 1, "--out", out, *FAST)
        assert f"--out is {out}, inside {images}" in said and files_of(images) == before


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
    assert f"{images / 'private'} cannot be read: Permission denied" in said
    assert files_of(tmp_path / "out") == []


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_locked_folder_is_refused_by_name(refused, images, tmp_path):
    images.chmod(0)
    try:
        assert f"{images} cannot be read" in refused("train", images, "--out", tmp_path / "out", *FAST)
    finally:
        images.chmod(0o755)


def break_image(path, how):
    whole = noise_image(16, 16)
    if how == "truncated JPEG":
        whole.save(path, "JPEG", quality=95)
        path.write_bytes(path.read_bytes()[:-300])
    elif how == "truncated PNG":
        whole.save(path, "PNG")
        path.write_bytes(path.read_bytes()[:-300])
    elif how == "link to nothing":
        path.symlink_to("nowhere")
    else:
        path.write_bytes(b"" if how == "empty" else b"a text")


@pytest.mark.parametrize("how", ["truncated JPEG", "truncated PNG", "text", "empty", "link to nothing"])
def test_one_unreadable_image_among_many_is_named_or_left_out(run, refused, images, tmp_path, how):
    name = "bad.jpg" if "JPEG" in how else "bad.png"
    break_image(images / name, how)
    command = ["train", images, "--steps", 1, "--out", tmp_path / "out", *FAST]
    said = refused(*command)
    assert str(images / name) in said and "--skip-unreadable" in said
    assert files_of(tmp_path / "out") == []
    code, said, _ = run(*command, "--skip-unreadable")
    assert code == 0 and f"left out 1 of 25 images, not readable: {images / name}\n" in said
    described = json.loads((tmp_path / "out" / "train.json").read_text())
    assert (described["data_images"], described["unreadable_images"]) == (24, 1)


def test_of_many_unreadable_images_three_are_named(run, images, tmp_path):
    for i in range(5):
        (images / f"bad{i}.png").write_text("a text")
    _, said, _ = run("train", images, "--steps", 1, "--skip-unreadable", "--out", tmp_path / "out", *FAST)
    assert "left out 5 of 29 images" in said and f"{images / 'bad2.png'}, …" in said and "bad3.png" not in said


def test_a_size_that_the_network_cannot_halve_is_refused(refused, images, tmp_path, monkeypatch):
    monkeypatch.setitem(dansm.NETWORKS, "small", TINY | dict(multipliers=(1, 1, 1)))
    said = refused("train", images, "--size", 18, "--out", tmp_path / "out", *FAST)
    assert "18 pixels" in said and "multiple of 4" in said and "--size" in said
    assert files_of(tmp_path / "out") == []


def test_images_that_are_not_square_are_refused(refused, tmp_path, monkeypatch):
    monkeypatch.setitem(dansm.NETWORKS, "small", TINY | dict(multipliers=(1, 1)))
    wide = make_images(tmp_path / "wide", width=17, height=16)
    said = refused("train", wide, "--steps", 1, "--out", tmp_path / "out", *FAST)
    assert "17" in said and "--size" in said


def test_cifar10_without_a_network_is_refused(refused, tmp_path, monkeypatch):
    from torchvision.datasets import cifar

    def no_network(*_, **__):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(cifar, "download_and_extract_archive", no_network)
    said = refused("train", "cifar10", "--out", tmp_path / "out", *FAST)
    assert "CIFAR-10" in said and "Name or service not known" in said and "folder of images" in said
    assert files_of(tmp_path / "out") == []


# ------------------------------------------------------------------------------- bad checkpoints, bad training


def change(path, *keys, to):
    """The checkpoint in `path` with one part replaced."""
    state = part = checkpoint.load(path)
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = to
    checkpoint.write(path, state)


WRONG_PARTS = [(("network",), "x"), (("network",), {}), (("network", "colour"), 3), (("network", "width"), 3),
               (("network", "width"), "x"), (("recipe",), {}), (("recipe",), [1]), (("training",), {}),
               (("training", "averages"), {}), (("training", "averages"), []), (("training", "averages"), [3]),
               (("training", "averages", 0, "weights"), {}), (("training", "averages", 0, "decay"), None),
               (("training", "step"), None), (("ranks",), []), (("ranks",), 3)]


WRONG_PARTS += [(("training", "optimizer"), {}), (("training", "net"), {}), (("ranks", 0), {}), (("seconds",), "x"),
                (("ranks", 0, "pool"), {}), (("ranks", 0, "pool", "index"), 3), (("ranks", 0, "pool", "made_for"), 3),
                (("ranks", 0, "random"), {}), (("ranks", 0, "random", "cpu"), 3)]


@pytest.mark.parametrize(("keys", "to"), WRONG_PARTS)
def test_a_checkpoint_with_wrong_parts_is_not_gone_on_from(refused, run, images, tmp_path, keys, to):
    out = tmp_path / "out"
    run("train", images, "--steps", 1, "--out", out, *FAST)
    change(checkpoint.newest(out), *keys, to=to)
    before = {name: (out / name).read_bytes() for name in files_of(out)}
    assert str(checkpoint.newest(out)) in refused("train", images, "--steps", 2, "--out", out, *FAST)
    assert {name: (out / name).read_bytes() for name in files_of(out)} == before


def test_going_on_on_another_kind_of_device_is_refused(refused, run, images, tmp_path):
    out = tmp_path / "out"
    run("train", images, "--steps", 1, "--out", out, *FAST)
    saved = checkpoint.newest(out)
    change(saved, "ranks", 0, "pool", "made_for", "device", to="cuda")
    change(saved, "ranks", 0, "pool", "generator", to=torch.zeros(16, dtype=torch.uint8))  # as CUDA's is
    said = refused("train", images, "--steps", 2, "--out", out, *FAST)
    assert f"{saved} was not begun on --device cpu" in said and "the kind of device" in said


def test_a_damaged_checkpoint_is_named_and_the_run_goes_on_from_the_one_before_it(run, images, tmp_path):
    """And comes to the same end, bit for bit, as if nothing had been damaged."""
    once, twice = tmp_path / "once", tmp_path / "twice"
    command = ["train", images, *FAST]
    run(*command, "--steps", 6, "--out", once)
    run(*command, "--steps", 4, "--save-minutes", 0, "--out", twice)
    assert [path.name for path in checkpoint.checkpoints(twice)] == [f"checkpoint-0000000{i}.pt" for i in (4, 3, 2)]
    damaged = checkpoint.newest(twice)
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    code, said, err = run(*command, "--steps", 6, "--out", twice)
    assert (code, err) == (0, "") and f"going on from step 3 of {twice / 'checkpoint-00000003.pt'}" in said
    assert f"{damaged} cannot be used: its checksum is another" in said
    whole, resumed = state_of(once), state_of(twice)
    assert whole.pop("seconds") and resumed.pop("seconds") and same(whole, resumed)
    assert not damaged.exists()


def test_a_second_run_into_a_folder_is_refused_and_changes_nothing(run, refused, images, tmp_path):
    out, command = tmp_path / "out", ["train", images, "--out", tmp_path / "out", *FAST]
    run(*command, "--steps", 2)
    before = {name: (out / name).read_bytes() for name in files_of(out)}
    with owning(out):
        for option in ((), ("--fresh",)):
            said = refused(*command, "--steps", 4, *option)
            assert str(out) in said and f"process {os.getpid()} on " in said
    assert {name: (out / name).read_bytes() for name in files_of(out)} == before
    assert run(*command, "--steps", 4)[0] == 0  # a command that failed holds no lock either
    refused(*command, "--steps", 5, "--lr", 1)
    assert run(*command, "--steps", 5)[0] == 0


def test_going_on_from_a_damaged_checkpoint_is_refused_and_leaves_it(refused, run, images, tmp_path):
    out = tmp_path / "out"
    run("train", images, "--steps", 1, "--out", out, *FAST)
    saved = checkpoint.newest(out)
    saved.write_bytes(saved.read_bytes()[:1000])
    before = {name: (out / name).read_bytes() for name in files_of(out)}
    assert str(saved) in refused("train", images, "--steps", 2, "--out", out, *FAST)
    assert {name: (out / name).read_bytes() for name in files_of(out)} == before


def test_a_grid_of_one_step_is_refused_before_a_diffusion_is_trained(refused, images, tmp_path):
    command = ["train", images, "--flow", "diffusion", "--steps", 1, "--out", tmp_path / "out", *FAST]
    for steps in (1, 1001):
        assert f"--sample-steps is {steps}: expected 2 to 1,000" in refused(*command, "--sample-steps", steps)
    assert files_of(tmp_path / "out") == []


def test_a_learning_rate_that_makes_the_loss_nan_is_named_and_the_old_checkpoint_untouched(
    refused, run, images, tmp_path
):
    out = tmp_path / "out"
    run("train", images, "--steps", 2, "--out", out, *FAST)
    before = checkpoint.newest(out).read_bytes()
    said = refused("train", images, "--steps", 20, "--lr", 1e30, "--fresh", "--out", out, *FAST)
    assert "--lr is 1e+30" in said and "smaller" in said and "untouched" in said
    assert checkpoint.newest(out).read_bytes() == before


@pytest.mark.parametrize("lr", ["inf", "1e39"])
def test_no_checkpoint_of_infinite_weights_is_saved_after_the_last_step(refused, images, tmp_path, lr):
    assert "--lr" in refused("train", images, *FAST, "--steps", 1, "--lr", lr, "--out", tmp_path / "out")


def test_a_pool_that_no_memory_holds_is_refused(refused, images, tmp_path):
    said = refused("train", images, *FAST, "--steps", 1, "--match-size", 10**13, "--out", tmp_path / "out")
    assert "match_size" in said.replace("-", "_")


def test_no_checkpoint_of_nan_is_saved_between_two_lines_of_the_log(refused, images, tmp_path):
    refused("train", images, "--steps", 20, "--lr", 1e30, "--save-minutes", 0, "--out", tmp_path / "out", *FAST)
    saved = checkpoint.checkpoints(tmp_path / "out")
    assert saved
    for each in saved:
        assert all(weight.isfinite().all() for weight in checkpoint.load(each)["training"]["net"].values())


def test_fresh_keeps_the_log_as_long_as_the_checkpoint_it_belongs_to(refused, run, images, tmp_path):
    out = tmp_path / "out"
    run("train", images, "--steps", 2, "--out", out, *FAST)
    refused("train", images, "--steps", 20, "--lr", 1e30, "--fresh", "--out", out, *FAST)
    assert [line["step"] for line in log_of(out)] == [2]


def test_going_on_with_another_folder_is_refused(run, refused, images, tmp_path):
    run("train", images, "--steps", 1, "--out", tmp_path / "out", *FAST)
    fewer = make_images(tmp_path / "fewer", count=5)
    assert "images 24 → 5" in refused("train", fewer, "--steps", 2, "--out", tmp_path / "out", *FAST)


def test_going_on_with_other_images_of_the_same_names_is_refused(run, refused, images, tmp_path):
    run("train", images, "--steps", 1, "--out", tmp_path / "out", *FAST)
    for path in images.iterdir():
        Image.new("RGB", (16, 16)).save(path)
    said = refused("train", images, "--steps", 2, "--out", tmp_path / "out", *FAST)
    assert "as many images, but not the same ones" in said


def test_a_run_goes_on_where_its_images_have_moved(run, refused, images, tmp_path):
    out, moved = tmp_path / "out", tmp_path / "elsewhere"
    run("train", images, "--steps", 1, "--out", out, *FAST)
    images.rename(moved)
    assert run("train", moved, "--steps", 2, "--out", out, *FAST)[0] == 0
    saved = checkpoint.newest(out)
    assert saved.name == "checkpoint-00000002.pt"
    change(saved, "look", to=None)  # of a run begun before it was kept: the name is all there is
    images.parent.mkdir(exist_ok=True)
    moved.rename(images)
    assert f"data {moved} → {images}" in refused("train", images, "--steps", 3, "--out", out, *FAST)


def test_random_pairs_need_no_room_for_a_pool_and_go_on_from_one(run, images, tmp_path):
    """Once they saved a whole pool, of which they used the generator alone."""
    out, command = tmp_path / "out", ["train", images, "--method", "random", *FAST]
    assert run(*command, "--match-size", 10**11, "--steps", 1, "--out", tmp_path / "large")[0] == 0
    run(*command, "--steps", 4, "--out", tmp_path / "whole")
    run(*command, "--steps", 2, "--out", out)
    made_for = state_of(out)["ranks"][0]["pool"]["made_for"]
    assert made_for["match_size"] == 0
    change(checkpoint.newest(out), "ranks", 0, "pool", "made_for", "match_size", to=10)
    assert run(*command, "--steps", 4, "--out", out)[0] == 0
    assert same(state_of(out)["training"], state_of(tmp_path / "whole")["training"])


def test_an_empty_name_is_no_folder(refused, tmp_path):
    assert "is ''" in refused("train", "", "--out", tmp_path / "out", *FAST)


def test_a_new_run_has_its_log_from_the_start(run, refused, images, tmp_path):
    refused("train", images, "--steps", 20, "--lr", 1e30, "--out", tmp_path / "out", *FAST)  # before any checkpoint
    assert (tmp_path / "out" / "metrics.jsonl").exists() and not (tmp_path / "out" / "metrics.partial").exists()


def test_a_second_ctrl_c_of_the_keyboard_ends_with_130_and_a_word(images, tmp_path):
    """In a process of its own: newer Typers swallow it."""
    out = tmp_path / "out"
    command = ["train", images, "--out", out, "--steps", 10**6, "--log-steps", 1, *FAST]
    script = ("import dansm, scale.trainer as trainer; from scale.recipe import Recipe\n"
              f"dansm.NETWORKS['small'] = {TINY!r}\n"
              "def line(self, seconds):\n    import os, signal\n    os.kill(os.getpid(), signal.SIGINT)\n"
              "    os.kill(os.getpid(), signal.SIGINT)\n"
              "trainer.Watch.line = line\n"
              f"main({list(map(str, command))!r})")
    process = start("-c", script)
    try:
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and err == "dansm: stopped at once; what was saved before is kept\n"
