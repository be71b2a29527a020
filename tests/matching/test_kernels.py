"""The kernels, in Triton's interpreter where there is no GPU: the same picks as the plain path, whatever the data."""

import copy
import math
import pickle

import pytest
import torch
from dansm.scale.base.statistics import squared_distances
from dansm.scale.matching.auction import auction
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from test_matching import CHANGES, COSTS, KINDS, ChangedPool, NaivePool, data, total

import dansm

pytest.importorskip("triton")
from dansm.scale.matching import kernels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


# lists end again and again, lanes meet more than they remember
SHORT = dict(KEEP=(4, 8), MANY=30, LANES=16, FEW=16, SAMPLES=32)


@pytest.fixture(autouse=True)
def short_lists(request, monkeypatch):
    if "own_sizes" not in request.keywords:
        for name, value in SHORT.items():
            monkeypatch.setattr(kernels, name, value)
        monkeypatch.setattr(dansm.NoisePool, "served_at_once", SHORT["SAMPLES"])


def pool_of_kernels(*args, change="as drawn", **kwargs):
    pool = ChangedPool(*args, device=DEVICE, **kwargs)
    pool.change, pool.kernel_take = CHANGES[change], kernels.take
    return pool


def plain_pool(*args, change="as drawn", **kwargs):
    pool = pool_of_kernels(*args, change=change, **kwargs)
    pool.kernel_take = None
    return pool


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


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_paths_hand_out_the_same_and_leave_the_pool_the_same(cost, dtype):
    pools = [make(110, (5,), cost=cost, dtype=dtype, seed=3) for make in (plain_pool, pool_of_kernels)]
    x = 0.5 * torch.randn(160, 5, device=DEVICE)
    for part in x.split([40, 1, 19, 80, 20]):  # the fourth refills inside a batch
        first, second = (pool(part) for pool in pools)
        assert torch.equal(first, second)
        states = [pool.state_dict() for pool in pools]
        assert all(torch.equal(states[0][part], states[1][part]) for part in ("index", "generator"))
        left = pools[0].left
        for kept in ("noise", "squared"):
            assert torch.equal(getattr(pools[0], kept)[:left], getattr(pools[1], kept)[:left])


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
    with pytest.raises(dansm.BadInput, match="NaN, infinite or huge"):
        pool(x[:1])
    pool(x[:1])  # told once


@pytest.mark.own_sizes
def test_at_its_own_sizes_too():
    first, second = (make(1100, (3,), seed=5) for make in (plain_pool, pool_of_kernels))
    for size in (20, 60):  # lists, then in turn
        x = 0.1 * torch.randn(size, 3, device=DEVICE)
        assert torch.equal(first(x), second(x))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pool: pickle.loads(pickle.dumps(pool))])
def test_a_copy_of_a_pool_goes_on_with_the_same_noises(copied):
    x = torch.randn(30, 3, device=DEVICE)
    pool = NoisePoolOfKernels(20, (3,), seed=0, device=DEVICE)
    pool(x[:7])
    assert torch.equal(copied(pool)(x), pool(x))


class NoisePoolOfKernels(dansm.NoisePool):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.kernel_take = kernels.take


def test_a_gpu_where_triton_fails_is_told_once_and_goes_the_plain_way(monkeypatch):
    def fails(device, *way):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(kernels, "try_out", fails)
    dansm.gpu_kernels.cache_clear()
    with pytest.warns(UserWarning, match=r"cuda:7 goes the plain way.*no compiler"):
        assert dansm.gpu_kernels(torch.device("cuda:7")) is None
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dansm.gpu_kernels(torch.device("cuda:7")) is None
    dansm.gpu_kernels.cache_clear()


WAYS = [("squared", torch.float32, False), ("inner", torch.float32, True), ("squared", torch.bfloat16, False),
        ("inner", torch.float64, False)]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_the_trial_notices_kernels_that_pick_wrong(monkeypatch, way):
    kernels.try_out(DEVICE, *way)
    monkeypatch.setattr(kernels, "take", lambda pool, x: pool.noise[: len(x)])
    with pytest.raises(RuntimeError, match="other noises"):
        kernels.try_out(DEVICE, *way)


