"""What noises tell about classes: against what is known of N(0, I), and on images whose class is their brightness."""

import csv

import numpy as np
import pytest
import torch
from support import noise_image

from dansm.scale.base.statistics import told_class
from dansm.scale.studies import conditions

THREE = torch.arange(600) % 3


def test_a_linear_probe_tells_nothing_from_random_noise_and_all_from_noises_apart():
    z = torch.randn(6000, 2, 3)
    labels = torch.arange(6000) % 3
    assert told_class(z, labels) == pytest.approx(1 / 3, abs=0.03)
    assert told_class(z + 20 * labels[:, None, None], labels) == 1


def test_chance_is_the_same_where_one_class_is_nine_times_as_large():
    labels = (torch.arange(20_000) % 10 == 0).long()
    assert told_class(torch.randn(20_000, 3), labels) == pytest.approx(1 / 2, abs=0.04)


def test_noises_that_are_told_are_not_those_that_the_probe_has_seen():
    """A noise of 10,000 numbers is nearest to a mean of few, of which it is one."""
    shares = [told_class(torch.randn(10, 10_000), torch.arange(10) % 2) for _ in range(40)]
    assert np.mean(shares) == pytest.approx(1 / 2, abs=0.25)


def test_the_mean_of_a_class_is_one_standard_error_long_without_a_shift():
    """With a shift δ its expected square is 1 + n‖δ‖²/D."""
    z = torch.randn(600, 3000)
    leak = conditions.measure_leak(z, THREE)
    assert leak["class_mean_average"] == pytest.approx(1, abs=0.03)
    z[THREE == 2] += 0.1
    leak = conditions.measure_leak(z, THREE)
    assert leak["class_mean_largest"] == pytest.approx((1 + 200 * 0.1**2) ** 0.5, rel=0.05)
    assert leak["class_mean_average"] == pytest.approx((2 + leak["class_mean_largest"]) / 3, abs=0.03)


