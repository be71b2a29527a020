"""Pools of different ages side by side: each is a NoisePool with a part of its noises gone, and serves its part."""

import pytest
import test_commands
import torch
from test_checkpoint import same
from test_commands import FAST, make_images, state_of

from dansm import BadInput, NoisePool
from scale.ages import SideBySide, seed_of
from scale.recipe import Recipe

run, refused, tiny_network = test_commands.run, test_commands.refused, test_commands.tiny_network


@pytest.fixture
def images(tmp_path):
    return make_images(tmp_path / "images", width=8, height=8)


def data(count, seed=0, shape=(3, 2)):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed)) + 1



def rows_of(noises):
    return sorted(map(tuple, noises.flatten(1).tolist()))


def test_one_age_is_the_pool_itself():
    side, pool = SideBySide(1, 16, (3, 2), seed=5), NoisePool(16, (3, 2), seed=5)
    for count in (1, 7, 20):
        assert torch.equal(side(data(count, count)), pool(data(count, count)))


@pytest.mark.parametrize("cost", ["squared", "inner"])
def test_samples_are_dealt_to_the_pools_in_turn_over_the_borders_of_batches(cost):
    """Each gives what a pool by itself gives for its samples, joined, with that part of its noises gone."""
    x = data(61)
    side = SideBySide(3, 12, (3, 2), seed=1, cost=cost)
    given = torch.cat([side(part) for part in x.split([1, 1, 5, 0, 2, 30, 22])])
    for age in range(3):
        alone = NoisePool(12, (3, 2), seed=seed_of(1, age), cost=cost)
        if age:
            whole = alone.state_dict()
            alone.load_state_dict({**whole, "number": 1, "index": torch.arange(4 * age, 12, dtype=torch.int32)})
        assert torch.equal(given[age::3], alone(x[age::3])), age
    assert torch.equal(given, SideBySide(3, 12, (3, 2), seed=1, cost=cost)(x))


def test_the_first_lives_are_shorter_by_a_share_each_and_then_whole():
    """Pool k of n hands out (n − k)/n of the noises that it drew, and after that all that it draws."""
    side = SideBySide(4, 20, (3, 2), seed=3)
    given = side(data(4 * 60))
    for age, pool in enumerate(side.pools):
        ours, fresh = given[age::4], NoisePool(20, (3, 2), seed=pool.seed)
        first, later = fresh(data(20, 9)), fresh(data(20, 8))
        left = 20 - 5 * age
        assert set(rows_of(ours[:left])) <= set(rows_of(first)) and len(set(rows_of(ours[:left]))) == left
        assert rows_of(ours[left : left + 20]) == rows_of(later)


def test_the_pools_stay_equally_far_apart_in_age():
    side = SideBySide(4, 20, (3, 2), seed=3)
    for batch in range(30):
        side(data(12, batch))  # three noises of each
        ages = sorted(20 - pool.left for pool in side.pools)
        assert {(after - before) % 20 for before, after in zip(ages, [*ages[1:], ages[0]], strict=True)} == {5}


def test_side_by_side_the_noises_change_a_quarter_as_much():
    """A pool's first noises are short and its last long. Four pools together pass each quarter of a life at once."""
    x, swing = data(32 * 256, shape=(64,)) * 0.1, {}
    for ages in (1, 4):
        pool = SideBySide(ages, 256, (64,), seed=0)
        z = torch.cat([pool(part) for part in x.split(64)])[1024:]  # after the first lives, which are shorter
        by_phase = z.square().mean(1).view(-1, 4, 64).mean((0, 2))
        assert by_phase.mean() == pytest.approx(1, abs=0.02)
        swing[ages] = by_phase.max() - by_phase.min()
    assert swing[1] > 0.3 and 0.15 < swing[4] / swing[1] < 0.35


@pytest.mark.parametrize("count", [0, 3, 17, 40])
def test_what_is_saved_goes_on_with_the_same_noises(count):
    side = SideBySide(3, 12, (3, 2), seed=2)
    side(data(count))
    other = SideBySide(3, 12, (3, 2), seed=2)
    other(data(5, 7))
    other.load_state_dict(side.state_dict())
    assert torch.equal(other(data(50, 1)), side(data(50, 1)))
    assert (side.match_size, side.shape) == (12, (3, 2))


