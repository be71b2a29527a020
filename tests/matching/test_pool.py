"""Noise pools: the plain one and the fast one against the paper's loop, and what either must keep."""

import copy
import io
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from pools import CHANGES, COSTS, KINDS, POOLS, NaivePool, PlainPool, data, drawn_for, rows_in_order, saved_and_loaded

import dansm
from dansm import BadInput, NoisePool, noise_generator
from dansm.scale.matching.pool import FastPool

either_pool = pytest.mark.parametrize("pool_class", POOLS)


# ------------------------------------------------------------------------------- the rule


@either_pool
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
def test_a_pool_is_the_papers_loop_noise_for_noise(pool_class, match_size, sizes, kind, change, cost, seed):
    # Ties must be exact: whole numbers have exact sums, and which of two equal noises is handed out cannot be seen.
    if change == "whole numbers" and kind != "the same":
        kind = "whole numbers"
    pool = pool_class(match_size, (3, 2), cost=cost, dtype=torch.float64, seed=seed)
    pool.change = CHANGES[change]
    naive = NaivePool(match_size, 6, cost, seed, CHANGES[change])
    generator = torch.Generator().manual_seed(seed + 1)
    for size in sizes:
        x = data(kind, size, 6, generator).view(size, 3, 2)
        assert torch.equal(pool(x), naive(x)), f"batch of {size}"


@either_pool
@pytest.mark.parametrize("cost", COSTS)
def test_a_pool_is_the_papers_loop_through_several_refills(pool_class, cost):
    pool = pool_class(300, (4,), cost=cost, dtype=torch.float64, seed=3)
    naive = NaivePool(300, 4, cost, 3, CHANGES["as drawn"])
    for _ in range(13):
        x = torch.randn(50, 4, dtype=torch.float64)
        assert torch.equal(pool(x), naive(x))


def test_where_scale_is_there_a_pool_is_a_fast_one_and_elsewhere_the_plain_one(monkeypatch):
    assert type(NoisePool(10, (2,), seed=0)) is FastPool
    assert isinstance(NoisePool(10, (2,), seed=0), NoisePool)
    monkeypatch.setattr(dansm, "scaled", lambda room: None)
    assert type(NoisePool(10, (2,), seed=0)) is NoisePool


def test_alone_the_plain_pool_hands_out_the_same_noises(monkeypatch):
    x = torch.randn(40, 6).split(7)
    expected = [NoisePool(15, (6,), seed=0)(part) for part in x]
    monkeypatch.setattr(dansm, "scaled", lambda room: None)
    assert all(torch.equal(NoisePool(15, (6,), seed=0)(part), z) for part, z in zip(x, expected, strict=True))


@either_pool
@pytest.mark.parametrize("match_size", [0, 1])
def test_match_size_0_and_1_give_random_pairs(pool_class, match_size):
    pool = pool_class(match_size, (3, 2), seed=5)
    generator = noise_generator(5, "cpu", 0, 0)
    for size in (4, 1, 7):
        assert torch.equal(pool(torch.full((size, 3, 2), 9.0)), torch.randn(size, 3, 2, generator=generator))


SIZES = [(2, 1), (50, 1), (60, 20), (53, 20), (20, 20), (20, 53), (7, 64), (600, 250)]


@either_pool
@pytest.mark.parametrize(("match_size", "batch"), SIZES)
def test_a_whole_pool_hands_out_exactly_the_noises_drawn(pool_class, match_size, batch):
    pool = pool_class(match_size, (2, 3), cost=COSTS[batch % 2], seed=11)
    x = 1 + 0.1 * torch.randn(3 * match_size, 2, 3)
    z = torch.cat([pool(part) for part in x.split(batch)])
    for number, used in enumerate(z.split(match_size), 1):
        assert rows_in_order(used) == rows_in_order(drawn_for(11, number, match_size, 6))


# ------------------------------------------------------------------------------- types and layouts


@either_pool
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("match_size", [0, 5, 100])
def test_noises_come_in_the_dtype_of_the_batch(pool_class, dtype, match_size):
    x = torch.randn(8, 3, 2).to(dtype)
    z = pool_class(match_size, (3, 2), seed=0)(x)
    assert (z.dtype, z.shape, z.device, z.requires_grad) == (dtype, x.shape, x.device, False)
    if match_size:
        assert torch.equal(z, pool_class(match_size, (3, 2), seed=0)(x.float()).to(dtype))


