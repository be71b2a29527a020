"""The kernels, in Triton's interpreter where there is no GPU: the same picks as the plain path, whatever the data."""

import copy
import math
import pickle
import warnings
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pools import CHANGES, COSTS, KINDS, Changed, ChangedFastPool, NaivePool, data

from dansm import BadInput

pytest.importorskip("triton")
from dansm.scale.base import launch
from dansm.scale.matching import gpu, kernels
from dansm.scale.matching.pool import FastPool, pool_class

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.usefixtures("short_lists")


class ChangedKernelPool(Changed, kernels.KernelPool):
    pass


def pool_of_kernels(*args, change="as drawn", kind=ChangedKernelPool, **kwargs):
    pool = kind(*args, device=DEVICE, **kwargs)
    pool.change = CHANGES[change]
    return pool


def plain_pool(*args, **kwargs):
    return pool_of_kernels(*args, kind=ChangedFastPool, **kwargs)


@pytest.mark.slow
@settings(max_examples=20)
@given(
    match_size=st.integers(2, 70),
    sizes=st.lists(st.integers(0, 20), min_size=1, max_size=3),
    kind=st.sampled_from(KINDS),
    change=st.sampled_from(list(CHANGES)),
    cost=st.sampled_from(COSTS),
    seed=st.integers(0, 10**6),
)
@example(match_size=60, sizes=[20, 20, 20], kind="one cluster", change="as drawn", cost="squared", seed=0)
@example(match_size=60, sizes=[20, 20, 20], kind="the same", change="all the same", cost="inner", seed=0)
@example(match_size=17, sizes=[17], kind="random", change="as drawn", cost="squared", seed=0)
@example(match_size=16, sizes=[1] * 4, kind="random", change="as drawn", cost="squared", seed=0)
def test_the_kernels_are_the_papers_loop_noise_for_noise(match_size, sizes, kind, change, cost, seed):
    if change == "whole numbers" and kind != "the same":
        kind = "whole numbers"
    pool = pool_of_kernels(match_size, (6,), cost=cost, dtype=torch.float64, seed=seed, change=change)
    if DEVICE.type == "cpu":
        naive = NaivePool(match_size, 6, cost, seed, CHANGES[change])
    else:
        naive = plain_pool(match_size, (6,), cost=cost, dtype=torch.float64, seed=seed, change=change)
    generator = torch.Generator().manual_seed(seed + 1)
    for size in sizes:
        x = data(kind, size, 6, generator).to(DEVICE)
        assert torch.equal(pool(x), naive(x)), f"batch of {size}"


@pytest.mark.slow
@pytest.mark.parametrize(("cost", "dtype"),
                         [("squared", torch.float32), ("inner", torch.bfloat16), ("priced", torch.float32)])
def test_both_paths_hand_out_the_same_and_leave_the_pool_the_same(cost, dtype):
    pools = [make(110, (10,), cost=cost, dtype=dtype, seed=3) for make in (plain_pool, pool_of_kernels)]
    x = 0.5 * torch.randn(160, 10, device=DEVICE)
    for part in x.split([40, 1, 19, 80, 20]):  # the fourth refills inside a batch
        first, second = (pool(part) for pool in pools)
        assert torch.equal(first, second)
        states = [pool.state_dict() for pool in pools]
        assert all(torch.equal(states[0][part], states[1][part]) for part in ("index", "generator"))
        left = pools[0].left
        for kept in ("noise", "own"):
            assert torch.equal(getattr(pools[0], kept)[:left], getattr(pools[1], kept)[:left])


@pytest.mark.slow
def test_a_pool_saved_by_one_path_goes_on_in_the_other():
    x = torch.randn(90, 3, device=DEVICE)
    pool = pool_of_kernels(60, (3,), seed=1)
    pool(x[:25])
    for make in (plain_pool, pool_of_kernels):
        resumed = make(60, (3,), seed=2)
        resumed.load_state_dict(pool.state_dict())
        again = pool_of_kernels(60, (3,), seed=1)
        again(x[:25])
        assert torch.equal(resumed(x[25:]), again(x[25:]))


def test_the_layout_of_a_batch_in_memory_changes_no_noise():
    x = torch.randn(3, 7, device=DEVICE).T
    assert torch.equal(pool_of_kernels(20, (3,), seed=1)(x), plain_pool(20, (3,), seed=1)(x.contiguous()))


