"""Norm, SiLU and dropout in one pass over memory, in Triton: on a GPU a UNet's step mostly waits for these. A program
keeps some channels of one image in registers. Only the input and two numbers for each group are saved for the backward
pass: the dropout's mask is drawn again."""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from einops import rearrange
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import dansm

from ..base.launch import launch

PROGRAMS = 1056  # eight for each of an H100's multiprocessors
TILE = 2**14  # numbers that one program holds in its registers: 16 channels at 32×32


# ------------ The kernels ---------------------------------------------------------------------------------------------


@triton.jit
def _kept(seeds, at, DROP: tl.constexpr):
    """The factor by which dropout multiplies number `at` of the tensor. DROP is the share of zeros times 2**24. The
    upper bits of two products are the random number: a better one would take longer than the memory. Both halves of the
    first product count, as a high bit of `at` or `seeds` changes the upper half only."""
    first = tl.load(seeds).to(tl.uint32)
    second = tl.load(seeds + 1).to(tl.uint32)
    wide = (at.to(tl.uint32) + (first ^ (second * 0x9E3779B9))).to(tl.uint64) * 0xD2511F53
    word = ((wide ^ (wide >> 32)).to(tl.uint32) ^ second) * 0x846CA68B
    KEPT: tl.constexpr = 2**24 / (2**24 - DROP) if DROP < 2**24 else 0.0
    return tl.where((word >> 8) >= DROP, KEPT, 0.0)


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
def _tile(start, channel, there, PIXELS: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr):
    """Where the numbers of these channels lie from pixel `start` on, and which of them exist."""
    row = start + tl.arange(0, ROWS)
    return row[:, None] * CHANNELS + channel[None, :], (row < PIXELS)[:, None] & there[None, :]


@triton.jit
def _forward(y, means, scales, x, shift, weight, bias, seeds, eps, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
             GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, USED: tl.constexpr, SHIFT: tl.constexpr,
             SILU: tl.constexpr, DROP: tl.constexpr, QUICK: tl.constexpr):
    """y = dropout(SiLU(norm(x + shift))) for USED channels of one image, which are whole groups. x, y: (N, PIXELS,
    CHANNELS); shift, means, scales: (N, CHANNELS). An image of more pixels than ROWS is read three times."""
    image, channel, there = _share(CHANNELS, COLUMNS, USED)
    column = tl.arange(0, COLUMNS)
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
    w = tl.load(weight + channel, mask=there, other=0.0).to(tl.float32)
    b = tl.load(bias + channel, mask=there, other=0.0).to(tl.float32)
    for start in range(0, PIXELS, ROWS):
        if not WHOLE:
            at, here = _tile(start, channel, there, PIXELS, CHANNELS, ROWS)
            v = tl.load(x + at, mask=here, other=0.0).to(tl.float32)
        u = (v - mean[None, :]) * (scale * w)[None, :] + b[None, :]
        if SILU:
            u = u * _sigmoid(u, QUICK)
        if DROP > 0:
            u = u * _kept(seeds, image * PIXELS * CHANNELS + at, DROP)
        tl.store(y + image * PIXELS * CHANNELS + at, u.to(y.dtype.element_ty), mask=here)
    tl.store(means + image * CHANNELS + channel, mean, mask=there)
    tl.store(scales + image * CHANNELS + channel, scale, mask=there)


@triton.jit
def _gradient(dy, x, mean, scale, w, b, seeds, at, here, SILU: tl.constexpr, DROP: tl.constexpr, QUICK: tl.constexpr):
    """The normalised numbers, and the gradient of what weight and bias make of them."""
    h = (tl.load(x + at, mask=here, other=0.0).to(tl.float32) - mean[None, :]) * scale[None, :]
    g = tl.load(dy + at, mask=here, other=0.0).to(tl.float32)  # 0 where no number exists, so h adds nothing
    if DROP > 0:
        g = g * _kept(seeds, at, DROP)
    if SILU:
        u = h * w[None, :] + b[None, :]
        s = _sigmoid(u, QUICK)
        g = g * s * (1 + u * (1 - s))
    return h, g