@either_pool
@pytest.mark.parametrize("match_size", [8, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_pool_kept_in_another_precision_hands_out_all_its_noises(pool_class, dtype, match_size):
    z = pool_class(match_size, (4,), dtype=dtype, seed=0)(torch.randn(match_size, 4))
    assert rows_in_order(z) == rows_in_order(drawn_for(0, 1, match_size, 4, dtype).float())


@either_pool
def test_the_layout_of_a_batch_changes_no_pick(pool_class):
    x = torch.randn(6, 3, 4, 5)
    expected = pool_class(17, (3, 4, 5), seed=0)(x)
    channels_last = x.to(memory_format=torch.channels_last)
    turned = x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    sliced = torch.stack([x, x], -1).flatten(3)[..., ::2]
    for other in (channels_last, turned, sliced):
        assert torch.equal(other, x) and not other.is_contiguous()
        assert torch.equal(pool_class(17, (3, 4, 5), seed=0)(other), expected)
    assert pool_class(17, (3, 4, 5), seed=0)(x[:1].expand(6, 3, 4, 5)).shape == x.shape


@either_pool
def test_a_batch_of_no_samples_takes_nothing_from_the_pool(pool_class):
    pool, untouched = (pool_class(10, (3,), seed=1) for _ in range(2))
    x = torch.randn(4, 3)
    assert pool(x[:0]).shape == (0, 3)
    assert torch.equal(pool(x), untouched(x))
    assert pool(x[:0]).shape == (0, 3) and len(pool.state_dict()["index"]) == 6


@either_pool
def test_the_batch_itself_is_left_as_it_was(pool_class):
    x = torch.randn(9, 3, requires_grad=True)
    before = x.detach().clone()
    assert not pool_class(4, (3,), seed=0)(x).requires_grad
    assert torch.equal(x, before)


@pytest.mark.parametrize("shape", [5, (), (2, 3)])
def test_shapes_of_any_number_of_dimensions(shape):
    x = torch.randn(6, *((shape,) if shape == 5 else shape))
    assert NoisePool(8, shape, seed=0)(x).shape == x.shape


@either_pool
def test_settings_of_the_trainer_around_change_no_pick(pool_class):
    x = 0.3 * torch.randn(20, 64)
    expected = pool_class(200, (64,), seed=0)(x)
    settings, name, tf32 = torch.backends.cuda.matmul, "fp32_precision", "tf32"
    if not hasattr(settings, name):  # before torch 2.9
        name, tf32 = "allow_tf32", True
    before = getattr(settings, name)
    try:
        setattr(settings, name, tf32)
        with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
            assert torch.equal(pool_class(200, (64,), seed=0)(x), expected)
        assert getattr(settings, name) == tf32
    finally:
        setattr(settings, name, before)


def test_tf32_changes_nothing_on_a_cpu():
    x = 0.3 * torch.randn(20, 64)
    assert torch.equal(NoisePool(200, (64,), seed=0, tf32=True)(x), NoisePool(200, (64,), seed=0)(x))


def test_a_pool_continues_after_a_batch_in_inference_mode():
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


@either_pool
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda pool: pickle.loads(pickle.dumps(pool))])
def test_a_copy_of_a_pool_continues_with_the_same_noises(pool_class, copied):
    x = torch.randn(60, 3)
    pool, expected = (pool_class(20, (3,), seed=0) for _ in range(2))
    pool(x[:7]), expected(x[:7])
    assert torch.equal(copied(pool)(x), expected(x))


def test_torchs_default_device_is_not_the_pools():
    with torch.device("meta"):
        pool = NoisePool(9, (3,), seed=0)
    assert torch.equal(pool(torch.ones(4, 3)), NoisePool(9, (3,), seed=0)(torch.ones(4, 3)))


# ------------------------------------------------------------------------------- drawn piece by piece


class Chunked(FastPool):
    """Small chunks, so that a pool of a few noises has many, and the last one is shorter."""

    numbers_per_chunk = 12


class PlainChunked(PlainPool):
    numbers_per_chunk = 12


