"""The folder of a run: its checkpoints, its log, its recipe, and how a run is resumed from it."""

import dataclasses
import hashlib
import json
import math
import os
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

import dansm
from dansm import BadInput

from ..base.files import replacing
from ..base.processes import everyones, ranks, wait_for_all
from ..base.text import counted, say, shorten
from ..data import loader
from ..data.labels import Labels
from ..data.latents import known_of
from ..model import checkpoint
from ..model.recipe import Recipe, changed, write
from .coupled_batches import CoupledBatches
from .step import FastTraining

NEW_METRICS = "metrics.partial"  # the log of a fresh run, until it first saves


def starts_over(out: Path, fresh: bool) -> bool:
    """Whether a run in the folder `out` starts over, as `fresh` says. Torchrun restarts processes by the same command:
    what is saved by then is this run's. Every process must call it."""
    if fresh and any(everyones(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)))):  # each node counts alone
        return (out / NEW_METRICS).exists()
    return fresh


class RunFolder:
    """The folder that a run is resumed from and saved to. Only the first of several processes writes into it. With
    `fresh`, a run that is there already keeps its checkpoints and its log until the new one first saves."""

    def __init__(self, out: Path, run: FastTraining, pool: dansm.NoisePool | CoupledBatches, images,
                 fresh: bool, labels: Labels | None = None):
        self.out = out
        self.run = run
        self.pool = pool
        self.data = {"data": run.recipe.data, "images": len(images), "look": loader.look(images),
                     "latents": known_of(images)}
        if labels:
            digest = hashlib.blake2b(json.dumps(labels.names).encode() + labels.numbers.tobytes(), digest_size=16)
            self.data |= {"classes": labels.names, "labels": digest.hexdigest()}
        self.rank = ranks()[0]
        self.metrics = out / "metrics.jsonl"
        self.new_metrics = out / NEW_METRICS
        self.others = checkpoint.checkpoints(out) if fresh else []  # of no use to this run: they go when it first saves
        self.keeps_other = bool(self.others)  # another run; `others` may also be damaged checkpoints of this one
        self.log_file = self.new_metrics if self.keeps_other else self.metrics
        self.generators = {"cpu": torch}  # torch's own, of random numbers
        if run.device.type != "cpu":
            self.generators[run.device.type] = torch.get_device_module(run.device)
        self.board = None  # until the first line: a run that is refused before leaves nothing; False: not installed

    def resume(self) -> float:
        """Load the newest checkpoint that can be read, unless the run is fresh. Returns the seconds trained before."""
        newest = None if self.keeps_other else checkpoint.load_newest(self.out)
        seen = everyones(f"{newest[0].name if newest else 'nothing'} and {self.data['images']:,} images")
        if len(set(seen)) > 1:  # after this the first may write into the folder
            raise BadInput(f"--out is {self.out} and --data is {self.data['data']}: the processes find "
                           f"{', '.join(seen)}, expected folders that all of them see, and that do not change")
        seconds = self._load(*newest) if newest else 0.0
        if self.rank == 0:
            self.new_metrics.unlink(missing_ok=True)  # of a fresh run that was killed, which nothing resumes
            if self.keeps_other:
                self.new_metrics.touch()
            cut_back(self.log_file, self.run.step)
            self.first_step = self.run.step + 1
        return seconds

    def _load(self, path: Path, state: dict) -> float:
        with checkpoint.reading(path):
            if differences := compare(state, self._state(), self.run.recipe):
                raise BadInput(f"{path} is of another run ({', '.join(differences)}): expected the same settings, "
                               "another --out, or --fresh to start over")
            self.run.load_state_dict(state["training"])
            unfinished = self.run.step < self.run.recipe.steps  # else there is nothing left to match
        if unfinished and isinstance(self.pool, CoupledBatches):
            self.pool.make()  # what goes wrong there is not the file's fault
        with checkpoint.reading(path):
            if unfinished:
                self._load_random(path, state["ranks"])
            newer = checkpoint.checkpoints(self.out)
            self.others = newer[: newer.index(path)]  # damaged
            if unfinished:
                say(f"resuming from step {self.run.step:,} of {path}")
            return float(state["seconds"])

    def _load_random(self, path: Path, saved: list[dict]) -> None:
        """Go on with the noises and random numbers of this process, from what each of the processes saved; those that
        are more than these begin streams that nobody has drawn from, and so do all that share a pool with others."""
        ours, before, now = saved[self.rank % len(saved)], counted(len(saved), "process"), ranks()[1]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is said below
            try:
                self.pool.load_state_dict(ours["pool"])
            except BadInput as error:
                reason = str(error).partition(": expected ")[0]
                raise BadInput(f"{path} cannot be resumed ({reason}): expected the same data, another --out, or "
                               "--fresh to start over") from error
        if self.rank < len(saved):
            for name, generator in self.generators.items():
                generator.set_rng_state(ours["random"][name])
        else:
            stream = np.random.SeedSequence([self.run.recipe.seed, self.rank, self.run.step])
            torch.manual_seed(int(stream.generate_state(1, np.uint64)[0] >> 1))
        if len(saved) != now:
            fresh = "go on with noises that nobody has drawn"
            how = f"those that are new {fresh}" if now > len(saved) else "each goes on with its own noises"
            how = f"all {fresh}" if self.run.recipe.match_scope == "global" else how
            say(f"saved by {before}, resumed by {now:,}: {how}")

    def _state(self) -> dict:
        """What a checkpoint holds. Every process must call it."""
        noises = on_cpu(self.pool.state_dict())
        random = {name: generator.get_rng_state() for name, generator in self.generators.items()}
        return {"network": self.run.net.settings, "recipe": dataclasses.asdict(self.run.recipe), **self.data,
                "training": self.run.state_dict(), "ranks": everyones({"pool": noises, "random": random})}

    def save(self, seconds: float) -> None:
        """Write a checkpoint of what all processes know. Every process must call it. BadInput if a weight is not
        finite."""
        recipe = self.run.recipe
        if not all(weight.isfinite().all() for weight in self.run.net.parameters()):
            raise BadInput(f"--lr is {recipe.lr}: the weights became infinite at step {self.run.step}, expected a "
                           f"smaller one; what {self.out} held before is untouched")
        state = self._state() | {"seconds": seconds}
        if self.rank == 0:
            checkpoint.save(self.out, state, recipe.keep, drop=self.others)
            self.log_file.touch()  # no line may be due yet
            os.replace(self.log_file, self.metrics)
            write(dataclasses.replace(recipe, minutes=0.0), self.out / "recipe.toml")  # minutes are of one call
        self.others = []
        self.log_file = self.metrics
        wait_for_all()

    def log(self, line: dict) -> None:
        """Add a line to metrics.jsonl, and to TensorBoard if that is installed."""
        if self.rank:
            return
        with open(self.log_file, "a") as file:
            file.write(json.dumps(line) + "\n")
        if self.board is None:
            self.board = False
            with suppress(ImportError):  # TensorBoard drops what a killed run wrote from this step on, too
                from torch.utils.tensorboard import SummaryWriter

                self.board = SummaryWriter(str(self.out / "tensorboard"), purge_step=self.first_step)
        if self.board:
            for name, value in line.items():
                self.board.add_scalar(name, value, line["step"])

    def has_evaluation(self) -> bool:
        """Whether the log has an evaluation of this step, as the first process sees it."""
        lines = self.metrics.read_text().splitlines() if self.metrics.exists() else []
        return everyones(any(step_of(line) == self.run.step and "/real" in line for line in lines))[0]

    def close(self) -> None:
        if self.board:
            self.board.close()


