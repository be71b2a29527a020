"""Locks on files: one process at a time, and none left behind."""

import fcntl
import os
import socket
import subprocess
import sys

import pytest
from support import ROOT

from dansm.scale.base.locks import InUse, alone, owning

HOLDER = """
import sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from dansm.scale.base.locks import owning
with owning(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path), str(ROOT)], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


@pytest.mark.slow
def test_a_folder_in_use_is_refused_naming_who_uses_it_until_that_process_ends(tmp_path, holder):
    with pytest.raises(InUse, match=rf"{tmp_path} is being encoded into by process {holder.pid} on"), \
            owning(tmp_path, "encoded"):
        pass
    holder.kill()
    holder.wait()
    with owning(tmp_path):
        assert "process" in (tmp_path / ".lock").read_text()


def test_a_lock_ends_with_its_block(tmp_path):
    for _ in range(2):
        with owning(tmp_path), pytest.raises(InUse), owning(tmp_path):
            pass
        with alone(tmp_path / "other.lock"):
            pass


def test_a_lock_names_its_holder_alone_and_not_those_before(tmp_path):
    (tmp_path / ".lock").write_text("process 123456789 on a machine of a longer name, which ended long ago\n")
    with owning(tmp_path):
        assert (tmp_path / ".lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"


def test_a_file_system_without_locks_lets_one_in_with_a_warning(tmp_path, monkeypatch):
    def without_locks(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", without_locks)
    with pytest.warns(UserWarning, match="Operation not supported") as warned, owning(tmp_path):
        pass
    assert warned[0].filename == __file__
