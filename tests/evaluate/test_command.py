"""dansm evaluate: one table of models and steps, rows that are not measured twice, and what it says of bad input."""

import csv
import json
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from features import seen
from PIL import Image
from support import CPU, files_of, make_images, noise_image, packed

import dansm
from dansm.scale.base.statistics import frechet_distance
from dansm.scale.commands import evaluate
from dansm.scale.data import read
from dansm.scale.evaluate import by_class
from dansm.scale.evaluate import real_features as room
from dansm.scale.model import checkpoint, load

NETWORK = dict(width=4, multipliers=[1], blocks=1, attention_at=[], dropout=0.0)


def make_run(folder, flow="rectified", channels=3, size=16, data="images", classes=(), **recipe):
    """A run's folder with a checkpoint of a network that does something."""
    net = dansm.UNet(**NETWORK, channels=channels, size=size, classes=len(classes))
    for weight in net.parameters():
        torch.nn.init.normal_(weight, 0, 0.05)
    folder.mkdir(parents=True)
    checkpoint.save(folder, {
        "network": net.settings, "recipe": {"flow": flow, "times": "uniform", "target": "noise", "size": 0, **recipe},
        "data": str(data), "images": None, "latents": None if channels == 3 else {}, "classes": list(classes),
        "training": {"step": 7, "averages": [{"decay": 0.9, "weights": net.state_dict()}]}, "ranks": [{}]})
    return folder


def change(model, **state):
    file = checkpoint.newest(model)
    checkpoint.write(file, checkpoint.load(file) | state)


@pytest.fixture
def model(tmp_path, images):
    return make_run(tmp_path / "first", data=images)


def options(tmp_path, *more):
    return ["--features", "features:seen", "--count", 30, "--steps", "2,3", "--device", "cpu",
            "--cache", tmp_path / "cache", "--out", tmp_path / "out", *more]


def rows_of(out):
    return json.loads((out / "evaluate.json").read_text())["rows"]