def compare(saved: dict, own: dict, recipe: Recipe) -> list[str]:
    """How a run that was saved differs from this one, each as "lr 0.0002 → 0.1"."""
    differences = changed(saved["recipe"] | {"data": recipe.data}, recipe)  # the data may have moved
    before, now = fixed(saved), fixed(own)
    differences += [f"{name} {before.get(name)} → {now.get(name)}" for name in before | now
                    if before.get(name) != now.get(name)]
    if not differences and not loader.look_alike(saved["look"], own["look"]):
        differences = [f"as many images, but not the same ones: {saved['data']} → {recipe.data}"]
    if not differences and saved.get("labels") != own.get("labels"):
        differences = ["the same images with other labels"]
    return differences


def on_cpu(state):
    """A state with its tensors on the CPU: else every process would take all of them to the GPU that they lay on."""
    if isinstance(state, dict):
        return {name: on_cpu(value) for name, value in state.items()}
    return state.cpu() if isinstance(state, torch.Tensor) else state


def fixed(state: dict) -> dict:
    """What must stay while a run is resumed, besides its recipe. Random numbers need the same kind of device, and the
    card decides about precision "auto"."""
    latents = state["latents"]
    facts = {"data": "images" if latents is None else "latents", "images": state["images"],
             "device": state["ranks"][0]["pool"]["made_for"]["device"],
             "precision": "fp16" if state["training"]["scaler"] else "bf16 or fp32",
             "classes": shorten(", ".join(state.get("classes", [])), 80) or "none"}
    encoding = {f"latents of {name}": str(value)[:12] for name, value in (latents or {}).items() if name != "source"}
    return facts | encoding | {f"network {name}": value for name, value in state["network"].items()}


def cut_back(log: Path, step: int) -> None:
    """Drop lines after `step`, which a killed run wrote after its last checkpoint, and lines that were cut short."""
    if log.exists():
        lines = log.read_text(errors="replace").splitlines()
        with replacing(log) as partial:
            partial.write_text("".join(f"{line}\n" for line in lines if step_of(line) <= step))


def step_of(line: str) -> float:
    """The step of a line of the log; infinite if it is not a whole line."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return math.inf
