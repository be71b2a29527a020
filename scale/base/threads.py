"""Work that threads do ahead of whoever needs it."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor


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