def test_evaluate_makes_one_table_of_models_and_steps(run, model, images, tmp_path):
    diffusion = make_run(tmp_path / "second", "diffusion", data=images)
    code, said, err = run("evaluate", model, diffusion, *options(tmp_path))
    assert (code, err) == (0, "")
    assert "Fréchet" in said and "features:seen" in said and "FID" not in said and "KID" not in said
    assert "real images" in said and "first" in said and "second" in said
    assert max(map(len, said.split("written:")[0].splitlines()[:8])) <= 80
    assert files_of(tmp_path / "out") == ["evaluate.csv", "evaluate.json"]
    rows = rows_of(tmp_path / "out")
    assert [(row["model"], row.get("steps")) for row in rows] == [
        ("real images", None), (str(model), 2), (str(model), 3), (str(diffusion), 2), (str(diffusion), 3)]
    assert rows[0]["count"] == 12 and all(row["count"] == 30 for row in rows[1:])  # of 24 real images
    assert len({row["frechet_distance"] for row in rows}) == 5
    assert all(row["data"] == str(images) and row["real_images"] == 24 for row in rows)
    assert rows[1]["trained_steps"] == 7 and rows[1]["file"].endswith("checkpoint-00000007.pt")
    with open(tmp_path / "out" / "evaluate.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [float(line["recall"]) for line in lines] == [row["recall"] for row in rows]


def test_scores_are_those_of_the_images_that_dansm_sample_writes(run, model, images, tmp_path):
    run("evaluate", model, *options(tmp_path, "--batch", 7, "--seed", 4, "--steps", 2))
    run("sample", model, "--count", 30, "--steps", 2, "--files", "--seed", 4, "--device", "cpu", "--out", "drawn")

    def pixels(folder):
        return torch.stack([torch.from_numpy(np.array(Image.open(path)).transpose(2, 0, 1))
                            for path in sorted(folder.glob("[0-9]*.png"))])

    expected = frechet_distance(seen(pixels(tmp_path / "drawn")), seen(pixels(images)))
    assert rows_of(tmp_path / "out")[1]["frechet_distance"] == pytest.approx(expected, rel=1e-3)


def test_the_same_call_again_measures_nothing_and_says_the_same(run, model, tmp_path, monkeypatch):
    first = run("evaluate", model, *options(tmp_path))[1].partition("Distances")[2]
    rows = rows_of(tmp_path / "out")
    run("export", model, "--out", "w.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "sample_images", lambda *_, **__: pytest.fail("drawn again"))
        patch.setattr(room, "_measure", lambda *_: pytest.fail("measured again"))
        patch.setattr(read, "read_image", lambda *_: pytest.fail("decoded again"))
        assert run("evaluate", model, *options(tmp_path))[1].partition("Distances")[2] == first
        code, said, _ = run("evaluate", "w.safetensors", *options(tmp_path))
    assert code == 0 and "real images" in said and " w " in said
    assert rows_of(tmp_path / "out") == rows
    for more in (("--seed", 1), ("--count", 20), ("--solver", "heun"), ("--steps", "4")):
        run("evaluate", model, *options(tmp_path, *more))
        assert rows_of(tmp_path / "out")[: len(rows)] == rows and len(rows_of(tmp_path / "out")) > len(rows)
        rows = rows_of(tmp_path / "out")


def test_equal_weights_that_predict_something_else_are_another_row(run, images, tmp_path, monkeypatch):
    first = make_run(tmp_path / "first", "diffusion", data=images)
    state = checkpoint.load(checkpoint.newest(first))
    (tmp_path / "second").mkdir()
    checkpoint.save(tmp_path / "second", state | {"recipe": state["recipe"] | {"target": "velocity"}})
    assert run("evaluate", first, tmp_path / "second", *options(tmp_path, "--steps", 2))[0] == 0
    assert len({row["frechet_distance"] for row in rows_of(tmp_path / "out")}) == 3
    monkeypatch.setattr(load, "make_flow", lambda *_: dansm.Diffusion(bound=0.1))
    assert run("evaluate", first, *options(tmp_path, "--steps", 2))[0] == 0
    assert len({row["frechet_distance"] for row in rows_of(tmp_path / "out")}) == 4


def test_ctrl_c_keeps_the_rows_that_are_done_and_the_same_command_resumes(run, model, tmp_path, monkeypatch):
    draw = evaluate.sample_images

    def interrupted(net, flow, numbers, shape, steps, *arguments, **settings):
        if steps == 3:
            raise KeyboardInterrupt
        return draw(net, flow, numbers, shape, steps, *arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "sample_images", interrupted)
        code, said, err = run("evaluate", model, *options(tmp_path))
    assert code == 130 and "2 rows of 3 kept" in err and "real images" in said
    kept = rows_of(tmp_path / "out")
    assert len(kept) == 2
    assert run("evaluate", model, *options(tmp_path))[0] == 0
    assert rows_of(tmp_path / "out")[:2] == kept and len(rows_of(tmp_path / "out")) == 3


class Rows:
    """Synthetic rows 0 to 2, whose measures are none, and those that are kept."""

    reference = SimpleNamespace(device=CPU)

    def __init__(self):
        self.kept = []
        self.is_drawn = [Event(), Event(), Event()]

    def draw(self, error=None):
        for number, event in enumerate(self.is_drawn):
            event.set()
            yield number, None
        if error:
            raise error

    def score(self, drawn, ahead, keep=None):
        evaluate.score_rows(drawn, self.reference, None, keep or self.kept.append, ahead=ahead)


@pytest.fixture
def rows(monkeypatch):
    monkeypatch.setattr(evaluate, "measure", lambda row, *_: row)
    return Rows()


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("no memory")])
def test_what_stops_the_drawing_of_a_row_loses_none_that_is_drawn(rows, error, ahead):
    with pytest.raises(type(error)):
        rows.score(rows.draw(error), ahead)
    assert rows.kept == [0, 1, 2]


