"""Recipes: what they may hold, those that come with DANSM, there and back through TOML."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from recipes import recipes

import dansm
from dansm import BadInput
from dansm.scale.model import recipe
from dansm.scale.model.recipe import RECIPES, RENAMED, SETTINGS, Recipe, changed, load, make_flow, names, write
from dansm.scale.train.run import new_network

FREE = {"cache", "channels", "data_on_gpu", "labels", "steps", "minutes", "save_minutes", "keep", "log_steps",
        "sample_steps", "compile", "evaluate_every", "evaluate_at", "evaluate_steps", "evaluate_measures",
        "evaluate_count", "evaluate_features", "inception_weights", "init", "memory"}

# ------------------------------------------------------------------------------- values


def test_a_recipe_of_data_alone_has_the_defaults():
    plain = Recipe("cifar10")
    assert (plain.network, plain.flow, plain.method, plain.match_size) == ("auto", "rectified", "greedy", "auto")
    assert (plain.batch, plain.lr, plain.ema_decay, plain.precision) == (128, 2e-4, (0.9999,), "auto")
    assert (plain.multipliers, plain.minutes, plain.save_minutes, plain.keep, plain.seed) == (None, 0, 5, 3, 0)


def test_every_default_may_be_given():
    assert all(recipe.checked(name, rules.default) == rules.default
               for name, rules in SETTINGS.items() if name != "data")


def test_a_list_is_taken_as_a_tuple_and_a_whole_number_as_a_fraction():
    taken = Recipe("x", ema_decay=[1, 0.5], multipliers=[1, 2], attention_at=[], lr=1, clip=2)
    assert (taken.ema_decay, taken.multipliers, taken.attention_at) == ((1.0, 0.5), (1, 2), ())
    assert all(isinstance(value, float) for value in (taken.lr, taken.clip, *taken.ema_decay))
    assert hash(taken) == hash(Recipe("x", ema_decay=(1, 0.5), multipliers=(1, 2), attention_at=(), lr=1.0, clip=2.0))


WRONG = [
    ("batch", True, "True"), ("batch", 0, "0"), ("batch", 2.0, "2.0"), ("batch", "8.5", "'8.5'"), ("batch", [8], "8"),
    ("batch", None, "None"), ("lr", True, "True"), ("lr", 0, "0"), ("lr", float("nan"), "nan"), ("lr", 10**400, "1"),
    ("minutes", float("inf"), "inf"), ("flip", 1, "1"), ("flip", "yes", "'yes'"),
    ("network", "vit", "'vit': expected one of auto, ncsnpp, ddpm, small, tiny"), ("network", 3, "3"),
    ("match_size", "many", "'many': expected auto, or a whole number of at least 0"), ("match_size", -1, "-1"),
    ("batch", "auto", "'auto'"),
    ("network", {"width": 3}, "{'width': 3}"), ("method", "hungarian", "'hungarian': expected one of random, greedy"),
    ("data", 3, "3"), ("width", 2, "2: expected a whole number of at least 4"), ("multipliers", [], "empty"),
    ("multipliers", 2, "2"), ("multipliers", [1, 0], "1,0"), ("multipliers", [1, True], "1,True"),
    ("multipliers", [[1]], "[1]"), ("ema_decay", 0.5, "0.5"), ("ema_decay", (), "empty"),
    ("ema_decay", [0.5, 1.5], "0.5,1.5: expected one or more, each a number from 0 to 1"), ("dropout", 1.5, "1.5"),
    ("seed", 2**32, "4294967296"), ("size", 4097, "4097"),
]


@pytest.mark.parametrize(("name", "value", "words"), WRONG)
def test_a_wrong_value_is_named_with_what_is_expected(name, value, words):
    with pytest.raises(BadInput, match=re.escape(f"{name} is {words}")) as refused:
        Recipe(**({"data": "x"} | {name: value}))
    assert "expected" in str(refused.value) and "\n" not in str(refused.value) and len(str(refused.value)) < 200


def test_only_a_diffusion_has_a_target():
    assert Recipe("d", flow="diffusion", target="velocity").target == "velocity"
    with pytest.raises(BadInput, match="--target velocity needs --flow diffusion"):
        Recipe("d", target="velocity")


# ------------------------------------------------------------------------------- files


@pytest.fixture
def write_text(tmp_path):
    def write_text(text):
        (tmp_path / "mine.toml").write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(tmp_path / "mine.toml")

    return write_text


def test_a_file_is_read_and_overridden(write_text):
    path = write_text('data = "d"  # comment\nlr = 1\nmultipliers = [1, 2]\nflip = false\n')
    assert load(path) == Recipe("d", lr=1.0, multipliers=(1, 2), flip=False)
    overrides = {"lr": 0.5, "data": "e", "multipliers": [3]}
    assert load(path, overrides) == Recipe("e", lr=0.5, multipliers=(3,), flip=False)


@pytest.mark.parametrize("text", [b'\xef\xbb\xbfdata = "d"\r\nlr = 1\r\n', b'data = "d"\nlr = 1'])
def test_files_of_other_editors_are_read(write_text, text):
    assert load(write_text(text)) == Recipe("d", lr=1.0)


@pytest.mark.parametrize("text", ["data = 'd'\nlr = = 2\n", "lr = 1\nlr = 3\n", "lr = [1,\n", b"\x80abc = 3",
                                  b"d\0a\0t\0a\0"])
def test_what_is_not_toml_is_refused_naming_the_file(write_text, text):
    path = write_text(text)
    with pytest.raises(BadInput, match=f"{re.escape(path)} cannot be read") as refused:
        load(path)
    assert "\n" not in str(refused.value)


UNKNOWN = [("learnrate = 1", "learnrate is not a setting"), ("match-size = 1", "nearest is match_size"),
           ("multiplier = [1]", "nearest is multipliers"), ("BATCH = 3", "nearest is batch"),
           ("[optimizer]\nlr = 1", "optimizer is not a setting"), ("[network]\nwidth = 4", "network is "),
           ("lr = 2020-01-01", "lr is 2020-01-01"), ("batch = 1.5", "batch is 1.5")]


@pytest.mark.parametrize(("line", "words"), UNKNOWN)
def test_an_unknown_setting_or_a_wrong_value_is_refused_naming_the_file(write_text, line, words):
    path = write_text(f'data = "d"\n{line}\n')
    with pytest.raises(BadInput, match=f"^{re.escape(path)}: .*{words}"):
        load(path)


def test_all_old_names_of_a_file_are_told_in_one_line_with_the_new_ones(write_text):
    """They stand in the recipe.toml of a run of version 0.1.0."""
    path = write_text('data = "d"\nresident = "auto"\nfast = false\npool = "fp32"\nages = 1\ndecay = [0.9999]\n')
    with pytest.raises(BadInput, match=f"^{re.escape(path)}: ") as refused:
        load(path)
    said = str(refused.value)
    assert all(f"{old} is now {new}" in said for old, new in RENAMED.items() if new) and "ages was removed" in said
    with pytest.raises(BadInput, match=r"^--pool is now --pool-dtype$"):
        load("cifar10", {"pool": "bf16"})


def test_a_wrong_option_is_named_before_anything_is_read(write_text):
    for source in ("cifar10", "missing", write_text("= broken")):
        with pytest.raises(BadInput, match=r"^--match-size is -1"):
            load(source, {"match_size": -1})


def test_data_is_named_once(write_text, tmp_path):
    path = write_text("lr = 1\n")
    with pytest.raises(BadInput, match=r"mine\.toml does not name the data"):
        load(path)
    assert load(path, {"data": "d"}) == Recipe("d", lr=1.0)
    assert load(str(tmp_path)) == Recipe(str(tmp_path))
    assert load(str(tmp_path), {"batch": 3, "data": str(tmp_path)}) == Recipe(str(tmp_path), batch=3)
    with pytest.raises(BadInput, match="--data is other"):
        load(str(tmp_path), {"data": "other"})


def test_a_file_or_recipe_that_is_not_there_is_refused(tmp_path):
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(BadInput, match=re.escape(str(path))):
            recipe.read(path)
    with pytest.raises(BadInput, match=r"celeba64 .*nearest is celeba-64\).*imagenet-64-dm"):
        load("celeba64")


def test_a_folder_called_like_a_recipe_is_meant_by_its_path():
    Path("ffhq-64").mkdir()
    assert load("./ffhq-64") == Recipe("./ffhq-64") and load("ffhq-64").data == "data/ffhq"


@given(some=recipes)
def test_what_is_written_is_read_back_equal(tmp_path_factory, some):
    path = tmp_path_factory.mktemp("recipe") / "recipe.toml"
    write(some, path)
    assert load(str(path)) == some and sorted(path.parent.iterdir()) == [path]


def test_a_path_of_bytes_that_are_no_text_is_read_back_too(tmp_path):
    some = Recipe(b"caf\xe9\x7f".decode("utf-8", "surrogateescape"))
    write(some, tmp_path / "recipe.toml")
    assert load(str(tmp_path / "recipe.toml")) == some


# ------------------------------------------------------------------------------- resuming


@given(old=recipes, new=recipes)
def test_what_keeps_a_run_from_resuming_is_every_difference_but_the_free_ones(old, new):
    before, now = dataclasses.asdict(old), dataclasses.asdict(new)
    differing = [name for name in SETTINGS if before[name] != now[name] and name not in FREE]
    assert [difference.partition(" ")[0] for difference in changed(before, new)] == differing


def test_a_change_is_told_with_both_values():
    old = dataclasses.asdict(Recipe("d", flip=True, ema_decay=(0.9, 0.5), multipliers=(1, 2)))
    new = Recipe("d", lr=0.1, ema_decay=(0.9,), flip=False, steps=3, minutes=1.5, keep=9, compile=False)
    told = ["flip True → False", "multipliers 1,2 → None", "lr 0.0002 → 0.1", "ema_decay 0.9,0.5 → 0.9"]
    assert changed(old, new) == told


def test_numbers_may_be_text_as_on_the_command_line():
    given = {"lr": "1e-3", "batch": "8", "multipliers": "1,2", "attention_at": "", "width": None}
    assert load(".", given) == Recipe(".", lr=1e-3, batch=8, multipliers=(1, 2), attention_at=())


def test_lists_are_no_change_and_what_is_lacking_had_the_default():
    some = Recipe("d", ema_decay=(0.9, 0.5), multipliers=(1, 2))
    assert changed({"data": "d", "ema_decay": [0.9, 0.5], "multipliers": [1, 2]}, some) == []
    assert changed({"data": "d", "ema_decay": [0.9, 0.5]}, some) == ["multipliers None → 1,2"]


# ------------------------------------------------------------------------------- those that come with DANSM

PAPERS = ["cifar10", "latent-bedroom", "bedroom-256", "celeba-64", "ffhq-64", "imagenet-64"]


def test_there_is_one_of_each_flow_for_each_of_the_papers_settings():
    assert sorted(names()) == sorted([*PAPERS, *(f"{name}-dm" for name in PAPERS), "proof"])
    for name in names():
        assert load(name).flow == ("diffusion" if name.endswith("-dm") else "rectified")


PARAMETERS = {"cifar10": 61_804_419, "cifar10-dm": 35_746_307,  # 3 channels in place of 4; Ho et al. 2020: 35.7 M
              "proof": 8_952_067,  # a quarter of that
              "latent-bedroom": 61_806_724, "latent-bedroom-dm": 35_748_612,  # as the paper has them
              "bedroom-256": 113_673_219, "bedroom-256-dm": 113_673_219}  # Ho et al. 2020: 114 M


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.toml")))
def test_the_networks_have_the_papers_sizes(name):
    some = load(name)
    channels, size = (4, 32) if "latent" in name else (3, some.size or 32)
    with torch.device("meta"):
        net = dansm.UNet(**some.network_settings(channels, size))
    assert sum(weight.numel() for weight in net.parameters()) == PARAMETERS.get(name, PARAMETERS.get(
        "cifar10-dm" if name.endswith("-dm") else "cifar10"))
    assert net.settings["size"] == size and net.settings["attention_at"] == [16]


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.toml")))
def test_each_value_tells_whose_it_is(name):
    lines = [line for line in (RECIPES / f"{name}.toml").read_text().splitlines()[1:] if line]
    silent = [line for line in lines if not re.search(r"# .*\b(paper's|ours)\b", line) and not line.startswith("data")]
    assert silent == [] and max(map(len, lines)) <= 120


def test_the_papers_numbers():
    for tail in ("", "-dm"):
        pixels, latents = load(f"cifar10{tail}"), load(f"latent-bedroom{tail}")
        assert (pixels.batch, pixels.lr, pixels.flip, pixels.ema_decay) == (128, 2e-4, True, (0.999999,))
        assert (latents.batch, latents.lr, latents.flip, latents.ema_decay) == (250, 1e-4, False, (0.9999,))
        assert load(f"bedroom-256{tail}").multipliers == (1, 1, 2, 2, 4, 4)
    assert {(load(name).method, load(name).match_size, load(name).cost, load(name).clip) for name in names()} == {
        ("greedy", 10_000, "squared", 1.0)}


# ------------------------------------------------------------------------------- networks and flows


def test_what_a_recipe_has_of_the_network_replaces_what_its_name_stands_for():
    plain = Recipe("x", network="ddpm").network_settings(3, 32)
    assert plain == dict(channels=3, size=32, **dansm.NETWORKS["ddpm"])
    some = Recipe("x", network="small", width=8, multipliers=(1, 1), blocks=1, attention_at=(), dropout=0.0)
    assert dansm.UNet(**some.network_settings(1, 6)).settings == dict(
        channels=1, size=6, width=8, multipliers=[1, 1], blocks=1, attention_at=[], dropout=0, biggan=True)


def test_attention_at_a_size_that_no_level_has_is_refused():
    some = Recipe("x", network="small", width=8, multipliers=(1, 1, 1), blocks=1, attention_at=(8, 16))
    images = torch.zeros(2, 3, 32, 32)
    assert new_network(images, some).settings["attention_at"] == [8, 16]
    with pytest.raises(BadInput, match=r"--attention-at has 12.*32, 16, 8"):
        new_network(images, dataclasses.replace(some, attention_at=(16, 12)))


def test_the_flow_is_the_recipes_and_bounded_for_images_alone():
    some = dataclasses.asdict(Recipe("x", flow="diffusion", target="velocity", times="logit-normal"))
    for of_images, bound in ((True, 1.0), (False, None)):
        flow = make_flow(some, of_images)
        assert (flow.bound, flow.target, flow.times) == (bound, "velocity", "logit-normal")
    flow = make_flow(dataclasses.asdict(Recipe("x")), True, "heun")
    assert isinstance(flow, dansm.RectifiedFlow) and flow.solver == "heun"


@pytest.mark.parametrize("name", [name for name, rules in SETTINGS.items() if rules.several])
def test_a_wrong_list_is_refused_showing_the_form_of_a_right_one(name):
    for wrong in ("0,", "none", "8x8", "-1"):
        with pytest.raises(BadInput, match=rf"^--it is .*as in {SETTINGS[name].example}\b"):
            recipe.checked(name, wrong, "--it")
    right = recipe.checked(name, SETTINGS[name].example)
    assert isinstance(right, tuple) and len(right) > 1 and recipe.shown(right) == SETTINGS[name].example
