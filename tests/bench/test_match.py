"""dansm bench match and spread: all ways on a small pool, and the paper's loop that they are compared with."""

import json

import pytest
import torch
from PIL import Image
from support import CPU, files_of

import dansm
from dansm.scale.bench import clock, match
from dansm.scale.matching import optimal

SMALL = ("bench", "match", "--batch", 8, "--shape", "1x4x4", "--device", "cpu")


def test_each_way_is_measured_at_each_match_size(run, tmp_path):
    code, said, err = run(*SMALL, "--match-size", "16,40", "--out", tmp_path / "out")
    assert (code, err) == (0, "")
    assert files_of(tmp_path / "out") == ["match.csv", "match.json", "match.png"]
    assert all(str(tmp_path / "out" / name) in said for name in files_of(tmp_path / "out"))
    bench = json.loads((tmp_path / "out" / "match.json").read_text())
    assert (bench["batch"], bench["shape"], bench["left_out"]) == (8, [1, 4, 4], {})
    ways = ["ours, squared", "ours, inner", "ours, 10 groups", "bare product", "paper's loop", "nearest of k",
            "scipy, assignment", "ours, assignment"]
    rows = {(row["match_size"], row["way"]): row for row in bench["rows"]}
    assert {(match_size, way) for match_size in (16, 40) for way in ways} <= rows.keys()  # POT, where it is installed
    for row in bench["rows"]:
        assert 0 < row["least_ms"] <= row["median_ms"] <= row["most_ms"] and row["calls"] >= 1
    ours, loop = rows[40, "ours, squared"], rows[40, "paper's loop"]
    assert ours["calls"] == 5 and ours["pool_mb"] == round(48 * 16 * 4 / 1e6, 1) and ours["tf32"] is False
    groups = rows[40, "ours, 10 groups"]
    assert groups["calls"] == 5 and groups["pool_mb"] == round(10 * 16 * 16 * 4 / 1e6, 1)
    faster = loop["median_ms"] / ours["full_ms"]
    assert ours["times_faster"] == pytest.approx(faster, rel=0.01, abs=0.051)
    lines = (tmp_path / "out" / "match.csv").read_text().splitlines()
    assert len(lines) == 1 + len(bench["rows"]) and lines[0].startswith("match_size,way,median_ms")
    assert Image.open(tmp_path / "out" / "match.png").width > 100


def test_samples_need_not_be_square(run, refused, tmp_path):
    command = ("bench", "match", "--batch", 4, "--match-size", 8, "--device", "cpu", "--out", tmp_path)
    assert run(*command, "--shape", "3x8x4")[0] == 0
    assert json.loads((tmp_path / "match.json").read_text())["shape"] == [3, 8, 4]
    assert "'3x8x4'" in refused("bench", "train", "--network", "small", "--shape", "3x8x4", "--device", "cpu")


def test_a_way_that_would_take_too_long_is_left_out(run, tmp_path, monkeypatch):
    monkeypatch.setattr(clock, "PATIENCE", 1e-9)
    assert run(*SMALL, "--match-size", 16, "--match-size", 40, "--out", tmp_path)[0] == 0
    rows = json.loads((tmp_path / "match.json").read_text())["rows"]
    assert {row["match_size"] for row in rows} == {16}


def test_a_way_that_does_not_fit_is_left_out(monkeypatch):
    monkeypatch.setattr(match, "free_memory", lambda device: 1000)
    ways = {"small": (900, 1, lambda: {"median_ms": 1.0}), "large": (910, 1, pytest.fail)}
    monkeypatch.setattr(match, "ways", lambda *_: ways)
    rows = [row for _, rows in match.parts_of(torch.zeros(1, 4), [8], 0, {}) for row in rows]
    assert rows == [{"match_size": 8, "way": "small", "median_ms": 1.0}]


def test_a_pool_that_does_not_fit_is_refused_before_anything_is_measured(refused, tmp_path):
    error = refused("bench", "match", "--match-size", 10**9, "--shape", "4x8x8", "--device", "cpu", "--out", tmp_path)
    assert "--match-size is 1,000,000,000" in error and files_of(tmp_path) == []


def test_the_loop_is_the_papers():
    x, z = torch.randn(6, 1, 3), torch.randn(20, 1, 3)
    assert torch.equal(match.paper_loop(x, z), dansm.greedy(dansm.cost_matrix(x, z)))
    assert match.paper_loop(z, x).sort().values.tolist() == [0, 1, 2, 3, 4, 5]  # fewer noises than samples


def test_the_floor_is_reading_or_multiplying_half_a_pool():
    rates = {"bytes_per_second": 1e9, "float32_operations_per_second": 1e9, "tf32_operations_per_second": 1e12}
    row = {"match_size": 1000, "dtype": "float32", "tf32": False}
    assert match.floor_ms(rates, row, 10, 100) == pytest.approx(1000 * 2 * 10 * 500 * 100 / 1e9)
    assert match.floor_ms(rates, {**row, "tf32": True}, 10, 100) == pytest.approx(1000 * 500 * 100 * 4 / 1e9)


def test_an_assignment_counts_with_the_share_of_a_batch_and_says_what_is_not_proven():
    x = clock.image_like(4, (1, 4, 4), 0, CPU)
    row, scipy = (match.assignment(x, 16, solve, 0) for solve in (
        optimal, match.assignments(CPU)["scipy, assignment"]))
    assert row["gap"] == 0 and 0 < row["saved"] == scipy["saved"] < 1 and "gap" not in scipy
    assert row["median_ms"] == pytest.approx(row["whole_ms"] / 4, rel=0.1, abs=1e-3)


def test_a_spread_pool_is_measured(run, refused, tmp_path, monkeypatch):
    """A group of one: the whole way, which several ranks take in tests/matching."""
    command = ("bench", "spread", "--batch", 8, "--match-size", 16, "--shape", "1x4x4", "--device", "cpu",
               "--out", tmp_path)
    assert "torchrun" in refused(*command)
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}.items():
        monkeypatch.setenv(name, str(value))
    code, said, err = run(*command)
    assert (code, err) == (0, "") and "spread.json" in said
    row, = json.loads((tmp_path / "spread.json").read_text())["rows"]
    assert row["batch_a_rank"] == 8 and row["received_mb_median"] == 0 and row["calls"] == 2
