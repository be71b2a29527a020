"""What several processes do together."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as group

from ..base.processes import ranks, wait_for_all


def everyones(value) -> list:
    """The value of every process, by rank. Every process must call it."""
    values = [value] * ranks()[1]
    if len(values) > 1:
        group.all_gather_object(values, value)
    return values


@contextmanager
def first_before_others() -> Iterator[None]:
    """Let the first process pass the block before the others, which find what it has downloaded."""
    if ranks()[0] > 0:
        wait_for_all()
    yield
    if ranks()[0] == 0:
        wait_for_all()
