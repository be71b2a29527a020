"""dansm couple: what it measures of a coupling, what it keeps, and what it refuses."""

import csv
import json
import re

import numpy as np
import pytest
from support import files_of, make_images, noise_image

from dansm.scale.commands import couple
from dansm.scale.matching.solver import Solver
from dansm.scale.train import coupling

QUICK = ("--error", 0.2, "--device", "cpu")
COUNTED = dict(LEAST=2000, POOL=1000)


@pytest.fixture(autouse=True)
def few_noises(monkeypatch, tmp_path):
    for name, value in COUNTED.items():
        monkeypatch.setattr(couple, name, value)
    monkeypatch.setattr(coupling, "POTENTIALS", tmp_path / "potentials")


@pytest.fixture
def measured(run, tmp_path):
    """Runs the command: its rows by kind of pairs, and what it said."""
    def measured(*arguments, out=tmp_path / "out"):
        code, said, err = run("couple", *arguments, *QUICK, "--out", out)
        assert (code, err) == (0, "")
        with open(out / "couple.csv", newline="") as file:
            rows = {row["pairs"]: {name: float(value) for name, value in row.items() if name != "pairs" and value}
                    for row in csv.DictReader(file)}
        return rows, said

    return measured


@pytest.fixture
def classes(tmp_path):
    """Two classes of images, dark and bright, which a noise tells apart if a pool serves both."""
    for number in range(2):
        folder = make_images(tmp_path / "images" / f"class-{number}", width=4, height=4)
        for i in range(24):
            noise_image(4, 4, seed=i).point(lambda value, dark=120 * (1 - number): max(0, value - dark)).save(
                folder / f"{i:02d}.png")
    return tmp_path / "images"


def latents(path, count=12, seed=0):
    np.save(path, np.random.default_rng(seed).normal(size=(count, 2, 3, 3)).astype(np.float32))
    return path


def test_pairs_of_the_coupling_are_nearest_and_its_noises_tell_no_class(measured, classes, tmp_path):
    rows, said = measured(classes, "--labels", "folders")
    random, pool, coupled = rows["random"], rows["pool of 48, labels ignored"], rows["coupling"]
    assert abs(random["inner"]) < 1 < pool["inner"] < coupled["inner"]
    assert random["squared_distance"] > pool["squared_distance"] > coupled["squared_distance"]
    for row in rows.values():
        assert row["noise_size"] == pytest.approx(1, abs=0.02)
        assert row["squared_distance"] + 2 * row["inner"] == pytest.approx(
            random["squared_distance"] + 2 * random["inner"], rel=0.02)
    assert pool["class_mean_largest"] > 2 > 1.5 > max(random["class_mean_largest"], coupled["class_mean_largest"])
    assert pool["class_told"] > 0.65 and max(random["class_told"], coupled["class_told"]) < 0.57
    assert coupled["share_error"] < 0.25 and coupled["least_share"] > 0.4 and coupled["largest_share"] < 2
    assert random["never_taken"] == coupled["never_taken"] == 0 and "share_error" not in pool
    assert random["share_error"] < 0.1 and 0 < coupled["share_at_most"] - coupled["share_error"] < 0.1
    assert "96 samples in 2 groups: shares off by " in said and "96 samples in 2 groups and 2 parts" in said
    for title in ("mean ⟨x, z⟩", "class told from the noise", "samples never taken", "shares off by, rms"):
        assert title in said
    record = json.loads((tmp_path / "out" / "couple.json").read_text())
    assert record["samples"] == 96 and record["flip"] and record["groups"] == record["parts"] == 2
    assert [row["pairs"] for row in record["rows"]] == list(rows)


def test_images_are_read_as_a_training_reads_them(measured, classes, tmp_path):
    assert json.loads((measured(classes) and tmp_path / "out" / "couple.json").read_text())["shape"][0] == 3
    measured(classes, "--channels", 1)
    assert json.loads((tmp_path / "out" / "couple.json").read_text())["shape"][0] == 1


def test_parts_are_counted_each_by_itself(measured, classes):
    rows, said = measured(classes, "--no-flip", "--part", 5)
    assert "48 samples in 1 group and 10 parts" in said
    assert rows["coupling"]["share_error"] < 0.25 and "class_told" not in rows["coupling"]


def test_latents_are_not_mirrored_unless_asked(measured, tmp_path):
    assert "12 samples in 1 group:" in measured(latents(tmp_path / "a.npy"))[1]
    assert "24 samples in 1 group:" in measured(tmp_path / "a.npy", "--flip")[1]


