"""`draws` in one kernel, in Triton: the same noises to the last bit."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..base.launch import compiling_ahead, launch, on
from . import draws

COUNTERS = 1024  # of a program
COLUMNS = 128, 64, 32, 16  # of them side by side
HALF_PI, ROOT_2 = tl.constexpr(math.pi / 2), tl.constexpr(math.sqrt(2))


def fill(noise: Tensor, key: int, first: int) -> Tensor:
    """`draws.fill` on a GPU."""
    rows, width = noise.shape
    key = key - 2**64 if key >= 2**63 else key
    columns = columns_for(-(-width // 4))
    grid = -(-rows // (COUNTERS // columns)), -(-width // (4 * columns))
    with on(noise.device):
        launch(_fill, grid, noise, key, first, rows, width, COUNTERS // columns, columns, num_warps=4,
               enable_fp_fusion=False)
    return noise


def columns_for(counters: int) -> int:
    """The largest of COLUMNS by which a row of so many counters leaves no more than a sixteenth of them idle; else the
    smallest."""
    return next((columns for columns in COLUMNS if 16 * (-counters % columns) <= counters), COLUMNS[-1])


@triton.jit(do_not_specialize=["key", "first", "rows"])
def _fill(noise, key: tl.int64, first, rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    counter = tl.zeros([ROWS, COLUMNS], tl.uint32)
    a, b, c, d = tl.philox(key, counter + column.to(tl.uint32)[None, :], counter + (first + row).to(tl.uint32)[:, None],
                           counter, counter)
    first_x, first_y = _normal(a, b)
    second_x, second_y = _normal(c, d)
    numbers = tl.join(tl.join(first_x, second_x), tl.join(first_y, second_y)).reshape(ROWS, 4 * COLUMNS)
    place = tl.program_id(1) * (4 * COLUMNS) + tl.arange(0, 4 * COLUMNS)
    at = noise + row.to(tl.int64)[:, None] * width + place[None, :]
    tl.store(at, numbers.to(noise.dtype.element_ty), mask=(row < rows)[:, None] & (place < width)[None, :])


@triton.jit
def _normal(word, other):
    radius = _logarithm(word.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10) * -2
    radius = tl.sqrt_rn(tl.maximum(radius, 0.0))
    quarter = other >> 30
    angle = ((other & 0x3FFFFFFF).to(tl.float32) * 9.313225746154785e-10 - 0.5) * HALF_PI
    square = angle * angle
    sine = (square * -1.9515295891e-4 + 8.3321608736e-3) * square - 1.6666654611e-1
    sine = sine * square * angle + angle
    cosine = (square * 2.443315711809948e-5 - 1.388731625493765e-3) * square + 4.166664568298827e-2
    cosine = cosine * square * square - square * 0.5 + 1
    turned = quarter % 2 == 1
    radius = tl.where(quarter >= 2, -radius, radius)
    return tl.where(turned, -sine, cosine) * radius, tl.where(turned, cosine, sine) * radius


@triton.jit
def _logarithm(x):
    bits = x.to(tl.int32, bitcast=True)
    fraction = (bits & 0x7FFFFF | 0x3F800000).to(tl.float32, bitcast=True)
    large = fraction > ROOT_2
    exponent = ((bits >> 23) - 127 + large.to(tl.int32)).to(tl.float32)
    x = tl.where(large, fraction * 0.5, fraction) - 1
    square = x * x
    rest = x * 7.0376836292e-2 - 1.1514610310e-1
    rest = rest * x + 1.1676998740e-1
    rest = rest * x - 1.2420140846e-1
    rest = rest * x + 1.4249322787e-1
    rest = rest * x - 1.6668057665e-1
    rest = rest * x + 2.0000714765e-1
    rest = rest * x - 2.4999993993e-1
    rest = rest * x + 3.3333331174e-1
    rest = rest * x * square
    rest = rest + exponent * -2.12194440e-4 - square * 0.5
    return x + rest + exponent * 0.693359375


def try_out(device: torch.device, dtype: torch.dtype) -> None:
    """Draw a few rows by the kernel and by `draws` on this device. Raises where they differ or nothing runs."""
    narrow, wide = (torch.empty(20, width, dtype=dtype, device=device) for width in (519, 1024))
    with compiling_ahead(device):  # also for the width that most data have
        for noise in narrow, wide:
            fill(noise, 2**64 - 5, 7)
    for noise in narrow, wide:
        if not torch.equal(fill(noise, 2**64 - 5, 7), draws.fill(torch.empty_like(noise), 2**64 - 5, 7)):
            raise RuntimeError(f"its kernel draws other noises of {dtype} than the plain path")
