"""Calls side by side: the results in turn, errors, and no process left behind, however the caller ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from calls import refuse_or_wait, slow_at_first
from support import ROOT

from dansm import BadInput
from dansm.scale.base.workers import side_by_side


def test_results_come_in_turn_from_several_processes_of_one_thread():
    results = list(side_by_side(slow_at_first, [(number, "six") for number in range(6)], 2))
    assert [result[:2] for result in results] == [(number, "six") for number in range(6)]
    processes = {process for *_, process, _ in results}
    assert len(processes) <= 2 and os.getpid() not in processes and {threads for *_, threads in results} == {1}


@pytest.mark.parametrize("calls, processes", [(1, 4), (3, 1), (0, 4)])
def test_where_one_process_is_enough_each_call_is_made_here_when_it_is_asked_for(calls, processes):
    made = []
    results = side_by_side(made.append, [(number,) for number in range(calls)], processes)
    assert made == []
    next(results, None)
    assert made == [0][:calls]


def test_an_error_is_raised_here_and_ends_the_others_at_once():
    begin = time.monotonic()
    with pytest.raises(BadInput, match="number"):
        list(side_by_side(refuse_or_wait, [(0,), (1,)], 2))
    assert time.monotonic() - begin < 100


@pytest.mark.slow
@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGKILL])
def test_no_process_outlives_its_parent(tmp_path, ending):
    script = tmp_path / "script.py"
    script.write_text(f"""
from pathlib import Path
from calls import tell_and_wait
from dansm.scale.base.workers import side_by_side
if __name__ == "__main__":
    list(side_by_side(tell_and_wait, [(Path({str(tmp_path)!r}), number) for number in range(2)], 2))
""")
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    parent = subprocess.Popen([sys.executable, script], env={**os.environ, "PYTHONPATH": paths},
                              stderr=subprocess.PIPE, text=True)
    until(lambda: len(workers_in(tmp_path)) == 2)
    parent.send_signal(ending)
    said = parent.communicate(timeout=60)[1]
    assert "Exception in thread" not in said and said.count("KeyboardInterrupt") == (ending == signal.SIGINT)
    until(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers_in(tmp_path)))


def workers_in(folder):
    return [path.name for path in folder.iterdir() if path.name.isdigit()]


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)
