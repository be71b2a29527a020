"""Flows: against networks that know the answer, because the data is one point or a Gaussian."""

import math
from functools import cache
from itertools import pairwise

import pytest
import torch
from scipy.integrate import solve_ivp
from torch import nn

from dansm import BadInput, Diffusion, RectifiedFlow, UNet, draw_times

POINT = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)


def noise(count=20):
    return torch.randn(count, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def velocity_to_the_point(x, time):
    """Data all at one point c: the path through x_t ends there, so its velocity is (c − x_t) / (1 − t)."""
    t = (time / 999)[:, None].double()
    return (POINT - x) / (1 - t).clamp_min(1e-9)


@cache
def alphas():
    product, products = 1.0, []
    for level in range(1000):
        product *= 1 - (1e-4 + (0.02 - 1e-4) * level / 999)
        products.append(product)
    return torch.tensor(products, dtype=torch.float64)


def noise_around_the_point(x, level):
    a = alphas()[level.long()][:, None]
    return (x - a.sqrt() * POINT) / (1 - a).sqrt()


def diffusion_velocity_to_the_point(x, level):
    a = alphas()[level.long()][:, None]
    return a.sqrt() * noise_around_the_point(x, level) - (1 - a).sqrt() * POINT


# ------------------------------------------------------------------------------- one point


@pytest.mark.parametrize("steps", [1, 3, 10, 64])
def test_euler_reaches_the_point_but_for_the_paper_shift_of_time(steps):
    """The shift by 1e-3 makes the last step go 1/0.999 of the way: 1/999 of what is left too far."""
    x = RectifiedFlow().sample(velocity_to_the_point, noise(), steps)
    left = noise() - POINT
    for i in range(steps):
        left = left * (1 - 1 / steps / (0.999 * (1 - i / steps)))
    torch.testing.assert_close(x - POINT, left, rtol=1e-3, atol=1e-6)
    assert (x - POINT).abs().max() < 2e-3 * (noise() - POINT).abs().max()


@pytest.mark.parametrize("steps", [2, 3, 7, 10, 300, 600, 999, 1000])
def test_ddim_reaches_the_point(steps):
    """Whatever the levels: an exact noise gives the exact data back, and the last step goes to no noise at all."""
    for target, net in (("noise", noise_around_the_point), ("velocity", diffusion_velocity_to_the_point)):
        x = Diffusion(target=target).sample(net, noise(), steps)
        torch.testing.assert_close(x, POINT.expand_as(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("steps", [2, 10, 50])
def test_a_bound_changes_nothing_where_the_guess_is_within(steps):
    free, bound = (Diffusion(bound=b).sample(noise_around_the_point, noise(), steps) for b in (None, 2.0))
    torch.testing.assert_close(bound, free, rtol=1e-9, atol=1e-9)


def test_a_guess_beyond_the_bound_is_cut_and_its_noise_goes_with_it():
    """One step by hand, from level 500 to 0: x̂ = 1 in place of what the network says, and the noise that x then has."""
    z, a, last = torch.full((1, 1), 3.0, dtype=torch.float64), alphas()[500], alphas()[0]
    states = list(Diffusion(bound=1.0).path(lambda x, t: torch.full_like(x, -0.5), z, 2))
    assert (3 + 0.5 * (1 - a).sqrt()) / a.sqrt() > 1
    by_hand = last.sqrt() * 1 + (1 - last).sqrt() * (3 - a.sqrt()) / (1 - a).sqrt()
    assert states[1].item() == pytest.approx(by_hand.item(), rel=1e-9)


def test_a_perfect_network_has_no_loss():
    x, z = POINT.expand(500, 3), noise(500)
    for times in ("uniform", "logit-normal"):
        assert RectifiedFlow(times).loss(velocity_to_the_point, x, z) < 1e-8  # times are float32
        assert Diffusion(times).loss(noise_around_the_point, x, z) < 1e-20
        assert Diffusion(times, "velocity").loss(diffusion_velocity_to_the_point, x, z) < 1e-20


def test_the_loss_of_a_network_that_says_nothing_is_the_mean_square_of_its_target():
    x, z = torch.randn(50, 2, 3, 3), torch.randn(50, 2, 3, 3)
    silent = lambda x, t: torch.zeros_like(x)  # noqa: E731
    assert RectifiedFlow().loss(silent, x, z).item() == pytest.approx(((x - z) ** 2).mean().item(), rel=1e-5)
    assert Diffusion().loss(silent, x, z).item() == pytest.approx((z**2).mean().item(), rel=1e-5)


class Watched(nn.Module):
    """Keeps what it was called with."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x, t):
        self.seen.append((x, t))
        return torch.zeros_like(x)


def test_the_rectified_network_sees_the_mix_and_999_times_the_time():
    net, x, z = Watched(), torch.randn(5, 2, 3), torch.randn(5, 2, 3)
    t = torch.tensor([0, 0.25, 0.5, 0.75, 1])
    RectifiedFlow().loss(net, x, z, t)
    (x_t, times), *_ = net.seen
    shifted = [1e-3 + 0.999 * u for u in t.tolist()]
    torch.testing.assert_close(times, torch.tensor([999 * u for u in shifted]))
    for i, u in enumerate(shifted):
        torch.testing.assert_close(x_t[i], u * x[i] + (1 - u) * z[i])


def test_the_diffusion_network_sees_the_mix_and_the_level_counted_from_the_data():
    net, x, z = Watched(), torch.randn(5, 2, 3, dtype=torch.float64), torch.randn(5, 2, 3, dtype=torch.float64)
    Diffusion().loss(net, x, z, torch.tensor([0, 0.2505, 0.5, 0.9985, 1]))
    (x_t, levels), *_ = net.seen
    assert levels.tolist() == [999, 749, 500, 1, 0]
    for i, level in enumerate(levels.long().tolist()):
        a = alphas()[level].item()
        torch.testing.assert_close(x_t[i], math.sqrt(a) * x[i] + math.sqrt(1 - a) * z[i])


def test_the_paper_schedule_of_noise():
    torch.testing.assert_close(Diffusion().alpha_bar, alphas(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("flow", [RectifiedFlow(), Diffusion()])
def test_training_draws_times_over_the_whole_range(flow):
    net, x = Watched(), torch.zeros(20_000, 1)
    flow.loss(net, x, x)
    times = net.seen[0][1]
    counts = torch.histc(times, 10, 0, 999)
    assert counts.sum() == 20_000
    assert (counts - 2000).abs().max() < 5 * math.sqrt(1800)  # ten equal bins, each within five standard deviations
    assert len(times.unique()) > 990


# ------------------------------------------------------------------------------- Gaussian data

MEAN, SPREAD = 0.7, 0.4


def velocity_of_gaussian_data(x, time):
    """E[x − z | x_t] for x ~ N(m, s²), z ~ N(0, 1): linear in x_t."""
    t = (time.double() / 999).view(-1, *[1] * (x.ndim - 1))
    variance = t**2 * SPREAD**2 + (1 - t) ** 2
    return MEAN + (t * SPREAD**2 - (1 - t)) / variance * (x - t * MEAN)


def errors(solver, steps_of):
    """Against the same equation solved by another's solver to twelve digits."""
    z = torch.tensor([[-1.5], [0.3], [1.0]], dtype=torch.float64)

    def slope(s, state):
        t = torch.full((3,), 999 * (1e-3 + 0.999 * s), dtype=torch.float64)
        return velocity_of_gaussian_data(torch.from_numpy(state)[:, None], t)[:, 0].numpy()

    exact = torch.from_numpy(solve_ivp(slope, (0, 1), z[:, 0].numpy(), rtol=1e-12, atol=1e-12).y[:, -1])[:, None]
    flow = RectifiedFlow(solver=solver)
    return [(flow.sample(velocity_of_gaussian_data, z, steps) - exact).abs().max().item() for steps in steps_of]


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_a_solver_of_order_p_errs_2_to_the_p_times_less_with_twice_the_steps(solver, order):
    error = errors(solver, [20, 40, 80, 160])
    for coarse, fine in pairwise(error):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.2)


def test_heun_of_ten_steps_beats_euler_of_twenty():
    assert errors("heun", [10])[0] < errors("euler", [20])[0]


def test_gaussian_data_comes_out_of_gaussian_noise():
    z = torch.randn(20_000, 1, dtype=torch.float64)
    x = RectifiedFlow(solver="heun").sample(velocity_of_gaussian_data, z, 40)
    assert x.mean().item() == pytest.approx(MEAN + SPREAD * z.mean().item(), abs=5e-3)
    assert x.std().item() == pytest.approx(SPREAD * z.std().item(), abs=5e-3)


def noise_of_gaussian_data(x, level):
    a = alphas()[level.long()].view(-1, 1)
    return (1 - a).sqrt() / (a * SPREAD**2 + 1 - a) * (x - a.sqrt() * MEAN)


def ddim_error(steps):
    """Of the mean and the spread, from the quantiles of the noise: no sampling error."""
    z = torch.special.ndtri(torch.arange(0.5, 200, dtype=torch.float64) / 200)[:, None]
    x = Diffusion().sample(noise_of_gaussian_data, z, steps)
    return abs(x.mean().item() - MEAN) + abs(x.std().item() - SPREAD * z.std().item())


def test_ddim_brings_gaussian_data_out_of_gaussian_noise():
    assert ddim_error(250) < 0.01
    assert ddim_error(250) < ddim_error(50) < ddim_error(10)


def blind_to_size(said):
    """As of a network that ends in a norm: it answers as if its input had the size that is usual at the level."""
    def net(x, level):
        a = alphas()[level.long()].view(-1, 1)
        usual = (a * SPREAD**2 + 1 - a).sqrt()
        return said(x * usual / x.square().mean(1, keepdim=True).sqrt(), a)
    return net


def noise_of_data_around_zero(x, a):
    return (1 - a).sqrt() / (a * SPREAD**2 + 1 - a) * x


def velocity_of_data_around_zero(x, a):
    return (noise_of_data_around_zero(x, a) - (1 - a).sqrt() * x) / a.sqrt()


@pytest.mark.parametrize("size", [0.98, 1.02])
def test_a_network_blind_to_size_draws_noise_from_a_large_noise_unless_it_says_velocities(size):
    """Off by a fiftieth where √ᾱ is 0.01, as noises of 3×32×32 may be: that becomes data."""
    z = torch.randn(4, 3072, dtype=torch.float64)
    z *= size / z.square().mean(1, keepdim=True).sqrt()
    drawn = {target: Diffusion(target=target).sample(blind_to_size(said), z, 50) for target, said in
             (("noise", noise_of_data_around_zero), ("velocity", velocity_of_data_around_zero))}
    off = {target: abs(x.std().item() / SPREAD - 1) for target, x in drawn.items()}
    assert off["noise"] > 0.5
    assert off["velocity"] < 0.15


@pytest.mark.parametrize("steps", [501, 600])
def test_more_steps_of_ddim_are_no_worse_than_250(steps):
    assert ddim_error(steps) < ddim_error(250)


@pytest.mark.parametrize("steps", [1, 1.0])
def test_one_step_of_ddim_is_refused(steps):
    """Its only level would be 0, where the network holds its input for data."""
    net = Watched()
    with pytest.raises(BadInput, match=r"steps is 1.*at least 2"):
        Diffusion().sample(net, torch.randn(1, 1), steps)
    assert net.seen == []


# ------------------------------------------------------------------------------- any network


FLOWS = [(RectifiedFlow(), 1), (RectifiedFlow(solver="heun"), 2), (Diffusion(), 1), (Diffusion(target="velocity"), 1)]


def fewest(flow):
    return 2 if isinstance(flow, Diffusion) else 1


@pytest.mark.parametrize(("flow", "evaluations", "steps"), [(*f, s) for f in FLOWS for s in (fewest(f[0]), 3, 7, 10)])
def test_sampling_asks_the_network_once_a_step_and_heun_twice(flow, evaluations, steps):
    net = Watched()
    flow.sample(net, torch.randn(2, 3), steps)
    assert len(net.seen) == steps * evaluations
    assert all(t.shape == (2,) and t.min() >= 0 and t.max() <= 999.001 for _, t in net.seen)


@pytest.mark.parametrize("steps", [2, 3, 7, 10, 250, 300, 499, 501, 999, 1000])
def test_ddim_asks_exactly_steps_times_at_even_falling_levels(steps):
    net = Watched()
    Diffusion().sample(net, torch.randn(1, 1), steps)
    levels = [t.item() for _, t in net.seen]
    assert levels == [i * 1000 // steps for i in range(steps - 1, -1, -1)]
    assert len(set(levels)) == steps


def test_euler_asks_at_the_times_of_the_paper():
    net = Watched()
    RectifiedFlow().sample(net, torch.randn(1, 1), 4)
    assert [t.item() for _, t in net.seen] == pytest.approx([999 * (i / 4 * 0.999 + 1e-3) for i in range(4)])


@pytest.mark.parametrize(("flow", "steps"), [(flow, s) for flow, _ in FLOWS for s in (fewest(flow), 4, 7)])
def test_a_path_is_steps_and_one_states_from_the_noise_to_the_sample(flow, steps):
    net = lambda x, t: torch.tanh(x) * (t / 999)[:, None]  # noqa: E731
    z = torch.randn(5, 3)
    before = z.clone()
    states = list(flow.path(net, z, steps))
    assert len(states) == steps + 1
    assert torch.equal(states[0], before) and torch.equal(z, before)
    assert torch.equal(states[-1], flow.sample(net, z, steps))
    assert all(state.shape == z.shape for state in states)


@pytest.mark.parametrize(("flow", "_"), FLOWS)
def test_sampling_gives_no_gradient_and_leaves_gradients_on(flow, _):
    net = UNet(1, 8, 8, (1, 2), 1, (), 0.0)
    z = torch.randn(2, 1, 8, 8, requires_grad=True)
    x = flow.sample(net, z, 2)
    assert not x.requires_grad and x.grad_fn is None
    assert torch.is_grad_enabled()
    assert flow.loss(net, z.detach(), z.detach()).requires_grad


@pytest.mark.parametrize(("flow", "_"), FLOWS)
@pytest.mark.parametrize("steps", [0, -1, 2.5, math.nan])
def test_steps_that_are_no_count_are_refused(flow, _, steps):
    with pytest.raises(BadInput, match="steps"):
        flow.sample(Watched(), torch.randn(1, 1), steps)


@pytest.mark.parametrize(("flow", "_"), FLOWS)
def test_4_dot_0_steps_are_4(flow, _):
    assert len(list(flow.path(Watched(), torch.randn(1, 1), 4.0))) == 5


def test_more_steps_than_levels_are_refused_in_a_diffusion_only():
    with pytest.raises(BadInput, match=r"1001.*1000"):
        Diffusion().sample(Watched(), torch.randn(1, 1), 1001)
    assert RectifiedFlow().sample(Watched(), torch.randn(1, 1), 1001).shape == (1, 1)


def test_times_and_solvers_of_other_names_are_refused():
    for wrong in (lambda: RectifiedFlow("cosine"), lambda: RectifiedFlow(solver="rk4"), lambda: Diffusion("cosine"),
                  lambda: Diffusion(target="data")):
        with pytest.raises(BadInput, match="expected one of"):
            wrong()


def test_logit_normal_times_are_the_sigmoid_of_a_normal():
    """P(t < q) = Φ(log(q / (1 − q))), within five standard errors at nine quantiles."""
    t = draw_times(50_000, "logit-normal")
    assert t.min() > 0 and t.max() < 1
    for q in torch.arange(0.1, 1, 0.1).tolist():
        p = 0.5 * (1 + math.erf(math.log(q / (1 - q)) / math.sqrt(2)))
        assert (t < q).double().mean().item() == pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) / 50_000))


def test_uniform_times_are_uniform():
    t = draw_times(50_000, "uniform")
    for q in torch.arange(0.1, 1, 0.1).tolist():
        assert (t < q).double().mean().item() == pytest.approx(q, abs=5 * math.sqrt(q * (1 - q) / 50_000))


def test_a_bfloat16_batch_does_not_round_the_levels():
    net, x = Watched(), torch.zeros(1000, 1, dtype=torch.bfloat16)
    Diffusion().loss(net, x, x, 1 - (torch.arange(1000) + 0.5) / 1000)
    assert net.seen[0][1].tolist() == list(range(1000))


def test_a_bfloat16_batch_has_its_noise_at_the_levels_next_to_the_data():
    """ᾱ itself rounds to 1 at the first ten of them."""
    net, x = Watched(), torch.zeros(20, 1, dtype=torch.bfloat16)
    Diffusion().loss(net, x, torch.ones_like(x), 1 - (torch.arange(20) + 0.5) / 1000)
    wanted = (1 - Diffusion().alpha_bar[:20]).sqrt()
    assert torch.allclose(net.seen[0][0].flatten().double(), wanted, rtol=2**-8, atol=0)
