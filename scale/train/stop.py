"""When a run stops or saves: steps, minutes, Ctrl-C, SIGTERM."""

import signal
import time
from collections.abc import Callable
from typing import Self

from ..base.processes import ranks
from .step import FastTraining
from .together import everyones

AGREE = 0.5  # seconds between two moments at which processes agree whether to stop or to save


class Interrupt:
    """True once Ctrl-C or SIGTERM came. The loop then ends after a whole step, so that nothing is saved half done.

    A Ctrl-C after that stops at once. A SIGTERM does not: a cluster and torchrun each send one. `say` is called at the
    first, as a step may take a minute.
    """

    def __init__(self, say: Callable[[], None]):
        self.pressed = False
        self.say = say

    def __bool__(self) -> bool:
        return self.pressed

    def __enter__(self) -> Self:
        self.before = {number: signal.signal(number, self._press) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _press(self, *_) -> None:
        self.pressed = True
        signal.signal(signal.SIGINT, self.before[signal.SIGINT])
        self.say()


class Decide:
    """Call it after each step: whether to stop, and whether to save.

    Several processes must decide the same after the same step. They agree about every AGREE seconds: they stop if any
    of them was interrupted, and otherwise go by the first one's clock.
    """

    def __init__(self, run: FastTraining, interrupt: Interrupt):
        self.run = run
        self.interrupt = interrupt
        self.begin = self.saved = time.monotonic()
        self.first_step = self.next_step = run.step

    def __call__(self) -> tuple[bool, bool]:
        recipe = self.run.recipe
        last = self.run.step >= recipe.steps
        if self.run.step < self.next_step and not last:
            return False, False
        now = time.monotonic()
        interrupted = bool(self.interrupt)
        late = bool(recipe.minutes and now - self.begin > 60 * recipe.minutes)
        save = now - self.saved > 60 * recipe.save_minutes
        if ranks()[1] > 1:
            steps_a_second = (self.run.step - self.first_step) / max(now - self.begin, 1e-9)
            answers = everyones((interrupted, late, save, max(1, int(AGREE * steps_a_second))))
            interrupted = any(answer[0] for answer in answers)
            _, late, save, steps = answers[0]
            self.next_step = self.run.step + steps
        if save:
            self.saved = now
        if interrupted:
            self.interrupt.pressed = True  # another process may be the one that was
        return interrupted or late or last, save
