"""Exports: the averaged weights alone, as safetensors, with what it takes to sample from them."""

import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

from dansm import BadInput

from ..base.files import make_folder, replacing
from .load import DESCRIBED, build, read_average


def export(run: Path, out: Path, average: int = 0) -> dict:
    """Write the averaged weights of a run's folder or a checkpoint to the file `out`, which ends in .safetensors.

    Returns what `Model` has as "about"; the parts of it named in DESCRIBED stand in the file's metadata, as JSON.
    Raises BadInput, before anything is written, for weights that could not be read again.
    """
    if out.suffix != ".safetensors":
        raise BadInput(f"--out is {out}: expected a name that ends in .safetensors")
    if run.suffix == ".safetensors":
        raise BadInput(f"{run} is exported already: expected a run's folder or one of its checkpoints")
    weights, about = read_average(run, average)
    build(weights, about)
    make_folder(out.parent)
    with replacing(out) as partial:
        try:
            save_file({name: weight.contiguous() for name, weight in weights.items()}, partial,
                      {name: json.dumps(about[name]) for name in DESCRIBED})
        except SafetensorError as error:  # what it raises for a full disk
            raise OSError(None, str(error)) from error
    return about
