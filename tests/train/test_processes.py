"""Runs of several processes, as torchrun starts them: one run, saved, stopped and resumed together."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from runs import count_decoded, keep_pairs, nan_in_the_second_process, restarted_on_the_second_node, same_run
from support import (
    FAST,
    ROOT,
    TINY,
    ended,
    files_of,
    free_port,
    in_processes,
    log_of,
    make_images,
    needs_gloo,
    same,
    start_processes,
    state_of,
    wait_for,
)

from dansm import BadInput
from dansm.scale.base.locks import owning
from dansm.scale.base.processes import processes
from dansm.scale.model import checkpoint

pytestmark = [needs_gloo, pytest.mark.slow]


@pytest.mark.parametrize("match_scope", ["rank", "global"])
def test_two_processes_resumed_are_the_run_that_never_stopped(run, images, tmp_path, match_scope):
    command = ["train", images, "--match-scope", match_scope, "--accumulate", 2, "--ema-decay", "0.99,0.5", "--warmup",
               4, "--log-steps", 1, *FAST]
    once, twice = tmp_path / "once", tmp_path / "twice"
    codes, said = in_processes(tmp_path, [*command, "--steps", 8, "--out", once],
                               [*command, "--steps", 3, "--out", twice], [*command, "--steps", 8, "--out", twice],
                               hook=keep_pairs)
    assert codes == [[0, 0, 0]] * 2, said
    assert "resuming from step 3" in said[0] and said[1] == ""  # one speaks
    assert same_run(once, twice)
    state = state_of(once)
    assert len(state["ranks"]) == 2 and len(state["training"]["averages"]) == 2
    one, other = state["ranks"]
    assert not torch.equal(one["random"]["cpu"], other["random"]["cpu"]) and not same(one["pool"], other["pool"])
    averages = [torch.load(tmp_path / f"average-{rank}.pt") for rank in range(2)]
    assert same(*averages) and same(averages[0], state["training"]["averages"][0]["weights"])
    described = json.loads((once / "train.json").read_text())
    assert described["processes"] == 2 and described["images"] == 64
    if match_scope == "rank":
        code, alone, err = run(*command, "--steps", 9, "--out", once)
        assert (code, err) == (0, "") and "saved by 2 processes, resumed by 1: each goes on with its own" in alone


@pytest.mark.parametrize("options", [(), ("--labels", "auto"), ("--method", "semidiscrete"), ("--method", "random")],
                         ids=" ".join)
def test_a_run_goes_on_with_more_processes_each_with_noises_of_its_own(run, images, tmp_path, options):
    command = ["train", images, "--cache", tmp_path / "cache", "--log-steps", 1, *FAST, *options, "--out",
               tmp_path / "out"]
    code, _, err = run(*command, "--steps", 3)
    assert (code, err) == (0, "")
    codes, said = in_processes(tmp_path, [*command, "--steps", 6], hook=keep_pairs)
    assert codes == [[0]] * 2, said
    assert "saved by 1 process, resumed by 2: those that are new go on with noises that nobody has drawn" in said[0]
    assert said[1] == ""
    noises = torch.cat([torch.load(path)[1].flatten(1) for path in sorted(tmp_path.glob("pair-*.pt"))])
    assert len(noises) == 3 * 8 and len(noises.unique(dim=0)) == len(noises)
    assert [line["step"] for line in log_of(tmp_path / "out")] == [1, 2, 3, 4, 5, 6]


def pairs_of(folder, number, ranks):
    """x and z of a step, joined over all processes."""
    parts = [torch.load(folder / f"pair-{number}-{rank}.pt") for rank in range(ranks)]
    return [torch.cat(part) for part in zip(*parts, strict=True)]


def test_processes_that_share_a_pool_train_on_the_pairs_of_one_process(images, tmp_path):
    command = ["train", images, "--steps", 7, *FAST]
    commands = {"one": [*command, "--out", tmp_path / "1"],
                "global": [*command, "--match-scope", "global", "--out", tmp_path / "2"],
                "rank": [*command, "--out", tmp_path / "3"]}
    for name in commands:
        (tmp_path / name).mkdir()
        codes, said = in_processes(tmp_path / name, commands[name], count=1 if name == "one" else 2, hook=keep_pairs)
        assert {code for process in codes for code in process} == {0}, said
    for number in range(7):
        x, z = pairs_of(tmp_path / "one", number, 1)
        assert x.shape == (8, 3, 8, 8)
        assert same(pairs_of(tmp_path / "global", number, 2), [x, z])
        x_of_ranks, z_of_ranks = pairs_of(tmp_path / "rank", number, 2)
        assert torch.equal(x, x_of_ranks) and not torch.equal(z, z_of_ranks)


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
    named = [("--batch is 9", "multiple of 2"), ("--batch is 10", "multiple of 4"),
             ("--out", "checkpoint-00000002.pt", "checkpoint-00000004.pt"), ("--data", "20 images", "24 images")]
    for text in said:
        errors = [line for line in text.splitlines() if line.startswith("dansm: ")]
        assert len(errors) == 4 and "Traceback" not in text
        for error, words in zip(errors, named, strict=True):
            assert all(word in error for word in words)


def test_a_process_that_ends_while_others_connect_to_it_is_told_in_one_line(monkeypatch):
    def connect(*_, **__):
        raise RuntimeError("Gloo connectFullMesh failed with [pair.cc:561] Connection closed by peer [127.0.0.1]:29839")

    for name, value in dict(RANK=0, WORLD_SIZE=1, MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port()).items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.distributed, "init_process_group", connect)
    with pytest.raises(BadInput, match="another process of this run has ended"), processes(torch.device("cpu")):
        pass


def test_a_run_of_two_processes_into_a_folder_in_use_ends_both_in_one_line_each(images, tmp_path):
    (tmp_path / "out").mkdir()
    with owning(tmp_path / "out"):
        codes, said = in_processes(tmp_path, ["train", images, "--out", tmp_path / "out", "--steps", 2, *FAST])
    assert codes == [[2], [2]] and "Traceback" not in "".join(said), said
    assert str(tmp_path / "out") in said[0] and said[1].startswith("dansm: ") and said[1].count("\n") == 1


def test_a_nan_in_one_process_stops_all_with_its_step(images, tmp_path):
    codes, said = in_processes(
        tmp_path, ["train", images, "--steps", 20, "--log-steps", 5, "--out", tmp_path / "out", *FAST],
        hook=nan_in_the_second_process)
    assert codes == [[2], [2]], said
    assert all("nan at step 7," in text and "Traceback" not in text for text in said)


def test_sigterm_to_one_process_stops_all_with_a_save_and_the_same_command_resumes(images, tmp_path):
    out = tmp_path / "out"
    command = ["train", images, "--steps", 10**6, "--log-steps", 5, "--out", out, *FAST]
    children = start_processes(tmp_path, command)
    end = time.monotonic() + 60
    while not any(log.stat().st_size for log in out.glob("metrics.*")):
        assert all(child.is_alive() for child in children) and time.monotonic() < end
        time.sleep(0.05)
    os.kill(children[1].pid, signal.SIGTERM)
    codes, said = ended(children, tmp_path)
    assert codes == [[0], [0]], said
    steps = state_of(out)["training"]["step"]
    assert f"stopped at step {steps:,} of 1,000,000, saved" in said[0]
    described = json.loads((out / "train.json").read_text())
    assert described["stopped_early"] and described["steps"] == log_of(out)[-1]["step"] == steps
    assert "samples.png" not in files_of(out)  # who stops does not wait for images
    codes, said = in_processes(tmp_path, [*command, "--steps", steps + 2])
    assert codes == [[0], [0]] and f"resuming from step {steps:,}" in said[0]


# ------------------------------------------------------------------------------- data


def test_one_of_two_processes_decodes_and_the_next_run_decodes_nothing(images, tmp_path):
    command = ["train", images, "--steps", 1, *FAST]
    count = len(list(Path(images).rglob("*.png")))
    for out, decoded in (("a", count), ("b", 0)):
        codes, said = in_processes(tmp_path, [*command, "--out", tmp_path / out], hook=count_decoded)
        assert codes == [[0], [0]], said
        assert len(list(tmp_path.glob("decoded-*"))) == decoded
        for note in tmp_path.glob("decoded-*"):
            note.unlink()
        assert said[0].count(f"{tmp_path}/.cache/dansm/images/") == 1 and not said[1]


# ------------------------------------------------------------------------------- torchrun


def test_a_restart_on_one_node_is_one_of_all(images, tmp_path):
    command = ["train", images, "--fresh", "--out", tmp_path / "out", *FAST]
    assert in_processes(tmp_path, [*command, "--steps", 2])[0] == [[0], [0]]
    codes, said = in_processes(tmp_path, [*command, "--steps", 4], hook=restarted_on_the_second_node)
    assert codes == [[0], [0]] and "resuming from step 2" in said[0], said


def test_half_of_torchruns_environment_is_refused(refused, images, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    said = refused("train", images, "--out", tmp_path / "out", *FAST)
    assert "RANK is 0" in said and "WORLD_SIZE expected" in said


def torchrun(folder, command, *options, before=""):
    """The command in two processes, started; `before` are lines that each of them runs first, with its `rank`."""
    script = folder / "script.py"
    script.write_text("import os, sys, pathlib, dansm\nfrom dansm.scale.train import stop\n"
                      f"rank = int(os.environ['RANK'])\ndansm.NETWORKS['small'] = {TINY!r}\n{before}\n"
                      "dansm.main(sys.argv[1:])\n")
    environment = {**os.environ, "HOME": str(folder), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
                   "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone",
         *map(str, options), str(script), *map(str, command)], text=True,
        env=environment, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)


def said_by(process, seconds=120):
    """What it said until it ended by itself."""
    try:
        return process.communicate(timeout=seconds)[0]
    finally:
        if process.poll() is None:
            process.terminate()  # torchrun takes its processes along


def test_ctrl_c_at_torchrun_saves(images, tmp_path):
    out = tmp_path / "out"
    process = torchrun(tmp_path, ["train", images, "--steps", 10**6, "--log-steps", 5, "--out", out, *FAST])
    wait_for(lambda: any(log.stat().st_size for log in out.glob("metrics.*")), process, seconds=120)
    os.killpg(process.pid, signal.SIGINT)
    said = said_by(process)
    steps = state_of(out)["training"]["step"]
    assert f"stopped at step {steps:,} of 1,000,000, saved" in said
    assert json.loads((out / "train.json").read_text())["steps"] == steps == log_of(out)[-1]["step"]


FAILS = """
loss, calls = dansm.RectifiedFlow.loss, []
def failing(*arguments):
    calls.append(1)
    if rank == 1 and len(calls) == {step}:
        {act}
    return loss(*arguments)
