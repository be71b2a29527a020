"""Semidiscrete coupling: every sample is taken as often as it should be, by the plan of least cost."""

import math
import re
import warnings

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from scipy.stats import kstest

from dansm import BadInput, Semidiscrete, noise_generator
from dansm.scale.matching.semidiscrete import digests
from dansm.scale.matching.solver import Solver, evenness
from dansm.tiny.shapes import SHAPES

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Plain(Semidiscrete):
    """What dansm.py does where it is alone."""


KINDS = [Plain, Semidiscrete]


def points(n=60, dim=16, seed=0):
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def solved(data, groups=None, error=0.1, kind=Semidiscrete, **settings):
    coupling = kind(data, groups, seed=1, **settings)
    coupling.solve(error)
    return coupling


def counts(coupling, draws=60, of=1000, labels=None):
    taken = torch.cat([coupling.draw(of, labels)[1] for _ in range(draws)])
    return taken.bincount(minlength=len(coupling.potentials)).cpu()


def unevenness(taken, share=None):
    share = torch.full((len(taken),), 1 / len(taken)) if share is None else share
    return evenness(taken.double(), share, 0).error


# ------------------------------------------------------------------------------- the plan


@pytest.mark.parametrize("kind", KINDS)
def test_on_a_line_each_point_gets_the_noises_between_two_quantiles(kind):
    """There the best plan keeps the order, and the only even one is known."""
    x = torch.tensor([[3.0], [-1.0], [0.5], [7.0]], device=DEVICE)
    z, taken = solved(x, error=0.03, kind=kind).draw(20_000)
    quantiles = torch.special.ndtri(torch.tensor([0.25, 0.5, 0.75]))
    expected = torch.tensor([1, 2, 0, 3])[torch.bucketize(z[:, 0].cpu(), quantiles)]
    assert (taken.cpu() == expected).double().mean() > 0.97


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", ["two-moons", "checkerboard"])
def test_no_other_plan_with_the_same_shares_costs_less(shape, kind):
    x = torch.as_tensor(SHAPES[shape](40, torch.Generator().manual_seed(0))).float().to(DEVICE)
    coupling = kind(x, seed=1)
    for _ in range(2):  # whatever the potentials are
        z, taken = coupling.draw(150)
        gain = (z @ x[taken].T).cpu().double()
        best = gain[linear_sum_assignment(gain, maximize=True)].sum()
        assert gain.trace().item() == pytest.approx(best.item(), rel=1e-6)
        coupling.solve()


@pytest.mark.parametrize("kind", KINDS)
def test_pairs_are_nearer_than_random_ones_and_noises_are_normal(kind):
    x = points(100, 8)
    coupling = solved(x, kind=kind)
    z, taken = coupling.draw(4000)
    assert kstest(z.flatten().cpu(), "norm").pvalue > 1e-3 and z.mean(0).abs().max() < 5 / math.sqrt(4000)
    shuffled = x[taken[torch.randperm(len(taken), device=DEVICE)]]
    assert (x[taken] - z).square().sum(1).mean() < 0.75 * (shuffled - z).square().sum(1).mean()


# ------------------------------------------------------------------------------- the solver


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("data", ["far from zero", "large", "small", "unequal sizes", "in a plane", "two"])
def test_shares_are_even_whatever_the_units(data, kind):
    x = {"far from zero": points() + 50, "large": 1000 * points(), "small": 0.001 * points(),
         "unequal sizes": points() * torch.linspace(0.1, 3, 60, device=DEVICE)[:, None],
         "in a plane": points(60, 2), "two": torch.tensor([[1.0, 0], [0, 2]], device=DEVICE)}[data]
    coupling = kind(x, seed=1)
    before = unevenness(counts(coupling))
    coupling.solve(0.1)
    assert before > 0.3 or data == "two"
    few_dimensions = data == "in a plane" and kind is Plain  # it needs the annealing of scale/
    assert unevenness(counts(coupling)) < (0.3 if few_dimensions else 0.12)


def test_what_a_solve_reached_is_told():
    (reached,) = Semidiscrete(points(), seed=1).solve(0.1)
    assert reached.error < reached.at_most < 0.1 and 10 < reached.noises < 1000