def test_place_and_index_stay_each_others_inverse():
    pool = pool_of_kernels(60, (3,), seed=1)
    for size in (7, 1, 20, 13):
        pool(torch.randn(size, 3, device=DEVICE))
        labels = pool.index[: pool.left].long()
        assert torch.equal(pool.place[labels].cpu(), torch.arange(pool.left, dtype=torch.int32))
        assert (pool.place == -1).sum() == 60 - pool.left


@pytest.mark.parametrize("match_size", [40, 12])
@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_data_that_is_not_finite_is_refused_when_the_next_batch_comes_and_breaks_nothing(match_size, cost, wrong):
    pool = pool_of_kernels(match_size, (3,), cost=cost, seed=1)
    x = torch.randn(10, 3, device=DEVICE)
    pool(x[:1])
    x[2], x[5, 1] = wrong, wrong
    pool(x[1:])
    labels = pool.index[: pool.left].tolist()
    assert len(set(labels)) == pool.left == match_size - 10
    with pytest.raises(BadInput, match="NaN, infinite or huge"):
        pool(x[:1])
    pool(x[:1])  # told once


@pytest.mark.slow
@pytest.mark.own_sizes
def test_at_its_own_sizes_too():
    first, second = (make(1100, (3,), seed=5) for make in (plain_pool, pool_of_kernels))
    for size in (20, 60):  # lists, then in turn
        x = 0.1 * torch.randn(size, 3, device=DEVICE)
        assert torch.equal(first(x), second(x))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pool: pickle.loads(pickle.dumps(pool))])
def test_a_copy_of_a_pool_goes_on_with_the_same_noises(copied):
    x = torch.randn(30, 3, device=DEVICE)
    pool = kernels.KernelPool(20, (3,), seed=0, device=DEVICE)
    pool(x[:7])
    assert torch.equal(copied(pool)(x), pool(x))


@pytest.fixture
def fresh_trials():
    gpu.working.cache_clear()
    yield
    gpu.working.cache_clear()


def test_a_gpu_where_triton_fails_is_told_once_and_goes_the_plain_way(monkeypatch, fresh_trials):
    def fails(device, *way):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(kernels, "try_out", fails)
    with pytest.warns(UserWarning, match=r"cuda:7 goes the plain way.*no compiler") as told:
        assert gpu.working("kernels", torch.device("cuda:7")) is None
    assert [warning.filename for warning in told] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert gpu.working("kernels", torch.device("cuda:7")) is None


@pytest.mark.parametrize("settings", [dict(compile=False), dict(match_size=1), dict(match_size=0), dict(device="cpu")])
def test_no_kernels_are_tried_where_none_will_be_used(monkeypatch, settings):
    monkeypatch.setattr(gpu, "working", lambda *way: pytest.fail("tried"))
    assert pool_class(**dict(match_size=10, shape=(2,), device="cuda") | settings) is FastPool


WAYS = [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False), (torch.float64, False)]


def test_a_kernel_that_is_compiled_already_does_not_run_while_others_are_only_compiled(monkeypatch):
    """It would read what these have not written: on a GPU places anywhere in its memory."""
    ran, asked = [], []
    x = torch.zeros(1)
    start = lambda grid, *arguments: ran.append(arguments)  # noqa: E731
    monkeypatch.setattr(kernels, "_started", {("kernel", x.device, x.dtype, ()): start})
    monkeypatch.setattr(kernels, "launch", lambda *arguments, **options: asked.append(arguments))
    kernels.fast_launch("kernel", (1,), x, (7,), (), warps=4)
    assert (ran, asked) == ([(7,)], [])
    monkeypatch.setattr(launch, "_compilers", "some processes")
    kernels.fast_launch("kernel", (1,), x, (7,), (), warps=4)
    assert (ran, asked) == ([(7,)], [("kernel", (1,), 7)])


def test_pools_are_multiplied_in_few_sizes():
    """For each new size cuBLAS takes longer to choose its way than the GPU to multiply."""
    sizes = [kernels.multiplied(SimpleNamespace(left=left, rows=10_000)) for left in range(10_001)]
    assert len(set(sizes)) < 130 and max(sizes) == 10_000
    assert all(left <= size <= max(left + 15, 1.07 * left) and size % 16 == 0 for left, size in enumerate(sizes))


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_the_trial_notices_kernels_that_pick_wrong(monkeypatch, way):
    kernels.try_out(DEVICE, *way)
    monkeypatch.setattr(kernels, "take", lambda pool, x: pool.noise[: len(x)])
    with pytest.raises(RuntimeError, match="other noises"):
        kernels.try_out(DEVICE, *way)
