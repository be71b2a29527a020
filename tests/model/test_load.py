"""Trained models out of runs, checkpoints and exports; and what is refused in their place."""

import json

import pytest
import torch
from models import SMALLEST, awake, state_to_save
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import CPU, limited_files, same

import dansm
from dansm import BadInput
from dansm.scale.commands.export import export
from dansm.scale.model import checkpoint
from dansm.scale.model.load import DESCRIBED, labels_by_path, load_model, load_models, read_average


@pytest.fixture
def run_folder(tmp_path):
    folder = tmp_path / "some-run"
    folder.mkdir()
    checkpoint.save(folder, state_to_save(decays=(0.5, 0.9)))
    return folder


def same_model(a, b):
    return same(a.net.state_dict(), b.net.state_dict()) and {**a.about, "file": 0} == {**b.about, "file": 0}


# ------------------------------------------------------------------------------- models


def test_a_model_is_the_average_ready_to_sample(run_folder):
    path = checkpoint.newest(run_folder)
    for place in (path, run_folder):
        model = load_model(place, "heun")
        assert same(model.net.state_dict(), state_of_average(path)) and not model.net.training
        assert isinstance(model.flow, dansm.RectifiedFlow) and model.flow.solver == "heun"
        assert (model.path, model.label, model.shape, model.pixels) == (place, "some-run", (1, 4, 4), (4, 4))
        about = {name: model.about[name] for name in ("file", "step", "decay", "data", "images", "latents")}
        assert about == dict(file=path, step=7, decay=0.5, data="digits", images=24, latents=None)
        assert model.draws_images and model.decode is None


def state_of_average(path, number=0):
    return checkpoint.load(path)["training"]["averages"][number]["weights"]


def test_a_folders_model_is_of_the_newest_that_can_be_read(run_folder, capsys):
    (run_folder / "checkpoint-00000009.pt").write_text("damaged")
    assert load_model(run_folder).about["file"] == run_folder / "checkpoint-00000007.pt"
    assert "checkpoint-00000009.pt" in capsys.readouterr().out


def test_on_a_device_it_samples_as_its_network_does(run_folder):
    model = load_model(run_folder)
    x, t = torch.randn(2, 1, 4, 4), torch.tensor([3.0, 900.0])
    expected = model.net(x, t)
    ready = model.on(CPU, "fp32")
    actual = ready.net(x, t)
    assert torch.equal(actual, expected) and not actual.requires_grad and ready.shape == model.shape
    assert ready.described() == {"label": "some-run", "file": str(model.about["file"]), "flow": "rectified",
                                 "trained_steps": 7, "decay": 0.5, "recipe": model.about["recipe"]}


@pytest.mark.parametrize(("latents", "bound"), [(None, 1.0), ({}, None), ({"factor": 0.5}, None)])
@pytest.mark.parametrize("target", dansm.TARGETS)
def test_a_diffusion_is_bounded_where_the_run_was_of_images_whatever_their_channels(tmp_path, latents, bound, target):
    state = state_to_save(latents=latents, recipe={"flow": "diffusion", "target": target})
    export(checkpoint.save(tmp_path, state), out=tmp_path / "weights.safetensors")
    for place in (tmp_path, tmp_path / "weights.safetensors"):
        model = load_model(place)
        assert (model.flow.bound, model.flow.target, model.about["latents"]) == (bound, target, latents)
        assert model.draws_images == (latents is None)


def test_a_diffusion_takes_no_solver_and_not_every_count_of_steps(tmp_path):
    checkpoint.save(tmp_path, state_to_save(recipe={"flow": "diffusion"}))
    with pytest.raises(BadInput, match="--solver is heun"):
        load_model(tmp_path, "heun")
    with pytest.raises(BadInput, match="--steps is 1:"):
        load_models([tmp_path], [2, 1])
    assert len(load_models([tmp_path], [2, 1000])) == 1


def test_images_take_no_autoencoder_and_latents_need_one(tmp_path):
    checkpoint.save(tmp_path, state_to_save())
    model = load_model(tmp_path)
    assert model.with_decoder(None, CPU, "fp32") == model
    with pytest.raises(BadInput, match="--autoencoder is x"):
        model.with_decoder("x", CPU, "fp32")
    checkpoint.save(tmp_path, state_to_save(latents={}))
    with pytest.raises(BadInput, match=r"latents of 1 channel.*--autoencoder"):
        load_model(tmp_path).with_decoder(None, CPU, "fp32")


