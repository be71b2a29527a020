"""What training costs: whole steps as `dansm train` makes them, their input, sampling, and what a step is made of."""

import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import dansm

from ..base.machine import peak
from ..data import loader
from ..model.recipe import Recipe
from ..model.sampling import at_once, operations_per_image, sample_images, sampler
from ..train import step
from . import clock

OURS, UNMATCHED, EAGER, PLAIN = "ours", "ours, no matching", "plain, --no-compile", "plain float32"
IMAGES = 50_000  # as many as CIFAR-10 has
EULER_STEPS = 5
TIMES = "images_per_second median_ms least_ms most_ms"
TABLES = {  # part → title, columns
    "steps": ("training steps", f"way {TIMES} mfu peak_mb first_step_s matching_share"),
    "profile": ("one step of ours by kind of work", "kind ms share"),
    "input": ("input alone", f"way {TIMES}"),
    "sampling": ("sampling", f"way images {TIMES}"),
    "start": ("until the first step is done", "way median_ms"),
}
PROFILED = 8  # steps: every eighth batch of 250 draws a part of the next pool
REST = "everything else"
NOTES = "Optimizer.", "ProfilerStep"  # begin the names of spans that are no kernels
# Names of kernels hold those of others: the first that fits counts. A triton kernel's name may end in its types.
KINDS = [(kind, re.compile(pattern, re.IGNORECASE)) for kind, pattern in [
    ("norm, SiLU and dropout", r"^_(forward|backward)(_\d\w*)?$|group_?norm|rowwisemoments|gammabeta"),
    ("sums and resampling", r"^_(sum|sum_backward|halve|double)(_\d\w*)?$|upsample|avg_pool"),
    ("matching", r"^_(shortlist|choose|hand_out)(_\d\w*)?$|normal_and_transform"),
    ("attention", r"sdpa|flash|fmha|attention|softmax"),
    ("casts and copies", r"nchwtonhwc|nhwctonchw|multi_tensor_apply.*copy"),
    ("convolution, weight gradient", r"wgrad"),
    ("convolution, input gradient", r"dgrad"),
    ("convolution, forward", r"fprop|implicit_gemm|convol|conv2d|cudnn"),
    ("matching", r"sgemm|gemm_f32f32_f32f32"),  # no other product of a step is in float32
    ("concatenation", r"catarray"),
    ("optimizer and averages", r"fusedoptimizer|adam|multi_tensor_apply|lerp"),
    ("matrix products", r"nvjet|gemm|gemv|cutlass|cublas"),
    ("reductions", r"reduce"),
    ("casts and copies", r"copy|memcpy|memset|fill"),
]]


class Case(NamedTuple):
    network: str
    shape: tuple[int, ...]
    batch: int

    @property
    def name(self) -> str:
        return f"{self.network} {'×'.join(map(str, self.shape))}, batch {self.batch}"

    @property
    def settings(self) -> dict:
        return dict(channels=self.shape[0], size=self.shape[1]) | dansm.NETWORKS[self.network]


PAPER = [Case("ncsnpp", (4, 32, 32), 250), Case("ddpm", (3, 32, 32), 128)]


def parts_of(cases: list[Case], match_size: int, samples: int, first_step: bool, seed: int,
             device: torch.device) -> Iterator[tuple[str, Iterable[dict]]]:
    for case in cases:
        for way in OURS, EAGER, PLAIN:
            yield f"{case.name}, {way}", training(case, way, match_size, seed, device)
        yield f"input of {case.name}", inputs(case, seed, device)
    yield f"sampling from {cases[0].network}", sampling(cases[0], samples, seed, device)
    if first_step:
        yield f"first step of {cases[0].name}", starting(cases[0], match_size, seed, device)


def synthetic(case: Case, seed: int, device: torch.device) -> Tensor:
    """Images as a run keeps them: uint8 where they are grey or in colour, float16 where they are latents."""
    images = clock.image_like(IMAGES, case.shape, seed, device)
    return ((images + 1) * 127.5).byte() if case.shape[0] in (1, 3) else images.half()


