"""Norm, SiLU and dropout in one pass over memory, in Triton: on a GPU a UNet's step mostly waits for these. A program
keeps some channels of one image in registers. Only the input and two numbers for each group are saved for the backward
pass: the dropout's mask is drawn again."""

from collections.abc import Callable
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from einops import rearrange
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import dansm

from ..base.launch import compiling_ahead, launch

Place = Callable[[Tensor], Tensor]  # where a result of that shape and type goes
PROGRAMS = 528  # four for each of an H100's multiprocessors
TILE = 2**14  # numbers that one program holds in its registers: 16 channels at 32×32


# ------------ The kernels ---------------------------------------------------------------------------------------------


@triton.jit
def _kept(seeds, at, drop):
    """The factor by which dropout multiplies number `at` of the tensor. drop is the share of zeros times 2**24. The
    upper bits of two products are the random number: a better one would take longer than the memory. Both halves of the
    first product count, as a high bit of `at` or `seeds` changes the upper half only."""
    first = tl.load(seeds).to(tl.uint32)
    second = tl.load(seeds + 1).to(tl.uint32)
    wide = (at.to(tl.uint32) + (first ^ (second * 0x9E3779B9))).to(tl.uint64) * 0xD2511F53
    word = ((wide ^ (wide >> 32)).to(tl.uint32) ^ second) * 0x846CA68B
    kept = 16777216.0 / tl.maximum(16777216 - drop, 1).to(tl.float32)
    return tl.where((word >> 8) >= drop.to(tl.uint32), kept, 0.0)


@triton.jit
def _sigmoid(u, QUICK: tl.constexpr):
    """QUICK takes one instruction of the GPU, right to 11 bits; numbers of 16 bits keep 8 or 11 of these."""
    if QUICK:
        u = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [0.5 * u], tl.float32, is_pure=True, pack=1)
        return 0.5 + 0.5 * u
    return tl.sigmoid(u)


