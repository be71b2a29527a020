"""Compiling ahead: what is asked of other processes, with kernels that only take notes, and what these do."""

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
from triton import knobs

from dansm.scale.base import launch

ROOT = Path(__file__).parents[2]
GPU = torch.device("cuda")


class Kernel:
    """Notes what is asked of it. Its second argument is a constant."""

    def __init__(self):
        self.params = [SimpleNamespace(is_constexpr=number == 1, do_not_specialize=number == 3) for number in range(4)]
        self.launched = []
        self.__name__ = "kernel"

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.launched.append((grid, arguments, options["num_warps"])) or "compiled"


class Asked(list):
    """Takes the place of the processes: (arguments, options) of each kernel asked for. Nothing comes of it."""

    card = waited = 0

    def ask(self, function, *arguments):
        self += [arguments[2:]] if function is launch._compile else []

    def ending(self):
        return [self]

    def join(self, seconds=None):
        self.waited += seconds is not None

    def kill(self):
        pass


@pytest.fixture
def asked(monkeypatch):
    asked = Asked()
    monkeypatch.setattr(launch, "_asked", set())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(launch, "Compilers", lambda card: asked)
    yield asked
    assert not launch._compiling and not launch.compiles_only()


def test_ahead_each_kind_is_compiled_once_and_nothing_is_launched(asked):
    kernel, x = Kernel(), torch.ones(2)
    with launch.compiling_ahead(GPU):
        for arguments in ((x, 1), (x + 1, 1), (x.double(), 1), (x, 2), (None, 2)):
            assert launch.launch(kernel, (4,), *arguments) is None
    assert len(asked) == 4 and not kernel.launched
    assert asked[0] == ([launch.Memory(torch.float32, 0), 1], {"num_warps": 8})
    assert launch.launch(kernel, (4,), x, 1, num_warps=2) == "compiled"
    assert kernel.launched == [((4,), (x, 1), 2)]
    with launch.compiling_ahead(GPU):
        launch.launch(kernel, (4,), x, 1)
    assert len(asked) == 4


def test_numbers_are_of_a_kind_if_both_or_neither_are_multiples_of_16(asked):
    """Triton makes one kernel of numbers that are alike, but for 1, which is a constant to it."""
    kernel, x = Kernel(), torch.ones(8)
    alike = (16, 5), (48, 5), (2**20, 6), (16, 16)
    with launch.compiling_ahead(GPU):
        for third, fourth in (*alike, (17, 5), (19, 5), (1, 5), (2**40, 5)):
            launch.launch(kernel, (1,), x, 1, third, fourth)
    assert len(asked) == 4
    with launch.compiling_ahead(GPU):
        for part in (x, x[4:], x[1:], x[2:]):
            launch.launch(kernel, (1,), part, 1, 16, 5)
    assert len(asked) == 4 + 1


def test_processes_go_on_until_somebody_waits(asked):
    kernel = Kernel()
    with launch.compiling_ahead(GPU, wait=False):
        launch.launch(kernel, (1,), 5)
    assert launch._compiling and not asked.waited
    with launch.compiling_ahead(GPU):
        launch.launch(kernel, (1,), 6)
    assert asked.waited == 2  # once for each context


def test_an_error_inside_ends_it_too(asked):
    with pytest.raises(ValueError), launch.compiling_ahead(GPU):
        launch.launch(Kernel(), (1,), 5)
        raise ValueError
    assert asked.waited == 1


IN_A_DAEMON = """
import multiprocessing, torch
from dansm.scale.base import launch

torch.cuda.get_device_capability = lambda device: (9, 0)

def ask():
    with launch.compiling_ahead(torch.device("cuda")):
        launch._compilers.ask(print, "called")
        assert launch.compiles_only() and not launch._compilers.processes
    assert not launch.compiles_only()

process = multiprocessing.get_context("fork").Process(target=ask, daemon=True)
process.start()
process.join()
raise SystemExit(process.exitcode)
"""
KILLED = """
import os, time, torch
from dansm.scale.base import launch

torch.cuda.get_device_capability = lambda device: (9, 0)
with launch.compiling_ahead(torch.device("cuda")):
    for _ in range(3):
        launch._compilers.ask(time.sleep, 0)
    print(*(process.pid for process in launch._compilers.processes), flush=True)
    os.kill(os.getpid(), 9)
"""