def test_the_trial_notices_an_auction_that_gives_a_noise_twice(monkeypatch):
    kernels.try_out(DEVICE)
    monkeypatch.setattr(kernels, "auction", lambda cost, gap: (torch.zeros(len(cost)), 0.0, 0.0))
    with pytest.raises(RuntimeError, match="twice"):
        kernels.try_out(DEVICE)


# ------------------------------------------------------------------------------- linear assignment


@pytest.mark.parametrize(("samples", "noises"), [(1, 1), (2, 2), (1, 9), (30, 30), (20, 33), (64, 64)])
@pytest.mark.parametrize("dim", [2, 40])
def test_the_auction_is_within_its_gap_of_scipy_and_its_bound_holds(samples, noises, dim):
    cost = squared_distances(torch.randn(samples, dim, device=DEVICE), torch.randn(noises, dim, device=DEVICE))
    picks, reached, bound = auction(cost, 1e-3)
    rows, columns = linear_sum_assignment(cost.cpu().double().numpy())
    best = cost.cpu().double().numpy()[rows, columns].sum()
    assert len(set(picks.tolist())) == samples
    assert reached == pytest.approx(total(cost.double(), picks), rel=1e-6)
    rounding = 1e-6 * cost.sum().item()
    assert bound - rounding <= best <= reached + rounding
    assert reached - bound <= 1e-3 * (cost.mean().item() * samples - reached) + rounding


@pytest.mark.parametrize("cost", [torch.zeros(5, 5), torch.full((4, 6), -7.5), torch.arange(6.0).repeat(6, 1)])
def test_the_auction_ends_where_all_pairings_cost_the_same(cost):
    picks, reached, bound = auction(cost.to(DEVICE), 1e-3)
    assert len(set(picks.tolist())) == len(cost)
    assert bound == pytest.approx(reached, abs=1e-4)


@pytest.mark.parametrize("noises", [1, 8, 33, 255, 256, 5000])
def test_no_word_is_read_by_two_threads_of_an_auction(monkeypatch, noises):
    """Of 256 threads and 8 lanes many read the same word, one of them before another program wrote it: they bid for
    different noises and wait for each other for ever. Seen once: a training that assigned within batches of eight stood
    still after some hundred auctions on an H100, beside other trainings."""
    class Launched(Exception):
        pass

    class Kernel:
        def __getitem__(self, grid):
            return self

        def __call__(self, cost, words, samples, noises, epsilon, lanes, num_warps):
            assert 32 * num_warps <= lanes <= 4096 and lanes >= min(noises, 4096)
            raise Launched

    monkeypatch.setattr(kernels, "_bid", Kernel())
    with pytest.raises(Launched):
        auction(torch.rand(noises, noises), 1e-3)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="takes a GPU: in the interpreter one program bids after the other")
def test_many_small_auctions_end():
    for _ in range(20_000):
        picks = auction(torch.rand(8, 8, device=DEVICE), 1e-3)[0]
        assert sorted(picks.tolist()) == list(range(8))


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_the_auction_refuses_costs_that_are_not_finite(wrong):
    cost = torch.rand(6, 6, device=DEVICE)
    cost[2] = wrong
    with pytest.raises(dansm.BadInput, match="6 samples and 6 noises hold NaN or infinite"):
        auction(cost, 1e-3)


def test_the_auction_keeps_its_gap_where_some_noises_are_far_from_all():
    cost = torch.rand(24, 24, device=DEVICE) + 1e4 * torch.rand(24, device=DEVICE)
    _, reached, bound = auction(cost, 1e-3)
    assert reached - bound <= 1e-3 * (24 * cost.double().mean().item() - reached)


def test_the_bound_holds_for_any_prices():
    cost = torch.randn(7, 9, dtype=torch.float64)
    rows, columns = linear_sum_assignment(cost.numpy())
    for _ in range(50):
        assert kernels._bound(cost, torch.rand(9).double()) <= cost.numpy()[rows, columns].sum() + 1e-9
