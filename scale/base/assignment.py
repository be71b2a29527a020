"""Linear assignment on the CPU, in float64: by lapx where it is installed, by scipy elsewhere.

numpy works in one thread here: several would wait for each other at every few rows where the cores are shared.
"""

import numpy as np
import torch
from torch import Tensor

from dansm import BadInput

PRICED = 256  # rows from which finding prices takes less time than they save
ROUNDS = 3
HEAT = 2.0  # times what a row's second least cost is above its least
ROUNDING = 1000  # prices may be so many times the costs of the pairing: float64 then loses 1e-12 of these


def assign(cost: Tensor) -> Tensor:
    """Find the pairing of least total cost. cost: (B, M) on the CPU, B ≤ M → (B,) int64, the column of each row.

    Both libraries are exact but for float64's rounding. On images against noises lapx is 4 to 30 times faster. Raises
    BadInput for costs that are not finite.
    """
    costs = cost.numpy()
    with np.errstate(all="ignore"):
        finite = np.isfinite(costs.sum()) or np.isfinite(costs).all()  # the sum is found sooner, and may overflow
    if not finite:
        raise BadInput(f"the {len(costs)}×{len(costs.T)} costs hold NaN or infinite values: expected finite ones")
    try:
        picks = _by_lapx(costs)
    except (ImportError, ValueError):  # it is not installed, or costs of 1e308 overflow there
        from scipy.optimize import linear_sum_assignment  # takes a while to import

        picks = linear_sum_assignment(costs)[1]
    return torch.from_numpy(picks)


def _by_lapx(costs: np.ndarray) -> np.ndarray:
    from lap import lapjvh

    def solved(costs: np.ndarray) -> np.ndarray:
        return lapjvh(costs, extend_cost=True, return_cost=False)[1]

    rows, columns = costs.shape
    if rows == columns >= PRICED:  # with columns to spare a price would change what is optimal
        with np.errstate(all="ignore"):  # equal costs have no heat, huge ones overflow
            reduced, taken_off = _reduced(costs, _prices(costs[::4].astype(np.float32)))
        if np.isfinite(taken_off):
            picks = solved(reduced)
            if taken_off <= ROUNDING * np.abs(costs[np.arange(rows), picks]).sum(dtype=np.float64):
                return picks
    return solved(costs.astype(np.float64, order="C"))


def _prices(some: np.ndarray) -> np.ndarray:
    """Guess what each column is worth more or less than others, from a quarter of the rows. some: (N, M) → (M,).

    Any finite prices leave the optimum as it is; good ones leave the solver few rows that want the same column. They
    are Sinkhorn's, or the columns' least costs where at these as many columns are wanted.
    """
    guesses = [some.min(0), np.nan_to_num(_sinkhorn(some), nan=0, posinf=0, neginf=0)]
    wanted = [len(np.unique((some - guess).argmin(1))) for guess in guesses]
    return guesses[int(wanted[1] > wanted[0])].astype(np.float64)


def _sinkhorn(some: np.ndarray) -> np.ndarray:
    """Prices at which columns are wanted about equally often, by Sinkhorn's iteration. some: (N, M) → (M,), or NaN."""
    means = some.mean(0)
    gains = some - means
    gains -= gains.min(1, keepdims=True)
    heat = HEAT * np.partition(gains[:64], 1)[:, 1].mean()
    gains *= -1 / heat
    kernel = np.exp(gains, out=gains)
    scales = np.ones_like(means)
    for _ in range(ROUNDS):
        rows = 1 / np.einsum("ij,j->i", kernel, scales)  # by BLAS it takes several threads
        scales = 1 / np.einsum("ij,i->j", kernel, rows)
    return means + heat * np.log(scales)


def _reduced(costs: np.ndarray, prices: np.ndarray) -> tuple[np.ndarray, float]:
    """Take prices off the columns, then its least cost off each row: in float64, and the sum of all that is taken off.

    It works on a few rows at a time, which stay in the processor's cache.
    """
    reduced = np.empty(costs.shape)
    taken_off = np.abs(prices).sum()
    for start in range(0, len(costs), 64):
        some = slice(start, start + 64)
        block = np.subtract(costs[some], prices, out=reduced[some])
        least = block.min(1, keepdims=True)
        block -= least
        taken_off += np.abs(least).sum()
    return reduced, taken_off
