"""The noises that samples start from."""

import math
import os
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from .threads import ahead

THREADS = 4  # more gain little: Python makes the generators one after the other
ALONE = 2**18  # numbers that one thread draws sooner than others are started


def path_noise(images: Iterable[int], shape, seed: int = 0, device="cpu") -> Tensor:
    """The noise each image starts from, (len(images), *shape): image 17 is the same in any batch, on any device."""
    images = [int(image) for image in images]
    noise = np.empty((len(images), math.prod(shape)), np.float32)
    threads = min(THREADS, os.cpu_count()) if noise.size > ALONE else 1
    parts = [slice(start, None, threads) for start in range(threads)]
    for _ in ahead(lambda part: _draw(noise[part], images[part], seed), parts, threads=threads, depth=threads):
        pass
    return torch.from_numpy(noise.reshape(-1, *shape)).to(device)


def _draw(noise: np.ndarray, images: Sequence[int], seed: int) -> None:
    """Fill each row of `noise` (N, numbers) with the noise of its image. Threads draw side by side."""
    for row, image in zip(noise, images, strict=True):
        np.random.default_rng([seed, image]).standard_normal(dtype=np.float32, out=row)
