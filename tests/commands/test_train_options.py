"""The options of dansm train: one for each setting of a recipe, checked as a file is."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from recipes import recipes

from dansm.scale.commands import train as command
from dansm.scale.commands.main import run as run_command
from dansm.scale.model.recipe import RENAMED, SETTINGS, Recipe, load, names, write


@pytest.fixture
def given_to_run(monkeypatch):
    """What the command line makes: (recipe, out, device, fresh, given); nothing is trained."""
    calls = []
    monkeypatch.setattr(command, "run", lambda *arguments: calls.append(arguments) or True)

    def given_to_run(*arguments):
        with pytest.raises(SystemExit) as ended:
            run_command(["train", *map(str, arguments)])
        assert ended.value.code == 0
        return calls.pop()

    return given_to_run


def text_of(value):
    return ",".join(map(repr, value)) if isinstance(value, tuple) else str(value)


@settings(max_examples=20)
@given(some=recipes)
def test_every_setting_has_its_option(some):
    taken, arguments = [], []
    for name in SETTINGS:
        value, option = getattr(some, name), name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{option}" if value else f"--no-{option}")
        elif value is not None:
            arguments.append(f"--{option}={text_of(value)}")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(command, "run", lambda recipe, *_: taken.append(recipe))
        run_command(["train", "cifar10", "--device", "cpu", *arguments])
    mirrored = some.flip if some.flip is not None else load("cifar10").flip  # no option stands for None
    assert ended.value.code == 0 and taken == [dataclasses.replace(some, flip=mirrored)]


def test_only_what_is_given_replaces_the_recipe(given_to_run):
    for name in ("cifar10", "celeba-64-dm"):
        some, out, device, fresh, given = given_to_run(name, "--device", "cpu")
        assert (some, out, device, fresh) == (load(name), Path("runs") / name, torch.device("cpu"), False)
        assert not given
    options = ["--lr", "3", "--fresh", "--no-flip", "--ema-decay", "0.5,0.25", "--attention-at", "", "--out", "o"]
    some, out, _, fresh, given = given_to_run(*options, "ffhq-64")
    expected = dataclasses.replace(load("ffhq-64"), lr=3.0, flip=False, ema_decay=(0.5, 0.25), attention_at=())
    assert (some, out, fresh, {*given}) == (expected, Path("o"), True, {"lr", "flip", "ema_decay", "attention_at"})


def test_a_run_is_named_for_its_recipe_its_data_or_the_run_that_the_recipe_lies_in(given_to_run, tmp_path):
    write(Recipe("d"), tmp_path / "mine.toml")
    write(Recipe("d"), tmp_path / "recipe.toml")
    assert given_to_run(tmp_path / "mine.toml")[:2] == (Recipe("d"), Path("runs/mine"))
    assert given_to_run(tmp_path)[:2] == (Recipe(str(tmp_path)), Path("runs") / tmp_path.name)
    assert given_to_run(tmp_path / "recipe.toml")[1] == Path("runs/recipe")
    (tmp_path / "checkpoint-00000003.pt").touch()
    assert given_to_run(tmp_path / "recipe.toml")[:2] == (Recipe("d"), tmp_path)


@pytest.mark.parametrize(("option", "text"), [("--multipliers", "1,a"), ("--multipliers", "1,,2"), ("--keep", "0"),
                                              ("--multipliers", ""), ("--ema-decay", "0.5,2"), ("--batch", "1e3"),
                                              ("--precision", "fp8"), ("--target", "velocity")])
def test_a_wrong_value_is_one_line_that_names_the_option(refused, option, text):
    assert option in refused("train", "cifar10", option, text)


@pytest.mark.parametrize(("command", "option", "words"), [
    ("train", "--pool", "is now --pool-dtype"), ("train", "--fast", "is now --tf32"),
    ("train", "--decay", "is now --ema-decay"), ("train", "--resident", "is now --data-on-gpu"),
    ("train", "--ages", "was removed"), ("digits", "--ages", "was removed"),
    ("digits", "--assigned", "is now --pairs random,optimal,greedy"), ("digits", "--judge-at", "is now --evaluate-at"),
    *((command, "--label", "is now --name") for command in ("compare", "grid", "tsne", "paths", "loss"))])
def test_an_old_option_is_refused_naming_the_new_one(refused, command, option, words):
    arguments = [command, "cifar10"] if command == "train" else [command]
    assert f"{option} {words}" in refused(*arguments, option, 1)
    assert f"{option} {words}" in refused(*arguments, option)  # as a switch


def test_no_old_option_is_suggested(refused):
    for almost, option in (("--age", "--ages"), ("--pol", "--pool "), ("--fas", "--fast"), ("--deca", "--decay")):
        assert option not in refused("train", "cifar10", almost, 1)


def test_an_option_without_its_value_is_named(refused):
    assert "--lr" in refused("train", "cifar10", "--lr")


def help_of_train(run, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    code, said, _ = run("train", "--help")
    assert code == 0
    return said


def test_help_is_whole_in_80_columns(run, monkeypatch):
    said = help_of_train(run, monkeypatch, 80)
    assert max(map(len, said.splitlines())) <= 80 and "…" not in said.replace(",…", "")
    options = ["--" + name.replace("_", "-") for name in SETTINGS] + ["--out", "--device", "--fresh", "--help"]
    switches = ["--no-" + name.replace("_", "-") for name in SETTINGS if SETTINGS[name].kind is bool]
    assert [option for option in options + switches if not re.search(rf"{option}\s", said)] == []
    assert [name for name, says in names().items() if not re.search(rf"{name} +{re.escape(says)}", said)] == []
    assert [part for part in {rules.part for rules in SETTINGS.values()} if f"─ {part} ─" not in said] == []
    assert [old for old in RENAMED if re.search(rf"--{old}\s", said)] == []


def test_help_tells_the_choices_and_the_defaults(run, monkeypatch):
    said = " ".join(help_of_train(run, monkeypatch, 200).split())
    for words in ("random, greedy, semidiscrete, optimal, nearest [greedy]", "[128]", "[0.9999]", "fp16, fp32 [auto]"):
        assert words in said


@pytest.mark.parametrize("options", [
    ["--match-size", 5_000_000_000], ["--width", 5, "--network", "tiny"], ["--grid", "7,7,7,7"],
    ["--grid", "17,16"],
    ["--memory", 1e-6, "--method", "semidiscrete"]])
def test_what_the_library_refuses_is_told_by_the_option(refused, images, options):
    """The library itself speaks of its arguments: match_size."""
    said = refused("train", images, "--steps", 10**9, "--device", "cpu", "--out", "out", *options)
    assert said.startswith(f"dansm: {options[0]} is ")
