"""The step of long runs against the plain one of dansm.Training."""

import copy
import itertools
import os

import pytest
import torch
from steps import (
    STEADY,
    SteadyFlow,
    batches,
    gradients_of_one,
    network,
    started,
    through_copies,
    weights_at_the_start,
)
from support import ROOT, TINY, needs_gloo, same

import dansm


def train(run, pairs, flow=None):
    """The losses of the steps that `run` makes with these pairs, from the same random numbers each time."""
    torch.manual_seed(1)
    return torch.stack(list(dansm.train(run, flow or dansm.RectifiedFlow(), pairs)))


def test_a_step_is_that_of_the_plain_loop_to_the_last_bit():
    net, pairs = network(**TINY), batches(4)
    plain, fast = dansm.Training(copy.deepcopy(net), 0.01, 0.99, 0.5), started(net, ema_decay=[0.99], clip=0.5)
    assert torch.equal(train(plain, pairs), train(fast, pairs))
    for part in ("net", "average", "optimizer"):
        assert same(getattr(plain, part).state_dict(), getattr(fast, part).state_dict())
    assert not same(net.state_dict(), fast.net.state_dict()) and fast.step == 4


def test_a_batch_in_parts_gives_the_step_of_the_whole_batch(monkeypatch):
    times = itertools.chain.from_iterable(itertools.repeat(torch.linspace(0.1, 0.9, 8)))
    monkeypatch.setattr(dansm, "draw_times", lambda count, *_: torch.stack(list(itertools.islice(times, count))))
    net, pairs = network(**STEADY), batches(3)
    whole, parts = started(net), started(net, accumulate=4)
    torch.testing.assert_close(train(whole, pairs), train(parts, pairs))
    for a, b in zip(whole.net.parameters(), parts.net.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)  # Adam divides small gradients by small ones


@pytest.mark.parametrize("settings", [{}, {"precision": "bf16"}, {"precision": "bf16", "accumulate": 2}], ids=str)
def test_compiling_ahead_asks_for_kernels_and_leaves_no_trace(settings, monkeypatch):
    """Forward and backward run on a batch of zeros, as a GPU does between the kernels that are only compiled."""
    net, pairs = network(**TINY, classes=3), with_labels(batches(3))
    run, plain = through_copies(net, **settings), through_copies(net, **settings)
    run.one_pass = plain.one_pass = False  # that is a kernel
    run.compiled, random, calls, backward = True, torch.get_rng_state(), [], run._backward
    monkeypatch.setattr(run, "_backward", lambda *given: calls.append(given) or backward(*given))
    run.compile_ahead()
    (_, x, _, labels), = calls
    assert x.shape == (8, 1, 8, 8) and labels.shape == (8,)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(weight.grad is None for weight in (*run.net.parameters(), *run.copies.values()))
    run.compiled = False
    assert torch.equal(train(run, pairs), train(plain, pairs)) and same(run.state_dict(), plain.state_dict())


def with_labels(pairs):
    return [(x, z, torch.randint(3, (8,))) for x, z in pairs]


def test_a_step_with_labels_is_that_of_the_plain_loop_to_the_last_bit():
    net, pairs = network(**TINY, classes=3, label_dropout=0.5), with_labels(batches(4))
    plain, fast = dansm.Training(copy.deepcopy(net), 0.01), started(net)
    assert torch.equal(train(plain, pairs), train(fast, pairs))
    assert same(plain.net.state_dict(), fast.net.state_dict())
    assert not torch.equal(fast.net.label.weight, net.label.weight)


def test_each_part_of_a_batch_has_its_own_labels(monkeypatch):
    times = itertools.chain.from_iterable(itertools.repeat(torch.linspace(0.1, 0.9, 8)))
    monkeypatch.setattr(dansm, "draw_times", lambda count, *_: torch.stack(list(itertools.islice(times, count))))
    net = network(**STEADY, classes=3, label_dropout=0.0)
    pairs = [(x, z, torch.tensor([0, 0, 1, 1, 2, 2, 0, 1])) for x, z in batches(3)]
    whole, parts = started(net), started(net, accumulate=4)
    torch.testing.assert_close(train(whole, pairs), train(parts, pairs))
    for a, b in zip(whole.net.parameters(), parts.net.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


def test_the_learning_rate_rises_from_the_first_step():
    run, rates = started(network(**STEADY), warmup=4), []
    for _ in dansm.train(run, dansm.RectifiedFlow(), batches(6)):
        rates.append(run.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01], rel=1e-12)


