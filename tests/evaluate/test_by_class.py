"""Measures by class: against known distances, a probe of another library, and samples of wrong classes."""

import numpy as np
import pytest
import torch
from features import SEEN, digits, seen
from sklearn.linear_model import LogisticRegression

from dansm import BadInput
from dansm.scale.base.statistics import frechet_distance
from dansm.scale.data.labels import Labels
from dansm.scale.evaluate import by_class, real_features
from dansm.scale.evaluate.by_class import Classes

NAMES = list("abcdefghij")
DISTANCE = "frechet_distance"


@pytest.fixture(scope="module")
def real():
    """Real features of 1,200 digits, and their labels."""
    images, numbers = digits(1200)
    return real_features.real_features(images, SEEN, "cpu"), Labels(numbers.numpy(), NAMES, "digits")


@pytest.fixture(scope="module")
def others():
    """Features of 597 digits that are not among the real ones, and their classes."""
    images, numbers = digits(1797)
    return seen(images[1200:]), numbers[1200:]


@pytest.fixture
def classes(real):
    return Classes(NAMES, real[1], real[0])


# ------------------------------------------------------------------------------- drawn labels


def test_labels_are_drawn_as_often_as_the_data_has_them_by_number_and_seed_alone():
    numbers = np.array([0] * 70 + [2] * 20 + [1] * 10)
    classes = Classes(["a", "b", "c"], Labels(numbers, ["a", "b", "c"], ""))
    drawn = classes.drawn(range(20_000), 0)
    shares = drawn.bincount() / len(drawn)
    assert shares.tolist() == pytest.approx([0.7, 0.1, 0.2], abs=0.015)
    assert torch.equal(classes.drawn(range(5, 300), 0), drawn[5:300])
    assert not torch.equal(classes.drawn(range(300), 1), drawn[:300])


def test_without_labels_each_class_is_drawn_and_none_is_measured(real):
    classes = Classes(["a", "b", "c", "d"], None, real[0])
    assert (classes.drawn(range(8000), 0).bincount() / 8000).tolist() == pytest.approx([0.25] * 4, abs=0.02)
    assert not classes.measured
    assert classes.score(torch.randn(9, 20), torch.zeros(9), DISTANCE) == classes.floor(9, 0, DISTANCE) == {}


def test_labels_of_other_numbers_go_by_their_names(real):
    numbers = real[1].numbers
    reversed_names = Labels(9 - numbers, NAMES[::-1], "digits")
    assert torch.equal(Classes(NAMES, reversed_names, real[0]).numbers, torch.from_numpy(numbers))
    more = Classes([*NAMES, "k"], real[1], real[0])
    assert more.measured and torch.equal(more.numbers, torch.from_numpy(numbers))
    with pytest.raises(BadInput, match=r"digits has the class j, the model knows a, b, c, d, e, f, g, h, i: expected"):
        Classes(NAMES[:-1], real[1], real[0])


def test_labels_of_more_images_than_were_read_measure_nothing(real):
    labels = Labels(np.append(real[1].numbers, 0), NAMES, "digits")
    assert not Classes(NAMES, labels, real[0]).measured


@pytest.mark.parametrize("kept", [7, 40, 60])
def test_labels_are_those_of_the_images_whose_features_are_kept(monkeypatch, kept):
    monkeypatch.setattr(real_features, "KEPT", kept)
    images, _ = digits(50)
    real = real_features.real_features(images, SEEN, "cpu")
    places = real_features.kept_places(50)
    assert len(places) == min(kept, 50) and torch.equal(real.features, seen(images[places]))


# ------------------------------------------------------------------------------- measures


def test_each_class_has_its_distance_and_the_mean_theirs(classes, real, others):
    row = classes.score(*others, DISTANCE)
    assert list(row) == [*(f"{DISTANCE}/{name}" for name in NAMES), f"{DISTANCE}_class_mean", "label_accuracy"]
    for number, name in ((0, "a"), (7, "h")):
        of_class = torch.from_numpy(real[1].numbers) == number
        expected = frechet_distance(others[0][others[1] == number], real[0].features[of_class])
        assert row[f"{DISTANCE}/{name}"] == pytest.approx(expected)
    assert row[f"{DISTANCE}_class_mean"] == pytest.approx(np.mean(list(row.values())[:10]))


def test_classes_of_too_few_images_have_no_distance_and_then_there_is_no_mean(classes, others):
    features, labels = others
    few = torch.cat([(labels == 3).nonzero()[: by_class.LEAST - 1], (labels != 3).nonzero()]).squeeze()
    assert classes.score(features[few], labels[few], DISTANCE).keys() == {
        *(f"{DISTANCE}/{name}" for name in NAMES if name != "d"), "label_accuracy"}


def test_the_probe_tells_labels_about_as_well_as_a_logistic_regression(classes, real, others):
    features = real[0].features
    trained = np.arange(len(features)) % by_class.HELD_OUT > 0
    mean, std = features.mean(0), features.std(0)
    known = LogisticRegression(max_iter=500).fit((features - mean)[trained] / std, real[1].numbers[trained])
    expected = known.score((features - mean)[~trained] / std, real[1].numbers[~trained])
    assert classes.floor(500, 0, DISTANCE)["label_accuracy"] == pytest.approx(expected, abs=0.1)
    assert classes.score(*others, DISTANCE)["label_accuracy"] == pytest.approx(expected, abs=0.1) and expected > 0.7


def test_samples_of_wrong_classes_are_told_from_right_ones(classes, others):
    features, labels = others
    right, wrong = classes.score(features, labels, DISTANCE), classes.score(features, (labels + 1) % 10, DISTANCE)
    assert wrong["label_accuracy"] < 0.1 < right["label_accuracy"] / 5
    assert wrong[f"{DISTANCE}_class_mean"] > 2 * right[f"{DISTANCE}_class_mean"]
    half = classes.score(features, torch.where(torch.arange(len(labels)) % 2 == 0, labels, (labels + 1) % 10), DISTANCE)
    assert half["label_accuracy"] == pytest.approx(right["label_accuracy"] / 2, abs=0.05)


def test_the_floor_is_of_the_images_that_the_other_floor_is_of(classes, real):
    row = classes.floor(700, 3, DISTANCE)
    images = real_features.shuffled(torch.arange(1200), 3)[:700]
    expected = classes.score(real[0].features[images], torch.from_numpy(real[1].numbers)[images], DISTANCE)
    assert {**row, "label_accuracy": 0} == {**expected, "label_accuracy": 0}
    assert row["label_accuracy"] < expected["label_accuracy"]  # which the probe was trained on
