"""dansm export: the averaged weights next to their run, or where --out says."""

import pytest
from models import state_to_save

from dansm.scale.model import checkpoint
from dansm.scale.model.load import load_model


@pytest.fixture
def run_folder(tmp_path):
    folder = tmp_path / "train"
    folder.mkdir()
    checkpoint.save(folder, state_to_save(decays=(0.5, 0.9)))
    return folder


def test_an_export_lies_in_its_runs_folder_by_default(run, run_folder):
    weights = run_folder / "weights.safetensors"
    for model in (run_folder, checkpoint.newest(run_folder)):
        code, said, err = run("export", model)
        assert (code, err) == (0, "") and str(weights) in said and "decay 0.5" in said
        assert load_model(weights).about["step"] == 7
        weights.unlink()


def test_an_export_goes_where_it_is_told_with_the_average_it_is_told(run, run_folder, tmp_path):
    out = tmp_path / "deep" / "w.safetensors"
    code, said, _ = run("export", run_folder, "--average", 1, "--out", out)
    assert code == 0 and str(out) in said and load_model(out).about["decay"] == 0.9


def test_an_export_that_cannot_be_is_refused(refused, run_folder, tmp_path):
    weights = tmp_path / "weights.safetensors"
    assert "--average is 2" in refused("export", run_folder, "--average", 2, "--out", weights)
    assert str(tmp_path / "weights") in refused("export", run_folder, "--out", tmp_path / "weights")
    assert "missing" in refused("export", tmp_path / "missing", "--out", weights)
    assert not weights.exists()