dansm.RectifiedFlow.loss = failing
stop.AGREE = 0
"""


def test_a_process_that_fails_ends_all_and_is_heard(images, tmp_path):
    process = torchrun(tmp_path, ["train", images, "--steps", 10**6, "--out", tmp_path / "out", *FAST],
                       before=FAILS.format(step=3, act="raise RuntimeError('the second one fell')"))
    said = said_by(process)
    assert process.returncode not in (0, None) and "RuntimeError: the second one fell" in said


def test_torchruns_restart_resumes_from_the_last_checkpoint_even_of_a_fresh_run(run, images, tmp_path):
    out = tmp_path / "out"
    run("train", images, "--steps", 30, "--out", out, *FAST)  # in the way
    once = "if not pathlib.Path('fell').exists(): pathlib.Path('fell').touch(); os._exit(7)"
    process = torchrun(
        tmp_path, ["train", images, "--steps", 8, "--fresh", "--save-minutes", 0, "--out", out, *FAST],
        "--max-restarts", 1, "--monitor-interval", 0.1, before=FAILS.format(step=5, act=once))
    said = said_by(process)
    assert process.returncode == 0 and (tmp_path / "fell").exists(), said
    assert re.search(r"resuming from step [34] of", said), said
    assert checkpoint.newest(out).name == "checkpoint-00000008.pt" and len(state_of(out)["ranks"]) == 2
    assert [line["step"] for line in log_of(out)] == list(range(1, 9))