@triton.jit
def _backward(dx, dshift, dweight, dbias, dy, around, x, means, scales, weight, bias, seeds, PIXELS: tl.constexpr,
              CHANNELS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
              USED: tl.constexpr, SHIFT: tl.constexpr, SILU: tl.constexpr, DROP: tl.constexpr, QUICK: tl.constexpr,
              AROUND: tl.constexpr):
    """The gradients of `_forward`, dx with `around` added if AROUND. dshift, dweight, dbias: (N, CHANNELS), the last
    two still to be summed over the images."""
    image, channel, there = _share(CHANNELS, COLUMNS, USED)
    column = tl.arange(0, COLUMNS)
    first = image * PIXELS * CHANNELS
    w = tl.load(weight + channel, mask=there, other=0.0).to(tl.float32)
    b = tl.load(bias + channel, mask=there, other=0.0).to(tl.float32)
    mean = tl.load(means + image * CHANNELS + channel, mask=there, other=0.0)
    scale = tl.load(scales + image * CHANNELS + channel, mask=there, other=0.0)
    WHOLE: tl.constexpr = ROWS >= PIXELS
    if WHOLE:
        at, here = _tile(0, channel, there, PIXELS, CHANNELS, ROWS)
        h, g = _gradient(dy, x, mean, scale, w, b, seeds, first + at, here, SILU, DROP, QUICK)
    dw = tl.zeros([COLUMNS], tl.float32)
    db = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, PIXELS, ROWS):
        if not WHOLE:
            at, here = _tile(start, channel, there, PIXELS, CHANNELS, ROWS)
            h, g = _gradient(dy, x, mean, scale, w, b, seeds, first + at, here, SILU, DROP, QUICK)
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
            at, here = _tile(start, channel, there, PIXELS, CHANNELS, ROWS)
            h, g = _gradient(dy, x, mean, scale, w, b, seeds, first + at, here, SILU, DROP, QUICK)
        d = (g * w[None, :] - level[None, :] - h * along[None, :]) * scale[None, :]
        moved += tl.sum(tl.where(here, d, 0.0), 0)
        if AROUND:
            d += tl.load(around + first + at, mask=here, other=0.0).to(tl.float32)
        tl.store(dx + first + at, d.to(dx.dtype.element_ty), mask=here)
    if SHIFT:
        tl.store(dshift + image * CHANNELS + channel, moved, mask=there)


@triton.jit
def _part(row, ROWS: tl.constexpr, CHANNELS: tl.constexpr, rows, COLUMNS: tl.constexpr):
    """ROWS pixels from `row` on, all channels, and which numbers exist."""
    at = row + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    return at, column, (at < rows)[:, None] & (column < CHANNELS)[None, :]


