"""Launching kernels of Triton's, and compiling many at once: each takes about a second."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

_compiler, _compiling = None, {}


def launch(kernel, grid: tuple[int, ...], *arguments, num_warps: int = 8):
    """kernel[grid](*arguments) → the compiled kernel; or only its compilation, and None, in `compiling_ahead`."""
    if _compiler is None:
        return kernel[grid](*arguments, num_warps=num_warps)
    kind = kernel, num_warps, *(each.dtype if isinstance(each, Tensor) else each for each in arguments)
    if kind not in _compiling:
        _compiling[kind] = _compiler.submit(kernel.warmup, *arguments, grid=grid, num_warps=num_warps)
    return None


@contextmanager
def compiling_ahead(device: torch.device):
    """What is launched inside is not computed: the kernels are only compiled, all at once in threads, and are there at
    the end. Of a network's fifty, one after the other takes half a minute. Elsewhere than on a GPU nothing is."""
    global _compiler
    if device.type != "cuda":
        yield
        return
    here = torch.cuda.current_device()  # a new thread's would be the first
    with ThreadPoolExecutor(os.cpu_count(), initializer=torch.cuda.set_device, initargs=(here,)) as _compiler:
        try:
            yield
        finally:
            waiting, _compiler = list(_compiling.values()), None
            _compiling.clear()
            for each in waiting:
                each.exception()  # waits; what does not compile says so where it is launched