def test_sizes_are_those_of_the_quarters_of_each_pools_life():
    """Pools of 8, in order; and pools of 4 for each class, which come in turn."""
    place = torch.arange(24)
    for groups, labels, age in ((None, torch.zeros(24).long(), place % 8 // 2), (2, place % 2, place // 2 % 4)):
        z = (1 + age.float()).sqrt()[:, None].expand(-1, 5)
        leak = conditions.measure_leak(z, labels, match_size=4 if groups else 8, groups=groups)
        assert (leak["size_first_quarter"], leak["size_last_quarter"]) == pytest.approx((1, 4))


@pytest.mark.parametrize("life", [1, 2, 3, 5])
def test_the_least_pool_has_a_first_and_a_last_quarter(life):
    z = (1 + torch.arange(2 * life) % life).float().sqrt()[:, None].expand(-1, 5)
    leak = conditions.measure_leak(z, torch.zeros(2 * life).long(), match_size=life)
    expected = (1.5, 4.5) if life == 5 else (1, life)
    assert (leak["size_first_quarter"], leak["size_last_quarter"]) == pytest.approx(expected)


@pytest.mark.parametrize("match_size", [19, 20])
def test_pools_that_would_give_random_pairs_are_left_out(match_size):
    pools = [name for name in conditions.couplings(match_size, 10) if "for each class" in name]
    assert pools == (["a pool of 2 for each class"] if match_size == 20 else [])


def by_brightness(count):
    """Images (count, 3, 4, 4) of two classes: dark and bright."""
    labels = np.random.default_rng(0).integers(0, 2, count)
    pixels = np.random.default_rng(1).integers(0, 128, (count, 3, 4, 4), np.uint8)
    return torch.from_numpy(pixels + 128 * labels[:, None, None, None].astype(np.uint8)), labels


def test_one_pool_and_one_assignment_leak_the_class_and_those_within_classes_do_not():
    rows = list(conditions.leakage(*by_brightness(3000), 500, seed=0, device="cpu"))
    told = {row["coupling"]: row["class_told"] for row in rows}
    assert list(told) == ["random pairs", "one pool of 500", "a pool of 250 for each class", "assigned within 500",
                          "assigned within 500, by class", "nearest of 16"]
    for name, share in told.items():
        leaks = name in ("one pool of 500", "assigned within 500", "nearest of 16")
        assert share > 0.8 if leaks else share == pytest.approx(0.5, abs=0.06), name
    means = {row["coupling"]: row["class_mean_largest"] for row in rows}
    assert means["one pool of 500"] > 3 and means["a pool of 250 for each class"] < 1.4
    assert {row["seed"] for row in rows} == {0}


def test_of_large_samples_only_what_memory_holds_is_probed(monkeypatch):
    monkeypatch.setattr(conditions, "MOST_BYTES", 4 * 48 * 60)
    sizes = []
    monkeypatch.setattr(conditions, "told_class", lambda z, labels: sizes.append((len(z), len(labels))) or 0.0)
    rows = list(conditions.leakage(*by_brightness(300), 200, seed=0, device="cpu"))
    assert set(sizes) == {(60, 60)}
    assert [row["coupling"] for row in rows][1:3] == ["one pool of 60", "a pool of 30 for each class"]
    assert all(value == value for row in rows for value in row.values())  # NaN is not


@pytest.fixture
def classes(tmp_path):
    for place, name in enumerate(("cat", "dog")):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(10):
            noise_image(8, 8, seed=10 * place + number).save(tmp_path / "data" / name / f"{number}.png")
    return tmp_path / "data"


def test_the_command_writes_a_row_for_each_coupling_and_draw(run, classes, tmp_path):
    out = tmp_path / "out"
    code, said, _ = run("paths", "--data", classes, "--labels", "folders", "--match-size", "5,10", "--count", 10,
                        "--seeds", 2, "--seed", 3, "--device", "cpu", "--out", out)
    assert code == 0 and str(out / "leakage.csv") in said and "one pool of 10: class told" in said
    rows = list(csv.DictReader((out / "leakage.csv").open()))
    assert [row["seed"] for row in rows] == ["3"] * 6 + ["4"] * 6
    assert all(0 <= float(row["class_told"]) <= 1 and float(row["class_mean_average"]) > 0 for row in rows)
    run("paths", "--data", classes, "--match-size", 10, "--count", 10, "--seeds", 1, "--out", tmp_path / "without")
    assert not (tmp_path / "without" / "leakage.csv").exists()


def test_it_is_said_where_memory_holds_less_than_a_pool(run, classes, tmp_path, monkeypatch):
    def said(samples):
        monkeypatch.setattr(conditions, "MOST_BYTES", 4 * 3 * 8 * 8 * samples)
        return run("paths", "--data", classes, "--labels", "folders", "--match-size", 15, "--count", 15, "--seeds", 2,
                   "--device", "cpu", "--out", tmp_path / "out")[1]

    enough, less = said(15), said(14)
    assert "1 GB" not in enough and "one pool of 15:" in enough
    assert less.count("pools of 14") == 1 and "one pool of 14:" in less and "nan" not in less


def test_data_without_classes_or_with_too_few_of_one_is_refused(refused, classes, images):
    options = "--match-size", 10, "--count", 10
    assert "--labels is auto" in refused("paths", "--data", images, "--labels", "auto", *options)
    for number in range(6):
        (classes / "dog" / f"{number}.png").unlink()
    said = refused("paths", "--data", classes, "--labels", "folders", *options)
    assert "dog" in said and "4 samples" in said and "5" in said


def test_noises_that_are_normal_within_classes_pass_and_a_small_shift_towards_the_class_does_not():
    """0.3 along the class's direction, which is one of 400, is three and more standard errors of each class's mean."""
    x = torch.randn(600, 400) + THREE[:, None] * torch.linspace(0, 1, 400)
    directions = conditions.class_means(x, THREE)
    assert torch.allclose(directions.norm(dim=1), torch.ones(3))
    found = [conditions.class_p(torch.randn(600, 400), THREE, directions) for _ in range(40)]
    assert sum(p < 0.1 for p in found) < 12
    z = torch.randn(600, 400)
    shifted = conditions.class_p(z + 0.3 * directions[THREE], THREE, directions)
    assert shifted < 1e-4 < conditions.class_p(z, THREE, directions)
    assert conditions.class_p(1.2 * z, THREE, directions) < 1e-6  # seen anywhere
