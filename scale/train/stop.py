"""When a run stops or saves: steps, minutes, Ctrl-C, SIGTERM."""

import signal
import time
from collections.abc import Callable
from typing import Self

from ..base.processes import everyones, ranks
from .step import FastTraining

AGREE = 0.5  # seconds between two moments at which processes agree whether to stop or to save


class Decide:
    """Call it after each step: whether to stop, and whether to save.

    Inside `with`, the first Ctrl-C or SIGTERM sets `interrupted` and calls `say`, so that the run ends after a whole
    step, which may take a minute. A Ctrl-C after that stops at once. A SIGTERM does not: a cluster and torchrun each
    send one. Several processes agree about every AGREE seconds: they stop after the same step if any of them was
    interrupted, and otherwise go by the first one's clock.
    """

    def __init__(self, run: FastTraining, say: Callable[[], None]):
        self.run = run
        self.say = say
        self.interrupted = False
        self.begin = self.saved = time.monotonic()
        self.first_step = self.next_step = run.step

    def __enter__(self) -> Self:
        self.before = {number: signal.signal(number, self._press) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _press(self, *_) -> None:
        self.interrupted = True
        signal.signal(signal.SIGINT, self.before[signal.SIGINT])
        self.say()

    def __call__(self) -> tuple[bool, bool]:
        recipe, step = self.run.recipe, self.run.step
        last = step >= recipe.steps
        if step < self.next_step and not last:
            return False, False
        now = time.monotonic()
        interrupted = self.interrupted
        late = bool(recipe.minutes and now - self.begin > 60 * recipe.minutes)
        save = now - self.saved > 60 * recipe.save_minutes
        if ranks()[1] > 1:
            steps_a_second = (step - self.first_step) / max(now - self.begin, 1e-9)
            answers = everyones((interrupted, late, save, max(1, int(AGREE * steps_a_second))))
            interrupted = any(answer[0] for answer in answers)
            _, late, save, steps = answers[0]
            self.next_step = step + steps
        if save:
            self.saved = now
        if interrupted:
            self.interrupted = True  # another process may be the one that was
        return interrupted or late or last, save
