"""EfficientNet-Lite0's features on a GPU, with its weights and in float32, where the layers of torch mostly wait for
memory: convolutions of one pixel are products of (pixels, channels), and Triton kernels do all between two of them."""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn

from ..base.launch import compiling_ahead, launch, on

ROWS, COLUMNS = 32, 32  # pixels and channels of one program
DIFFERENT = 1e-2  # from torch's features, relative to the largest: torch rounds products to 11 bits


@triton.jit
def _relu6(x):
    return tl.minimum(tl.maximum(x, 0.0), 6.0)


@triton.jit(do_not_specialize=["height", "width", "out_height", "out_width", "pad", "rows"])
def _depthwise(y, x, weight, before, after, height, width, out_height, out_width, pad, rows, channels,
               SIDE: tl.constexpr, STRIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """y = relu6(after + convolution of relu6(before + x)), each channel by itself. x: (N, height, width, channels), y:
    (N, out_height, out_width, channels), `rows` pixels; weight: (SIDE, SIDE, channels), before, after: (channels,)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = column < channels
    image = row // (out_height * out_width)
    top = row // out_width % out_height * STRIDE - pad
    left = row % out_width * STRIDE - pad
    added = tl.load(before + column, mask=there, other=0.0)[None, :]
    total = tl.zeros([ROWS, COLUMNS], tl.float32) + tl.load(after + column, mask=there, other=0.0)[None, :]
    for line in range(SIDE):  # not unrolled: a program would need more registers than there are
        inside = (row < rows) & (top + line >= 0) & (top + line < height)
        pixel = (image * height + top + line) * width + left
        for place in tl.static_range(SIDE):
            here = (inside & (left + place >= 0) & (left + place < width))[:, None]
            at = (pixel + place).to(tl.int64)[:, None] * channels + column[None, :]
            v = _relu6(tl.load(x + at, mask=here & there[None, :], other=0.0) + added)
            w = tl.load(weight + (line * SIDE + place) * channels + column, mask=there, other=0.0)
            total += tl.where(here, v, 0.0) * w[None, :]
    at = row.to(tl.int64)[:, None] * channels + column[None, :]
    tl.store(y + at, _relu6(total), mask=(row < rows)[:, None] & there[None, :])


class FastLite0:
    """The pooled features of an EfficientNet-Lite0 `net`, for x: (N, 3, H, W) float32 in [−1, 1] → (N, 1280).

    A batch norm is a factor in the weights before it and a sum after. Sums after products wait for the next kernel, so
    that here x lacks an `offset` for each channel. Raises an error where kernels cannot be compiled, or where features
    differ from torch's.
    """

    def __init__(self, net: nn.Module):
        self.stem, bias = folded(net._conv_stem, net._bn0)
        self.stem_padding, self.stem_stride = net._conv_stem.static_padding, net._conv_stem.stride
        self.blocks = []
        offset = bias
        for block in net._blocks:
            self.blocks.append(Block(block, offset))
            offset = self.blocks[-1].offset
        head, bias = folded(net._conv_head, net._bn1)
        self.head = head[:, :, 0, 0].T.contiguous()
        self.head_bias = bias + offset @ self.head
        self.check(net)

    @torch.no_grad()
    def check(self, net: nn.Module) -> None:
        device = self.head.device
        x = 2 * torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(device) - 1
        with compiling_ahead(device):
            self(x)
        expected = net.extract_features(x).mean((2, 3))
        torch.testing.assert_close(self(x), expected, rtol=0, atol=DIFFERENT * expected.abs().max().item())

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        with on(x.device):
            x = F.conv2d(self.stem_padding(x), self.stem, stride=self.stem_stride)
            x = x.permute(0, 2, 3, 1).contiguous()
            for block in self.blocks:
                x = block(x)
            x = (x.flatten(1, 2) @ self.head).add_(self.head_bias).clamp_(0, 6)
            return x.mean(1)


class Block:
    """One block of the network: x (N, H, W, C), which lacks `offset` (C,), → (N, H', W', C'), which lacks
    `self.offset` (C',)."""

    def __init__(self, block: nn.Module, offset: Tensor):
        self.expand, self.before = None, offset
        if block._block_args.expand_ratio != 1:
            weight, bias = folded(block._expand_conv, block._bn0)
            self.expand = weight[:, :, 0, 0].T.contiguous()
            self.before = bias + offset @ self.expand
        conv = block._depthwise_conv
        weight, self.after = folded(conv, block._bn1)
        self.weight = weight[:, 0].permute(1, 2, 0).contiguous()
        self.side, self.stride = conv.kernel_size[0], conv.stride[0]
        self.pad, right, *_ = conv.static_padding.padding
        self.padding = self.pad + right
        weight, self.offset = folded(block._project_conv, block._bn2)
        self.project = weight[:, :, 0, 0].T.contiguous()
        settings = block._block_args
        self.adds = block.id_skip and settings.stride == 1 and settings.input_filters == settings.output_filters
        if self.adds:
            self.offset = self.offset + offset

    def __call__(self, x: Tensor) -> Tensor:
        h = self.depthwise(x if self.expand is None else x @ self.expand)
        if not self.adds:
            return h @ self.project
        return x.flatten(0, 2).addmm_(h.flatten(0, 2), self.project).view(x.shape)

    def depthwise(self, x: Tensor) -> Tensor:
        n, height, width, channels = x.shape
        out_height, out_width = ((size + self.padding - self.side) // self.stride + 1 for size in (height, width))
        y = x.new_empty(n, out_height, out_width, channels)
        rows = n * out_height * out_width
        launch(_depthwise, (triton.cdiv(rows, ROWS), triton.cdiv(channels, COLUMNS)), y, x, self.weight, self.before,
               self.after, height, width, out_height, out_width, self.pad, rows, channels, self.side, self.stride,
               ROWS, COLUMNS, num_warps=4)
        return y


def folded(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """The weight of a convolution without bias and the norm after it, as one convolution, and its bias."""
    factor = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    weight = conv.weight.double() * factor[:, None, None, None]
    return weight.float(), (norm.bias.double() - norm.running_mean.double() * factor).float()
