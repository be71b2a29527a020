"""Whether the Triton kernels work on a GPU: tried once, and where they do not, matching goes the plain way."""

import importlib
from functools import cache
from types import ModuleType

import torch

from ..base.text import warn


@cache
def working(module: str, device: torch.device, *way) -> ModuleType | None:
    """A module of kernels of this room if its `try_out(device, *way)` passes, else None with a warning.

    module  "kernels", "group_kernels", "few_kernels", "search_kernels", "draw_kernels", "auction" or
            "semidiscrete_kernels"
    way     for "kernels" and "group_kernels": a pool's dtype and tf32; for "few_kernels" and "draw_kernels": its dtype
    """
    if device.type != "cuda":
        return None
    try:
        found = importlib.import_module(f".{module}", __package__)
        found.try_out(device, *way)
    except Exception as error:  # Triton is missing, too old, without a compiler, or does not know the GPU
        warn(f"matching on {device} goes the plain way, with the same result: {error!r}")
        return None
    return found
