"""Time whole training steps of several checkouts on one GPU, in turn, several rounds.

    python results/bench/train/measure.py 583a1bc=FOLDER@10 now=. tries=.@10 --out h200.csv [--rounds 6]

A step is all that `dansm train` does for one: the next batch, its noises from a pool of 10,000, gradients, weights and
average. Each checkout has a process, which holds both networks ready; only one computes at a time. A round is a pool's
life, so that every noise is drawn and every pool runs empty. The 25 longest kernels of the last checkout go to a file
of the same name that ends in -kernels.csv. FOLDER@N lets cuDNN try N ways of each convolution, 0 for all, as long runs
let it try ten, and 583a1bc all runs; else it tries none. --tiny tries all of it on a CPU.

median_ms, least_ms, most_ms  of the steps of one round, by the GPU's clock
loss                          mean of these steps
times_faster                  than the first checkout in the same round
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

CASES = {"ddpm": dict(shape=(3, 32, 32), batch=128, match_size=10_000),
         "ncsnpp": dict(shape=(4, 32, 32), batch=250, match_size=10_000)}
TINY = {"small": dict(shape=(3, 8, 8), batch=4, match_size=16)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", nargs="*", metavar="NAME=FOLDER")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    cases = TINY if given.tiny else CASES
    if given.serve:
        serve(cases, "cpu" if given.tiny else "cuda")
        return
    with tempfile.TemporaryDirectory() as folder:
        builds = {name: started(path, f"{folder}/{name}", given.tiny)
                  for name, _, path in (checkout.partition("=") for checkout in given.checkouts)}
        for name, build in builds.items():
            print(name, "is ready:", answer(build), flush=True)
        rows = compare(builds, cases, given.rounds, given.out)
        *_, last = builds.values()
        kernels = [row for case in cases for row in ask(last, kernels=case)]
        for build in builds.values():
            build.stdin.close()
            build.wait()
    if kernels:
        write(given.out.with_name(given.out.stem + "-kernels.csv"), kernels)
    show(rows, kernels)


def started(folder, kernels, tiny):
    """A process that serves the checkout in `folder`; it begins at once to compile."""
    folder, _, limit = folder.partition("@")
    folder = Path(folder).resolve()
    environment = os.environ | {"PYTHONPATH": str(folder), "TRITON_CACHE_DIR": kernels, "WAYS_OF_CUDNN": limit}
    return subprocess.Popen([sys.executable, Path(__file__).resolve(), "--serve", *["--tiny"][: tiny]], cwd=folder,
                            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def answer(build):
    line = build.stdout.readline()
    if not line:
        raise SystemExit("a checkout ended; its message is above")
    return json.loads(line)


def ask(build, **question):
    build.stdin.write(json.dumps(question) + "\n")
    build.stdin.flush()
    return answer(build)


def compare(builds, cases, rounds, out):
    """The rows of all rounds, which `out` holds as they come."""
    rows = []
    for number in range(rounds):
        for case in cases:
            medians = {}
            for name, build in builds.items():
                row = ask(build, steps=case)
                medians[name] = row["median_ms"]
                faster = round(next(iter(medians.values())) / row["median_ms"], 4)
                rows.append({"case": case, "build": name, "round": number, **row, "times_faster": faster})
                write(out, rows)
    return rows


def write(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def show(rows, kernels):
    for row in kernels:
        print(f"{row['case']:8} {row['ms']:8.3f} ms {row['calls']:>6} × {row['kind']:30} {row['kernel'][:80]}")
    for case, build in dict.fromkeys((row["case"], row["build"]) for row in rows):
        of_build = [row for row in rows if (row["case"], row["build"]) == (case, build)]
        times, rates, faster = ([row[name] for row in of_build]
                                for name in ("median_ms", "images_per_second", "times_faster"))
        print(f"{case:8} {build:10} {median(times):7.3f} ms ({min(times):.3f} to {max(times):.3f}), "
              f"{median(rates):,.0f} images/s, {median(faster):.3f} times ({min(faster):.3f} to {max(faster):.3f}), "
              f"loss of the last round {of_build[-1]['loss']}")


# ------------ One checkout --------------------------------------------------------------------------------------------


def serve(cases, kind):
    """Make the runs of all cases, say so, and answer questions until there are none."""
    out, sys.stdout = sys.stdout, sys.stderr  # answers alone go there
    import torch

    device = torch.device(kind)
    if ways := os.environ["WAYS_OF_CUDNN"]:
        torch.backends.cudnn.benchmark, torch.backends.cudnn.benchmark_limit = True, int(ways)
    try:
        from dansm.scale.bench import train
    except ImportError:  # before its modules had rooms
        from scale import bench_train as train
    runs = {name: Run(name, train=train, device=device, **case) for name, case in cases.items()}
    say = {name: run.first_step_s for name, run in runs.items()}
    while True:
        print(json.dumps(say), file=out, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        ((question, name),) = json.loads(line).items()
        say = getattr(runs[name], question)()


class Run:
    """Training of one case without end, by the bench of the checkout."""

    def __init__(self, network, shape, batch, match_size, train, device):
        import time

        import torch

        import dansm

        self.train, self.device, self.batch = train, device, batch
        case = train.Case(network, shape, batch)
        self.name = network
        if device.type == "cpu":
            train.IMAGES = 40
            dansm.NETWORKS[network] = dict(width=8, multipliers=(1,), blocks=1, attention_at=())
        images = getattr(train, "synthetic", None) or train.made_up
        loader = getattr(train, "loader", None) or train.data
        begin = time.perf_counter()
        torch.manual_seed(0)
        run = train.new_run(case, train.OURS, device)
        self.losses, gradients = [], run.gradients
        run.gradients = lambda *batch: self.losses.append(gradients(*batch))
        pool = dansm.NoisePool(match_size, shape, device=device, seed=0)
        batches = loader.batches(images(case, 0, device), batch, seed=0, device=device)
        self.moments = train.steps(run, batches, pool, device)
        self.several = match_size // batch if device.type == "cuda" else 3
        next(self.moments)
        self.wait()
        self.first_step_s = round(time.perf_counter() - begin, 2)
        self.steps()  # is not counted

    def wait(self):
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def steps(self):
        """Milliseconds of the steps of a pool's life."""
        self.losses.clear()
        begins = [next(self.moments)[0] for _ in range(self.several)]
        ends = [*begins[1:], self.train.moment(self.device)]
        self.wait()
        times = [self.train.between(begin, end) for begin, end in zip(begins, ends, strict=True)]
        row = {"steps": len(times), "median_ms": median(times), "least_ms": min(times), "most_ms": max(times)}
        row = {name: round(value, 4) for name, value in row.items()}
        row["loss"] = round(sum(loss.item() for loss in self.losses) / len(self.losses), 5)
        return row | {"images_per_second": round(1000 * self.batch / row["median_ms"], 1)}

    def kernels(self):
        if self.device.type != "cuda":
            return []
        rows = (row[1] if isinstance(row, tuple) else row for row in self.train.profile(self.name, self.moments))
        return [{name: row.get(name, "") for name in ("case", "kind", "kernel", "ms", "calls")} for row in rows]


if __name__ == "__main__":
    main()
