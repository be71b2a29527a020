"""Matching: each rule against the loop of the paper written out, and what must hold whatever the rule."""

import copy
import gc
import inspect
import io
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from dansm.scale.base.noise import path_noise
from dansm.scale.base.statistics import squared_distances
from hypothesis import example, given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

import dansm
from dansm import (
    BadInput,
    NoisePool,
    _greedy_by_rounds,
    _greedy_in_turn,
    cost_matrix,
    greedy,
    inner_products,
    nearest_of_k,
    noise_generator,
    optimal,
    pairs,
)

GREEDY = [_greedy_in_turn, _greedy_by_rounds, greedy]
COSTS = ["squared", "inner"]
METHODS = ["random", "greedy", "optimal", "nearest"]


# ------------------------------------------------------------------------------- written out naively


def naive_cost(x, z, cost):
    """One sample and one noise, as lists of numbers."""
    if cost == "squared":
        return math.fsum((a - b) ** 2 for a, b in zip(x, z, strict=True))
    return -math.fsum(a * b for a, b in zip(x, z, strict=True))


def naive_greedy(cost):
    free = list(range(len(cost[0]))) if cost else []
    picks = []
    for row in cost:
        picks.append(min(free, key=lambda j: row[j]))  # min keeps the first of equals
        free.remove(picks[-1])
    return picks


def drawn_for(seed, number, match_size, dim, dtype=torch.float32):
    """The noises of a pool that is drawn at once, as small ones are."""
    generator = noise_generator(seed, "cpu", number, 0)
    return torch.empty(match_size, dim, dtype=dtype).normal_(generator=generator)


class NaivePool:
    """The paper's loop with lists: the nearest noise leaves the list, an empty list is filled again."""

    def __init__(self, match_size, dim, cost, seed, change):
        self.match_size, self.dim, self.cost, self.change = match_size, dim, cost, change
        self.seed, self.number = seed, 0
        self.noises = []

    def __call__(self, x):
        handed_out = []
        for sample in x.flatten(1).tolist():
            if not self.noises:
                self.number += 1
                drawn = drawn_for(self.seed, self.number, self.match_size, self.dim, torch.float64)
                self.noises = self.change(drawn).tolist()
            costs = [naive_cost(sample, z, self.cost) for z in self.noises]
            handed_out.append(self.noises.pop(costs.index(min(costs))))
        return torch.tensor(handed_out, dtype=torch.float64).view(x.shape)


class ChangedPool(NoisePool):
    """A pool whose noises are changed after they are drawn, to have noises that are exactly equally far."""

    change = staticmethod(lambda noise: noise)

    def _draw(self, number, chunk, ours):
        return ours.copy_(self.change(super()._draw(number, chunk, ours)))


