"""Norm, SiLU and dropout in one pass over memory, in Triton: what a UNet's step on a GPU mostly waits for.

Written plainly, the numbers of an image go to memory and back for the time's shift, the group norm (twice), SiLU and
dropout, and in float32 under autocast. Here one program reads some channels of one image once, keeps them in
registers, and writes the result once; backward it reads the input and the gradient and writes one gradient. Nothing
is saved for the backward pass but the input and two numbers a group: the mask of the dropout is drawn again.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

import dansm

TILE = 2**15  # numbers of one program: those of 32 channels at 32×32, which fit into its registers


# ---------------------------------------------------------------------------------------------------
# The kernels
# ---------------------------------------------------------------------------------------------------


@triton.jit
def _hash(word):
    word = (word ^ (word >> 16)) * 0x7FEB352D
    word = (word ^ (word >> 15)) * 0x846CA68B
    return word ^ (word >> 16)


@triton.jit
def _kept(seeds, at, DROP: tl.constexpr):
    """What dropout multiplies number `at` of the tensor with: 0, or more than 1. DROP: its share of 0s, in 1 / 2**24."""
    first, second = tl.load(seeds).to(tl.uint32), tl.load(seeds + 1).to(tl.uint32)
    word = _hash(_hash(at.to(tl.uint32) + first) ^ second)
    return tl.where((word >> 8) >= DROP, 2**24 / (2**24 - DROP), 0.0)


@triton.jit
def _of_group(sums, column, GROUP: tl.constexpr):
    """For each column the sum over the columns of its group."""
    same = (column // GROUP)[:, None] == (column // GROUP)[None, :]
    return tl.sum(tl.where(same, sums[None, :], 0.0), 1)


@triton.jit
def _tile(start, channel, there, PIXELS: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr):
    """Where the numbers of these channels lie from pixel `start` of an image on, and which of them there are."""
    row = start + tl.arange(0, ROWS)
    return row[:, None] * CHANNELS + channel[None, :], (row < PIXELS)[:, None] & there[None, :]


@triton.jit
def _forward(y, means, scales, x, shift, weight, bias, seeds, eps, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
             GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, USED: tl.constexpr, SHIFT: tl.constexpr,
             SILU: tl.constexpr, DROP: tl.constexpr):
    """One image, USED of its channels, which are whole groups. x, y: (N, PIXELS, CHANNELS); shift, means, scales:
    (N, CHANNELS). Where an image has more pixels than ROWS it is read three times, the last two from the cache."""
    image = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    channel = tl.program_id(1) * USED + column
    there = (column < USED) & (channel < CHANNELS)
    x += image * PIXELS * CHANNELS
    moved = tl.zeros([COLUMNS], tl.float32)
    if SHIFT:
        moved = tl.load(shift + image * CHANNELS + channel, mask=there, other=0.0).to(tl.float32)
    WHOLE: tl.constexpr = ROWS >= PIXELS
    if WHOLE:
        at, here = _tile(0, channel, there, PIXELS, CHANNELS, ROWS)
        v = tl.load(x + at, mask=here, other=0.0).to(tl.float32)
    total = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, PIXELS, ROWS):
        if not WHOLE:
            at, here = _tile(start, channel, there, PIXELS, CHANNELS, ROWS)
            v = tl.load(x + at, mask=here, other=0.0).to(tl.float32)
        total += tl.sum(v, 0)
    mean = _of_group(total + PIXELS * moved, column, GROUP) / (PIXELS * GROUP) - moved
    total = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, PIXELS, ROWS):
        if not WHOLE:
            at, here = _tile(start, channel, there, PIXELS, CHANNELS, ROWS)
            v = tl.load(x + at, mask=here, other=0.0).to(tl.float32)
        d = tl.where(here, v - mean[None, :], 0.0)
        total += tl.sum(d * d, 0)
    scale = 1 / tl.sqrt(_of_group(total, column, GROUP) / (PIXELS * GROUP) + eps)
    w, b = tl.load(weight + channel, mask=there, other=0.0), tl.load(bias + channel, mask=there, other=0.0)
    for start in range(0, PIXELS, ROWS):
        if not WHOLE:
            at, here = _tile(start, channel, there, PIXELS, CHANNELS, ROWS)
            v = tl.load(x + at, mask=here, other=0.0).to(tl.float32)
        u = (v - mean[None, :]) * (scale * w)[None, :] + b[None, :]
        if SILU:
            u = u * tl.sigmoid(u)
        if DROP > 0:
            u = u * _kept(seeds, image * PIXELS * CHANNELS + at, DROP)
        tl.store(y + image * PIXELS * CHANNELS + at, u.to(y.dtype.element_ty), mask=here)
    tl.store(means + image * CHANNELS + channel, mean, mask=there)
    tl.store(scales + image * CHANNELS + channel, scale, mask=there)


@triton.jit
def _gradient(dy, x, mean, scale, w, b, seeds, at, here, SILU: tl.constexpr, DROP: tl.constexpr):
    """The normalised numbers, and the gradient of what weight and bias made of them."""
    h = tl.load(x + at, mask=here, other=0.0).to(tl.float32)
    h = tl.where(here, (h - mean[None, :]) * scale[None, :], 0.0)
    g = tl.load(dy + at, mask=here, other=0.0).to(tl.float32)
    if DROP > 0:
        g = g * _kept(seeds, at, DROP)
    if SILU:
        u = h * w[None, :] + b[None, :]
        s = tl.sigmoid(u)
        g = g * s * (1 + u * (1 - s))
    return h, g


@triton.jit
def _backward(dx, dshift, dweight, dbias, dy, x, means, scales, weight, bias, seeds, PIXELS: tl.constexpr,
              CHANNELS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
              USED: tl.constexpr, SHIFT: tl.constexpr, SILU: tl.constexpr, DROP: tl.constexpr):
    """As `_forward`. dshift, dweight, dbias: (N, CHANNELS), the last two still to be summed over the images."""
    image = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    channel = tl.program_id(1) * USED + column
    there = (column < USED) & (channel < CHANNELS)
    first = image * PIXELS * CHANNELS
    w, b = tl.load(weight + channel, mask=there, other=0.0), tl.load(bias + channel, mask=there, other=0.0)
    mean = tl.load(means + image * CHANNELS + channel, mask=there, other=0.0)
    scale = tl.load(scales + image * CHANNELS + channel, mask=there, other=0.0)
    WHOLE: tl.constexpr = ROWS >= PIXELS
    if WHOLE:
        at, here = _tile(0, channel, there, PIXELS, CHANNELS, ROWS)
        h, g = _gradient(dy, x, mean, scale, w, b, seeds, first + at, here, SILU, DROP)
    dw, db = tl.zeros([COLUMNS], tl.float32), tl.zeros([COLUMNS], tl.float32)
    for start in range(0, PIXELS, ROWS):
        if not WHOLE:
            at, here = _tile(start, channel, there, PIXELS, CHANNELS, ROWS)
            h, g = _gradient(dy, x, mean, scale, w, b, seeds, first + at, here, SILU, DROP)
        dw += tl.sum(g * h, 0)
        db += tl.sum(g, 0)
    tl.store(dweight + image * CHANNELS + channel, dw, mask=there)
    tl.store(dbias + image * CHANNELS + channel, db, mask=there)
    # Every number of a group moves its mean and variance: what that takes off the gradient.
    along = _of_group(dw * w, column, GROUP) / (PIXELS * GROUP)
    level = _of_group(db * w, column, GROUP) / (PIXELS * GROUP)
    moved = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, PIXELS, ROWS):
        if not WHOLE:
            at, here = _tile(start, channel, there, PIXELS, CHANNELS, ROWS)
            h, g = _gradient(dy, x, mean, scale, w, b, seeds, first + at, here, SILU, DROP)
        d = (g * w[None, :] - level[None, :] - h * along[None, :]) * scale[None, :]
        moved += tl.sum(tl.where(here, d, 0.0), 0)
        tl.store(dx + first + at, d.to(dx.dtype.element_ty), mask=here)
    if SHIFT:
        tl.store(dshift + image * CHANNELS + channel, moved, mask=there)


@triton.jit(do_not_specialize=["size"])
def _add(y, a, b, scale, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = at < size
    total = tl.load(a + at, mask=here, other=0.0).to(tl.float32) + tl.load(b + at, mask=here, other=0.0).to(tl.float32)
    tl.store(y + at, (total * scale).to(y.dtype.element_ty), mask=here)


# ---------------------------------------------------------------------------------------------------
# As torch sees them
# ---------------------------------------------------------------------------------------------------


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _blocks(channels: int, pixels: int, group: int) -> tuple[int, int, int]:
    """(rows, columns of a program's tile, how many of the columns are used: whole groups)."""
    rows = min(triton.next_power_of_2(pixels), 1024)
    columns = max(triton.next_power_of_2(group), min(64, TILE // rows, triton.next_power_of_2(channels)))
    return min(rows, max(16, TILE // columns)), columns, columns // group * group


class _Norm(torch.autograd.Function):
    """x: (N, C, H, W), shift: (N, C) or None, weight, bias: (C,), seeds: (2,) int32 → (N, C, H, W)."""

    @staticmethod
    def forward(ctx, x, shift, weight, bias, seeds, groups, eps, silu, drop):
        x = _channels_last(x)
        (n, channels), pixels = x.shape[:2], x.shape[2:].numel()
        rows, columns, used = _tile_of(pixels, channels, channels // groups)
        constants = (pixels, channels, channels // groups, rows, columns, used, shift is not None, silu, drop)
        warps = max(1, min(8, rows * columns // 4096))
        y = torch.empty_like(x)
        means, scales = torch.empty(2, n, channels, device=x.device).unbind()
        _forward[n, triton.cdiv(channels, used)](y, means, scales, x, shift, weight, bias, seeds, eps, *constants,
                                                 num_warps=warps)
        ctx.save_for_backward(x, means, scales, weight, bias, seeds)
        ctx.constants, ctx.warps, ctx.shift = constants, warps, None if shift is None else shift.dtype
        return y

    @staticmethod
    def backward(ctx, dy):
        x, means, scales, weight, bias, seeds = ctx.saved_tensors
        (n, channels), used = x.shape[:2], ctx.constants[5]
        dx = torch.empty_like(x)
        dshift, dweight, dbias = torch.empty(3, n, channels, device=x.device).unbind()
        _backward[n, triton.cdiv(channels, used)](dx, dshift, dweight, dbias, _channels_last(dy), x, means, scales,
                                                  weight, bias, seeds, *ctx.constants, num_warps=2 * ctx.warps)
        dshift = dshift.to(ctx.shift) if ctx.shift else None
        return dx, dshift, dweight.sum(0), dbias.sum(0), None, None, None, None, None


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _tile_of(pixels: int, channels: int, group: int) -> tuple[int, int, int]:
    """Of one program: (rows, columns, how many of the columns are used, which are whole groups)."""
    rows = min(triton.next_power_of_2(pixels), 1024)
    columns = min(64, TILE // rows, triton.next_power_of_2(channels))
    columns = max(columns, triton.next_power_of_2(group))
    return max(1, min(rows, TILE // columns)), columns, columns // group * group


class _Sum(torch.autograd.Function):
    """(a + b) · scale."""

    @staticmethod
    def forward(ctx, a, b, scale):
        ctx.scale = scale
        a, b = _channels_last(a), _channels_last(b)
        y = torch.empty_like(a)
        _add[triton.cdiv(y.numel(), 4096),](y, a, b, scale, y.numel(), 4096, num_warps=8)
        return y

    @staticmethod
    def backward(ctx, dy):
        d = dy * ctx.scale
        return d, d, None


class Norm(dansm.Norm):
    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        drop = round(2**24 * self.dropout) if self.training else 0
        seeds = torch.randint(-2**31, 2**31, (2,), dtype=torch.int32, device=x.device) if drop else None
        return _Norm.apply(x, shift, self.weight, self.bias, seeds, self.num_groups, self.eps, self.silu, drop)


class ResBlock(dansm.ResBlock):
    def sum(self, x: Tensor, h: Tensor) -> Tensor:
        return _Sum.apply(x, h, self.scale)


class Attention(dansm.Attention):
    sum = ResBlock.sum


def fuse(net: nn.Module) -> nn.Module:
    """The same network, whose norms and sums go through the kernels: on a CUDA device, in training and in sampling."""
    for layer in net.modules():
        for plain, fused in ((dansm.Norm, Norm), (dansm.ResBlock, ResBlock), (dansm.Attention, Attention)):
            if type(layer) is plain:
                layer.__class__ = fused
    return net.to(memory_format=torch.channels_last)
