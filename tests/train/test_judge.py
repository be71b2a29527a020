"""Evaluation while a run trains: it changes nothing of the run, and says what dansm evaluate says of its models."""

import json
import time

import pytest
import torch
from dansm.scale.evaluate import evaluate
from dansm.scale.model import checkpoint
from dansm.scale.train import fit as trainer
from dansm.scale.train import judge
from support import FAST, TINY, in_processes, log_of, make_images, needs_gloo, state_of

import dansm

pytest.importorskip("torch_fidelity")

SEEN = ("--evaluate-features", "test_evaluate:seen", "--evaluate-count", 40, "--evaluate-steps", "2,3")
MEASURES = {"frechet_distance", "kernel_distance", "kernel_distance_std", "precision", "recall"}


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    monkeypatch.setattr(evaluate, "SUBSETS", 5)
    monkeypatch.setattr(judge, "CACHE", tmp_path / "cache")


@pytest.fixture
def images(tmp_path):
    return make_images(tmp_path / "images", count=60, width=8, height=8)


def evaluations(out):
    return [line for line in log_of(out) if "frechet_distance/real" in line]


def of_losses(out):
    return [{name: line[name] for name in ("step", "loss", "distance")} for line in log_of(out) if "loss" in line]


def test_evaluations_change_nothing_of_the_run_and_stand_in_its_log(run, images, tmp_path):
    plain, judged = tmp_path / "plain", tmp_path / "judged"
    code, _, err = run("train", images, "--steps", 6, "--log-steps", 1, "--out", plain, *FAST)
    assert (code, err) == (0, "")
    code, said, err = run("train", images, "--steps", 6, "--log-steps", 1, "--out", judged, *FAST, *SEEN,
                          "--evaluate-every", 2)
    assert (code, err) == (0, "")
    assert of_losses(plain) == of_losses(judged) and not evaluations(plain)
    weights = [state_of(out)["training"] for out in (plain, judged)]
    assert test_trainer.same(*weights)
    lines = evaluations(judged)
    assert [line["step"] for line in lines] == [2, 4, 6] and [line["images"] for line in lines] == [16, 32, 48]
    for line in lines:
        assert {name for name in line if "/" in name} == {f"{name}/{of}" for name in MEASURES for of in (2, 3, "real")}
    assert len({line["frechet_distance/2"] for line in lines}) == 3  # of three networks
    assert len({line["frechet_distance/real"] for line in lines}) == 1
    assert said.count("Fréchet distance (test_evaluate:seen)") == 3


def test_a_run_says_of_its_checkpoint_what_the_command_says(run, images, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert run("train", images, "--steps", 4, "--out", out, *FAST, *SEEN, "--evaluate-every", 4)[0] == 0
    command = ["evaluate", out, "--features", "test_evaluate:seen", "--count", 40, "--steps", "2,3", "--device", "cpu"]
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "_measured", lambda *_: pytest.fail("measured again"))
        assert run(*command, "--cache", tmp_path / "cache", "--out", tmp_path / "evaluated")[0] == 0
    rows = json.loads((tmp_path / "evaluated" / "evaluate.json").read_text())["rows"]
    assert run(*command, "--cache", tmp_path / "other", "--out", tmp_path / "anew")[0] == 0
    anew = json.loads((tmp_path / "anew" / "evaluate.json").read_text())["rows"]
    assert [row["made_from"] for row in anew] == [row["made_from"] for row in rows]
    line, = evaluations(out)
    for row, of in zip(rows, ("real", 2, 3), strict=True):
        for name in MEASURES:
            assert line[f"{name}/{of}"] == pytest.approx(row[name], rel=1e-4, abs=1e-5)