@pytest.mark.parametrize("ahead", [0, 1])
def test_ctrl_c_while_a_row_is_scored_waits_for_it_and_for_those_that_are_drawn(rows, ahead, monkeypatch):
    class Pressed(ThreadPoolExecutor):
        pressed = False

        def submit(self, *work):
            future = super().submit(*work)
            wait = future.result

            def result():
                if not self.pressed:
                    self.pressed = True
                    raise KeyboardInterrupt
                return wait()

            future.result = result
            return future

    monkeypatch.setattr(evaluate, "ThreadPoolExecutor", Pressed)
    with pytest.raises(KeyboardInterrupt):
        rows.score(rows.draw(), ahead)
    assert rows.kept == [0, 1][: ahead + 1]


def test_ctrl_c_while_a_row_is_written_writes_it_again_and_the_one_that_is_scored(rows):
    calls = []

    def keep(row):
        calls.append(row)
        if len(calls) == 1:
            raise KeyboardInterrupt
        rows.kept.append(row)

    with pytest.raises(KeyboardInterrupt):
        rows.score(rows.draw(), 1, keep)
    assert rows.kept == [0, 1]


def test_a_row_is_scored_while_the_next_is_drawn(rows, monkeypatch):
    def measure(row, *_):
        assert row == 2 or rows.is_drawn[row + 1].wait(20)
        return row

    monkeypatch.setattr(evaluate, "measure", measure)
    rows.score(rows.draw(), 1)
    assert rows.kept == [0, 1, 2]


def test_fewer_samples_than_features_are_said(run, model, tmp_path):
    said = run("evaluate", model, *options(tmp_path, "--count", 10, "--steps", 2))[1]
    assert "10 images are fewer than the 20 features" in said
    assert "fewer than" not in run("evaluate", model, *options(tmp_path, "--steps", 2))[1]


# ------------------------------------------------------------------------------- the real images


def test_one_folder_named_in_two_ways_is_one_and_one_that_moved_is_asked_for(run, images, tmp_path):
    for name, folder in (("one", images), ("two", images.relative_to(tmp_path))):
        make_run(tmp_path / name, data=str(folder))
    command = ["evaluate", tmp_path / "one", tmp_path / "two", *options(tmp_path)]
    assert run(*command)[0] == 0
    assert len({row["real_digest"] for row in rows_of(tmp_path / "out")}) == 1
    images.rename(tmp_path / "elsewhere")
    code, _, err = run(*command)
    assert code == 2 and "images does not exist" in err


def test_other_images_in_the_place_of_those_trained_on_are_noticed_by_their_count(run, model, images, tmp_path):
    for count, code in ((7, 2), (24, 0)):
        change(model, images=count)
        assert run("evaluate", model, *options(tmp_path))[0] == code
    change(model, images=7)
    said = run("evaluate", model, *options(tmp_path))[2]
    assert "7 images" in said and "24" in said and "--data" in said
    assert run("evaluate", model, "--data", images, *options(tmp_path))[0] == 0  # as asked for


def test_the_recipes_size_holds_for_the_data_it_names(run, refused, tmp_path):
    large = make_images(tmp_path / "large", width=20, height=24)
    model = checkpoint.newest(make_run(tmp_path / "small", data=large, size=16))
    said = refused("evaluate", model, *options(tmp_path))
    assert "16×16" in said and "20×24" in said and "--size 16" in said
    assert run("evaluate", model, *options(tmp_path, "--size", 16))[0] == 0
    change(tmp_path / "small", recipe={"flow": "rectified", "times": "uniform", "size": 16})
    assert run("evaluate", tmp_path / "small", *options(tmp_path))[0] == 0