def test_the_least_memory_that_a_refusal_names_gives_the_same_coupling(run, measured, tmp_path):
    rows, _ = measured(latents(tmp_path / "a.npy"), "--cache", tmp_path / "once")
    code, _, err = run("couple", tmp_path / "a.npy", *QUICK, "--memory", 2e-6)
    assert code == 2 and err.count("\n") == 1
    (least,) = re.findall("memory is 2e-06 GB .* expected (.*) or more", err)
    scarce, said = measured(tmp_path / "a.npy", "--memory", least, "--cache", tmp_path / "twice")
    assert "found in" not in said
    for name, value in rows["coupling"].items():
        assert scarce["coupling"][name] == pytest.approx(value, rel=0.02, abs=0.02)


def test_the_second_call_solves_nothing_and_counts_the_same(measured, tmp_path, monkeypatch):
    first, _ = measured(latents(tmp_path / "a.npy"))
    monkeypatch.setattr(Solver, "step", None)
    second, said = measured(tmp_path / "a.npy")
    assert f"found in {tmp_path}/potentials/potentials-" in said and first == second


def test_without_out_nothing_but_the_potentials_is_written(run, tmp_path):
    code, said, err = run("couple", latents(tmp_path / "a.npy"), *QUICK, "--cache", tmp_path / "cache")
    assert (code, err) == (0, "") and "written" not in said
    assert [re.sub(r"-[0-9a-f]{16}", "", name) for name in files_of(tmp_path)] == [
        "a.npy", "cache", "cache/potentials.lock", "cache/potentials.pt"]


def test_ctrl_c_saves_and_the_same_command_resumes(run, measured, tmp_path, monkeypatch):
    step, taken = Solver.step, []

    def stopping(solver):
        if len(taken) == 7:
            raise KeyboardInterrupt
        taken.append(1)
        step(solver)

    whole, _ = measured(latents(tmp_path / "a.npy"))
    (potentials,) = (tmp_path / "potentials").glob("*.pt")
    potentials.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(Solver, "step", stopping)
        code, _, err = run("couple", tmp_path / "a.npy", *QUICK)
    assert code == 130 and err == f"dansm: stopped; {potentials} has the potentials so far, the same command resumes\n"
    resumed, said = measured(tmp_path / "a.npy")
    assert resumed == whole and "found in" not in said


@pytest.mark.parametrize("kind", ["one", "equal", "alone in its class", "a part each"])
def test_data_that_leave_little_choice_work(measured, tmp_path, kind):
    path, options = latents(tmp_path / "a.npy", count=1 if kind == "one" else 6), ()
    if kind == "equal":
        np.save(path, np.ones((6, 2, 3, 3), np.float32))
    if kind == "alone in its class":
        np.save(tmp_path / "labels.npy", [0, 0, 1, 0, 0, 0])
        options = "--labels", "auto"
    if kind == "a part each":
        options = "--part", 1
    rows, said = measured(path, *options)
    assert rows["coupling"]["share_error"] < 0.25 and ("nothing to choose" in said) == (kind != "alone in its class")
    assert ("5 of 6 samples are copies of others" in said) == (kind == "equal")


def test_data_without_labels_are_one_group(measured, tmp_path):
    rows, said = measured(latents(tmp_path / "a.npy"), "--labels", "auto")
    assert f"{tmp_path / 'a.npy'} has no labels: all samples are one group" in said
    assert "class_told" not in rows["coupling"]


BAD = [(("--memory", -1), "--memory is -1.0: expected a number"),
       (("--error", 0), "--error is 0.0: expected a number from 0.001 to 1"), (("--error", 2), "--error is 2.0"),
       (("--error", "nan"), "--error is nan"), (("--part", 0), "'--part'.*1, given 0"),
       (("--labels", "short.npy", "--out", "new"), "short.npy holds 5 labels: expected 12"),
       (("--labels", "x.npy"), "--labels is x.npy"),
       (("--size", 3), "--size is 3.*holds latents"), (("--out", "a.npy"), "--out is a.npy: a.npy is a file"),
       (("--cache", "a.npy"), "--cache is a.npy: a.npy is a file")]


@pytest.mark.parametrize(("options", "said"), BAD)
def test_what_cannot_be_coupled_is_refused_in_one_line(refused, tmp_path, options, said):
    latents(tmp_path / "a.npy")
    np.save("short.npy", [0, 1, 0, 1, 0])
    before = files_of(tmp_path)
    assert re.search(said, refused("couple", "a.npy", "--device", "cpu", *options))
    assert files_of(tmp_path) == before


def test_data_that_are_not_there_or_not_finite_are_named(refused, tmp_path, images):
    assert "nowhere does not exist" in refused("couple", "nowhere", *QUICK)
    np.save("a.npy", np.full((3, 1, 2, 2), np.nan, np.float32))
    assert "a.npy holds NaN or infinite numbers, in latent 0" in refused("couple", "a.npy", *QUICK)
    for option in ("--out", "--cache"):
        assert f"{option} is {images}/x, inside {images}" in refused("couple", images, *QUICK, option, images / "x")
