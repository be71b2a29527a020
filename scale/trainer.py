"""A training run around the plain loop: progress, log, checkpoints, and going on where it stopped."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

import dansm
from scale import checkpoint, data

LOG_EVERY = 50  # steps between two lines of the log: rare enough that reading the loss costs nothing


def fit(images: Tensor, recipe: dict, *, steps: int, minutes: float, out: Path, fresh: bool, device: torch.device,
        console: Console, save_minutes: float = 5.0, source: str = "") -> tuple:
    """Train a network on images (N, C, H, W) uint8 by `recipe`; returns a summary, the averaged network, the flow.

    `out` gets a checkpoint every `save_minutes`, of which the last few are kept, and log.jsonl. A run that it holds
    already goes on, with the same noises and the same order of images, as if never stopped (method "optimal" begins a
    new group of samples). `source` names the images, for those who find the checkpoint.

    Stops after `steps` in all, after `minutes` of this call if not 0, or at Ctrl-C; each saves first. A run that has
    made its steps already is left as it is.
    """
    torch.manual_seed(recipe["seed"])
    net = _network(images, recipe["network"]).to(device)
    flow = dansm.FLOWS[recipe["flow"]](recipe["times"])
    run = dansm.Training(net, recipe["lr"])
    pool = dansm.NoisePool(recipe["match_size"], images.shape[1:], cost=recipe["cost"], device=device,
                           seed=recipe["seed"])
    log, aside = out / "log.jsonl", out / "log.partial"
    found = None if fresh else checkpoint.load_newest(out, lambda line: console.print(line, soft_wrap=True,
                                                                                      markup=False))
    earlier, strange = 0.0, checkpoint.checkpoints(out)  # of the run that was here, until this one is saved
    keeps_other = fresh and bool(strange)
    if found:
        saved, state = found
        strange = strange[: strange.index(saved)]  # newer, but not to be read
        earlier = _resume(saved, state, recipe, run, pool, device)
        _forget_after(log, run.step)
        if run.step < steps:
            console.print(f"going on from step {run.step:,} of {saved}", soft_wrap=True, markup=False)
    elif not keeps_other:
        log.unlink(missing_ok=True)
    aside.unlink(missing_ok=True)  # of a --fresh that was killed: no run goes on from it

    def save():
        nonlocal keeps_other, strange
        if not all(weight.isfinite().all() for weight in net.parameters()):
            raise dansm.BadInput(f"--lr is {recipe['lr']}: the weights became infinite at step {run.step}, expected a "
                                 f"smaller one; the checkpoints in {out} are untouched")
        checkpoint.save(out, {"network": net.settings, "recipe": recipe, "data": source,
                              "training": _training_state(run, recipe["decay"]),
                              "ranks": [{"pool": pool.state_dict(), "random": _random_state(device)}],
                              "seconds": earlier + time.monotonic() - begin}, drop=strange)
        strange = []
        if keeps_other:
            os.replace(aside, log)
            keeps_other = False

    batches = data.batches(images, recipe["batch"], seed=recipe["seed"], flip=recipe["flip"], start=run.step,
                           device=device)
    paired = _Latest(dansm.pairs(batches, recipe["method"], recipe["match_size"], cost=recipe["cost"], pool=pool))
    first_step, begin = run.step, time.monotonic()
    last_save = begin
    bar = Progress(TextColumn("training"), BarColumn(), TextColumn("{task.fields[line]}"), TimeElapsedColumn(),
                   TimeRemainingColumn(), console=console, disable=run.step >= steps)
    task = bar.add_task("", total=1.0, completed=run.step / steps, line="")
    interrupt = Interrupt(lambda: bar.update(task, line="stopping after this step"))
    with bar, open(aside if keeps_other else log, "a") as lines, interrupt:
        for loss in dansm.train(run, flow, paired, decay=recipe["decay"]) if run.step < steps else ():
            now = time.monotonic()
            last = run.step >= steps or (minutes and now - begin > 60 * minutes) or interrupt
            save_now = now - last_save > 60 * save_minutes
            if run.step % LOG_EVERY == 0 or save_now or last:
                rate = (run.step - first_step) * recipe["batch"] / (now - begin)
                line = {"step": run.step, "images": run.step * recipe["batch"],
                        "seconds": round(earlier + now - begin, 2), "loss": round(loss.item(), 5),
                        "images_per_second": round(rate, 1), **paired.distances()}
                if not math.isfinite(line["loss"]):
                    raise dansm.BadInput(f"--lr is {recipe['lr']}: the loss became {line['loss']} at step {run.step}, "
                                         f"expected a smaller one; the checkpoints in {out} are untouched")
                lines.write(json.dumps(line) + "\n")
                lines.flush()
                part = max(run.step / steps, (now - begin) / (60 * minutes) if minutes else 0)
                text = f"step {run.step:,}  loss {line['loss']:.4f}  {rate:,.0f} images/s"
                bar.update(task, completed=part, line=text)
            if last:
                break
            if save_now:
                save()
                last_save = now
    seconds = time.monotonic() - begin
    made = run.step - first_step
    if made:
        save()
    return {"recipe": recipe, "steps": run.step, "images": run.step * recipe["batch"],
            "seconds": round(earlier + seconds, 1),
            "this_call": {"steps": made, "seconds": round(seconds, 1),  # the machine may be another one each time
                          "images_per_second": round(made * recipe["batch"] / max(seconds, 1e-9), 1)},
            "parameters": sum(p.numel() for p in net.parameters()),
            "stopped_early": bool(interrupt) and run.step < steps}, run.average, flow


class Interrupt:
    """True once Ctrl-C was pressed: the loop ends after a whole step, so that nothing is saved half done. A second
    Ctrl-C stops at once. `say` is called at the first, as a step may take a minute."""

    def __init__(self, say: Callable[[], None]):
        self.pressed, self.say = False, say

    def __bool__(self):
        return self.pressed

    def __enter__(self):
        self.before = signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(self, *_):
        signal.signal(signal.SIGINT, self.before)

    def _press(self, *_):
        self.pressed = True
        signal.signal(signal.SIGINT, self.before)
        self.say()


class _Latest:
    """Passes pairs on and keeps the last, so that the log can say how far apart they were."""

    def __init__(self, stream):
        self.stream = stream

    def __iter__(self):
        for x, z in self.stream:
            self.x, self.z = x, z
            yield x, z

    def distances(self) -> dict:
        """Mean ‖x − z‖ as paired, and as it would be at random: each x with its neighbour's z."""
        return {"distance": round(dansm.path_length(self.x, self.z), 4),
                "distance_unmatched": round(dansm.path_length(self.x, self.z.roll(1, 0)), 4)}


