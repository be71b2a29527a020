"""The matching rules of dansm.py against the paper's loop written out, and what must hold whatever the rule."""

import inspect
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pools import (
    COSTS,
    KINDS,
    PlainPool,
    data,
    drawn_for,
    naive_cost,
    naive_greedy,
    saved_and_loaded,
    total,
)
from scipy.optimize import linear_sum_assignment

from dansm import (
    METHODS,
    BadInput,
    Diffusion,
    NoisePool,
    RectifiedFlow,
    check_labels,
    cost_matrix,
    greedy,
    inner_products,
    noise_generator,
    pairs,
    path_length,
    squared_norms,
)
from dansm.scale.base.statistics import squared_distances
from dansm.scale.matching.others import nearest_of_k, optimal
from dansm.scale.matching.pool import greedy_by_rounds
from dansm.scale.matching.products import products

GREEDY = [greedy, greedy_by_rounds]
IN_ORDER = [method for method in METHODS if method != "semidiscrete"]  # there the noises choose


# ------------------------------------------------------------------------------- greedy and costs


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
    with pytest.raises(BadInput, match="least cost is NaN or infinite"):
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
    with pytest.raises(BadInput, match=r"\(9, 7\)"):
        greedy(cost)


@pytest.mark.parametrize("match", GREEDY)
def test_no_samples_take_no_noise(match):
    assert match(torch.empty(0, 5)).tolist() == optimal(torch.empty(0, 5)).picks.tolist() == []


