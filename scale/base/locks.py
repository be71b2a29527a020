"""Locks on files. They belong to the process: however it ends, the lock ends with it."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from dansm import BadInput

from .text import warn


class InUse(BadInput):
    """Another process works in the folder."""


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Hold a lock on the file `path`, waiting until no other process does."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def owning(folder: Path, purpose: str = "trained") -> Iterator[None]:
    """Be the only process that works in `folder`. Raises InUse, naming the process that does already.

    purpose  completes "… is being … into by process 12 on host", as "trained" does
    """
    with open(folder / ".lock", "a+") as file:
        if not try_alone(file):
            file.seek(0)
            holder = file.read(200).strip() or "another process"
            raise InUse(f"{folder} is being {purpose} into by {holder}: expected another --out, or that it has ended")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def try_alone(file: IO) -> bool:
    """Lock an open file unless another process has it. Without locks in the file system, warn and let everyone in."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        warn(f"the folder cannot be locked ({error.strerror}): take care that no other run trains into it")
    return True
