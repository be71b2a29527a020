"""The 2D toy: shapes, its two measures, a whole small run, and that matching wins at few steps."""

import json
from functools import partial
from itertools import count, islice
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from support import files_of

import dansm
from dansm.scale.base import text
from dansm.scale.base.files import read_csv
from dansm.scale.base.statistics import inter_path_distance
from dansm.scale.base.text import Stopped
from dansm.tiny import comparison, pictures, toy
from dansm.tiny.shapes import SHAPES


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_is_as_wide_as_the_noise_and_follows_its_seed(shape):
    x = toy.points(shape, 20_000, "test", 0)
    assert x.shape == (20_000, 2) and x.dtype == torch.float32 and torch.isfinite(x).all()
    assert x.mean(0).abs().max() < 0.05
    assert (x.std(0) - 1).abs().max() < 0.05
    assert x.equal(toy.points(shape, 20_000, "test", 0))
    assert not x.equal(toy.points(shape, 20_000, "test", 1))


def test_data_and_noise_of_one_seed_are_not_the_same_numbers():
    batches = toy.training_pairs("pinwheel", "random", 1, seed=0)
    x, z = next(batches)
    noise_of_data = torch.randn(x.shape, generator=torch.Generator().manual_seed(toy.seed_for("data", 0)))
    assert not torch.isclose(z, noise_of_data).any()


def test_every_method_sees_the_same_data():
    batches = {method: next(toy.training_pairs("two-moons", method, 16, seed=3))[0] for method in dansm.METHODS}
    taken = batches.pop("semidiscrete")
    assert all(x.equal(batches["random"]) for x in batches.values())
    assert taken.shape == (256, 2) and taken.unique(dim=0).equal(batches["random"][:16].unique(dim=0))


def test_semidiscrete_pairs_are_of_all_known_samples_and_fresh_noises():
    x, z = (torch.cat(part) for part in zip(*islice(toy.training_pairs("two-moons", "semidiscrete", 50, 0), 80),
                                            strict=True))
    _, counts = x.unique(dim=0, return_counts=True)
    assert len(counts) == 50 and (counts / len(x) * 50 - 1).square().mean().sqrt() < 0.3
    assert z.mean(0).abs().max() < 0.03 and (z.std(0) - 1).abs().max() < 0.03 and len(z.unique(dim=0)) == len(z)


def test_potentials_settle():
    x, z = toy.points("two-moons", 40, "test", 0), toy.points("noise", 50_000, "test", 0)
    shares = {name: (z @ x.T - b).argmax(1).bincount(minlength=40) / len(z)
              for name, b in toy.settling(x, 0).items()}
    off = [(40 * share - 1).abs().max() for share in shares.values()]
    assert (shares["zero"] == 0).sum() > 20 and min(off[:2]) > off[2] > off[3] and off[3] < 0.2


def segments_cross(a, b, c, d) -> bool:
    """Solve a + s (b − a) = c + t (d − c) for s and t."""
    lines = torch.stack([b - a, c - d], 1)
    s, t = torch.linalg.solve(lines, c - a)
    return bool(0 < s < 1 and 0 < t < 1)


