"""Time `dansm train` of several checkouts from its start to the first line of its log, and what it does meanwhile.

    python results/bench/start/measure.py 583a1bc=FOLDER now=. --out results/bench/start/h200.csv [--rounds 2]

Each round runs every checkout with caches of kernels that are empty (fresh), then with what that left (warm). Data are
1,000 synthetic latents of 4×32×32, the network NCSN++, batches of 250, a pool of 10,000. --tiny tries it on a CPU.

seconds  from the start of the process: to the end of each phase in the order of time, and to the log's first line. How
         many compiled kernels the cache holds by the end stands beside it
"""

import argparse
import csv
import functools
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path

PHASES = [  # what ends it, the module and the function in this layout, and in that of 583a1bc
    ("data are read", "dansm.scale.train.run", "read_data", "scale.command", "read"),
    ("CUDA is there", "dansm.scale.train.step", "FastTraining.__init__.enters", "scale.step",
     "FastTraining.__init__.enters"),
    ("the first kernel has run", "dansm.scale.train.step", "fused", "scale.step", "fused"),
    ("the network is there", "dansm.scale.train.step", "FastTraining.__init__", "scale.step", "FastTraining.__init__"),
    ("the pool is there", "dansm.scale.train.run", "new_pool", "scale.trainer", "new_pool"),
    ("the first batch is matched", "dansm.scale.train.step", "FastTraining._capture.enters", "scale.step",
     "FastTraining._capture.enters"),
    ("forward and backward", "dansm.scale.train.step", "FastTraining._backward", "scale.step",
     "FastTraining._backward"),
    ("the graph is captured", "dansm.scale.train.step", "FastTraining._capture", "scale.step", "FastTraining._capture"),
    ("the first update", "dansm.scale.train.step", "FastTraining.update", "scale.step", "FastTraining.update"),
]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", nargs="*", metavar="NAME=FOLDER")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    import numpy as np

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        shape = (64, 4, 8, 8) if given.tiny else (1000, 4, 32, 32)
        np.save(folder / "latents.npy", np.random.default_rng(0).standard_normal(shape).astype(np.float16))
        for number in range(given.rounds):
            for caches in "fresh", "warm":
                for checkout in given.checkouts:
                    name, _, path = checkout.partition("=")
                    place = folder / f"{name}-{number}"
                    times = timed(Path(path).resolve(), folder / "latents.npy", place, caches, given.tiny)
                    for what, seconds in times:
                        rows.append({"build": name, "round": number, "caches": caches, "until": what,
                                     "seconds": round(seconds, 2)})
                        print(*rows[-1].values(), sep="\t", flush=True)
                    write(given.out, rows)


def timed(checkout, latents, place, caches, tiny):
    """[(what, seconds from the start of the process)] of one call."""
    out, stamps = place / caches, place / f"{caches}.jsonl"
    place.mkdir(exist_ok=True)
    command = ["train", latents, "--network", "small" if tiny else "ncsnpp", "--batch", 8 if tiny else 250,
               "--match-size", 16 if tiny else 10_000, "--device", "cpu" if tiny else "cuda", "--steps", 1,
               "--log-steps", 1, "--sample-steps", 1, "--out", out]
    environment = os.environ | {"PYTHONPATH": str(checkout), "TRITON_CACHE_DIR": str(place / "kernels"),
                                "CUDA_CACHE_PATH": str(place / "cuda")}
    begin, log = time.time(), None
    with open(place / f"{caches}.txt", "w+") as said:
        running = subprocess.Popen([sys.executable, Path(__file__).resolve(), "--stamp", stamps, *map(str, command)],
                                   cwd=checkout, env=environment, stdout=said, stderr=said)
        while running.poll() is None:
            if log is None and any(path.stat().st_size for path in out.glob("metrics.*")):
                log = time.time() - begin
            time.sleep(0.01)
        if running.returncode:
            said.seek(0)
            raise SystemExit(f"{checkout}: {said.read()}")
    found = [(what, moment - begin) for what, moment in map(json.loads, stamps.read_text().splitlines())]
    kernels = len(list((place / "kernels").glob("*/*.cubin")))
    return [*found, (f"the log's first line, {kernels} kernels", log)]


def write(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


# ------------ Inside the command --------------------------------------------------------------------------------------


def stamped(path, command):
    """Run the command, and note the moment at which each phase ends."""
    notes = open(path, "w")  # noqa: SIM115, until the process ends

    def note(what, moment=None):
        notes.write(json.dumps([what, time.time() if moment is None else moment]) + "\n")
        notes.flush()

    note("Python runs")
    import torch  # noqa: F401

    note("torch is imported")
    import dansm

    with suppress(ImportError):
        importlib.import_module("dansm.scale.commands.train")
    with suppress(ImportError):
        importlib.import_module("scale.command")
    note("dansm is imported")
    for what, *places in PHASES:
        for module, attribute in (places[:2], places[2:]):
            with suppress(ImportError, AttributeError):
                watch(importlib.import_module(module), attribute, functools.partial(note, what))
    for module in "dansm.scale.train.step", "scale.launch":
        with suppress(ImportError, AttributeError):
            watch_compiling(importlib.import_module(module), note)
    dansm.main(command)


def watch(module, attribute, note):
    """Call `note` when the function ends, and the GPU has done what it asked for; or where it enters."""
    *owners, name = attribute.removesuffix(".enters").split(".")
    owner = functools.reduce(getattr, owners, module)
    function = getattr(owner, name)

    @functools.wraps(function)
    def watched(*arguments, **options):
        if attribute.endswith(".enters"):
            note()
            return function(*arguments, **options)
        result = function(*arguments, **options)
        import torch

        if torch.cuda.is_initialized() and not torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize()
        note()
        return result

    setattr(owner, name, watched)


def watch_compiling(module, note):
    """Note when the kernels are compiled."""
    compiling_ahead = module.compiling_ahead

    @contextmanager
    def watched(device, **options):
        with compiling_ahead(device, **options):
            yield
        note("all kernels are compiled")

    module.compiling_ahead = watched


if __name__ == "__main__":
    if sys.argv[1:2] == ["--stamp"]:
        stamped(sys.argv[2], sys.argv[3:])
    else:
        main()
