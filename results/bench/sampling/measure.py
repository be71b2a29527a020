"""Time sampling and `dansm evaluate` of this checkout and of an older one, one after the other, several times around.

    git worktree add FOLDER 583a1bc
    PYTHONPATH=. python results/bench/sampling/measure.py --old FOLDER --data cifar10-train.tar.xz --out h200.csv
    PYTHONPATH=. python results/bench/sampling/measure.py --old FOLDER --out FILE.csv --device cpu --tiny

Networks have random weights. The packages of `pip install '.[eval]'` must be there. Kernels are compiled, and features
of the real images computed, before anything is timed, by both checkouts.

--parts   which parts, comma-separated, of:
sampling  10,000 images in 5 Euler steps by the NCSN++ of 61.8 M parameters, in processes that stay: --rounds times
evaluate  `dansm evaluate` of the proof's network, from the start of the process to its end: --evaluations times
guided    the same by classes, with guidance 1.5, of this checkout alone
calls     one call of both networks: layers launched one by one or as a CUDA graph, by size of the batch
phases    what the rows of an evaluation consist of

median_s, least_s, most_s  of the rounds; of calls in milliseconds: median_ms and so on
rows_s                     of an evaluation: the sum of its rows' own seconds, without start and real images
images_per_second          of the median
faster                     the other checkout's median over this one's
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image

import dansm

NEW = Path(__file__).resolve().parents[3]
IS_NEW = hasattr(dansm, "__path__")  # in an older checkout scale/ is a package of its own
COLUMNS = ("part", "build", "way", "images", "median_s", "least_s", "most_s", "median_ms", "least_ms", "most_ms",
           "rounds", "rows_s", "images_per_second", "faster", "device", "torch")
PARTS = "sampling,evaluate,guided,calls,phases"
FULL = {"ncsnpp": dict(channels=4, size=32), "count": 10_000, "steps": [3, 5, 10, 20, 50], "guided": [5, 10, 20],
        "proof": dict(size=32, width=64, multipliers=(1, 2, 2, 2), blocks=2, dropout=0.0, biggan=False),
        "batches": [250, 500, 2000]}
TINY = {"ncsnpp": dict(channels=4, size=8, width=8, multipliers=(1, 2), blocks=1, attention_at=()), "count": 60,
        "proof": dict(size=32, width=8, multipliers=(1, 2), blocks=1, attention_at=(), dropout=0.0, biggan=False),
        "steps": [2, 3], "guided": [2], "batches": [4, 8]}
EULER_STEPS = 5


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", type=Path, help="a checkout to compare with")
    parser.add_argument("--data", help="real images with a folder for each class")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--parts", default=PARTS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--evaluations", type=int, default=1)
    parser.add_argument("--tiny", action="store_true", help="networks of a few thousand parameters, to try this out")
    parser.add_argument("--child", help="what this process does for another one")
    given = parser.parse_args()
    if given.child:
        return CHILDREN[given.child](given)
    measure(given)


# ------------ The parts -----------------------------------------------------------------------------------------------


def measure(given):
    parts = given.parts.split(",")
    table = Table(given)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        work = Path(folder)
        given.data = given.data and str(Path(given.data).resolve())
        if given.tiny:
            given.data = str(draw_images(work / "images"))
        builds = {"now": NEW, **({"old": given.old.resolve()} if given.old else {})}
        for name in ("plain", "classes"):
            child(given, NEW, f"make-{name}", cwd=work).wait()
        drawing, warming = {}, []
        for name, checkout in builds.items():
            if "sampling" in parts:
                drawing[name] = stack.enter_context(child(given, checkout, "sampling", talks=True))
            if "evaluate" in parts:
                warming.append(evaluation(given, name, checkout, work, work / f"warm-{name}", "2", warm=True))
        if {"guided", "phases"} & set(parts):
            warming.append(evaluation(given, "now", NEW, work, work / "warm-guided", "2", guided=True, warm=True))
        for process in warming:
            finish(process)
        for process in drawing.values():
            answer(process)  # it is ready
        for _ in range(given.rounds if drawing else 0):
            for name, process in drawing.items():
                process.stdin.write("draw\n")
                process.stdin.flush()
                table.add("sampling", name, f"{EULER_STEPS} steps", answer(process)["seconds"])
        for process in drawing.values():
            process.stdin.close()
            process.wait()
        for number in range(given.evaluations):
            for name, checkout in builds.items() if "evaluate" in parts else ():
                evaluate(table, "evaluate", name, checkout, work, f"{name}-{number}")
        for number in range(given.evaluations if "guided" in parts else 0):
            evaluate(table, "guided", "now", NEW, work, f"guided-{number}", guided=True)
        for part in (part for part in ("calls", "phases") if part in parts):
            process = child(given, NEW, part, cwd=work)
            for line in process.stdout:
                if line.startswith("{"):
                    row = json.loads(line)
                    table.add(part, "now", row["way"], *row["values"], unit=row["unit"])
            finish(process)
    table.show()


def evaluate(table, part: str, name: str, checkout: Path, work: Path, out: str, guided: bool = False) -> None:
    """Time one call of `dansm evaluate`, and keep the seconds of its rows."""
    steps = ",".join(map(str, sizes_of(table.given)["guided" if guided else "steps"]))
    begin = time.perf_counter()
    finish(evaluation(table.given, name, checkout, work, work / out, steps, guided=guided))
    seconds = time.perf_counter() - begin
    rows = json.loads((work / out / "evaluate.json").read_text())["rows"]
    table.add(part, name, f"{steps} steps", seconds, rows_s=round(sum(row["seconds"] for row in rows), 2))
    for row in rows:
        table.add(f"{part}: rows", name, f"{row['steps']} steps" if "steps" in row else "real images", row["seconds"])
        print(name, row.get("steps", "real images"), row["frechet_distance"], flush=True)


def evaluation(given, name: str, checkout: Path, work: Path, out: Path, steps: str, guided: bool = False,
               warm: bool = False) -> subprocess.Popen:
    """Begin a call of `dansm evaluate`, which finds the features of the real images in a folder of the checkout's."""
    features = "efficientnet-lite0" if checkout == NEW else "scale.evaluate:efficientnet_lite0"
    command = [sys.executable, checkout / "dansm.py", "evaluate", work / ("classes" if guided else "plain"), "--data",
               given.data, "--features", features, "--steps", steps, "--device", given.device, "--cache",
               work / f"cache-{name}", "--out", out, "--count", 20 if warm else sizes_of(given)["count"]]
    if guided:
        command += ["--guidance", "1.5"]
    return subprocess.Popen(list(map(str, command)), cwd=checkout, env=environment(checkout),
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def child(given, checkout: Path, part: str, cwd: Path | None = None, talks: bool = False) -> subprocess.Popen:
    """Begin a process of this file, with the modules of that checkout."""
    command = [sys.executable, __file__, "--child", part, "--device", given.device, "--data", given.data or ""]
    return subprocess.Popen(command + ["--tiny"] * given.tiny, cwd=cwd or checkout, env=environment(checkout),
                            stdin=subprocess.PIPE if talks else subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)


def environment(checkout: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(checkout)}


def answer(process: subprocess.Popen) -> dict:
    """The next line of JSON that a process writes."""
    for line in process.stdout:
        if line.startswith("{"):
            return json.loads(line)
    raise SystemExit(f"a process ended with code {process.wait()} before it was done")


def finish(process: subprocess.Popen) -> None:
    said, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"{' '.join(process.args)} ended with code {process.returncode}:\n{said}")