def test_each_average_follows_its_own_decay():
    decays = (0.9999, 0.3, 0.0)
    run = started(network(**STEADY), ema_decay=decays)
    expected = [[weight.detach().double().clone() for weight in run.net.parameters()] for _ in decays]
    for n, _ in enumerate(dansm.train(run, dansm.RectifiedFlow(), batches(6)), 1):
        for decay, average in zip(decays, expected, strict=True):
            kept = min(decay, (1 + n) / (10 + n))
            for mean, weight in zip(average, run.net.parameters(), strict=True):
                mean.mul_(kept).add_(weight.detach().double(), alpha=1 - kept)
    assert run.average is run.averages[0]
    for means, average in zip(expected, run.averages, strict=True):
        for mean, weight in zip(means, average.parameters(), strict=True):
            torch.testing.assert_close(mean.float(), weight)
    assert same(run.averages[2].state_dict(), run.net.state_dict())


def test_a_state_gives_back_every_part():
    settings = dict(ema_decay=[0.9, 0.3], warmup=3)
    run, other = (started(network(**STEADY), **settings) for _ in range(2))
    train(run, batches(5))
    other.load_state_dict(copy.deepcopy(run.state_dict()))
    assert same(run.state_dict(), other.state_dict())
    pairs = batches(2)
    assert torch.equal(train(run, pairs), train(other, pairs)) and same(run.state_dict(), other.state_dict())


@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_gradient_is_clipped_over_all_parts_of_a_batch(accumulate):
    class Steep(dansm.RectifiedFlow):
        def loss(self, *arguments):
            return 1e4 * super().loss(*arguments)

    run = started(network(**STEADY), clip=0.25, accumulate=accumulate)
    train(run, batches(1), Steep())
    norm = torch.cat([weight.grad.flatten() for weight in run.net.parameters()]).norm().item()
    assert norm == pytest.approx(0.25, rel=1e-4)


def test_bf16_trains_weights_of_float32():
    net, pairs = network(**STEADY), batches(1) * 40
    half, full = started(net, precision="bf16"), started(net, precision="fp32")
    losses, exact = train(half, pairs), train(full, pairs)
    assert all(weight.dtype == torch.float32 for weight in half.net.parameters())
    assert not torch.equal(losses, exact) and losses[0].item() == pytest.approx(exact[0].item(), rel=0.05)
    assert losses[-10:].mean() < 0.9 * losses[:3].mean()


@pytest.mark.parametrize("classes", [0, 3])
def test_a_step_through_copies_of_the_weights_is_autocasts_to_the_bit(classes):
    """A GPU takes it: all weights to bf16 at once, and all gradients back."""
    net, pairs = attentive(classes)
    through, plain = (begin(net, precision="bf16", batch=4) for begin in (through_copies, started))
    through.one_pass = False
    assert len(through.copies) > 20 and not plain.copies
    assert torch.equal(train(through, pairs), train(plain, pairs))
    assert same(through.state_dict(), plain.state_dict())


def attentive(classes):
    """A network with every kind of layer, and pairs for four steps."""
    net = dansm.UNet(2, 8, width=8, multipliers=(1, 2), blocks=1, attention_at=(4,), classes=classes)
    pairs = [tuple(pair) for pair in torch.randn(4, 2, 4, 2, 8, 8)]
    return net, [(x, z, torch.tensor([2, 0, 1, 2])) for x, z in pairs] if classes else pairs


def test_parts_of_a_batch_through_copies_are_summed_in_float32():
    net, pairs = attentive(0)
    whole, parts = (through_copies(net, precision="bf16", batch=4, accumulate=count) for count in (1, 2))
    whole.one_pass = False
    gradients = []
    for run, batch in (whole, pairs[0]), (parts, pairs[0]):
        torch.manual_seed(1)
        run._backward(SteadyFlow(), *batch, None)
        assert all(weight.grad.dtype == torch.float32 for weight in run.net.parameters())
        gradients.append([weight.grad for weight in run.net.parameters()])
    for one, both in zip(*gradients, strict=True):
        assert (one - both).norm() <= 2**-5 * one.norm() + 1e-6