def test_evaluations_at_given_steps_of_the_distance_alone(run, images, tmp_path):
    """Those of the same step of the run that measures all, and no others."""
    command = ["train", images, "--steps", 5, *FAST, *SEEN]
    assert run(*command, "--out", tmp_path / "every", "--evaluate-every", 2)[0] == 0
    assert run(*command, "--out", tmp_path / "at", "--evaluate-at", "2,5,9", "--evaluate-measures", "distance")[0] == 0
    at, every = ({line["step"]: line for line in evaluations(tmp_path / name)} for name in ("at", "every"))
    assert list(at) == [2, 5] and list(every) == [2, 4]
    assert {name for name in at[2] if "/" in name} == {f"frechet_distance/{of}" for of in (2, 3, "real")}
    for of in (2, 3, "real"):
        assert at[2][f"frechet_distance/{of}"] == every[2][f"frechet_distance/{of}"]


@needs_gloo
def test_two_processes_draw_the_images_of_one(run, images, tmp_path):
    command = ["train", images, "--steps", 2, *FAST, *SEEN, "--evaluate-every", 2, "--match-size", 0, "--lr", 1e-9]
    codes, said = in_processes(tmp_path, [*command, "--out", tmp_path / "two"], hook=with_own_cache)
    assert codes == [[0], [0]], said
    assert said[1] == ""
    assert run(*command, "--out", tmp_path / "one")[0] == 0
    (two,), (one,) = evaluations(tmp_path / "two"), evaluations(tmp_path / "one")
    for name in MEASURES - {"precision", "recall"}:  # which step by one image of forty
        assert two[f"{name}/2"] == pytest.approx(one[f"{name}/2"], rel=1e-3)


def with_own_cache(rank, folder):
    judge.CACHE, evaluate.SUBSETS = folder / "cache", 5


def test_a_run_cut_off_and_resumed_has_each_evaluation_once(run, images, tmp_path):
    once, twice = tmp_path / "once", tmp_path / "twice"
    command = ["train", images, *FAST, *SEEN, "--evaluate-every", 3]
    assert run(*command, "--steps", 9, "--out", once)[0] == 0
    assert run(*command, "--steps", 4, "--out", twice)[0] == 0
    torch.save(torch.zeros(1), twice / "checkpoint-00000004.pt")  # damaged: it goes on from that of the evaluation
    assert run(*command, "--steps", 9, "--out", twice)[0] == 0
    assert test_trainer.same(*(state_of(out)["training"] for out in (once, twice)))
    both = [told(out) for out in (once, twice)]
    assert both[0] == both[1] and [line["step"] for line in both[0]] == [3, 6, 9]


def test_ctrl_c_in_an_evaluation_gives_it_up_and_the_same_command_makes_up_for_it(run, images, tmp_path, monkeypatch):
    def pressed(*arguments, advance, **settings):
        trainer.Interrupt._press(interrupt)
        advance(8)

    init = trainer.Interrupt.__init__

    def known(self, say):
        nonlocal interrupt
        interrupt = self
        init(self, say)

    interrupt, out = None, tmp_path / "out"
    command = ["train", images, "--steps", 7, *FAST, *SEEN, "--evaluate-every", 3]
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Interrupt, "__init__", known)
        patch.setattr(evaluate, "draw_features", pressed)
        for _ in range(2):  # also the one that is made up for may be given up, and is due again
            code, said, _ = run(*command, "--out", out)
            assert code == 0 and "stopped at step 3" in said and "nothing to do" not in said
    assert evaluations(out) == [] and checkpoint.newest(out).name == "checkpoint-00000003.pt"
    assert run(*command, "--out", out)[0] == run(*command, "--out", tmp_path / "once")[0] == 0
    assert told(out) == told(tmp_path / "once") and [line["step"] for line in told(out)] == [3, 6]
    assert test_trainer.same(*(state_of(each)["training"] for each in (out, tmp_path / "once")))


def told(out):
    return [{name: line[name] for name in line if "seconds" not in name} for line in evaluations(out)]


