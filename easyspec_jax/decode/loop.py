"""The host's side of decoding: dispatch one round ahead, hand out reports.

Calls to compiled steps return before the devices are done. So the host dispatches round n + 1 first
and reads the report of round n while the devices already work on the next:

    devices   | round 1 | round 2 | round 3 |
    host      dispatch 2, read 1, dispatch 3, read 2, ...

A Batch is this loop. decode() fills all its rows at once and runs it until all are done; a caller
that gives free rows new texts (refill) steps it itself.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import NamedTuple, Self

import jax
import numpy as np
from jaxtyping import Bool, Int

from easyspec_jax.decode.growth import CacheGrowth
from easyspec_jax.decode.prefilling import first_tokens, prefill_all
from easyspec_jax.decode.programs import Programs
from easyspec_jax.decode.round import Report, State
from easyspec_jax.options import SamplingParams
from easyspec_jax.progress import Bar, no_bar

FREE = -1
"""Text number of a row without a text."""


class Read(NamedTuple):
    """A report of NumPy arrays.

    Attributes:
        report: The report.
        rows: The batch's rows that it is about.
        current: Which of those still have the text that it is about.
    """

    report: Report
    rows: Int[np.ndarray, " some"]
    current: Bool[np.ndarray, " some"]


class _Unread(NamedTuple):
    """A report on the devices.

    Attributes:
        read: Waits for the report and returns it.
        rows: The batch's rows that it is about.
        texts: Numbers of the texts that they had.
    """

    read: Callable[[], Report]
    rows: Int[np.ndarray, " some"]
    texts: Int[np.ndarray, " some"]


class Batch:
    """Rows on the devices, all free at first.

    A round is dispatched before the report of the one before it is read. By the time a report is
    read, a row may have been left and taken by another text. So texts are numbered as they enter,
    and a report counts only for rows that still have the text it is about.
    """

    def __init__(self, programs: Programs, state: State, growth: CacheGrowth) -> None:
        """Take over a state; see empty() and filled()."""
        self._programs = programs
        self._state = state
        self._growth = growth
        rows = state.length.shape[0]
        self._text = np.full(rows, FREE)  # number of each row's text
        self._texts = 0  # texts that have entered
        self._unread: list[_Unread] = []

    @classmethod
    def empty(cls, programs: Programs, rows: int, capacity: int) -> Self:
        """Start with free rows.

        Args:
            programs: Compiled steps.
            rows: Rows of the batch.
            capacity: Capacity of the caches at first; they grow.
        """
        state = programs.start(SamplingParams(), [0] * rows, capacity)
        return cls(programs, state, CacheGrowth(programs, rows, capacity))

    @classmethod
    def filled(
        cls,
        programs: Programs,
        prompts: Sequence[Sequence[int]],
        limits: Sequence[int],
        sampling: SamplingParams,
        bar: Bar = no_bar,
    ) -> Self:
        """Start with a text in every row, all prefilled at once; arguments as for decode()."""
        growth = CacheGrowth(programs, len(prompts))
        for row, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
            growth.enter(row, len(prompt), limit)
        growth.capacity = growth.needed()
        batch = cls(programs, programs.start(sampling, limits, growth.capacity), growth)
        batch._prefill(prompts, bar)
        return batch

    def _prefill(self, prompts: Sequence[Sequence[int]], bar: Bar) -> None:
        self._state, chunks = prefill_all(self._programs, self._state, prompts, bar)
        self._texts = len(prompts)
        self._text = np.arange(self._texts)
        rows = np.arange(self._texts)
        self._unread = [_Unread(partial(first_tokens, chunks), rows, self._text.copy())]

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
        read = partial(jax.device_get, report)
        self._unread.append(_Unread(read, np.asarray([row]), self._text[[row]]))

    def leave(self, row: int) -> None:
        """Free a row. Reports still in flight for its text are dropped."""
        self._growth.leave(row)
        self._text[row] = FREE

    def step(self) -> Iterator[Read]:
        """Dispatch a round, then read the reports of what came before it.

        Rows may be left between two reports. A text's first report is that of its prefill.
        """
        # Unread by now: the round before this one, and the prefills of texts that entered since.
        self._state, ahead = self._programs.round(self._growth.grow_if_needed(self._state))
        unread = self._unread
        # The round's report is about the texts that rows have now: keep a copy of their numbers.
        rows = np.arange(len(self._text))
        self._unread = [_Unread(partial(jax.device_get, ahead), rows, self._text.copy())]
        for read, rows, texts in unread:
            report = read()
            current = (texts == self._text[rows]) & (texts != FREE)
            # The report's rows may be few; CacheGrowth counts all: [some] -> [batch].
            tokens = np.zeros_like(self._text)
            tokens[rows] = report.num_tokens * current
            self._growth.read(tokens)
            yield Read(report, rows, current)

    def close(self) -> None:
        """Wait for the devices."""
        settle(self._state)


def decode(
    programs: Programs,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    sampling: SamplingParams,
    bar: Bar = no_bar,
) -> Generator[Report]:
    """Generate text after several prompts, one per row of a batch.

    Args:
        programs: Compiled steps.
        prompts: Token ids of each prompt, none empty.
        limits: How many tokens to generate after each prompt, at most.
        sampling: Temperature, top-k and top-p. Row i has seed `(sampling.seed + i) % 2**32`.
        bar: Shows the progress of reading long prompts.

    Yields:
        A Report of NumPy arrays for the prefill, and one for each round, until every row is done.
    """
    with closing(Batch.filled(programs, prompts, limits, sampling, bar)) as batch:
        done = False
        while not done:
            # No row is ever left or refilled here, so each step reads one report of all rows.
            (read,) = batch.step()
            yield read.report
            done = read.report.done.all()


def settle(state: State) -> None:
    """Wait for the devices to finish with a state.

    Another program must not start before: on a CPU, two programs with collectives that run at once
    could starve each other of threads.
    """
    # If Ctrl-C came between a call and its result, the state was donated and is gone.
    if not state.length.is_deleted():
        jax.block_until_ready(state.length)


def warm_up(
    programs: Programs, capacities: Sequence[int], sizes: Iterable[int], rows: int = 1
) -> None:
    """Compile what decode() will use, by running it on rows that are finished from the start.

    What is compiled already costs only its run.

    Args:
        programs: Compiled steps.
        capacities: Sizes that the caches will have, in order; see Programs.capacities.
        sizes: Sizes of the prompts' chunks; see Programs.chunks.
        rows: Rows of the batch.
    """
    state = programs.start(SamplingParams(), [0] * rows, capacities[0])
    for size in sizes:
        tokens, count = np.zeros((rows, size), np.int32), np.zeros(rows, np.int32)
        state, _ = programs.prefill(state, tokens, count, np.zeros(rows, bool))
    state, _ = programs.round(state)
    for capacity in capacities[1:]:
        state, _ = programs.round(programs.extend(state, capacity))
    jax.block_until_ready(state.length)
