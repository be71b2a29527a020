"""Noises with a price: told once from the first samples, the same for all ways of matching."""

import copy
import io

import pytest
import torch
from pools import rows_in_order
from scipy.optimize import linear_sum_assignment

from dansm import BadInput, NoisePool, cost_matrix, greedy
from dansm.scale.matching import prices as prices_module
from dansm.scale.matching.pool import FastPool
from dansm.scale.matching.prices import FEW, REFERENCES, Prices, references_of


@pytest.fixture(autouse=True)
def in_few_dimensions(monkeypatch):
    """Prices as in many, so that pools are small."""
    monkeypatch.setattr(prices_module, "DIMENSIONS", 1)


def images(count, numbers=64, seed=0):
    """Samples that like the same noises, as photographs do: few directions hold most of what differs."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(0, 3, numbers).neg().exp() * 3
    return torch.randn(count, numbers, generator=generator) * scale + 0.5


def gain(x, z):
    return (x * z).sum(1)


def test_priced_pools_are_the_default_and_the_paper_s_are_asked_for():
    assert NoisePool(10, (3,)).cost == "priced"
    assert NoisePool(10, (3,), cost="squared").prices is None
    with pytest.raises(BadInput, match=r"near.*priced, squared, inner"):
        NoisePool(10, (3,), cost="near")


@pytest.mark.parametrize("seed", [0, 1])
def test_matches_are_nearer_and_a_pool_s_life_more_even_than_by_squared_distance(seed):
    x = images(6000, seed=seed)
    z = {}
    for cost in ("squared", "priced"):
        pool = NoisePool(2000, (64,), cost=cost, seed=seed)
        z[cost] = torch.cat([pool(part) for part in x.split(250)])[2000:]  # the first life is for looking
    samples = x[2000:]
    best = 0
    for part, noises in zip(samples.split(2000), z["squared"].split(2000), strict=True):  # the same noises in both
        values = (part @ noises.T).double().numpy()
        best += values[linear_sum_assignment(values, maximize=True)].sum() / len(samples)
    share = {cost: gain(samples, z[cost]).mean().item() / best for cost in z}
    assert share["priced"] > share["squared"] + 0.01
    last = {cost: gain(samples, z[cost]).view(2, 4, 500).mean((0, 2)) for cost in z}
    assert (last["priced"][0] - last["priced"][3]) < 0.7 * (last["squared"][0] - last["squared"][3])
    drift = {cost: z[cost].square().mean(1).view(2, 4, 500).mean((0, 2)) for cost in z}
    assert (drift["priced"][3] - drift["priced"][0]).abs() < 0.5 * (drift["squared"][3] - drift["squared"][0]).abs()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_over_a_life_the_noises_are_those_drawn(dtype):
    pool = NoisePool(150, (5,), dtype=dtype, seed=3)
    handed_out = torch.cat([pool(part) for part in images(600, 5).to(dtype).split(70)])
    for number, life in enumerate(handed_out.split(150), 1):
        assert rows_in_order(life.double()) == rows_in_order(pool._drawn(number).double())


def test_before_enough_samples_have_come_the_pool_is_the_paper_s_and_then_another():
    x = images(1200)
    pools = [NoisePool(300, (64,), cost=cost, seed=0) for cost in ("priced", "squared")]
    first, after = x[: references_of(300, 64)], x[references_of(300, 64) :]
    assert torch.equal(*(torch.cat([pool(part) for part in first.split(64)]) for pool in pools))
    assert not torch.equal(*(pool(after) for pool in pools))


@pytest.mark.parametrize("sizes", [[1200], [1] * 40 + [1160], [7, 300, 500, 393]])
def test_batches_may_be_cut_anywhere(sizes):
    x = images(1200, 6)
    whole = NoisePool(250, (6,), seed=0)(x)
    pool = NoisePool(250, (6,), seed=0)
    assert torch.equal(torch.cat([pool(part) for part in x.split(sizes)]), whole)


def test_picks_are_greedy_by_inner_product_less_price():
    x = images(700, 16)
    pool = NoisePool(400, (16,), seed=0)
    pool(x[:650])
    noise, left = pool.noise[: pool.left].clone(), pool.left
    values = noise @ pool.prices.references.T - pool.prices.potentials
    price = pool.prices.temperature * (values / pool.prices.temperature).logsumexp(1)
    order = pool.index[:left].argsort()
    picks = order[greedy(2 * price[order] - 2 * x[650:] @ noise[order].T)]
    torch.testing.assert_close(pool(x[650:]), noise[picks], rtol=0, atol=0)


@pytest.mark.parametrize("served", [0, 40, 250, 399, 400, 520, 1111])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_run_resumes_with_the_same_noises(served, dtype):
    x = images(1500, 8).to(dtype)
    pool = NoisePool(200, (8,), dtype=dtype, seed=0)
    pool(x[:served])
    file = io.BytesIO()
    torch.save(pool.state_dict(), file)
    file.seek(0)
    resumed = NoisePool(200, (8,), dtype=dtype, seed=99)
    resumed(x[:33])  # what it had is forgotten
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(resumed.prices.potentials, pool.prices.potentials)
    for part in x[served:].split(57):
        assert torch.equal(resumed(part), pool(part))


def test_a_refused_state_leaves_a_pool_that_chose_its_size_as_it_was():
    x = images(400, 8)
    pools = [NoisePool("auto", (8,), expected=2000, seed=0) for _ in range(2)]
    for pool in pools:
        pool(x[:150])
    good = NoisePool(50, (8,), seed=0).state_dict()
    without_prices = {name: value for name, value in good.items() if name != "prices"}
    for bad in (NoisePool(50, (7,), seed=0).state_dict(), without_prices, good | {"made_for": None}):
        with pytest.raises(BadInput):
            pools[0].load_state_dict(bad)
    assert torch.equal(*(pool(x[150:]) for pool in pools))


def test_the_default_number_type_changes_nothing():
    x = images(400, 8)
    z = NoisePool(100, (8,), seed=0)(x)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(NoisePool(100, (8,), seed=0)(x), z)
    finally:
        torch.set_default_dtype(torch.float32)


def test_what_prices_are_told_with_counts_as_memory(monkeypatch):
    monkeypatch.setattr(prices_module, "LEAST", 1)
    shape = (4 * 2**20,)  # 32 noises of these take half a gigabyte
    assert NoisePool(8, shape, cost="squared", memory=0.5).match_size == 8
    with pytest.raises(BadInput, match=r"8.*0\.9 GB.*0\.5 GB"):
        NoisePool(8, shape, memory=0.5)


def test_a_copy_goes_its_own_way():
    x = images(400, 8)
    pool = NoisePool(100, (8,), seed=0)
    pool(x[:30])
    other = copy.deepcopy(pool)
    assert torch.equal(pool(x[30:]), other(x[30:]))


def test_pools_of_groups_have_prices_of_their_own():
    x, labels = images(900, 8), torch.randint(3, (900,))
    together = NoisePool(100, (8,), groups=3, seed=0)
    z = torch.cat([together(part, of_part) for part, of_part in zip(x.split(90), labels.split(90), strict=True)])
    for group, pool in together.pools.items():
        assert pool.prices.known
        assert set(map(tuple, pool.prices.references.tolist())) <= set(map(tuple, x[labels == group].tolist()))
        own = z[labels == group]
        for number, life in enumerate(own.split(100)[:-1], 1):
            assert rows_in_order(life) == rows_in_order(pool._drawn(number))


@pytest.mark.parametrize("x", [torch.ones(500, 3), torch.zeros(500, 3)])
def test_equal_samples_leave_noises_without_a_price(x):
    pool = NoisePool(120, (3,), seed=0)
    z = torch.cat([pool(part) for part in x.split(50)])
    assert not pool.prices.known and z.isfinite().all()
    assert torch.equal(z, NoisePool(120, (3,), cost="squared", seed=0)(x))


def test_samples_that_are_not_finite_tell_no_price():
    """On a GPU what is wrong with a batch is known only at the next, when these were looked at."""
    prices = Prices(FEW, torch.empty(0, 4))
    x = images(FEW, 4)
    x[3, 2], x[7, 0] = torch.nan, torch.inf
    assert prices.learn(x, lambda: torch.Generator().manual_seed(0))
    assert len(prices.references) == FEW - 2
    assert prices(torch.randn(5, 4)).isfinite().all()
    prices = Prices(FEW, torch.empty(0, 4))
    assert not prices.learn(x.nan_to_num(1e25), lambda: torch.Generator().manual_seed(0)) and not prices.known


def test_long_samples_tell_prices_by_few_of_them():
    assert references_of(10_000, 3072) == REFERENCES
    assert references_of(10, 3) == FEW
    assert references_of(60, 2**16) == 30  # half of the pool's own memory
    assert references_of(10_000, 2**19) == 16
    assert references_of(10_000, 2**20) == references_of(10_000, 2**24) == 0  # too few to tell anything


def test_a_pool_of_longer_samples_than_prices_can_be_told_of_has_none(monkeypatch):
    monkeypatch.setattr("dansm.scale.matching.prices.references_of", lambda *_: 0)
    x = images(300, 6)
    assert torch.equal(NoisePool(50, (6,), seed=0)(x), NoisePool(50, (6,), cost="squared", seed=0)(x))


def test_a_new_cost_is_one_row_of_the_table(monkeypatch):
    """Long noises first: every way of matching must take it."""
    import dansm

    monkeypatch.setitem(dansm.COSTS, "long", lambda z: -3 * dansm.squared_norms(z))
    monkeypatch.setattr(FastPool, "costs", (*FastPool.costs, "long"))
    x = images(40, 6)
    for groups in (None, 1):
        pool = NoisePool(60, (6,), cost="long", groups=groups, seed=0)
        z = pool(x, *([torch.zeros(40, dtype=torch.int64)] if groups else []))
        own = pool.pools[0] if groups else pool
        noise = own._drawn(1)
        assert torch.equal(z, noise[greedy(cost_matrix(x, noise, "long"))])


def test_random_pairs_have_no_prices_to_learn():
    pool = NoisePool(1, (4,), seed=0)
    pool(images(300, 4))
    assert not pool.prices.known


def test_in_few_dimensions_noises_have_no_price(monkeypatch):
    """There squared distance is near the best of all plans."""
    monkeypatch.undo()
    x = images(400, 9)
    assert torch.equal(NoisePool(100, (9,), seed=0)(x), NoisePool(100, (9,), cost="squared", seed=0)(x))
    assert not torch.equal(NoisePool(100, (3, 4), seed=0)(images(400, 12).view(-1, 3, 4)),
                           NoisePool(100, (3, 4), cost="squared", seed=0)(images(400, 12).view(-1, 3, 4)))


@pytest.mark.parametrize("wrong", [dict(prices={}), dict(prices=None), dict(own=torch.zeros(3)), dict(own=None)])
def test_a_state_without_all_prices_is_refused_and_changes_nothing(wrong):
    x = images(300, 6)
    pool, untouched = (NoisePool(100, (6,), seed=0) for _ in range(2))
    saved = NoisePool(100, (6,), seed=1)
    for each in (pool, untouched, saved):
        each(x[:140])
    with pytest.raises(BadInput, match=r"prices.*expected"):
        pool.load_state_dict(saved.state_dict() | wrong)
    assert torch.equal(pool(x[140:]), untouched(x[140:]))