def test_an_evaluation_that_a_kill_cut_off_is_made_up_for_even_at_the_end(run, images, tmp_path, monkeypatch):
    """The checkpoint of the last step is there, its evaluation is not: the same command makes no step, and that."""
    command = ["train", images, "--steps", 4, *FAST, *SEEN, "--evaluate-at", "2,4"]
    draws = evaluate.draw_features

    def killed(net, *arguments, **settings):
        if any("checkpoint-00000004" in path.name for path in (tmp_path / "cut").iterdir()):
            raise KeyboardInterrupt
        return draws(net, *arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "draw_features", killed)
        assert run(*command, "--out", tmp_path / "cut")[0] == 130
    assert [line["step"] for line in evaluations(tmp_path / "cut")] == [2]
    code, said, _ = run(*command, "--out", tmp_path / "cut")
    assert code == 0 and "nothing to do" in said
    assert run(*command, "--out", tmp_path / "once")[0] == 0
    assert told(tmp_path / "cut") == told(tmp_path / "once") and len(told(tmp_path / "cut")) == 2
    assert run(*command, "--out", tmp_path / "cut")[0] == 0 and len(told(tmp_path / "cut")) == 2


def test_evaluations_do_not_count_as_training(run, images, tmp_path, monkeypatch):
    score = evaluate.score

    def slow(*arguments, **settings):
        time.sleep(1.5)
        return score(*arguments, **settings)

    monkeypatch.setattr(evaluate, "score", slow)
    out = tmp_path / "out"
    assert run("train", images, "--steps", 4, "--out", out, *FAST, *SEEN, "--evaluate-every", 2)[0] == 0
    spent = [line["evaluation_seconds"] for line in evaluations(out)]
    assert len(spent) == 2 and min(spent) >= 3
    assert log_of(out)[-1]["seconds"] < 3  # four steps of a tiny network
    summary = json.loads((out / "train.json").read_text())
    assert summary["seconds"] < 3 and summary["this_call"]["seconds"] < 3


def test_grey_images_are_judged_as_grey_ones(run, tmp_path):
    from PIL import Image

    (tmp_path / "grey").mkdir()
    for i in range(12):
        Image.new("L", (8, 8), 20 * i).save(tmp_path / "grey" / f"{i}.png")
    out = tmp_path / "out"
    assert run("train", tmp_path / "grey", "--steps", 1, "--out", out, *FAST, *SEEN, "--evaluate-every", 1)[0] == 0
    assert len(evaluations(out)) == 1


@pytest.mark.parametrize(("options", "message"), [
    (("--evaluate-features", "test_evaluate:none_such"), "cannot be imported"),
    (("--evaluate-features", "test_evaluate:seen", "--inception-weights", "x.pth"), "expected one of the two"),
    (("--evaluate-features", "test_evaluate:of_three"), "expected a tensor (60, D)"),
    (("--evaluate-features", "test_evaluate:seen", "--evaluate-steps", "0"), "from 1 to 10000"),
    (("--evaluate-features", "test_evaluate:seen", "--evaluate-steps", "3,x"), "3,x"),
    (("--evaluate-features", "test_evaluate:seen", "--evaluate-count", "1"), "at least 2"),
    (("--evaluate-features", "test_evaluate:seen", "--flow", "diffusion", "--evaluate-steps", "1"),
     "--evaluate-steps is 1: expected 2 to"),
])
def test_what_cannot_be_evaluated_is_refused_before_a_step(refused, images, tmp_path, options, message):
    out = tmp_path / "out"
    assert message in refused("train", images, "--steps", 2, "--out", out, "--evaluate-every", 1, *FAST, *options)
    assert checkpoint.newest(out) is None


def test_latents_are_refused(refused, tmp_path):
    import numpy as np

    np.save(tmp_path / "latents.npy", np.zeros((8, 4, 8, 8), np.float16))
    said = refused("train", tmp_path / "latents.npy", "--evaluate-every", 1, *SEEN, *FAST)
    assert "these are latents: expected neither; dansm evaluate --autoencoder judges" in said


def test_the_help_lists_the_settings(run):
    said = run("train", "--help")[1]
    assert "Evaluation" in said and "--evaluate-every" in said


def test_no_evaluation_loads_nothing(run, images, monkeypatch):
    monkeypatch.setattr(evaluate, "load_extractor", lambda *arguments: pytest.fail("loaded"))
    assert run("train", images, "--steps", 1, *FAST)[0] == 0
    assert dansm.NETWORKS["small"] == TINY
