"""The clock of the benches: what it writes, and what it does with a part that fails."""

import csv
import json

import pytest
import torch
from support import CPU

from dansm import BadInput
from dansm.scale.base.text import Stopped
from dansm.scale.bench import clock


def rows_then(error=None):
    yield {"way": "a", "median_ms": 1.0}
    if error:
        raise error
    yield {"way": "b", "more": 2}


def written(folder, name="some"):
    return json.loads((folder / f"{name}.json").read_text())


def test_a_bench_is_written_as_json_and_as_csv(tmp_path):
    bench = clock.run("some", "title", [("part", rows_then())], CPU, tmp_path, "way", batch=3)
    assert bench == written(tmp_path) and bench["batch"] == 3 and bench["left_out"] == {}
    assert bench["hardware"]["device"] == "cpu"
    with open(tmp_path / "some.csv", newline="") as file:
        assert list(csv.DictReader(file)) == [{"way": "a", "median_ms": "1.0", "more": ""},
                                              {"way": "b", "median_ms": "", "more": "2"}]


def test_a_part_that_fails_is_left_out_and_the_others_are_measured(tmp_path, capsys):
    memory = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has …")
    parts = [("one", rows_then(memory)), ("two", rows_then(RuntimeError("no disk\nand more"))), ("three", rows_then())]
    bench = clock.run("some", "title", parts, CPU, tmp_path)
    assert [row["way"] for row in bench["rows"]] == ["a", "a", "a", "b"]
    assert bench["left_out"] == written(tmp_path)["left_out"] == {"one": "not enough memory", "two": "no disk"}
    said = capsys.readouterr().out
    assert "one: not enough memory" in said and "two: no disk" in said


@pytest.mark.parametrize("error", [BadInput("too few images"), ModuleNotFoundError("no", name="torch_fidelity")])
def test_bad_input_and_a_missing_package_end_the_bench(tmp_path, error):
    with pytest.raises(type(error)):
        clock.run("some", "title", [("one", rows_then(error)), ("two", rows_then())], CPU, tmp_path)


def test_one_of_several_processes_does_not_go_on_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(clock, "ranks", lambda: (1, 2))
    with pytest.raises(RuntimeError, match="no disk"):
        clock.run("some", "title", [("one", rows_then(RuntimeError("no disk")))], CPU, tmp_path)
    assert list(tmp_path.iterdir()) == []  # and only the first of them writes


def test_what_was_measured_is_on_the_disk_when_the_call_is_stopped(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        clock.run("some", "title", [("one", rows_then(KeyboardInterrupt()))], CPU, tmp_path)
    assert [row["way"] for row in written(tmp_path)["rows"]] == ["a"]
    with open(tmp_path / "some.csv", newline="") as file:
        assert [row["way"] for row in csv.DictReader(file)] == ["a"]


@pytest.mark.parametrize(("again", "measured"), [(dict(batch=3), ["b", "c"]), (dict(batch=4), ["a", "b", "c"])])
def test_a_stopped_bench_goes_on_after_the_parts_that_it_has(tmp_path, capsys, again, measured):
    asked = []

    def parts(stops):
        def rows(name):
            asked.append(name)
            if name == stops:
                raise KeyboardInterrupt
            yield {"way": name, "median_ms": 1.0}
        return [(name, rows(name)) for name in "abc"]

    def call(stops="", **about):
        return clock.run("some", "title", parts(stops), CPU, tmp_path, resumable="ac", **about)

    with pytest.raises(Stopped, match="nothing is measured yet, the same command begins again"):
        call(stops="a", batch=3)
    with pytest.raises(Stopped, match="2 parts of 3, the same command resumes"):
        call(stops="c", batch=3)
    assert list(written(tmp_path)["measured"]) == ["a", "b"]
    asked.clear()
    capsys.readouterr()
    bench = call(**again)
    assert ("resuming: 1 part of 3" in capsys.readouterr().out) == (measured == ["b", "c"])
    assert [row["way"] for row in bench["rows"]] == ["a", "b", "c"] and asked == measured
    asked.clear()
    assert call(**again) == written(tmp_path) and asked == ["a", "b", "c"]  # one that is done begins again


def test_slow_work_is_timed_fewer_times(monkeypatch):
    """Synthetic times: seven seconds a call; twenty may pass."""
    calls = []
    monkeypatch.setattr(clock, "milliseconds", lambda device, work, *arguments: calls.append(arguments) or 7000.0)
    assert clock.timed(CPU, 15, print, 1, 2) == [7000, 7000]
    assert calls == [(1, 2)] * 3  # the first is not counted
    assert clock.spread([5.0, 1.0, 3.0], images=6) == {
        "median_ms": 3, "mean_ms": 3, "least_ms": 1, "most_ms": 5, "calls": 3, "images_per_second": 2000}


def test_figures_are_shown_with_as_many_digits_as_they_need():
    cells = {1234.5: "1,234", 12.34: "12.340", 0.1234: "0.123", 1234: "1,234", None: "", "ours": "ours"}
    assert {value: clock.cell(value) for value in cells} == cells
    assert clock.cell(0.2512, "mfu") == clock.cell(0.2512, "matching_share") == "25.1 %"


def test_samples_are_like_photographs():
    x = clock.image_like(300, (3, 16, 16), 0, CPU)
    assert x.shape == (300, 3, 16, 16) and x.min() >= -1 and x.max() <= 1
    assert (x[..., 1:] - x[..., :-1]).abs().mean() < 0.2 * x.std()  # smooth
    assert x.flatten(1).mean(1).std() > 0.2  # of unequal brightness
    assert torch.equal(clock.image_like(300, (3, 16, 16), 0, CPU), x)
