"""Noises that depend on a seed and their place alone, so that every GPU draws the same.

`torch.randn` shares its random numbers out among the threads that a GPU runs at once, and cards differ in how many
these are: from one seed they draw different noises once a tensor is large. Here each four numbers have a counter of
their own, their row and column, which Philox scrambles with the seed (Salmon et al. 2011). Box and Muller's formula
turns two whole numbers into two normal ones (1958), by additions, products and roots alone, which all devices round
alike: logarithm, sine and cosine are Cephes' polynomials. So `draw_kernels` draws the same to the last bit.
"""

import math

import numpy as np
import torch
from torch import Tensor

WORD = 2**32 - 1
FACTORS = 0xD2511F53, 0xCD9E8D57  # of Philox 4×32, and what is added to its keys:
WEYL = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10
LOGARITHM = (7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1, -1.6668057665e-1,
             2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1)
SINE = -1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1
COSINE = 2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2
LN2 = 0.693359375, -2.12194440e-4  # in two parts, the first of few bits
AT_ONCE = 2**18  # counters: their products take 2 MB a piece


def key_of(seed: int, *stream: int) -> int:
    """The 64 bits that tell one stream of a seed from all others."""
    low, high = np.random.SeedSequence([seed, 0xDA45, *stream]).generate_state(2, np.uint32).tolist()
    return low | high << 32


def fill(noise: Tensor, key: int, first: int) -> Tensor:
    """Fill noise: (rows, D) of any float type with the rows from number `first` on, N(0, I). Returns it."""
    rows = torch.arange(first, first + len(noise), device=noise.device)[:, None]
    columns = torch.arange(-(-noise.shape[1] // 4), device=noise.device)
    for start in range(0, len(columns), AT_ONCE):
        some = columns[start : start + AT_ONCE]
        at_once = max(1, AT_ONCE // len(some))
        for part, of_part in zip(noise[:, 4 * start :].split(at_once), rows.split(at_once), strict=True):
            words = philox(*torch.broadcast_tensors(some, of_part), key)
            numbers = torch.stack([*normal(*words[:2]), *normal(*words[2:])], 2).flatten(1)[:, : part.shape[1]]
            part[:, : numbers.shape[1]] = numbers
    return noise


def philox(column: Tensor, row: Tensor, key: int) -> tuple[Tensor, ...]:
    """Four random whole numbers below 2³² for each counter, int64 like these."""
    a, b, c, d = column, row, torch.zeros_like(row), torch.zeros_like(row)
    first, second = key & WORD, key >> 32
    for _ in range(ROUNDS):
        ab, cd = a * FACTORS[0], c * FACTORS[1]  # of 64 bits, whatever the sign says
        a, b, c, d = (cd >> 32 & WORD) ^ b ^ first, cd & WORD, (ab >> 32 & WORD) ^ d ^ second, ab & WORD
        first, second = first + WEYL[0] & WORD, second + WEYL[1] & WORD
    return a, b, c, d


def normal(word: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent normal numbers, float32, from two whole numbers below 2³²."""
    square = (logarithm(word.float() * 2**-32 + 2**-33) * -2).clamp(min=0)
    radius = square.double().sqrt().float()  # torch.sqrt of float32 rounds another way on some CPUs
    quarter = other >> 30
    angle = ((other & 2**30 - 1).float() * 2**-30 - 0.5) * (math.pi / 2)  # within its quarter of the circle
    square = angle * angle
    sine = polynomial(SINE, square) * square * angle + angle
    cosine = polynomial(COSINE, square) * square * square - square * 0.5 + 1
    turned = quarter % 2 == 1
    x, y = torch.where(turned, -sine, cosine), torch.where(turned, cosine, sine)
    radius = torch.where(quarter >= 2, -radius, radius)
    return x * radius, y * radius


def logarithm(x: Tensor) -> Tensor:
    """ln x of float32 numbers from 2⁻¹²⁶ on."""
    bits = x.view(torch.int32)
    fraction = (bits & 0x7FFFFF | 0x3F800000).view(torch.float32)
    large = fraction > math.sqrt(2)
    exponent = (bits >> 23) - 127 + large.int()
    x = torch.where(large, fraction * 0.5, fraction) - 1
    square = x * x
    rest = polynomial(LOGARITHM, x) * x * square
    rest = rest + exponent * LN2[1] - square * 0.5
    return x + rest + exponent * LN2[0]


def polynomial(factors: tuple[float, ...], x: Tensor) -> Tensor:
    """Σ factors[i] · x^(n − i), each product and sum rounded."""
    total = torch.full_like(x, factors[0])
    for factor in factors[1:]:
        total = total * x + factor
    return total