def test_real_images_need_not_fit_in_the_memory(run, model, images, tmp_path, monkeypatch):
    run("evaluate", model, *options(tmp_path))
    expected = [row["frechet_distance"] for row in rows_of(tmp_path / "out")]
    archive = packed(tmp_path / "a.tar.gz", {path.name: path.read_bytes() for path in sorted(images.iterdir())})
    monkeypatch.setattr("dansm.scale.base.machine.free_memory", lambda _: 0)
    for number, more in enumerate(([], ["--data", archive])):
        out = tmp_path / f"out-{number}"
        code, _, err = run("evaluate", model, *options(tmp_path, *more, "--cache", tmp_path / f"cache-{number}",
                                                       "--out", out))
        assert (code, err) == (0, "") and [row["frechet_distance"] for row in rows_of(out)] == expected


def test_real_images_that_cannot_be_read_are_named_or_left_out(run, refused, model, images, tmp_path):
    (images / "07.png").write_text("none")
    said = refused("evaluate", model, *options(tmp_path))
    assert "07.png" in said and "--skip-unreadable" in said
    assert run("evaluate", model, *options(tmp_path, "--skip-unreadable"))[0] == 0
    skipping = make_run(tmp_path / "skipping", data=images, skip_unreadable=True)
    assert run("evaluate", skipping, *options(tmp_path))[0] == 0
    assert {row["real_images"] for row in rows_of(tmp_path / "out")} == {23}


# ------------------------------------------------------------------------------- classes


@pytest.fixture
def of_classes(tmp_path, monkeypatch):
    """A model of three classes, of which one has half of the images, and few images are enough to measure one."""
    monkeypatch.setattr(by_class, "LEAST", 4)
    for name, count in (("cat", 8), ("dog", 16), ("owl", 8)):
        make_images(tmp_path / "animals" / name, count)
    return make_run(tmp_path / "of_classes", data=tmp_path / "animals", classes=["cat", "dog", "owl"], labels="folders")


BY_CLASS = {"label_accuracy", "frechet_distance_class_mean", *(f"frechet_distance/{name}" for name in
                                                               ("cat", "dog", "owl"))}


def test_each_guidance_is_a_row_with_measures_by_class(run, of_classes, tmp_path):
    command = ["evaluate", of_classes, *options(tmp_path, "--steps", 2, "--guidance", "1,3,0")]
    code, said, err = run(*command, "--guidance-interval", "0.2,1")
    assert (code, err) == (0, "") and "by class" in said and " labels " in said and "guidance 3" in said
    rows = rows_of(tmp_path / "out")
    assert [(row.get("guidance"), row.get("guidance_interval")) for row in rows] == [
        (None, None), (1, "0,1"), (3, "0.2,1"), (0, "0.2,1")]
    assert all(row.keys() > BY_CLASS for row in rows)
    assert len({row["frechet_distance"] for row in rows}) == 4
    for row in rows:
        own = [row[f"frechet_distance/{name}"] for name in ("cat", "dog", "owl")]
        assert row["frechet_distance_class_mean"] == pytest.approx(np.mean(own)) and 0 <= row["label_accuracy"] <= 1
    with open(tmp_path / "out" / "evaluate.csv", newline="") as file:
        assert {line["guidance"] for line in csv.DictReader(file)} == {"", "1.0", "3.0", "0.0"}
    run(*command, "--guidance-interval", "0.2,1")
    assert rows_of(tmp_path / "out") == rows
    run(*command, "--guidance", 3)
    assert len(rows_of(tmp_path / "out")) == 5


