"""A training run: the loop of `dansm.train` with a log, checkpoints, and going on where it stopped."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.distributed as group
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

import dansm

from ..base.files import replacing
from ..base.machine import check_memory, make_deterministic, number_type, peak
from ..base.processes import ranks
from ..base.text import counted
from ..data import loader
from ..data.latents import known_of
from ..model import checkpoint, sampling
from ..model.recipe import Recipe, changed, make_flow, write
from ..model.sampling import operations_per_image, sampler
from .judge import Judge, due, is_evaluation
from .step import FastTraining

AGREE = 0.5  # seconds between two moments at which processes agree whether to stop or to save
GRID_SHARE = 0.1  # of the time between two checkpoints that the grid of samples beside each may take


def fit(images: Tensor | np.ndarray, recipe: Recipe, *, out: Path, fresh: bool, device: torch.device,
        console: Console) -> tuple:
    """Train a network on images (N, C, H, W) by `recipe`; returns what `Watch.summary` says, the averaged network, the
    flow.

    `out` gets the checkpoints, metrics.jsonl, recipe.toml and, where they take little time, grids of samples. A run
    that it holds already goes on, with the same noises and the same order of images, as if never stopped (method
    "optimal" begins a new group of samples).

    Stops after the recipe's steps in all, after its minutes of this call if not 0, at Ctrl-C or SIGTERM; each saves
    first. A run that has made its steps already is left as it is. Under torchrun every process calls it; the first
    writes. BadInput for a run of other settings, a loss that is not finite, a full disk, a batch that cannot be shared.
    """
    if recipe.flip is None:  # a mirrored latent is not the latent of the mirrored image
        recipe = dataclasses.replace(recipe, flip=known_of(images) is None)
    rank, processes = ranks()
    run, flow, pool = begin(images, recipe, device, new=fresh or not checkpoint.newest(out))
    keeper = Keeper(out, recipe, images, fresh, console)
    keeper.resume(run, pool, device)
    owed = due(recipe, run.step) and keeper.lacks_evaluation(run.step)  # as it was cut off, after the checkpoint
    with keeper.paused():
        judge = Judge(images, recipe, device, console) if run.step < recipe.steps or owed else None
    resident = None if recipe.data_on_gpu == "auto" else recipe.data_on_gpu == "yes"
    batches = loader.batches(images, recipe.batch, seed=recipe.seed, flip=recipe.flip, start=run.step, rank=rank,
                           ranks=processes, device=device, resident=resident)
    watch = Watch(recipe, run, device)
    paired = watch.paired(dansm.pairs(watch.samples(batches), recipe.method, recipe.match_size, cost=recipe.cost,
                                      pool=pool))
    with closing(batches), _blamed_on_data(images), keeper.log(run.step) as log, \
            progress(run, recipe, console, rank) as show, \
            Interrupt(lambda: show("stopping after this step")) as interrupt:
        decide = Decide(recipe, run, interrupt)

        def evaluate() -> bool:
            """Whether it came to its end; one that was given up is made up for when the run goes on."""
            with keeper.paused(), watch.paused():
                log(line := judge(run, flow, keeper.seconds, show, interrupt))
            return line is not None or processes > 1

        going_on = (not owed or evaluate()) and run.step < recipe.steps
        for loss in dansm.train(run, flow, paired) if going_on else ():
            watch.losses.append(loss)
            stop, save = decide()
            if run.step % recipe.log_steps == 0 or save or stop:
                line = watch.line(keeper.seconds)
                log(line)
                show(watch.text(line))
            judged = due(recipe, run.step)
            if judged or (save and not stop):
                keeper.save(run, pool, device)
            if save and not stop and watch.grid_seconds() <= GRID_SHARE * 60 * recipe.save_minutes:
                with keeper.paused(), watch.paused():
                    keeper.grid(run, flow, pool.shape, device)
            if (judged and not evaluate()) or stop:
                break
        if watch.steps:
            keeper.save(run, pool, device)
    return watch.summary(keeper.seconds, bool(interrupt)), run.average, flow


def begin(images, recipe: Recipe, device: torch.device, *, new: bool) -> tuple:
    """What trains (`FastTraining`), the flow and the pool, as they are before the first step; `new`: no checkpoint will
    follow."""
    rank, processes = ranks()
    check_parts(recipe)
    share = recipe.batch // processes * math.prod(images.shape[1:]) * 4  # bytes
    check_memory(f"--batch is {recipe.batch:,}", share, device)
    if recipe.deterministic:
        make_deterministic()
    torch.backends.cudnn.benchmark = recipe.compile and not recipe.deterministic  # trying takes longer than compiling
    torch.manual_seed(recipe.seed)  # the same weights on all processes
    net = new_network(images, recipe)
    if new:  # a run that has begun is what it is
        recipe.check_attention(net)
    run = FastTraining(net, recipe, device)
    torch.manual_seed(recipe.seed if rank == 0 else _seed_of(recipe.seed, rank))
    flow = make_flow(dataclasses.asdict(recipe), known_of(images) is None)
    return run, flow, new_pool(images.shape[1:], recipe, device)


def new_pool(shape, recipe: Recipe, device: torch.device) -> dansm.NoisePool:
    """Full, for samples of this shape; of a method without a pool one for its generator alone."""
    size = recipe.match_size if recipe.method == "greedy" else 0
    settings = dict(cost=recipe.cost, device=device, seed=recipe.seed, dtype=number_type(recipe.pool_dtype, device),
                    tf32=recipe.tf32, match_scope=recipe.match_scope, compile=recipe.compile)
    return dansm.NoisePool(size, shape, **settings)


def check_parts(recipe: Recipe) -> None:
    """BadInput for a batch that does not fall into equal parts."""
    parts = ranks()[1] * recipe.accumulate
    if recipe.batch % parts:
        raise dansm.BadInput(f"--batch is {recipe.batch}: expected a multiple of {parts}, "
                             f"{counted(ranks()[1], 'process')} times --accumulate {recipe.accumulate}")


@contextmanager
def _blamed_on_data(images):
    """Where training fails for a number that is not finite, and some latents are not, it names these. To look for them
    before would be to read all of the data once more."""
    try:
        yield
    except dansm.BadInput as error:
        if isinstance(images, loader.Shards) and not isinstance(error.__cause__, OSError):  # a full disk is not theirs
            images.check_finite()
        raise


def new_network(images, recipe: Recipe) -> dansm.UNet:
    """A new network of the recipe's kind for such images, or BadInput that names --size, which makes them fit."""
    if images.shape[2] != images.shape[3]:
        raise dansm.BadInput(f"the images are {images.shape[3]}×{images.shape[2]} pixels: expected squares; --size N "
                             "makes them N pixels square")
    try:
        return dansm.UNet(**recipe.network_settings(images.shape[1], images.shape[2]))
    except dansm.BadInput as error:
        raise dansm.BadInput(f"{error}; --size N makes them N pixels square") from error