def training(case: Case, way: str, match_size: int, seed: int, device: torch.device) -> Iterator[dict]:
    """The row of one way of training; for ours also the step without matching, and its profile. first_step_s: from
    making the network to the end of the first step, with the compiling of kernels that no earlier run has left."""
    images = synthetic(case, seed, device)
    clock.reset_peak(device)  # the memory of the way before would count as this one's
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, way != PLAIN  # as the trainer does
    begin = time.perf_counter()
    torch.manual_seed(seed)
    try:
        run = new_run(case, way, device)
        pool = dansm.NoisePool(match_size, case.shape, device=device, seed=seed)
        with closing(loader.batches(images, case.batch, seed=seed, device=device)) as batches:
            moments = steps(run, batches, pool, device)
            next(moments)
            clock.wait(device)
            first_step = round(time.perf_counter() - begin, 2)
            row = timed_steps(moments, case, way, match_size, device)
            row |= {"first_step_s": first_step, "peak_mb": clock.peak_mb(device)}
            yield row
            if way == OURS:
                unmatched = steps(run, batches, dansm.NoisePool(0, case.shape, device=device, seed=seed), device)
                without = timed_steps(unmatched, case, UNMATCHED, match_size, device)
                row["matching_share_by_difference"] = round(1 - without["mean_ms"] / row["mean_ms"], 4)
                yield {**without, "matching_ms": None, "matching_share": None}
                if device.type == "cuda":
                    yield from profile(case.name, moments)
    finally:
        torch.backends.cudnn.benchmark = before


def new_run(case: Case, way: str, device: torch.device) -> dansm.Training:
    net = dansm.UNet(**case.settings).to(device)
    if way == PLAIN:
        return dansm.Training(net)
    return step.FastTraining(net, Recipe(data="", network=case.network, batch=case.batch, compile=way == OURS), device)


def steps(run: dansm.Training, batches: Iterator[Tensor], pool: dansm.NoisePool, device: torch.device) -> Iterator:
    """Train without end. Yields for each step the moments at which it began, and its matching began and ended."""
    flow = dansm.RectifiedFlow()
    run.net.train()
    while True:
        begin = moment(device)
        x = next(batches)
        before = moment(device)
        z = pool(x)
        after = moment(device)
        run.gradients(flow, x, z)
        run.update()
        yield begin, before, after


