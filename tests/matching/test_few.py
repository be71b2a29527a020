"""Batches of a few samples in one launch, in Triton's interpreter where there is no GPU: the plain path's noises."""

import copy
import math

import pytest
import torch
from pools import CHANGES, Changed, ChangedFastPool, data

from dansm import BadInput

pytest.importorskip("triton")

from dansm.scale.matching import few_kernels, kernels, prices

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.usefixtures("short_lists", "small_programs")


@pytest.fixture
def small_programs(monkeypatch):
    """Few noises go through all that many go through: programs of eight and of four, more than one load of keys."""
    monkeypatch.setattr(few_kernels, "MANY", 20)
    monkeypatch.setattr(few_kernels, "LANES", 2)
    found = {"few_kernels": few_kernels}
    monkeypatch.setattr(kernels, "working", lambda module, *way: found.get(module))


@pytest.fixture
def served(monkeypatch):
    """The sizes of the batches, or parts of them, that were served in one launch."""
    sizes, serve = [], few_kernels.Few.__call__

    def noted(few, pool, x):
        sizes.append(len(x))
        return serve(few, pool, x)

    monkeypatch.setattr(few_kernels.Few, "__call__", noted)
    return sizes


class ChangedKernelPool(Changed, kernels.KernelPool):
    pass


def pools(match_size, width, change="as drawn", **settings):
    """A plain pool and one with the kernels, of the same noises."""
    settings = dict(device=DEVICE, seed=3, cost="squared") | settings
    both = [kind(match_size, (width,), **settings) for kind in (ChangedFastPool, ChangedKernelPool)]
    for pool in both:
        pool.change = CHANGES[change]
    return both


