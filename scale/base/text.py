"""Messages and tables on the console."""

import math
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from operator import length_hint
from pathlib import Path
from typing import Self

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

console = Console()
SOON, SELDOM = (2, 10), 30  # seconds after which plain lines tell of long work; later ones are this far apart, or 1 %
# Packages by way of which a user's line makes us warn.
BETWEEN = {"dansm", "torch", "contextlib", "concurrent", "threading", "typer", "click"}


class Stopped(Exception):
    """Ctrl-C was pressed; the message says what is kept. (Typer drops the message of a KeyboardInterrupt.)"""


def say(*words: str) -> None:
    """Print a line as it is: long paths are not broken, and [brackets] are no markup."""
    console.print(*words, soft_wrap=True, markup=False, highlight=False)


def warn(message: str) -> None:
    """Warn, naming the line of the user's that led here: the nearest one outside of the packages BETWEEN."""
    frame, level = sys._getframe(), 1
    while frame.f_back and str(frame.f_globals.get("__name__")).partition(".")[0] in BETWEEN:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def say_files(out: Path, *names: str) -> None:
    say("written:", ", ".join(str(out / name) for name in names))


class Bar:
    """The progress of long work: a live bar on a terminal, elsewhere a plain line now and then. Call it, inside `with`,
    with the share that is done, 0 to 1, and a text. It returns whether it printed a plain line.

    done     share that was done before
    seconds  after which the work stops, done or not
    keeps    leave the bar on the terminal at the end
    """

    def __init__(self, text: str, *, done: float = 0.0, seconds: float = math.inf, keeps: bool = False):
        self.began, self.done, self.first = time.monotonic(), done, None
        self.end = self.began + seconds
        self.soon = [self.began + after for after in SOON]
        self.live = None
        if console.is_terminal:
            self.live = Progress(BarColumn(8), TextColumn("{task.description}{task.fields[left]}", markup=False),
                                 console=console, transient=not keeps)
            self.task = self.live.add_task(text, total=1.0, completed=done, left="")

    def __enter__(self) -> Self:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_) -> None:
        if self.live:
            self.live.stop()

    def __call__(self, done: float | None, text: str) -> bool:
        now = time.monotonic()
        left = None if done is None else self._left(done, now)
        words = "" if left is None else f", left {clock(left)}"
        if self.live:
            self.live.update(self.task, completed=done, description=text, left=words)
        elif now >= self.soon[0] and done != 1:
            of_all = (now - self.began + (left or 0)) / 100
            self.soon = [moment for moment in self.soon if moment > now] or [now + max(SELDOM, of_all)]
            say(text + words)
            return True
        return False

    def _left(self, done: float, now: float) -> float | None:
        """The seconds left at the mean rate so far, which leaves out what came before the first step ended."""
        begin, before = self.first or (self.began, self.done)
        if done <= before:
            return None
        self.first = self.first or (now, done)
        return max(0.0, min((1 - done) * (now - begin) / (done - before), self.end - now))


def clock(seconds: float) -> str:
    """1:02:03 for 3,723 seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def with_bar(work: Iterable, text: str, total: float | None = None) -> Iterator:
    """The items of `work`, under a `Bar`, which disappears at the end."""
    total = total or length_hint(work)
    with Bar(text) as bar:
        for number, item in enumerate(work, 1):
            yield item
            share = min(1, number / total) if total else None
            bar(share, f"{text}, {number:,} of {total:,}" if total else f"{text}, {number:,}")


def counted(count: int, noun: str) -> str:
    """The count with its noun: 1 image, 2 images, 3 processes."""
    if count == 1:
        return f"1 {noun}"
    return f"{count:,} {noun}es" if noun.endswith("s") else f"{count:,} {noun}s"


def shorten(text: str, width: int) -> str:
    """The text in at most `width` letters, its middle left out."""
    if len(text) <= width:
        return text
    end = (width - 1) // 2
    return f"{text[: width - 1 - end]}…{text[len(text) - end :]}"


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "",
          texts: int = 1) -> Table:
    """A table that fits a terminal. The first `texts` columns hold text and stand left, the others numbers."""
    shown = Table(title=title, title_justify="left", caption=caption, caption_justify="left", box=box.SIMPLE_HEAD,
                  collapse_padding=True, pad_edge=False)
    for place, name in enumerate(columns):
        if place < texts:
            shown.add_column(name, overflow="fold")
        else:
            shown.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        shown.add_row(*row)
    return shown
