"""dansm bench evaluate."""

import json
import sys

import pytest
from support import files_of


@pytest.mark.slow  # Inception's features of twenty images take a CPU many seconds
def test_the_time_of_both_networks_is_measured(run, tmp_path):
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("torch_fidelity")
    code, said, err = run("bench", "evaluate", "--samples", 20, "--device", "cpu", "--out", tmp_path / "out")
    assert (code, err) == (0, "")
    rows = json.loads((tmp_path / "out" / "evaluate.json").read_text())["rows"]
    assert [(row["features"], row["dimensions"]) for row in rows] == [("efficientnet-lite0", 1280), ("inception", 2048)]
    for row in rows:
        assert row["images_per_second"] == pytest.approx(20 / row["features_s"], rel=0.2)
        assert row["within_s"] == pytest.approx(row["features_s"] + row["frechet_s"], abs=0.02)
    assert "20 images" in said and files_of(tmp_path / "out") == ["evaluate.csv", "evaluate.json"]


def test_a_missing_package_and_too_few_images_are_told_in_one_line(refused, tmp_path, monkeypatch):
    command = ("bench", "evaluate", "--device", "cpu", "--out", tmp_path)
    assert "--samples" in refused(*command, "--samples", 2)
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    assert "dansm[eval]" in refused(*command, "--samples", 4)