def test_the_error_told_is_that_of_an_independent_count_on_average():
    """It judges the potentials of the check before: those that follow the noises counted would seem too good."""
    differences, deviations, counts_of, even = [], [], [], torch.full((50,), 0.02, device=DEVICE)
    for seed in range(24):
        coupling = Semidiscrete(points(50, 12, seed), seed=seed)
        (of_part,) = coupling.all_parts()
        solver = Solver(of_part.points, even, noise_generator(seed, DEVICE))
        for _ in range(11):
            while not solver.due:
                solver.step()
            told = solver.check()
            judged, coupling.potentials[of_part.samples] = coupling.potentials.clone(), solver.mean
        coupling.potentials = judged
        counted = evenness(counts(coupling, 30).to(DEVICE), even, 0)
        differences.append(told.error**2 - counted.error**2)
        deviations.append(math.hypot(told.deviation, counted.deviation))
        counts_of.append(counted.error**2)
    assert abs(sum(differences)) < 4 * math.hypot(*deviations) < 0.95 * sum(counts_of)


@pytest.mark.parametrize(("n", "dim", "error"), [(3000, 256, 0.2), (1000, 1024, 0.15)])
def test_what_is_told_is_true_of_the_potentials_that_are_kept(n, dim, error):
    """Samples of equal size are taken evenly from the start on, and first steps make that worse for a while."""
    coupling = Semidiscrete(points(n, dim), seed=1)
    for _ in range(3):  # asked for more each time
        (reached,) = coupling.solve(error, most=40)
        counted = unevenness(counts(coupling, 10, 4 * n))
        assert counted < min(error, reached.at_most + 0.02)
        error *= 0.8


def test_a_solve_stopped_before_it_is_good_keeps_the_best_that_was_judged():
    coupling = Semidiscrete(points(1000, 256), seed=1)
    start = unevenness(counts(coupling, 10, 4000))

    class Stop(Exception):
        pass

    def stop(number, solver, solved):
        if solver.noises > 12:
            raise Stop

    with pytest.raises(Stop):
        coupling.solve(0.01, report=stop)
    assert unevenness(counts(coupling, 10, 4000)) < start + 0.02


@pytest.mark.parametrize("n", [2, 3, 5])
def test_small_parts_are_solved_until_the_error_is_told_from_chance(n):
    for seed in range(5):
        (reached,) = Semidiscrete(points(n, 8, seed), seed=seed).solve(0.1)
        assert reached.at_most <= 0.1


