"""Time `dansm toy` and `dansm digits` of several checkouts, one after the other, several times around.

    python results/bench/tiny/measure.py before=FOLDER now=. --out cpu.csv [--commands toy,digits] [--rounds 3]

A row for each command and checkout. A second call adds its rounds: all are in a .json next to it.

wall_s, least_wall_s, most_wall_s  from the start to the end of the process, median of all rounds
cpu_s, least_cpu_s, most_cpu_s     user and system time of the process and of those that it starts
others                             share of the machine's cores that other work had meanwhile, mean
"""

import argparse
import csv
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean, median

CPUINFO = Path("/proc/cpuinfo")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--commands", default="toy,digits")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="of OpenMP; by default as many as there are cores")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    times = given.out.with_suffix(".json")
    found = json.loads(times.read_text()) if times.exists() else {}
    for _ in range(given.rounds):
        for command in given.commands.split(","):
            for checkout in given.checkouts:
                name, _, folder = checkout.partition("=")
                taken = timed(command, Path(folder).resolve(), given.threads)
                threads = given.threads or os.cpu_count()
                found.setdefault(f"{command} {name} {threads}", []).append(taken)
                times.write_text(json.dumps(found, indent=1))
                write(given.out, found)
                print(command, name, taken, flush=True)


def timed(command, folder, threads):
    """{"wall", "cpu", "others"}: seconds, seconds, and the share of the machine that other work had."""
    environment = os.environ | {"PYTHONPATH": str(folder)}
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    with tempfile.TemporaryDirectory() as out:
        begin, cpu, busy = time.monotonic(), cpu_of_children(), cpu_of_machine()
        subprocess.run([sys.executable, folder / "dansm.py", command, "--device", "cpu", "--out", out], check=True,
                       cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wall, cpu = time.monotonic() - begin, cpu_of_children() - cpu
        others = max(0, cpu_of_machine() - busy - cpu) / wall / os.cpu_count()
    return {"wall": wall, "cpu": cpu, "others": others}


def cpu_of_children():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def cpu_of_machine():
    user, nice, system = map(int, Path("/proc/stat").read_text().split()[1:4])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")


def write(path, found):
    models = [line.partition(":")[2].strip() for line in CPUINFO.read_text().splitlines()
              if line.startswith("model name")]
    rows = []
    for name, rounds in found.items():
        row = dict(zip(("command", "checkout", "threads"), name.split(), strict=True))
        for key in ("wall", "cpu"):
            values = [taken[key] for taken in rounds]
            row |= {f"{key}_s": f"{median(values):.1f}", f"least_{key}_s": f"{min(values):.1f}",
                    f"most_{key}_s": f"{max(values):.1f}"}
        row |= {"others": f"{fmean(taken['others'] for taken in rounds):.2f}", "rounds": len(rounds),
                "processor": f"{len(models)} × {models[0]}"}
        rows.append(row)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
