"""Copies from a GPU to the CPU that begin at once and are waited for when they are needed."""

from collections.abc import Callable

import torch
from torch import Tensor


def copy_to_cpu(x: Tensor) -> Callable[[], Tensor]:
    """Begin to copy x, and return a function that waits for the copy and returns it; x itself if it is on the CPU. It
    does not wait for work that a GPU gets after this call, as `x.cpu()` then would."""
    if not x.is_cuda:
        copy = x.cpu()
        return lambda: copy
    pinned = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    with torch.cuda.device(x.device):
        pinned.copy_(x, non_blocking=True)
        done = torch.cuda.Event()
        done.record()

    def wait() -> Tensor:
        done.synchronize()
        return pinned.clone()  # whoever keeps it keeps no pinned memory

    return wait