def test_a_network_is_prepared_once_for_all_its_rows_and_leaves_before_the_next(run, of_classes, tmp_path, monkeypatch):
    prepared, prepare = [], load.sampler

    def prepare_next(net, *more):
        assert left == prepared
        prepared.append(net)
        return prepare(net, *more)

    left, leave = [], dansm.UNet.cpu
    monkeypatch.setattr(load, "sampler", prepare_next)
    monkeypatch.setattr(dansm.UNet, "cpu", lambda net: left.append(net) or leave(net))
    other = make_run(tmp_path / "other", data=tmp_path / "animals", classes=("cat", "dog", "owl"))
    assert run("evaluate", of_classes, other, *options(tmp_path, "--guidance", "1,2", "--count", 10))[0] == 0
    assert len(rows_of(tmp_path / "out")) == 1 + 2 * 2 * 2 and len({id(net) for net in prepared}) == len(prepared) == 2
    assert left == prepared
    run("evaluate", of_classes, other, *options(tmp_path, "--guidance", "1,2", "--count", 10))
    assert len(prepared) == 2


def test_all_rows_of_a_network_are_drawn_in_the_batches_that_the_largest_fits(run, of_classes, tmp_path, monkeypatch):
    batches, draw = [], evaluate.sample_images

    def fitting(net, device, guidance):
        assert not batches  # later the first row's graphs would count as free memory
        return 20 if guidance.weight == 1 else 10

    def drawn(*arguments, **settings):
        batches.append(settings["batch"])
        return draw(*arguments, **settings)

    monkeypatch.setattr(evaluate, "at_once", fitting)
    monkeypatch.setattr(evaluate, "sample_images", drawn)
    assert run("evaluate", of_classes, *options(tmp_path, "--guidance", "1,2"))[0] == 0
    assert batches == [10] * 4


def test_samples_have_the_labels_that_the_real_images_have(run, of_classes, tmp_path, monkeypatch):
    labels, draw = [], evaluate.sample_images

    def kept(*arguments, **settings):
        labels.append(settings["labels"])
        return draw(*arguments, **settings)

    monkeypatch.setattr(evaluate, "sample_images", kept)
    assert run("evaluate", of_classes, *options(tmp_path, "--count", 200, "--batch", 100))[0] == 0
    assert torch.equal(*labels) and labels[0].bincount().tolist() == pytest.approx([50, 100, 50], abs=20)
    run("evaluate", of_classes, *options(tmp_path, "--count", 30, "--seed", 1, "--steps", 2))
    assert not torch.equal(labels[2], labels[0][:30])


def test_a_model_without_classes_beside_one_with_them_has_the_row_that_it_has_alone(run, of_classes, tmp_path):
    plain = make_run(tmp_path / "plain", data=tmp_path / "animals")
    run("evaluate", plain, *options(tmp_path, "--steps", 2))
    alone = rows_of(tmp_path / "out")
    run("evaluate", of_classes, plain, *options(tmp_path, "--steps", 2))
    rows = rows_of(tmp_path / "out")
    assert rows[:2] == alone and not BY_CLASS & alone[1].keys()
    assert [row["model"] for row in rows[2:]] == ["real images", str(of_classes)]


def test_labels_come_from_the_training_or_from_where_they_are_said_to(run, refused, of_classes, images, tmp_path):
    def evaluated(*more):
        code, said, _ = run("evaluate", of_classes, *options(tmp_path, "--steps", 2, *more))
        assert code == 0
        return rows_of(tmp_path / "out")[-1], said

    row, _ = evaluated()
    again, _ = evaluated("--data", tmp_path / "animals", "--labels", "auto")
    assert again == row
    row, said = evaluated("--data", images)
    assert "classes are not measured" in said and not BY_CLASS & row.keys() and row["guidance"] == 1
    np.save(tmp_path / "labels.npy", np.arange(24) % 3)
    said = refused("evaluate", of_classes, *options(tmp_path, "--data", images, "--labels", tmp_path / "labels.npy"))
    assert "labels.npy has the class 0, the model knows cat, dog, owl" in said


