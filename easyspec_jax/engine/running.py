"""A batch whose free rows take new texts while the others go on.

Jobs and the server fill it in their own ways: a job from a list, the server as requests come.
"""

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Generic, TypeVar

import numpy as np

from easyspec_jax.decode.loop import Batch
from easyspec_jax.engine.completion import Generation

Name = TypeVar("Name")


class RunningBatch(Generic[Name]):
    """Texts in the rows of a batch, each under a name of the caller's."""

    def __init__(self, batch: Batch, rows: int) -> None:
        """Take over a batch whose rows are all free.

        Args:
            batch: The batch.
            rows: How many rows it has.
        """
        self._batch, self._rows = batch, rows
        self._held: dict[int, tuple[Name, Generation]] = {}

    def __len__(self) -> int:
        """Return how many rows have a text."""
        return len(self._held)

    @property
    def free(self) -> int:
        """Rows without a text."""
        return self._rows - len(self._held)

    def enter(self, name: Name, text: Generation) -> None:
        """Give the first free row to a text; its prefill is dispatched."""
        row = next(row for row in range(self._rows) if row not in self._held)
        self._held[row] = name, text
        text.begun = time.perf_counter()
        self._batch.enter(row, text.prompt_ids, text.limit, text.sampling)
        text.stats = replace(text.stats, cached_tokens=int(self._batch.cached[row]))

    def leave(self, name: Name) -> None:
        """Free the row of a text that is not finished."""
        row = next(row for row, held in self._held.items() if held[0] == name)
        self._free(row)

    def step(self) -> Iterator[tuple[Name, Generation]]:
        """Dispatch a round, then yield each text that has a report, once for each report.

        A finished text has left its row by then. Others may leave between two results.
        """
        for read in self._batch.step():
            for index in np.flatnonzero(read.current):
                row = int(read.rows[index])
                if row not in self._held:  # it left since the report was read
                    continue
                name, text = self._held[row]
                text.take(read.report, int(index), self._batch.read_at[row])
                if text.finished:
                    self._free(row)
                yield name, text

    def _free(self, row: int) -> None:
        del self._held[row]
        self._batch.leave(row)
