"""Adam in one pass over memory against torch's, with the same gradients."""

import copy

import pytest
import torch

pytest.importorskip("triton")
from dansm.scale.train.adam import BLOCK, OnePass, table_of
from dansm.scale.train.step import clip_factor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = [(3,), (1,), (BLOCK,), (BLOCK + 1,), (2 * BLOCK + 5,), (8, 4, 3, 3), (16, 6, 3, 3), (5, 7)]


def tensors(dtype=torch.float32):
    """A tensor of each shape, those of four dimensions with channels last."""
    made = [torch.randn(shape, device=DEVICE).to(dtype) for shape in SHAPES]
    return [x.to(memory_format=torch.channels_last) if x.ndim == 4 else x for x in made]


@pytest.mark.parametrize("dtypes", [[torch.bfloat16], [torch.float32], [torch.bfloat16, torch.float32]], ids=str)
@pytest.mark.parametrize("aligned", [True, False])
def test_steps_are_those_of_torch(dtypes, aligned):
    weights = [weight.requires_grad_() for weight in tensors()]
    expected = [weight.detach().clone().requires_grad_() for weight in weights]
    averages = [weight.detach().clone() for weight in weights]
    means = [average.clone() for average in averages]
    adam, plain = (torch.optim.Adam(of, lr=0.01) for of in (weights, expected))
    gradients = [gradient.to(dtypes[i % len(dtypes)]) for i, gradient in enumerate(tensors())]
    if not aligned:
        gradients[2] = torch.cat([gradients[2].new_zeros(1), gradients[2]])[1:]
    once = OnePass(adam, weights, gradients, averages)
    for share in (0.5, 0.25, 0.125):
        for gradient, weight, new in zip(gradients, expected, tensors(), strict=True):
            gradient.copy_(new)
            weight.grad = gradient.float() * 0.3
        once(torch.tensor(0.3, device=DEVICE), share)
        plain.step()
        torch._foreach_lerp_(means, [weight.detach() for weight in expected], share)
    once.settle()
    for ours, theirs in ((weights, expected), (averages, means)):
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    for one, other in zip(adam.state_dict()["state"].values(), plain.state_dict()["state"].values(), strict=True):
        for name in ("exp_avg", "exp_avg_sq", "step"):
            torch.testing.assert_close(one[name].cpu(), other[name].cpu(), rtol=1e-5, atol=1e-7)


def test_a_state_of_torch_is_gone_on_with():
    weights = [weight.requires_grad_() for weight in tensors()]
    adam = torch.optim.Adam(weights, lr=0.01)
    for weight, gradient in zip(weights, tensors(), strict=True):
        weight.grad = gradient
    adam.step()
    expected = copy.deepcopy(weights)
    plain = torch.optim.Adam(expected, lr=0.01)
    plain.load_state_dict(copy.deepcopy(adam.state_dict()))
    gradients = tensors()
    for weight, gradient in zip(expected, gradients, strict=True):
        weight.grad = gradient.clone()
    plain.step()
    OnePass(adam, weights, gradients, [weight.detach().clone() for weight in weights])(torch.ones((), device=DEVICE), 0)
    for one, other in zip(weights, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_what_lies_in_another_order_is_refused():
    weight, gradient = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match="same order"):
        table_of([(weight, gradient, weight, weight, weight)], torch.float32)


@pytest.mark.parametrize("clip", [0.1, 1e6])
def test_the_factor_is_that_of_torchs_clipping(clip):
    gradients = [gradient.bfloat16() if i % 2 else gradient for i, gradient in enumerate(tensors())]
    weights = [torch.zeros_like(gradient, dtype=torch.float32).requires_grad_() for gradient in gradients]
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.grad = gradient.float().clone()
    torch.nn.utils.clip_grad_norm_(weights, clip)
    factor = clip_factor(gradients, clip)
    assert (factor < 1) == (clip == 0.1)
    for weight, gradient in zip(weights, gradients, strict=True):
        torch.testing.assert_close(weight.grad, gradient.float() * factor, rtol=1e-5, atol=1e-7)
