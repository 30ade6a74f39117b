"""A batch whose rows take one text after another, while a round is dispatched before the last one's report is read."""

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


class _Unread(NamedTuple):
    """A report on the devices: of which rows, and of which texts, numbered as they came."""

    report: Report
    rows: Int[np.ndarray, " some"]
    texts: Int[np.ndarray, " some"]


class Batch:
    """Rows on the devices, all free at first; capacity: of the caches, which grow."""

    def __init__(self, programs: Programs, rows: int, capacity: int) -> None:
        self._programs, self._growth = programs, CacheGrowth(programs, rows, capacity)
        self._state = programs.start(SamplingParams(), [0] * rows, capacity)
        self._text, self._texts = np.full(rows, FREE), 0
        self._unread: list[_Unread] = []

    def enter(self, row: int, prompt: Sequence[int], limit: int, sampling: SamplingParams) -> None:
        """Gives a free row a text of token ids, to be continued by up to `limit` more."""
        self._growth.enter(row, len(prompt), limit)
        self._text[row], self._texts = self._texts, self._texts + 1
        self._state, report = self._programs.enter(
            self._growth.grow_if_needed(self._state), row, prompt, limit, sampling
        )
        self._unread.append(_Unread(report, np.asarray([row]), self._text[[row]]))

    def leave(self, row: int) -> None:
        """Frees a row; what is still reported of its text is nobody's."""
        self._growth.leave(row)
        self._text[row] = FREE

    def step(self) -> Iterator[tuple[int, Report, int]]:
        """Dispatches a round, and reads what came before it: of each row the report and the row's place in it.

        Of a text the first report is its prefill's. Rows may be left between two of them.
        """
        self._state, ahead = self._programs.round(self._growth.grow_if_needed(self._state))
        unread = self._unread
        self._unread = [_Unread(ahead, np.arange(len(self._text)), self._text.copy())]
        for device, rows, texts in unread:
            report = jax.device_get(device)
            current = (texts == self._text[rows]) & (texts != FREE)
            tokens = np.zeros_like(self._text)
            tokens[rows] = report.num_tokens * current
            self._growth.read(tokens)
            for place in np.flatnonzero(current):
                yield int(rows[place]), report, int(place)

    def close(self) -> None:
        """Waits for the devices."""
        settle(self._state)