@pytest.mark.parametrize("multiply", [inner_products, products])
def test_large_products_are_as_exact_as_small_ones(multiply):
    x, z = torch.randn(40, 1024), torch.randn(2**28 // 1024 // 40 + 1, 1024)
    found = multiply(x, z)
    assert found.is_contiguous() and found.dtype == torch.float32
    some = torch.arange(0, len(z), 97)
    torch.testing.assert_close(found[:, some].double(), x.double() @ z[some].double().T, rtol=0, atol=1e-3)


@pytest.mark.parametrize("shape", [(2,), (3, 2, 2), (200,)])
def test_costs_are_what_their_names_say(shape):
    x, z = torch.randn(5, *shape, dtype=torch.float64), torch.randn(7, *shape, dtype=torch.float64)
    rows, noises = x.flatten(1).tolist(), z.flatten(1).tolist()
    expected = {cost: torch.tensor([[naive_cost(a, b, cost) for b in noises] for a in rows], dtype=torch.float64)
                for cost in COSTS}
    torch.testing.assert_close(cost_matrix(x, z, "inner"), 2 * expected["inner"], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(squared_distances(x, z), expected["squared"], rtol=1e-11, atol=1e-11)
    of_the_sample_alone = expected["squared"] - cost_matrix(x, z, "squared")
    torch.testing.assert_close(of_the_sample_alone, x.flatten(1).square().sum(1, keepdim=True).expand(5, 7))


# ------------------------------------------------------------------------------- optimal and nearest


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


@pytest.mark.parametrize("method", IN_ORDER)
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


@pytest.mark.parametrize("method", METHODS)
def test_samples_that_are_single_numbers_are_rows_of_one(method):
    x = torch.randn(3, 10)
    plain = torch.cat([z for _, z in pairs(x, method, 4, seed=7)])
    as_rows = torch.cat([z for _, z in pairs(x[..., None], method, 4, seed=7)])
    assert torch.equal(plain, as_rows[:, 0])


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
@pytest.mark.parametrize("batch", [(np.zeros((2, 3)), torch.zeros(2)), np.zeros((2, 3)), None])
def test_every_method_refuses_what_is_no_tensor(method, batch):
    data = batch[0] if isinstance(batch, tuple) else batch
    with pytest.raises(BadInput, match=rf"the batch is a {type(data).__name__}: expected a tensor"):
        list(pairs([batch], method, 8))


# ------------------------------------------------------------------------------- labels


def labelled(sizes, groups, seed=0):
    """Batches (x, labels) of those sizes, each label with a mean of its own."""
    generator = torch.Generator().manual_seed(seed)
    for size in sizes:
        labels = torch.randint(groups, (size,), generator=generator)
        yield torch.randn(size, 3, generator=generator) + labels[:, None], labels


@pytest.mark.parametrize("method", IN_ORDER)
@pytest.mark.parametrize("groups", [None, 4])
def test_labels_come_out_beside_their_samples(method, groups):
    batches = list(labelled([5, 1, 0, 7], 4))
    out = list(pairs(batches, method, 6, seed=1, groups=groups))
    assert len(out) == 4
    for (x, labels), (same_x, z, same_labels) in zip(batches, out, strict=True):
        assert same_x is x and same_labels is labels and z.shape == x.shape


@pytest.mark.parametrize("groups", [None, 4])
def test_semidiscrete_pairs_are_batches_of_the_same_sizes_of_samples_that_noises_choose(groups):
    batches = list(labelled([50, 7, 0, 30, 50], 4))
    data, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    out = list(pairs(batches, "semidiscrete", seed=0, groups=groups))
    assert [len(x) for x, _, _ in out] == [50, 7, 0, 30, 50]
    number = {tuple(x.tolist()): i for i, x in enumerate(data)}
    x, z, of_x = (torch.cat(parts) for parts in zip(*out, strict=True))
    taken = [number[tuple(row.tolist())] for row in x]
    assert torch.equal(labels[taken], of_x) and len(set(taken)) > 60
    if groups is None:  # whole, the nearest are as near as can be with these shares
        gain = x @ z.T
        assert gain.trace() == pytest.approx(gain.numpy()[linear_sum_assignment(-gain.numpy())].sum(), rel=1e-5)


@pytest.mark.parametrize("method", ["random", "greedy", "nearest"])
def test_without_groups_labels_change_no_noise(method):
    batches = list(labelled([5, 7], 4))
    plain = [z for _, z in pairs([x for x, _ in batches], method, 6, seed=1)]
    assert all(torch.equal(z, other) for z, (_, other, _) in zip(plain, pairs(batches, method, 6, seed=1), strict=True))


def test_optimal_pairs_within_groups_are_scipys_in_each_group():
    batches = list(labelled([10, 10, 10], 3))
    x, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    z = torch.cat([z for _, z, _ in pairs(batches, "optimal", 15, seed=6, groups=3)])
    for half in (slice(0, 15), slice(15, 30)):
        for group in labels[half].unique():
            members = labels[half] == group
            cost = squared_distances(x[half][members], z[half][members])
            rows, columns = linear_sum_assignment(cost.numpy())
            assert cost.diagonal().sum() == pytest.approx(cost[rows, columns].sum().item(), rel=1e-5)
        cost = squared_distances(x[half], z[half])  # across the groups there are shorter ones
        assert cost[linear_sum_assignment(cost.numpy())].sum() < 0.999 * cost.diagonal().sum()


def test_random_pairs_take_the_generator_of_a_grouped_pool_alone():
    x = 3 * torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    batch = x, torch.arange(200) % 2
    (_, z, _), = pairs([batch], "random", pool=NoisePool(200, (3,), groups=2, seed=0))
    assert abs((x * z).sum(1).mean()) < 2 < (x * next(pairs([batch], "greedy", 100, groups=2, seed=0))[1]).sum(1).mean()


@pytest.mark.parametrize("given", [None, 2])
def test_groups_that_the_pool_does_not_have_are_refused(given):
    pool = NoisePool(6, (3,), groups=given)
    with pytest.raises(BadInput, match=r"groups is 3, of the pool (None|1|2): expected"):
        pairs(labelled([5], 3), pool=pool, groups=3)
    list(pairs(labelled([5], 3), pool=NoisePool(6, (3,), groups=3), groups=3))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("labels", "said"), [
    (None, "missing"), (torch.zeros(5), "float32"), (torch.zeros(4, dtype=torch.int64), r"\(4,\)"),
    (torch.tensor([0, 1, 2, 3, 1]), "from 0 to 3"), (torch.tensor([0, 1, -1, 2, 1]), "from -1 to 2"),
    (torch.zeros(5, dtype=torch.bool), "bool"), (torch.zeros(5, dtype=torch.complex64), "complex64"),
    ([0, 1, 2, 0, 1], "list")])
def test_labels_that_are_none_are_refused(method, labels, said):
    batch = torch.zeros(5, 3) if labels is None else (torch.zeros(5, 3), labels)
    with pytest.raises(BadInput, match=rf"the labels are .*{said}.*expected a tensor \(5,\) of whole numbers from 0"):
        list(pairs([batch], method, 6, groups=3))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.int64])
