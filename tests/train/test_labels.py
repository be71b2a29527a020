"""Runs with labels: their pairs, what they say and keep, and what they are not resumed with."""

import shutil

import numpy as np
import pytest
import torch
from runs import contents_of, same_run
from support import FAST, in_processes, needs_gloo, noise_image, same, state_of

import dansm
from dansm.scale.matching import optimal
from dansm.scale.model.load import load_model
from dansm.scale.train.watch import Watch

NAMES = ["bird", "cat", "dog"]
LABELS = ("--labels", "folders")


@pytest.fixture
def images(tmp_path):
    """Five images of each class; those of a class are of one colour."""
    for number, name in enumerate(NAMES):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(5):
            image = noise_image(8, 8, seed=i).point(lambda value, number=number: value // 4 + 90 * number)
            image.save(tmp_path / "images" / name / f"{i}.png")
    return tmp_path / "images"


@pytest.fixture
def train(run, images, tmp_path):
    """Trains the images with their labels into the folder `out`; returns what it printed."""

    def train(*options, data=images, out="out", labels=LABELS):
        code, said, err = run("train", data, *labels, "--log-steps", 1, "--out", tmp_path / out, *FAST, *options)
        assert (code, err) == (0, "")
        return said

    return train


@pytest.fixture
def not_trained(refused, images, tmp_path):
    """Calls the command, which must be refused and leave all as it was; returns the message."""

    def not_trained(*options, data=images, labels=LABELS):
        before = contents_of(tmp_path / "out")
        message = refused("train", data, *labels, "--steps", 4, "--out", tmp_path / "out", *FAST, *options)
        assert contents_of(tmp_path / "out") == before
        return message

    return not_trained


@pytest.fixture
def pairs(monkeypatch):
    """The (x, z, labels) that are trained on."""
    seen, real = [], Watch.pairs

    def watched(*arguments):
        for pair in real(*arguments):
            seen.append(pair)
            yield pair

    monkeypatch.setattr(Watch, "pairs", watched)
    return seen


def test_each_class_is_matched_by_a_pool_of_its_own(train, pairs):
    said = train("--steps", 9, "--no-flip")
    assert "3 classes" in said and ", ".join(NAMES) in said and "--match-labels no" in said
    pool = dansm.NoisePool(10, (3, 8, 8), seed=0, groups=3)
    for x, z, labels in pairs:
        assert torch.equal((x.flatten(1).min(1).values * 127.5 + 127.5).long() // 85, labels)  # its colour
        assert torch.equal(z, pool(x, labels))
    assert len({tuple(labels.tolist()) for _, _, labels in pairs}) > 1


@pytest.mark.parametrize("options", [("--match-size", 0), ("--match-size", 1), ("--method", "random"),
                                     ("--method", "optimal", "--match-size", 1), ("--method", "nearest")])
def test_nothing_is_said_of_matching_classes_where_no_noise_depends_on_other_samples(train, options):
    said = train("--steps", 1, *options)
    assert "3 classes" in said and "--match-labels" not in said and "matched" not in said


def test_one_pool_for_all_classes_gives_the_pairs_of_a_run_without_labels(train, pairs):
    assert "--match-labels yes" in train("--steps", 5, "--match-labels", "no")
    with_labels = pairs.copy()
    pairs.clear()
    train("--steps", 5, out="other", labels=())
    assert [len(pair) for pair in pairs] == [2] * 5
    assert same([pair[:2] for pair in with_labels], pairs)


def test_a_network_knows_its_classes(train, tmp_path):
    train("--steps", 2, "--label-dropout", 0.25)
    state = state_of(tmp_path / "out")
    assert state["classes"] == NAMES and state["network"]["label_dropout"] == 0.25
    model = load_model(tmp_path / "out")
    assert model.classes == NAMES and model.net.classes == 3


def test_a_run_without_labels_keeps_what_it_kept_before(train, tmp_path):
    train("--steps", 2, labels=())
    state = state_of(tmp_path / "out")
    assert sorted(state) == ["dansm", "data", "images", "latents", "look", "network", "ranks", "recipe", "seconds",
                             "training"]
    assert not {"classes", "label_dropout"} & state["network"].keys()
    assert sorted(state["ranks"][0]["pool"]) == ["generator", "index", "made_for", "number", "own",
                                                        "prices", "seed"]
    assert "label.weight" not in state["training"]["net"]


@pytest.mark.parametrize(("method", "match_labels"), [("greedy", "yes"), ("greedy", "no"), ("random", "yes"),
                                                      ("nearest", "yes")])
def test_a_run_resumed_in_the_middle_is_the_run_that_never_stopped(train, tmp_path, method, match_labels):
    options = "--method", method, "--match-labels", match_labels
    train("--steps", 12, *options, out="once")
    train("--steps", 5, *options, out="twice")
    halfway = state_of(tmp_path / "twice")
    assert "resuming from step 5" in train("--steps", 12, *options, out="twice")
    assert same_run(tmp_path / "once", tmp_path / "twice")
    assert not same(state_of(tmp_path / "twice")["training"], halfway["training"])


@needs_gloo
@pytest.mark.slow
@pytest.mark.parametrize("match_scope", ["rank", "global"])
def test_two_processes_resumed_are_the_run_that_never_stopped(images, tmp_path, match_scope):
    command = ["train", images, *LABELS, "--match-scope", match_scope, "--accumulate", 2, "--log-steps", 1, *FAST]
    once, twice = tmp_path / "once", tmp_path / "twice"
    codes, said = in_processes(tmp_path, [*command, "--steps", 8, "--out", once],
                               [*command, "--steps", 3, "--out", twice], [*command, "--steps", 8, "--out", twice])
    assert codes == [[0, 0, 0]] * 2, said
    assert "resuming from step 3" in said[0] and same_run(once, twice)
    assert len(state_of(once)["ranks"]) == 2 and state_of(once)["classes"] == NAMES


def test_optimal_pairs_are_assigned_within_each_class(train, pairs):
    train("--steps", 3, "--method", "optimal", "--match-size", 24)
    x, z, labels = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    for number in range(3):
        members = labels == number
        best = optimal(dansm.cost_matrix(x[members], z[members])).picks
        assert torch.equal(best, torch.arange(members.sum()))
    for part in zip(x.split(24), z.split(24), strict=True):  # across the classes there are nearer noises
        assert not torch.equal(optimal(dansm.cost_matrix(*part)).picks, torch.arange(len(part[0])))


def test_a_run_is_not_resumed_with_other_labels(train, not_trained, images, tmp_path):
    train("--steps", 2)
    assert "network classes 3 → None" in not_trained(labels=())
    assert "label_dropout 0.1 → 0.2" in not_trained("--label-dropout", 0.2)
    assert "match_labels yes → no" in not_trained("--match-labels", "no")
    numbers = np.repeat([0, 1, 2], 5)
    np.save(tmp_path / "a.npy", numbers)
    assert "classes bird, cat, dog → 0, 1, 2" in not_trained(labels=("--labels", tmp_path / "a.npy"))
    np.save(tmp_path / "b.npy", numbers[::-1])
    train("--steps", 2, "--fresh", labels=("--labels", tmp_path / "a.npy"))
    assert "other labels" in not_trained(labels=("--labels", tmp_path / "b.npy"))
    shutil.move(tmp_path / "a.npy", tmp_path / "c.npy")
    assert "resuming" in train("--steps", 4, labels=("--labels", tmp_path / "c.npy"))


def test_labels_that_cannot_be_used_are_refused_before_anything_is_written(not_trained, images, tmp_path):
    np.save(tmp_path / "a.npy", np.arange(14))
    assert "14 labels" in not_trained(labels=("--labels", tmp_path / "a.npy"))
    (images / "fish").mkdir()
    assert str(images / "fish") in not_trained()
    assert not (tmp_path / "out").exists()


def test_the_pools_of_all_classes_must_fit(not_trained, tmp_path, monkeypatch):
    noise = 3 * 8 * 8 * 4  # bytes
    monkeypatch.setattr("dansm.scale.base.machine.free_memory", lambda _: 3 * 1000 * noise - 1)
    assert "each of 3 classes" in not_trained("--match-size", 1000)


OF_LABELS = [("--label-dropout", "0.3"), ("--match-labels", "no")]


@pytest.mark.parametrize(("option", "value"), [*OF_LABELS, ("--match-labels", "yes")])
def test_an_option_for_labels_is_refused_without_them(not_trained, option, value):
    assert f"{option} is {value}, and --labels is none" in not_trained(option, value, labels=())


@pytest.mark.parametrize(("option", "value"), OF_LABELS)
def test_an_option_for_labels_is_refused_where_the_data_has_none(not_trained, images, option, value):
    noise_image(8, 8).save(images / "x.png")
    said = not_trained(option, value, labels=("--labels", "auto"))
    assert f"{option} is {value}, and {images} has no labels" in said


def test_a_recipe_may_name_what_is_for_labels(train, not_trained, images, tmp_path):
    """A run's own recipe names all settings, as every run writes them. One that asks for labels must find some."""
    train("--steps", 2, labels=(), out="plain")
    train("--steps", 3, data=tmp_path / "plain" / "recipe.toml", labels=(), out="plain")
    (tmp_path / "mine.toml").write_text(f'data = "{images}"\nlabels = "auto"\nmatch_labels = "no"\n')
    train("--steps", 2, data=tmp_path / "mine.toml", labels=())
    train("--steps", 2, data=tmp_path / "mine.toml", labels=("--labels", "none"), out="other")
    noise_image(8, 8).save(images / "x.png")
    assert "--match-labels is no" in not_trained(data=tmp_path / "mine.toml", labels=())


def test_it_is_said_where_there_are_no_labels_or_the_pools_outlast_the_training(train, images):
    assert "of 10 noises for bird outlasts the 8 images of that class in all steps" in train("--steps", 3)
    shutil.rmtree(images / "dog")
    noise_image(8, 8).save(next((images / "cat").iterdir()).with_name("more.png"))  # 5 birds, 6 cats
    assert "of 10 noises for bird outlasts" in train("--steps", 2, out="unequal")
    assert "outlasts" not in train("--steps", 3, out="enough")
    assert "outlasts" not in train("--steps", 3, "--match-labels", "no", out="b")
    noise_image(8, 8).save(images / "x.png")
    assert f"{images} has no labels" in train("--steps", 3, labels=("--labels", "auto"), out="c")


def test_labels_of_images_that_cannot_be_read_are_left_out(train, not_trained, images, pairs):
    (images / "bird" / "0.png").write_bytes(b"")
    train("--steps", 9, "--no-flip", "--skip-unreadable")
    for number in range(5):
        (images / "cat" / f"{number}.png").write_bytes(b"")
    assert "class cat" in not_trained("--skip-unreadable")
    for x, _, labels in pairs:
        assert torch.equal((x.flatten(1).min(1).values * 127.5 + 127.5).long() // 85, labels)
