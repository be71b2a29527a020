"""What every test has: the same random numbers, no deadline, and the commands in this process."""

import os
import signal
import warnings

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # the kernels run here too; to be set before Triton is imported

from hypothesis import settings
from support import TINY, make_images

import dansm
from dansm.scale.base.text import console

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a job that a script put into the background
    signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile("dansm", deadline=None, derandomize=True, max_examples=60, print_blob=False, database=None)
settings.load_profile("dansm")
torch.set_num_threads(1)  # on a busy machine two threads wait for each other: eight times slower


@pytest.fixture(autouse=True)
def same_random_numbers():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def tiny_network(monkeypatch, tmp_path):
    """In the place of those that a CPU takes minutes for; and nothing is written into the project by mistake."""
    monkeypatch.setitem(dansm.NETWORKS, "small", TINY)
    monkeypatch.setitem(dansm.NETWORKS, "tiny", TINY)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def wide_console(monkeypatch):
    """No word of a table breaks because a number in it, such as a time, is long today."""
    monkeypatch.setattr(console, "width", 250)


@pytest.fixture
def run(capsys):
    """Runs a command in this process: its exit code, and what it printed."""

    def run(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            dansm.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return run


@pytest.fixture
def refused(run):
    """Runs a command that must fail: exit code 2 and one line, which is returned."""

    def refused(*arguments):
        with warnings.catch_warnings(record=True) as warned:  # each would be two lines more
            warnings.simplefilter("default")
            code, out, err = run(*arguments)
        assert code == 2, err
        assert err.startswith("dansm: ") and err.count("\n") == 1 and err.endswith("\n"), err
        assert "written" not in out
        assert [str(warning.message) for warning in warned] == []
        return err

    return refused


@pytest.fixture
def images(tmp_path):
    return make_images(tmp_path / "images")
