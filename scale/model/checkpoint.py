"""Checkpoints: a run's folder keeps the last few, each written whole or not at all, each read without running code
from it, and none with a changed bit. Also the averaged weights alone, as safetensors, and the lock of the folder."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dansm import BadInput, Diffusion, UNet

from ..base.files import make_folder, replacing
from ..base.machine import lacks_memory
from .recipe import make_flow

VERSION = 2
NAME = re.compile(r"checkpoint-(\d{8,})\.pt")
BEFORE = "checkpoint.pt"  # the only one of a run's folder, when versions were 1
MARK = b"sha256:"  # then 64 hexadecimal digits end the file, of all bytes before them
DESCRIBED = ("dansm", "network", "flow", "times", "step", "decay", "data", "recipe")  # beside exported weights
ADDED = ("latents", "images")  # there too, but not by earlier versions
EXPECTED = "expected a file that dansm train wrote"


# ---------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------


def save(out: Path, state: dict, keep: int = 3, *, drop: Iterable[Path] = ()) -> Path:
    """Write `state` as checkpoint-<its step>.pt into the folder `out`; returns the file's path.

    state   {"network": settings, "recipe": {...}, "training": {"step": int, "averages": [{"decay": float, "weights":
            state_dict}, ...], ...}, "ranks": [{...} of each process], ...}, of tensors and plain values; the first
            average is the one to sample from
            "latents": what is known of those that the run is of, see `latents.known_of`; None where it is of images
    keep    how many to keep, this one included; at least 1
    drop    checkpoints that do not lead to this one: of another run, or damaged ones that were not gone on from

    A kill at any moment leaves the checkpoints before this one whole: it is written beside them, brought to the disk,
    renamed, and only then the oldest go, with those to drop and those of later steps. Raises BadInput where the disk
    is full or fails, with what was there before untouched.
    """
    path = out / f"checkpoint-{state['training']['step']:08d}.pt"
    remove_unfinished(out)
    write(path, state)
    others, drop = [other for other in checkpoints(out) if NAME.fullmatch(other.name) and other != path], set(drop)
    strange = [other for other in others if other in drop or _step(other) > _step(path)]
    past = [other for other in others if other not in strange]
    for other in strange + past[max(keep, 1) - 1 :]:
        other.unlink(missing_ok=True)
    return path


def write(path: Path, state: dict) -> None:
    """Write `state` to the file `path`, whole or not at all, with a checksum that `load` asks for.

    Torch's own checksums leave the file's table of contents out, in which a changed bit can hide a tensor. Ours is
    the comment of the zip archive that the file is, so that every reader of those still takes it.
    """
    with replacing(path) as partial, open(partial, "w+b") as file:
        torch.save({"dansm": VERSION, **state}, file)
        file.seek(-2, os.SEEK_END)  # a zip archive ends in the length of its comment, and the comment
        file.write((len(MARK) + 64).to_bytes(2, "little") + MARK)
        file.write(_digest(file, file.tell()))
        file.flush()
        os.fsync(file.fileno())


def _digest(file, size: int) -> bytes:
    """64 hexadecimal digits of the first `size` bytes of an open file, which is left behind them."""
    digest, block = hashlib.sha256(), memoryview(bytearray(2**22))
    file.seek(0)
    while size > 0 and (read := file.readinto(block[: min(size, len(block))])):
        digest.update(block[:read])
        size -= read
    return digest.hexdigest().encode()


def remove_unfinished(out: Path) -> None:
    """Remove what a kill left of a checkpoint. For the one process that may write into `out`, see `lock`."""
    for partial in out.glob("checkpoint-*.partial"):
        partial.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------


def checkpoints(out: Path) -> list[Path]:
    """The checkpoints in the folder `out`, the newest first; one of version 1 is the oldest."""
    return sorted((path for path in out.glob("checkpoint*.pt") if _step(path) is not None), key=_step, reverse=True)


def newest(out: Path) -> Path | None:
    """The checkpoint of the most steps in the folder `out`, None where there is none."""
    return next(iter(checkpoints(out)), None)


def _step(path):
    """The step in a checkpoint's name; None for other files."""
    named = NAME.fullmatch(path.name)
    return int(named[1]) if named else -1 if path.name == BEFORE else None


def load_newest(out: Path, say: Callable[[str], None]) -> tuple[Path, dict] | None:
    """The newest checkpoint in the folder `out` that can be read, and its state; None where there is no checkpoint.

    `say` gets a line for each newer one that cannot be read. BadInput where none can.
    """
    refused = []
    for path in checkpoints(out):
        try:
            state = load(path)
        except BadInput as error:
            refused.append((path, error))
            continue
        for _, error in refused:
            say(f"{error}; {path.name} is used in its place")
        return path, state
    if refused:
        names = ", ".join(path.name for path, _ in refused)
        raise BadInput(f"{out} holds no checkpoint that can be read ({names}): {refused[0][1]}")
    return None