def test_labels_of_any_whole_type_are_taken_whatever_the_count_of_groups(dtype):
    labels = torch.tensor([0, 100, 127], dtype=dtype)
    assert check_labels(labels, 3, 1000).tolist() == [0, 100, 127]
    with pytest.raises(BadInput, match=r"from 0 to 127: expected a tensor \(3,\) of whole numbers from 0 to 126"):
        check_labels(labels, 3, 127)


def test_a_batch_of_three_parts_is_refused():
    for method in METHODS:
        with pytest.raises(BadInput, match="3 parts"):
            list(pairs([(torch.zeros(2, 3), torch.zeros(2), torch.zeros(2))], method, 6))


PLAIN = torch.ones(2, 3)
TAKES_TENSORS = {
    "cost_matrix": cost_matrix, "inner_products": inner_products, "path_length": path_length,
    "squared_norms": lambda x, z: (squared_norms(x), squared_norms(z)),
    "nearest_of_k": lambda x, z: (nearest_of_k(x, 2), nearest_of_k(z, 2)),
    "fresh": lambda x, z: (NoisePool(4, (3,)).fresh(x), PlainPool(4, (3,)).fresh(z)),
    "rectified loss": lambda x, z: RectifiedFlow().loss(lambda x, t: x, x, z),
    "diffusion loss": lambda x, z: Diffusion().loss(lambda x, t: x, x, z),
    "greedy": lambda x, z: (greedy(x), greedy(z)), "optimal": lambda x, z: (optimal(x), optimal(z)),
}


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("function", TAKES_TENSORS)
def test_number_types_that_have_no_distances_are_refused_by_every_function(function, dtype):
    wrong = PLAIN.to(dtype)
    for arguments in ((wrong, wrong), (PLAIN, wrong), (wrong, PLAIN)):
        with pytest.raises(BadInput, match=f"{dtype}: expected .*float"):
            TAKES_TENSORS[function](*arguments)
    with pytest.raises(BadInput, match=r"ndarray.*: expected a .*tensor"):
        TAKES_TENSORS[function](PLAIN.numpy(), PLAIN.numpy())
    TAKES_TENSORS[function](PLAIN, PLAIN)


@pytest.mark.parametrize("function", sorted(TAKES_TENSORS.keys() - {"greedy", "optimal"}))
def test_whole_numbers_are_costs_and_no_data(function):
    with pytest.raises(BadInput, match=r"torch.uint8: expected floating point data"):
        TAKES_TENSORS[function](PLAIN.byte(), PLAIN)
    assert greedy(torch.tensor([[3, 1, 2], [3, 1, 2]])).tolist() == [1, 2]


def test_a_cost_of_another_name_is_refused_wherever_it_is_given():
    x = torch.zeros(2, 3)
    for work in (lambda: cost_matrix(x, x, "sqared"), lambda: nearest_of_k(x, 3, "sqared")):
        with pytest.raises(BadInput, match=r"sqared.*squared, inner"):
            work()


def test_optimal_refuses_more_samples_than_noises_naming_both():
    with pytest.raises(BadInput, match=r"\(9, 7\)"):
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


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
def test_whole_numbered_data_is_refused_naming_its_type(dtype, method):
    """uint8 images given by mistake: a noise of 0, 1 and 255 would train on nonsense."""
    with pytest.raises(BadInput, match=f"{dtype}.*floating point"):
        list(pairs([torch.ones(3, 4).to(dtype)], method, 8))
