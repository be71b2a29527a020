"""The measures against closed forms, and against what worse images must do to them."""

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from features import PIXELS, SEEN, digits, features_in_batches, seen
from torch_fidelity import metric_fid, metric_kid, metric_prc

from dansm.scale.base.statistics import frechet_distance
from dansm.scale.evaluate import measures
from dansm.scale.evaluate.extractors import Extractor
from dansm.scale.evaluate.measures import Reference
from dansm.scale.evaluate.real_features import Real, real_features


def real_of(features):
    """As if they were the features of real images."""
    mean, covariance = features.double().mean(0).numpy(), np.atleast_2d(np.cov(features.double().numpy().T))
    return Real("digest", len(features), (3, 8, 8), mean, covariance, features.float())


def reference_of(features, extractor=PIXELS):
    return Reference(real_of(features), extractor)


def exactly(mean, covariance, count=200):
    """Features with this very mean (D,) and covariance (D, D), float64 (count, D)."""
    x = torch.randn(count, len(mean), dtype=torch.float64)
    x -= x.mean(0)
    x = torch.linalg.solve_triangular(torch.linalg.cholesky(torch.atleast_2d(torch.cov(x.T))), x.T, upper=False).T
    return x @ torch.linalg.cholesky(covariance).T + mean


def blurred(images, passes):
    x = images.float()
    for _ in range(passes):
        x = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    return x.round().byte()


def noisy(images, deviation):
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    return (images + deviation * noise).round().clamp(0, 255).byte()


def of_classes(images, classes, kept):
    """Equally many images, of the first `kept` classes alone."""
    few = images[classes < kept]
    return few.repeat(len(images) // len(few) + 1, 1, 1, 1)[: len(images)]


def test_two_known_gaussians_have_the_distance_of_the_closed_form():
    """With covariances that commute: ‖μ − ν‖² + Σ(√a − √b)² of their eigenvalues a and b."""
    turned, _ = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))
    mu, nu = torch.randn(2, 6, dtype=torch.float64)
    a, b = torch.rand(2, 6, dtype=torch.float64) + 0.1
    x, y = exactly(mu, turned * a @ turned.T), exactly(nu, turned * b @ turned.T)
    expected = ((mu - nu).square().sum() + (a.sqrt() - b.sqrt()).square().sum()).item()
    assert measures.frechet_distance(x, reference_of(y)) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-6)


def test_features_of_one_number_have_a_distance_too():
    one = torch.ones(1, 1, dtype=torch.float64)
    x, y = exactly(0 * one[0], one), exactly(one[0], 4 * one)
    assert measures.frechet_distance(x, reference_of(y)) == pytest.approx(1 + 1, rel=1e-6)


@pytest.mark.parametrize(("count", "others", "length", "rank"), [
    (500, 700, 60, 60), (40, 50, 200, 200), (2, 300, 50, 50), (300, 300, 120, 7)])
def test_our_distance_is_torch_fidelitys_also_where_covariances_are_nearly_singular(count, others, length, rank):
    mixed = torch.randn(rank, length)
    x, y = (torch.randn(count, rank) @ mixed).float(), (1.2 * torch.randn(others, rank) @ mixed + 0.1).float()
    assert measures.frechet_distance(x, reference_of(y)) == pytest.approx(frechet_distance(x, y), rel=1e-3)


@pytest.mark.parametrize(("count", "others", "length", "whole"), [
    (300, 400, 30, False), (60, 50, 100, False), (3, 40, 5, False), (400, 90, 12, False), (350, 300, 6, True),
    (300, 400, 6, True)])
def test_every_measure_is_torch_fidelitys(count, others, length, whole):
    """Also of whole numbers, whose distances are often equal to a reach, and often 0."""
    x = 2 + torch.randn(count, length) * torch.linspace(0.1, 3, length)
    y = 2.3 + torch.randn(others, length) * torch.linspace(0.2, 2.5, length)
    if whole:
        x, y = x.round().clamp(1, 3), y.round().clamp(1, 3)
    reference = reference_of(y)
    row = measures.score(x, reference)
    statistics = metric_fid.fid_features_to_statistics(x.double())
    of_real = {"mu": reference.real.mean, "sigma": reference.real.covariance}
    fid = metric_fid.fid_statistics_to_metric(statistics, of_real, False)
    assert row["frechet_distance"] == pytest.approx(fid[metric_fid.KEY_METRIC_FID], rel=1e-6)
    kid = metric_kid.kid_features_to_metric(x, y, kid_subsets=measures.SUBSETS, verbose=False,
                                            kid_subset_size=min(measures.SUBSET, count, others))
    assert row["kernel_distance"] == pytest.approx(kid[metric_kid.KEY_METRIC_KID_MEAN], rel=1e-4)
    assert row["kernel_distance_std"] == pytest.approx(kid[metric_kid.KEY_METRIC_KID_STD], rel=1e-3, abs=1e-6)
    prc = metric_prc.prc_features_to_metric(x, reference.drawn(slice(-count, None)), verbose=False, prc_batch_size=7,
                                            prc_neighborhood=min(3, count - 1, others - 1), save_cpu_ram=True)
    assert row["precision"] == pytest.approx(prc[metric_prc.KEY_METRIC_PRECISION], abs=1e-6)
    assert row["recall"] == pytest.approx(prc[metric_prc.KEY_METRIC_RECALL], abs=1e-6)


