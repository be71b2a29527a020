"""The auction, in Triton's interpreter where there is no GPU: within its gap of scipy, and never without end."""

import math

import pytest
import torch
from pools import total
from scipy.optimize import linear_sum_assignment

from dansm import BadInput
from dansm.scale.base.statistics import squared_distances

pytest.importorskip("triton")
from dansm.scale.matching import auction as kernels
from dansm.scale.matching.auction import auction

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(("samples", "noises"), [(1, 1), (2, 2), (1, 9), (30, 30), (20, 33)])
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
    with pytest.raises(BadInput, match="6×6 costs hold NaN or infinite"):
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


def test_the_trial_notices_an_auction_that_gives_a_noise_twice(monkeypatch):
    kernels.try_out(DEVICE)
    monkeypatch.setattr(kernels, "auction", lambda cost, gap: (torch.zeros(len(cost)), 0.0, 0.0))
    with pytest.raises(RuntimeError, match="twice"):
        kernels.try_out(DEVICE)
