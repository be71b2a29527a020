"""Launching Triton kernels, and compiling many of them at once: each takes about a second."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

_compiler: ThreadPoolExecutor | None = None
_compiling = {}


def launch(kernel, grid: tuple[int, ...], *arguments, num_warps: int = 8, **options):
    """Run kernel[grid](*arguments) and return the compiled kernel. Inside `compiling_ahead` it is only compiled, and
    None returned. options: more of Triton's, such as num_stages."""
    options |= dict(num_warps=num_warps)
    if _compiler is None:
        return kernel[grid](*arguments, **options)
    variant = kernel, *sorted(options.items()), *map(_kind, kernel.params, arguments)
    if variant not in _compiling:
        _compiling[variant] = _compiler.submit(kernel.warmup, *arguments, grid=grid, **options)
    return None


def _kind(parameter, argument) -> tuple | type:
    """What Triton compiles a kernel anew for: types, constants, and whether memory and whole numbers are multiples of
    16."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if parameter.is_constexpr or argument is None:
        return type(argument), argument
    if isinstance(argument, int) and not parameter.do_not_specialize:
        return int, argument == 1, argument % 16 == 0, argument.bit_length() > 31
    return type(argument)


def compiles_only() -> bool:
    """Whether this is inside `compiling_ahead`, where no kernel may run: the results of others are not there."""
    return _compiler is not None


@contextmanager
def compiling_ahead(device: torch.device) -> Iterator[None]:
    """Compile the kernels that are launched inside, all at once in threads, without running them.

    A network's fifty kernels take half a minute one after the other. On a CPU nothing changes.
    """
    global _compiler
    if device.type != "cuda":
        yield
        return
    current = torch.cuda.current_device()  # a new thread would take the first
    with ThreadPoolExecutor(os.cpu_count(), initializer=torch.cuda.set_device, initargs=(current,)) as _compiler:
        try:
            yield
        finally:
            waiting, _compiler = list(_compiling.values()), None
            _compiling.clear()
            for compilation in waiting:
                compilation.exception()  # waits; what does not compile raises where it is launched


def on(device: torch.device) -> AbstractContextManager:
    """Make a GPU the current one, where Triton launches."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