def test_chance_is_taken_off_the_error():
    share = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    true = torch.tensor([0.12, 0.18, 0.33, 0.37], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    squares = []
    for _ in range(4000):
        taken = true.multinomial(300, replacement=True, generator=generator).bincount(minlength=4)
        found = taken.double() / 300
        by_chance = found * (1 - found) / 299
        squares.append((((found - share).square() - by_chance) / share).sum().item())
        if squares[-1] > 0:
            assert evenness(taken.double(), share, 0).error == pytest.approx(math.sqrt(squares[-1]))
    expected = ((true - share).square() / share).sum().item()
    assert sum(squares) / len(squares) == pytest.approx(expected, rel=0.1)


def test_the_same_seed_finds_the_same_and_a_solve_goes_no_further_than_it_is_asked():
    x = points()
    first, second = Semidiscrete(x, seed=3), Semidiscrete(x, seed=3)
    (reached,) = first.solve(1e-9, most=20)
    second.solve(1e-9, most=20)
    assert torch.equal(first.potentials, second.potentials) and 20 <= reached.noises < 40


# ------------------------------------------------------------------------------- groups, parts, equal samples


@pytest.mark.parametrize("kind", KINDS)
def test_noises_stay_within_their_group_and_come_as_often_as_the_data(kind):
    labels = torch.tensor([0] * 30 + [2] * 20 + [3] * 10)[torch.randperm(60)]
    coupling = solved(points(), labels, kind=kind)
    asked = torch.tensor([3, 0, 0, 2, 3]).repeat(40)
    z, taken = coupling.draw(200, asked)
    assert torch.equal(labels[taken.cpu()], asked) and z.shape == (200, 16)
    shares = counts(coupling)
    assert unevenness(shares) < 0.12
    of_groups = torch.zeros(4).index_add_(0, labels, shares.float())
    torch.testing.assert_close(of_groups / of_groups.sum(), torch.tensor([30, 0, 20, 10]) / 60, atol=0.01, rtol=0)
    assert unevenness(counts(coupling, 20, labels=torch.full((1000,), 2))[labels == 2]) < 0.12


def test_parts_hold_no_more_than_asked_and_are_met_by_their_sizes():
    coupling = solved(points(), torch.arange(60) % 2, part=13)
    sizes = [len(part.samples) for parts in coupling.parts.values() for part in parts]
    assert sizes == [10] * 6
    assert torch.cat([part.samples for parts in coupling.parts.values() for part in parts]).unique().numel() == 60
    assert unevenness(counts(coupling)) < 0.12


def test_equal_samples_are_taken_equally_often():
    x = torch.cat([points(20), points(5)[:1].expand(4, -1), torch.zeros(3, 16, device=DEVICE)])
    shares = counts(solved(x, error=0.05))  # sample 0 is there five times
    assert unevenness(shares) < 0.1
    same = digests(x)
    assert same[0] == same[20] == same[23] != same[1] and same[24] == same[26]
    assert digests(-torch.zeros(1, 3)) == digests(torch.zeros(1, 3))


@pytest.mark.parametrize("x", [torch.ones(1, 4), torch.ones(5, 4), torch.zeros(3, 4)])
def test_samples_that_leave_no_choice_are_taken_at_random(x):
    coupling = solved(x.to(DEVICE))
    assert unevenness(counts(coupling, 20)) < 0.05


# ------------------------------------------------------------------------------- state, refusals


def test_a_coupling_continues_where_its_state_was_saved():
    labels = torch.arange(60) % 3
    coupling = solved(points(), labels, part=8)
    coupling.draw(7)
    coupling.draw(12, torch.arange(12) % 3)
    state = coupling.state_dict()
    expected = [coupling.draw(9), coupling.draw(5, torch.tensor([0, 1, 2, 0, 1]))]
    other = Semidiscrete(points(), labels, part=8, seed=1)
    other.load_state_dict(state)
    for (z, taken), (of_z, of_taken) in zip([other.draw(9), other.draw(5, torch.tensor([0, 1, 2, 0, 1]))], expected,
                                            strict=True):
        assert torch.equal(z, of_z) and torch.equal(taken, of_taken)
    with pytest.raises(BadInput, match="parts"):
        Semidiscrete(points(), labels, part=5, seed=1).load_state_dict(state)
    for load in (other.load_state_dict, other.load_solution):
        with pytest.raises(BadInput, match="expected what a Semidiscrete saved"):
            load({"made_for": state["made_for"]})


def test_what_is_made_and_drawn_in_inference_mode_serves_a_training():
    with torch.inference_mode():
        coupling = solved(points())
        coupling.draw(5)
    z, _ = coupling.draw(5)
    (torch.ones(16, device=DEVICE, requires_grad=True) * z).sum().backward()


@pytest.mark.parametrize("kind", KINDS)
def test_a_start_that_is_even_is_not_made_worse(kind):
    coupling = solved(torch.eye(32, device=DEVICE), kind=kind)
    assert unevenness(counts(coupling)) < 0.1


def test_one_warning_tells_of_noises_that_are_drawn_before_a_solve():
    coupling, loaded = Semidiscrete(points()), Semidiscrete(points())
    with pytest.warns(UserWarning, match=r"before solve\(\)") as told:
        coupling.draw(2)
        coupling.draw(2, torch.zeros(2, dtype=torch.int64))
    assert len(told) == 1 and told[0].filename == __file__
    coupling.solve()
    loaded.load_solution(coupling.solution())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for one in (coupling, loaded, solved(points())):
            one.draw(2)


@pytest.mark.filterwarnings("ignore:.*before solve")
def test_a_start_in_few_dimensions_takes_the_nearest_sample():
    x = points(500, 3) - points(500, 3).mean(0)
    start = Semidiscrete(x)
    z, taken = start.draw(200)
    assert torch.equal(taken, torch.cdist(x.square().mean().sqrt() * z, x).argmin(1))
    assert unevenness(counts(start)) < 0.8  # lengths times √(2 ln n) are off by 17 shares


def refused(data, memory, **settings):
    """The least memory that the refusal of this one names."""
    with pytest.raises(BadInput, match=f"memory is {memory:.3g} GB .* expected .* or more") as error:
        Semidiscrete(data, memory=memory, **settings)
    return float(re.search("expected (.*) or more", str(error.value))[1])


@pytest.mark.parametrize("part", [None, 8])
def test_too_little_memory_is_refused_by_the_least_that_fits(part):
    least = refused(points(), 2e-6, part=part)
    assert refused(points(), 0.98 * least, part=part) == least
    assert len(Semidiscrete(points(), memory=least, part=part).draw(100)[1]) == 100
    with pytest.raises(BadInput, match="memory is 0"):
        Semidiscrete(points(), memory=0)


def test_less_memory_changes_nothing_but_how_much_is_computed_at_once():
    labels = torch.arange(300) % 2
    wide, narrow = (Semidiscrete(points(300), labels, part=80, seed=1, memory=memory)
                    for memory in (None, refused(points(300), 2e-6, groups=labels, part=80)))
    assert narrow.values < 16 * 75 < wide.values  # a step's noises come in several pieces
    for coupling in (wide, narrow):
        coupling.solve(0.3)
    torch.testing.assert_close(narrow.potentials, wide.potentials, rtol=0, atol=1e-3)
    (z, taken), (of_z, of_taken) = wide.draw(2000), narrow.draw(2000)
    assert torch.equal(z, of_z) and (taken == of_taken).double().mean() > 0.99


@pytest.mark.skipif(DEVICE.type == "cpu", reason="there the copies are in the device's memory")
def test_copies_that_do_not_fit_on_a_gpu_stay_on_the_cpu():
    scarce = Semidiscrete(points(600), part=8, seed=1, memory=refused(points(600), 2e-6, part=8))
    assert scarce.copies_on.type == "cpu"
    assert torch.equal(scarce.draw(100)[1], Semidiscrete(points(600), part=8, seed=1).draw(100)[1])


def test_what_cannot_be_coupled_is_refused():
    x = points(6)
    for settings in (dict(part=0), dict(part=2.5), dict(seed=-1), dict(memory=True), dict(memory="8")):
        with pytest.raises(BadInput, match=f"{next(iter(settings))} is"):
            Semidiscrete(x, **settings)
    coupling = Semidiscrete(x, torch.tensor([0, 0, 2, 2, 2, 2]))
    with pytest.raises(BadInput, match="no sample of the data has label 1"):
        coupling.draw(2, torch.tensor([0, 1]))
    with pytest.raises(BadInput, match="expected a tensor"):
        coupling.draw(2, torch.tensor([0.0, 3]))
    for error in (0, True, -0.1, math.nan, math.inf, "0.1", None):
        with pytest.raises(BadInput, match=f"error is {error!r}: expected a number above 0"):
            coupling.solve(error)
    for most in (0, True, 2.5, "many"):
        with pytest.raises(BadInput, match=f"most is {most!r}"):
            coupling.solve(0.1, most)


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_coupled_is_told_of_the_data_and_of_groups(kind):
    x = points(6)
    wrong = x.clone()
    wrong[4, 0] = math.nan
    for data, said in ((x[:0], "with a sample or more"), (x.long(), "floating"), ("x", "tensor"), (wrong, "NaN")):
        with pytest.raises(BadInput, match=f"the data .*{said}") as refused:
            kind(data)
        assert "batch" not in str(refused.value)
    for groups in (10, torch.zeros(5, dtype=torch.int64), torch.zeros(6), torch.tensor([0, 1, 2, 0, 1, -1])):
        with pytest.raises(BadInput, match=r"^groups.* label .*expected a tensor \(6,\) of whole numbers"):
            kind(x, groups)


def test_a_sample_that_is_not_finite_is_named():
    x = points(600)
    x[417, 3] = math.inf
    with pytest.raises(BadInput, match="sample 417 of the data"):
        Semidiscrete(x, part=50)


def test_arguments_that_it_does_not_take_are_told_of_its_name_with_the_nearest():
    with pytest.raises(TypeError, match=r"^Semidiscrete\(…\): .*'parts'.*nearest is part\)"):
        Semidiscrete(points(6), parts=3)
    with pytest.raises(TypeError, match=r"^Semidiscrete\(…\): "):
        Semidiscrete()
    with pytest.raises(TypeError, match=r"^Semidiscrete\(…\): "):
        Semidiscrete(points(6), None, 3)
