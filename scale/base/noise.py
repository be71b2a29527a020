"""The noises that samples start from."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor


def path_noise(images: Iterable[int], shape, seed: int = 0, device="cpu") -> Tensor:
    """The noise each image starts from, (len(images), *shape): image 17 is the same in any batch, on any device."""
    draws = [np.random.default_rng([seed, int(image)]).standard_normal(tuple(shape), np.float32) for image in images]
    return torch.from_numpy(np.array(draws, np.float32).reshape(-1, *shape)).to(device)