def test_pools_have_noises_of_their_own():
    side = SideBySide(4, 100, (3, 2), seed=0)
    assert len(set(rows_of(side(data(400))))) == 400
    assert len({seed_of(seed, age) for seed in range(20) for age in range(10)}) == 200


def test_what_is_no_state_of_as_many_pools_is_refused():
    side = SideBySide(3, 12, (3, 2), seed=2)
    with pytest.raises(BadInput, match=r"of 2 pools side by side: expected 3"):
        side.load_state_dict(SideBySide(2, 12, (3, 2), seed=2).state_dict())
    with pytest.raises(BadInput, match=r"of 0 pools side by side: expected 3"):
        side.load_state_dict(NoisePool(12, (3, 2), seed=2).state_dict())
    with pytest.raises(BadInput, match=r"of 0 pools side by side: expected 3"):
        side.load_state_dict(None)
    with pytest.raises(BadInput, match=r"match_size is None: expected"):
        SideBySide(3, None, (3, 2), seed=2)
    with pytest.raises(BadInput, match=r"seed is -1: expected"):
        SideBySide(3, 9, (3, 2), seed=-1)
    for wrong in (torch.zeros(4, 9, 9), torch.zeros(0, 9, 9)):
        with pytest.raises(BadInput, match=r"expected"):
            side(wrong)
    with pytest.raises(BadInput, match=r"ages is 3: expected at most 2"):
        SideBySide(3, 2, (3, 2), seed=2)
    with pytest.raises(BadInput, match=r"ages is 0: expected"):
        SideBySide(0, 2, (3, 2), seed=2)


def test_each_pool_is_checked_against_the_memory_that_those_before_it_leave(monkeypatch):
    """Of three two would fit: the third is refused, by its own size and what is left."""
    one, allocate, held = NoisePool(3000, (3, 2), seed=0)._bytes(3000), NoisePool._allocate, []
    monkeypatch.setattr(NoisePool, "_allocate", lambda pool: (held.append(one), allocate(pool)))
    monkeypatch.setattr("dansm.free_memory", lambda device: int(2.5 * one) - sum(held))
    with pytest.raises(BadInput, match=r"match_size is 3,000: the pool needs"):
        SideBySide(3, 3000, (3, 2), seed=0)
    held.clear()
    SideBySide(2, 3000, (3, 2), seed=0)


@pytest.mark.parametrize(("settings", "words"), [
    (dict(method="random"), "--ages is 2, with --method random and --match-scope rank: expected greedy and rank"),
    (dict(match_scope="global"), "--ages is 2, with --method greedy and --match-scope global: expected greedy"),
    (dict(match_size=1), "--ages is 2: expected at most --match-size, which is 1"),
    (dict(match_size=0), "--ages is 2: expected at most --match-size, which is 0"),
])
def test_a_recipe_says_what_ages_do_not_go_with(settings, words):
    with pytest.raises(BadInput, match=words):
        Recipe("d", ages=2, **settings)
    assert Recipe("d", ages=1, **settings).ages == 1


def test_a_run_resumed_in_the_middle_is_the_run_that_never_stopped(run, refused, images, tmp_path):
    command, once, twice = ["train", images, "--ages", 2, *FAST], tmp_path / "once", tmp_path / "twice"
    assert run(*command, "--steps", 9, "--out", once)[0] == 0
    run(*command, "--steps", 4, "--out", twice)
    assert run(*command, "--steps", 9, "--out", twice)[0] == 0
    whole, resumed = state_of(once), state_of(twice)
    assert whole.pop("seconds") != resumed.pop("seconds") and same(whole, resumed)
    assert len(whole["ranks"][0]["pool"]["pools"]) == 2 and whole["ranks"][0]["pool"]["served"] == 72
    assert "ages 2 → 1" in refused("train", images, *FAST, "--steps", 9, "--out", twice)