def draw_images(folder: Path) -> Path:
    """A few images in two classes, in the place of real ones."""
    random = np.random.default_rng(0)
    for number in range(120):
        path = folder / ("first", "second")[number % 2] / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (32, 32, 3), np.uint8)).save(path)
    return folder


class Table:
    """What was measured: a row for each part, build and way, written after every value."""

    def __init__(self, given):
        self.given, self.values, self.more, self.units = given, {}, {}, {}
        on_gpu = given.device != "cpu"
        self.about = {"device": torch.cuda.get_device_name() if on_gpu else "cpu", "torch": torch.__version__}

    def add(self, part: str, build: str, way: str, *values: float, unit: str = "s", **more) -> None:
        key = part, build, way
        self.values.setdefault(key, []).extend(values)
        self.units[key] = unit
        for name, value in more.items():
            self.more.setdefault(key, {}).setdefault(name, []).append(value)
        print(*key, *values, flush=True)
        self.write()

    def write(self) -> None:
        with self.given.out.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows())

    def rows(self) -> Iterator[dict]:
        count = sizes_of(self.given)["count"]
        for (part, build, way), values in self.values.items():
            unit = self.units[part, build, way]
            digits = 3 if unit == "s" else 4
            row = {"part": part, "build": build, "way": way, "rounds": len(values)}
            row |= {f"{name}_{unit}": round(of(values), digits)
                    for name, of in (("median", median), ("least", min), ("most", max))}
            row |= {name: median(several) for name, several in self.more.get((part, build, way), {}).items()}
            if part == "sampling":
                row |= {"images": count, "images_per_second": round(count / median(values), 1)}
            if build == "now" and (others := self.values.get((part, "old", way))):
                row["faster"] = round(median(others) / median(values), 2)
            yield row | self.about

    def show(self) -> None:
        for row in self.rows():
            print({name: value for name, value in row.items() if name not in self.about})