def samples(kind, count, width, seed=0, dtype=torch.float32):
    return data(kind, count, width, torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def check_the_same(plain, pool, batches):
    for x in batches:
        assert torch.equal(plain(x), pool(x))
        left = pool.left
        assert torch.equal(plain.index[:left].sort().values, pool.index[:left].sort().values)
        labels = pool.index[:left].long()
        assert torch.equal(pool.place[labels].cpu(), torch.arange(left, dtype=torch.int32))
        assert (pool.place == -1).sum() == pool.rows - left
        own = plain.own[:left][plain.index[:left].argsort()]
        assert torch.equal(own, pool.own[:left][pool.index[:left].argsort()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "change"), [("whole numbers", "whole numbers"), ("the same", "whole numbers"),
                                              ("random", "all the same"), ("whole numbers", "duplicates")])
def test_batches_of_all_sizes_get_the_plain_paths_noises_over_whole_lives(kind, change, dtype, served):
    plain, pool = pools(31, 6, change, dtype=dtype)
    if change == "duplicates":
        for one in plain, pool:
            one.change = lambda noise: CHANGES["duplicates"](noise).round()
    sizes = [1, 2, 3, 4, 5, 6, 7, 8, 8, 1, 7, 2, 3, 5]  # the eighth and the last go on in the next pool
    check_the_same(plain, pool, samples(kind, sum(sizes), 6).split(sizes))
    assert served == [1, 2, 3, 4, 5, 6, 7, 3, 5, 8, 1, 7, 2, 3, 5]


@pytest.mark.parametrize("size", [2, 3, 8])
def test_the_last_noises_of_a_pool_are_handed_out(size, served):
    plain, pool = pools(size, 5)
    x = samples("random", 2 * size, 5)
    check_the_same(plain, pool, x.split(size))
    assert served == [size, size]


@pytest.mark.parametrize(("width", "dtype"), [(300, torch.float32), (1040, torch.bfloat16), (1, torch.float32)])
def test_noises_may_be_longer_than_what_a_program_loads_at_once_and_of_any_length(width, dtype):
    plain, pool = pools(22, width, "whole numbers", dtype=dtype)
    check_the_same(plain, pool, samples("whole numbers", 5, width, dtype=dtype).split([3, 2]))


def test_a_noise_that_many_want_goes_to_the_first(served):
    plain, pool = pools(24, 6)
    x = samples("one cluster", 12, 6)
    check_the_same(plain, pool, x.split([8, 4]))
    assert served == [8, 4]


def test_any_program_may_be_the_last(monkeypatch):
    if DEVICE.type == "cuda":
        pytest.skip("on a GPU any is")
    from triton.runtime.interpreter import InterpreterBuilder

    place = InterpreterBuilder.set_grid_idx
    monkeypatch.setattr(InterpreterBuilder, "set_grid_idx", lambda self, x, y, z: place(
        self, (x + 2) % self.grid_dim[0], y, z))
    plain, pool = pools(30, 6)
    check_the_same(plain, pool, samples("one cluster", 6, 6).split([4, 2]))


def test_long_noises_are_copied_by_a_launch_for_all_of_them(monkeypatch):
    copied = []
    hand_out = kernels.hand_out
    monkeypatch.setattr(kernels, "hand_out", lambda *rest: [copied.append(len(rest[0])), hand_out(*rest)])
    monkeypatch.setattr(few_kernels.Few, "copied", 16 * 4)
    plain, pool = pools(12, 16)
    check_the_same(plain, pool, samples("random", 8, 16).split([1, 3, 2, 1, 1]))
    assert copied == [3, 2]


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_data_that_is_not_finite_is_refused_when_the_next_batch_comes_and_breaks_nothing(wrong, served):
    pool = pools(30, 3)[1]
    x = samples("random", 7, 3)
    pool(x[:1])
    x[2], x[4, 1] = wrong, wrong
    pool(x[1:])
    assert len(set(pool.index[: pool.left].tolist())) == pool.left == 23
    with pytest.raises(BadInput, match="NaN, infinite or huge"):
        pool(x[:1])
    pool(x[:1])
    assert served == [1, 6, 1]


def test_finite_data_is_not_refused(served):
    pool = pools(30, 3)[1]
    for x in samples("random", 6, 3).split(3):
        pool(x)
    assert not pool.data_check.found.item() and served == [3, 3]


def test_a_pool_that_resumes_and_one_that_is_copied_go_on_with_the_same_noises(served):
    x = samples("random", 16, 6)
    pool = pools(30, 6)[1]
    pool(x[:3])
    pool.change = None  # a lambda cannot be copied
    resumed = pools(30, 6)[1]
    resumed.load_state_dict(pool.state_dict())
    copied = copy.deepcopy(pool)
    for part in x[3:].split([1, 8, 4]):
        expected = pool(part)
        assert torch.equal(resumed(part), expected) and torch.equal(copied(part), expected)
    assert served == [3] + 3 * [1] + 3 * [8] + 3 * [4]


def test_batches_of_another_layout_type_or_place_in_memory_get_the_same_noises(served):
    x = samples("whole numbers", 8, 6)
    plain, pool = pools(40, 6)
    shifted = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    for part in (x[:2], x[2:4].T.contiguous().T, x[4:6].double(), shifted[6:8], x[:2]):
        z = pool(part)
        assert torch.equal(plain(part), z) and z.stride() == part.stride() and z.dtype == part.dtype
    assert served == 5 * [2]


def test_what_a_small_batch_needs_no_longer_is_left_out(served, monkeypatch):
    """The second batch is served without what only refills, prices and other types need."""
    pool = pools(30, 6)[1]
    x = samples("random", 3, 6)
    pool(x[:2])
    monkeypatch.setattr(pool, "_answer", lambda *rest: pytest.fail("the long way"))
    pool(x[2:].requires_grad_())
    assert served == [2, 1] and pool.left == 27


def test_prices_are_told_by_small_batches(served, monkeypatch):
    monkeypatch.setattr(prices, "FEW", 20)
    plain, pool = pools(40, 16, cost="priced")
    x = samples("random", 60, 16)
    assert plain.prices.missing == 20
    for part in x.split(6):
        assert torch.equal(plain(part), pool(part))
        assert plain.prices.known is pool.prices.known
    assert pool.prices.known and sum(served) == 60


def test_wrong_batches_are_refused_as_ever():
    pool = pools(30, 6)[1]
    pool(samples("random", 1, 6))
    for wrong in (torch.zeros(2, 7, device=DEVICE), [1.0], torch.zeros(2, 6, dtype=torch.int32, device=DEVICE)):
        with pytest.raises(BadInput):
            pool(wrong)
    with pytest.raises(BadInput, match="labels"):
        pool(torch.zeros(1, 6, device=DEVICE), torch.zeros(1))
    with pytest.raises(BadInput, match="mask"):
        pool(torch.zeros(1, 6, device=DEVICE), mask=torch.ones(1))
    assert pool(torch.zeros(0, 6, device=DEVICE)).shape == (0, 6) and pool.left == 29


@pytest.mark.parametrize(("settings", "size"), [(dict(dtype=torch.float64), 2), (dict(), 9), (dict(match_size=65), 2)])
def test_other_pools_and_larger_batches_are_served_by_the_other_kernels(settings, size, served, monkeypatch):
    monkeypatch.setattr(kernels, "LABELS", 64)
    plain, pool = pools(**dict(match_size=20, width=6) | settings)
    x = samples("whole numbers", 3 * size, 6)
    for part in x.split(size):  # of nine samples the third ends with one
        assert torch.equal(plain(part), pool(part))
    assert served == []


def test_the_trial_notices_a_kernel_that_picks_wrong(monkeypatch):
    monkeypatch.setattr(few_kernels.Few, "__call__", lambda self, pool, x: pool.noise[: len(x)])
    with pytest.raises(RuntimeError, match="other noises"):
        few_kernels.try_out(DEVICE, torch.float32, width=16)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_trial_passes(dtype, monkeypatch):
    monkeypatch.setattr(few_kernels, "MANY", 40)
    few_kernels.try_out(DEVICE, dtype, width=16)