CHANGES = {
    "as drawn": lambda noise: noise.clone(),
    "whole numbers": lambda noise: noise.round(),  # many exact ties, all sums exact in float64
    "duplicates": lambda noise: noise[torch.arange(len(noise)) // 3],
    "all the same": lambda noise: torch.ones_like(noise),
}


def data(kind, count, dim, generator):
    x = torch.randn(count, dim, dtype=torch.float64, generator=generator)
    if kind == "whole numbers":
        return (2 * x).round()
    if kind == "one cluster":  # every sample wants the same few noises
        return 3 + 1e-3 * x
    if kind == "the same":
        return torch.full_like(x, 0.5)
    return x


KINDS = ["random", "whole numbers", "one cluster", "the same"]


# ------------------------------------------------------------------------------- greedy


@st.composite
def costs_with_ties(draw):
    """(B, M) of a few whole numbers, so that ties are everywhere, or of any numbers."""
    samples = draw(st.integers(1, 12))
    noises = draw(st.integers(samples, 60))  # both below and above the 4 × samples where `greedy` changes its way
    highest = draw(st.sampled_from([0, 1, 3, 10**6]))
    seed = draw(st.integers(0, 2**32 - 1))
    values = np.random.default_rng(seed).integers(-highest, highest, (samples, noises), endpoint=True)
    return torch.from_numpy(values.astype(np.float64))


@pytest.mark.parametrize("match", GREEDY)
@given(cost=costs_with_ties())
def test_greedy_is_the_serial_loop_index_for_index(match, cost):
    assert match(cost).tolist() == naive_greedy(cost.tolist())


@pytest.mark.parametrize("match", GREEDY)
@given(st.integers(1, 12), st.integers(0, 48), st.sampled_from(KINDS), st.sampled_from(COSTS), st.integers(0, 10**6))
def test_greedy_is_the_serial_loop_on_clustered_and_equal_data(match, samples, more, kind, cost, seed):
    generator = torch.Generator().manual_seed(seed)
    x = data(kind, samples, 3, generator)
    z = data(kind, samples + more, 3, generator)
    z[::2] = z[: len(z[::2])].clone()  # every second noise is a copy of another
    costs = cost_matrix(x, z, cost)
    assert match(costs).tolist() == naive_greedy(costs.tolist())


@pytest.mark.parametrize("match", GREEDY)
def test_greedy_with_all_samples_quarrelling_over_the_same_noises(match):
    ranked = torch.arange(40.0, dtype=torch.float64)
    assert match(ranked.repeat(10, 1)).tolist() == list(range(10))
    assert match(ranked.flip(0).repeat(40, 1)).tolist() == list(range(39, -1, -1))


@pytest.mark.parametrize("match", GREEDY)
def test_greedy_never_takes_a_noise_that_is_taken(match):
    cost = torch.rand(6, 30, dtype=torch.float64)
    taken = torch.randperm(30)[:24]
    cost[:, taken] = torch.inf
    picks = match(cost).tolist()
    assert sorted(picks) == sorted(set(range(30)) - set(taken.tolist()))


@pytest.mark.parametrize("match", GREEDY)
@pytest.mark.parametrize("noises", [6, 30])
@pytest.mark.parametrize("wrong", [torch.inf, torch.nan])
def test_greedy_refuses_a_sample_that_can_have_no_noise(match, noises, wrong):
    cost = torch.rand(3, noises)
    cost[1:] = wrong
    cost[1:, 4] = 0.5  # for two samples one noise
    with pytest.raises(BadInput, match="NaN, or infinite for every noise that is left"):
        match(cost)
    with pytest.raises(BadInput, match="NaN or infinite"):
        optimal(cost)


@pytest.mark.parametrize("noises", [6, 30])
def test_costs_in_half_precision_or_with_gradients_are_matched(noises):
    cost = torch.randint(0, 99, (5, noises)).float()
    for match in (greedy, lambda cost: optimal(cost).picks):
        expected = match(cost).tolist()
        assert match(cost.bfloat16()).tolist() == expected
        assert match(cost.clone().requires_grad_()).tolist() == expected


@pytest.mark.parametrize("infinite", [False, True])
def test_greedy_refuses_more_samples_than_noises_naming_both(infinite):
    cost = torch.full((9, 7), torch.inf) if infinite else torch.rand(9, 7)
    with pytest.raises(BadInput, match="9 samples and 7 noises"):
        greedy(cost)


@pytest.mark.parametrize("match", GREEDY)
def test_no_samples_take_no_noise(match):
    assert match(torch.empty(0, 5)).tolist() == optimal(torch.empty(0, 5)).picks.tolist() == []


@pytest.mark.parametrize("samples", [1, 40])
def test_large_products_are_as_exact_as_small_ones(samples):
    z = torch.randn(2**28 // 1024 // samples + 1, 1024)
    x = torch.randn(samples, 1024)
    found = inner_products(x, z)
    assert found.is_contiguous() and found.dtype == torch.float32
    some = torch.arange(0, len(z), 97)
    torch.testing.assert_close(found[:, some].double(), x.double() @ z[some].double().T, rtol=0, atol=1e-3)


@pytest.mark.parametrize("shape", [(2,), (3, 2, 2), (200,)])
def test_costs_are_what_their_names_say(shape):
    x, z = torch.randn(5, *shape, dtype=torch.float64), torch.randn(7, *shape, dtype=torch.float64)
    rows, noises = x.flatten(1).tolist(), z.flatten(1).tolist()
    expected = {cost: torch.tensor([[naive_cost(a, b, cost) for b in noises] for a in rows], dtype=torch.float64)
                for cost in COSTS}
    torch.testing.assert_close(cost_matrix(x, z, "inner"), expected["inner"], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(squared_distances(x, z), expected["squared"], rtol=1e-11, atol=1e-11)
    of_the_sample_alone = expected["squared"] - cost_matrix(x, z, "squared")
    torch.testing.assert_close(of_the_sample_alone, x.flatten(1).square().sum(1, keepdim=True).expand(5, 7))
    squares = z.flatten(1).square().sum(1)
    torch.testing.assert_close(cost_matrix(x, z, "squared", squares), cost_matrix(x, z), rtol=1e-13, atol=1e-13)


# ------------------------------------------------------------------------------- the pool


@given(
    match_size=st.integers(2, 70),
    sizes=st.lists(st.integers(0, 25), min_size=1, max_size=8),
    kind=st.sampled_from(KINDS),
    change=st.sampled_from(list(CHANGES)),
    cost=st.sampled_from(COSTS),
    seed=st.integers(0, 10**6),
)
@example(match_size=20, sizes=[10, 10, 10], kind="random", change="as drawn", cost="squared", seed=0)  # divides
@example(match_size=10, sizes=[10, 10], kind="random", change="as drawn", cost="squared", seed=0)  # the batch itself
@example(match_size=7, sizes=[10, 10], kind="one cluster", change="as drawn", cost="inner", seed=0)  # refills inside
@example(match_size=2, sizes=[25], kind="whole numbers", change="whole numbers", cost="squared", seed=0)
@example(match_size=30, sizes=[1] * 8, kind="the same", change="all the same", cost="squared", seed=0)
def test_the_pool_is_the_papers_loop_noise_for_noise(match_size, sizes, kind, change, cost, seed):
    # Ties must be exact: whole numbers have exact sums, and which of two equal noises is handed out cannot be seen.
    if change == "whole numbers" and kind != "the same":
        kind = "whole numbers"
    pool = ChangedPool(match_size, (3, 2), cost=cost, dtype=torch.float64, seed=seed)
    pool.change = CHANGES[change]
    naive = NaivePool(match_size, 6, cost, seed, CHANGES[change])
    generator = torch.Generator().manual_seed(seed + 1)
    for size in sizes:
        x = data(kind, size, 6, generator).view(size, 3, 2)
        assert torch.equal(pool(x), naive(x)), f"batch of {size}"


@pytest.mark.parametrize("cost", COSTS)
def test_the_pool_is_the_papers_loop_at_its_own_sizes(cost):
    """Long enough for taken noises to be swept out several times, and the pool to be drawn anew."""
    pool = NoisePool(300, (4,), cost=cost, dtype=torch.float64, seed=3)
    naive = NaivePool(300, 4, cost, 3, CHANGES["as drawn"])
    for _ in range(13):
        x = torch.randn(50, 4, dtype=torch.float64)
        assert torch.equal(pool(x), naive(x))


@pytest.mark.parametrize("match_size", [0, 1])
def test_match_size_0_and_1_are_vanilla_training(match_size):
    pool = NoisePool(match_size, (3, 2), seed=5)
    generator = noise_generator(5)
    for size in (4, 1, 7):
        assert torch.equal(pool(torch.full((size, 3, 2), 9.0)), torch.randn(size, 3, 2, generator=generator))


def rows_in_order(z):
    rows = z.flatten(1).numpy()
    return rows[np.lexsort(rows.T)].tobytes()


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize(
    ("match_size", "batch"), [(2, 1), (50, 1), (60, 20), (53, 20), (20, 20), (20, 53), (7, 64), (600, 250)]
)
def test_a_whole_pool_hands_out_exactly_the_noises_drawn(match_size, batch, cost):
    pool = NoisePool(match_size, (2, 3), cost=cost, seed=11)
    x = 1 + 0.1 * torch.randn(3 * match_size, 2, 3)
    z = torch.cat([pool(part) for part in x.split(batch)])
    for number, used in enumerate(z.split(match_size), 1):
        assert rows_in_order(used) == rows_in_order(drawn_for(11, number, match_size, 6))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("match_size", [0, 5, 100])
def test_noises_come_in_the_dtype_of_the_batch(dtype, match_size):
    x = torch.randn(8, 3, 2).to(dtype)
    z = NoisePool(match_size, (3, 2), seed=0)(x)
    assert (z.dtype, z.shape, z.device, z.requires_grad) == (dtype, x.shape, x.device, False)
    if match_size:
        expected = NoisePool(match_size, (3, 2), seed=0)(x.float()).to(dtype)
        assert torch.equal(z, expected)


@pytest.mark.parametrize("match_size", [8, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_pool_kept_in_another_precision_hands_out_all_its_noises(dtype, match_size):
    z = NoisePool(match_size, (4,), dtype=dtype, seed=0)(torch.randn(match_size, 4))
    assert rows_in_order(z) == rows_in_order(drawn_for(0, 1, match_size, 4, dtype).float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.int64, torch.complex64])
def test_a_pool_kept_in_a_type_that_cannot_hold_a_distance_is_refused(dtype):
    """float16 ends at 65,504: a product of two long samples would be inf, and inf means taken."""
    with pytest.raises(BadInput, match=rf"dtype is {dtype}.*float32.*float64.*bfloat16"):
        NoisePool(8, (4,), dtype=dtype)


def test_the_pool_does_not_mind_how_a_batch_lies_in_memory():
    x = torch.randn(6, 3, 4, 5)
    expected = NoisePool(17, (3, 4, 5), seed=0)(x)
    channels_last = x.to(memory_format=torch.channels_last)
    turned = x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    sliced = torch.stack([x, x], -1).flatten(3)[..., ::2]
    for other in (channels_last, turned, sliced):
        assert torch.equal(other, x) and not other.is_contiguous()
        assert torch.equal(NoisePool(17, (3, 4, 5), seed=0)(other), expected)
    assert NoisePool(17, (3, 4, 5), seed=0)(x[:1].expand(6, 3, 4, 5)).shape == x.shape


def test_a_batch_of_no_samples_takes_nothing_from_the_pool():
    pool, untouched = NoisePool(10, (3,), seed=1), NoisePool(10, (3,), seed=1)
    x = torch.randn(4, 3)
    assert pool(x[:0]).shape == (0, 3)
    assert torch.equal(pool(x), untouched(x))
    assert pool(x[:0]).shape == (0, 3) and pool.left == 6


def test_the_batch_itself_is_left_as_it_was():
    x = torch.randn(9, 3)
    before = x.clone()
    NoisePool(4, (3,), seed=0)(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("match_size", [0, 1, 10])
def test_a_batch_of_another_shape_is_refused_naming_both(match_size):
    pool = NoisePool(match_size, (3, 8, 8), seed=0)
    with pytest.raises(BadInput) as refused:
        pool(torch.zeros(2, 8, 8, 3))
    assert "(3, 8, 8)" in str(refused.value) and "(2, 8, 8, 3)" in str(refused.value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("match_size", [0, 10])
def test_data_that_is_not_finite_is_refused_and_takes_nothing(value, match_size):
    pool, untouched = NoisePool(match_size, (2,), seed=0), NoisePool(match_size, (2,), seed=0)
    x = torch.zeros(3, 2)
    x[1, 1] = value
    with pytest.raises(BadInput, match="NaN, infinite or huge"):
        pool(x)
    assert torch.equal(pool(x[:1]), untouched(x[:1]))


@pytest.mark.parametrize("match_size", [-1, 2.5, math.nan, True])
def test_a_match_size_that_is_no_count_is_refused(match_size):
    with pytest.raises(BadInput, match="match_size"):
        NoisePool(match_size, (2,), seed=0)


@pytest.mark.parametrize("match_size", [math.inf, -math.inf, "many"])
def test_a_match_size_that_is_no_number_is_refused(match_size):
    with pytest.raises(BadInput, match="match_size"):
        NoisePool(match_size, (2,), seed=0)


def test_a_cost_of_another_name_is_refused():
    with pytest.raises(BadInput, match=r"euclid.*squared, inner"):
        NoisePool(5, (2,), cost="euclid", seed=0)


@pytest.mark.parametrize("match_size", [8, 80])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_data_has_a_distance_below_1e15_and_is_refused_from_there_on(match_size, dtype):
    """‖x‖² of finite data may overflow, and a cost of inf means taken: noise 0 for every sample, or no end."""
    pool = NoisePool(match_size, (4,), dtype=dtype, seed=0)
    z = pool(torch.full((match_size, 4), -9.9e14, dtype=dtype))
    assert len(np.unique(z.numpy(), axis=0)) == match_size
    for value in (1e15, 1e20, torch.finfo(dtype).max / 4):
        with pytest.raises(BadInput, match="1e15"):
            pool(torch.full((match_size, 4), value, dtype=dtype))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
def test_whole_numbered_data_is_refused_naming_its_type(dtype, method):
    """uint8 images given by mistake: a noise of 0, 1 and 255 would train on nonsense."""
    with pytest.raises(BadInput, match=f"{dtype}.*floating point"):
        list(pairs([torch.ones(3, 4).to(dtype)], method, 8))


# ------------------------------------------------------------------------------- drawn bit by bit


class Chunked(NoisePool):
    """Small chunks, so that a pool of a few noises has many, and the last one is shorter."""

    drawn_at_once = 12


def drawn_in_chunks(seed, number, match_size, dim):
    rows = 12 // dim
    parts = torch.empty(match_size, dim).split(rows)
    return torch.cat([part.normal_(generator=noise_generator(seed, "cpu", number, chunk))
                      for chunk, part in enumerate(parts)])


@pytest.mark.parametrize("batch", [1, 3, 5, 14, 30])
@pytest.mark.parametrize("match_size", [2, 7, 8, 30])
def test_a_pool_is_the_same_however_it_is_drawn_and_is_drawn_as_places_get_free(match_size, batch):
    pool = Chunked(match_size, (3,), seed=4)
    x = torch.randn(3 * match_size, 3)
    z = []
    for part in x.split(batch):
        z.append(pool(part))
        free = match_size - pool.left - pool.drawn
        assert 0 <= free < 4 or pool.drawn == match_size  # never more than the next chunk waits
    for number, used in enumerate(torch.cat(z).split(match_size), 1):
        assert rows_in_order(used) == rows_in_order(drawn_in_chunks(4, number, match_size, 3))


@pytest.mark.parametrize("served", [0, 1, 4, 11, 20, 29, 30, 31, 47])
def test_a_saved_pool_of_many_chunks_goes_on_with_the_same_noises(served):
    x = torch.randn(served + 90, 3)
    pool = Chunked(30, (3,), seed=7)
    for part in x[:served].split(4):
        pool(part)
    resumed = Chunked(30, (3,), seed=99)
    resumed.load_state_dict(saved_and_loaded(pool))
    for part in x[served:].split(7):
        assert torch.equal(resumed(part), pool(part))
        assert (resumed.left, resumed.drawn, resumed.number) == (pool.left, pool.drawn, pool.number)


@pytest.mark.parametrize("match_size", [30, 200])
def test_a_batch_is_served_in_slices_as_if_it_were_whole(monkeypatch, match_size):
    x = torch.randn(130, 3)
    whole = NoisePool(match_size, (3,), seed=0)(x)
    monkeypatch.setattr(NoisePool, "served_at_once", 16)
    assert torch.equal(NoisePool(match_size, (3,), seed=0)(x), whole)


def test_settings_of_the_trainer_around_change_no_pick():
    x = 0.3 * torch.randn(20, 64)
    expected = NoisePool(200, (64,), seed=0)(x)
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    try:
        settings.fp32_precision = "tf32"
        with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
            assert torch.equal(NoisePool(200, (64,), seed=0)(x), expected)
        assert settings.fp32_precision == "tf32"
    finally:
        settings.fp32_precision = before
    assert torch.equal(NoisePool(200, (64,), seed=0, fast=True)(x), expected)  # a CPU knows no tf32


def test_a_pool_goes_on_after_a_batch_in_inference_mode():
    x = torch.randn(30, 3)
    expected = NoisePool(20, (3,), seed=0)(x)
    for first in (5, 25):
        pool = NoisePool(20, (3,), seed=0)
        z = [pool(x[:3])]
        with torch.inference_mode():
            z.append(pool(x[3:first]))
        z.append(pool(x[first:]))
        assert torch.equal(torch.cat(z), expected)
        assert not z[1].is_inference()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pool: pickle.loads(pickle.dumps(pool))])
def test_a_copy_of_a_pool_goes_on_with_the_same_noises(copied):
    x = torch.randn(60, 3)
    pool = NoisePool(20, (3,), seed=0)
    pool(x[:7])
    assert torch.equal(copied(pool)(x), pool(x))


def test_torchs_default_device_is_not_the_pools():
    with torch.device("meta"):
        pool = NoisePool(9, (3,), seed=0)
    assert torch.equal(pool(torch.ones(4, 3)), NoisePool(9, (3,), seed=0)(torch.ones(4, 3)))


def test_gradients_do_not_flow_through_the_matching():
    x = torch.randn(5, 3, requires_grad=True)
    assert not NoisePool(9, (3,), seed=0)(x).requires_grad


# ------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory", [0.5, 1.0, 3.0])
def test_memory_gives_the_largest_pool_that_fits(memory, dtype):
    pool = NoisePool(None, (4, 32, 32), memory=memory, dtype=dtype, seed=0)
    assert pool._bytes(pool.match_size) <= 1e9 * memory < pool._bytes(pool.match_size + 1)
    noises = pool.match_size * 4096 * dtype.itemsize
    assert 0.4 * memory < noises / 1e9 < memory
    assert pool.noise.numel() == 0  # nothing is taken yet


def test_4096_large_latents_fit_into_four_and_a_half_gigabytes():
    assert NoisePool(4096, (16, 128, 128), memory=4.5, seed=0).match_size == 4096
    assert NoisePool(None, (16, 128, 128), memory=4.5, seed=0).match_size >= 4096


def test_a_pool_that_does_not_fit_says_what_it_needs_and_what_would_fit():
    fitting = NoisePool(None, (4, 32, 32), memory=2.0, seed=0).match_size
    with pytest.raises(BadInput, match=rf"is 1,000,000: .*needs 2\d\.\d GB.*2.0 GB; expected at most {fitting:,}"):
        NoisePool(10**6, (4, 32, 32), memory=2.0)
    with pytest.raises(BadInput, match=r"match_size is 1,000,000,000: .*needs [\d,.]+ GB and cpu has [\d.]+ GB free"):
        NoisePool(10**9, (4, 32, 32))


@pytest.mark.parametrize("memory", [0, -1.0, math.nan, math.inf, "4 GB", 0.05])
def test_memory_that_is_none_or_holds_no_pool_is_refused(memory):
    with pytest.raises(BadInput, match="memory is"):
        NoisePool(None, (3, 32, 32), memory=memory)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to measure memory")
@pytest.mark.parametrize(("shape", "batch"), [((16, 64, 64), 250), ((4, 32, 32), 600), ((64,), 100)])
def test_no_more_memory_is_taken_than_was_set(shape, batch):
    from dansm.scale.bench.match import peak_mb, reset_peak

    x = torch.randn(batch, *shape)
    z = torch.empty_like(x).fill_(1)  # the batch and its noises are not counted, nor is their joining
    device = torch.device("cpu")
    NoisePool(1000, shape, seed=1)(x[:100])  # what libraries keep from their first product on is not the pool's either
    gc.collect()
    reset_peak(device)
    before = peak_mb(device)
    pool = NoisePool(None, shape, memory=0.3, seed=0)
    for _ in range(3):
        pool(x)
    assert peak_mb(device) - before < 300 + 2 * z.nbytes / 1e6


def test_nearest_of_a_k_that_does_not_fit_is_refused_naming_it():
    with pytest.raises(BadInput, match=r"match_size is 10,000,000,000,000.*GB free"):
        nearest_of_k(torch.zeros(2, 3), 10**13)


# ------------------------------------------------------------------------------- saved state


def saved_and_loaded(pool):
    file = io.BytesIO()
    torch.save(pool.state_dict(), file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("match_size", [0, 1, 2, 10, 40])
@pytest.mark.parametrize("served", [0, 1, 2, 9, 10, 11, 29, 31, 39, 40, 41, 80])
def test_a_saved_pool_goes_on_with_the_same_noises(match_size, served, cost):
    """At 40: fresh, just begun, before and after taken noises are swept out, one left, emptied, in the next pool."""
    x = torch.randn(served + 100, 3)
    pool = NoisePool(match_size, (3,), cost=cost, seed=7)
    for part in x[:served].split(4):
        pool(part)
    resumed = NoisePool(match_size, (3,), cost=cost, seed=99)  # its own seed must not matter
    resumed.load_state_dict(saved_and_loaded(pool))
    for part in x[served:].split(6):
        assert torch.equal(resumed(part), pool(part))
        assert resumed.left == pool.left


def test_a_used_pool_can_be_set_back_to_its_saved_state():
    pool = NoisePool(20, (3,), seed=0)
    x = torch.randn(50, 3)
    pool(x[:13])
    state = saved_and_loaded(pool)
    expected = pool(x)  # goes through two more pools
    for _ in range(2):
        pool.load_state_dict(state)
        assert torch.equal(pool(x), expected)


def test_a_state_does_not_change_when_its_pool_goes_on():
    pool = NoisePool(20, (3,), seed=0)
    x = torch.randn(50, 3)
    pool(x[:3])
    state = pool.state_dict()
    expected = pool(x)
    other = NoisePool(20, (3,), seed=0)
    other.load_state_dict(state)
    assert torch.equal(other(x), expected)


def test_a_state_of_another_process_is_refused(monkeypatch):
    """Each process draws noises of its own: the index of one says nothing of another's."""
    pools = []
    for process in range(2):
        monkeypatch.setattr(dansm, "place_in_group", lambda *_, process=process: (process, 0, 1))
        pools.append(NoisePool(8, (3,), seed=0))
    states = [pool.state_dict() for pool in pools]
    for pool, state in zip(pools, states, strict=True):
        pool.load_state_dict(state)
    for pool, state in zip(pools, reversed(states), strict=True):
        with pytest.raises(BadInput, match="expected the same"):
            pool.load_state_dict(state)


def test_the_limit_of_a_container_counts(tmp_path):
    assert dansm.left_to_container(tmp_path / "none") == 2**62
    for name, text in (("memory.max", "max"), ("memory.current", "700"), ("memory.stat", "anon 5\ninactive_file 50\n")):
        (tmp_path / name).write_text(text + "\n")
    assert dansm.left_to_container(tmp_path) == 2**62
    (tmp_path / "memory.max").write_text("1000\n")
    assert dansm.left_to_container(tmp_path) == 350


def test_a_saved_state_is_small():
    """The pool itself is drawn again: the file holds 4 bytes a noise, the state of a generator of 5 kB and what the
    format adds, not match_size × D numbers."""
    pool = NoisePool(1000, (512,), seed=0)
    pool(torch.randn(10, 512))
    file = io.BytesIO()
    torch.save(pool.state_dict(), file)
    assert file.tell() < 990 * 4 + 8_000


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (dict(match_size=20), r"\b10\b.*\b20\b"),
        (dict(shape=(4,)), r"\[3\].*\[4\]"),
        (dict(shape=(3, 1)), r"\[3\].*\[3, 1\]"),
        (dict(cost="inner"), "squared.*inner"),
        (dict(dtype=torch.float64), "float32.*float64"),
    ],
)
def test_a_state_of_another_pool_is_refused_naming_both(other, named):
    saved = NoisePool(10, (3,), seed=0)
    saved(torch.randn(4, 3))
    pool = NoisePool(**dict(match_size=10, shape=(3,), seed=1) | other)
    untouched = copy.deepcopy(pool.generator.get_state())
    with pytest.raises(BadInput, match=named):
        pool.load_state_dict(saved.state_dict())
    assert torch.equal(pool.generator.get_state(), untouched)


@pytest.mark.parametrize("state", [{}, None, {"pool": 1}, [1]])
def test_what_is_no_state_of_a_pool_is_refused(state):
    with pytest.raises(BadInput, match=r"expected what NoisePool\.state_dict\(\) returned"):
        NoisePool(10, (3,), seed=0).load_state_dict(state)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (dict(shape=(4, -8)), r"shape is \(4, -8\)"),
        (dict(shape=(4, 8.5)), r"shape is \(4, 8.5\)"),
        (dict(shape="4x8"), r"shape is 4x8"),
        (dict(seed=-1), r"seed is -1"),
        (dict(seed=1.5), r"seed is 1.5"),
        (dict(seed="a"), r"seed is 'a'"),
    ],
)
def test_a_pool_of_an_impossible_shape_or_seed_is_refused_naming_it(wrong, named):
    with pytest.raises(BadInput, match=named):
        NoisePool(**dict(match_size=8, shape=(3,), seed=0) | wrong)


@pytest.mark.parametrize("shape", [5, (), (2, 3)])
def test_shapes_of_any_number_of_dimensions(shape):
    x = torch.randn(6, *((shape,) if shape == 5 else shape))
    assert NoisePool(8, shape, seed=0)(x).shape == x.shape


def test_fresh_noise_drawn_between_is_not_drawn_again_after_a_resume():
    x = torch.randn(8, 2)
    pool, resumed = NoisePool(8, (2,), seed=0), NoisePool(8, (2,), seed=0)
    pool(x[:3])
    pool.fresh(x)
    resumed.load_state_dict(pool.state_dict())
    assert torch.equal(resumed(x[:5]), pool(x[:5]))
    assert torch.equal(resumed(x), pool(x))


# ------------------------------------------------------------------------------- how good the rules are


def total(cost, picks):
    return cost[torch.arange(len(cost)), picks].sum().item()


@given(st.integers(1, 30), st.integers(0, 30), st.sampled_from(KINDS), st.sampled_from(COSTS), st.integers(0, 10**6))
def test_no_pairing_costs_less_than_the_optimal(samples, more, kind, cost, seed):
    generator = torch.Generator().manual_seed(seed)
    x = data(kind, samples, 4, generator)
    z = torch.randn(samples + more, 4, dtype=torch.float64, generator=generator)
    costs = cost_matrix(x, z, cost)
    best = optimal(costs).picks
    assert len(set(best.tolist())) == samples
    any_order = torch.randperm(samples + more, generator=generator)[:samples]
    slack = 1e-9 * (1 + costs.abs().sum().item())
    assert total(costs, best) <= total(costs, greedy(costs)) + slack
    assert total(costs, best) <= total(costs, any_order) + slack


@pytest.mark.parametrize("dim", [2, 64])
@pytest.mark.parametrize("cost", COSTS)
def test_optimal_costs_less_than_greedy_and_greedy_less_than_random(dim, cost):
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        x, z = (torch.randn(200, dim, dtype=torch.float64, generator=generator) for _ in range(2))
        costs = cost_matrix(x, z, cost)
        assert optimal(costs).total < total(costs, greedy(costs)) < costs.trace().item()


def test_optimal_is_the_least_of_all_permutations():
    from itertools import permutations

    costs = torch.randint(0, 9, (5, 5)).double()
    least = min(sum(costs[i, j].item() for i, j in enumerate(order)) for order in permutations(range(5)))
    assert optimal(costs).total == least


def image_like(count, seed):
    """16×16 images, smooth and of unequal contrast and brightness, as photographs are."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 1, 4, 4, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(16, 16), mode="bilinear")
    contrast = 0.2 + torch.rand(count, 1, 1, 1, generator=generator)
    return (smooth * contrast + 0.5 * torch.randn(count, 1, 1, 1, generator=generator)).clamp(-1, 1)


@pytest.mark.parametrize("match_size", [100, 400])
def test_over_a_whole_pool_of_images_inner_is_nearer_to_the_optimum_than_squared(match_size):
    for seed in range(6):
        x = image_like(match_size, seed)
        won = {cost: NoisePool(match_size, x.shape[1:], cost=cost, seed=seed) for cost in COSTS}
        squared, inner = (squared_total(x, won[cost](x)) for cost in COSTS)
        z = drawn_for(seed, 1, match_size, 256)
        costs = squared_distances(x, z).double()
        best, random = optimal(costs).total, costs.trace().item()
        assert best < inner < squared < random
        assert inner - best < 0.9 * (squared - best)


def squared_total(x, z):
    return (x - z).double().square().sum().item()


@pytest.mark.parametrize("cost", COSTS)
def test_nearest_of_k_bends_the_noise_and_the_pool_does_not(cost):
    k, dim = 64, 4
    x = 1 + 0.1 * torch.randn(64 * 100, dim)
    bent = nearest_of_k(x, k, cost, torch.Generator().manual_seed(1))
    pool = NoisePool(k, (dim,), cost=cost, seed=1)(x)
    error = 1 / math.sqrt(x.numel())  # of the mean of as many standard normal numbers
    assert bent.mean() > 50 * error
    assert abs(pool.mean()) < 4 * error
    assert abs(pool.var() - 1) < 4 * math.sqrt(2) * error
    assert bent.var() < 0.85  # one direction of the four has lost most of its variance
    if cost == "squared":
        centred = nearest_of_k(torch.zeros_like(x), k, cost, torch.Generator().manual_seed(1))
        assert centred.square().sum(1).mean() < 0.25 * dim
        assert NoisePool(k, (dim,), seed=0)(torch.zeros_like(x)).square().sum(1).mean() == pytest.approx(dim, rel=0.05)


@pytest.mark.parametrize("cost", COSTS)
def test_nearest_of_k_is_the_nearest_of_the_k_drawn(cost):
    x = torch.randn(5, 2, 3)
    z = nearest_of_k(x, 9, cost, torch.Generator().manual_seed(2))
    drawn = torch.randn(5, 9, 6, generator=torch.Generator().manual_seed(2))
    for i in range(5):
        costs = [naive_cost(x[i].flatten().tolist(), noise.tolist(), cost) for noise in drawn[i]]
        assert torch.equal(z[i].flatten(), drawn[i, costs.index(min(costs))])


def test_nearest_of_k_of_more_than_one_block_keeps_the_order_of_the_samples():
    x = torch.eye(5).repeat_interleave(800, 1) * 100  # k × D = 2**23: blocks of 2 and a last one of 1
    z = nearest_of_k(x, 2**23 // 4000 + 1, generator=torch.Generator().manual_seed(0))
    assert (x @ z.T).argmax(0).tolist() == [0, 1, 2, 3, 4]


# ------------------------------------------------------------------------------- pairs


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("match_size", [1, 3, 7, 16, 50])
@pytest.mark.parametrize("sizes", [[7, 7, 7], [16], [1] * 5, [5, 9, 2, 7], []])
def test_pairs_yields_every_sample_once_in_order_in_the_same_batches(method, match_size, sizes):
    batches = [torch.randn(size, 2, 3) for size in sizes]
    out = list(pairs(batches, method, match_size, seed=4))
    assert [len(x) for x, _ in out] == sizes
    for (x, z), batch in zip(out, batches, strict=True):
        assert torch.equal(x, batch)
        assert (z.shape, z.dtype) == (x.shape, x.dtype)
    again = list(pairs(iter(batches), method, match_size, seed=4))
    assert all(torch.equal(z, other) for (_, z), (_, other) in zip(out, again, strict=True))


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("match_size", [1, 4, 10, 15, 20, 23, 100])
def test_optimal_pairs_are_scipys_on_each_group(match_size, cost):
    x = torch.randn(45, 3)
    z = torch.cat([z for _, z in pairs(x.split(10), "optimal", match_size, cost=cost, seed=6)])
    generator = noise_generator(6)
    done = 0
    for group in x.split(match_size):  # the last one is what is left over
        drawn = torch.randn(len(group), 3, generator=generator)
        costs = [[naive_cost(a, b, cost) for b in drawn.tolist()] for a in group.tolist()]
        _, picks = linear_sum_assignment(costs)
        assert torch.equal(z[done : done + len(group)], drawn[torch.from_numpy(picks)])
        done += len(group)
    assert done == 45


def test_greedy_pairs_are_the_pools_and_random_pairs_the_generators():
    batches = torch.randn(30, 4).split(8)
    pool, generator = NoisePool(12, (4,), seed=9), noise_generator(9)
    for x, z in pairs(batches, "greedy", 12, seed=9):
        assert torch.equal(z, pool(x))
    for x, z in pairs(batches, "random", seed=9):
        assert torch.equal(z, torch.randn(x.shape, generator=generator))


def test_a_resumed_run_gets_the_pairs_of_the_run_that_went_on():
    batches = torch.randn(60, 4).split(8)
    whole = [z for _, z in pairs(batches, "greedy", 20, seed=2)]
    pool = NoisePool(20, (4,), seed=2)
    first = [z for _, z in pairs(batches[:3], "greedy", 20, pool=pool)]
    resumed = NoisePool(20, (4,), seed=0)
    resumed.load_state_dict(saved_and_loaded(pool))
    second = [z for _, z in pairs(batches[3:], "greedy", 20, pool=resumed)]
    assert all(torch.equal(a, b) for a, b in zip(whole, first + second, strict=True))


@pytest.mark.parametrize("method", ["random", "greedy", "nearest"])
def test_pairs_takes_a_batch_only_when_asked_for_one(method):
    """A trainer that stops early must not have lost a batch of its loader."""
    taken = []
    source = (taken.append(i) or torch.randn(2, 3) for i in range(5))
    out = pairs(source, method, 4, seed=0)
    assert inspect.isgenerator(out) and taken == []
    next(out)
    assert taken == [0]


@pytest.mark.parametrize(
    "wrong",
    [
        dict(method="hungarian"),
        dict(cost="euclid"),
        dict(match_size=-1),
        dict(match_size=2.5),
        dict(match_size=math.nan),
        dict(method="optimal", match_size=0),
        dict(method="nearest", match_size=0),
    ],
)
def test_pairs_refuses_at_once_what_it_cannot_do(wrong):
    with pytest.raises(BadInput):
        pairs([torch.zeros(2, 2)], **wrong)  # not only when the first pair is asked for


@pytest.mark.parametrize("method", METHODS)
def test_every_method_refuses_a_batch_of_another_shape_than_the_first(method):
    with pytest.raises(BadInput, match=r"\(2, 4\).*\(B, 3\)"):
        list(pairs([torch.zeros(2, 3), torch.zeros(2, 4)], method, 8))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("batch", [(torch.zeros(2, 3), torch.zeros(2)), np.zeros((2, 3)), None])
def test_every_method_refuses_what_is_no_tensor(method, batch):
    """A loader of images and labels, for instance."""
    with pytest.raises(BadInput, match=rf"the batch is a {type(batch).__name__}: expected a tensor"):
        list(pairs([batch], method, 8))


def test_a_cost_of_another_name_is_refused_wherever_it_is_given():
    x = torch.zeros(2, 3)
    for work in (lambda: cost_matrix(x, x, "sqared"), lambda: nearest_of_k(x, 3, "sqared")):
        with pytest.raises(BadInput, match=r"sqared.*squared, inner"):
            work()


def test_optimal_refuses_more_samples_than_noises_naming_both():
    with pytest.raises(BadInput, match="9 samples and 7 noises"):
        optimal(torch.rand(9, 7))


@pytest.mark.parametrize("method", METHODS)
def test_a_match_size_of_4_dot_0_is_4(method):
    batches = torch.randn(6, 2).split(3)
    expected = [z for _, z in pairs(batches, method, 4, seed=0)]
    assert all(torch.equal(a, z) for a, (_, z) in zip(expected, pairs(batches, method, 4.0, seed=0), strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_an_empty_batch_in_between_stays_empty(method):
    batches = [torch.randn(3, 2), torch.randn(0, 2), torch.randn(2, 2), torch.randn(0, 2)]
    assert [z.shape for _, z in pairs(batches, method, 2, seed=0)] == [(3, 2), (0, 2), (2, 2), (0, 2)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e15, -1e15, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_method_refuses_data_that_has_no_distance(method, value, dtype):
    x = torch.zeros(3, 2, dtype=dtype)
    x[1, 1] = value
    if value == 1e15 and dtype != torch.float64:
        x[1, 1] = 1.01e15  # the nearest numbers of fewer digits lie below
    with pytest.raises(BadInput, match="NaN, infinite or huge"):
        list(pairs([torch.zeros(3, 2, dtype=dtype), x], method, 4))


# ------------------------------------------------------------------------------- path_noise


def test_image_17_starts_from_the_same_noise_in_any_batch():
    alone = path_noise([17], (3, 4, 4), seed=5)[0]
    batch = path_noise(range(10, 20), (3, 4, 4), seed=5)
    assert batch.shape == (10, 3, 4, 4) and batch.dtype == torch.float32
    assert torch.equal(batch[7], alone)
    assert torch.equal(path_noise([40, 17, 3], (3, 4, 4), seed=5)[1], alone)


def test_path_noise_of_other_images_and_seeds_is_other_noise():
    many = torch.cat([path_noise(range(50), (8,), seed=seed) for seed in range(4)])
    assert len(many.unique(dim=0)) == 200
    assert not torch.equal(path_noise([1], (8,), seed=2), path_noise([2], (8,), seed=1))


def test_path_noise_is_standard_normal():
    z = path_noise(range(400), (250,)).double()
    assert abs(z.mean()) < 4 / math.sqrt(z.numel()) and abs(z.var() - 1) < 4 * math.sqrt(2 / z.numel())


def test_path_noise_of_no_images_is_empty():
    assert path_noise([], (3, 2)).shape == (0, 3, 2)


def test_a_pool_that_is_not_to_compile_asks_for_no_kernels(monkeypatch):
    asked = []
    monkeypatch.setattr("dansm.gpu_kernels", lambda *way: asked.append(way))
    NoisePool(10, (2,), compile=False), NoisePool(1, (2,))
    assert asked == []
    NoisePool(10, (2,))
    assert len(asked) == 1