def test_crossing_share_is_that_of_brute_force():
    x, z = torch.randn(2, 40, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    crossing = sum(segments_cross(z[i], x[i], z[j], x[j]) for i in range(40) for j in range(i))
    assert crossing > 50
    assert toy.crossing_share(x, z) == pytest.approx(crossing / (40 * 39 / 2))


def test_crossing_share_of_cases_known():
    z = torch.tensor([[-1.0, 0.0], [0.0, -1.0]])
    assert toy.crossing_share(-z, z) == 1  # a plus sign
    assert toy.crossing_share(z + torch.tensor([1.0, 0.0]), z) == 0  # parallel
    assert toy.crossing_share(2 * z, z) == 0  # apart


def test_wasserstein2_of_a_shifted_and_shuffled_set_is_the_shift_squared():
    x = toy.points("checkerboard", 300, "test", 0)
    moved = (x + torch.tensor([0.3, -0.4]))[torch.randperm(300, generator=torch.Generator().manual_seed(0))]
    assert toy.wasserstein2(x, moved) == pytest.approx(0.25, rel=1e-4)
    assert toy.wasserstein2(x, x.flip(0)) == pytest.approx(0, abs=1e-6)


def test_wasserstein2_on_a_line_pairs_in_order():
    a, b = torch.tensor([[0.0], [5.0], [1.0]]), torch.tensor([[6.0], [2.0], [0.0]])
    assert toy.wasserstein2(a, b) == pytest.approx((0 + 1 + 1) / 3)


def test_pairs_are_measured_over_a_whole_pool():
    """The first 1,000 pairs of a pool of 5,000 are much shorter than the last."""
    whole = toy.measure_pairs(toy.training_pairs("swiss-roll", "greedy", 5000, 0), 5000)
    start = toy.measure_pairs(toy.training_pairs("swiss-roll", "greedy", 5000, 0), 1)
    assert start["path_length"] < 0.8 * whole["path_length"]


def test_no_part_of_a_pool_is_measured():
    """1,000 pairs of pools of 700 would be one whole pool and the best served of the next."""
    whole = toy.measure_pairs(toy.training_pairs("swiss-roll", "greedy", 700, 0), 700)
    x, z = (torch.cat(part)[:1400] for part in zip(*islice(toy.training_pairs("swiss-roll", "greedy", 700, 0), 6),
                                                   strict=True))
    assert whole["path_length"] == pytest.approx(dansm.path_length(x, z))
    assert whole["path_length"] > 1.02 * dansm.path_length(x[:1000], z[:1000])


def test_matched_paths_are_farther_from_each_other():
    random, matched = (toy.measure_pairs(toy.training_pairs("two-moons", "greedy", size, 0), size) for size in (1, 300))
    assert matched["inter_path_mean"] > 1.2 * random["inter_path_mean"]
    x, z = (torch.cat(part)[:1000] for part in zip(*islice(toy.training_pairs("two-moons", "greedy", 1, 0), 4),
                                                   strict=True))
    assert random["inter_path_mean"] == pytest.approx(inter_path_distance(x, z).mean)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(toy, "POINTS", 200)
    monkeypatch.setattr(toy, "BATCH", 64)
    monkeypatch.setattr(toy, "KNOWN", 40)


def settings(**changes):
    return toy.Settings(**{"match_size": 50, "steps": 2, "seeds": 1, "seed": 0, "device": "cpu", **changes})


def test_a_run_writes_numbers_and_pictures(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pictures, "draw_flow", partial(pictures.draw_flow, frames=6))
    out = tmp_path / "new" / "folder"
    toy.run("eight-gaussians", settings(match_size=100, seeds=2), out)
    written = ["cells.png", "flow.gif", "pairs.png", "paths.png", "results.csv", "samples.png", "toy.json"]
    assert files_of(out) == written
    rows = read_csv(out / "results.csv")
    assert [row["shape"] for row in rows] == ["eight-gaussians"] * len(dansm.METHODS)
    assert [row["method"] for row in rows] == list(dansm.METHODS)
    sizes = "1", "100", "40", "100", "16"
    assert [(row["match_size"], row["seeds"]) for row in rows] == [(size, "2") for size in sizes]
    assert list(rows[0])[4:7] == ["path_length", "path_length_std", "crossing"]
    for steps in toy.STEPS_SHOWN:
        assert all(float(row[f"w2_{steps}_steps_std"]) > 0 for row in rows)
    trainings = json.loads((out / "toy.json").read_text())["trainings"]
    lengths = [training["path_length"] for training in trainings if training["method"] == "greedy"]
    assert float(rows[1]["path_length"]) == pytest.approx(sum(lengths) / 2, abs=1e-5)
    for name in ("pairs", "cells", "paths", "samples"):
        image = Image.open(out / f"{name}.png")
        assert image.width >= 900 and len(image.getcolors()) > 30
        assert 10_000 < (out / f"{name}.png").stat().st_size < 300_000
    flow = Image.open(out / "flow.gif")
    assert flow.n_frames == 14 and (out / "flow.gif").stat().st_size < 900_000
    printed = capsys.readouterr().out
    assert all(method in printed for method in dansm.METHODS)
    assert all(str(out / name) in printed for name in written)


def test_all_shapes_make_one_table_and_one_picture(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(toy, "draw", lambda *_: None)
    toy.run("all", settings(steps=1), tmp_path)
    rows = read_csv(tmp_path / "results.csv")
    assert [row["shape"] for row in rows] == [shape for shape in SHAPES for _ in dansm.METHODS]
    assert all((tmp_path / shape / "toy.json").exists() for shape in SHAPES)
    assert len(Image.open(tmp_path / "shapes.png").getcolors()) > 30
    printed = capsys.readouterr().out
    assert all(str(tmp_path / name) in printed for name in ("results.csv", "shapes.png"))


def test_stopping_keeps_the_seeds_that_are_done(small, tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "draw", lambda *_: None)
    train = toy.train_and_measure

    def stop_in_second_seed(shape, settings, method, seed):
        if (method, seed) == ("optimal", 1):
            raise KeyboardInterrupt
        return train(shape, settings, method, seed)

    monkeypatch.setattr(toy, "train_and_measure", stop_in_second_seed)
    with pytest.raises(Stopped, match="1 of 3 seeds in "):
        toy.run("two-moons", settings(seeds=3), tmp_path)
    trainings = json.loads((tmp_path / "toy.json").read_text())["trainings"]
    assert [(training["method"], training["seed"]) for training in trainings] == [(m, 0) for m in dansm.METHODS]


def test_the_time_left_is_that_of_all_seeds(tmp_path, monkeypatch, capsys):
    seconds = count(step=40)  # for each training, the moment when it ends
    monkeypatch.setattr(text, "time", SimpleNamespace(monotonic=lambda: now))
    now = 0

    def train(way, seed):
        nonlocal now
        now = next(seconds)
        return way, seed

    trained = list(comparison.each_seed(train, ["a", "b"], range(3), tmp_path / "x.json", "cpu"))
    assert trained == [{way: (way, seed) for way in "ab"} for seed in range(3)]
    assert capsys.readouterr().out.splitlines()[-1] == "trainings, 5 of 6, left 0:00:40"


def test_trainings_side_by_side_are_those_of_one_process(tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "draw", lambda *_: None)
    for processes in (1, 2):
        monkeypatch.setattr(comparison, "PROCESSES", processes)
        toy.run("two-moons", settings(match_size=20), tmp_path / str(processes))
    first, second = ((tmp_path / str(processes) / "toy.json").read_text() for processes in (1, 2))
    assert first == second


def test_a_match_size_of_0_is_random_pairs_for_every_method_that_has_one(small, tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "draw", lambda *_: None)
    toy.run("two-moons", settings(match_size=0, steps=1), tmp_path)
    sizes = {row["method"]: row["match_size"] for row in read_csv(tmp_path / "results.csv")}
    assert sizes.pop("semidiscrete") == "40" and set(sizes.values()) == {"1"}


def test_the_same_seed_gives_the_same_flow(small):
    pairs = [toy.training_pairs("two-moons", "greedy", 100, seed=4) for _ in range(2)]
    first, second = (toy.train_flow(pair, 10, seed=4) for pair in pairs)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_each_step_of_a_training_tells_its_loss(small):
    losses = []
    toy.train_flow(toy.training_pairs("two-moons", "greedy", 100, seed=4), 30, seed=4, each_step=losses.append)
    assert len(losses) == 30 and not any(loss.requires_grad for loss in losses)
    assert torch.stack(losses[-5:]).mean() < torch.stack(losses[:5]).mean()


def test_greedy_beats_random_at_few_steps():
    """One step of the unmatched flow goes to the mean of all data, 1.7 from the target; matched ones get to 0.1."""
    target, start = toy.points("eight-gaussians", 400, "target", 0), toy.points("noise", 400, "start", 0)
    w2 = {}
    for method in ("random", "greedy"):
        net = toy.train_flow(toy.training_pairs("eight-gaussians", method, 500, seed=0), 200, seed=0)
        w2[method] = toy.measure_flow(net, target, start)["w2"]
    assert w2["greedy"][1] < w2["random"][1] / 4
    assert w2["greedy"][2] < w2["random"][2] / 1.5


def test_the_command_trains_by_its_options(small, run, tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "draw", lambda *_: None)
    code, said, _ = run("toy", "--shape", "two-moons", "--steps", 1, "--seeds", 1, "--seed", 4, "--match-size", 8,
                        "--out", tmp_path / "out")
    described = json.loads((tmp_path / "out" / "toy.json").read_text())
    assert (code, described["steps"], described["match_size"], described["seed"]) == (0, 1, 8, 4)
    assert str(tmp_path / "out" / "toy.json") in said


@pytest.mark.parametrize("option, value", [("--shape", "circle"), ("--shape", ""), ("--steps", 0), ("--seeds", 1.5),
                                           ("--match-size", -1), ("--match-size", 10**15)])
def test_what_cannot_be_run_is_named(refused, tmp_path, option, value):
    said = refused("toy", option, value, "--out", tmp_path / "out").replace("match_size", "--match-size")
    assert option in said and str(value) in said.replace(",", "")
    assert files_of(tmp_path / "out") == []