def test_models_are_labelled_by_their_folders_and_all_differently(tmp_path):
    runs = [tmp_path / name / "checkpoint-00000001.pt" for name in "ab"]
    assert labels_by_path([tmp_path / "a", *runs[1:], tmp_path / "weights.safetensors"]) == ["a", "b", "weights"]
    second = runs[0].with_name("checkpoint-00000002.pt")
    assert labels_by_path([runs[0], second]) == [str(runs[0]), str(second)]
    assert labels_by_path([tmp_path / "a", tmp_path / "x" / "a", tmp_path / "b"]) == [
        str(tmp_path / "a"), str(tmp_path / "x" / "a"), "b"]


def test_labels_that_are_given_are_taken_one_for_each_model(run_folder):
    assert [model.label for model in load_models([run_folder] * 2, [1], labels=["x", "y"])] == ["x", "y"]
    with pytest.raises(BadInput, match=r"--name .*1 time .*2 models"):
        load_models([run_folder] * 2, [1], labels=["x"])


# ------------------------------------------------------------------------------- classes and guidance


def save_with_classes(folder, names=("cat", "dog", "1"), **settings):
    net = awake(dansm.UNet(**SMALLEST, classes=3, **settings))
    return checkpoint.save(folder, state_to_save(net, classes=list(names)))


def test_a_model_knows_its_classes_and_so_does_its_export(tmp_path):
    export(save_with_classes(tmp_path), out=tmp_path / "weights.safetensors")
    for place in (tmp_path, tmp_path / "weights.safetensors"):
        model = load_model(place)
        assert model.classes == ["cat", "dog", "1"] and model.net.classes == 3
        assert model.labels_of(range(2, 6)).tolist() == [2, 0, 1, 2]
    x, t, labels = torch.randn(2, 1, 4, 4), torch.tensor([3.0, 900.0]), torch.tensor([1, 0])
    assert torch.equal(model.on(CPU, "fp32").net(x, t, labels), model.net(x, t, labels))
    assert not torch.equal(model.net(x, t, labels), model.net(x, t))


def test_a_network_without_labels_has_no_classes(run_folder):
    model = load_model(run_folder)
    assert model.classes == [] and model.labels_of(range(3)) is None and "guidance" not in model.described()


def test_classes_go_by_name_before_number(tmp_path):
    save_with_classes(tmp_path)
    model = load_model(tmp_path)
    assert model.classes_of(None) == [0, 1, 2]
    assert [model.classes_of(names) for names in ("dog", "0", "1", "2, cat", "dog,dog")] == [
        [1], [0], [2], [2, 0], [1, 1]]
    save_with_classes(tmp_path, ["cat,dog", "cat", "x"])
    assert load_model(tmp_path).classes_of("cat,dog") == [0]
    save_with_classes(tmp_path, ["7", "11", "207"])
    assert load_model(tmp_path).classes_of("207,7") == [2, 0]
    with pytest.raises(BadInput, match=r"--class is '1': expected one of 7, 11, 207$"):  # not class 11
        load_model(tmp_path).classes_of("1")


def test_a_class_that_is_none_is_refused(tmp_path, run_folder):
    save_with_classes(tmp_path)
    for names in ("cow", "cat,3", "", "-1"):
        with pytest.raises(BadInput, match=r"--class is .*cat, dog, 1, or a number from 0 to 2"):
            load_model(tmp_path).classes_of(names)
    with pytest.raises(BadInput, match=r"--class is cat, and .*some-run was trained without labels"):
        load_model(run_folder).classes_of("cat")


def test_each_weight_of_a_guidance_is_a_model_of_its_own(tmp_path):
    save_with_classes(tmp_path)
    models = load_models([tmp_path], [3], labels=["x"], guidance="1,2.5,0,2.5", interval="0.25,.5")
    assert [(model.label, *model.guidance) for model in models] == [
        ("x", 1, (0, 1)), ("x, guidance 2.5 from 0.25 to 0.5", 2.5, (0.25, 0.5)),
        ("x, guidance 0 from 0.25 to 0.5", 0, (0.25, 0.5))]
    assert load_models([tmp_path], [3], labels=["x"], guidance="3")[0].label == "x, guidance 3"
    assert [model.described()["guidance"] for model in models] == [1, 2.5, 0]
    assert models[1].described()["guidance_interval"] == "0.25,0.5"


