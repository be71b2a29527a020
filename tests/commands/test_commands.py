"""Every command run for real, on images so small that it takes no time; and what each says of bad input."""

import os
import re
import subprocess
import sys

import pytest
import torch
from support import ROOT, files_of

import dansm
from dansm import BadInput
from dansm.scale.commands import bench, train
from dansm.scale.commands.main import COMMANDS


def test_a_command_that_is_stopped_says_so(run, monkeypatch):
    def stop(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "pick_device", stop)
    assert run("bench", "match") == (130, "", "dansm: stopped\n")


def start(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, *map(str, arguments)], text=True, env=environment,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


# ------------------------------------------------------------------------------- help, and as a script

OPTIONS = {
    "toy": ["--shape", "--match-size", "--steps", "--seeds", "--seed", "--device", "--out"],
    "digits": ["--match-size", "--steps", "--batch", "--pairs", "--evaluate-at", "--seeds", "--seed", "--device",
               "--out"],
    "train": ["--network", "--flow", "--method", "--match-size", "--cost", "--batch", "--steps", "--minutes",
              "--save-minutes", "--lr", "--ema-decay", "--no-flip", "--size", "--skip-unreadable", "--fresh", "--seed",
              "--device", "--out"],
    "export": ["--average", "--out"],
    "couple": ["--size", "--labels", "--flip", "--part", "--error", "--seed", "--device", "--cache", "--out"],
    "sample": ["--count", "--steps", "--solver", "--batch", "--files", "--seed", "--device", "--out"],
    "bench match": ["--match-size", "--batch", "--shape", "--seed", "--device", "--out"],
    "bench spread": ["--match-size", "--batch", "--shape", "--seed", "--device", "--out"],
    "bench train": ["--network", "--batch", "--shape", "--match-size", "--samples", "--first-step", "--seed",
                    "--device", "--out"],
    "bench evaluate": ["--samples", "--seed", "--device", "--out"],
    "bench autoencoder": ["--shape", "--samples", "--seed", "--device", "--out"],
    "compare": ["--count", "--shown", "--steps", "--name", "--batch", "--precision", "--seed", "--device", "--out"],
    "grid": ["--steps", "--side", "--name", "--batch", "--precision", "--seed", "--device", "--out"],
    "tsne": ["--data", "--size", "--pairs", "--draws", "--perplexity", "--match-size", "--steps", "--name", "--seed",
             "--device", "--out"],
    "paths": ["--data", "--size", "--match-size", "--count", "--steps", "--seeds", "--name", "--seed", "--device",
              "--out"],
    "loss": ["--data", "--size", "--match-size", "--count", "--steps", "--name", "--seed", "--device", "--out"],
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
    names = set(COMMANDS)
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
            dansm.main(["--help"])
        except SystemExit as ended:
            heavy = ["torchvision", "matplotlib", "sklearn", "scipy", "diffusers", "torch_fidelity", "safetensors"]
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
    (("train", "x", "--ema-decay", "1.5"), "--ema-decay", "1.5"),
    (("train", "x", "--minutes", "-1"), "--minutes", "-1"),
    (("train", "x", "--device", "tpu"), "--device", "tpu"),
    (("train", "x", "--colour", "red"), "--colour", ""),
    (("train",), "RECIPE", ""),
    (("couple", "x", "--part", "0"), "--part", "0"),
    (("couple", "x", "--error", "0"), "--error", "0"),
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


@pytest.mark.parametrize(("command", "option"), [
    (("toy", "--match-size", 5_000_000_000), "--match-size"),
    (("digits", "--match-size", 50_000_000_000), "--match-size"), (("couple", "images", "--memory", 1e-6), "--memory"),
    (("bench", "match", "--match-size", 1_000_000_000), "--match-size")])
def test_what_the_library_refuses_is_told_by_the_option(refused, images, command, option):
    said = refused(*command, "--device", "cpu")
    assert said.startswith(f"dansm: {option} is ")


def test_what_the_library_refuses_of_one_class_is_told_by_the_option_too(refused, images, monkeypatch):
    def refuse(*_):
        try:
            dansm.NoisePool(-1, (2,))
        except BadInput as error:
            raise BadInput(f"memory is short for the class batch is in: {error}") from error

    monkeypatch.setattr(train, "read_and_train", refuse)
    said = refused("train", images, "--device", "cpu")
    assert said.startswith("dansm: memory is short for the class batch is in: --match-size is -1")


def test_a_file_that_is_called_like_an_option_is_told_by_its_name(refused, tmp_path):
    (tmp_path / "data").write_text("")
    assert refused("train", "data", "--device", "cpu").startswith("dansm: data is ")


WORDS = [
    (("train", "x", "--method", "magic"), "--method.*magic.*nearest$"),
    (("train", "x", "--match-size", "1.5"), "--match-size.*(whole number|integer)"),
    (("train",), "'?RECIPE'?: expected a recipe.*a folder of images .*cifar10"),
    (("sample",), "'?model'?: expected .*folder of a dansm train.* or an export"),
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

    monkeypatch.setattr(bench, "pick_device", fail)
    said = refused("bench", "match")
    assert "this needs more memory than there is" in said and words in said and "GPU 0" not in said


def test_another_error_of_torch_is_not_hidden(monkeypatch):
    def fail(_):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(bench, "pick_device", fail)
    with pytest.raises(RuntimeError, match="mat1"):
        dansm.main(["bench", "match"])


@pytest.mark.parametrize("command", [("digits",), ("bench", "match"), ("bench", "train", "--network", "small")])
def test_a_missing_package_for_figures_is_told_before_anything_is_measured(refused, tmp_path, monkeypatch, command):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "dansm[toy]" in refused(*command, "--device", "cpu", "--out", tmp_path / "out")
    assert files_of(tmp_path) == []


@pytest.mark.parametrize("command", [("toy",), ("digits",), ("train", "x"), ("bench", "match")])
def test_a_gpu_that_is_not_there_is_refused_naming_what_is(refused, tmp_path, monkeypatch, command):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = refused(*command, "--device", "cuda", "--out", tmp_path / "out")
    assert "--device is cuda" in said and re.search(r"expected one of auto, cpu\b", said)
    assert files_of(tmp_path) == []


OUTS = [("toy", "--steps", 1), ("digits", "--steps", 1), ("train", "images"), ("bench", "match")]


@pytest.mark.parametrize("command", OUTS)
@pytest.mark.parametrize("out", ["file", "file/below", "file/below/deep"])
def test_an_out_that_is_or_lies_below_a_file_is_refused(refused, images, tmp_path, command, out):
    (tmp_path / "file").write_text("precious")
    said = refused(*command, "--out", tmp_path / out)
    assert f"--out is {tmp_path / out}: {tmp_path / 'file'} is a file, expected a folder" in said
    assert (tmp_path / "file").read_text() == "precious"