# ------------ What other processes do ---------------------------------------------------------------------------------


def awake(net):
    """The network with no weight at zero: at its start it is blind to most of its own weights."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in net.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=generator)
    return net.eval().requires_grad_(False)


def sizes_of(given) -> dict:
    return TINY if given.tiny else FULL


def make(given, classes: bool):
    """Write a checkpoint of the proof's network, which both builds read, into a folder of this one."""
    from dansm.scale.data.labels import load_labels
    from dansm.scale.data.loader import stream_images
    from dansm.scale.model import checkpoint

    torch.manual_seed(0)
    names = []
    if classes:
        with stream_images(given.data).open() as (count, _):
            names = load_labels(given.data, "folders", count).names
    net = awake(dansm.UNet(**sizes_of(given)["proof"], classes=len(names)))
    folder = Path("classes" if classes else "plain")
    folder.mkdir()
    recipe = {"flow": "rectified", "times": "uniform", "target": "noise", "size": 0, "labels": "folders"}
    checkpoint.save(folder, {
        "network": net.settings, "recipe": recipe, "data": given.data, "images": None, "latents": None,
        "classes": names, "training": {"step": 1, "averages": [{"decay": 0.9, "weights": net.state_dict()}]},
        "ranks": [{}]})


def sampling(given):
    """Draw images each time a line comes, and write how long it took."""
    if IS_NEW:
        from dansm.scale.model.sampling import at_once, sample_images, sampler
    else:
        from scale.samples import sample_images
        from scale.step import at_once, sampler

    sizes, device = sizes_of(given), torch.device(given.device)
    torch.manual_seed(0)
    net = awake(dansm.UNet(**sizes["ncsnpp"])).to(device)
    batch = min(sizes["count"], at_once(net, device))
    network = sampler(net, device)
    shape = net.settings["channels"], net.settings["size"], net.settings["size"]

    def draw(count: int) -> float:
        begin = time.perf_counter()
        drawn = sum(len(images) for images in sample_images(
            network, dansm.RectifiedFlow(), range(count), shape, EULER_STEPS, batch=batch, device=device))
        assert drawn == count
        return time.perf_counter() - begin

    draw(batch)
    print(json.dumps({"ready": True}), flush=True)
    for _ in sys.stdin:
        print(json.dumps({"seconds": draw(sizes["count"])}), flush=True)


