"""Compiling ahead, with kernels that only take notes: what a GPU does in threads."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
from dansm.scale.base import launch


class Kernel:
    """Notes what is asked of it; `fails` where it is compiled. Its second argument is a constant."""

    def __init__(self, fails=False):
        self.params = [SimpleNamespace(is_constexpr=number == 1, do_not_specialize=number == 3) for number in range(4)]
        self.compiled, self.launched, self.fails = [], [], fails

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.launched.append((grid, arguments, options["num_warps"])) or "compiled"

    def warmup(self, *arguments, grid, num_warps):
        self.compiled.append((grid, num_warps))
        if self.fails:
            raise RuntimeError("no such card")


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    yield torch.device("cuda")
    assert set(chosen) <= {3}


def test_ahead_each_kind_is_compiled_once_and_nothing_is_launched(gpu):
    kernel, x = Kernel(), torch.ones(2)
    with launch.compiling_ahead(gpu):
        for arguments in ((x, 1), (x + 1, 1), (x.double(), 1), (x, 2), (None, 2)):
            assert launch.launch(kernel, (4,), *arguments) is None
    assert len(kernel.compiled) == 4 and not kernel.launched
    assert launch.launch(kernel, (4,), x, 1, num_warps=2) == "compiled"
    assert kernel.launched == [((4,), (x, 1), 2)]


def test_numbers_are_of_a_kind_if_both_or_neither_are_multiples_of_16(gpu):
    """Triton makes one kernel of numbers that are alike, but for 1, which is a constant to it."""
    kernel, x = Kernel(), torch.ones(8)
    alike = (16, 5), (48, 5), (2**20, 6), (16, 16)
    with launch.compiling_ahead(gpu):
        for third, fourth in (*alike, (17, 5), (19, 5), (1, 5), (2**40, 5)):
            launch.launch(kernel, (1,), x, 1, third, fourth)
    assert len(kernel.compiled) == 4
    with launch.compiling_ahead(gpu):
        for part in (x, x[4:], x[1:], x[2:]):
            launch.launch(kernel, (1,), part, 1, 16, 5)
    assert len(kernel.compiled) == 4 + 2


def test_what_does_not_compile_is_left_to_the_launch(gpu):
    kernel = Kernel(fails=True)
    with launch.compiling_ahead(gpu):
        launch.launch(kernel, (1,), 5)
    assert kernel.compiled and launch._compiler is None and not launch._compiling


def test_an_error_inside_ends_it_too(gpu):
    with pytest.raises(ValueError), launch.compiling_ahead(gpu):
        launch.launch(Kernel(), (1,), 5)
        raise ValueError
    assert launch._compiler is None and not launch._compiling


def test_elsewhere_than_on_a_gpu_all_is_launched():
    kernel = Kernel()
    with launch.compiling_ahead(torch.device("cpu")):
        launch.launch(kernel, (1,), 5)
    assert kernel.launched and not kernel.compiled
