"""Recipes: what they may say, those that come with DANSM, there and back through TOML, and the options made of them."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from dansm.scale.commands import train as command
from dansm.scale.commands.main import main
from dansm.scale.model import recipe
from dansm.scale.model.recipe import RECIPES, SETTINGS, Recipe, changed, kind_of, load, make_flow, names, write
from dansm.scale.train.run import new_network
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import dansm
from dansm import BadInput

FREE = {"cache", "resident", "steps", "minutes", "save_minutes", "keep", "log_steps", "sample_steps", "compile",
        "evaluate_every", "evaluate_at", "evaluate_steps", "evaluate_measures", "evaluate_count",
        "evaluate_features", "inception_weights"}

# ------------------------------------------------------------------------------- values


def test_a_recipe_of_data_alone_has_the_defaults():
    plain = Recipe("cifar10")
    assert (plain.network, plain.flow, plain.method, plain.match_size) == ("ncsnpp", "rectified", "greedy", 10_000)
    assert (plain.batch, plain.lr, plain.decay, plain.precision, plain.compile) == (128, 2e-4, (0.9999,), "auto", True)
    assert (plain.multipliers, plain.minutes, plain.save_minutes, plain.keep, plain.seed) == (None, 0, 5, 3, 0)


def test_a_recipe_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe("cifar10").lr = 1


def test_a_list_is_taken_for_a_tuple_and_a_whole_number_for_a_fraction():
    taken = Recipe("x", decay=[1, 0.5], multipliers=[1, 2], attention_at=[], lr=1, clip=2)
    assert (taken.decay, taken.multipliers, taken.attention_at) == ((1.0, 0.5), (1, 2), ())
    assert all(isinstance(value, float) for value in (taken.lr, taken.clip, *taken.decay))
    assert hash(taken) == hash(Recipe("x", decay=(1, 0.5), multipliers=(1, 2), attention_at=(), lr=1.0, clip=2.0))


WRONG = [
    ("batch", True, "True: expected a whole number of at least 1"),
    ("batch", 0, "0: expected a whole number"),
    ("batch", 2.0, "2.0: expected a whole number"),
    ("batch", "8", "'8': expected a whole number"),
    ("batch", [8], "8: expected a whole number"),
    ("batch", None, "None: expected a whole number"),
    ("lr", True, "True: expected a number from 1e-09 to 1e+30"),
    ("lr", 0, "0: expected a number"),
    ("lr", float("nan"), "nan: expected a number"),
    ("lr", 10**400, "expected a number"),
    ("minutes", float("inf"), "inf: expected a number of at least 0"),
    ("flip", 1, "1: expected true or false"),
    ("flip", "yes", "'yes': expected true or false"),
    ("network", "vit", "'vit': expected one of ncsnpp, ddpm, small"),
    ("network", 3, "3: expected one of"),
    ("network", {"width": 3}, "{'width': 3}: expected one of"),
    ("method", "hungarian", "'hungarian': expected one of random, greedy, optimal, nearest"),
    ("data", 3, "3: expected a text"),
    ("width", 33, "33: expected an even whole number of at least 4"),
    ("width", 2, "2: expected an even"),
    ("multipliers", [], "empty: expected one or more, each a whole number of at least 1"),
    ("multipliers", 2, "2: expected one or more"),
    ("multipliers", [1, 0], "1,0: expected one or more"),
    ("multipliers", [1, True], "1,True: expected one or more"),
    ("multipliers", [[1]], "expected one or more"),
    ("decay", 0.5, "0.5: expected one or more, each a number from 0 to 1"),
    ("decay", [0.5, 1.5], "0.5,1.5: expected one or more"),
    ("decay", (), "empty: expected one or more"),
    ("dropout", 1.5, "1.5: expected a number from 0 to 1"),
    ("seed", 2**32, "4294967296: expected a whole number from 0 to 4294967295"),
    ("size", 4097, "4097: expected a whole number from 0 to 4096"),
    ("accumulate", 129, "129: expected at most 128, the batch"),
]


@pytest.mark.parametrize(("name", "value", "words"), WRONG)
def test_a_wrong_value_is_named_with_what_is_expected(name, value, words):
    with pytest.raises(BadInput, match=re.escape(words)) as refused:
        Recipe(**({"data": "x"} | {name: value}))
    assert str(refused.value).startswith(f"{name} is ") and "\n" not in str(refused.value)


def test_a_long_value_is_not_printed_whole():
    with pytest.raises(BadInput) as refused:
        Recipe("x", method="m" * 10_000)
    assert len(str(refused.value)) < 200


def test_every_default_is_one_that_may_be_given():
    assert all(recipe.checked(name, field.default) == field.default
               for name, field in SETTINGS.items() if name != "data")


# ------------------------------------------------------------------------------- files


@pytest.fixture
def write_text(tmp_path):
    def write_text(text, name="mine.toml"):
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(tmp_path / name)

    return write_text


def test_a_file_is_read_and_overridden(write_text):
    path = write_text('data = "d"  # comment\nlr = 1\nmultipliers = [1, 2]\nflip = false\n')
    assert load(path) == Recipe("d", lr=1.0, multipliers=(1, 2), flip=False)
    overrides = {"lr": 0.5, "data": "e", "multipliers": [3]}
    assert load(path, overrides) == Recipe("e", lr=0.5, multipliers=(3,), flip=False)


@pytest.mark.parametrize("text", [b'\xef\xbb\xbfdata = "d"\r\nlr = 1\r\n', b'data = "d"\nlr = 1'])
def test_files_of_other_editors_are_read(write_text, text):
    assert load(write_text(text)) == Recipe("d", lr=1.0)


BROKEN = [
    ("data = 'd'\nlr = = 2\n", "line 2"),
    ("data = 'd'\nlr = 1\nlr = 2\n", "line 3"),
    ("data = 'd'\nlr = [1,\n", "line 3"),
    ("data = \"d\n", "line 1"),
    (b"\x80abc = 3", "line 1"),
    (b"d\0a\0t\0a\0", "line 1"),
]


@pytest.mark.parametrize(("text", "where"), BROKEN)
def test_what_is_not_toml_is_said_with_file_and_line(write_text, text, where):
    path = write_text(text)
    with pytest.raises(BadInput, match=f"{re.escape(path)} is not TOML: .*{where}") as refused:
        load(path)
    assert "\n" not in str(refused.value)


UNKNOWN = [("learnrate = 1", r"learnrate is not a setting.*: expected one that .*--help lists"),
           ("match-size = 1", r"match-size is not a setting \(the nearest is match_size\)"),
           ("multiplier = [1]", r"multiplier is not .*\(the nearest is multipliers\)"),
           ("BATCH = 3", r"BATCH is not a setting \(the nearest is batch\)"),
           ("[optimizer]\nlr = 1", "optimizer is a table"), ("[network]\nwidth = 4", "network is a table"),
           ("lr = 2020-01-01", "lr is 2020-01-01: expected a number"),
           ("batch = 1.5", "batch is 1.5: expected a whole")]


@pytest.mark.parametrize(("line", "words"), UNKNOWN)
def test_an_unknown_setting_or_a_wrong_value_is_said_with_its_file(write_text, line, words):
    path = write_text(f'data = "d"\n{line}\n')
    with pytest.raises(BadInput, match=f"^{re.escape(path)}: {words}"):
        load(path)


def test_a_wrong_value_on_the_command_line_is_said_as_the_option_it_is(write_text):
    for source in ("cifar10", "missing", write_text("= broken")):
        with pytest.raises(BadInput, match=r"^--match-size is -1: expected a whole number"):
            load(source, {"match_size": -1})
    with pytest.raises(BadInput, match=r"^--matchsize is not a setting \(the nearest is match_size\)"):
        load("cifar10", {"matchsize": 1})


def test_a_file_without_data_says_so(write_text):
    path = write_text("lr = 1\n")
    with pytest.raises(BadInput, match=r"mine\.toml does not say what data"):
        load(path)
    assert load(path, {"data": "d"}) == Recipe("d", lr=1.0)


def test_a_file_that_is_not_there_or_not_readable_is_refused(tmp_path):
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(BadInput, match="cannot be read") as refused:
            recipe.read(path)
        assert str(path) in str(refused.value)


def test_what_is_data_is_trained_on_with_the_defaults(tmp_path):
    assert load(str(tmp_path)) == Recipe(str(tmp_path))
    assert load(str(tmp_path), {"batch": 3, "data": str(tmp_path)}) == Recipe(str(tmp_path), batch=3)
    with pytest.raises(BadInput, match=r"--data is other, and .* is data too"):
        load(str(tmp_path), {"data": "other"})


def test_a_recipe_that_is_not_there_is_refused_with_the_nearest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match=r"celeba64 does not exist \(the nearest is celeba-64\).*imagenet-64-dm"):
        load("celeba64")


def test_a_folder_called_like_a_recipe_is_meant_by_its_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("ffhq-64").mkdir()
    assert load("./ffhq-64") == Recipe("./ffhq-64") and load("ffhq-64").data == "data/ffhq"


# ------------------------------------------------------------------------------- there and back


def values_of(name):
    """All that a setting may be."""
    kind, rules = kind_of(name), SETTINGS[name].metadata
    least, most = rules["least"], rules["most"]
    if rules["choices"]:
        one = st.sampled_from(rules["choices"])
    elif kind.type is int:
        one = st.integers(least, most).map(lambda n: n + n % 2 if rules["even"] else n)
    elif kind.type is float:
        one = st.floats(least, most, allow_nan=False, allow_infinity=False)
    elif kind.type is bool:
        one = st.booleans()
    else:
        one = st.text(st.characters(exclude_categories=["Cs"]))
    one = st.lists(one, min_size=not rules["empty"], max_size=4).map(tuple) if kind.several else one
    return st.none() | one if kind.optional else one


recipes = st.fixed_dictionaries({name: values_of(name) for name in SETTINGS}).map(
    lambda settings: settings | {"accumulate": min(settings["accumulate"], settings["batch"]),
                                 "target": settings["target"] if settings["flow"] == "diffusion" else "noise",
                                 "ages": min(settings["ages"], max(1, settings["match_size"]))
                                 if (settings["method"], settings["match_scope"]) == ("greedy", "rank") else 1}
).map(lambda settings: Recipe(**settings))


@given(some=recipes)
def test_what_is_written_is_read_back_equal(tmp_path_factory, some):
    path = tmp_path_factory.mktemp("recipe") / "recipe.toml"
    write(some, path)
    assert load(str(path)) == some and sorted(path.parent.iterdir()) == [path]
    recipe.tomllib.loads(path.read_text(encoding="utf-8"))


def test_a_path_of_bytes_that_are_no_text_is_read_back_too(tmp_path):
    some = Recipe(b"caf\xe9".decode("utf-8", "surrogateescape"))
    write(some, tmp_path / "recipe.toml")
    assert load(str(tmp_path / "recipe.toml")) == some


# ------------------------------------------------------------------------------- going on


@given(old=recipes, new=recipes)
def test_what_keeps_a_run_from_going_on_is_every_difference_but_the_free_ones(old, new):
    before, now = dataclasses.asdict(old), dataclasses.asdict(new)
    differing = [name for name in SETTINGS if before[name] != now[name] and name not in FREE]
    assert [difference.partition(" ")[0] for difference in changed(before, new)] == differing


def test_a_change_is_told_with_both_values():
    old = dataclasses.asdict(Recipe("d", flip=True, decay=(0.9, 0.5), multipliers=(1, 2)))
    new = Recipe("d", lr=0.1, decay=(0.9,), flip=False, steps=3, minutes=1.5, keep=9, compile=False)
    told = ["flip True → False", "multipliers 1,2 → None", "lr 0.0002 → 0.1", "decay 0.9,0.5 → 0.9"]
    assert changed(old, new) == told


def test_lists_of_a_checkpoint_are_no_change_and_what_it_lacks_had_the_default():
    some = Recipe("d", decay=(0.9, 0.5), multipliers=(1, 2))
    assert changed({"decay": [0.9, 0.5], "multipliers": [1, 2]}, some) == []
    assert changed({"decay": [0.9, 0.5]}, some) == ["multipliers None → 1,2"]


# ------------------------------------------------------------------------------- those that come with DANSM

PAPERS = ["cifar10", "latent-bedroom", "bedroom-256", "celeba-64", "ffhq-64", "imagenet-64"]


def test_there_is_one_of_each_kind_for_each_of_the_papers_settings():
    assert sorted(names()) == sorted([*PAPERS, *(f"{name}-dm" for name in PAPERS), "proof"])
    assert all(10 < len(says) < 60 and not says.startswith("#") for says in names().values())
    for name in names():
        assert load(name).flow == ("diffusion" if name.endswith("-dm") else "rectified")


PARAMETERS = {"cifar10": 61_804_419, "cifar10-dm": 35_746_307,  # 3 channels in place of 4; Ho et al. 2020: 35.7 M
              "proof": 8_952_067,  # a quarter of that
              "latent-bedroom": 61_806_724, "latent-bedroom-dm": 35_748_612,  # as the paper has them
              "bedroom-256": 113_673_219, "bedroom-256-dm": 113_673_219}  # Ho et al. 2020: 114 M


@pytest.mark.parametrize("name", sorted(p.stem for p in RECIPES.glob("*.toml")))
def test_the_networks_can_be_built_and_have_the_papers_sizes(name):
    some = load(name)
    channels, size = (4, 32) if "latent" in name else (3, some.size or 32)
    with torch.device("meta"):
        net = dansm.UNet(**some.network_settings(channels, size))
    assert sum(weight.numel() for weight in net.parameters()) == PARAMETERS.get(name, PARAMETERS.get(
        "cifar10-dm" if name.endswith("-dm") else "cifar10"))
    assert net.settings["size"] == size and net.settings["attention_at"] == [16]


@pytest.mark.parametrize("name", sorted(p.stem for p in RECIPES.glob("*.toml")))
def test_each_value_says_whose_it_is(name):
    lines = [line for line in (RECIPES / f"{name}.toml").read_text().splitlines()[1:] if line]
    silent = [line for line in lines if not re.search(r"# .*\b(paper's|ours)\b", line) and not line.startswith("data")]
    assert silent == [] and max(map(len, lines)) <= 120


def test_the_papers_numbers():
    for tail in ("", "-dm"):
        pixels, latents = load(f"cifar10{tail}"), load(f"latent-bedroom{tail}")
        assert (pixels.batch, pixels.lr, pixels.flip, pixels.decay) == (128, 2e-4, True, (0.999999,))
        assert (latents.batch, latents.lr, latents.flip, latents.decay) == (250, 1e-4, False, (0.9999,))
        assert load(f"bedroom-256{tail}").multipliers == (1, 1, 2, 2, 4, 4)
    assert {(load(name).method, load(name).match_size, load(name).cost, load(name).clip) for name in names()} == {
        ("greedy", 10_000, "squared", 1.0)}


# ------------------------------------------------------------------------------- networks


def test_what_a_recipe_says_of_the_network_goes_before_its_name():
    plain = Recipe("x", network="ddpm").network_settings(3, 32)
    assert plain == dict(channels=3, size=32, **dansm.NETWORKS["ddpm"])
    some = Recipe("x", network="small", width=8, multipliers=(1, 1), blocks=1, attention_at=(), dropout=0.0)
    net = dansm.UNet(**some.network_settings(1, 6))
    assert net(torch.zeros(2, 1, 6, 6), torch.zeros(2)).shape == (2, 1, 6, 6)
    assert net.settings == dict(channels=1, size=6, width=8, multipliers=[1, 1], blocks=1, attention_at=[], dropout=0,
                                biggan=True)


def test_images_that_the_network_cannot_halve_are_refused_with_the_option_that_helps():
    with pytest.raises(BadInput, match=r"18 pixels wide: expected a multiple of 4 .*--size N"):
        new_network(torch.zeros(1, 3, 18, 18), Recipe("x", multipliers=(1, 1, 1)))


def test_attention_at_a_size_that_no_level_has_is_refused():
    net = dansm.UNet(width=8, multipliers=(1, 1, 1), blocks=1)
    Recipe("x", attention_at=(8, 16)).check_attention(net)
    with pytest.raises(BadInput, match=r"--attention-at has 12: expected sizes .*, of 32, 16, 8$"):
        Recipe("x", attention_at=(16, 12)).check_attention(net)


def test_the_flow_is_the_recipes_and_bounded_for_pictures_alone():
    for pictures, bound in ((True, 1.0), (False, None)):
        for target in dansm.TARGETS:
            some = Recipe("x", flow="diffusion", target=target, times="logit-normal")
            flow = make_flow(dataclasses.asdict(some), pictures)
            assert (flow.bound, flow.target, flow.times) == (bound, target, "logit-normal")
    flow = make_flow(dataclasses.asdict(Recipe("x")), True, "heun")
    assert isinstance(flow, dansm.RectifiedFlow) and flow.solver == "heun"


# ------------------------------------------------------------------------------- the command


@pytest.fixture
def given_to_run(monkeypatch):
    """What the command line makes: (recipe, out, device, fresh); nothing is trained."""
    calls = []
    monkeypatch.setattr(command, "run", lambda *arguments: calls.append(arguments))

    def given_to_run(*arguments):
        with pytest.raises(SystemExit) as ended:
            main(["train", *arguments])
        assert ended.value.code == 0
        return calls.pop()

    return given_to_run


def text_of(value):
    return ",".join(map(repr, value)) if isinstance(value, tuple) else str(value)


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
        main(["train", "cifar10", "--device", "cpu", *arguments])
    mirrored = some.flip if some.flip is not None else load("cifar10").flip  # to say nothing is no option
    assert ended.value.code == 0 and taken == [dataclasses.replace(some, flip=mirrored)]


def test_only_what_is_given_goes_before_the_recipe(given_to_run):
    for name in ("cifar10", "celeba-64-dm"):
        some, out, device, fresh = given_to_run(name, "--device", "cpu")
        assert (some, out, device, fresh) == (load(name), Path("runs") / name, torch.device("cpu"), False)
    options = ["--lr", "3", "--fresh", "--no-flip", "--decay", "0.5,0.25", "--out", "o"]
    some, out, _, fresh = given_to_run(*options, "ffhq-64")
    assert some == dataclasses.replace(load("ffhq-64"), lr=3.0, flip=False, decay=(0.5, 0.25))
    assert (out, fresh) == (Path("o"), True)


def test_a_run_is_named_for_its_recipe(given_to_run, tmp_path):
    write(Recipe("d"), tmp_path / "mine.toml")
    assert given_to_run(str(tmp_path / "mine.toml"))[:2] == (Recipe("d"), Path("runs/mine"))
    assert given_to_run(str(tmp_path))[:2] == (Recipe(str(tmp_path)), Path("runs") / tmp_path.name)


def test_the_recipe_that_lies_in_a_run_is_that_run(given_to_run, tmp_path):
    write(Recipe("d"), tmp_path / "recipe.toml")
    assert given_to_run(str(tmp_path / "recipe.toml"))[1] == Path("runs/recipe")
    (tmp_path / "checkpoint-00000003.pt").touch()
    assert given_to_run(str(tmp_path / "recipe.toml"))[:2] == (Recipe("d"), tmp_path)


def test_a_recipe_for_latents_wants_latents(capsys, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "1.png")
    for data, found in ((tmp_path / "none", "does not exist"), (tmp_path, "holds images")):
        with pytest.raises(SystemExit) as ended:
            main(["train", "latent-bedroom", "--data", str(data)])
        said = capsys.readouterr().err
        assert ended.value.code == 2 and f"{data} {found}: expected latents, which dansm encode makes" in said


def test_only_a_diffusion_has_a_target(capsys):
    assert Recipe("d", flow="diffusion", target="velocity").target == "velocity"
    with pytest.raises(SystemExit) as ended:
        main(["train", "cifar10", "--target", "velocity"])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1
    assert "--target is velocity, with --flow rectified: expected --flow diffusion" in said


@pytest.mark.parametrize(("option", "text", "words"), [
    ("--multipliers", "1,a", "is '1,a': expected one or more, each a whole number"),
    ("--multipliers", "1,,2", "is '1,,2': expected one or more"),
    ("--multipliers", "", "is empty: expected one or more"),
    ("--decay", "0.5,2", "is 0.5,2.0: expected one or more"), ("--batch", "1e3", "is '1e3': expected a whole number"),
    ("--precision", "fp8", "is 'fp8': expected one of auto, bf16, fp16, fp32"), ("--keep", "0", "is 0: expected"),
])
def test_a_wrong_option_is_one_line(capsys, option, text, words):
    with pytest.raises(SystemExit) as ended:
        main(["train", "cifar10", option, text])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and f"{option} {words}" in said and said.count("\n") == 1


def test_no_sizes_of_attention_are_said_by_nothing(given_to_run):
    assert given_to_run("cifar10", "--attention-at", "")[0].attention_at == ()


def help_of_train(monkeypatch, capsys, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit) as ended:
        main(["train", "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_help_is_whole_in_80_columns(monkeypatch, capsys):
    said = help_of_train(monkeypatch, capsys, 80)
    assert max(map(len, said.splitlines())) <= 80 and "…" not in said.replace(",…", "")
    options = ["--" + name.replace("_", "-") for name in SETTINGS] + ["--out", "--device", "--fresh", "--help"]
    switches = ["--no-" + name.replace("_", "-") for name in SETTINGS if kind_of(name).type is bool]
    assert [option for option in options + switches if not re.search(rf"{option}\s", said)] == []
    assert [name for name, says in names().items() if not re.search(rf"{name} +{re.escape(says)}", said)] == []
    assert [part for part in {field.metadata["part"] for field in SETTINGS.values()} if f"─ {part} ─" not in said] == []


def test_help_tells_the_choices_and_what_holds_where_nothing_is_said(monkeypatch, capsys):
    said = " ".join(help_of_train(monkeypatch, capsys, 200).split())
    for words in ("random, greedy, optimal, nearest [greedy]", "samples a step, over all processes together [128]",
                  "mirror half of them, anew each epoch [images yes, latents no]", "[0.9999]",
                  "bf16, fp16, fp32 [auto]"):
        assert words in said
    assert "dansm train" in said or "train [OPTIONS]" in said