def timed_steps(moments: Iterator, case: Case, way: str, match_size: int, device: torch.device) -> dict:
    """The row of as many steps as a pool lives, 40 at least, after ten that are not counted; on a CPU two after one.
    Times are the GPU's own, from the beginning of a step to that of the next. mfu: of its peak in bf16, in all rows."""
    gpu = device.type == "cuda"
    take(moments, 10 if gpu else 1)
    counted = list(islice(moments, max(40, -(-match_size // case.batch)) if gpu else 2))
    ends = [begin for begin, _, _ in counted[1:]] + [moment(device)]
    clock.wait(device)
    times = [between(begin, end) for (begin, _, _), end in zip(counted, ends, strict=True)]
    matching = [between(before, after) for _, before, after in counted]
    row = {"part": "steps", "case": case.name, "way": way, **clock.spread(times, case.batch),
           "matching_ms": round(sum(matching) / len(matching), 4),
           "matching_share": round(sum(matching) / sum(times), 4)}
    if floor := floor_ms(case, device):
        row |= {"mfu": round(floor / row["median_ms"], 4), "floor_ms": round(floor, 3)}
    return row


def take(iterator: Iterator, count: int) -> None:
    """Go through the first `count`."""
    deque(islice(iterator, count), maxlen=0)


def floor_ms(case: Case, device: torch.device) -> float | None:
    """The time of a step's operations at the GPU's peak; None for an unknown GPU."""
    best = peak(device)
    return best and 1000 * case.batch * operations_per_image(case.settings) / best


def moment(device: torch.device) -> float | torch.cuda.Event:
    """Now: on a GPU an event among its work, so that neither waits for the other."""
    if device.type != "cuda":
        clock.wait(device)
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(before: float | torch.cuda.Event, after: float | torch.cuda.Event) -> float:
    """Milliseconds; of events only once the GPU has passed them."""
    return 1000 * (after - before) if isinstance(before, float) else before.elapsed_time(after)


def inputs(case: Case, seed: int, device: torch.device) -> Iterator[dict]:
    """Batches alone: of images on the device, and of a file just written, which memory holds where there is enough."""
    several = 40 if device.type == "cuda" else 4
    images = synthetic(case, seed, device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "images.npy"
        np.save(path, images.cpu().numpy())
        for way, source in ("on the device", images), ("memory-mapped", np.load(path, mmap_mode="r")):
            with closing(loader.batches(source, case.batch, seed=seed, device=device,
                                        resident=source is images)) as batches:
                times = clock.timed(device, 5, take, batches, several)
            row = clock.spread([ms / several for ms in times], case.batch)
            yield {"part": "input", "case": case.name, "way": way, **row}


def sampling(case: Case, samples: int, seed: int, device: torch.device) -> Iterator[dict]:
    """Images 0 … samples − 1 from noise to uint8 on the CPU, the draw of their noises included: three times."""
    net = dansm.UNet(**case.settings).to(device).eval().requires_grad_(False)
    together = min(samples, at_once(net, device))
    net = sampler(net, device)

    def draw_images() -> None:
        take(sample_images(net, dansm.RectifiedFlow(), range(samples), case.shape, EULER_STEPS, seed=seed,
                           batch=together, device=device), samples)

    row = {"part": "sampling", "case": case.name, "way": f"{EULER_STEPS} Euler steps, {together} at once",
           "images": samples, **clock.spread(clock.timed(device, 3, draw_images), samples)}
    if floor := floor_ms(case, device):  # forward is a third of a training step
        row["floor_ms"] = round(floor / 3 / case.batch * samples * EULER_STEPS, 1)
    yield row


def starting(case: Case, match_size: int, seed: int, device: torch.device) -> Iterator[dict]:
    """`dansm train` until the first line of its log: compiled and not, with no kernel compiled before."""
    clock.reset_peak(device)  # gives back what is free, for the other process to have it
    with tempfile.TemporaryDirectory() as folder:
        latents = Path(folder) / "latents.npy"
        np.save(latents, clock.image_like(4 * case.batch, case.shape, seed, torch.device("cpu")).half().numpy())
        for option in "--compile", "--no-compile":
            out = Path(folder) / option
            command = [sys.executable, dansm.__file__, "train", latents, "--network", case.network, "--batch",
                       case.batch, "--match-size", match_size, option, "--device", device.type, "--steps", 1,
                       "--log-steps", 1, "--sample-steps", 1, "--out", out]
            begin = time.time()
            subprocess.run(map(str, command), check=True, stdout=subprocess.DEVNULL,
                           env={**os.environ, "TRITON_CACHE_DIR": f"{folder}/kernels{option}"})
            seconds = (out / "metrics.jsonl").stat().st_mtime - begin
            yield {"part": "start", "case": case.name, "way": f"dansm train {option}", **clock.spread([1000 * seconds])}


def kind_of(kernel: str) -> str:
    """The kind of work that a kernel of this name does."""
    return next((kind for kind, pattern in KINDS if pattern.search(kernel)), REST)


def profile(case: str, moments: Iterator) -> Iterator[dict]:
    """A row for each kind of work and for the 25 longest kernels, the longest first: milliseconds of one step."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as listen

    for name, value in ("DISABLE_CUPTI_LAZY_REINIT", "1"), ("TEARDOWN_CUPTI", "0"):
        os.environ.setdefault(name, value)  # listening to a graph a second time is an error of CUDA else
    for steps_heard in (1, PROFILED):  # the first time is not counted: it loses kernels while it begins
        with listen(activities=[ProfilerActivity.CUDA]) as heard:
            take(moments, steps_heard)
            torch.cuda.synchronize()
    kinds, longest, calls = Counter(), Counter(), Counter()
    for event in heard.events():
        note = getattr(event, "is_user_annotation", False) or event.name.startswith(NOTES)
        if event.device_type == torch.autograd.DeviceType.CUDA and not note:
            ms = event.time_range.elapsed_us() / 1000 / PROFILED
            kinds[kind_of(event.name)] += ms
            longest[event.name] += ms
            calls[event.name] += 1
    if not kinds:
        raise RuntimeError("the profiler saw no kernel: expected a torch with CUPTI, and the right to profile")
    for kind, ms in kinds.most_common():
        yield {"part": "profile", "case": case, "kind": kind, "ms": round(ms, 3),
               "share": round(ms / sum(kinds.values()), 4)}
    for name, ms in longest.most_common(25):
        yield {"part": "kernels", "case": case, "kernel": name[:200], "kind": kind_of(name), "ms": round(ms, 4),
               "calls": round(calls[name] / PROFILED, 2)}
