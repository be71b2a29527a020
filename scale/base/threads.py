"""Work that threads do ahead of whoever needs it, and work that needs no threads of torch's."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Lock

import torch

SETTING = Lock()  # held while a thread's number of torch's threads is set


def ahead(work: Callable, items: Iterable, *, threads: int, depth: int) -> Iterator:
    """Yield work(item) for each item in turn, computed in threads up to `depth` items before it is asked for.

    An exception of `work` is raised here in its turn. When closed it drops what has not begun and waits for the rest.
    """
    pool, waiting = ThreadPoolExecutor(threads), deque()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread for what this thread computes on the CPU; other threads keep their number.

    Eigenvalues of a matrix of 1,000 rows take one thread 0.07 s, and two threads 7 s where other work has a core: they
    wait for each other in each of many small products.
    """
    before = set_own_threads(1)
    try:
        yield
    finally:
        set_own_threads(before)


def set_own_threads(count: int) -> int:
    """Let torch use `count` threads for what this thread computes; returns how many they were. `torch.set_num_threads`
    sets the number of all later threads too, which another thread sets back."""
    with SETTING, ThreadPoolExecutor(1) as another:
        before = torch.get_num_threads()
        usual = another.submit(torch.get_num_threads).result()
        torch.set_num_threads(count)
        another.submit(torch.set_num_threads, usual).result()
    return before


def use_own_stream(device: torch.device) -> None:
    """Let what this thread gives a GPU not wait for what others gave it before: an initializer of threads."""
    if device.type == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream(device))
