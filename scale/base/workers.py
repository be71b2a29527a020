"""Calls in processes side by side, for work that a single core is busy with for a second or longer."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import starmap
from threading import Thread

import torch


def side_by_side(work: Callable, calls: Sequence[tuple], processes: int) -> Iterator:
    """Yield work(*arguments) for each arguments of `calls` in turn, computed by several processes of one thread each.

    With one process or one call nothing is started, and each is computed here when it is asked for. Otherwise `work`,
    its arguments and its results must be picklable. An exception of `work` is raised here in its turn. When closed,
    as by Ctrl-C, it ends the processes at once.
    """
    processes = min(processes, len(calls))
    if processes <= 1:
        yield from starmap(work, calls)
        return
    before = multiprocessing.active_children()
    context = multiprocessing.get_context("spawn")  # what is forked from a process with threads may hang
    with ProcessPoolExecutor(processes, context, _begin) as executor:
        try:
            waiting = [executor.submit(work, *arguments) for arguments in calls]  # its map would cancel those that end
            yield from (future.result() for future in waiting)
        except BaseException:
            for process in set(multiprocessing.active_children()).difference(before):
                process.terminate()
            raise


def _begin() -> None:
    """Prepare a process: its parent alone answers Ctrl-C, and it ends when that is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
