"""What a study says while it runs: lines that are safe to show, and how far it is."""

import contextlib
import contextvars
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from tbptt_jax.study.process.writing import plain

console = Console(width=None if sys.stdout.isatty() else 100, markup=False, emoji=False)
_quiet = contextvars.ContextVar("quiet", default=False)


def say(text: str) -> None:
    """Prints a line that may hold a user's words: nothing in it is interpreted, and it is not broken."""
    if not _quiet.get():
        _print(text)


def _print(text: str) -> None:
    console.print(plain(text), markup=False, highlight=False, soft_wrap=True)


def table(title: str, heads: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> Table:
    """A table, its first ``left`` columns flush left and the others right."""
    out = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for i, head in enumerate(heads):
        out.add_column(head, justify="left" if i < left else "right")
    for row in rows:
        out.add_row(*row)
    return out


@contextlib.contextmanager
def quieted(quiet: bool) -> Iterator[None]:
    """Nothing is said inside, if so, and no progress begun there is shown."""
    before = _quiet.set(quiet or _quiet.get())
    try:
        yield
    finally:
        _quiet.reset(before)


@contextlib.contextmanager
def progress(total: int, unit: str) -> Iterator[Callable[[float, str], None]]:
    """Shows ``report(done, text)``: a live bar on a terminal, elsewhere a plain line every few seconds."""
    if _quiet.get():
        yield lambda done, text: None
        return
    if console.is_terminal:
        columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TextColumn(unit)
        with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
            task = bar.add_task("", total=total)
            yield lambda done, text: bar.update(task, completed=done, description=text)
        return

    began = last = time.monotonic()

    def report(done: float, text: str) -> None:
        nonlocal last
        if time.monotonic() - last > 5 or done == total:
            last = time.monotonic()
            left = (last - began) * (total - done) / done if done else 0
            _print(f"{done:.4g} of {total} {unit}, {left:.0f} s left  {text}")

    yield report
