"""dansm bench autoencoder, with a small network."""

import json

import pytest

from dansm.scale.bench import autoencoder as bench
from dansm.scale.data import autoencoder

SMALL = {"block_out_channels": (32, 32, 64), "layers_per_block": 1, "sample_size": 16}


@pytest.mark.slow
def test_both_halves_and_the_commands_are_timed(run, refused, tmp_path, monkeypatch):
    monkeypatch.setattr(autoencoder, "SETTINGS", {**autoencoder.SETTINGS, **SMALL})
    monkeypatch.setattr(bench, "REPEATS", 2)
    monkeypatch.setattr(bench, "COMMANDS", 1)
    code, said, err = run("bench", "autoencoder", "--shape", "4x4x4", "--samples", 5, "--device", "cpu",
                          "--out", tmp_path)
    assert code == 0, err
    written = json.loads((tmp_path / "autoencoder.json").read_text())
    rows = written["rows"]
    assert written["left_out"] == {} and [(row["what"], row["batch"]) for row in rows] == [
        ("encode", 1), ("encode", 4), ("decode", 1), ("decode", 4), ("dansm encode", 5), ("dansm decode", 5)]
    for row in rows:
        assert row["least_ms"] <= row["median_ms"] <= row["most_ms"] and row["images_per_second"] > 0
    assert rows[0]["operations_per_image"] > 1e6 and (tmp_path / "autoencoder.csv").read_text().count("\n") == 7
    assert "dansm encode" in said
    assert "4x4" in refused("bench", "autoencoder", "--shape", "4x4", "--device", "cpu", "--out", tmp_path)
