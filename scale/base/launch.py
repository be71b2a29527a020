"""Launching Triton kernels, and compiling many of them at once: each takes about a second, and threads would wait for
each other, as most of it is Python."""

import importlib
import multiprocessing
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass

import torch
from torch import Tensor

LONGEST = 120  # seconds that kernels may take to be compiled ahead
MOST = 16  # processes that compile at once

_asked = set()  # variants of kernels that were compiled ahead
_compilers: "Compilers | None" = None  # inside `compiling_ahead`
_compiling = []  # processes that nobody has waited for


def launch(kernel, grid: tuple[int, ...], *arguments, num_warps: int = 8, **options):
    """Run kernel[grid](*arguments) and return the compiled kernel. Inside `compiling_ahead` it is only compiled, and
    None returned. options: more of Triton's, such as num_stages."""
    options |= dict(num_warps=num_warps)
    if _compilers is None:
        return kernel[grid](*arguments, **options)
    variant = _compilers.card, kernel, *sorted(options.items()), *map(_kind, kernel.params, arguments)
    if variant not in _asked:
        if not _asked:
            _compilers.ask(_compile_driver)
        _asked.add(variant)
        _compilers.ask(_compile, kernel.__module__, kernel.__name__, list(map(Memory.of, arguments)), options)
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
    return _compilers is not None


@contextmanager
def compiling_ahead(device: torch.device, wait: bool = True) -> Iterator[None]:
    """Compile the kernels that are launched inside, all at once in other processes, without running them.

    wait  until they are compiled, and those of contexts before that did not wait; a kernel that is launched too early
          is compiled a second time
    A network's fifty kernels take half a minute one after the other. Triton keeps what it compiles in files, where this
    process finds it. Where processes cannot be forked, as in Windows or in a daemon, nothing is compiled ahead, and no
    kernel runs inside all the same. On a CPU nothing changes.
    """
    global _compilers
    if device.type != "cuda":
        yield
        return
    _compilers = asked = Compilers(torch.cuda.get_device_capability(device))
    try:
        yield
    finally:
        _compilers = None
        _compiling.extend(asked.ending())
        if wait:
            _wait()


def _wait() -> None:
    """Wait for the processes. What they did not compile, the launch does, or raises what is wrong."""
    end = time.monotonic() + LONGEST
    for process in _compiling:
        process.join(max(0.0, end - time.monotonic()))
        process.kill()
        process.join()
    _compiling.clear()


def on(device: torch.device) -> AbstractContextManager:
    """Make a GPU the current one, where Triton launches."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def starter(kernel, constants: tuple, device: torch.device) -> Callable:
    """A function of the grid and the arguments, tensors or their addresses, that runs a compiled kernel: by what its
    `kernel[grid]` comes to, if that is as in Triton 3.6, and nobody watches what is launched."""
    try:
        from triton import knobs
        from triton.runtime import driver

        runtime, stream_of = knobs.runtime, driver.active.get_current_stream
        run, function, metadata = kernel.run, kernel.function, kernel.packed_metadata
        watching = runtime.launch_enter_hook.calls, runtime.launch_exit_hook.calls
    except (ImportError, AttributeError):
        return lambda grid, *arguments: kernel[grid](*arguments, *constants)
    index = device.index

    def start(grid, *arguments):
        if any(watching):
            kernel[grid](*arguments, *constants)
        else:
            run(*grid, stream_of(index), function, metadata, None, None, None, *arguments, *constants)

    return start


# ------------ The processes that compile ------------------------------------------------------------------------------


class Compilers:
    """Processes that take tasks as they come, each in its turn. They know a GPU's type, `card`, and use none."""

    def __init__(self, card: tuple[int, int]):
        self.card = card
        self.most = 0  # where none may be forked, or for a GPU of another maker
        forks = "fork" in multiprocessing.get_all_start_methods() and not multiprocessing.current_process().daemon
        if forks and not torch.version.hip:
            cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
            self.most = max(1, min(MOST, cores))
        self.processes, self.ends = [], []  # of their pipes, where tasks go in
        self.turns = 0

    def ask(self, function, *arguments) -> None:
        """Have a function called by one of them. There is one more for each task until there are enough."""
        if not self.most:
            return
        with suppress(OSError):  # no memory for a process, or it was killed: then the launch compiles
            if len(self.processes) < self.most:
                self._start()
            self.ends[self.turns % len(self.ends)].send((function, arguments))
        self.turns += 1

    def _start(self) -> None:
        with suppress(ImportError):  # its files are looked at once, not by each process
            from triton.runtime.cache import triton_key

            triton_key()
        context = multiprocessing.get_context("fork")
        out, end = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(out, [*self.ends, end], self.card), daemon=True)
        with warnings.catch_warnings(), out:
            warnings.simplefilter("ignore", DeprecationWarning)  # threads of this process hold nothing that they need
            process.start()
        self.processes.append(process)
        self.ends.append(end)

    def ending(self) -> list[multiprocessing.Process]:
        """The processes, which end when all tasks are done."""
        for end in self.ends:
            end.close()
        return self.processes


@dataclass
class Memory:
    """What Triton asks a tensor for."""

    dtype: torch.dtype
    address: int

    @classmethod
    def of(cls, argument):
        """A tensor's; other arguments stay what they are."""
        return cls(argument.dtype, argument.data_ptr() % 16) if isinstance(argument, Tensor) else argument

    def data_ptr(self) -> int:
        return self.address


class Target:
    """A driver of Triton's that knows what to compile for and nothing else."""

    def __init__(self, capability: tuple[int, int]):
        self.capability = capability

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 10 * self.capability[0] + self.capability[1], 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def _work(tasks, ends: list, card: tuple[int, int]) -> None:
    """Do tasks until the process that asks closes its end of the pipe or dies. ends: those that were copied here."""
    from triton.runtime import driver

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that waits decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for end in ends:
        end.close()
    driver.set_active(Target(card))
    with suppress(EOFError):
        while True:
            function, arguments = tasks.recv()
            with suppress(Exception):
                function(*arguments)


def _compile(module: str, name: str, arguments: list, options: dict) -> None:
    """Compile a kernel for such arguments, and what launches it, into the files where Triton looks for them."""
    kernel = getattr(importlib.import_module(module), name)
    with suppress(AttributeError):  # before Triton 3.3
        kernel.device_caches.clear()  # of the driver before
    compiled = kernel.warmup(*arguments, grid=(1,), **options)
    from triton.backends.nvidia.driver import CudaLauncher

    CudaLauncher(compiled.src, compiled.metadata)


def _compile_driver() -> None:
    """Compile what Triton calls a GPU by."""
    from triton.backends.nvidia.driver import CudaUtils

    CudaUtils()