def test_classes_are_measured_without_the_images_that_cannot_be_read(run, of_classes, tmp_path, monkeypatch):
    (tmp_path / "animals" / "cat" / "03.png").write_text("none")
    command = ["evaluate", of_classes, *options(tmp_path, "--steps", 2, "--skip-unreadable")]
    said = run(*command)[1]
    rows = rows_of(tmp_path / "out")
    assert "not measured" not in said and rows[-1]["real_images"] == 31 and rows[-1].keys() > BY_CLASS
    (tmp_path / "out" / "evaluate.json").unlink()
    monkeypatch.setattr(room, "_measure", lambda *_: pytest.fail("measured again"))
    run(*command)
    assert measures_of(rows_of(tmp_path / "out")) == measures_of(rows)
    (tmp_path / "animals" / "cat" / "03.png").unlink()
    run(*command)
    assert measures_of(rows_of(tmp_path / "out")) == measures_of(rows)


def measures_of(rows):
    return [{name: row[name] for name in (*BY_CLASS, "recall")} for row in rows]


def test_what_guidance_and_classes_cannot_be_is_refused(refused, model, of_classes, tmp_path, monkeypatch):
    monkeypatch.setattr(room, "_measure", lambda *_: pytest.fail("measured before"))
    other = make_run(tmp_path / "other", data=tmp_path / "animals", classes=["cat", "dog"])
    for models, more, named in (
            ((model,), ("--guidance", "1,2"), "trained without labels"),
            ((of_classes,), ("--guidance", "x"), "--guidance is 'x'"),
            ((model,), ("--labels", "folders"), "trained without labels"),
            ((of_classes, other), (), "different classes"),
            ((of_classes,), ("--labels", "nowhere.npy"), "nowhere.npy")):
        said = refused("evaluate", *models, *options(tmp_path, *more))
        assert named in said and "expected" in said
    assert files_of(tmp_path / "out") == []


# ------------------------------------------------------------------------------- bad input


def test_bad_input_is_one_line_that_names_it(refused, model, images, tmp_path):
    def refuses(*arguments):
        said = refused("evaluate", *arguments)
        assert "expected" in said
        return said

    assert "none" in refuses(tmp_path / "none", *options(tmp_path))
    assert "--steps is '3,x'" in refuses(model, *options(tmp_path, "--steps", "3,x"))
    assert "is nothing, which" in refuses(model, *options(tmp_path, "--features", "nothing"))
    diffusion = make_run(tmp_path / "diffusion", "diffusion", data=images)
    assert "--steps is 1" in refuses(diffusion, *options(tmp_path, "--steps", "1"))
    assert "--solver" in refuses(diffusion, *options(tmp_path, "--solver", "heun"))
    latent = make_run(tmp_path / "latent", channels=4, data=images)
    assert "latents of 4 channels" in refuses(model, latent, *options(tmp_path))
    np.save(tmp_path / "latents.npy", np.zeros((9, 4, 16, 16), np.float32))
    assert "latents" in refuses(model, *options(tmp_path, "--data", tmp_path / "latents.npy"))
    other = make_run(tmp_path / "other", data=tmp_path / "elsewhere")
    assert "--data" in refuses(model, other, *options(tmp_path))
    assert "elsewhere" in refuses(other, *options(tmp_path))
    few = make_images(tmp_path / "few", count=1)
    assert "1 real image:" in refuses(model, *options(tmp_path, "--data", few))
    mixed = make_images(tmp_path / "mixed")
    noise_image(17, 20).save(mixed / "other.png")
    assert "other.png" in refuses(model, *options(tmp_path, "--data", mixed))
    assert "count" in refused("evaluate", model, *options(tmp_path, "--count", 1))
    assert files_of(tmp_path / "out") == []
    for damaged in ("[]", "{", '{"rows": 3}', '{"rows": [{}]}'):
        (tmp_path / "out" / "evaluate.json").write_text(damaged)
        assert "evaluate.json" in refuses(model, *options(tmp_path))
        assert (tmp_path / "out" / "evaluate.json").read_text() == damaged