def load(path: Path) -> dict:
    """The state in the file `path`, tensors on the CPU. Raises BadInput for anything that is not a checkpoint of ours,
    to the last bit as it was written; nothing in it is run."""
    if not path.is_file():
        raise BadInput(f"{path} is not a file: expected a checkpoint, as dansm train writes it (checkpoint-….pt)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _check_bits(path)
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises nearly every kind for a file that is not its own
        if lacks_memory(error):
            raise
        raise BadInput(f"{path} cannot be used: {_why(error)}; {EXPECTED}") from error
    if not isinstance(state, dict) or "dansm" not in state:
        raise _not_ours(path, "without the mark of dansm")
    if state["dansm"] != VERSION:
        raise _not_ours(path, f"of version {state['dansm']!r:.20}")
    if lacking := _lacking(state):
        raise _not_ours(path, f"without {lacking}")
    return state


def _check_bits(path):
    """ValueError unless the file is to the last bit as `write` left it."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END) - 64
        file.seek(max(size - len(MARK), 0))
        if size < 0 or file.read(len(MARK)) != MARK:
            raise ValueError("it does not end in a checksum: it was cut short, or is of another version or program")
        if _digest(file, size) != file.read(64):
            raise ValueError("its checksum is another: it was changed since it was written")


def _why(error) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if isinstance(error, pickle.UnpicklingError):
        return "it holds more than tensors and plain values, which may be code and is not run"
    return str(error).partition("\n")[0]


def _lacking(state) -> str | None:
    """The first part of a checkpoint that `state` has not, or has as something else."""
    for part in ("network", "recipe", "training"):
        if not isinstance(state.get(part), dict):
            return part
    step, averages, ranks = state["training"].get("step"), state["training"].get("averages"), state.get("ranks")
    if not {"flow", "times"} <= state["recipe"].keys():
        return "a flow and its times"
    if not isinstance(step, int) or step < 0:
        return "a step"
    if not _dicts(averages) or not all(isinstance(average.get("weights"), dict) and
                                       isinstance(average.get("decay"), float | int) for average in averages):
        return "averages"
    if not isinstance(state.get("latents"), dict | None):
        return "what its latents are"
    return None if _dicts(ranks) else "ranks"


def latents_of(state: dict) -> dict | None:
    """What a checkpoint or an export knows of the latents that it draws, None where it draws images. Earlier versions
    do not say: there, what had one or three channels was taken for images."""
    images = state["network"].get("channels") in (1, 3)
    return state.get("latents", None if images else {})


def _dicts(parts) -> bool:
    return isinstance(parts, list) and bool(parts) and all(isinstance(part, dict) for part in parts)


def _not_ours(path, reason="with other parts") -> BadInput:
    return BadInput(f"{path} is no checkpoint of version {VERSION} but {reason}: {EXPECTED}")


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """BadInput with the path for whatever a part of `path` leads to that has not the parts of ours."""
    try:
        yield
    except BadInput as error:
        if str(path) in str(error):
            raise
        raise BadInput(f"{path}: {error}") from error
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if lacks_memory(error):  # no fault of the file's
            raise
        raise _not_ours(path) from error


# ---------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------


def load_model(path: Path, device, solver: str = "euler", average: int = 0,
               say: Callable[[str], None] = print) -> tuple[UNet, object, dict]:
    """The averaged network, ready to sample, its flow, and where they are from.

    path      a run's folder (its newest checkpoint that can be read), a checkpoint, or a .safetensors of `export`
    average   which one, where a checkpoint holds several
    say       gets a line for each newer checkpoint of a folder that cannot be read

    The dict has "file", "step", "decay", "recipe", "network", "flow", "times", "data", "latents", see `latents_of`,
    and "images", how many it was trained on, None where that is not known.
    Raises BadInput.
    """
    net, flow, about = _model(*_averaged(path, average, say), solver)
    if isinstance(flow, Diffusion) and solver != "euler":
        raise BadInput(f"--solver is {solver}: {path} is a diffusion, which is sampled by DDIM; expected none")
    return net.to(device).eval(), flow, about


def _model(weights, about, solver: str = "euler") -> tuple[UNet, object, dict]:
    """The network with these weights, and its flow."""
    with reading(about["file"]):
        net = UNet(**about["network"])
        _check_weights(about["file"], weights, net.state_dict())
        net.load_state_dict(weights)
        flow = make_flow(about["recipe"] | {name: about[name] for name in ("flow", "times")},
                         about["latents"] is None, solver)
    return net, flow, about


def export(path: Path, out: Path, average: int = 0, say: Callable[[str], None] = print) -> dict:
    """Write the averaged weights of a run's folder or a checkpoint to `out`, which ends in .safetensors; returns what
    is written beside them: each of DESCRIBED and ADDED, there as JSON."""
    if out.suffix != ".safetensors":
        raise BadInput(f"--out is {out}: expected a name that ends in .safetensors")
    if path.suffix == ".safetensors":
        raise BadInput(f"{path} is exported already: expected a run's folder or one of its checkpoints")
    weights, about = _averaged(path, average, say)
    _model(weights, about)  # what could not be read again is not written
    make_folder(out.parent)
    with replacing(out) as partial:
        try:
            save_file({name: weight.contiguous() for name, weight in weights.items()}, partial,
                      {key: json.dumps(about[key]) for key in DESCRIBED + ADDED})
            with open(partial, "rb") as file:
                os.fsync(file.fileno())
        except SafetensorError as error:  # its word for a full disk
            raise OSError(None, str(error)) from error
    return about


def _averaged(path, average, say) -> tuple[dict[str, Tensor], dict]:
    """The averaged weights in `path`, whatever kind it is, and what they are."""
    if path.suffix == ".safetensors" and not path.is_dir():
        return _exported(path, average)
    if path.is_dir():
        found = load_newest(path, say)
        if found is None:
            raise BadInput(f"{path} holds no checkpoint: expected the folder that a dansm train wrote into")
        path, state = found
    elif not path.exists():
        raise BadInput(f"{path} does not exist: expected a run's folder, one of its checkpoints, or an export")
    else:
        state = load(path)
    averages, recipe, training = state["training"]["averages"], state["recipe"], state["training"]
    check_average(path, average, averages)
    about = {"dansm": VERSION, "network": state["network"], "flow": recipe["flow"], "times": recipe["times"],
             "step": training["step"], "decay": averages[average]["decay"],
             "data": state.get("data", recipe.get("data", "")), "recipe": recipe, "latents": latents_of(state),
             "images": state.get("images")}
    return averages[average]["weights"], {"file": path, **about}


def check_average(path, average: int, averages: list[dict]) -> None:
    if not 0 <= average < len(averages):
        held = ", ".join(f"{number}: decay {each['decay']}" for number, each in enumerate(averages))
        expected = f"one of 0 … {len(averages) - 1}" if len(averages) > 1 else "0"
        raise BadInput(f"--average is {average}: {path} holds {held}; expected {expected}")


def _exported(path, average) -> tuple[dict[str, Tensor], dict]:
    """The weights in a .safetensors, and what `export` wrote beside them."""
    wanted = "expected a file that dansm export wrote"
    if not path.is_file():
        raise BadInput(f"{path} is not a file: {wanted}")
    try:
        with safe_open(path, "pt") as file:
            beside, weights = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if lacking := ", ".join(key for key in DESCRIBED if key not in beside):
            raise BadInput(f"{path} does not say what its weights are, its metadata lacks {lacking}: {wanted}")
        about = {"file": path, **{key: json.loads(beside[key]) for key in DESCRIBED + ADDED if key in beside}}
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise BadInput(f"{path} cannot be read ({error}): {wanted}") from error
    if about["dansm"] != VERSION or not isinstance(about["step"], int) or not all(
            isinstance(about[part], dict) for part in ("network", "recipe")):
        raise BadInput(f"{path} is of version {about['dansm']!r:.20}, or another's: {wanted}, of version {VERSION}")
    check_average(path, average, [about])
    return weights, about | {"latents": latents_of(about), "images": about.get("images")}


def _check_weights(path, weights: dict, wanted: dict[str, Tensor]) -> None:
    """BadInput that names what is not as the network has it: a weight too few, too many, or of another shape."""
    def named(names):
        return names[0] + f" and {len(names) - 1:,} more" * (len(names) > 1)

    if lacking := [name for name in wanted if name not in weights]:
        raise BadInput(f"{path} lacks the weights {named(lacking)}: expected those of the network it names")
    if unknown := [name for name in weights if name not in wanted]:
        raise BadInput(f"{path} has the weights {named(unknown)}, which the network that it names has not")
    for name, weight in wanted.items():
        if getattr(weights[name], "shape", None) != weight.shape:
            raise BadInput(f"{path} has {name} of shape {tuple(getattr(weights[name], 'shape', ()))}: expected "
                           f"{tuple(weight.shape)} for the network that it names")


# ---------------------------------------------------------------------------------------------------
# One run at a time
# ---------------------------------------------------------------------------------------------------


