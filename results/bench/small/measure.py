"""Time small batches of a NoisePool, by this checkout and an earlier one in turn, over whole lives of the pool.

    PYTHONPATH=. python results/bench/small/measure.py --out results/bench/small/h200.csv [--old FOLDER] [--rounds 5]

FOLDER is a checkout of commit 583a1bc, or any other with `from dansm import NoisePool`. Samples are 4×32×32, in float32
or as --dtype has it, the cost is "squared". --device cpu --tiny tries it. A life that is not counted comes first.

queued_ms   a call among others that wait for nothing: the time of some dozens, at ten to twenty moments of a life, each
            with one wait at its end, over their number
waiting_ms  a single call and the wait for its noises: the median of ten at each of these moments
least_, most_   of all rounds, of which the columns above are the median
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

HERE = Path(__file__).resolve()
COLUMNS = "queued_ms", "waiting_ms"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--old", type=Path, help="the other checkout")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", default="1,2,4,8")
    parser.add_argument("--match-size", default="1000,10000")
    parser.add_argument("--shape", default="4x32x32")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    sizes = [80, 160] if given.tiny else numbers(given.match_size)
    shape = [1, 2, 2] if given.tiny else numbers(given.shape.replace("x", ","))
    cases = [{"match_size": size, "batch": batch, "shape": shape, "dtype": given.dtype, "device": given.device}
             for size in sizes for batch in numbers(given.batches)]
    folders = {"now": HERE.parents[3]} | ({"old": given.old.resolve()} if given.old else {})
    workers = {build: started(folder) for build, folder in folders.items()}
    times = {}
    try:
        for worker in workers.values():  # both compile at the same time
            ask(worker, cases)
        hardware, *_ = [answer(worker) for worker in workers.values()]
        for _ in range(given.rounds):
            for case in cases:
                for build, worker in workers.items():
                    ask(worker, case)
                    key = build, case["match_size"], case["batch"]
                    times.setdefault(key, []).append(answer(worker))
            rows = write(given.out, times, shape, given.dtype, hardware)
        for row in rows:
            print(*list(row.values())[:-1], sep="\t")
    finally:
        for worker in workers.values():
            worker.stdin.close()
            worker.wait()


def numbers(text):
    return [int(number) for number in text.split(",")]


def started(folder):
    return subprocess.Popen([sys.executable, HERE, "--serve"], cwd=folder, text=True, stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(folder)})


def ask(worker, question):
    worker.stdin.write(json.dumps(question) + "\n")
    worker.stdin.flush()


def answer(worker):
    line = worker.stdout.readline()
    if not line:
        raise SystemExit(f"a worker has ended with code {worker.wait()}: its own message says why")
    return json.loads(line)


def write(path, times, shape, dtype, hardware):
    rows = []
    for (build, match_size, batch), rounds in times.items():
        row = {"build": build, "shape": "×".join(map(str, shape)), "dtype": dtype, "match_size": match_size,
               "batch": batch}
        for column in COLUMNS:
            values = [found[column] for found in rounds]
            row |= {column: round(median(values), 4), f"least_{column}": round(min(values), 4),
                    f"most_{column}": round(max(values), 4)}
        rows.append(row | {"rounds": len(rounds), "hardware": hardware})
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return rows


# ------------ In the process of a checkout ----------------------------------------------------------------------------


def serve():
    """Answer each line of stdin: a list of cases by the hardware's name, once all are ready; a case by its times."""
    import torch

    pools = {}
    for line in sys.stdin:
        question = json.loads(line)
        if isinstance(question, list):
            for case in question:
                pools[json.dumps(case)] = ready(case)
            is_gpu = question[0]["device"] == "cuda"
            told = f"{torch.cuda.get_device_name() if is_gpu else 'CPU'}, torch {torch.__version__}"
        else:
            told = life(*pools[json.dumps(question)], question["match_size"] // question["batch"])
        print(json.dumps(told), flush=True)


def ready(case):
    """A pool at the end of a life, and batches to match."""
    import torch

    import dansm

    if Path(dansm.__file__).parent != Path.cwd():
        raise SystemExit(f"{Path.cwd()}: dansm comes from {dansm.__file__}, expected that of the checkout")
    device, dtype = case["device"], getattr(torch, case["dtype"])
    pool = dansm.NoisePool(case["match_size"], case["shape"], cost="squared", device=device, dtype=dtype, seed=0)
    generator = torch.Generator(device).manual_seed(1)
    x = torch.randn(50, case["batch"], *case["shape"], generator=generator, device=device).div(2).to(dtype)
    life(pool, list(x), case["match_size"] // case["batch"])
    return pool, list(x)


def life(pool, batches, calls):
    """The times of one life of the pool, in ms."""
    moments = 20 if calls >= 1000 else 10 if calls >= 200 else 5
    queued, waiting, count = 0.0, [], 0
    for moment in range(moments):
        here = calls * (moment + 1) // moments - calls * moment // moments
        singles = min(10, here // 2)
        for call in range(singles):
            begin = time.perf_counter()
            pool(batches[call % len(batches)])
            wait(pool)
            waiting.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        for call in range(singles, here):
            pool(batches[call % len(batches)])
        wait(pool)
        queued += time.perf_counter() - begin
        count += here - singles
    return {"queued_ms": 1000 * queued / count, "waiting_ms": 1000 * median(waiting)}


def wait(pool):
    if pool.noise.is_cuda:
        import torch

        torch.cuda.synchronize()


if __name__ == "__main__":
    if sys.argv[1:] == ["--serve"]:
        serve()
    else:
        main()
