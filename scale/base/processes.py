"""Several processes, as torchrun starts them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as group

from dansm import BadInput

from .text import console

PATIENCE = timedelta(days=1)  # the others wait while the first process downloads, hashes or measures all images


def ranks() -> tuple[int, int]:
    """(the rank of this process, the number of processes): (0, 1) where torch.distributed is not set up."""
    if group.is_available() and group.is_initialized():
        return group.get_rank(), group.get_world_size()
    return 0, 1


def wait_for_all() -> None:
    """Wait until every process has come here."""
    if ranks()[1] > 1:
        group.barrier()


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


@contextmanager
def quiet(on: bool) -> Iterator[None]:
    """Keep the console silent, as all processes but the first do."""
    before = console.quiet
    console.quiet = on or before
    try:
        yield
    finally:
        console.quiet = before


@contextmanager
def processes(device: torch.device) -> Iterator[torch.device]:
    """Join the processes that torchrun started, and yield the device of this one. Without torchrun it does nothing."""
    if "RANK" not in os.environ:
        yield device
        return
    from torch.distributed.rendezvous import rendezvous  # cannot be imported where torch was built without it

    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    try:
        store, rank, count = next(rendezvous("env://"))
    except ValueError as error:
        raise BadInput(f"RANK is {os.environ['RANK']} in the environment, as torchrun sets it, but {error}; expected "
                       "all that it sets, or no RANK") from error
    try:
        group.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", rank=rank, world_size=count,
                                 store=group.PrefixStore(_attempt(), store), timeout=PATIENCE)
        group.all_reduce(torch.zeros(1))  # a process that refuses its arguments must not end while others connect
        yield device
        group.barrier()  # gloo aborts a process at times whose group ends while another is at work
    except RuntimeError as error:
        if not _another_ended(error):
            raise
        raise BadInput(f"another process of this run has ended, process {rank} ends too; its message says why"
                       ) from error
    finally:
        if group.is_initialized():
            group.destroy_process_group()


def _another_ended(error: RuntimeError) -> bool:
    """Whether Gloo's error, a plain RuntimeError, says that it lost another process."""
    words = ("connection closed by peer", "connection reset by peer", "connectfullmesh failed", "broken pipe")
    return any(word in str(error).lower() for word in words)


def _attempt() -> str:
    """The name under which the processes find each other, a new one after each restart.

    After a restart torchrun's store still holds the addresses of the processes that died. The count of restarts is
    the same for all on one node only; on several, set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun, which makes
    a new store each time.
    """
    one_node = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
    return f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0) if one_node else 0}"
