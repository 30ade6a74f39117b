"""Progress of what takes long, for whoever watches a terminal."""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

Advance = Callable[[int], None]
"""Reports that so much more is done."""


class Bar(Protocol):
    """A way to show progress while a block runs: bar, or no_bar."""

    def __call__(
        self, description: str, total: int | None = None, *, in_bytes: bool = False
    ) -> AbstractContextManager[Advance]: ...


@contextmanager
def no_bar(
    description: str, total: int | None = None, *, in_bytes: bool = False
) -> Iterator[Advance]:
    """Shows nothing."""
    yield lambda amount: None


@contextmanager
def bar(description: str, total: int | None = None, *, in_bytes: bool = False) -> Iterator[Advance]:
    """A progress bar on stderr while the block runs, gone after it; nothing at all where the output goes elsewhere.

    Without a total the bar only shows that time passes. in_bytes: total and what advances it are bytes, not things.
    """
    if not (sys.stderr.isatty() and sys.stdout.isatty()):
        yield lambda amount: None
        return
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
    # stdout is left alone: rich would send what is printed there to stderr.
    with Progress(
        *columns, console=Console(stderr=True), transient=True, redirect_stdout=False
    ) as progress:
        task = progress.add_task(description, total=total)
        yield lambda amount: progress.advance(task, amount)
