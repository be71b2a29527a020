"""Threads of torch's that are not used, and copies that are waited for when they are needed."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from dansm.scale.base.copies import copy_to_cpu
from dansm.scale.base.threads import one_thread


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_torch_uses_one_thread_inside_and_as_many_as_before_after_it(three_threads):
    with one_thread():
        assert torch.get_num_threads() == 1
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == 1
    assert torch.get_num_threads() == 3
    with pytest.raises(ValueError, match="inside"), one_thread():
        raise ValueError("inside")
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU"))])
def test_a_copy_is_complete_when_it_is_asked_for_whatever_the_device_gets_after_it(device):
    x = torch.arange(2**20, device=device)
    copied = copy_to_cpu(x)
    if device == "cuda":
        x.neg_()
    assert torch.equal(copied(), torch.arange(2**20)) and torch.equal(copied(), torch.arange(2**20))
    assert copied().device.type == "cpu"
