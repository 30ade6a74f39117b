"""A batch whose rows take one text after another (refill), one round ahead of the host."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Int

from easyspec_jax.decode.growth import CacheGrowth
from easyspec_jax.decode.loop import settle
from easyspec_jax.decode.programs import Programs
from easyspec_jax.decode.round import Report
from easyspec_jax.options import SamplingParams

FREE = -1
"""Text number of a row without a text."""


class _Unread(NamedTuple):
    """A report on the devices, with the rows it is about and the texts that they had."""

    report: Report
    rows: Int[np.ndarray, " some"]
    texts: Int[np.ndarray, " some"]


class Batch:
    """Rows on the devices, all free at first.

    A round is dispatched before the report of the one before it is read. By the time a report is
    read, a row may have been left and taken by another text. So texts are numbered as they enter,
    and a report counts only for rows that still have the text it is about.
    """

    def __init__(self, programs: Programs, rows: int, capacity: int) -> None:
        """Start with free rows.

        Args:
            programs: Compiled steps.
            rows: Rows of the batch.
            capacity: Capacity of the caches at first; they grow.
        """
        self._programs, self._growth = programs, CacheGrowth(programs, rows, capacity)
        self._state = programs.start(SamplingParams(), [0] * rows, capacity)
        self._text = np.full(rows, FREE)  # number of each row's text
        self._texts = 0  # texts that have entered
        self._unread: list[_Unread] = []

    def enter(self, row: int, prompt: Sequence[int], limit: int, sampling: SamplingParams) -> None:
        """Give a free row a text.

        Args:
            row: The row.
            prompt: Token ids, at least one.
            limit: Tokens that may follow.
            sampling: Temperature, top-k, top-p and seed of this text.
        """
        self._growth.enter(row, len(prompt), limit)
        self._text[row] = self._texts
        self._texts += 1
        self._state, report = self._programs.enter(
            self._growth.grow_if_needed(self._state), row, prompt, limit, sampling
        )
        self._unread.append(_Unread(report, np.asarray([row]), self._text[[row]]))

    def leave(self, row: int) -> None:
        """Free a row. Reports still in flight for its text are dropped."""
        self._growth.leave(row)
        self._text[row] = FREE

    def step(self) -> Iterator[tuple[int, Report, int]]:
        """Dispatch a round, then read the reports of what came before it.

        Rows may be left between two reports. A text's first report is that of its prefill.

        Yields:
            A row; a report of NumPy arrays; and the row's index in that report, which is 0 for a
            prefill.
        """
        # Unread by now: the round before this one, and the prefills of texts that entered since.
        self._state, ahead = self._programs.round(self._growth.grow_if_needed(self._state))
        unread = self._unread
        # The round's report is about the texts that rows have now: keep a copy of their numbers.
        self._unread = [_Unread(ahead, np.arange(len(self._text)), self._text.copy())]
        for device, rows, texts in unread:
            report = jax.device_get(device)
            current = (texts == self._text[rows]) & (texts != FREE)
            # The report's rows may be few; CacheGrowth counts all: [some] -> [batch].
            tokens = np.zeros_like(self._text)
            tokens[rows] = report.num_tokens * current
            self._growth.read(tokens)
            for index in np.flatnonzero(current):
                yield int(rows[index]), report, int(index)

    def close(self) -> None:
        """Wait for the devices."""
        settle(self._state)
