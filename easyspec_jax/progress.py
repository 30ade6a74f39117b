"""Progress bars for long work, shown only on a terminal."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Protocol

Advance = Callable[[int], None]
"""Reports that a further amount of work is done."""

_seconds_a_line: ContextVar[float | None] = ContextVar("seconds_a_line", default=None)


class Bar(Protocol):
    """A way to show progress while a block runs: `bar` or `no_bar`."""

    def __call__(
        self, description: str, total: int | None = None, *, in_bytes: bool = False
    ) -> AbstractContextManager[Advance]: ...


@contextmanager
def no_bar(
    description: str, total: int | None = None, *, in_bytes: bool = False
) -> Iterator[Advance]:
    """Show nothing; takes the same arguments as `bar`.

    Examples:
        >>> with no_bar("Reading", 3) as advance:
        ...     advance(1)
    """
    yield lambda amount: None


@contextmanager
def bar(description: str, total: int | None = None, *, in_bytes: bool = False) -> Iterator[Advance]:
    """Show a progress bar on stderr while the block runs, and erase it afterwards.

    Nothing is shown unless stdout and stderr are both terminals.

    Args:
        description: Text to the left of the bar.
        total: Amount of work; without one, the bar shows elapsed time only.
        in_bytes: Count in bytes ("2.0/3.0 kB") instead of items ("2/3").

    Yields:
        A function that takes the amount of work just done.
    """
    if not (sys.stderr.isatty() and sys.stdout.isatty()):
        seconds = _seconds_a_line.get()
        yield (lambda amount: None) if seconds is None else _lines(description, total, seconds)
        return
    # Imported here because a command that shows no bar need not wait for rich.
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    done = DownloadColumn() if in_bytes else MofNCompleteColumn()
    numbers = (TimeElapsedColumn(),) if total is None else (done, TimeRemainingColumn())
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), *numbers)
    # Without redirect_stdout=False, rich would send printed text to stderr.
    with Progress(
        *columns, console=Console(stderr=True), transient=True, redirect_stdout=False
    ) as progress:
        task = progress.add_task(description, total=total)
        yield lambda amount: progress.advance(task, amount)


@contextmanager
def progress_lines(seconds: float = 10.0) -> Iterator[None]:
    """Let bars in this block print lines on stderr without a terminal, for logs of long runs.

    Args:
        seconds: The least time between two lines of a bar, and before its first.
    """
    token = _seconds_a_line.set(seconds)
    try:
        yield
    finally:
        _seconds_a_line.reset(token)


def _lines(description: str, total: int | None, seconds: float) -> Advance:
    """Return what prints how far a bar is, such as "Measuring: 12 of 40 after 31 s"."""
    begun = last = time.monotonic()
    done = 0

    def advance(amount: int) -> None:
        nonlocal last, done
        done += amount
        now = time.monotonic()
        if now - last >= seconds:
            share = str(done) if total is None else f"{done} of {total}"
            print(f"{description}: {share} after {now - begun:.0f} s", file=sys.stderr, flush=True)
            last = now

    return advance
