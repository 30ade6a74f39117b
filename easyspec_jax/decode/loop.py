"""The host's side of decoding: dispatch one round ahead, hand out reports.

Calls to compiled steps return before the devices are done. So the host dispatches round n + 1 first
and reads the report of round n while the devices already work on the next:

    devices   | round 1 | round 2 | round 3 |
    host      dispatch 2, read 1, dispatch 3, read 2, ...

A Batch is this loop. decode() fills all its rows at once and runs it until all are done; a caller
that gives free rows new texts (refill) steps it itself. Reuse spares it what prompts share, and
Pace chooses and times its rounds.
"""

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import NamedTuple, Self

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from easyspec_jax.decode.growth import CacheGrowth
from easyspec_jax.decode.pace import Drafting, Pace
from easyspec_jax.decode.prefilling import first_tokens, prefill_draft, prefill_target
from easyspec_jax.decode.prefixes import PrefixStore, Spared
from easyspec_jax.decode.programs import Programs
from easyspec_jax.decode.reading import DraftReading, Prompts
from easyspec_jax.decode.reuse import Reuse
from easyspec_jax.decode.state import Report, State
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
        levels: Levels of the round; None for a prefill.
        alone: Whether nothing else was dispatched between it and the round before it.
        seconds: How long the call of the round took, where calls wait for the devices.
        drafting: The draft's reading of prompts that was dispatched after it, where calls do not
            wait for the devices.
    """

    read: Callable[[], Report]
    rows: Int[np.ndarray, " some"]
    texts: Int[np.ndarray, " some"]
    levels: int | None = None
    alone: bool = False
    seconds: float | None = None
    drafting: tuple[Drafting, ...] = ()


class Batch:
    """Rows on the devices, all free at first.

    A round is dispatched before the report of the one before it is read. By the time a report is
    read, a row may have been left and taken by another text. So texts are numbered as they enter,
    and a report counts only for rows that still have the text it is about.
    """

    def __init__(
        self,
        programs: Programs,
        state: State,
        growth: CacheGrowth,
        prefixes: PrefixStore | None = None,
    ) -> None:
        """Take over a state; see empty() and filled()."""
        self._programs = programs
        self._state = state
        self._growth = growth
        rows = state.length.shape[0]
        self._text = np.full(rows, FREE)  # number of each row's text
        self._texts = 0  # texts that have entered
        self._unread: list[_Unread] = []
        # Caches that keep only a window neither give nor take beginnings of texts.
        store = None if programs.config.keeps_windows else prefixes
        self._reuse = Reuse(programs, rows, store)
        self._reading = DraftReading()
        self._pace = Pace(programs, rows)
        self._is_alone = True  # whether nothing was dispatched since the round before

    @classmethod
    def empty(
        cls, programs: Programs, rows: int, capacity: int, prefixes: PrefixStore | None = None
    ) -> Self:
        """Start with free rows.

        Args:
            programs: Compiled steps.
            rows: Rows of the batch.
            capacity: Capacity of the caches at first; they grow.
            prefixes: Prefixes to reuse and to add to, or None.
        """
        state = programs.start(SamplingParams(), [0] * rows, capacity)
        return cls(programs, state, CacheGrowth(programs, rows, capacity), prefixes)

    @classmethod
    def filled(
        cls,
        programs: Programs,
        prompts: Sequence[Sequence[int]],
        limits: Sequence[int],
        sampling: SamplingParams,
        bar: Bar = no_bar,
        prefixes: PrefixStore | None = None,
    ) -> Self:
        """Start with a text in every row, all prefilled at once; arguments as for decode()."""
        growth = CacheGrowth(programs, len(prompts))
        for row, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
            growth.enter(row, len(prompt), limit)
        growth.capacity = growth.needed()
        state = programs.start(sampling, limits, growth.capacity, prompts)
        batch = cls(programs, state, growth, prefixes)
        # Rows that are finished from the start hold no text.
        begun = {row: prompt for row, prompt in enumerate(prompts) if limits[row] > 0}
        for row in begun:
            batch._pace.enter(row)
        found = batch._restore(begun, len(prompts))
        batch._state = batch._reuse.share(
            batch._state, found, begun, limits, sampling, growth.capacity
        )
        batch._prefill(prompts, bar, found.starts(len(prompts)))
        batch._reuse.began(begun, found)
        return batch

    @property
    def cached(self) -> Int[np.ndarray, " rows"]:
        """Prompt tokens of each row's text that were copied, not prefilled; see Reuse."""
        return self._reuse.cached

    @property
    def read_at(self) -> Float[np.ndarray, " rows"]:
        """When the draft had read each row's prompt; see Pace."""
        return self._pace.read_at

    def _restore(self, prompts: Mapping[int, Sequence[int]], rows: int) -> Spared:
        capacity = self._growth.capacity
        self._state, found = self._reuse.restore(self._state, prompts, capacity, rows)
        return found

    def _prefill(self, prompts: Sequence[Sequence[int]], bar: Bar, starts: Sequence[int]) -> None:
        programs = self._programs
        self._state, chunks, parts = prefill_target(programs, self._state, prompts, bar, starts)
        self._texts = len(prompts)
        self._text = np.arange(self._texts)
        rows = np.arange(self._texts)
        tokens = sum(part.tokens.size for part in parts)
        self._reading.add(Prompts(rows, tokens, partial(prefill_draft, programs, parts=parts)))
        self._unread = [_Unread(partial(first_tokens, chunks), rows, self._text.copy())]

    def enter(self, row: int, prompt: Sequence[int], limit: int, sampling: SamplingParams) -> None:
        """Give a free row a text.

        Args:
            row: The row.
            prompt: Token ids, at least one.
            limit: Tokens that may follow.
            sampling: How to sample this text, and its seed.
        """
        self._growth.enter(row, len(prompt), limit)
        self._pace.enter(row)
        self._text[row] = self._texts
        self._texts += 1
        self._grow()
        if (shared := self._reuse.shared(prompt)) is not None:
            running, length = shared
            self.read_prompts()  # the store takes what both models have read
            self._reuse.keep(self._state, running, self._growth.capacity, length)
        found = self._restore({row: prompt}, 1)
        text = prompt, limit, sampling, found.start
        programs = self._programs
        self._state, report, parts = programs.enter_target(self._state, row, *text)
        tokens = sum(part.tokens.size for part in parts)
        read = partial(programs.enter_draft, row=row, parts=parts)
        self._reading.add(Prompts(np.asarray([row]), tokens, read))
        self._reuse.began({row: prompt}, found)
        texts = self._text[[row]]
        self._unread.append(_Unread(partial(jax.device_get, report), np.asarray([row]), texts))

    def leave(self, row: int) -> None:
        """Free a row. Reports still in flight for its text are dropped.

        What the row holds of the text goes to the store of prefixes.
        """
        self._catch_up()
        self._reuse.leave(self._state, row, self._growth.capacity)
        self._reading.leave(row)
        self.stop(row)
        self._growth.leave(row)
        self._pace.leave(row)
        self._text[row] = FREE

    def stop(self, row: int) -> None:
        """End a row's text where it is: rounds in flight may still add to it, later ones do not.

        Only the host knows of stop strings and cancelled requests. Without this the devices would
        draft for the row until its limit.
        """
        # After Ctrl-C there may be no state left.
        if not self._state.length.is_deleted():
            self._state = self._programs.stop(self._state, row)

    def step(self) -> Iterator[Read]:
        """Dispatch a round, then read the reports of what came before it.

        Rows may be left between two reports. A text's first report is that of its prefill.
        """
        pace = self._pace
        ahead = self._dispatch()
        # Unread by now: the round before this one, and the prefills of texts that entered since.
        unread, self._unread = self._unread, [ahead]
        for one in unread:
            rows, levels = one.rows, one.levels
            if levels is not None:
                pace.await_draft(self._text)
            report = one.read()
            current = (one.texts == self._text[rows]) & (one.texts != FREE)
            # The report's rows may be few; CacheGrowth counts all: [some] -> [batch].
            tokens = np.zeros_like(self._text)
            tokens[rows] = report.num_tokens * current
            self._growth.read(tokens)
            self._reuse.read(report, rows[current], current, levels)
            is_timed = one.alone and (one.seconds is not None or len(unread) == 1)
            pace.read(report, current, levels, is_timed, one.seconds)
            for drafting in one.drafting:
                pace.begin_drafting(drafting)
            yield Read(report, rows, current)

    def _grow(self) -> None:
        """Give the caches the size that the next round needs."""
        # What reads prompts is compiled for the size that caches have when the prompts come.
        if self._growth.needed() > self._growth.capacity:
            self.read_prompts()
        self._state = self._growth.grow_if_needed(self._state)

    def _dispatch(self) -> _Unread:
        """Dispatch the round that is chosen, and what has to come before it."""
        capacity = self._growth.capacity
        levels, lags, threshold = self._pace.next(self._reading.tokens)
        self._grow()
        if levels:
            self.read_prompts()
        if lags:
            self._state = self._programs.catch_up(self._state)
            self._reuse.caught_up()
        begun = time.perf_counter()
        self._state, report = self._programs.round(self._state, levels, threshold)
        took = time.perf_counter() - begun
        is_alone = self._is_alone and not lags and capacity == self._growth.capacity
        self._is_alone = True
        # The report is about the texts that rows have now: keep a copy of their numbers.
        rows, texts = np.arange(len(self._text)), self._text.copy()
        read = partial(jax.device_get, report)
        return _Unread(read, rows, texts, levels, is_alone, took if self._pace.calls_wait else None)

    def _catch_up(self) -> None:
        """Let the draft take in all that it lacks, if the store is to have it."""
        if self._reuse.keeps:
            self.read_prompts()
        # After Ctrl-C there may be no state left.
        if not self._reuse.keeps_rounds or self._state.length.is_deleted():
            return
        if self._pace.levels == 0:
            self._grow()
            self._state = self._programs.catch_up(self._state, finished=True)
            self._is_alone = False
        self._reuse.caught_up()

    def read_prompts(self) -> None:
        """Let the draft read the prompts that it has not read yet.

        A round that drafts does so by itself.
        """
        rows, tokens, begun = self._reading.rows, self._reading.tokens, time.perf_counter()
        # After Ctrl-C there may be no state left.
        if not rows.size or self._state.length.is_deleted():
            return
        self._state = self._reading.run(self._state)
        if self._programs.draft is None:
            return
        if self._pace.calls_wait:
            self._pace.time_drafting(tokens, time.perf_counter() - begun)
        elif self._unread:
            drafting = Drafting(rows, self._text[rows], tokens, self._state.draft_length + 0)
            last = self._unread[-1]
            self._unread[-1] = last._replace(drafting=(*last.drafting, drafting))

    def reports(self) -> Iterator[Report]:
        """Run a batch that filled() made until every row is done; yield each report."""
        done = False
        while not done:
            # No row is ever left or refilled here, so each step reads one report of all rows.
            (read,) = self.step()
            yield read.report
            done = bool(read.report.done.all())

    def close(self) -> None:
        """Wait for the devices, and hand what rows still hold to the store of prefixes."""
        try:
            self._catch_up()
            settle(self._state)
        except Exception:
            self._reuse.fail()
            raise
        self._reuse.close(self._state, self._growth.capacity)


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
        sampling: How to sample. Row i has seed `(sampling.seed + i) % 2**32`.
        bar: Shows the progress of reading long prompts.

    Yields:
        A Report of NumPy arrays for the prefill, and one for each round, until every row is done.
    """
    with closing(Batch.filled(programs, prompts, limits, sampling, bar)) as batch:
        yield from batch.reports()


def settle(state: State) -> None:
    """Wait for the devices to finish with a state.

    Another program must not start before: on a CPU, two programs with collectives that run at once
    could starve each other of threads.
    """
    # If Ctrl-C came between a call and its result, the state was donated and is gone.
    if not state.length.is_deleted():
        jax.block_until_ready(state.length)