@triton.jit
def _sum(y, a, b, bias, scale, rows, CHANNELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """y = (a + b + bias) · scale. a, b, y: (rows, CHANNELS)."""
    row, column, here = _part(tl.program_id(0).to(tl.int64) * ROWS, ROWS, CHANNELS, rows, COLUMNS)
    at = row[:, None] * CHANNELS + column[None, :]
    total = tl.load(a + at, mask=here, other=0.0).to(tl.float32) + tl.load(b + at, mask=here, other=0.0).to(tl.float32)
    total += tl.load(bias + column, mask=column < CHANNELS, other=0.0).to(tl.float32)[None, :]
    tl.store(y + at, (total * scale).to(y.dtype.element_ty), mask=here)


@triton.jit
def _sum_backward(d, dbias, dy, scale, stride, rows, parts, CHANNELS: tl.constexpr, ROWS: tl.constexpr,
                  COLUMNS: tl.constexpr):
    """d = dy · scale, and its sum over each program's pixels: dbias (programs, CHANNELS). dy may be a part of a wider
    tensor, in which row i begins at i · stride."""
    column = tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for part in range(tl.program_id(0), parts, tl.num_programs(0)):
        row, column, here = _part(tl.cast(part, tl.int64) * ROWS, ROWS, CHANNELS, rows, COLUMNS)
        g = tl.load(dy + row[:, None] * stride + column[None, :], mask=here, other=0.0).to(tl.float32) * scale
        tl.store(d + row[:, None] * CHANNELS + column[None, :], g.to(d.dtype.element_ty), mask=here)
        total += g
    tl.store(dbias + tl.program_id(0) * CHANNELS + column, tl.sum(total, 0), mask=column < CHANNELS)


@triton.jit
def _halve(y, x, factor, rows, WIDTH: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Each pixel of y is the sum of four of x, times factor. y: (…, WIDTH, CHANNELS), `rows` pixels in all."""
    row, column, here = _part(tl.program_id(0).to(tl.int64) * ROWS, ROWS, CHANNELS, rows, COLUMNS)
    corner = ((row // WIDTH) * 4 * WIDTH + (row % WIDTH) * 2)[:, None] * CHANNELS + column[None, :]
    total = tl.load(x + corner, mask=here, other=0.0).to(tl.float32)
    total += tl.load(x + corner + CHANNELS, mask=here, other=0.0).to(tl.float32)
    total += tl.load(x + corner + 2 * WIDTH * CHANNELS, mask=here, other=0.0).to(tl.float32)
    total += tl.load(x + corner + (2 * WIDTH + 1) * CHANNELS, mask=here, other=0.0).to(tl.float32)
    tl.store(y + row[:, None] * CHANNELS + column[None, :], (total * factor).to(y.dtype.element_ty), mask=here)


@triton.jit
def _double(y, x, factor, rows, WIDTH: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Each pixel of x, times factor, goes to four of y. x: (…, WIDTH, CHANNELS), `rows` pixels in all."""
    row, column, here = _part(tl.program_id(0).to(tl.int64) * ROWS, ROWS, CHANNELS, rows, COLUMNS)
    v = tl.load(x + row[:, None] * CHANNELS + column[None, :], mask=here, other=0.0).to(tl.float32) * factor
    v = v.to(y.dtype.element_ty)
    corner = ((row // WIDTH) * 4 * WIDTH + (row % WIDTH) * 2)[:, None] * CHANNELS + column[None, :]
    tl.store(y + corner, v, mask=here)
    tl.store(y + corner + CHANNELS, v, mask=here)
    tl.store(y + corner + 2 * WIDTH * CHANNELS, v, mask=here)
    tl.store(y + corner + (2 * WIDTH + 1) * CHANNELS, v, mask=here)


# ------------ For torch -----------------------------------------------------------------------------------------------


class _Norm(torch.autograd.Function):
    """dropout(SiLU(norm(x + shift))), and x for the way around the norm, so that the kernel adds the gradients of both.
    x: (N, C, H, W), shift: (N, C) or None, weight, bias: (C,), seeds: (2,) int32."""

    @staticmethod
    def forward(ctx, x, shift, weight, bias, seeds, groups, eps, silu, drop):
        ctx.set_materialize_grads(False)
        channels_last = _channels_last(x)
        shift = None if shift is None else shift.contiguous()
        n, channels = x.shape[:2]
        pixels = x.shape[2:].numel()
        rows, columns, used = _tile_of(pixels, channels, channels // groups)
        constants = (pixels, channels, channels // groups, rows, columns, used, shift is not None, silu, drop,
                     x.is_cuda and x.element_size() == 2)
        y = torch.empty_like(channels_last)
        means, scales = torch.empty(2, n, channels, device=x.device).unbind()
        launch(_forward, (n * triton.cdiv(channels, used),), y, means, scales, channels_last, shift, weight, bias,
               seeds, eps, *constants, num_warps=_warps(rows * columns // 2))
        ctx.save_for_backward(channels_last, means, scales, weight, bias, seeds)
        ctx.constants = constants
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
        dx = torch.empty_like(x)
        sums = torch.empty(3, n, channels, device=x.device)
        around = None if around is None else _channels_last(around)
        launch(_backward, (n * triton.cdiv(channels, used),), dx, *sums, _channels_last(dy), around, x, means, scales,
               weight, bias, seeds, *ctx.constants, around is not None, num_warps=_warps(rows * columns))
        dweight, dbias = sums[1:].sum(1)
        dshift = sums[0].to(ctx.shift_dtype) if ctx.shift_dtype else None
        return dx, dshift, dweight, dbias, *[None] * 5


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _tile_of(pixels: int, channels: int, group: int) -> tuple[int, int, int]:
    """What one program holds: (rows, columns, how many of these it uses, whole groups)."""
    rows = min(triton.next_power_of_2(pixels), 1024)
    columns = min(64, TILE // rows, triton.next_power_of_2(channels))
    columns = max(columns, triton.next_power_of_2(group))
    return max(1, min(rows, TILE // columns)), columns, columns // group * group


def _warps(numbers: int) -> int:
    return max(1, min(16, numbers // 1024))


def _rows_of(x: Tensor) -> tuple[int, int, int]:
    """(pixels in all, pixels that one program takes at a time, its columns)."""
    columns = triton.next_power_of_2(x.shape[1])
    return len(x) * x.shape[2:].numel(), max(1, 8192 // columns), columns


class _Sum(torch.autograd.Function):
    """(a + b + bias) · scale. a, b: (N, C, H, W), bias: (C,), scale: a number."""

    @staticmethod
    def forward(ctx, a, b, bias, scale):
        ctx.scale = scale
        a = _channels_last(a)
        b = _channels_last(b)
        y = torch.empty_like(a)
        total, rows, columns = _rows_of(a)
        launch(_sum, (triton.cdiv(total, rows),), y, a, b, bias, scale, total, a.shape[1], rows, columns)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        total, rows, columns = _rows_of(dy)
        channels = dy.shape[1]
        stride = dy.stride(3)
        if dy.stride() != (stride * dy.shape[2:].numel(), 1, stride * dy.shape[3], stride):
            dy = _channels_last(dy)
            stride = channels
        d = torch.empty(dy.shape, dtype=dy.dtype, device=dy.device, memory_format=torch.channels_last)
        parts = triton.cdiv(total, rows)
        programs = min(parts, PROGRAMS)
        dbias = torch.empty(programs, channels, device=dy.device)
        launch(_sum_backward, (programs,), d, dbias, dy, ctx.scale, stride, total, parts, channels, rows, columns)
        return d, d, dbias.sum(0), None


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
    x = _channels_last(x)
    n, channels, height, width = x.shape
    size = (2 * height, 2 * width) if up else (height // 2, width // 2)
    y = torch.empty(n, channels, *size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    total, rows, columns = _rows_of(x if up else y)
    kernel, width = (_double, width) if up else (_halve, width // 2)
    launch(kernel, (triton.cdiv(total, rows),), y, x, factor, total, width, channels, rows, columns)
    return y


# ------------ The network's layers ------------------------------------------------------------------------------------


class Norm(dansm.Norm):
    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        return self.fork(x, shift)[0]

    def fork(self, x: Tensor, shift: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The result, and x for the way around the norm."""
        drop = round(2**24 * self.dropout) if self.training else 0
        seeds = torch.randint(-2**31, 2**31, (2,), dtype=torch.int32, device=x.device) if drop else None
        return _Norm.apply(x, shift, self.weight, self.bias, seeds, self.num_groups, self.eps, self.silu, drop)


class ResBlock(dansm.ResBlock):
    """The first convolution's bias goes into the norm's shift, with the time's, the others' into the sum."""

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h, x = self.norm1.fork(x)
        h = convolve(self.conv1, self.resample(h))
        shift = F.linear(time, self.time.weight, self.time.bias + self.conv1.bias)
        h = convolve(self.conv2, self.norm2(h, shift))
        x = self.resample(x)
        bias = self.conv2.bias
        if isinstance(self.skip, nn.Conv2d):
            x = convolve(self.skip, x)
            bias = bias + self.skip.bias
        return _Sum.apply(x, h, bias, self.scale)


def convolve(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """The convolution of x without the layer's bias."""
    return F.conv2d(x, layer.weight, None, layer.stride, layer.padding)


class Attention(dansm.Attention):
    """Its 1×1 convolutions are matrix products of (N, pixels, C), as the numbers lie in memory."""

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h, x = self.norm.fork(x)
        h = rearrange(h, "b c h w -> b 1 (h w) c")
        q, k, v = F.linear(h, self.qkv.weight.flatten(1), self.qkv.bias).chunk(3, dim=3)
        h = F.linear(F.scaled_dot_product_attention(q, k, v), self.out.weight.flatten(1))
        return _Sum.apply(x, rearrange(h, "b 1 (h w) c -> b c h w", h=x.shape[2]), self.out.bias, self.scale)


class Resample(dansm.Resample):
    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.conv(_Resample.apply(x, True) if self.up else x)


class Double(nn.Upsample):
    def forward(self, x: Tensor) -> Tensor:
        return _Resample.apply(x, True)


class Halve(nn.AvgPool2d):
    def forward(self, x: Tensor) -> Tensor:
        return _Resample.apply(x, False)


REPLACED_BY = {dansm.Norm: Norm, dansm.ResBlock: ResBlock, dansm.Attention: Attention,
               dansm.Resample: Resample, nn.Upsample: Double, nn.AvgPool2d: Halve}


def fuse(net: dansm.UNet) -> dansm.UNet:
    """Let the network's layers run through the kernels, in training and in sampling. Its weights stay the same. Raises
    an error, before it changes a layer, if the first kernel cannot be compiled on this device or differs from torch."""
    x = torch.arange(64.0, device=next(net.parameters()).device).reshape(1, 4, 4, 4)
    y, _ = _Norm.apply(x, None, x.new_ones(4), x.new_zeros(4), None, 1, 1e-6, False, 0)
    torch.testing.assert_close(y, F.group_norm(x, 1, eps=1e-6), atol=1e-4, rtol=1e-4)
    for layer in net.modules():
        layer.__class__ = REPLACED_BY.get(type(layer), type(layer))
    return net.to(memory_format=torch.channels_last)
