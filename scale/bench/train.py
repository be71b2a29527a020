"""What training costs, in one run on one machine: whole steps, their input, sampling, and what a step is made of.

A step here is all that `dansm train` does for one: the next batch, its noises matched, gradients, weights, averages.
Its time is the GPU's own, from the beginning of one step to that of the next, over a pool's whole life: the draw of
its noises and its nearly empty end are in it. What was measured is on the disk after each row.
"""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import dansm

from ..base.files import write_csv, write_json
from ..base.machine import hardware, lacks_memory, peak
from ..base.text import counted, say_files
from ..data import loader
from ..model.recipe import Recipe
from ..model.sampling import at_once, operations_per_image, sample_images, sampler
from ..train import step
from .match import hardware_of, image_like, milliseconds, number, peak_mb, reset_peak, spread, timed, wait

OURS, UNMATCHED, EAGER, PLAIN = "ours", "ours, no matching", "plain, --no-compile", "plain float32"
IMAGES = 50_000  # as many as CIFAR-10 has
PROFILED = 8  # steps: every eighth batch of 250 draws a part of the next pool
EULER_STEPS = 5
TABLES = ("steps", "input", "sampling", "profile", "start")


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


PAPER = Case("ncsnpp", (4, 32, 32), 250), Case("ddpm", (3, 32, 32), 128)
# Images a second of others, measured on an H100 before this project's first line, and not again in this run.
BEFORE = {PAPER[0]: ("the paper's code", 795), PAPER[1]: ("torchcfm's UNet, no matching", 1017)}


def cases(network: str | None, batch: int, shape: tuple[int, ...], device: torch.device) -> list[Case]:
    """The paper's two settings, or only `network` with this batch and shape. On a CPU the paper's with two images a
    step, as it would not come to an end with more. Raises BadInput for images that the network cannot take."""
    if network is None:
        return [case if device.type == "cuda" else case._replace(batch=2) for case in PAPER]
    case = Case(dansm.check_choice("--network", network, tuple(dansm.NETWORKS)), shape, batch)
    if len(shape) != 3 or shape[1] != shape[2]:
        raise dansm.BadInput(f"--shape is {'x'.join(map(str, shape))}: expected square images, as in 3x32x32")
    with torch.device("meta"):
        dansm.UNet(**case.settings)
    return [case]


def bench_train(cases: list[Case], match_size: int, *, samples: int | None, first_step: bool, seed: int,
                device: torch.device, out: Path, console: Console) -> dict:
    """Measure all parts; prints tables, writes train.json, train.csv and train.png. A part that fails, as where memory
    does not suffice, is left out with a word.

    match_size  noises in the pool of the steps that are matched
    samples     images that are sampled; None: 10,000, and four on a CPU
    first_step  also run `dansm train` itself, until its first step is done
    """
    for case in cases:  # what does not fit is said before anything is measured
        dansm.NoisePool(match_size, case.shape, device=device)
    bench = {"hardware": hardware(device), "match_size": match_size, "left_out": {}, "kernels": [],
             "measured_before": {case.name: BEFORE[case] for case in cases if case in BEFORE}}
    bench |= {table: [] for table in TABLES}
    samples = samples or (10_000 if device.type == "cuda" else 4)
    parts = list(parts_of(cases, match_size, samples, first_step, seed, device))
    for part, rows in track(parts, "measuring", console=console):
        try:
            for table, row in rows:
                bench[table].append(row)
                compare(bench)
                write_json(out / "train.json", bench)
        except Exception as error:  # whatever it is, the other parts are worth having
            reason = str(error).partition("\n")[0] or type(error).__name__
            bench["left_out"][part] = "not enough memory" if lacks_memory(error) else reason
            console.print(f"left out: {part}: {bench['left_out'][part]}", soft_wrap=True, markup=False)
    write_json(out / "train.json", bench)
    write_csv(out / "train.csv", [{"part": table, **row} for table in TABLES for row in bench[table]])
    print_tables(bench, console)
    draw(bench, out / "train.png")
    say_files(out, "train.png", "train.csv", "train.json")
    return bench