@triton.jit
def _of_group(sums, column, GROUP: tl.constexpr):
    """The sum over the columns of its group, for each column."""
    same = (column // GROUP)[:, None] == (column // GROUP)[None, :]
    return tl.sum(tl.where(same, sums[None, :], 0.0), 1)


@triton.jit
def _share(CHANNELS: tl.constexpr, COLUMNS: tl.constexpr, USED: tl.constexpr):
    """This program's image, its channels, and which of them exist. Only a grid's first dimension exceeds 65,535."""
    parts: tl.constexpr = (CHANNELS + USED - 1) // USED
    column = tl.arange(0, COLUMNS)
    channel = tl.program_id(0) % parts * USED + column
    return (tl.program_id(0) // parts).to(tl.int64), channel, (column < USED) & (channel < CHANNELS)


@triton.jit
def _rows(start, PIXELS: tl.constexpr, there, ROWS: tl.constexpr):
    """Pixels from `start` on, and which numbers of them exist."""
    row = start + tl.arange(0, ROWS)
    return row[:, None], (row < PIXELS)[:, None] & there[None, :]


@triton.jit(do_not_specialize=["drop"])
def _forward(y, means, scales, x, shift, weight, bias, seeds, eps, drop, stride, shift_stride, PIXELS: tl.constexpr,
             CHANNELS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, USED: tl.constexpr,
             SHIFT: tl.constexpr, SILU: tl.constexpr, DROPS: tl.constexpr, QUICK: tl.constexpr):
    """y = dropout(SiLU(norm(x + shift))) for USED channels of one image, which are whole groups. x, y: (N, PIXELS,
    CHANNELS); in x pixel i begins at i · stride. shift, means, scales: (N, CHANNELS). An image of more pixels than ROWS
    is read three times."""
    WHOLE: tl.constexpr = ROWS >= PIXELS
    image, channel, there = _share(CHANNELS, COLUMNS, USED)
    column = tl.arange(0, COLUMNS)
    first = image * PIXELS * CHANNELS
    x += image * PIXELS * stride
    moved = tl.zeros([COLUMNS], tl.float32)
    if SHIFT:
        moved = tl.load(shift + image * shift_stride + channel, mask=there, other=0.0).to(tl.float32)
    if WHOLE:
        row, here = _rows(0, PIXELS, there, ROWS)
        v = tl.load(x + row * stride + channel[None, :], mask=here, other=0.0).to(tl.float32)
        total = tl.sum(v, 0)
    else:
        total = tl.zeros([COLUMNS], tl.float32)
        for start in range(0, PIXELS, ROWS):
            row, here = _rows(start, PIXELS, there, ROWS)
            total += tl.sum(tl.load(x + row * stride + channel[None, :], mask=here, other=0.0).to(tl.float32), 0)
    mean = _of_group(total + PIXELS * moved, column, GROUP) / (PIXELS * GROUP) - moved
    if WHOLE:
        d = tl.where(here, v - mean[None, :], 0.0)
        total = tl.sum(d * d, 0)
    else:
        total = tl.zeros([COLUMNS], tl.float32)
        for start in range(0, PIXELS, ROWS):
            row, here = _rows(start, PIXELS, there, ROWS)
            v = tl.load(x + row * stride + channel[None, :], mask=here, other=0.0).to(tl.float32)
            d = tl.where(here, v - mean[None, :], 0.0)
            total += tl.sum(d * d, 0)
    scale = 1 / tl.sqrt(_of_group(total, column, GROUP) / (PIXELS * GROUP) + eps)
    w = tl.load(weight + channel, mask=there, other=0.0).to(tl.float32)
    b = tl.load(bias + channel, mask=there, other=0.0).to(tl.float32)
    for start in range(0, PIXELS, ROWS):
        if not WHOLE:
            row, here = _rows(start, PIXELS, there, ROWS)
            v = tl.load(x + row * stride + channel[None, :], mask=here, other=0.0).to(tl.float32)
        u = (v - mean[None, :]) * (scale * w)[None, :] + b[None, :]
        if SILU:
            u = u * _sigmoid(u, QUICK)
        at = row * CHANNELS + channel[None, :]
        if DROPS:
            u = u * _kept(seeds, first.to(tl.uint32) + at.to(tl.uint32), drop)
        tl.store(y + first + at, u.to(y.dtype.element_ty), mask=here)
    tl.store(means + image * CHANNELS + channel, mean, mask=there)
    tl.store(scales + image * CHANNELS + channel, scale, mask=there)


@triton.jit
def _gradient(dy, x, mean, scale, w, b, seeds, drop, first, row, channel, stride, here, CHANNELS: tl.constexpr,
              SILU: tl.constexpr, DROPS: tl.constexpr, QUICK: tl.constexpr):
    """The normalised numbers, and the gradient of what weight and bias make of them."""
    at = row * CHANNELS + channel[None, :]
    x_at = row * stride + channel[None, :]
    h = (tl.load(x + x_at, mask=here, other=0.0).to(tl.float32) - mean[None, :]) * scale[None, :]
    g = tl.load(dy + first + at, mask=here, other=0.0).to(tl.float32)  # 0 where no number exists, so h adds nothing
    if DROPS:
        g = g * _kept(seeds, first.to(tl.uint32) + at.to(tl.uint32), drop)
    if SILU:
        u = h * w[None, :] + b[None, :]
        s = _sigmoid(u, QUICK)
        g = g * s * (1 + u * (1 - s))
    return h, g


@triton.jit(do_not_specialize=["drop"])
def _backward(dx, dshift, dweight, dbias, dy, around, x, means, scales, weight, bias, seeds, drop, stride,
              PIXELS: tl.constexpr, CHANNELS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
              COLUMNS: tl.constexpr, USED: tl.constexpr, SHIFT: tl.constexpr, SILU: tl.constexpr, DROPS: tl.constexpr,
              QUICK: tl.constexpr, AROUND: tl.constexpr):
    """The gradients of x, shift, weight and bias, the last three summed over the image: (N, CHANNELS). `around` is the
    gradient that comes around the norm, which is added. Only in x are pixels `stride` apart."""
    WHOLE: tl.constexpr = ROWS >= PIXELS
    image, channel, there = _share(CHANNELS, COLUMNS, USED)
    column = tl.arange(0, COLUMNS)
    first = image * PIXELS * CHANNELS
    x += image * PIXELS * stride
    w = tl.load(weight + channel, mask=there, other=0.0).to(tl.float32)
    b = tl.load(bias + channel, mask=there, other=0.0).to(tl.float32)
    mean = tl.load(means + image * CHANNELS + channel, mask=there, other=0.0)
    scale = tl.load(scales + image * CHANNELS + channel, mask=there, other=0.0)
    if WHOLE:
        row, here = _rows(0, PIXELS, there, ROWS)
        h, g = _gradient(dy, x, mean, scale, w, b, seeds, drop, first, row, channel, stride, here, CHANNELS, SILU,
                         DROPS, QUICK)
        dw = tl.sum(g * h, 0)
        db = tl.sum(g, 0)
    else:
        dw = tl.zeros([COLUMNS], tl.float32)
        db = tl.zeros([COLUMNS], tl.float32)
        for start in range(0, PIXELS, ROWS):
            row, here = _rows(start, PIXELS, there, ROWS)
            h, g = _gradient(dy, x, mean, scale, w, b, seeds, drop, first, row, channel, stride, here, CHANNELS, SILU,
                             DROPS, QUICK)
            dw += tl.sum(g * h, 0)
            db += tl.sum(g, 0)
    tl.store(dweight + image * CHANNELS + channel, dw, mask=there)
    tl.store(dbias + image * CHANNELS + channel, db, mask=there)
    # Every number of a group moves the group's mean and variance, which takes this off its gradient.
    along = _of_group(dw * w, column, GROUP) / (PIXELS * GROUP)
    level = _of_group(db * w, column, GROUP) / (PIXELS * GROUP)
    moved = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, PIXELS, ROWS):
        if not WHOLE:
            row, here = _rows(start, PIXELS, there, ROWS)
            h, g = _gradient(dy, x, mean, scale, w, b, seeds, drop, first, row, channel, stride, here, CHANNELS, SILU,
                             DROPS, QUICK)
        d = (g * w[None, :] - level[None, :] - h * along[None, :]) * scale[None, :]
        if SHIFT:
            moved += tl.sum(tl.where(here, d, 0.0), 0)
        at = row * CHANNELS + channel[None, :]
        if AROUND:
            d += tl.load(around + first + at, mask=here, other=0.0).to(tl.float32)
        tl.store(dx + first + at, d.to(dx.dtype.element_ty), mask=here)
    if SHIFT:
        tl.store(dshift + image * CHANNELS + channel, moved.to(dshift.dtype.element_ty), mask=there)


@triton.jit
def _part(part, ROWS: tl.constexpr, channels, rows, COLUMNS: tl.constexpr):
    """ROWS pixels, all channels, and which numbers exist."""
    row = tl.cast(part, tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    return row[:, None], column[None, :], (row < rows)[:, None] & (column < channels)[None, :]


@triton.jit
def _sum(y, a, b, bias, scale, y_stride, a_stride, rows, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """y = (a + b + bias) · scale. a, b, y: (rows, channels); pixel i of y and of a begins at i times its stride."""
    row, column, here = _part(tl.program_id(0), ROWS, channels, rows, COLUMNS)
    total = tl.load(a + row * a_stride + column, mask=here, other=0.0).to(tl.float32)
    total += tl.load(b + row * channels + column, mask=here, other=0.0).to(tl.float32)
    total += tl.load(bias + column, mask=column < channels, other=0.0).to(tl.float32)
    tl.store(y + row * y_stride + column, (total * scale).to(y.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["parts"])
def _sum_backward(d, dbias, dy, other, scale, stride, other_stride, rows, parts, channels, OTHER: tl.constexpr,
                  WRITE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """d = (dy + other) · scale if WRITE, and its sum over each program's pixels: dbias (programs, channels). Pixel i of
    dy and of `other`, which is there if OTHER, begins at i times its stride."""
    column = tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for part in range(tl.program_id(0), parts, tl.num_programs(0)):
        row, across, here = _part(part, ROWS, channels, rows, COLUMNS)
        g = tl.load(dy + row * stride + across, mask=here, other=0.0).to(tl.float32)
        if OTHER:
            g += tl.load(other + row * other_stride + across, mask=here, other=0.0).to(tl.float32)
        g *= scale
        if WRITE:
            tl.store(d + row * channels + across, g.to(d.dtype.element_ty), mask=here)
        total += g
    tl.store(dbias + tl.program_id(0) * channels + column, tl.sum(total, 0), mask=column < channels)


@triton.jit(do_not_specialize=["width"])
def _halve(y, x, factor, stride, rows, width, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Each pixel of y is the sum of four of x, times factor. y: (…, width, channels), `rows` pixels in all; pixels of x
    are `stride` apart."""
    row, column, here = _part(tl.program_id(0), ROWS, channels, rows, COLUMNS)
    corner = ((row // width) * 4 * width + (row % width) * 2) * stride + column
    total = tl.load(x + corner, mask=here, other=0.0).to(tl.float32)
    total += tl.load(x + corner + stride, mask=here, other=0.0).to(tl.float32)
    total += tl.load(x + corner + 2 * width * stride, mask=here, other=0.0).to(tl.float32)
    total += tl.load(x + corner + (2 * width + 1) * stride, mask=here, other=0.0).to(tl.float32)
    tl.store(y + row * channels + column, (total * factor).to(y.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["width"])
def _double(y, x, factor, stride, rows, width, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Each pixel of x, times factor, goes to four of y. x: (…, width, channels), `rows` pixels in all, `stride` apart.
    """
    row, column, here = _part(tl.program_id(0), ROWS, channels, rows, COLUMNS)
    v = tl.load(x + row * stride + column, mask=here, other=0.0).to(tl.float32) * factor
    v = v.to(y.dtype.element_ty)
    corner = ((row // width) * 4 * width + (row % width) * 2) * channels + column
    tl.store(y + corner, v, mask=here)
    tl.store(y + corner + channels, v, mask=here)
    tl.store(y + corner + 2 * width * channels, v, mask=here)
    tl.store(y + corner + (2 * width + 1) * channels, v, mask=here)


# ------------ For torch -----------------------------------------------------------------------------------------------


class _Norm(torch.autograd.Function):
    """dropout(SiLU(norm(x + shift))), and x for the way around the norm, so that the kernel adds the gradients of both.
    x: (N, C, H, W), shift: (N, C) or None, weight, bias: (N, C) of equal rows, seeds: two int32 or None."""

    @staticmethod
    def forward(ctx, x, shift, weight, bias, seeds, groups, eps, silu, drop):
        ctx.set_materialize_grads(False)
        spaced, stride = _evenly_spaced(x)
        n, channels = x.shape[:2]
        pixels = x.shape[2:].numel()
        group = channels // groups
        rows, columns, used = _tile_of(pixels, channels, group)
        constants = (pixels, channels, group, rows, columns, used, shift is not None, silu, drop > 0,
                     x.is_cuda and x.element_size() == 2)
        if shift is not None and shift.stride(1) != 1:
            shift = shift.contiguous()
        y = _like_pixels(x)
        means, scales = torch.empty(2, n, channels, device=x.device).unbind()
        launch(_forward, (n * triton.cdiv(channels, used),), y, means, scales, spaced, shift, weight, bias, seeds, eps,
               drop, stride, 0 if shift is None else shift.stride(0), *constants, **_warps(rows * columns // 2))
        ctx.save_for_backward(spaced, means, scales, weight, bias, seeds)
        ctx.numbers, ctx.constants = (drop, stride), constants
        ctx.shift_dtype = None if shift is None else shift.dtype
        return y, x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, around):
        if dy is None:
            return around, *[None] * 8
        x, means, scales, weight, bias, seeds = ctx.saved_tensors
        n, channels = x.shape[:2]
        rows, columns, used = ctx.constants[3:6]
        dx = _like_pixels(x)
        dweight, dbias = torch.empty(2, n, channels, device=x.device).unbind()
        dshift = dweight.new_empty(n, channels, dtype=ctx.shift_dtype) if ctx.shift_dtype else None
        around = None if around is None else _channels_last(around)
        launch(_backward, (n * triton.cdiv(channels, used),), dx, dshift, dweight, dbias, _channels_last(dy), around, x,
               means, scales, weight, bias, seeds, *ctx.numbers, *ctx.constants, around is not None,
               **_warps(rows * columns))
        return dx, dshift, dweight, dbias, *[None] * 5


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _like_pixels(x: Tensor) -> Tensor:
    """Memory for numbers of x's shape and type, all channels of a pixel next to each other."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _evenly_spaced(x: Tensor) -> tuple[Tensor, int]:
    """x with all channels of a pixel next to each other, and how far apart its pixels are, all of them equally: C, or
    more in a part of a wider tensor."""
    _, channels, height, width = x.shape
    stride = x.stride(3)
    if stride >= channels and x.stride() == (stride * height * width, 1, stride * width, stride):
        return x, stride
    return _channels_last(x), channels


def _tile_of(pixels: int, channels: int, group: int) -> tuple[int, int, int]:
    """What one program holds: (rows, columns, how many of these it uses, whole groups)."""
    rows = min(triton.next_power_of_2(pixels), 1024)
    most = 32 if rows >= 64 and 32 % group == 0 else 64  # with groups of other sizes a fourth of 32 would be idle
    columns = min(most, TILE // rows, triton.next_power_of_2(channels))
    columns = max(columns, triton.next_power_of_2(group))
    return max(1, min(rows, TILE // columns)), columns, columns // group * group


def _warps(numbers: int) -> dict[str, int | None]:
    """Settings of a launch. Eight warps get so few registers that two programs share a multiprocessor."""
    warps = max(1, min(16, numbers // 1024))
    return {"num_warps": warps, "maxnreg": 128 if warps >= 8 else None}


def _rows_of(x: Tensor) -> tuple[int, int, int]:
    """(pixels in all, pixels that one program takes at a time, its columns)."""
    columns = triton.next_power_of_2(x.shape[1])
    return len(x) * x.shape[2:].numel(), max(1, 8192 // columns), columns


class _Sum(torch.autograd.Function):
    """(a + b + bias) · scale, twice: what follows takes one, and the way up the other, so that the kernel adds the
    gradients of both. a, b: (N, C, H, W), bias: (PROGRAMS, C) of equal rows, scale: a number. out: where the result
    goes, evenly spaced; None: to memory of its own."""

    @staticmethod
    def forward(ctx, a, b, bias, scale, out):
        ctx.set_materialize_grads(False)
        ctx.scale = scale
        a, stride = _evenly_spaced(a)
        b = _channels_last(b)
        y = _like_pixels(a) if out is None else out.data
        total, rows, columns = _rows_of(a)
        launch(_sum, (triton.cdiv(total, rows),), y, a, b, bias, scale, y.stride(3) if out is not None else a.shape[1],
               stride, total, a.shape[1], rows, columns)
        return y, y.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, other):
        if dy is None:
            dy, other = other, None
        if dy is None:
            return None, None, None, None, None
        total, rows, columns = _rows_of(dy)
        channels = dy.shape[1]
        dy, stride = _evenly_spaced(dy)
        other, other_stride = (None, 0) if other is None else _evenly_spaced(other)
        writes = other is not None or ctx.scale != 1 or stride != channels
        d = _like_pixels(dy) if writes else dy
        dbias = torch.empty(PROGRAMS, channels, device=dy.device)
        launch(_sum_backward, (PROGRAMS,), d if writes else None, dbias, dy, other, ctx.scale, stride, other_stride,
               total, triton.cdiv(total, rows), channels, other is not None, writes, rows, columns)
        return d, d, dbias, None, None


class _Resample(torch.autograd.Function):
    """Double the image, each pixel four times, or halve it, each pixel the mean of four. x: (N, C, H, W)."""

    @staticmethod
    def forward(ctx, x, up):
        ctx.up = up
        return _resample(x, up, 1.0 if up else 0.25)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return _resample(dy, not ctx.up, 1.0 if ctx.up else 0.25), None


def _resample(x: Tensor, up: bool, factor: float) -> Tensor:
    x, stride = _evenly_spaced(x)
    n, channels, height, width = x.shape
    size = (2 * height, 2 * width) if up else (height // 2, width // 2)
    y = torch.empty(n, channels, *size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    total, rows, columns = _rows_of(x if up else y)
    kernel, width = (_double, width) if up else (_halve, width // 2)
    launch(kernel, (triton.cdiv(total, rows),), y, x, factor, stride, total, width, channels, rows, columns)
    return y


class _Place(torch.autograd.Function):
    """A copy of x in `out`, a part of a wider tensor."""

    @staticmethod
    def forward(ctx, x, out):
        out = out.data  # as no other part of the wider tensor changes, whose versions it would count up
        return out.copy_(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return dy, None


class _Join(torch.autograd.Function):
    """torch.cat([h, skip], 1) of the two parts of a joint, which lie there already."""

    @staticmethod
    def forward(ctx, h, skip, joint):
        ctx.first = h.shape[1]
        return joint.whole

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return dy[:, : ctx.first], dy[:, ctx.first :], None


class Joint:
    """Memory for a state of the way up and one of the way down, which are joined: `channels` together."""

    def __init__(self, channels: int):
        self.channels = channels

    def last(self, like: Tensor) -> Tensor:
        """The place of the way down's, which comes first: memory for numbers of that shape and type."""
        n, channels, *size = like.shape
        self.whole = torch.empty(n, self.channels, *size, dtype=like.dtype, device=like.device,
                                 memory_format=torch.channels_last)
        return self.whole[:, -channels:]

    def first(self, like: Tensor) -> Tensor:
        """The place of the way up's."""
        return self.whole[:, : like.shape[1]]


# ------------ The network's layers ------------------------------------------------------------------------------------


def spread(vectors: list[Tensor], rows: int) -> tuple[Tensor, ...]:
    """Each vector (C,) as that many equal rows, (rows, C). The kernels leave a gradient for each row; all of them, of
    all vectors, are summed at once, where each sum by itself takes 9 µs, as long as those of 100 layers."""
    sizes = [len(vector) for vector in vectors]
    return torch.cat(vectors).expand(rows, -1).split(sizes, 1)


class Shared(NamedTuple):
    """What all layers of a network need, by layer, computed together: a product or a sum of a single one is too small
    for a GPU.

    norms   weight and bias (N, C), and the seeds of its dropout
    shifts  of each residual block's second norm (N, C): the time's, and the first convolution's bias
    ends    the biases (PROGRAMS, C) that are added with the sum of each block and attention
    """

    norms: dict[nn.Module, tuple[Tensor, Tensor, Tensor | None]]
    shifts: dict[nn.Module, Tensor]
    ends: dict[nn.Module, Tensor]

    @classmethod
    def of(cls, net: dansm.UNet, time: Tensor) -> Self:
        """time: (N, c_time)."""
        layers = list(net.modules())
        norms = [layer for layer in layers if isinstance(layer, Norm)]
        blocks = [layer for layer in layers if isinstance(layer, ResBlock)]
        sums = [layer for layer in layers if isinstance(layer, ResBlock | Attention)]
        weights = spread([norm.weight for norm in norms], len(time))
        biases = spread([norm.bias for norm in norms], len(time))
        seeds = new_seeds(len(norms), time.device) if net.training else [None] * len(norms)
        bias = torch.cat([block.time.bias for block in blocks]) + torch.cat([block.conv1.bias for block in blocks])
        shifts = F.linear(time, torch.cat([block.time.weight for block in blocks]), bias)
        shifts = shifts.split([len(block.time.bias) for block in blocks], 1)
        ends = spread([layer.end() for layer in sums], PROGRAMS)
        return cls(dict(zip(norms, zip(weights, biases, seeds, strict=True), strict=True)),
                   dict(zip(blocks, shifts, strict=True)), dict(zip(sums, ends, strict=True)))


def new_seeds(count: int, device: torch.device) -> Tensor:
    """(count, 4) int32, of which two are used: so each begins at a multiple of 16 bytes."""
    return torch.randint(-2**31, 2**31, (count, 4), dtype=torch.int32, device=device)


class Norm(dansm.Norm):
    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        weight, bias = (vector.expand(len(x), -1) for vector in (self.weight, self.bias))
        seeds = new_seeds(1, x.device)[0] if self.training and self.dropout else None
        return self.fork(x, shift, weight, bias, seeds)[0]

    def fork(self, x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor,
             seeds: Tensor | None) -> tuple[Tensor, Tensor]:
        """The result, and x for the way around the norm."""
        drop = round(2**24 * self.dropout) if self.training else 0
        return _Norm.apply(x, shift, weight, bias, seeds if drop else None, self.num_groups, self.eps, self.silu, drop)


class ResBlock(dansm.ResBlock):
    """The first convolution's bias goes into the norm's shift, with the time's, the others' into the sum."""

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        return self.fork(x, shared)[0]

    def fork(self, x: Tensor, shared: Shared, place: Place | None = None) -> tuple[Tensor, Tensor]:
        """The result twice, for two that use it, the second in that place."""
        h, x = self.norm1.fork(x, None, *shared.norms[self.norm1])
        h = convolve(self.conv1, self.resample(h))
        h, _ = self.norm2.fork(h, shared.shifts[self], *shared.norms[self.norm2])
        h = convolve(self.conv2, h)
        x = self.resample(x)
        if isinstance(self.skip, nn.Conv2d):
            x = convolve(self.skip, x)
        return _Sum.apply(x, h, shared.ends[self], self.scale, place and place(h))

    def end(self) -> Tensor:
        """The biases that are left for the sum."""
        return self.conv2.bias + self.skip.bias if isinstance(self.skip, nn.Conv2d) else self.conv2.bias


def convolve(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """The convolution of x without the layer's bias. One of 1×1 is a matrix product of (N, H, W, C), as the numbers lie
    in memory: cuDNN would try several ways of doing it first."""
    if layer.kernel_size == (1, 1):
        return rearrange(F.linear(rearrange(x, "b c h w -> b h w c"), layer.weight.flatten(1)), "b h w c -> b c h w")
    return F.conv2d(x, layer.weight, None, layer.stride, layer.padding)


class Attention(dansm.Attention):
    """Its 1×1 convolutions are matrix products of (N, pixels, C), as the numbers lie in memory."""

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        return self.fork(x, shared)[0]

    def fork(self, x: Tensor, shared: Shared, place: Place | None = None) -> tuple[Tensor, Tensor]:
        h, x = self.norm.fork(x, None, *shared.norms[self.norm])
        h = rearrange(h, "b c h w -> b 1 (h w) c")
        q, k, v = F.linear(h, self.qkv.weight.flatten(1), self.qkv.bias).chunk(3, dim=3)
        h = F.linear(F.scaled_dot_product_attention(q, k, v), self.out.weight.flatten(1))
        h = rearrange(h, "b 1 (h w) c -> b c h w", h=x.shape[2])
        return _Sum.apply(x, h, shared.ends[self], self.scale, place and place(h))

    def end(self) -> Tensor:
        return self.out.bias


class Resample(dansm.Resample):
    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        return self.conv(_Resample.apply(x, True) if self.up else x)

    def fork(self, x: Tensor, shared: Shared, place: Place | None = None) -> tuple[Tensor, Tensor]:
        x = self(x, shared)
        return x, x if place is None else _Place.apply(x, place(x))


class Double(nn.Upsample):
    def forward(self, x: Tensor) -> Tensor:
        return _Resample.apply(x, True)


class Halve(nn.AvgPool2d):
    def forward(self, x: Tensor) -> Tensor:
        return _Resample.apply(x, False)


class UNet(dansm.UNet):
    """Each state that the way up takes from the way down, and the one that it is joined with, are written next to each
    other, so that torch.cat copies neither."""

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        shared = Shared.of(self, self._embedding(t, labels, x))
        joints = [Joint(layers[0].norm1.num_channels) for layers in reversed(self.up)]
        h = self.first(x)
        skips = [_Place.apply(h, joints[0].last(h))]
        for layers, joint in zip(self.down, joints[1:], strict=True):
            h, skip = fork(layers, h, shared, joint.last)
            skips.append(skip)
        _, h = fork(self.middle, h, shared, joints[-1].first)
        for layers in self.up:
            h = _Join.apply(h, skips.pop(), joints.pop())
            _, h = fork(layers, h, shared, joints[-1].first if joints else None)
        norm, conv = self.last
        return conv(norm.fork(h, None, *shared.norms[norm])[0])


def fork(layers: dansm.Chain, x: Tensor, shared: Shared, place: Place | None) -> tuple[Tensor, Tensor]:
    """What comes out of the last of these layers, twice, the second in that place."""
    *before, last = layers
    for layer in before:
        x = layer(x, shared)
    return last.fork(x, shared, place)


REPLACED_BY = {dansm.Norm: Norm, dansm.ResBlock: ResBlock, dansm.Attention: Attention, dansm.Resample: Resample,
               dansm.UNet: UNet, nn.Upsample: Double, nn.AvgPool2d: Halve}


def fuse(net: dansm.UNet) -> dansm.UNet:
    """Let the network's layers run through the kernels, in training and in sampling. Its weights stay the same. Raises
    an error, before it changes a layer, if the first kernel cannot be compiled on this device or differs from torch."""
    x = torch.arange(64.0, device=next(net.parameters()).device).reshape(1, 4, 4, 4)
    of_x = x, None, x.new_ones(1, 4), x.new_zeros(1, 4), None, 1, 1e-6, False, 0
    with compiling_ahead(x.device):  # together with what Triton itself needs
        _Norm.apply(*of_x)
    y, _ = _Norm.apply(*of_x)
    torch.testing.assert_close(y, F.group_norm(x, 1, eps=1e-6), atol=1e-4, rtol=1e-4)
    for layer in net.modules():
        layer.__class__ = REPLACED_BY.get(type(layer), type(layer))
    return net.to(memory_format=torch.channels_last)
