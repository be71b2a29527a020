"""The exchange of gradients, with another process that has the same ones."""

from types import SimpleNamespace

import pytest
import torch

from dansm.scale.train import exchange


def double(gradients, async_op):
    gradients.mul_(2)
    return SimpleNamespace(wait=lambda: None)


@pytest.mark.parametrize("size", [1, 2**20])  # sent at once, or at the end
def test_an_error_ends_the_exchange_and_the_next_sends_its_own_gradients(monkeypatch, size):
    monkeypatch.setattr(exchange.group, "all_reduce", double)
    monkeypatch.setattr(exchange, "BYTES", size)
    a, b = (torch.ones(3, requires_grad=True) for _ in range(2))
    exchanged = exchange.Exchange([a, b])
    with pytest.raises(RuntimeError, match="memory"), exchanged.during():
        a.sum().backward()
        raise RuntimeError("out of memory")
    a.grad = None
    b.sum().backward()
    assert torch.equal(b.grad, torch.ones(3))
    b.grad = None
    with exchanged.during():
        b.sum().backward()
    assert torch.equal(b.grad, 2 * torch.ones(3)) and a.grad is None
    assert not exchanged.sent