@pytest.mark.parametrize(("guidance", "interval", "named"), [
    ("", "0,1", "--guidance is ''"), ("1,x", "0,1", "--guidance is '1,x'"), ("-1", "0,1", "--guidance is '-1'"),
    ("nan", "0,1", "--guidance is 'nan'"), ("inf", "0,1", "--guidance is 'inf'"),
    ("2", "0.5", "--guidance-interval is '0.5'"), ("2", "0.6,0.5", "--guidance-interval is '0.6,0.5'"),
    ("2", "0,2", "--guidance-interval is '0,2'"), ("2", "0,x", "--guidance-interval is '0,x'"),
    ("1", "0,0.5", "--guidance-interval is 0,0.5 with --guidance 1")])
def test_a_guidance_that_is_none_is_refused(tmp_path, guidance, interval, named):
    save_with_classes(tmp_path)
    with pytest.raises(BadInput, match=named) as refused:
        load_models([tmp_path], [1], guidance=guidance, interval=interval)
    assert "expected" in str(refused.value)


@pytest.mark.parametrize(("flow", "solver", "steps", "interval", "times"), [
    ("diffusion", "euler", 4, "0,0.2", "0.25, 0.5, 0.75, 1"),
    ("rectified", "euler", 3, "0.35,0.6", "0, 0.333333, 0.666667"),
    ("rectified", "heun", 2, "0.6,0.9", "0, 0.5, 1")])
def test_an_interval_that_no_step_lies_in_is_refused_with_the_times_of_the_steps(tmp_path, flow, solver, steps,
                                                                                 interval, times):
    net = awake(dansm.UNet(**SMALLEST, classes=3))
    checkpoint.save(tmp_path, state_to_save(net, classes=["a", "b", "c"], recipe={"flow": flow}))
    with pytest.raises(BadInput) as refused:
        load_models([tmp_path], [10, steps], solver=solver, guidance="1,3", interval=interval)
    said = str(refused.value)
    assert f"--guidance-interval is {interval}, and in {steps} steps" in said and f" {times}: expected" in said
    assert len(load_models([tmp_path], [10], solver=solver, guidance="1,3", interval=interval)) == 2


def test_guidance_is_for_networks_that_were_trained_with_and_without_labels(tmp_path, run_folder):
    with pytest.raises(BadInput, match=r"--guidance is 2, and .*some-run was trained without labels"):
        load_models([run_folder], [1], guidance="1,2")
    save_with_classes(tmp_path, label_dropout=0.0)
    with pytest.raises(BadInput, match=r"--guidance is 0, and .* --label-dropout 0"):
        load_models([tmp_path], [1], guidance="0")
    assert len(load_models([tmp_path, run_folder], [1])) == 2


@pytest.mark.parametrize("names", [[], ["cat", "dog"]])
def test_names_that_are_not_the_networks_are_refused(tmp_path, names):
    saved = save_with_classes(tmp_path, names)
    with pytest.raises(BadInput, match=f"{saved}.*{len(names)} classes for a network of 3"):
        load_model(saved)


@pytest.mark.parametrize(("part", "to"), [("network", "x"), ("network", {"colour": 3}), ("network", {"width": 3}),
                                          ("training", {}), ("training", {"step": 1, "averages": []}), ("recipe", {}),
                                          ("recipe", {"flow": "curved", "times": "uniform"})])
def test_a_checkpoint_with_wrong_parts_is_refused_by_name(tmp_path, part, to):
    path = checkpoint.save(tmp_path, state_to_save())
    checkpoint.write(path, {**state_to_save(), part: to})
    with pytest.raises(BadInput) as refused:
        load_model(path)
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)


# ------------------------------------------------------------------------------- exports