def started(code, **environment):
    """What a Python that compiles, where the tests interpret, has come to."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)} | environment
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)


def test_in_a_daemon_which_may_have_no_processes_nothing_is_compiled_ahead_and_no_kernel_runs():
    """What runs twice would hand out noises twice, and take a step with the gradients of zeros."""
    ended = started(IN_A_DAEMON)
    assert ended.returncode == 0 and not ended.stdout, ended.stderr


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="processes are looked for in /proc")
def test_no_process_outlives_the_one_that_asks():
    pids = [int(pid) for pid in started(KILLED).stdout.split()]
    end = time.monotonic() + 60
    while alive := [pid for pid in pids if running(pid)]:
        assert time.monotonic() < end, alive
        time.sleep(0.1)
    assert pids


def running(pid):
    """Whether there is such a process that is no zombie: a container may reap none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_elsewhere_than_on_a_gpu_all_is_launched():
    kernel = Kernel()
    with launch.compiling_ahead(torch.device("cpu")):
        launch.launch(kernel, (1,), 5)
    assert kernel.launched


COMPILED_ELSEWHERE = """
import multiprocessing, os, signal, time, torch, triton
from dansm.scale.base import launch
from dansm.scale.matching import draw_kernels

kernel, noise = draw_kernels._fill, torch.empty(20, 1024)
torch.cuda.get_device_capability = lambda device: (9, 0)  # of an H100: Triton brings all that compiling takes
with launch.compiling_ahead(torch.device("cuda")):
    draw_kernels.fill(noise, 1, 0)
    draw_kernels.fill(noise.bfloat16(), 1, 0)
found = []
triton.knobs.compilation.listener = lambda *, cache_hit, **_: found.append(cache_hit)
triton.runtime.driver.set_active(launch.Target((9, 0)))
kernel.warmup(noise, 1, 0, 20, 1024, 8, 128, grid=(1,), num_warps=4, enable_fp_fusion=False)
kernel.warmup(noise, 1, 0, 20, 1024, 8, 128, grid=(1,), num_warps=8, enable_fp_fusion=False)
assert found == [True, False], found

launch.LONGEST = 2  # of three processes, one is killed and one never ends: the third does what it was asked for
found.clear()
with launch.compiling_ahead(torch.device("cuda")):
    launch._compilers.most = 3
    launch._compilers.ask(os.kill, os.getpid(), 0)
    os.kill(launch._compilers.processes[0].pid, signal.SIGKILL)
    launch._compilers.ask(time.sleep, 1000)
    launch.launch(kernel, (1,), noise.half(), 1, 0, 20, 1024, 8, 128, num_warps=4, enable_fp_fusion=False)
    for _ in range(30):
        launch._compilers.ask(time.sleep, 0)
assert not launch._compiling and not multiprocessing.active_children()
kernel.warmup(noise.half(), 1, 0, 20, 1024, 8, 128, grid=(1,), num_warps=4, enable_fp_fusion=False)
assert found == [True], found
"""


def test_triton_finds_what_other_processes_compiled(tmp_path):
    ended = started(COMPILED_ELSEWHERE, TRITON_CACHE_DIR=str(tmp_path))
    assert ended.returncode == 0, ended.stderr


# ------------------------------------------------------------------------------- launched


class Compiled:
    """What Triton's compiled kernels have, as far as `starter` needs it."""

    function, packed_metadata = "function", "metadata"

    def __init__(self):
        self.calls = []

    def run(self, *given):
        self.calls.append(("run", *given))

    def __getitem__(self, grid):
        return lambda *given: self.calls.append(("whole", grid, *given))


@pytest.fixture
def driver(monkeypatch):
    from triton.runtime import driver

    active = SimpleNamespace(get_current_stream=lambda index: f"stream of {index}")
    monkeypatch.setattr(type(driver), "active", property(lambda self: active), raising=False)


def test_a_compiled_kernel_is_started_by_its_parts(driver):
    kernel = Compiled()
    launch.starter(kernel, (16, True), torch.device("cuda:3"))((7, 2, 1), 100, 200)
    assert kernel.calls == [("run", 7, 2, 1, "stream of 3", "function", "metadata", None, None, None, 100, 200, 16,
                             True)]


def test_what_is_launched_can_be_watched(driver, monkeypatch):
    kernel = Compiled()
    monkeypatch.setattr(knobs.runtime.launch_enter_hook, "calls", [])
    start = launch.starter(kernel, (16,), torch.device("cuda:0"))
    knobs.runtime.launch_enter_hook.add(print)
    start((7, 1, 1), 100)
    assert kernel.calls == [("whole", (7, 1, 1), 100, 16)]


def test_a_kernel_of_another_triton_is_started_as_that_does(driver, monkeypatch):
    monkeypatch.delattr(Compiled, "packed_metadata")
    kernel = Compiled()
    launch.starter(kernel, (16,), torch.device("cuda:0"))((7, 1, 1), 100)
    assert kernel.calls == [("whole", (7, 1, 1), 100, 16)]
