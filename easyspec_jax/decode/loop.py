"""The host's side of decoding: dispatch one round ahead, hand out reports.

Calls to compiled steps return before the devices are done. So the host dispatches round n + 1 first
and reads the report of round n while the devices already work on the next:

    devices   | round 1 | round 2 | round 3 |
    host      dispatch 2, read 1, dispatch 3, read 2, ...

A Batch is this loop. decode() fills all its rows at once and runs it until all are done; a caller
that gives free rows new texts (refill) steps it itself. With a PrefixStore, texts begin with what
the store has of their prompts, and what they leave in the caches goes there.
"""

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import NamedTuple, Self

import jax
import numpy as np
from jaxtyping import Bool, Int

from easyspec_jax.arithmetic import wrap_seed
from easyspec_jax.decode.growth import CacheGrowth
from easyspec_jax.decode.prefilling import first_tokens, prefill_all
from easyspec_jax.decode.prefixes import PrefixStore, Spared, Text, shared_tokens, spared
from easyspec_jax.decode.programs import Programs
from easyspec_jax.decode.state import Report, State
from easyspec_jax.options import SamplingParams
from easyspec_jax.parallel import hosts
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
        drafted: After a prefill, an array that is there once the draft has read the prompts too;
            None without a draft, or where the calls have waited for it.
    """

    read: Callable[[], Report]
    rows: Int[np.ndarray, " some"]
    texts: Int[np.ndarray, " some"]
    levels: int | None = None
    alone: bool = False
    drafted: jax.Array | None = None


class Batch:
    """Rows on the devices, all free at first.

    A round is dispatched before the report of the one before it is read. By the time a report is
    read, a row may have been left and taken by another text. So texts are numbered as they enter,
    and a report counts only for rows that still have the text it is about.

    Attributes:
        cached: Prompt tokens of each row's text that came from the store of prefixes, or from
            another row.
        read_at: When the draft had read each row's prompt, by time.perf_counter(). It is known once
            the report of the text's first round is read; without a draft it is 0.
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
        self._prefixes = prefixes
        self._known: dict[int, Text] = {}  # by row, where there is a store
        self.cached = np.zeros(rows, np.int64)
        self.read_at = np.zeros(rows)
        # Rows whose first tokens are out while the draft reads, and when it has; see _Unread.
        self._drafting: list[tuple[Int[np.ndarray, " some"], jax.Array]] = []
        self._tiers = programs.tier_choice(rows)
        self._thresholds = programs.threshold_choice(rows)
        self._levels = programs.config.levels  # of the round that was dispatched last
        self._clock: float | None = None  # time of the report that was read last

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
            batch._tiers.enter(row)
        found = batch._restore(begun, len(prompts))
        batch._share(found, begun, limits, sampling)
        batch._prefill(prompts, bar, found.starts(len(prompts)))
        batch._began(begun, found)
        return batch

    def _restore(self, prompts: Mapping[int, Sequence[int]], rows: int) -> Spared:
        """Begin the texts of some rows with what the store has of their prompts.

        Args:
            prompts: Token ids by row.
            rows: Rows that are prefilled together.

        Returns:
            What need not be prefilled; repeats are still to be shared.
        """
        store, capacity = self._prefixes, self._growth.capacity
        found = spared(self._programs, store, prompts, capacity, rows)
        for row, prefix in found.prefixes.items():
            self._state = self._programs.restore(self._state, row, prefix.caches, found.start)
            assert store is not None
            store.touch(prefix)
        return found

    def _share(
        self,
        found: Spared,
        prompts: Mapping[int, Sequence[int]],
        limits: Sequence[int],
        sampling: SamplingParams,
    ) -> None:
        """Prefill what several rows share once, in the first of them, and copy it to the others.

        Args:
            found: What need not be prefilled.
            prompts: Token ids by row.
            limits: As for decode(), like sampling.
            sampling: How to sample.
        """
        programs = self._programs
        for (first, *others), end in found.repeats:
            own = replace(sampling, seed=wrap_seed(sampling.seed + first))
            text = prompts[first], limits[first], own, found.start, end
            self._state, _ = programs.enter(self._state, first, *text)
            size = programs.sizes.prefix_size(end, self._growth.capacity)
            copy = programs.copy_row(self._state, first, size)
            for row in others:
                self._state = programs.restore(self._state, row, copy, end)

    def _began(self, prompts: Mapping[int, Sequence[int]], found: Spared) -> None:
        """Note that prompts have been prefilled, so that the store may keep them.

        Not before: after Ctrl-C in between, rows would hold less than their prompts.
        """
        for row, prompt in prompts.items():
            self.cached[row] = found.start
            if self._prefixes is not None:
                self._known[row] = Text(prompt)
        for repeat in found.repeats:
            self.cached[list(repeat.rows[1:])] = repeat.end

    def _prefill(self, prompts: Sequence[Sequence[int]], bar: Bar, starts: Sequence[int]) -> None:
        self._state, chunks = prefill_all(self._programs, self._state, prompts, bar, starts)
        self._texts = len(prompts)
        self._text = np.arange(self._texts)
        rows = np.arange(self._texts)
        read = partial(first_tokens, chunks)
        self._unread = [_Unread(read, rows, self._text.copy(), drafted=self._marker())]

    def enter(self, row: int, prompt: Sequence[int], limit: int, sampling: SamplingParams) -> None:
        """Give a free row a text.

        Args:
            row: The row.
            prompt: Token ids, at least one.
            limit: Tokens that may follow.
            sampling: How to sample this text, and its seed.
        """
        self._growth.enter(row, len(prompt), limit)
        self._tiers.enter(row)
        self._text[row] = self._texts
        self._texts += 1
        self._state = self._growth.grow_if_needed(self._state)
        self._keep_shared(prompt)
        found = self._restore({row: prompt}, 1)
        text = prompt, limit, sampling, found.start
        self._state, report = self._programs.enter(self._state, row, *text)
        self._began({row: prompt}, found)
        read = partial(jax.device_get, report)
        texts = self._text[[row]]
        self._unread.append(_Unread(read, np.asarray([row]), texts, drafted=self._marker()))

    def leave(self, row: int) -> None:
        """Free a row. Reports still in flight for its text are dropped.

        What the row holds of the text goes to the store of prefixes.
        """
        self._keep(row)
        self._known.pop(row, None)
        self._growth.leave(row)
        self._tiers.leave(row)
        self._text[row] = FREE

    def step(self) -> Iterator[Read]:
        """Dispatch a round, then read the reports of what came before it.

        Rows may be left between two reports. A text's first report is that of its prefill.
        """
        # Unread by now: the round before this one, and the prefills of texts that entered since.
        ahead, is_alone = self._dispatch()
        unread = self._unread
        # The round's report is about the texts that rows have now: keep a copy of their numbers.
        rows = np.arange(len(self._text))
        read = partial(jax.device_get, ahead)
        self._unread = [_Unread(read, rows, self._text.copy(), self._levels, is_alone)]
        for one in unread:
            _, rows, texts, levels, alone, drafted = one
            if levels is not None:
                self._await_draft()
            elif drafted is not None:
                self._drafting.append((rows, drafted))
            report = one.read()
            current = (texts == self._text[rows]) & (texts != FREE)
            # The report's rows may be few; CacheGrowth counts all: [some] -> [batch].
            tokens = np.zeros_like(self._text)
            tokens[rows] = report.num_tokens * current
            self._growth.read(tokens)
            self._note(report, rows[current], current, levels)
            # Where a call waits for the devices, the time is rather that of the round just
            # dispatched.
            alike = not self._calls_wait() or (is_alone and levels == self._levels)
            self._time(levels if alone and alike and len(unread) == 1 else None, report)
            if levels is not None:
                accepted, done = np.asarray(report.accepted), np.asarray(report.done)
                self._tiers.read(levels, accepted, current, done)
                if self._thresholds is not None and report.confidence is not None:
                    confidence = np.asarray(report.confidence)
                    self._thresholds.read(confidence, accepted, current & ~done)
            yield Read(report, rows, current)

    def _marker(self) -> jax.Array | None:
        """Return an array that is there once the draft has read the prompts dispatched so far."""
        if self._programs.draft is None or self._calls_wait():
            return None
        return self._state.draft_length + 0

    def _calls_wait(self) -> bool:
        return hosts.calls_wait(self._programs.mesh.devices.flat[0].platform)

    def _await_draft(self) -> None:
        """Note when the draft has read the prompts of texts whose first tokens are out."""
        for rows, drafted in self._drafting:
            jax.block_until_ready(drafted)
            # What follows is the time of a round alone.
            self.read_at[rows] = self._clock = time.perf_counter()
        self._drafting = []

    def _dispatch(self) -> tuple[Report, bool]:
        """Dispatch a round of the tier that is chosen.

        Returns:
            Its report on the devices, and whether nothing else was dispatched.
        """
        before, capacity = self._levels, self._growth.capacity
        self._levels = self._tiers.next()
        self._state = self._growth.grow_if_needed(self._state)
        lags = before == 0 < self._levels
        if lags:
            self._state = self._programs.catch_up(self._state)
        threshold = None
        if self._thresholds is not None and self._levels:
            threshold = self._thresholds.next()
        self._state, report = self._programs.round(self._state, self._levels, threshold)
        return report, not lags and capacity == self._growth.capacity

    def _time(self, levels: int | None, report: Report) -> None:
        """Note when a report came.

        Args:
            levels: Levels of the round that took the time since the report before; None if
                something else did as well.
            report: The report.
        """
        now, before = time.perf_counter(), self._clock
        self._clock = now
        if levels is not None and before is not None:
            # Without a draft model, a round that looks up in vain is a step of plain decoding.
            drafted = self._programs.draft is not None or bool(report.drafted.any())
            self._tiers.times.add(levels, now - before, drafted=drafted or levels == 0)
            # Rounds of other tiers differ by more than the draft's passes.
            whole = levels == self._programs.config.levels
            if self._thresholds is not None and whole and report.confidence is not None:
                self._thresholds.time(np.asarray(report.confidence), now - before)

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
            settle(self._state)
        except Exception:
            # Copies of a failed state would fail every text that reuses them.
            if self._prefixes is not None:
                self._prefixes.clear()
            raise
        for row in self._known:
            self._keep(row)

    def _note(
        self,
        report: Report,
        rows: Int[np.ndarray, " some"],
        current: Bool[np.ndarray, " some"],
        levels: int | None,
    ) -> None:
        """Note what a report adds to the texts that the store may keep.

        Args:
            report: The report.
            rows: The batch's rows that still have the text it is about.
            current: Which of the report's rows these are.
            levels: Levels of the round; None for a prefill.
        """
        if not self._known:
            return
        exact = self._programs.keeps_exact_draft
        # A plain round of a pair leaves the draft's caches as they are.
        exact = exact and (levels != 0 or self._programs.draft is None)
        for row, index in zip(rows.tolist(), np.flatnonzero(current), strict=True):
            text = self._known.get(row)
            if text is None:
                continue
            text.add(report.tokens[index, : report.num_tokens[index]].tolist(), exact)
            if report.fault[index]:
                text.spoil()

    def _keep(self, row: int, tokens: int | None = None) -> None:
        """Hand the store a copy of what a row holds of its text, or of its first tokens."""
        text = self._known.get(row)
        # Ctrl-C between a call and its result leaves no state to copy from.
        if text is None or self._prefixes is None or self._state.length.is_deleted():
            return
        tokens = text.exact if tokens is None else tokens
        # Of a text that is larger than the store, as much as fits.
        size = min(
            self._programs.sizes.prefix_size(tokens, self._growth.capacity), self._prefixes.most
        )
        copy = partial(self._programs.copy_row, self._state, row, size)
        self._prefixes.keep(text.ids[: min(tokens, size)], size, copy)

    def _keep_shared(self, prompt: Sequence[int]) -> None:
        """Keep what a prompt shares with a running text, if that is more than the store has."""
        if self._prefixes is None:
            return
        wanted, most = np.asarray(prompt[:-1], np.int32), self._prefixes.find(prompt)[0]
        sharing = None
        for row, text in self._known.items():
            shared = shared_tokens(np.asarray(text.ids[: text.exact], np.int32), wanted)
            if shared > most:
                most, sharing = shared, row
        if sharing is not None:
            self._keep(sharing, most)


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
        tokens = np.zeros((rows, programs.columns(size)), np.int32)
        count = np.zeros(rows, np.int32)
        state, _ = programs.prefill(state, tokens, count, np.zeros(rows, bool))
        if programs.draft is not None:
            state = programs.prefill_draft(state, tokens[:, :size], count)
    state = run_rounds(programs, state)
    for capacity in capacities[1:]:
        state = run_rounds(programs, programs.extend(state, capacity))
    jax.block_until_ready(state.length)


def run_rounds(programs: Programs, state: State) -> State:
    """Run a round of every tier."""
    for levels in programs.config.tiers:
        state, _ = programs.round(state, levels)
    if programs.config.tiers:
        state = programs.catch_up(state)
    return programs.round(state)[0]
