"""Every command run for real, on images so small that it takes no time; and what each says of bad input."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dansm.scale.commands.main import main
from PIL import Image
from support import files_of

import dansm

ROOT = Path(__file__).parents[2]


def test_a_command_that_is_stopped_says_so(run, monkeypatch):
    def stop(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(dansm, "pick_device", stop)
    assert run("bench", "match") == (130, "", "dansm: stopped\n")


def start(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, *map(str, arguments)], text=True, env=environment,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


# ------------------------------------------------------------------------------- toy, digits


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