def _network(images, name):
    """A new network of that name for such images, or BadInput that names --size, which makes them fit."""
    if images.shape[2] != images.shape[3]:
        raise dansm.BadInput(f"the images are {images.shape[3]}×{images.shape[2]} pixels: expected squares; --size N "
                             "makes them N pixels square")
    try:
        return dansm.UNet(images.shape[1], images.shape[2], **dansm.NETWORKS[name])
    except dansm.BadInput as error:
        raise dansm.BadInput(f"{error}; --size N makes them N pixels square") from error


def _training_state(run, decay) -> dict:
    """The run's state with its one average among the averages that a checkpoint may hold."""
    state = run.state_dict()
    average = state.pop("average")
    return {**state, "averages": [{"decay": decay, "weights": average}]}


def _resume(path, state, recipe, run, pool, device) -> float:
    """Take up the run of that state, read from `path`; returns the seconds that it has trained."""
    with checkpoint.reading(path):
        changed = [f"{key} {state['recipe'].get(key)} → {value}" for key, value in recipe.items()
                   if state["recipe"].get(key) != value]
        if state["network"] != run.net.settings:
            changed.append(f"images of {state['network']['size']} pixels → {run.net.settings['size']}")
        if changed:
            raise dansm.BadInput(f"{path} is of another run ({', '.join(changed)}): expected the same settings, "
                                 "another --out, or --fresh to begin anew")
        run.load_state_dict({**state["training"], "average": state["training"]["averages"][0]["weights"]})
        _take_up_random_numbers(path, state["ranks"][0], pool, device)
        return float(state.get("seconds", 0))  # a checkpoint of before they were kept has none


def _take_up_random_numbers(path, state, pool, device):
    """The pool's and torch's own. Each kind of device has its own generator, whose state no other can take."""
    if state["pool"]["made_for"]["device"] != device.type:
        raise dansm.BadInput(f"{path} was not begun on --device {device.type}: a run goes on only on the kind of "
                             "device it was begun on; expected that one, another --out, or --fresh to begin anew")
    pool.load_state_dict(state["pool"])
    torch.set_rng_state(state["random"]["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["random"]["cuda"], device)


def _forget_after(log, step):
    """Drop the lines that a killed run wrote after its last checkpoint, and what a kill or a full disk left of one."""
    if not log.exists():
        return
    kept = [line for line in log.read_text(errors="replace").splitlines() if _step_of(line) <= step]
    beside = log.with_suffix(".part")
    beside.write_text("".join(line + "\n" for line in kept))
    os.replace(beside, log)


def _step_of(line):
    """The step that a line of the log is of; infinite for what is no such line."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return math.inf


def _random_state(device):
    state = {"cpu": torch.get_rng_state()}
    return {**state, "cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else state
