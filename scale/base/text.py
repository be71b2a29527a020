"""Messages and tables on the console."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

console = Console()


class Stopped(Exception):
    """Ctrl-C was pressed; the message says what is kept. (Typer drops the message of a KeyboardInterrupt.)"""


def say(*words: str) -> None:
    """Print a line as it is: long paths are not broken, and [brackets] are no markup."""
    console.print(*words, soft_wrap=True, markup=False, highlight=False)


def say_files(out: Path, *names: str) -> None:
    say("written:", ", ".join(str(out / name) for name in names))


def with_bar(work: Iterable, text: str, total: float | None = None) -> Iterable:
    """The items of `work`, under a progress bar. On a terminal the bar disappears when it is full."""
    return track(work, text, total=total, console=console, transient=console.is_terminal)


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