@pytest.mark.parametrize("batch", [1, 3, 5, 14, 30])
@pytest.mark.parametrize("match_size", [2, 7, 8, 30])
def test_a_pool_is_the_same_however_it_is_drawn_and_is_drawn_as_places_get_free(match_size, batch):
    pool, plain = Chunked(match_size, (3,), seed=4), PlainChunked(match_size, (3,), seed=4)
    for part in torch.randn(3 * match_size, 3).split(batch):
        assert torch.equal(pool(part), plain(part))
        free = match_size - pool.left - pool.drawn
        assert 0 <= free < 4 or pool.drawn == match_size  # at most the next chunk waits


@pytest.mark.parametrize("served", [0, 1, 4, 11, 20, 29, 30, 31, 47])
def test_a_saved_pool_of_many_chunks_resumes_with_the_same_noises(served):
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
    monkeypatch.setattr(FastPool, "served_at_once", 16)
    assert torch.equal(NoisePool(match_size, (3,), seed=0)(x), whole)


# ------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory", [0.5, 3.0])
def test_memory_gives_the_largest_pool_that_fits(memory, dtype):
    pool = NoisePool(None, (4, 32, 32), memory=memory, dtype=dtype, seed=0)
    assert pool._bytes(pool.match_size) <= 1e9 * memory < pool._bytes(pool.match_size + 1)
    noises = pool.match_size * 4096 * dtype.itemsize
    assert 0.4 * memory < noises / 1e9 < memory
    assert pool.noise.numel() == 0  # nothing is taken yet


def test_4096_large_latents_fit_into_four_and_a_half_gigabytes():
    assert NoisePool(4096, (16, 128, 128), memory=4.5, seed=0).match_size == 4096


def test_a_pool_that_does_not_fit_says_what_it_needs_and_what_would_fit():
    fitting = NoisePool(None, (4, 32, 32), memory=2.0, seed=0).match_size
    with pytest.raises(BadInput, match=rf"match_size is 1,000,000: .*2\d\.\d GB.*2.0 GB.*{fitting:,}"):
        NoisePool(10**6, (4, 32, 32), memory=2.0)
    with pytest.raises(BadInput, match=r"match_size is 1,000,000,000: .*GB.*cpu has [\d.]+ GB free"):
        NoisePool(10**9, (4, 32, 32))


@pytest.mark.parametrize("memory", [0, -1.0, math.nan, math.inf, "4 GB", 0.05])
def test_memory_that_is_none_or_holds_no_pool_is_refused(memory):
    with pytest.raises(BadInput, match=r"memory is|two noises need .* GB and memory is"):
        NoisePool(None, (3, 32, 32), memory=memory)


