"""Clipping, Adam and the moving average in one pass over memory, in Triton: apart they read and write weights,
gradients and averages four times."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..base.launch import launch

BLOCK = 1024  # numbers of one program
POINTERS = 5  # weights, gradients, means, squares, averages


@triton.jit
def _numbers(table, tensor, column: tl.constexpr, dtype: tl.constexpr, POINTERS: tl.constexpr, ALIGNED: tl.constexpr):
    """Where the numbers of a tensor begin."""
    numbers = tl.load(table + tensor * POINTERS + column).to(tl.pointer_type(dtype))
    return tl.multiple_of(numbers, 16) if ALIGNED else numbers


@triton.jit
def _move(weights, gradients, means, squares, averages, at, here, factor, rate, root, new1, new2, eps, share):
    """Take a step of Adam for the numbers `at` of one tensor, (BLOCK,), and move the average after it.

    weights to averages  addresses of the tensors' first numbers
    here                 which of `at` exist, (BLOCK,)
    factor               multiplies gradients, to clip them
    rate, root           learning rate / (1 − β1ⁿ), and √(1 − β2ⁿ) in step n
    new1, new2           1 − β1 and 1 − β2
    share                of the way from average to weight
    """
    g = tl.load(gradients + at, mask=here, other=0.0).to(tl.float32) * factor
    mean = tl.load(means + at, mask=here, other=0.0)
    mean += new1 * (g - mean)
    square = tl.load(squares + at, mask=here, other=0.0)
    square += new2 * (g * g - square)
    weight = tl.load(weights + at, mask=here, other=0.0) - rate * mean / (tl.sqrt(square) / root + eps)
    average = tl.load(averages + at, mask=here, other=0.0)
    tl.store(means + at, mean, mask=here)
    tl.store(squares + at, square, mask=here)
    tl.store(weights + at, weight, mask=here)
    tl.store(averages + at, average + share * (weight - average), mask=here)


@triton.jit
def _adam(table, sizes, parts, factor, rate, root, new1, new2, eps, share, HALF: tl.constexpr, ALIGNED: tl.constexpr,
          POINTERS: tl.constexpr, BLOCK: tl.constexpr):
    """A step for BLOCK numbers of one tensor. table: (tensors, POINTERS) addresses; sizes: (tensors,); parts: of each
    program, its tensor and its first number, (programs, 2). factor: of the gradients, in memory. HALF:
    gradients are in bfloat16."""
    tensor = tl.load(parts + 2 * tl.program_id(0))
    start = tl.multiple_of(tl.load(parts + 2 * tl.program_id(0) + 1), BLOCK)
    size = tl.load(sizes + tensor)
    at = start + tl.arange(0, BLOCK)
    weights = _numbers(table, tensor, 0, tl.float32, POINTERS, ALIGNED)
    gradients = _numbers(table, tensor, 1, tl.bfloat16 if HALF else tl.float32, POINTERS, ALIGNED)
    means = _numbers(table, tensor, 2, tl.float32, POINTERS, ALIGNED)
    squares = _numbers(table, tensor, 3, tl.float32, POINTERS, ALIGNED)
    averages = _numbers(table, tensor, 4, tl.float32, POINTERS, ALIGNED)
    clipped = tl.load(factor)
    if start + BLOCK <= size:  # without a mask, so that four numbers are read at once
        _move(weights, gradients, means, squares, averages, at, at >= 0, clipped, rate, root, new1, new2, eps, share)
    else:
        _move(weights, gradients, means, squares, averages, at, at < size, clipped, rate, root, new1, new2, eps, share)


class OnePass:
    """Takes steps of `optimizer`, a torch.optim.Adam in float32, for `weights` by `gradients`, each in float32 or
    bfloat16, and moves `averages` after them. All must stay where they lie in memory, in the same order of dimensions.
    The optimizer's counts of steps are only set by `settle`."""

    def __init__(self, optimizer: torch.optim.Adam, weights: list[Tensor], gradients: list[Tensor],
                 averages: list[Tensor]):
        self.optimizer = optimizer
        states = [begun(optimizer, weight) for weight in weights]
        self.steps = int(states[0]["step"])
        tensors = [(weight, gradient, state["exp_avg"], state["exp_avg_sq"], average) for
                   weight, gradient, state, average in zip(weights, gradients, states, averages, strict=True)]
        self.kept = tensors  # so that their memory is not given away
        self.tables = [table_of([row for row in tensors if row[1].dtype == dtype], dtype)
                       for dtype in {gradient.dtype for gradient in gradients}]

    @torch.no_grad()
    def __call__(self, factor: Tensor, share: float) -> None:
        """Multiply gradients by `factor`, a number on the device, take a step, and move averages by `share` of the way
        to the weights."""
        self.steps += 1
        settings = self.optimizer.param_groups[0]
        beta1, beta2 = settings["betas"]
        rate = settings["lr"] / (1 - beta1**self.steps)
        root = (1 - beta2**self.steps) ** 0.5
        for table in self.tables:
            launch(_adam, (len(table.parts),), table.addresses, table.sizes, table.parts, factor, rate, root, 1 - beta1,
                   1 - beta2, settings["eps"], share, table.half, table.aligned, POINTERS, BLOCK, num_warps=4)

    def settle(self) -> None:
        """Write the count of steps into the optimizer's state."""
        for state in self.optimizer.state.values():
            state["step"].fill_(self.steps)


def begun(optimizer: torch.optim.Adam, weight: Tensor) -> dict:
    """The optimizer's state for a weight, as it is before the first step if there is none."""
    state = optimizer.state[weight]
    if not state:
        state["step"] = torch.zeros((), device=weight.device)
        state["exp_avg"] = torch.zeros_like(weight)
        state["exp_avg_sq"] = torch.zeros_like(weight)
    return state


class Table(NamedTuple):
    """What `_adam` reads about the tensors of a launch. It has a program for each row of `parts`."""

    addresses: Tensor  # (tensors, POINTERS) int64
    sizes: Tensor  # (tensors,) int32, numbers in each
    parts: Tensor  # (programs, 2) int32: tensor, first number
    half: bool  # gradients are in bfloat16
    aligned: bool  # all addresses are multiples of 16 bytes


def table_of(tensors: list[tuple[Tensor, ...]], dtype: torch.dtype) -> Table:
    """Make the table for rows of weight, gradient in `dtype`, mean, square and average. RuntimeError if the tensors of
    a row lie in memory in different orders."""
    device = tensors[0][0].device
    for weight, *others in tensors:
        for other in others:
            if order_of(other) != order_of(weight):
                raise RuntimeError(f"a weight of strides {weight.stride()} goes with numbers of strides "
                                   f"{other.stride()}: expected the same order in memory")
    addresses = torch.tensor([[tensor.data_ptr() for tensor in row] for row in tensors])
    sizes = torch.tensor([weight.numel() for weight, *_ in tensors], dtype=torch.int32)
    counts = -(-sizes // BLOCK)
    tensor = torch.arange(len(tensors)).repeat_interleave(counts)
    first = torch.arange(len(tensor)) - (counts.cumsum(0) - counts)[tensor]
    parts = torch.stack([tensor, BLOCK * first], 1).int()
    aligned = bool((addresses % 16 == 0).all())
    return Table(addresses.to(device), sizes.to(device), parts.to(device), dtype == torch.bfloat16, aligned)


def order_of(tensor: Tensor) -> list[tuple[int, int]]:
    """Sizes and strides of the dimensions that have any length."""
    return [(size, stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]
