"""The search of large pools, in Triton's interpreter where there is no GPU: the same picks as the plain path."""

import copy
import math
import pickle

import pytest
import torch
from pools import CHANGES, Changed, ChangedFastPool, data

from dansm import BadInput

pytest.importorskip("triton")
from dansm.scale.matching import kernels, search_kernels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.usefixtures("short_lists", "small_blocks")


@pytest.fixture
def small_blocks(request, monkeypatch):
    if "own_sizes" not in request.keywords:
        monkeypatch.setattr(search_kernels, "SPARE", 1)
        monkeypatch.setattr(search_kernels, "NEAR", 64)
    monkeypatch.setattr(search_kernels, "AT_ONCE", 32)  # fewer programs: each takes milliseconds


class ChangedSearchPool(Changed, search_kernels.SearchPool):
    pass


def pools(match_size, width=16, change="as drawn", **settings):
    settings = dict(device=DEVICE, dtype=torch.bfloat16, seed=3) | settings
    both = [kind(match_size, (width,), **settings) for kind in (ChangedFastPool, ChangedSearchPool)]
    for pool in both:
        pool.change = CHANGES[change]
    return both


@pytest.fixture
def searches(monkeypatch):
    """How many noises were left whenever a batch was matched by a search."""
    lefts, take = [], search_kernels.take
    monkeypatch.setattr(search_kernels, "take", lambda pool, x: [lefts.append(pool.left), take(pool, x)][1])
    return lefts


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "width", "cost"), [("random", 16, "squared"), ("random", 48, "priced"),
                                                     ("one cluster", 48, "squared"), ("one cluster", 16, "inner")])
def test_a_search_finds_what_all_costs_would(kind, width, cost, searches):
    plain, pool = pools(1500, width, cost=cost)
    for size in (20, 1, 32, 7):
        x = data(kind, size, width, torch.Generator().manual_seed(size)).to(DEVICE)
        assert torch.equal(plain(x), pool(x))
        assert torch.equal(plain.index[: plain.left].sort().values, pool.index[: pool.left].sort().values)
    assert searches == [1500, 1480, 1479, 1447]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "change"), [("whole numbers", "whole numbers"), ("the same", "whole numbers"),
                                              ("random", "all the same"), ("the same", "as drawn")])
def test_of_equal_costs_the_first_noise_wins(kind, change, searches):
    plain, pool = pools(400, change=change)
    for size in (32, 11):
        x = data(kind, size, 16, torch.Generator().manual_seed(size)).to(DEVICE)
        assert torch.equal(plain(x), pool(x))
    assert searches == [400, 368]


@pytest.mark.slow
def test_few_noises_are_matched_by_their_costs_and_the_next_pool_is_searched(searches):
    plain, pool = pools(100)
    x = torch.randn(230, 16, device=DEVICE)
    for part in x.split([32, 32, 32, 32, 32, 32, 32, 6]):
        assert torch.equal(plain(part), pool(part))
    assert searches == [100, 68, 36, 100, 72, 40, 100, 76]  # and not the last 4 of the first pool, 8 of the second
    assert pool.search_scratch is None or pool.scratch is None


@pytest.mark.slow
def test_a_nearer_noise_behind_more_equal_ones_than_are_kept_is_found(searches):
    noise = torch.full((1500, 16), -4.0, device=DEVICE)
    noise[:640], noise[5], noise[1400] = 4, 5, 6  # the first numbers decide
    x = torch.zeros(3, 16, device=DEVICE)
    x[:, 0] = 1
    both = pools(1500)
    for pool in both:
        pool.change = lambda drawn: noise.to(drawn)
        pool.cost = "inner"
    assert torch.equal(both[0](x), both[1](x)) and searches == [1500]