def _seed_of(seed: int, rank: int) -> int:
    return int(np.random.SeedSequence([seed, rank]).generate_state(1, np.uint64)[0] >> 1)


# ---------------------------------------------------------------------------------------------------
# What is kept
# ---------------------------------------------------------------------------------------------------


class Keeper:
    """The folder of a run: its checkpoints, its log, the grids beside them. Only the first process writes into it.

    seconds  that the run has trained, in earlier calls and in this one, without evaluations and grids
    """

    def __init__(self, out: Path, recipe: Recipe, images, fresh: bool, console: Console):
        self.out, self.recipe, self.console = out, recipe, console
        self.images, self.latents, self.look = len(images), known_of(images), loader.look(images)
        self.rank, self.processes = ranks()
        self.metrics, self.aside = out / "metrics.jsonl", out / "metrics.partial"
        if fresh and self._restarted():
            fresh = self.aside.exists()  # else what is saved is this run's already
        # Checkpoints that lead to another run: with --fresh they are kept until this one is saved.
        self.others = checkpoint.checkpoints(out) if fresh else []
        self.fresh, self.keeps_other = fresh, bool(self.others)
        self.earlier, self.begin, self.saved = 0.0, time.monotonic(), None

    def _restarted(self) -> bool:
        """Whether torchrun has started any of the processes again, which it does with the same command."""
        ours = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0  # each node counts its own failures
        everyones = [ours] * self.processes
        if self.processes > 1:
            group.all_gather_object(everyones, ours)
        return any(everyones)

    @property
    def seconds(self) -> float:
        return self.earlier + time.monotonic() - self.begin

    @contextmanager
    def paused(self):
        """What happens inside does not count as training."""
        begin = time.monotonic()
        yield
        self.begin += time.monotonic() - begin

    def resume(self, run: FastTraining, pool: dansm.NoisePool, device) -> None:
        """Take up the run that the folder holds, if it is not to begin anew."""
        found = None if self.fresh else checkpoint.load_newest(self.out, self._say)
        self._check_shared(found[0].name if found else "nothing")
        if found is not None:
            path, state = found
            self._check(path, state, run)
            with checkpoint.reading(path):
                run.load_state_dict(state["training"])
                _take_up_random_numbers(path, state["ranks"][self.rank], pool, device)
                self.earlier = float(state["seconds"])
            newer = checkpoint.checkpoints(self.out)
            self.others = newer[: newer.index(path)]  # damaged
            if self.rank == 0:
                _forget_after(self.metrics, run.step)
            if run.step < self.recipe.steps:
                self._say(f"going on from step {run.step:,} of {path}")
        elif self.rank == 0 and not self.keeps_other:
            self.metrics.unlink(missing_ok=True)
        if self.rank == 0:
            self.aside.unlink(missing_ok=True)  # of a --fresh that was killed: no run goes on from it
            if self.keeps_other:
                self.aside.touch()
        self.begin = time.monotonic()

    def _check_shared(self, found: str):
        """BadInput on all processes if one finds another checkpoint than the others do: it would train other weights;
        or another count of images, as of latents that are being encoded: it would serve others. Behind this all have
        looked at the folder, and the first may write."""
        if self.processes == 1:
            return
        everyones = [None] * self.processes
        group.all_gather_object(everyones, (found, f"{self.images:,}"))
        for (name, folder), finds in zip((("--out", self.out), ("--data", self.recipe.data)),
                                         zip(*everyones, strict=True), strict=True):
            if len(set(finds)) > 1:
                raise dansm.BadInput(f"{name} is {folder}: the processes find {', '.join(finds)} there, expected one "
                                     "folder that all of them see, and that stays as it is")

    def _check(self, path, state, run):
        """BadInput if the checkpoint is of a run with other settings, images or processes."""
        with checkpoint.reading(path):
            before, known = state["recipe"], state.get("look")  # runs of before had none
            alike = None if known is None or self.look is None else loader.look_alike(known, self.look)
            if alike:  # wherever they lie now
                before = before | {"data": self.recipe.data}
            differences = changed(before, self.recipe)
            others = _of_others(state.get("latents", self.latents), self.latents)
            if state["images"] != self.images:
                differences.append(f"images {state['images']:,} → {self.images:,}")
            elif alike is False and not others:
                differences.append("as many images, but not the same ones")
            for part, words in {"size": "images of {} pixels", "channels": "images of {} channels"}.items():
                if state["network"][part] != run.net.settings[part]:
                    differences.append(f"{words.format(state['network'][part])} → {run.net.settings[part]}")
            differences += others
            if state["network"] != run.net.settings and not differences:
                differences.append(f"network {state['network']} → {run.net.settings}")
            was, now = ("fp16" if scaler else "bf16 or fp32"  # auto is what the device can
                        for scaler in (state["training"]["scaler"], run.scaler.state_dict()))
            if was != now and not differences:
                differences.append(f"precision {was} → {now}, as this device's")
            if len(state["ranks"]) != self.processes:
                differences.append(f"processes {len(state['ranks'])} → {self.processes}")
        if differences:
            raise dansm.BadInput(f"{path} is of another run ({', '.join(differences)}): expected the same settings, "
                                 "another --out, or --fresh to begin anew")

    @contextmanager
    def log(self, step: int) -> Iterator[Callable[[dict], None]]:
        """What writes a line of metrics.jsonl, and to TensorBoard where it is installed."""
        if self.rank:
            yield lambda line: None
            return
        board = _tensorboard(self.out, step)
        with open(self.aside if self.keeps_other else self.metrics, "a") as lines, \
                closing(board) if board else nullcontext():
            def write_line(line):
                if line is None:
                    return
                lines.write(json.dumps(line) + "\n")
                lines.flush()
                for name in line if board else ():
                    board.add_scalar(name, line[name], line["step"])
            yield write_line

    def lacks_evaluation(self, step: int) -> bool:
        """Whether the log has no evaluation of this step, as the first process sees it."""
        lines = self.metrics.read_text().splitlines() if self.rank == 0 and self.metrics.exists() else []
        told = [not any(_step_of(line) == step and is_evaluation(json.loads(line)) for line in lines)]
        if self.processes > 1:
            group.broadcast_object_list(told)
        return told[0]

    def save(self, run: FastTraining, pool: dansm.NoisePool, device) -> None:
        """A checkpoint, of what all processes know; if this step's is not there yet."""
        if self.saved == run.step:
            return
        self.saved = run.step
        if not all(weight.isfinite().all() for weight in run.net.parameters()):
            raise dansm.BadInput(f"--lr is {self.recipe.lr}: the weights became infinite at step {run.step}, expected "
                                 f"a smaller one; what {self.out} held before is untouched")
        everyones = self._gathered({"pool": pool.state_dict(), "random": _random_state(device)})
        if self.rank == 0:
            checkpoint.save(self.out, {
                "network": run.net.settings, "recipe": dataclasses.asdict(self.recipe), "data": self.recipe.data,
                "images": self.images, "look": self.look, "latents": self.latents,
                "training": run.state_dict(), "ranks": everyones, "seconds": self.seconds,
            }, self.recipe.keep, drop=self.others)
            if self.keeps_other:
                os.replace(self.aside, self.metrics)
            self.others, self.keeps_other = [], False
            write(dataclasses.replace(self.recipe, minutes=0.0), self.out / "recipe.toml")  # which were of this call
        if self.processes > 1:
            group.barrier()

    def grid(self, run: FastTraining, flow, shape, device) -> None:
        """64 images beside the checkpoint, from the noise that is theirs in every grid of this run."""
        if self.rank or self.latents is not None:
            return
        part = self.recipe.batch // (self.processes * self.recipe.accumulate)  # fits into memory: a step had it
        net = sampler(run.average, device, self.recipe.precision, self.recipe.compile)
        draws = sampling.sample_images(net, flow, range(64), shape, self.recipe.sample_steps, seed=self.recipe.seed,
                                    batch=min(64, part), device=device)
        sampling.save_grid(torch.cat(list(draws)), self.out / f"samples-{run.step:08d}.png")

    def _gathered(self, ours) -> list | None:
        if self.processes == 1:
            return [ours]
        everyones = [None] * self.processes if self.rank == 0 else None
        group.gather_object(ours, everyones)
        return everyones

    def _say(self, line):
        if self.rank == 0:
            self.console.print(line, soft_wrap=True, markup=False)