def calls(given):
    """Time single calls of both networks."""
    from dansm.scale.bench import clock
    from dansm.scale.model import sampling

    sizes, device = sizes_of(given), torch.device(given.device)
    replayed = sampling.Replayed
    ways = {"launched": lambda predict: predict}
    if device.type == "cuda":
        ways |= {"graph": replayed, "graph, cudnn.benchmark": replayed}
    for name, batch in ((name, batch) for name in ("ncsnpp", "proof") for batch in sizes["batches"]):
        net = awake(dansm.UNet(**sizes[name])).to(device)
        x = torch.randn(batch, *net.shape, device=device)
        t = torch.full((batch,), 500.0, device=device)
        for way, replay in ways.items():
            torch.backends.cudnn.benchmark = "benchmark" in way
            sampling.Replayed = replay
            predict = sampling.sampler(net, device)
            for _ in range(3):
                predict(x, t)
            values = [round(clock.milliseconds(device, predict, x, t), 4) for _ in range(6)]
            print(json.dumps({"way": f"{name}, batch {batch}, {way}", "values": values, "unit": "ms"}), flush=True)
            del predict
        torch.cuda.empty_cache()


def phases(given):
    """Time what the rows of an evaluation consist of, one after the other."""
    from dansm.scale.base.noise import path_noise
    from dansm.scale.bench import clock
    from dansm.scale.data.labels import load_labels
    from dansm.scale.data.loader import stream_images
    from dansm.scale.evaluate import by_class, extractors, measures, real_features
    from dansm.scale.model import load
    from dansm.scale.model import sampling as room

    sizes, device = sizes_of(given), torch.device(given.device)
    count, numbers = sizes["count"], range(sizes["count"])

    def timed(way: str, work, times: int = 2) -> None:
        """Write seconds of all calls but the first, unless that is the only one."""
        values = [clock.milliseconds(device, work) / 1000 for _ in range(times)]
        print(json.dumps({"way": way, "values": values[1:] or values, "unit": "s"}), flush=True)

    extractor = extractors.load_extractor(extractors.LITE0, device)
    real = real_features.real_features(stream_images(given.data), extractor, device, cache=Path("cache-now"))
    labels = load_labels(given.data, "folders", real.count)
    reference = measures.Reference(real, extractor, device=device)
    classes = by_class.Classes(labels.names, labels, real, device)
    of_images = classes.drawn(numbers, 0)
    timed("noises", lambda: path_noise(numbers, (3, 32, 32)))
    model = load.load_model(Path("classes"))
    ready = model.on(device)
    batch = room.at_once(model.net, device, room.Guidance(1.5))
    for guidance in (room.UNGUIDED, room.Guidance(1.5)):
        images = partial(room.sample_images, ready.net, model.flow, numbers, model.shape, EULER_STEPS, batch=batch,
                         device=device, labels=of_images, guidance=guidance, to_cpu=False)
        timed(f"network, {EULER_STEPS} steps, guidance {guidance.weight:g}", partial(exhaust, images))
    images = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, device=device)
    timed("features", lambda: extractors.features_of_all([images], extractor, device))
    features, _ = extractors.features_of_all([images], extractor, device)
    timed("root of the real covariance, once", lambda: reference.root, 1)
    timed("Fréchet distance", lambda: measures.frechet_distance(features, reference))
    timed("kernel distance", lambda: measures.kernel_distance(features, real.features, "kernel", device))
    timed("precision and recall", lambda: measures.precision_recall(features, count, reference))
    timed("classes", lambda: classes.score(features, of_images, "distance"))
    timed("real images", lambda: measures.floor(reference, count), 1)


def exhaust(images: Callable[[], Iterator]) -> None:
    for _ in images():
        pass


CHILDREN = {"make-plain": lambda given: make(given, False), "make-classes": lambda given: make(given, True),
            "sampling": sampling, "calls": calls, "phases": phases}

if __name__ == "__main__":
    main()
