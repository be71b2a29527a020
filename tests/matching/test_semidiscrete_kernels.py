"""The kernels of a semidiscrete step, in Triton's interpreter where there is no GPU: what the plain formulas give."""

import pytest
import torch

pytest.importorskip("triton")
from dansm.scale.matching import solver
from dansm.scale.matching.semidiscrete_kernels import Tile, by_columns, by_rows, shared_out, try_out

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def plain(values, potentials, judged, temperature):
    shared = ((values - potentials) / temperature).softmax(1)
    first, second = (half.mean(0) for half in shared.chunk(2))
    return (values - judged).argmax(1), first, second, shared.square().sum(1).mean()


def step(batch, n, temperature=0.5, far=0.0):
    """Arguments of `shared_out`. Multiples of 1/1024, whose differences are exact: no rounding is divided by a low
    temperature."""
    numbers = torch.randn(batch + 2, n).mul(1024).round().div(1024).to(DEVICE)
    return numbers[:batch] + far, numbers[batch], numbers[batch + 1], torch.tensor(temperature, device=DEVICE)


def assert_close(results, arguments):
    expected = plain(*(argument.double() for argument in arguments))
    assert [result.shape for result in results] == [result.shape for result in expected]
    assert torch.equal(results[0], expected[0])
    for result, exact in zip(results[1:], expected[1:], strict=True):
        torch.testing.assert_close(result.double(), exact, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(("batch", "n"), [(2, 2), (2, 5), (6, 1024), (18, 1028), (34, 2501)])
@pytest.mark.parametrize("temperature", [30.0, 0.5, 1e-6])
def test_a_step_is_that_of_the_plain_formulas_in_float64(batch, n, temperature):
    arguments = step(batch, n, temperature)
    assert_close(shared_out(*arguments), arguments)


@pytest.mark.parametrize("far", [-8192.0, 8192.0])
def test_values_far_from_zero_neither_overflow_nor_vanish(far):
    arguments = step(4, 1100, 1e-2, far)
    assert_close(shared_out(*arguments), arguments)


@pytest.mark.parametrize("tile", [Tile(1, 16, 1, 1), Tile(2, 32, 2, 1), Tile(4, 64, 3, 1)])
@pytest.mark.parametrize("programs", [1, 12])
def test_the_size_of_tiles_and_the_number_of_programs_change_no_result(tile, programs):
    arguments = step(26, 75)
    values, potentials, _, temperature = arguments
    winners, tops, logs, squares = by_rows(*arguments, tile=tile)
    first, second = by_columns(values, potentials, temperature, tops, logs, tile=tile, programs=programs)
    assert_close((winners, first, second, squares.mean()), arguments)


@pytest.mark.parametrize("best", [[0], [3, 1040], [1039, 1040], [1023, 1024, 2047], [16, 2048], [2060]])
def test_the_lowest_of_equal_values_wins(best):
    values, judged = torch.zeros(4, 2061), torch.ones(2061)
    values[1] = 7.0
    judged[best] = 0.5
    winners, *_ = shared_out(*(each.to(DEVICE) for each in (values, judged, judged, torch.tensor(1.0))))
    assert winners.tolist() == [best[0]] * 4


def test_the_halves_are_told_apart():
    values = torch.zeros(6, 9, device=DEVICE)
    values[:3, 2], values[3:, 7] = 100.0, 100.0
    nothing = torch.zeros(9, device=DEVICE)
    winners, first, second, squares = shared_out(values, nothing, nothing, torch.tensor(1.0, device=DEVICE))
    assert winners.tolist() == [2, 2, 2, 7, 7, 7]
    assert first.tolist() == pytest.approx(torch.eye(9)[2].tolist())
    assert second.tolist() == pytest.approx(torch.eye(9)[7].tolist())
    assert squares.item() == pytest.approx(1)


def test_the_same_values_give_the_same_bits():
    arguments = step(30, 1300)
    assert all(torch.equal(*pair) for pair in zip(shared_out(*arguments), shared_out(*arguments), strict=True))


def test_the_layout_in_memory_changes_no_bit():
    values, *others, temperature = step(6, 40)
    expected = shared_out(values, *others, temperature)
    shifted = [torch.cat([torch.zeros(1, device=DEVICE), other])[1:] for other in others]
    for laid_out in (values.T.contiguous().T, torch.nn.functional.pad(values, (1, 2))[:, 1:-2]):
        results = shared_out(laid_out, *shifted, temperature)
        assert all(torch.equal(*pair) for pair in zip(results, expected, strict=True))


@pytest.mark.parametrize("wrong", range(4))
def test_the_trial_notices_results_that_differ_from_the_plain_path(monkeypatch, wrong):
    try_out(DEVICE)

    def changed(*arguments):
        results = list(plain(*arguments))
        results[wrong] = results[wrong] + 1
        return results

    monkeypatch.setattr(solver, "shared_out", changed)
    with pytest.raises(RuntimeError, match="plain path"):
        try_out(DEVICE)
