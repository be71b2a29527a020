"""Threads of torch's that are not used, and copies that are waited for when they are needed."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

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


def threads_of_a_new_thread():
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(torch.get_num_threads).result()


def test_torch_uses_one_thread_inside_and_as_many_as_before_after_it(three_threads):
    with one_thread():
        with one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 3
    with pytest.raises(ValueError, match="inside"), one_thread():
        raise ValueError("inside")
    assert torch.get_num_threads() == 3


def test_threads_begun_inside_keep_their_number_also_where_several_are_inside(three_threads):
    all_inside = Barrier(8)

    def counts(_):
        with one_thread():
            all_inside.wait()
            inside = torch.get_num_threads(), threads_of_a_new_thread()
            all_inside.wait()
        return *inside, torch.get_num_threads()

    for _ in range(10):
        with ThreadPoolExecutor(8) as pool:
            assert set(pool.map(counts, range(8))) == {(1, 3, 3)}
        assert threads_of_a_new_thread() == 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_copy_is_complete_when_it_is_asked_for_whatever_the_device_gets_after_it():
    x = torch.arange(2**20, device="cuda")
    copied = copy_to_cpu(x)
    x.neg_()
    assert torch.equal(copied(), torch.arange(2**20)) and torch.equal(copied(), torch.arange(2**20))
    assert copied().device.type == "cpu"
