"""Reuse of cache entries: of kept prefixes, and between the texts of a batch."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from jaxtyping import Bool, Int

from easyspec_jax.arithmetic import wrap_seed
from easyspec_jax.decode.prefixes import PrefixStore, Spared, Text, shared_tokens, spared
from easyspec_jax.decode.programs import Programs
from easyspec_jax.decode.state import Report, State
from easyspec_jax.options import SamplingParams


class Reuse:
    """The prompts of a batch, of which nothing is prefilled twice that can be copied.

    Attributes:
        cached: Prompt tokens of each row's text that came from the store, or from another row.
    """

    def __init__(self, programs: Programs, rows: int, store: PrefixStore | None) -> None:
        """Begin without texts; see Batch for the arguments."""
        self._programs = programs
        self._store = store
        self._known: dict[int, Text] = {}  # by row, where there is a store
        self.cached = np.zeros(rows, np.int64)

    def restore(
        self, state: State, prompts: Mapping[int, Sequence[int]], capacity: int, rows: int
    ) -> tuple[State, Spared]:
        """Begin the texts of some rows with what the store has of their prompts.

        Args:
            state: The batch's state.
            prompts: Token ids by row.
            capacity: Cache entries of each row.
            rows: Rows that are prefilled together.

        Returns:
            The state, and what need not be prefilled; repeats are still to be shared.
        """
        found = spared(self._programs, self._store, prompts, capacity, rows)
        for row, prefix in found.prefixes.items():
            state = self._programs.restore(state, row, prefix.caches, found.start)
            assert self._store is not None
            self._store.touch(prefix)
        return state, found

    def share(
        self,
        state: State,
        found: Spared,
        prompts: Mapping[int, Sequence[int]],
        limits: Sequence[int],
        sampling: SamplingParams,
        capacity: int,
    ) -> State:
        """Prefill what several rows share once, in the first of them, and copy it to the others.

        Args:
            state: The batch's state.
            found: What need not be prefilled.
            prompts: Token ids by row.
            limits: As for decode(), like sampling.
            sampling: How to sample.
            capacity: Cache entries of each row.
        """
        programs = self._programs
        for (first, *others), end in found.repeats:
            own = replace(sampling, seed=wrap_seed(sampling.seed + first))
            text = prompts[first], limits[first], own, found.start, end
            state, _ = programs.enter(state, first, *text)
            copy = programs.copy_row(state, first, programs.sizes.prefix_size(end, capacity))
            for row in others:
                state = programs.restore(state, row, copy, end)
        return state

    def began(self, prompts: Mapping[int, Sequence[int]], found: Spared) -> None:
        """Note that prompts have been prefilled, so that the store may keep them.

        Not before: after Ctrl-C in between, rows would hold less than their prompts.
        """
        for row, prompt in prompts.items():
            self.cached[row] = found.start
            if self._store is not None:
                self._known[row] = Text(prompt)
        for repeat in found.repeats:
            self.cached[list(repeat.rows[1:])] = repeat.end

    def read(
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

    @property
    def keeps(self) -> bool:
        """Whether the store will be handed some row, or its prompt alone."""
        return bool(self._known)

    @property
    def keeps_rounds(self) -> bool:
        """Whether it will be handed what rounds add, too."""
        return self.keeps and self._programs.keeps_exact_draft

    def caught_up(self) -> None:
        """Note that the draft lacks no more than pending tokens of any text."""
        if self.keeps_rounds:
            for text in self._known.values():
                text.catch_up(self._programs.config.pending_size)

    def shared(self, prompt: Sequence[int]) -> tuple[int, int] | None:
        """Find a running text that begins as a prompt does, for longer than any in the store.

        Returns:
            The row of the text and the number of tokens they share, or None.
        """
        if self._store is None:
            return None
        wanted, most = np.asarray(prompt[:-1], np.int32), self._store.find(prompt)[0]
        sharing = None
        for row, text in self._known.items():
            shared = shared_tokens(np.asarray(text.ids[: text.exact], np.int32), wanted)
            if shared > most:
                most, sharing = shared, row
        return None if sharing is None else (sharing, most)

    def leave(self, state: State, row: int, capacity: int) -> None:
        """Hand the store what a row holds of its text, and forget the text."""
        self.keep(state, row, capacity)
        self._known.pop(row, None)

    def close(self, state: State, capacity: int) -> None:
        """Hand the store what all rows still hold."""
        for row in self._known:
            self.keep(state, row, capacity)

    def fail(self) -> None:
        """Forget every prefix: copies of a failed state would fail every text that reuses them."""
        if self._store is not None:
            self._store.clear()

    def keep(self, state: State, row: int, capacity: int, tokens: int | None = None) -> None:
        """Hand the store a copy of what a row holds of its text, or of its first tokens."""
        text = self._known.get(row)
        # Ctrl-C between a call and its result leaves no state to copy from.
        if text is None or self._store is None or state.length.is_deleted():
            return
        tokens = text.exact if tokens is None else tokens
        # Of a text that is larger than the store, as much as fits.
        size = min(self._programs.sizes.prefix_size(tokens, capacity), self._store.most)
        copy = partial(self._programs.copy_row, state, row, size)
        self._store.keep(text.ids[: min(tokens, size)], size, copy)
