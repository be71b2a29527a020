"""Checkpoints: written whole or not at all, read without running code from them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from dansm import FLOWS, BadInput, Diffusion, UNet, lacks_memory

VERSION = 1
PARTS = {"network", "recipe", "training", "pool", "random"}


def save(path: Path, state: dict) -> None:
    """Write `state` to a file beside `path`, then rename it: a kill in between leaves the old checkpoint whole."""
    partial = path.with_suffix(".partial")
    try:
        with open(partial, "wb") as file:
            torch.save({"dansm": VERSION, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise BadInput(f"{path} cannot be written: {error.strerror}; the checkpoint before it is untouched") from error


def load(path: Path) -> dict:
    """The state in `path`, tensors on the CPU. Raises BadInput for anything that is not a checkpoint of ours."""
    if not path.is_file():
        raise BadInput(f"{path} is not a file: expected a checkpoint, as dansm train writes it (checkpoint.pt)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises nearly every kind for a file that is not its own
        raise BadInput(f"{path} is not a checkpoint, or is damaged: expected a file that dansm train wrote") from error
    if not isinstance(state, dict) or state.get("dansm") != VERSION or not state.keys() >= PARTS:
        raise _not_ours(path)
    if not all(isinstance(state[part], dict) for part in PARTS) or not state["recipe"].keys() >= {"flow", "times"}:
        raise _not_ours(path)
    if not isinstance(state["training"].get("step"), int):
        raise _not_ours(path)
    return state


def _not_ours(path) -> BadInput:
    return BadInput(f"{path} is no checkpoint of dansm, version {VERSION}: expected a file that dansm train wrote")


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


def load_model(path: Path, device, solver: str = "euler") -> tuple[UNet, object, dict]:
    """The averaged network, ready to sample, its flow, and all else the checkpoint holds."""
    state = load(path)
    with reading(path):
        net = UNet(**state["network"])
        net.load_state_dict(state["training"]["average"])
        make_flow, times = FLOWS[state["recipe"]["flow"]], state["recipe"]["times"]
        make_flow(times)
    if make_flow is Diffusion and solver != "euler":
        raise BadInput(f"--solver is {solver}: {path} is a diffusion, which is sampled by DDIM; expected none")
    flow = make_flow(times) if make_flow is Diffusion else make_flow(times, solver)
    return net.to(device).eval(), flow, state