@pytest.mark.parametrize(("shape", "batch"), [((16, 64, 64), 250), ((4, 32, 32), 600), ((64,), 100)])
def test_a_pool_allocates_no_more_than_it_promises(shape, batch):
    """Counted by torch's allocator, so that it does not depend on what else the process does."""
    x = torch.randn(batch, *shape)
    pool = NoisePool(None, shape, memory=0.3, seed=0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiled:
        for _ in range(2):
            pool(x)
    changes = [event.nbytes() for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    most = int(np.cumsum(changes).max())
    assert pool.noise.nbytes < most < 0.3e9 + 2 * x.nbytes  # the noises handed out, and their joining, come on top


# ------------------------------------------------------------------------------- saved state


@pytest.mark.parametrize("saved_by", POOLS)
@pytest.mark.parametrize("loaded_by", POOLS)
@pytest.mark.parametrize("match_size", [0, 1, 2, 40])
@pytest.mark.parametrize("served", [0, 1, 29, 39, 40, 41, 80])
def test_a_saved_pool_resumes_with_the_same_noises(saved_by, loaded_by, match_size, served):
    """At 40: fresh, just begun, half empty, one left, emptied, in the next pool. Each takes the other's state."""
    x = torch.randn(served + 100, 3)
    pool = saved_by(match_size, (3,), cost=COSTS[served % 2], seed=7)
    for part in x[:served].split(4):
        pool(part)
    resumed = loaded_by(match_size, (3,), cost=COSTS[served % 2], seed=99)  # its own seed must not matter
    resumed.load_state_dict(saved_and_loaded(pool))
    for part in x[served:].split(6):
        assert torch.equal(resumed(part), pool(part))
        assert len(resumed.state_dict()["index"]) == len(pool.state_dict()["index"])


@either_pool
def test_a_used_pool_can_be_set_back_to_its_saved_state(pool_class):
    pool = pool_class(20, (3,), seed=0)
    x = torch.randn(50, 3)
    pool(x[:13])
    state = pool.state_dict()
    expected = pool(x)  # goes through two more pools, and must not change the state
    for _ in range(2):
        pool.load_state_dict(state)
        assert torch.equal(pool(x), expected)


def test_a_pool_shows_what_was_chosen():
    assert repr(NoisePool("auto", (3,), seed=5, expected=1234)) == "FastPool(123, (3,), cost='priced', seed=5)"
    assert repr(NoisePool(9, (3, 4, 4), grid=2, seed=5)) == ("CoarsePool(9, (3, 4, 4), grid=(2,), cost='priced', "
                                                             "seed=5)")


def test_a_saved_state_is_small():
    """The pool itself is drawn again: the file holds 4 bytes a noise, the state of a generator of 5 kB and what the
    format adds, not match_size × D numbers."""
    pool = NoisePool(1000, (512,), cost="squared", seed=0)
    pool(torch.randn(10, 512))
    file = io.BytesIO()
    torch.save(pool.state_dict(), file)
    assert file.tell() < 990 * 4 + 8_000


def test_prices_add_four_bytes_a_noise_to_a_state_and_their_references():
    pool = NoisePool(1000, (512,), cost="priced", seed=0)
    pool(torch.randn(1500, 512))
    file = io.BytesIO()
    torch.save(pool.state_dict(), file)
    assert file.tell() < 500 * 8 + 1000 * 512 * 4 + 20_000


OTHERS = [(dict(match_size=20), r"\b10\b.*\b20\b"), (dict(shape=(4,)), r"\[3\].*\[4\]"),
          (dict(shape=(3, 1)), r"\[3\].*\[3, 1\]"), (dict(cost="inner"), "squared.*inner"),
          (dict(dtype=torch.float64), "float32.*float64")]


@either_pool
@pytest.mark.parametrize(("other", "named"), OTHERS)
def test_a_state_of_another_pool_is_refused_naming_both(pool_class, other, named):
    saved = pool_class(10, (3,), cost="squared", seed=0)
    saved(torch.randn(4, 3))
    pool = pool_class(**dict(match_size=10, cost="squared", shape=(3,), seed=1) | other)
    untouched = pool.generator.get_state().clone()
    with pytest.raises(BadInput, match=named):
        pool.load_state_dict(saved.state_dict())
    assert torch.equal(pool.generator.get_state(), untouched)


@either_pool
@pytest.mark.parametrize("state", [{}, None, {"pool": 1}, [1]])
def test_what_is_no_state_of_a_pool_is_refused(pool_class, state):
    with pytest.raises(BadInput, match=r"NoisePool\.state_dict\(\)"):
        pool_class(10, (3,), seed=0).load_state_dict(state)


@either_pool
def test_random_noise_drawn_between_is_not_drawn_again_after_a_resume(pool_class):
    x = torch.randn(8, 2)
    pool, resumed = (pool_class(8, (2,), seed=0) for _ in range(2))
    pool(x[:3])
    pool.fresh(x)
    resumed.load_state_dict(pool.state_dict())
    assert torch.equal(resumed(x[:5]), pool(x[:5]))
    assert torch.equal(resumed.fresh(x), pool.fresh(x))


# ------------------------------------------------------------------------------- refused


@either_pool
@pytest.mark.parametrize("match_size", [0, 1, 10])
def test_a_batch_of_another_shape_is_refused_naming_both(pool_class, match_size):
    with pytest.raises(BadInput) as refused:
        pool_class(match_size, (3, 8, 8), seed=0)(torch.zeros(2, 8, 8, 3))
    assert "(3, 8, 8)" in str(refused.value) and "(2, 8, 8, 3)" in str(refused.value)


@either_pool
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("match_size", [0, 10])
def test_data_that_is_not_finite_is_refused_and_takes_nothing(pool_class, value, match_size):
    pool, untouched = (pool_class(match_size, (2,), seed=0) for _ in range(2))
    x = torch.zeros(3, 2)
    x[1, 1] = value
    with pytest.raises(BadInput, match="NaN, infinite or huge"):
        pool(x)
    assert torch.equal(pool(x[:1]), untouched(x[:1]))


@either_pool
@pytest.mark.parametrize("match_size", [8, 80])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_data_has_a_distance_below_1e15_and_is_refused_from_there_on(pool_class, match_size, dtype):
    """‖x‖² of finite data may overflow, and a cost of inf means taken: noise 0 for every sample, or no end."""
    pool = pool_class(match_size, (4,), dtype=dtype, seed=0)
    z = pool(torch.full((match_size, 4), -9.9e14, dtype=dtype))
    assert len(np.unique(z.numpy(), axis=0)) == match_size
    for value in (1e15, 1e20, torch.finfo(dtype).max / 4):
        with pytest.raises(BadInput, match="1e15"):
            pool(torch.full((match_size, 4), value, dtype=dtype))


WRONG = [(dict(match_size=wrong), "match_size is") for wrong in (-1, 2.5, math.nan, math.inf, True, "many")]
WRONG += [(dict(shape=wrong), "shape is") for wrong in ((4, -8), (4, 8.5), "4x8")]
WRONG += [(dict(seed=wrong), "seed is") for wrong in (-1, 1.5, "a")]
WRONG += [(dict(dtype=wrong), f"dtype is {wrong}.*float32.*float64.*bfloat16")
          for wrong in (torch.float16, torch.int64, torch.complex64)]  # float16 ends at 65,504
WRONG += [(dict(cost="euclid"), "euclid.*squared, inner")]


@either_pool
@pytest.mark.parametrize(("wrong", "named"), WRONG)
def test_a_pool_of_what_cannot_be_is_refused_naming_it(pool_class, wrong, named):
    with pytest.raises(BadInput, match=named):
        pool_class(**dict(match_size=8, shape=(3,), seed=0) | wrong)


def test_a_name_of_before_is_refused_naming_the_new_one():
    with pytest.raises(BadInput, match=r"fast is .*tf32"):
        NoisePool(8, (3,), fast=True)


@pytest.mark.parametrize("others", [{}, {"groups": 2}, {"grid": (2,)}, {"match_size": 1}, {"device": "cuda"}], ids=str)
@pytest.mark.parametrize(("wrong", "right"), [("match_sizes", "match_size"), ("cots", "cost"), ("gruops", "groups"),
                                              ("Seed", "seed"), ("blah", "")])
def test_an_unknown_argument_is_told_of_the_class_that_was_called_with_the_nearest_one(wrong, right, others):
    with pytest.raises(TypeError) as refused:
        NoisePool(**dict(match_size=8, shape=(3,)) | others, **{wrong: 3})
    said = str(refused.value)
    assert said.startswith("NoisePool") and repr(wrong) in said and said.endswith(f" {right})") == bool(right)


@pytest.mark.parametrize(("arguments", "named"), [((), "match_size"), ((8,), "shape"), ((8, (3,), 4), "too many")])
def test_arguments_that_are_missing_or_too_many_are_told_of_the_class_that_was_called(arguments, named):
    with pytest.raises(TypeError, match=rf"^NoisePool.*{named}"):
        NoisePool(*arguments)


@pytest.mark.parametrize("settings", [{}, {"groups": 2}, {"match_size": 0}], ids=str)
@pytest.mark.parametrize("compiled", [False, True])
def test_a_mask_belongs_to_a_pool_with_a_grid(settings, compiled):
    pool, untouched = (NoisePool(**dict(match_size=8, shape=(3, 2), seed=0) | settings) for _ in range(2))
    x, labels = torch.ones(4, 3, 2), torch.tensor([0, 1, 1, 0]) if "groups" in settings else None
    call = torch.compile(pool, backend="eager", fullgraph=True) if compiled else pool
    with pytest.raises(BadInput, match=r"mask .*\(3, 2\).*grid="):
        call(x, labels, mask=torch.ones(4, 3, dtype=torch.bool))
    assert torch.equal(pool(x, labels), untouched(x, labels))  # it took nothing