@pytest.mark.slow
@pytest.mark.own_sizes
@pytest.mark.parametrize("left", [66_000, 70_000])
def test_a_list_is_as_long_as_its_sample_can_need(left):
    pool = search_kernels.SearchPool(70_000, (16,), dtype=torch.bfloat16, device=DEVICE, seed=0)
    pool._refill()
    pool.left = left
    x = torch.randn(kernels.SAMPLES, 16, device=DEVICE).to(torch.bfloat16)
    *memory, lists, _ = search_kernels.scratch(pool, x)
    search_kernels.short_lists(lists, pool.data_check.found, memory, x, pool)
    ranks = torch.arange(kernels.SAMPLES, device=DEVICE)
    assert ((lists >= 0).sum(1) >= (ranks + 1).clamp(max=kernels.KEEP[1])).all()


@pytest.mark.parametrize("shared", [101_376, 166_912, 232_448])
@pytest.mark.parametrize("width", [16, 192, 240, 256])
def test_what_a_program_multiplies_fits_into_its_memory(width, shared):
    padded = 256 if width > 192 else width
    for samples in (1, 64, 65, 256):
        blocks = search_kernels.blocks_of(samples, padded, shared)
        assert search_kernels.bytes_of(*blocks, padded) <= shared and (blocks[0] == 64 or samples > 64)


@pytest.mark.own_sizes
@pytest.mark.parametrize("rows", [70_000, 10**6, 2**20, 2**20 + 1, 50 * 10**6])
def test_the_memory_of_a_search_is_in_what_a_pool_promises(rows):
    pool = search_kernels.SearchPool(0, (192,), dtype=torch.bfloat16)
    needed = 4 * kernels.SAMPLES * sum(columns for columns, _ in search_kernels.sizes(rows))
    assert needed <= 4 * pool._costs_each(rows) * pool._samples_at_once(rows) < 1.1e9


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pool: pickle.loads(pickle.dumps(pool))])
def test_a_copy_goes_on_and_takes_no_scratch_memory_along(copied):
    _, pool = pools(100)
    x = torch.randn(6, 16, device=DEVICE)
    pool(x)
    pool.change = None  # a lambda cannot be pickled
    other = copied(pool)
    assert other.search_scratch is None and pool.search_scratch is not None
    assert torch.equal(other(x), pool(x))


@pytest.mark.parametrize("offset", [0, 1, 8])
def test_samples_may_begin_anywhere_in_memory(offset):
    plain, pool = pools(100)
    x = torch.randn(40, device=DEVICE).to(torch.bfloat16)[offset : offset + 32].view(2, 16)
    assert torch.equal(plain(x), pool(x))


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_data_that_is_not_finite_is_refused_when_the_next_batch_comes_and_breaks_nothing(wrong):
    _, pool = pools(80)
    x = torch.randn(10, 16, device=DEVICE)
    pool(x[:1])
    x[2], x[5, 1] = wrong, wrong
    pool(x[1:])
    assert len(set(pool.index[: pool.left].tolist())) == pool.left == 70
    with pytest.raises(BadInput, match="batch before this one"):
        pool(torch.zeros(1, 16, device=DEVICE))


@pytest.mark.parametrize(("width", "match_size", "searched"), [(16, 500, True), (24, 500, False), (16, 30, False)])
def test_only_pools_that_gain_are_searched(width, match_size, searched, searches):
    plain, pool = pools(match_size, width)
    x = torch.randn(3, width, device=DEVICE)
    assert torch.equal(plain(x), pool(x))
    assert bool(searches) is searched


@pytest.mark.own_sizes
def test_a_pool_that_is_searched_needs_no_memory_for_all_its_costs():
    kinds = kernels.KernelPool, search_kernels.SearchPool
    by_costs, by_search = (kind(0, (192,), dtype=torch.bfloat16) for kind in kinds)
    assert by_search._costs_each(10**6) < by_costs._costs_each(10**6) / 10
    assert by_search._costs_each(10**4) == by_costs._costs_each(10**4) == 10**4