def test_distances_come_in_blocks_of_any_size_and_reaches_of_real_images_once(monkeypatch):
    x, reference = torch.randn(90, 6), reference_of(torch.randn(120, 6))
    expected = measures.precision_recall(x, 90, reference)
    assert 0 < expected["precision"] < 1 and 0 < expected["recall"] < 1
    monkeypatch.setattr(measures, "DISTANCES_AT_ONCE", 700)  # seven rows of a hundred
    assert measures.precision_recall(x, 90, reference_of(reference.real.features)) == expected
    calls, reach = [], measures.reach
    monkeypatch.setattr(measures, "reach", lambda *given: calls.append(given) or reach(*given))
    assert measures.precision_recall(x, 90, reference) == expected and len(calls) == 1


def test_precision_and_recall_do_not_depend_on_how_far_from_0_features_lie():
    x, others = torch.randn(90, 6), torch.randn(120, 6)
    far = torch.full((6,), 1000.0)  # where squares of float32 have lost the distances
    expected = measures.precision_recall(x, 90, reference_of(others))
    found = measures.precision_recall(x + far, 90, reference_of(others + far))
    assert all(abs(found[name] - expected[name]) <= 0.03 for name in expected)


@pytest.mark.parametrize("batch", [7, 64])
def test_a_set_against_itself_is_at_0_in_any_order_and_any_batches(batch):
    images, _ = digits()
    real = features_in_batches(600, images, SEEN, "cpu")
    scale = np.trace(real.covariance)
    shuffled = images[torch.randperm(len(images))]
    row = measures.score(seen(shuffled), Reference(real, SEEN))
    assert abs(row["frechet_distance"]) < 1e-5 * scale
    assert -0.005 < row["kernel_distance"] <= 0  # without bias where no image is in both sets
    assert (row["precision"], row["recall"]) == (1, 1)
    again = features_in_batches(batch, shuffled, SEEN, "cpu")
    assert np.allclose(again.mean, real.mean, rtol=1e-5)
    assert np.allclose(again.covariance, real.covariance, rtol=1e-3, atol=1e-5 * scale)


@pytest.mark.parametrize(("kind", "features"), [("blur", SEEN), ("noise", SEEN), ("classes", PIXELS)])
def test_a_worse_generator_scores_worse(features, kind):
    images, classes = digits(600)
    reference = Reference(real_features(images[:300], features, "cpu"), features)
    images, classes = images[300:], classes[300:]
    worse = {"blur": lambda by: blurred(images, by), "noise": lambda by: noisy(images, 25 * by),
             "classes": lambda by: of_classes(images, classes, (10, 6, 3, 1)[by])}[kind]
    rows = [measures.score(features.extract(worse(by))[0], reference) for by in range(4)]
    for better, row in pairwise(rows):
        assert row["frechet_distance"] > 1.2 * better["frechet_distance"]
        assert row["kernel_distance"] > better["kernel_distance"]
    if kind != "noise":  # noise drives the samples apart, and so widens what counts as within reach of one
        assert rows[-1]["recall"] < rows[0]["recall"] - 0.1
    if kind != "classes":  # each image of few classes is as good as before
        assert rows[-1]["precision"] < rows[0]["precision"] - 0.1


def test_inception_score_is_the_count_of_classes_told_apart():
    sure = 50 * F.one_hot(torch.arange(1000) % 5, 8).float()
    reference = reference_of(torch.randn(50, 3))
    for logits, expected in ((sure, 5), (torch.zeros(1000, 8), 1)):
        row = measures.score(torch.randn(20, 3), reference, logits=logits)
        assert row["inception_score"] == pytest.approx(expected, rel=0.02)
    assert "inception_score" not in measures.score(torch.randn(20, 3), reference)


def test_only_on_inceptions_features_is_it_called_fid():
    x, others = torch.randn(20, 3), torch.randn(50, 3)
    assert {"fid", "kid"} <= measures.score(x, reference_of(others, Extractor("inception", "", None))).keys()
    assert not {"fid", "kid"} & measures.score(x, reference_of(others)).keys()
    assert not {"fid", "kid"} & measures.floor(reference_of(others), 10).keys()
    assert measures.score(x, reference_of(others), measures="distance").keys() == {"frechet_distance"}


def test_the_floor_is_between_random_real_images_and_all():
    images, _ = digits(1000)
    real = real_features(images, SEEN, "cpu")
    reference = Reference(real, SEEN)
    floors = [measures.floor(reference, count) for count in (50, 100, 300)]
    assert [row["count"] for row in floors] == [50, 100, 300]
    assert all(a["frechet_distance"] > b["frechet_distance"] > 0 for a, b in pairwise(floors))
    assert abs(floors[2]["kernel_distance"]) < 0.01 and floors[2]["precision"] > 0.7 and floors[2]["recall"] > 0.7
    assert floors[0] == measures.floor(reference, 50) != measures.floor(Reference(real, SEEN, seed=1), 50)
    for count in (1000, 10**6):  # all against all would be 0
        assert measures.floor(reference, count)["count"] == 500
    worse = measures.score(seen(noisy(images[:300], 60)), reference)
    assert worse["frechet_distance"] > 3 * floors[2]["frechet_distance"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_measures_what_a_cpu_does():
    x, others = torch.randn(3000, 200) + 3, 1.1 * torch.randn(4000, 200) + 3.1
    real = real_of(others)
    on_cpu, on_gpu = (measures.score(x, Reference(real, PIXELS, device=device)) for device in ("cpu", "cuda"))
    assert on_gpu == {name: pytest.approx(value, rel=1e-3, abs=1e-6) for name, value in on_cpu.items()}
