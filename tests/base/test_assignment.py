"""Linear assignment on the CPU: the pairing that scipy finds, whatever the costs are, with lapx and without it."""

import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from dansm import BadInput
from dansm.scale.base import assignment
from dansm.scale.base.assignment import assign
from dansm.scale.base.statistics import squared_distances
from dansm.scale.matching import optimal

M = 300  # above PRICED


def draw(*shape, dtype=torch.float32):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(len(shape)), dtype=dtype)


def normal(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7), dtype=dtype)


def distances(dim, dtype=torch.float32):
    return squared_distances(normal(M, dim, dtype=dtype), 0.5 * normal(M, dim, dtype=dtype).flip(0) + 0.3)


COSTS = {
    "distances": lambda: distances(500),
    "distances, turned": lambda: distances(500).T,
    "in a plane, float64": lambda: distances(2, torch.float64),
    "on a line": lambda: distances(1),
    "even": lambda: draw(M, M),
    "whole numbers": lambda: (3 * draw(M, M)).floor(),
    "constant": lambda: torch.full((M, M), -3.3),
    "zeros": lambda: torch.zeros(M, M),
    "equal rows": lambda: draw(1, M).expand(M, M),
    "equal columns": lambda: draw(M, 1).expand(M, M),
    "rows of one kind": lambda: distances(500)[:10].repeat(M // 10, 1) + 1e-4 * draw(M, M),
    "products": lambda: draw(M, 1) * draw(1, M),
    "large offset": lambda: distances(500) + 1e6,
    "an offset for each row": lambda: distances(500) + 1e6 * draw(M, 1),
    "an offset for each column": lambda: distances(500) - 1e6 * draw(1, M),
    "tiny": lambda: 1e-30 * draw(M, M),
    "denormal": lambda: 1e-42 * draw(M, M),
    "huge": lambda: 1e38 * draw(M, M),
    "huge, float64": lambda: 1e308 * (draw(M, M, dtype=torch.float64) - 0.5),
    "heavy tails": lambda: normal(M, M) ** 9,
    "beneath float32": lambda: 1e6 + 1e-8 * draw(M, M, dtype=torch.float64),
    "forbidden pairs": lambda: torch.where(normal(M, M) < 1, 1e12, draw(M, M)),
    "forbidden pairs, float64": lambda: torch.where(normal(M, M) < 1, 1e15, draw(M, M, dtype=torch.float64)),
    "a column of its own scale": lambda: torch.cat([1e15 * draw(M, 1), distances(500)[:, 1:]], 1),
    "more noises": lambda: distances(20)[:200],
    "one sample": lambda: distances(20)[:1],
    "one noise": lambda: torch.ones(1, 1),
    "columns of a larger one": lambda: distances(20)[::2, ::2],
}


def check(cost, relative=1e-12):
    """That the picks are columns of their own, and that their total is scipy's to `relative` of what is summed."""
    picks = assign(cost)
    values, rows = cost.double().numpy(), np.arange(len(cost))
    assert picks.dtype == torch.int64 and len(picks.unique()) == len(cost) == len(picks)
    best = values[linear_sum_assignment(cost.numpy())]
    with np.errstate(over="ignore"):
        assert abs((values[rows, picks.numpy()] - best).sum()) <= relative * np.abs(best).sum()


@pytest.mark.parametrize("kind", COSTS)
def test_the_total_is_scipys(kind):
    pytest.importorskip("lap")
    check(COSTS[kind]())


@pytest.mark.parametrize("kind", ["distances", "more noises", "whole numbers", "one noise"])
def test_without_lapx_scipy_assigns(kind, monkeypatch):
    monkeypatch.setitem(sys.modules, "lap", None)
    check(COSTS[kind](), relative=0)


@pytest.mark.parametrize("shape", [(0, 0), (0, 4)])
@pytest.mark.parametrize("lapx", [True, False])
def test_no_samples_get_no_noises(shape, lapx, monkeypatch):
    if not lapx:
        monkeypatch.setitem(sys.modules, "lap", None)
    picks = assign(torch.empty(shape))
    assert picks.shape == (0,) and picks.dtype == torch.int64


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_the_total_is_scipys_for_any_costs(data):
    """Small ones too are solved with prices."""
    rows = data.draw(st.integers(1, 9))
    columns = rows + data.draw(st.integers(0, 3))
    numbers = st.one_of(st.integers(-3, 3).map(float), st.floats(-1e9, 1e9, width=32), st.floats(-1, 1, width=32))
    values = data.draw(st.lists(numbers, min_size=rows * columns, max_size=rows * columns))
    cost = torch.tensor(values, dtype=data.draw(st.sampled_from([torch.float32, torch.float64]))).view(rows, columns)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assignment, "PRICED", data.draw(st.sampled_from([1, 256])))
        check(cost)


@pytest.mark.parametrize("prices", [np.full(M, 1e9), 1e30 * np.arange(M), np.full(M, np.inf), np.zeros(M)])
def test_prices_may_be_any(prices, monkeypatch):
    monkeypatch.setattr(assignment, "_prices", lambda some: prices)
    check(COSTS["distances"]())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_costs_that_are_not_finite_are_refused(value, dtype):
    cost = torch.ones(4, 6, dtype=dtype)
    cost[2, 3] = value
    with pytest.raises(BadInput, match="4×6 costs hold NaN or infinite"):
        optimal(cost)
    if dtype != torch.bfloat16:
        with pytest.raises(BadInput, match="4×6 costs"):
            assign(cost)


def test_costs_whose_sum_overflows_are_assigned():
    cost = torch.tensor([[3e38, 1e38], [3e38, 3e38]])
    found = optimal(cost)
    assert found.picks.tolist() == [1, 0] and found.total == found.bound == pytest.approx(4e38)