def parts_of(cases, match_size, samples, first_step, seed, device) -> Iterator[tuple[str, Iterator[tuple[str, dict]]]]:
    """(the part's name, its rows, each with the table it belongs to), nothing measured until a row is asked for."""
    for case in cases:
        for way in (OURS, EAGER, PLAIN):
            yield f"{case.name}, {way}", training(case, way, match_size, seed, device)
    for case in cases:
        yield f"input of {case.name}", inputs(case, seed, device)
    yield f"sampling from {cases[0].network}", sampling(cases[0], samples, seed, device)
    yield "import", importing(device)
    if first_step:
        yield f"first step of {cases[0].name}", starting(cases[0], match_size, seed, device)


def made_up(case: Case, seed: int, device) -> Tensor:
    """Images as a run keeps them: uint8 where they are grey or in colour, float16 where they are latents."""
    images = image_like(IMAGES, case.shape, seed, device)
    return ((images + 1) * 127.5).byte() if case.shape[0] in (1, 3) else images.half()


# ---------------------------------------------------------------------------------------------------
# Steps
# ---------------------------------------------------------------------------------------------------


def training(case: Case, way: str, match_size: int, seed: int, device: torch.device) -> Iterator[tuple[str, dict]]:
    """A row of "steps" for one way of training; for ours also the step without matching, and its profile.

    first_step_s  from making the network to the end of the first step: kernels are compiled and a graph recorded,
                  but for kernels that an earlier run on this machine has left
    peak_gib      at most allocated at once, the images and the pool of noises included
    """
    images = made_up(case, seed, device)
    gc.collect()  # of the way before, whose memory would count as this one's
    reset_peak(device)
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, way != PLAIN  # as the trainer does
    begin = time.perf_counter()
    torch.manual_seed(seed)
    try:
        run = new_run(case, way, device)
        pool = dansm.NoisePool(match_size, case.shape, device=device, seed=seed)
        with closing(loader.batches(images, case.batch, seed=seed, device=device)) as batches:
            made = steps(run, batches, pool, device)
            next(made), wait(device)
            first = {"first_step_s": round(time.perf_counter() - begin, 2)}
            row = timed_steps(made, case, match_size, device)
            yield "steps", {**row, "way": way, **first, "peak_gib": round(peak_mb(device) * 1e6 / 2**30, 2),
                            "compiled": getattr(run, "compiled", False)}
            if way == OURS:
                unmatched = steps(run, batches, dansm.NoisePool(0, case.shape, device=device, seed=seed), device)
                row = timed_steps(unmatched, case, match_size, device)
                yield "steps", {**row, "way": UNMATCHED, "matching_ms": None, "matching_share": None}
                if device.type == "cuda":
                    yield from profile(case, made)
    finally:
        torch.backends.cudnn.benchmark = before


def new_run(case: Case, way: str, device: torch.device) -> dansm.Training:
    net = dansm.UNet(**case.settings).to(device)
    if way == PLAIN:
        return dansm.Training(net)
    return step.FastTraining(net, Recipe(data="", network=case.network, batch=case.batch, compile=way == OURS), device)


def steps(run: dansm.Training, batches: Iterator[Tensor], pool: dansm.NoisePool, device) -> Iterator[tuple]:
    """One step after the other, without end, each with the moments at which it began, its matching began and ended."""
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


