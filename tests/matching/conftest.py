"""Kernels of small blocks, so that few noises go through all that many go through on a GPU."""

import numpy as np
import pytest
import torch

# lists end again and again, lanes meet more than they remember
SHORT = dict(KEEP=(4, 8), MANY=30, LANES=16, FEW=16, SAMPLES=32)


@pytest.fixture
def short_lists(request, monkeypatch):
    if "own_sizes" not in request.keywords:
        from dansm.scale.matching import kernels
        from dansm.scale.matching.pool import FastPool

        for name, value in SHORT.items():
            monkeypatch.setattr(kernels, name, value)
        monkeypatch.setattr(FastPool, "served_at_once", SHORT["SAMPLES"])


@pytest.fixture(autouse=True)
def masks_of_the_interpreter(monkeypatch):
    """The one of Triton 3.2.0, that of torch 2.6, stores although a mask of one number is False, so the kernels find
    infinite costs in every batch. On a GPU kernels are tried before they are used."""
    release = tuple(map(int, pytest.importorskip("triton").__version__.split(".")[:2]))
    if release < (3, 6) and not torch.cuda.is_available():
        from dansm.scale.matching import group_kernels, kernels

        for pool in (kernels.KernelPool, group_kernels.KernelGroupedPool):
            monkeypatch.setattr(pool, "__init__", lambda *_, **__: pytest.skip("needs torch 2.10: masks in Triton 3.2"))


@pytest.fixture(autouse=True)
def bfloat16_products(monkeypatch):
    """Triton's interpreter (3.8.0) takes bfloat16 in a product for whole numbers of 16 bits."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    if torch.cuda.is_available():
        return
    product = interpreter.InterpreterBuilder.create_dot

    def widened(factor):
        if factor.dtype != interpreter.tl.bfloat16:
            return factor
        bits = factor.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), interpreter.tl.float32)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", lambda self, a, b, *rest: product(
        self, widened(a), widened(b), *rest))