@pytest.mark.parametrize(("begin", "settings", "one_pass"), [
    (through_copies, dict(precision="bf16"), True),
    (through_copies, dict(precision="bf16", accumulate=2), False),  # parts are summed in float32
    (through_copies, dict(precision="fp32"), False),
    (started, dict(precision="bf16"), False),
])
def test_a_step_in_one_pass_needs_bf16_copies_and_whole_batches(begin, settings, one_pass):
    assert begin(network(**STEADY), **settings).one_pass == one_pass


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter takes networks on the CPU")
@pytest.mark.parametrize("clip", [1.0, 1e-3])
@pytest.mark.parametrize("classes", [0, 3])
def test_one_pass_over_memory_takes_the_steps_of_torch(classes, clip):
    pytest.importorskip("triton")
    net, pairs = attentive(classes)
    settings = dict(precision="bf16", batch=4, clip=clip, ema_decay=[0.9, 0.3], warmup=3)
    once, plain = through_copies(net, **settings), through_copies(net, **settings)
    plain.one_pass = False
    losses = [train(run, pairs[:3]) for run in (once, plain)]
    torch.testing.assert_close(*losses, rtol=1e-2, atol=0)
    for run in (once, plain):
        state = copy.deepcopy(run.state_dict())
        train(run, pairs[:1])
        run.load_state_dict(state)
    losses = [train(run, pairs[3:]) for run in (once, plain)]
    torch.testing.assert_close(*losses, rtol=1e-2, atol=0)
    states = [run.state_dict() for run in (once, plain)]
    assert states[0]["optimizer"]["state"][0]["step"] == states[1]["optimizer"]["state"][0]["step"] == 4
    for one, other in zip(*([run.net, *run.averages] for run in (once, plain)), strict=True):
        one, other = moved(one, net), moved(other, net)
        assert 0 < (one - other).norm() <= 0.02 * other.norm()


@pytest.mark.parametrize("once", [False, True])
def test_a_state_saved_with_channels_last_or_not_is_resumed_either_way(once):
    """A GPU has channels last, a CPU does not."""
    if once:
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            pytest.skip("on the CPU it runs in Triton's interpreter, which is off where there is a GPU")
    net, pairs = attentive(0)
    last = copy.deepcopy(net).to(memory_format=torch.channels_last)
    run, other = (through_copies(weights, precision="bf16", batch=4) for weights in (net, last))
    run.one_pass = other.one_pass = once
    train(run, pairs[:2])
    other.load_state_dict(copy.deepcopy(run.state_dict()))
    assert same(other.state_dict(), run.state_dict())
    for weight, moments in other.optimizer.state.items():
        assert weight.stride() == moments["exp_avg"].stride() == moments["exp_avg_sq"].stride()
    losses = [train(resumed, pairs[2:]) for resumed in (run, other)]
    torch.testing.assert_close(*losses, rtol=1e-2, atol=0)


def moved(net, before):
    """How far the weights have come, all of them."""
    return torch.cat([(weight - first).detach().flatten() for weight, first in
                      zip(net.parameters(), before.parameters(), strict=True)])


# ------------------------------------------------------------------------------- several processes


@needs_gloo
@pytest.mark.slow
def test_two_processes_begin_with_the_weights_of_the_first(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
    torch.multiprocessing.spawn(weights_at_the_start, (tmp_path,), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert not same(first[0], second[0])
    assert all(same(first[0], weights) for weights in (*first[1:], *second[1:]))


@needs_gloo
@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_processes_have_the_mean_of_their_gradients(tmp_path, monkeypatch, precision, accumulate):
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
    settings = dict(precision=precision, accumulate=accumulate)
    torch.multiprocessing.spawn(gradients_of_one, (tmp_path, "meeting", settings), nprocs=2)
    one, other = (torch.load(tmp_path / f"meeting-{rank}.pt") for rank in range(2))
    assert same(one[1:], other[1:]) and not torch.equal(one[0], other[0])
    alone = gradients_of_one(None, tmp_path, "alone", settings)
    torch.testing.assert_close((one[0] + other[0]) / 2, alone[0], rtol=1e-2 if precision == "bf16" else 1e-5, atol=0)
    error = 2**-6 if precision == "bf16" else 1e-5  # a few roundings to eight bits
    for actual, exact in zip(one[1:], alone[1:], strict=True):
        assert exact.norm() > 0 and (actual - exact).norm() <= error * exact.norm()