def timed_steps(made: Iterator[tuple], case: Case, match_size: int, device: torch.device) -> dict:
    """Of as many steps as a pool lives, 40 at least, after ten that are not counted; on a CPU of two after one.

    matching_share  of the time, the sum over these steps: few batches pay for the draw of the next pool
    mfu             share of the GPU's peak in bf16, in all rows, that the network has
    """
    gpu = device.type == "cuda"
    deque(islice(made, 10 if gpu else 1), maxlen=0)
    moments = list(islice(made, max(40, -(-match_size // case.batch)) if gpu else 2))
    ends = [begin for begin, _, _ in moments[1:]] + [moment(device)]
    wait(device)
    times = [between(begin, end) for (begin, _, _), end in zip(moments, ends, strict=True)]
    matching = [between(before, after) for _, before, after in moments]
    row = {"case": case.name, "way": None, **spread(times)}
    row["steps"] = row.pop("calls")
    row |= {"images_per_second": round(1000 * case.batch / row["median_ms"], 1),
            "matching_ms": round(sum(matching) / len(matching), 4),
            "matching_share": round(sum(matching) / sum(times), 4)}
    if floor := floor_ms(case, device):
        row |= {"mfu": round(floor / row["median_ms"], 4), "floor_ms": round(floor, 3)}
    return row


def floor_ms(case: Case, device: torch.device) -> float | None:
    """Of a step: the network's operations at the GPU's peak; None for a GPU that is not known."""
    best = peak(device)
    return best and 1000 * case.batch * operations_per_image(case.settings) / best


def moment(device: torch.device):
    """Now: on a GPU an event among its work, so that neither waits for the other."""
    if device.type != "cuda":
        wait(device)
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(before, after) -> float:
    """Milliseconds; of events only once the GPU has passed them."""
    return 1000 * (after - before) if isinstance(before, float) else before.elapsed_time(after)


# ---------------------------------------------------------------------------------------------------
# What a step is made of
# ---------------------------------------------------------------------------------------------------

REST = "everything else"
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


def kind_of(kernel: str) -> str:
    """The kind of work that a kernel of this name does."""
    return next((kind for kind, pattern in KINDS if pattern.search(kernel)), REST)


def profile(case: Case, made: Iterator[tuple]) -> Iterator[tuple[str, dict]]:
    """Rows of "profile", one for each kind of work, and the longest kernels: milliseconds of one step."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as listen

    for name, value in ("DISABLE_CUPTI_LAZY_REINIT", "1"), ("TEARDOWN_CUPTI", "0"):
        os.environ.setdefault(name, value)  # listening to a graph a second time is an error of CUDA else
    for heard_steps in (1, PROFILED):  # the first time is not counted: it loses kernels while it begins
        with listen(activities=[ProfilerActivity.CUDA]) as heard:
            deque(islice(made, heard_steps), maxlen=0)
            torch.cuda.synchronize()
    kernels = [(event.name, event.time_range.elapsed_us() / 1000 / PROFILED) for event in heard.events()
               if event.device_type == torch.autograd.DeviceType.CUDA and not is_note(event)]
    if not kernels:
        raise dansm.BadInput("the profiler saw no kernel: expected a torch with CUPTI, and the right to profile")
    yield from by_kind(case, kernels)


def is_note(event) -> bool:
    """Whether it is no kernel but a span that someone named, as an optimizer names its step."""
    return getattr(event, "is_user_annotation", False) or event.name.startswith(("Optimizer.", "ProfilerStep"))


def by_kind(case: Case, kernels: list[tuple[str, float]]) -> Iterator[tuple[str, dict]]:
    """(kernel's name, milliseconds) → rows, the longest kind first and the 25 longest kernels."""
    kinds, longest, calls = Counter(), Counter(), Counter(name for name, _ in kernels)
    for name, taken in kernels:
        kinds[kind_of(name)] += taken
        longest[name] += taken
    whole = sum(kinds.values())
    for kind, taken in kinds.most_common():
        yield "profile", {"case": case.name, "kind": kind, "ms": round(taken, 3), "share": round(taken / whole, 4)}
    for name, taken in longest.most_common(25):
        yield "kernels", {"case": case.name, "kernel": name[:200], "kind": kind_of(name), "ms": round(taken, 4),
                          "calls": round(calls[name] / PROFILED, 2)}


# ---------------------------------------------------------------------------------------------------
# Input, sampling, and how long it takes to begin
# ---------------------------------------------------------------------------------------------------


def inputs(case: Case, seed: int, device: torch.device) -> Iterator[tuple[str, dict]]:
    """Batches and nothing else: from images that live on the device, and from a file that was just written, so that it
    comes from memory where there is enough, not from the disk."""
    images = made_up(case, seed, device)
    yield "input", {"case": case.name, "way": "on the device", **input_rate(images, case.batch, seed, device, True)}
    with tempfile.TemporaryDirectory() as folder:
        path, there = Path(folder) / "images", images.cpu().numpy()
        there.tofile(path)
        mapped = np.memmap(path, there.dtype, "r", shape=there.shape)
        del images, there
        yield "input", {"case": case.name, "way": "memory-mapped",
                        **input_rate(mapped, case.batch, seed, device, False)}
        del mapped


def input_rate(images, batch: int, seed: int, device: torch.device, resident: bool) -> dict:
    """Milliseconds a batch: five times 40 batches, on a CPU of 4."""
    several = 40 if device.type == "cuda" else 4
    with closing(loader.batches(images, batch, seed=seed, device=device, resident=resident)) as batches:
        spread = timed(lambda: deque(islice(batches, several), maxlen=0), device, 5)
    row = {name: round(value / several, 4) for name, value in spread.items() if name.endswith("_ms")}
    return row | {"images_per_second": round(1000 * several * batch / spread["median_ms"], 1)}


def sampling(case: Case, samples: int, seed: int, device: torch.device) -> Iterator[tuple[str, dict]]:
    """Images 0 … samples − 1 from noise to uint8 on the CPU, the draw of their noises included: three times."""
    flow, net = dansm.RectifiedFlow(), dansm.UNet(**case.settings).to(device).eval().requires_grad_(False)
    together = min(samples, at_once(net, device))
    net = sampler(net, device)

    def draw(count):
        deque(sample_images(net, flow, range(count), case.shape, EULER_STEPS, seed=seed, batch=together,
                                  device=device), maxlen=0)

    first = milliseconds(lambda: draw(together), device)  # kernels are compiled and loaded
    times = spread([milliseconds(lambda: draw(samples), device) for _ in range(3 if device.type == "cuda" else 1)])
    row = {"case": case.name, "way": f"{EULER_STEPS} Euler steps, {together} at once", "images": samples, **times,
           "images_per_second": round(1000 * samples / times["median_ms"], 1), "first_batch_s": round(first / 1000, 2)}
    if floor := floor_ms(case, device):  # forward is a third of a training step
        row["floor_ms"] = round(floor / 3 / case.batch * samples * EULER_STEPS, 1)
    yield "sampling", row


def importing(device: torch.device) -> Iterator[tuple[str, dict]]:
    """What any `dansm train` takes before it has read its options."""
    command, home = [sys.executable, "-c", "import dansm, scale.command"], Path(dansm.__file__).parent
    times = [milliseconds(lambda: subprocess.run(command, cwd=home, check=True), torch.device("cpu"))
             for _ in range(3 if device.type == "cuda" else 1)]
    yield "start", {"way": "import dansm, scale.command", **spread(times)}


def starting(case: Case, match_size: int, seed: int, device: torch.device) -> Iterator[tuple[str, dict]]:
    """`dansm train` as it is called, on latents made up, until the first line of its log: compiled and not, with no
    kernel compiled before."""
    gc.collect()
    reset_peak(device)  # gives back what is free, for the other process to have it
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "latents.npy", image_like(4 * case.batch, case.shape, seed, "cpu").half().numpy())
        for option in "--compile", "--no-compile":
            seconds = seconds_to_first_step([
                Path(folder) / "latents.npy", "--network", case.network, "--batch", case.batch, "--match-size",
                match_size, option, "--device", device.type, "--steps", 1, "--log-steps", 1], Path(folder) / option)
            yield "start", {"case": case.name, "way": f"dansm train {option}", **spread([1000 * seconds])}


def seconds_to_first_step(arguments: list, out: Path) -> float:
    """From the command to the first line of metrics.jsonl; the process is ended there. RuntimeError, with its last
    word, if it ended before by itself."""
    out.mkdir()
    command = [sys.executable, dansm.__file__, "train", *arguments, "--out", out / "run"]
    log, begin = out / "run" / "metrics.jsonl", time.perf_counter()
    with open(out / "said", "w") as said:
        process = subprocess.Popen([str(word) for word in command], stdout=said, stderr=said,
                                   env={**os.environ, "TRITON_CACHE_DIR": str(out / "kernels")})
        try:
            while True:
                ended = process.poll() is not None  # before the log is looked at, lest it be written in between
                if log.exists() and log.stat().st_size:
                    return time.perf_counter() - begin
                if ended:
                    raise RuntimeError(((out / "said").read_text().splitlines() or ["dansm train said nothing"])[-1])
                time.sleep(0.02)
        finally:
            process.kill()
            process.wait()


# ---------------------------------------------------------------------------------------------------
# What is shown
# ---------------------------------------------------------------------------------------------------


def compare(bench: dict) -> None:
    """What takes several rows: matching's share as the difference it makes, the sum of a step's kernels, and how many
    times the step's rate input alone has."""
    rows = {(row["case"], row["way"]): row for row in bench["steps"]}
    for (case, way), row in rows.items():
        if way == OURS and (without := rows.get((case, UNMATCHED))):
            row["matching_share_by_difference"] = round(1 - without["mean_ms"] / row["mean_ms"], 4)
        if way == OURS and (kinds := [kind["ms"] for kind in bench["profile"] if kind["case"] == case]):
            row["kernels_ms"] = round(sum(kinds), 3)
    for row in bench["input"]:
        if ours := rows.get((row["case"], OURS)):
            row["times_the_step"] = round(row["images_per_second"] / ours["images_per_second"], 1)


def print_tables(bench: dict, console: Console) -> None:
    """A table of steps and one of kinds of work for each network, and a line for each other figure."""
    for case in dict.fromkeys(row["case"] for row in bench["steps"]):
        console.print(steps_table(bench, case))
        if any(row["case"] == case for row in bench["profile"]):
            console.print(profile_table(bench, case))
    for line in lines_of(bench):
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def steps_table(bench: dict, case: str) -> Table:
    words = "MFU: of the peak in bf16.  first: seconds to the end of the first step.  match: its share of the step."
    table = Table(title=f"A training step: {case}, match_size {bench['match_size']:,}\n{hardware_of(bench)}",
                  caption=words, box=box.SIMPLE_HEAD, pad_edge=False, padding=0)
    for name in "way", "images/s", "ms", "least", "most", "MFU", "GiB", "first", "match":
        table.add_column(name, justify="left" if name == "way" else "right", no_wrap=True)
    for row in bench["steps"]:
        if row["case"] == case:
            times = [number(row[name]) for name in ("median_ms", "least_ms", "most_ms")]
            table.add_row(row["way"], number(row["images_per_second"]), *times, _percent(row.get("mfu")),
                          *("" if name not in row else f"{row[name]:.1f}" for name in ("peak_gib", "first_step_s")),
                          _percent(row.get("matching_share")))
    return table


def profile_table(bench: dict, case: str) -> Table:
    table = Table(title=f"One step of ours by kind of work: {case}", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("kind"), table.add_column("ms", justify="right"), table.add_column("share", justify="right")
    for row in bench["profile"]:
        if row["case"] == case:
            table.add_row(row["kind"], f"{row['ms']:.2f}", _percent(row["share"]))
    return table


def lines_of(bench: dict) -> Iterator[str]:
    for row in bench["steps"]:
        if "matching_share_by_difference" in row:
            yield (f"matching, {row['case']}: {_percent(row['matching_share'])} of the step by its own time, "
                   f"{_percent(row['matching_share_by_difference'])} by the difference it makes")
    for row in bench["input"]:
        times = f", {row['times_the_step']:,} times the step's rate" if "times_the_step" in row else ""
        yield f"input alone, {row['case']}, {row['way']}: {row['images_per_second']:,.0f} images/s{times}"
    for row in bench["sampling"]:
        yield (f"sampling {counted(row['images'], 'image')} in {row['way']}: {row['median_ms'] / 1000:.2f} s, "
               f"{number(row['images_per_second'])} images/s")
    for row in bench["start"]:
        yield f"{row['way']}: {row['median_ms'] / 1000:.1f} s"
    for case, (who, rate) in bench["measured_before"].items():
        yield f"measured before on an H100, {case}: {who}, {rate:,} images/s"


def _percent(share):
    return "" if share is None else f"{100 * share:.1f} %"


def draw(bench: dict, path: Path) -> None:
    """Images a second of each way beside others' as measured before, and what a step is made of."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(13.0, 5.2), layout="constrained", width_ratios=(1, 1.2))
    draw_rates(bench, left)
    draw_profile(bench, right)
    figure.suptitle(f"Training with matching at {bench['match_size']:,}, {hardware_of(bench)}", fontsize=11)
    figure.savefig(path, dpi=150)
    plt.close(figure)


WAYS = {PLAIN: "#bbbbbb", EAGER: "#55a3d9", OURS: "#1f5fa8", UNMATCHED: "#2a9d6f"}


def draw_rates(bench: dict, axes) -> None:
    bars = []  # (label, images a second, least, most, color), from below
    for case in reversed(list(dict.fromkeys(row["case"] for row in bench["steps"]))):
        rows = {row["way"]: row for row in bench["steps"] if row["case"] == case}
        for way in reversed([way for way in WAYS if way in rows]):
            row, rate = rows[way], rows[way]["images_per_second"]
            least, most = (rate * row["median_ms"] / row[end] for end in ("most_ms", "least_ms"))
            bars.append((way, rate, least, most, WAYS[way]))
        if case in bench["measured_before"]:
            who, rate = bench["measured_before"][case]
            bars.append((f"{who}\n(measured before on an H100)", rate, rate, rate, "#c44e52"))
        bars.append((case, 0, 0, 0, "none"))
    for place, (_, rate, least, most, color) in enumerate(bars):
        axes.barh(place, rate, color=color, xerr=[[rate - least], [most - rate]] if most > least else None,
                  error_kw=dict(ecolor="#444444", elinewidth=0.8, capsize=2))
        if rate:
            axes.annotate(f"{rate:,.0f}", (most, place), xytext=(4, 0), textcoords="offset points", fontsize=8,
                          va="center")
    axes.set_yticks(range(len(bars)), [label for label, *_ in bars], fontsize=8)
    for label, bar in zip(axes.get_yticklabels(), bars, strict=True):
        label.set_weight("normal" if bar[1] else "bold")
    axes.margins(x=0.15)
    axes.set(xlabel="images a second: median step, slowest to quickest", xlim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)


def draw_profile(bench: dict, axes) -> None:
    from matplotlib import colormaps

    names = list(dict.fromkeys(row["case"] for row in bench["profile"]))[::-1]
    kinds = list(dict.fromkeys(row["kind"] for row in bench["profile"]))
    axes.spines[["top", "right"]].set_visible(False)
    if not names:
        axes.set_axis_off()
        axes.annotate("no profile: kernels are profiled on a GPU", (0.5, 0.5), xycoords="axes fraction", ha="center")
        return
    colors = dict(zip(kinds, colormaps["tab20"].colors, strict=False))
    for place, case in enumerate(names):
        rows = {row["kind"]: row["ms"] for row in bench["profile"] if row["case"] == case}
        end = 0.0
        for kind, taken in rows.items():
            axes.barh(place, taken, left=end, color=colors[kind], height=0.55)
            end += taken
        floor = next((row["floor_ms"] for row in bench["steps"] if row["case"] == case and "floor_ms" in row), None)
        if floor:
            axes.plot([floor, floor], [place - 0.38, place + 0.38], "k--", linewidth=1.2)
            axes.annotate(f"floor {floor:.1f} ms", (floor, place + 0.39), fontsize=8, ha="center", va="bottom")
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set(xlabel="milliseconds of one step of ours, by kernels; floor: operations at the peak",
             ylim=(-0.6, len(names) - 0.2))
    for kind in kinds:
        axes.barh(0, 0, color=colors[kind], label=kind)
    axes.legend(fontsize=8, frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.14))
