"""kill -9 a run that saves often, again and again. Each time it must resume from the last checkpoint that was whole.

`make soak` kills 50 times and writes results/soak/kill.json; test_soak.py kills a few times.
"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from support import make_images, same

from dansm.scale.base.files import make_folder, write_json
from dansm.scale.base.machine import hardware
from dansm.scale.base.text import say_files
from dansm.scale.model import checkpoint

ROOT = Path(__file__).parents[2]
KILLS, IN_SAVES, SEED = 50, 10, 0
LATEST = 2.0  # seconds after a run is under way in which it is killed
THREADS = 1  # of each run: on a busy machine two would wait for each other
PATIENCE = 120  # seconds for a run to get under way, or to begin a save


def soak(command: Callable[[int], list], out: Path, kills: int, seed: int) -> list[dict]:
    """Kill `command(steps)`, which trains into `out`, at so many random moments, every second one inside a save.

    Each kill gives {"moment": seconds since the run was under way, "in_save": bool, "saved": the step of the newest
    whole checkpoint at that moment, "saving": the step that was being written or None, "resumed": the step from which
    the next run resumed}. Raises AssertionError if that is not "saved": no more than the time since then may be lost.
    """
    moments, killed = random.Random(seed), []
    for number in range(kills + 1):
        process, said = start(command(10**9), out)
        try:
            resumed = wait_until_under_way(process, said, out, first=not number)
            if killed:
                killed[-1]["resumed"] = resumed
                assert resumed == killed[-1]["saved"], killed[-1]
            if number < kills:
                moment = moments.uniform(0, LATEST)
                time.sleep(moment)
                if number % 2:
                    wait_for(lambda: partial(out), process, said)
                freeze(process)
                killed.append({"moment": round(moment, 3), "in_save": bool(partial(out)),
                               "saved": step(checkpoint.newest(out)), "saving": step(partial(out))})
        finally:
            process.kill()
            process.wait()
    return killed


def start(command: list, out: Path) -> tuple[subprocess.Popen, Path]:
    """The running command, and the file that gets all it says."""
    said = out.with_suffix(".said")
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": str(THREADS), "PYTHONPATH": str(ROOT)}
    with open(said, "w") as file:
        return subprocess.Popen([*map(str, command)], env=environment, stdout=file, stderr=subprocess.STDOUT), said


def wait_until_under_way(process, said: Path, out: Path, first: bool) -> int | None:
    """The step that the run says it resumes from; None for the first, which is under way when it has saved."""
    if first:
        wait_for(lambda: checkpoint.newest(out), process, said)
        return None
    wait_for(lambda: "resuming from step" in said.read_text(), process, said)
    return int(re.search(r"resuming from step ([\d,]+)", said.read_text())[1].replace(",", ""))


def wait_for(condition, process, said: Path) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None, said.read_text()
        assert time.monotonic() < end, f"nothing happened; it said {said.read_text()!r}"
        time.sleep(0.001)


def freeze(process) -> None:
    """Stop the process where it is, so that what a kill would leave can be looked at."""
    process.send_signal(signal.SIGSTOP)
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status), "the run ended by itself"


def partial(out: Path) -> Path | None:
    """The checkpoint that is being written."""
    return next(out.glob("checkpoint-*.partial"), None)


def step(path: Path | None) -> int | None:
    return path and int(re.search(r"\d+", path.name)[0])


def compare_with_never_stopped(command: Callable[[int], list], out: Path, whole: Callable[[int], list],
                               beside: Path) -> int:
    """Let the killed run end by itself, and another be never stopped; the step at which all they saved is equal but
    the seconds."""
    steps = step(checkpoint.newest(out)) + 3
    for run in (command, whole):
        process, said = start(run(steps), out)
        assert process.wait() == 0, said.read_text()
    states = [checkpoint.load(checkpoint.newest(folder)) for folder in (out, beside)]
    for state in states:
        assert state["training"]["step"] == steps and state.pop("seconds") > 0
    assert same(*states), "the run that was killed is another than the one that never stopped"
    return steps


def main() -> None:
    begin = time.monotonic()
    options = ["--network", "small", "--batch", 8, "--match-size", 100, "--sample-steps", 1, "--save-minutes", 0.004,
               "--device", "cpu"]
    with tempfile.TemporaryDirectory() as folder:
        out, beside = Path(folder, "run"), Path(folder, "never-stopped")
        images = make_images(Path(folder, "images"), count=64, width=8, height=8)

        def train_into(place, options=options):
            return lambda steps: [sys.executable, ROOT / "dansm.py", "train", images, *options, "--steps", steps,
                                  "--out", place]

        killed = soak(train_into(out), out, KILLS, SEED)
        steps = compare_with_never_stopped(train_into(out), out, train_into(beside), beside)
    in_saves = sum(kill["in_save"] for kill in killed)
    assert in_saves >= IN_SAVES, f"only {in_saves} of {KILLS} kills were inside a save, expected {IN_SAVES}"
    lost = [kill["saving"] - kill["saved"] for kill in killed if kill["in_save"]]
    out = make_folder(ROOT / "results" / "soak")
    write_json(out / "kill.json", {
        "command": " ".join(["dansm train IMAGES", *map(str, options)]), "images": "64 of 8×8 random pixels",
        "seed": SEED, "kills": len(killed), "in_save": in_saves, "most_steps_lost_in_a_save": max(lost),
        "equal_to_never_stopped_at_step": steps, "seconds": round(time.monotonic() - begin),
        "hardware": {**hardware("cpu"), "threads": THREADS}, "each": killed})
    say_files(out, "kill.json")


if __name__ == "__main__":
    main()
