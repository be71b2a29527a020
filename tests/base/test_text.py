"""Progress of long work: a live bar on a terminal, plain lines elsewhere."""

import re
import types

import pytest

from dansm.scale.base import text


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still unless it is set."""
    clock = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr(text, "time", types.SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def lines_of(clock, capsys, seconds_of_items, total=None):
    """(second, line) of each plain line while items that take so many seconds each are worked on."""
    lines = []
    for seconds in text.with_bar(seconds_of_items, "working", total):
        lines += [(clock.now, line) for line in capsys.readouterr().out.splitlines()]
        clock.now += seconds
    return lines + [(clock.now, line) for line in capsys.readouterr().out.splitlines()]


def test_plain_lines_tell_the_time_left_from_the_first_step_on(clock, capsys):
    lines = lines_of(clock, capsys, [30.0] + [5.0] * 99)  # the first step compiles
    left = {second: re.fullmatch(r"working, (\d+) of 100, left (\d+):(\d\d):(\d\d)", line) for second, line in lines}
    assert min(left) == 30 and all(left.values())
    for told in left.values():
        number, hours, minutes, seconds = map(int, told.groups())
        if number > 1:
            assert 3600 * hours + 60 * minutes + seconds == 5 * (100 - number)
    gaps = [after - before for before, after in zip(sorted(left), sorted(left)[1:], strict=False)]
    assert all(gap <= 35 for gap in gaps) and gaps[-1] >= 30


def test_short_work_prints_no_lines_and_long_work_about_a_hundred(clock, capsys):
    assert lines_of(clock, capsys, [0.1] * 15) == []
    lines = lines_of(clock, capsys, [1.0] * 36000)
    assert 50 < len(lines) < 120


def test_work_of_unknown_length_is_counted(clock, capsys):
    lines = lines_of(clock, capsys, (20.0 for _ in range(4)))
    assert [line for _, line in lines] == ["working, 1", "working, 3"]


def test_a_bar_counts_on_from_what_was_done_and_ends_after_its_seconds(clock, capsys):
    with text.Bar("resumed", done=0.5) as bar:
        clock.now = 10.0
        assert bar(0.6, "resumed")
    assert capsys.readouterr().out == "resumed, left 0:00:40\n"
    with text.Bar("limited", seconds=60) as bar:
        clock.now += 20.0
        bar(0.01, "limited")
    assert capsys.readouterr().out == "limited, left 0:00:40\n"
    assert text.clock(36 * 3600 + 61) == "36:01:01"


def test_on_a_terminal_the_bar_is_live(clock, capsys, monkeypatch):
    monkeypatch.setattr(text.console, "_force_terminal", True)
    monkeypatch.setenv("TERM", "xterm")
    with text.Bar("at work", keeps=True) as bar:
        clock.now = 10.0
        assert not bar(0.5, "half [done]")
    assert "half [done], left 0:00:10" in capsys.readouterr().out