def _of_others(before: dict | None, now: dict | None) -> list[str]:
    """By what latents differ that were known by `before` from those known by `now`, as far as both are known; where
    their images lay is no difference."""
    if before is None or now is None:
        return [] if before is now else ["images → latents" if before is None else "latents → images"]
    return [f"latents of {name} {str(before[name])[:12]} → {str(now[name])[:12]}"
            for name in before if name != "source" and before[name] != now.get(name, before[name])]


def _take_up_random_numbers(path, state, pool, device):
    """The pool's and torch's own. Each kind of device has its own generator, whose state no other can take."""
    if state["pool"]["made_for"]["device"] != device.type:
        raise dansm.BadInput(f"{path} was not begun on --device {device.type}: a run goes on only on the kind of "
                             "device it was begun on; expected that one, another --out, or --fresh to begin anew")
    saved = state["pool"]
    if pool.match_size == 0:  # a run of random pairs once saved the whole pool that it did not use
        saved = saved | {"made_for": saved["made_for"] | {"match_size": 0}, "index": saved["index"][:0]}
    pool.load_state_dict(saved)
    torch.set_rng_state(state["random"]["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["random"]["cuda"], device)
    elif device.type == "mps" and "mps" in state["random"]:
        torch.mps.set_rng_state(state["random"]["mps"])


def _random_state(device):
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        state["mps"] = torch.mps.get_rng_state()
    return state


def _forget_after(metrics, step):
    """Drop the lines that a killed run wrote after its last checkpoint, and what a kill or a full disk left of one."""
    if not metrics.exists():
        return
    kept = [line for line in metrics.read_text(errors="replace").splitlines() if _step_of(line) <= step]
    with replacing(metrics) as beside:
        beside.write_text("".join(line + "\n" for line in kept))


def _step_of(line):
    """The step that a line of the log is of; infinite for what is no such line."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return math.inf


def _tensorboard(out, step):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)


# ---------------------------------------------------------------------------------------------------
# What is seen
# ---------------------------------------------------------------------------------------------------


class Watch:
    """Measures a run as it goes, without making the GPU wait but for a line of the log: what passes by is kept on the
    device until then."""

    def __init__(self, recipe: Recipe, run: FastTraining, device: torch.device):
        self.recipe, self.run, self.device, self.z = recipe, run, device, None
        self.first, self.begin = run.step, time.monotonic()
        self.losses, self.clocks, self.last, self.before = [], [], (run.step, self.begin), None
        self.peak = peak(device)

    @cached_property
    def operations(self) -> float:
        return operations_per_image(self.run.net.settings)

    @property
    def steps(self) -> int:
        """Made in this call."""
        return self.run.step - self.first

    @contextmanager
    def paused(self):
        """What happens inside slows no rate."""
        begin = time.monotonic()
        yield
        spent = time.monotonic() - begin
        self.begin, self.last = self.begin + spent, (self.last[0], self.last[1] + spent)

    def samples(self, batches: Iterator[Tensor]) -> Iterator[Tensor]:
        """The batches; the moment at which one is there is where matching begins, of it or of several up to it."""
        for x in batches:
            self.before = self._now()
            yield x

    def paired(self, pairs) -> Iterator[tuple[Tensor, Tensor]]:
        """The pairs, with the moments between which they were matched; the last is kept for the distances."""
        for x, z in pairs:
            if self.before is not None:  # else matched with the pairs before
                self.clocks.append((self.before, self._now()))
                self.before = None
            self.others = z.roll(1, 0) if len(z) > 1 or self.z is None else self.z  # one alone has that before it
            self.x, self.z = x, z
            yield x, z

    def _now(self):
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def line(self, seconds: float) -> dict:
        """Of the steps since the last line. All processes must call it. BadInput on all of them, with the step, where
        a loss of any is not finite.

        loss, loss_mean     of this step, and of those since the last line, of all processes together
        images_per_second   of all processes together; mfu: the share of the GPU's peak that the network has
        matching            share of the time
        distance            mean ‖x − z‖ as paired; distance_unmatched: at random, each x with its neighbour's z; both
                            of this process
        """
        losses = _mean_over_processes(torch.stack(self.losses).float().cpu())
        if not losses.isfinite().all():
            bad = self.run.step - len(losses) + 1 + int((~losses.isfinite()).int().argmax())
            raise dansm.BadInput(f"--lr is {self.recipe.lr}: the loss became {losses[~losses.isfinite()][0].item()} at "
                                 f"step {bad}, expected a smaller one; what was saved before is untouched")
        (step, then), now = self.last, time.monotonic()
        rate = (self.run.step - step) * self.recipe.batch / max(now - then, 1e-9)
        line = {"step": self.run.step, "images": self.run.step * self.recipe.batch, "seconds": round(seconds, 2),
                "loss": round(losses[-1].item(), 5), "loss_mean": round(losses.mean().item(), 5),
                "images_per_second": round(rate, 1),
                "matching": round(self._matching() / max(now - then, 1e-9), 4),
                "distance": round(dansm.path_length(self.x, self.z), 4),
                "distance_unmatched": round(dansm.path_length(self.x, self.others), 4)}
        if self.peak:
            line["mfu"] = round(rate * self.operations / (self.peak * ranks()[1]), 4)
        self.losses, self.clocks, self.last = [], [], (self.run.step, now)
        return line

    def _matching(self) -> float:
        """Seconds of the GPU, or of the CPU, between the moments before and after the matchings."""
        if self.device.type == "cuda":
            return sum(before.elapsed_time(after) for before, after in self.clocks) / 1000
        return sum(after - before for before, after in self.clocks)

    def text(self, line: dict) -> str:
        mfu = f"  MFU {line['mfu']:.0%}" if "mfu" in line else ""
        return (f"step {line['step']:,}  loss {line['loss_mean']:.4f}  {line['images_per_second']:,.0f}/s{mfu}  "
                f"matching {line['matching']:.1%}  "
                f"‖x−z‖ {line['distance']:.1f} of {line['distance_unmatched']:.1f}")

    def grid_seconds(self) -> float:
        """That 64 samples will take: an evaluation is about a third of a step."""
        seconds = (time.monotonic() - self.begin) / max(1, self.steps)
        return seconds / 3 * self.recipe.sample_steps * 64 * ranks()[1] / self.recipe.batch

    def summary(self, seconds: float, interrupted: bool) -> dict:
        here, made = time.monotonic() - self.begin, self.steps
        return {"recipe": dataclasses.asdict(self.recipe), "steps": self.run.step,
                "images": self.run.step * self.recipe.batch, "seconds": round(seconds, 1), "processes": ranks()[1],
                "this_call": {"steps": made, "seconds": round(here, 1),  # the machine may be another one each time
                              "images_per_second": round(made * self.recipe.batch / max(here, 1e-9), 1)},
                "precision": str(self.run.dtype)[6:], "compiled": self.run.compiled,
                "parameters": sum(p.numel() for p in self.run.net.parameters()),
                "interrupted": interrupted, "stopped_early": interrupted and self.run.step < self.recipe.steps}


def _mean_over_processes(losses: Tensor) -> Tensor:
    if ranks()[1] > 1:
        group.all_reduce(losses)
    return losses / ranks()[1]


@contextmanager
def progress(run: FastTraining, recipe: Recipe, console: Console, rank: int) -> Iterator[Callable[[str], None]]:
    """A live line; yields what sets its text."""
    begin, first = time.monotonic(), run.step
    bar = Progress(BarColumn(bar_width=8), TextColumn("{task.fields[line]}  left"), TimeRemainingColumn(),
                   console=console, disable=rank > 0 or first >= recipe.steps)
    task = bar.add_task("", total=1.0, completed=first / recipe.steps, line="")

    def show(line):
        spent = (time.monotonic() - begin) / (60 * recipe.minutes) if recipe.minutes else 0
        bar.update(task, completed=max(run.step / recipe.steps, spent), line=line)

    with bar:
        yield show


# ---------------------------------------------------------------------------------------------------
# When to stop
# ---------------------------------------------------------------------------------------------------


class Decide:
    """After each step: whether to stop and whether to save. Processes agree now and then, on the first one's clock and
    on anyone's signal, as all must do the same step next."""

    def __init__(self, recipe: Recipe, run: FastTraining, interrupt: Interrupt):
        self.recipe, self.run, self.interrupt = recipe, run, interrupt
        self.begin = self.saved = time.monotonic()
        self.first = self.next = run.step

    def __call__(self) -> tuple[bool, bool]:
        now, last = time.monotonic(), self.run.step >= self.recipe.steps
        if self.run.step < self.next and not last:
            return False, False
        pressed = bool(self.interrupt)
        late = bool(self.recipe.minutes and now - self.begin > 60 * self.recipe.minutes)
        save = now - self.saved > 60 * self.recipe.save_minutes
        if ranks()[1] > 1:
            a_while = max(1, int(AGREE * (self.run.step - self.first) / max(now - self.begin, 1e-9)))
            pressed, late, save, a_while = self._agreed(pressed, late, save, a_while)
            self.next = self.run.step + a_while
        if save:
            self.saved = now
        if pressed:
            self.interrupt.pressed = True  # another process may be the one that was
        return pressed or late or last, save

    def _agreed(self, *ours):
        """Whether any was interrupted; the rest is as the first process says."""
        told = [None] * ranks()[1]
        group.all_gather_object(told, ours)
        return any(pressed for pressed, *_ in told), *told[0][1:]


class Interrupt:
    """True once Ctrl-C was pressed or SIGTERM came: the loop ends after a whole step, so that nothing is saved half
    done. A Ctrl-C after that stops at once; a SIGTERM does not, as a cluster and torchrun each send one. `say` is
    called at the first, as a step may take a minute."""

    def __init__(self, say: Callable[[], None]):
        self.pressed, self.say = False, say

    def __bool__(self):
        return self.pressed

    def __enter__(self):
        self.before = {number: signal.signal(number, self._press) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _press(self, *_):
        self.pressed = True
        signal.signal(signal.SIGINT, self.before[signal.SIGINT])
        self.say()