def test_an_export_is_the_average_and_says_how_to_sample_from_it(run_folder, tmp_path):
    out = tmp_path / "deep" / "weights.safetensors"
    export(run_folder, out=out)
    assert same(load_file(out), state_of_average(checkpoint.newest(run_folder)))
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    with safe_open(out, "pt") as file:
        metadata = {name: json.loads(value) for name, value in file.metadata().items()}
    recipe = state_to_save()["recipe"]
    network = state_to_save()["network"]
    assert metadata == dict(dansm=2, network=network, flow="rectified", times="uniform", step=7, decay=0.5,
                            data="digits", recipe=recipe, latents=None, images=24)
    assert same_model(load_model(out), load_model(run_folder))
    assert load_model(out).about["file"] == out and load_model(out).label == "weights"


def test_another_average_is_exported_by_its_number(run_folder, tmp_path):
    export(run_folder, 1, tmp_path / "a.safetensors")
    assert load_model(tmp_path / "a.safetensors").about["decay"] == 0.9
    assert same(load_file(tmp_path / "a.safetensors"), state_of_average(checkpoint.newest(run_folder), 1))
    with pytest.raises(BadInput, match=r"--average is 2: .*0: decay 0\.5, 1: decay 0\.9"):
        export(run_folder, 2, tmp_path / "b.safetensors")


def damaged_exports():
    """(what is done to the weights and to the metadata, what the error names)."""
    first = "first.weight"
    return [(lambda weights, metadata: metadata.pop("flow"), "flow"),
            (lambda weights, metadata: metadata.clear(), "expected"),
            (lambda weights, metadata: metadata.update(dansm="3"), "version 3"),
            (lambda weights, metadata: metadata.update(network="{"), "expected"),
            (lambda weights, metadata: metadata.update(network='{"colour": 3}'), "colour"),
            (lambda weights, metadata: metadata.update(recipe='{"flow": "curved"}'), "curved"),
            (lambda weights, metadata: weights.pop(first), first),
            (lambda weights, metadata: weights.update(more=torch.zeros(2)), "more"),
            (lambda weights, metadata: weights.update({first: torch.zeros(2, 3)}), rf"{first}.*2, 3")]


@pytest.mark.parametrize(("damage", "named"), damaged_exports())
def test_weights_of_others_are_refused_naming_what_is_wrong(run_folder, tmp_path, damage, named):
    out = tmp_path / "weights.safetensors"
    export(run_folder, out=out)
    weights = load_file(out)
    about = read_average(out)[1]
    metadata = {name: json.dumps(about[name]) for name in DESCRIBED}
    damage(weights, metadata)
    save_file(weights, out, metadata or None)
    with pytest.raises(BadInput, match=named) as refused:
        load_model(out)
    assert str(out) in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("content", [b"", b"a text", None, -1])
def test_what_is_no_whole_safetensors_is_refused(run_folder, tmp_path, content):
    out = tmp_path / "weights.safetensors"
    if content == -1:
        export(run_folder, out=out)
        content = out.read_bytes()[:-1]
    if content is not None:
        out.write_bytes(content)
    with pytest.raises(BadInput, match=r"weights\.safetensors .*expected"):
        load_model(out)


def test_what_cannot_be_exported_is_refused_and_nothing_written(run_folder, tmp_path):
    out = tmp_path / "out" / "weights.safetensors"
    (tmp_path / "empty").mkdir()
    for source, target, named in ((run_folder, tmp_path / "weights.pt", r"weights\.pt"),
                                  (tmp_path / "empty", out, "empty holds no checkpoint"),
                                  (tmp_path / "missing", out, "missing"),
                                  (out, out, "exported already")):
        with pytest.raises(BadInput, match=named):
            export(source, out=target)
    state = state_to_save()
    del state["training"]["averages"][0]["weights"]["first.weight"]
    checkpoint.save(run_folder, state)
    with pytest.raises(BadInput, match=r"first\.weight"):
        export(run_folder, out=out)
    assert not out.parent.exists()


def test_an_export_onto_a_full_disk_leaves_the_one_before(run_folder, tmp_path):
    out = tmp_path / "weights.safetensors"
    export(run_folder, out=out)
    before = out.read_bytes()
    with limited_files(1000), pytest.raises(BadInput, match=r"weights\.safetensors cannot be written.*too large"):
        export(run_folder, out=out)
    assert out.read_bytes() == before and not list(tmp_path.glob("*.partial"))
