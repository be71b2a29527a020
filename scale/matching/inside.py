"""Pools and couplings inside other people's steps: in what torch.compile compiles, and in the wrong process.

To the compiler each is one operation that it does not look into, also with fullgraph=True.
"""

import difflib
import hashlib
import inspect
from functools import partial
from itertools import count
from multiprocessing.context import get_spawning_popen
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from dansm import BadInput, NoisePool, Semidiscrete

from ..base.text import warn

SOURCES = WeakValueDictionary()  # of noises, by handle
_handles = count()


def matched(pool: NoisePool, x: Tensor, labels: Tensor | None, mask: Tensor | None = None) -> Tensor:
    """pool(x, labels), or pool(x, labels, mask), for code that is being compiled."""
    check_real({"the batch is": x, "the labels are": labels, "the mask is": mask})
    return torch.ops.dansm.matched(x.detach(), labels, mask, pool.calls, pool.handle)


def fresh(pool: NoisePool, x: Tensor) -> Tensor:
    """pool.fresh(x), for code that is being compiled."""
    check_real({"the batch is": x})
    return torch.ops.dansm.fresh(x.detach(), pool.calls, pool.handle)


def drawn(coupling: Semidiscrete, count: int, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """coupling.draw(count, labels), for code that is being compiled."""
    check_real({"the labels are": labels})
    return torch.ops.dansm.drawn(count, labels, coupling.calls, coupling.handle)


def check_real(given: dict[str, Tensor | None]) -> None:
    """BadInput for complex numbers, for which Inductor fails. What else is wrong is refused when the operation runs."""
    for told, tensor in given.items():
        if isinstance(tensor, Tensor) and tensor.is_complex():
            raise BadInput(f"{told} of {tensor.dtype}: expected real numbers")


# It changes `calls`, so that no call is left out, moved or made one with another; as that is on the CPU, CUDA graphs
# leave it out even where torch has no tag for that.
TAGS = {"tags": [torch.Tag.cudagraph_unsafe]} if hasattr(torch.Tag, "cudagraph_unsafe") else {}


@torch.library.custom_op("dansm::matched", mutates_args=("calls",), **TAGS,
                         schema="(Tensor x, Tensor? labels, Tensor? mask, Tensor(a!) calls, int pool) -> Tensor")
def _matched(x, labels, mask, calls, pool):
    calls += 1
    return SOURCES[pool](x, labels) if mask is None else SOURCES[pool](x, labels, mask)


@torch.library.custom_op("dansm::fresh", mutates_args=("calls",), **TAGS,
                         schema="(Tensor x, Tensor(a!) calls, int pool) -> Tensor")
def _fresh(x, calls, pool):
    calls += 1
    return SOURCES[pool].fresh(x)


@torch.library.custom_op("dansm::drawn", mutates_args=("calls",), **TAGS,
                         schema="(SymInt count, Tensor? labels, Tensor(a!) calls, int coupling) -> (Tensor, Tensor)")
def _drawn(count, labels, calls, coupling):
    calls += 1
    z, taken = SOURCES[coupling].draw(count, labels)
    return z.clone(), taken.clone()  # not parts of what is drawn ahead, which may begin anywhere in memory


@_matched.register_fake
@_fresh.register_fake
def _like_x(x, *others):
    return torch.empty_like(x)


@_drawn.register_fake
def _like_drawn(count, labels, calls, coupling):
    z = torch.empty(count, *SOURCES[coupling].shape, device=SOURCES[coupling].device)
    return z, z.new_empty(count, dtype=torch.int64)


PLACE = {"process", "rank", "ranks", "multiprocessors", "counted"}  # of what a state was made for: who draws, not what


def card(device: torch.device) -> dict:
    """What of a device decides, besides its type, which noises a seed gives: the multiprocessors of a GPU."""
    if device.type != "cuda":
        return {}
    return {"multiprocessors": torch.cuda.get_device_properties(device).multi_processor_count}


def as_known_to(state, made_for: dict) -> dict:
    """What this is made for, without the card where a state of an earlier version does not tell it."""
    saved = state.get("made_for") if isinstance(state, dict) else None
    known = not isinstance(saved, dict) or "multiprocessors" in saved
    return made_for if known else {name: value for name, value in made_for.items() if name != "multiprocessors"}


def from_elsewhere(state, made_for: dict) -> bool:
    """Whether a state is another process's, or of a pool that others shared, and made for the same otherwise."""
    saved = state.get("made_for") if isinstance(state, dict) else None
    if not isinstance(saved, dict) or saved == made_for:
        return False
    kept = [{name: value for name, value in made.items() if name not in PLACE} for made in (saved, made_for)]
    return kept[0] == kept[1]


def stream_after(state) -> int:
    """A stream that no process has drawn from, for one that goes on with this state of another: a number of its own for
    each dictionary, list or tuple of tensors and plain values."""
    digest, waiting = hashlib.blake2b(digest_size=6), [state]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            part = [*part, *part.values()]
        if isinstance(part, list | tuple):
            waiting += [*part, len(part)]
        elif isinstance(part, Tensor):
            digest.update(part.cpu().contiguous().flatten().view(torch.uint8).numpy())  # NumPy has no bfloat16
        else:
            digest.update(f"{part!r};".encode())
    return int.from_bytes(digest.digest(), "big")


def warn_of_fresh_noises(saved: dict, made_for: dict) -> None:
    where = [f"rank {made['rank']} of {made['ranks']}" if made.get("ranks", 1) > 1 else
             f"process {made.get('process', 0)}" for made in (saved, made_for)]
    if saved.get("counted") != made_for.get("counted"):
        where[0] += " and an earlier version, which drew other noises on GPUs"
    elif saved.get("multiprocessors") != made_for.get("multiprocessors"):
        where = [f"{place} on a GPU of {made.get('multiprocessors')} multiprocessors"
                 for place, made in zip(where, (saved, made_for), strict=True)]
    warn(f"the saved state is of {where[0]}, this is {where[1]}: it goes on with noises that nobody has drawn")


def check_arguments(called: str, kind: type, arguments: tuple, settings: dict) -> None:
    """TypeError for arguments that the class does not take, in the words of who calls it by that name."""
    taken = inspect.signature(partial(kind.__init__, None))  # without self
    try:
        taken.bind(*arguments, **settings)
    except TypeError as error:
        unknown = [name for name in settings if name not in taken.parameters]
        near = difflib.get_close_matches(unknown[0], taken.parameters, 1, cutoff=0.5) if unknown else ()
        raise TypeError(f"{called}(…): {error}" + "".join(f" (the nearest is {name})" for name in near)) from None


class OfOneProcess:
    """What draws noises, which are to be drawn by one process alone, also from code that is compiled."""

    @property
    def _called(self) -> str:
        """The name by which users make one."""
        return "Semidiscrete" if isinstance(self, Semidiscrete) else "NoisePool"

    @torch.inference_mode(False)
    def _enter(self) -> None:
        """Get a handle, by which operations find this as long as it is there, and a count of what they ask."""
        self.calls = torch.zeros((), dtype=torch.int64, device="cpu")
        self.handle = next(_handles)
        SOURCES[self.handle] = self

    def __setstate__(self, state: dict) -> None:  # of a copy
        self.__dict__.update(state)
        self._enter()

    def check_worker(self) -> None:
        """BadInput in a worker of a DataLoader."""
        if get_worker_info() is not None:
            raise BadInput(f"a {self._called} is called in a worker of a DataLoader, where each would hand out "
                           "the same noises: expected a call in the process that trains, on the loader's batches")

    def __getstate__(self) -> dict:
        """BadInput where it is on the way to another process, as to a worker of a DataLoader."""
        if get_spawning_popen() is not None:
            raise BadInput(f"a {self._called} is sent to another process, where it would hand out the same "
                           "noises: expected one made where it is called, in the process that trains")
        return self.__dict__
