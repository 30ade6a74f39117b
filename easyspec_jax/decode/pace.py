"""Which round a batch runs next, and how long each of them took."""

import time
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Int

from easyspec_jax.decode.programs import Programs
from easyspec_jax.decode.state import Report
from easyspec_jax.parallel import hosts


class Chosen(NamedTuple):
    """A round to run.

    Attributes:
        levels: Its levels.
        lags: Whether the draft's caches lack tokens, because the round before was a plain one.
        threshold: Confidence that another level needs; None for that of the round before.
    """

    levels: int
    lags: bool
    threshold: float | None


class Drafting(NamedTuple):
    """The draft's reading of prompts, while the devices work on it.

    Attributes:
        rows: Rows of the prompts.
        texts: Numbers of their texts.
        tokens: Tokens of the passes, padding counted.
        done: An array that is there when it has read them.
    """

    rows: Int[np.ndarray, " some"]
    texts: Int[np.ndarray, " some"]
    tokens: int
    done: jax.Array


class Pace:
    """The tiers and thresholds of a batch, and a clock that times its rounds.

    Attributes:
        levels: Levels of the round that was chosen last.
        read_at: When the draft had read each row's prompt, by time.perf_counter(). It is known once
            the report of the first round after it is read. Until then it is 0, and so it stays
            without a draft, or where calls wait for the devices.
    """

    def __init__(self, programs: Programs, rows: int) -> None:
        self._programs = programs
        self._tiers = programs.tier_choice(rows)
        self._thresholds = programs.threshold_choice(rows)
        self._clock: float | None = None  # time of the report that was read last
        self._drafting: list[Drafting] = []
        self.levels = programs.config.levels
        self.read_at = np.zeros(rows)

    @property
    def calls_wait(self) -> bool:
        """Whether a call of a program returns only when the devices are done with it."""
        return hosts.calls_wait(self._programs.mesh.devices.flat[0].platform)

    def enter(self, row: int) -> None:
        """Note that a text enters a row."""
        self._tiers.enter(row)
        self.read_at[row] = 0.0

    def leave(self, row: int) -> None:
        """Note that a row's text leaves it."""
        self._tiers.leave(row)

    def next(self, unread: int = 0) -> Chosen:
        """Choose the next round; see TierChoice.next."""
        before, self.levels = self.levels, self._tiers.next(unread)
        threshold = None
        if self._thresholds is not None and self.levels:
            threshold = self._thresholds.next()
        return Chosen(self.levels, before == 0 < self.levels, threshold)

    def begin_drafting(self, drafting: Drafting) -> None:
        """Note that all reports are out that were dispatched before the draft reads prompts."""
        self._drafting.append(drafting)

    def await_draft(self, texts: Int[np.ndarray, " rows"]) -> None:
        """Wait until the draft has read the prompts, and note when.

        Args:
            texts: Numbers of the texts that the rows have by now.
        """
        for rows, of, tokens, done in self._drafting:
            before = self._clock
            was_early = done.is_ready()  # pyright: ignore[reportAttributeAccessIssue]
            jax.block_until_ready(done)
            now = time.perf_counter()
            self.read_at[rows[texts[rows] == of]] = now
            if not was_early and before is not None:
                self.time_drafting(tokens, now - before)
            # A round after it begins now, if it did not begin before.
            self._clock = None if was_early else now
        self._drafting = []

    def time_drafting(self, tokens: int, seconds: float) -> None:
        """Learn how long the draft takes to read prompts.

        Args:
            tokens: Tokens of its passes, padding counted.
            seconds: The time.
        """
        self._tiers.times.add_reading(tokens, seconds)

    def read(
        self,
        report: Report,
        current: Bool[np.ndarray, " some"],
        levels: int | None,
        is_timed: bool,
        seconds: float | None = None,
    ) -> None:
        """Learn from a report that has just come.

        Args:
            report: The report.
            current: Which of its rows still have the text that it is about.
            levels: Levels of the round; None for a prefill.
            is_timed: Whether nothing but this round took the time.
            seconds: The time that the round took; None if it is that since the report before.
        """
        now, before = time.perf_counter(), self._clock
        self._clock = now
        if seconds is None and before is not None:
            seconds = now - before
        if is_timed and levels is not None and seconds is not None:
            self._time(report, levels, seconds)
        if levels is None:
            return
        accepted, done = np.asarray(report.accepted), np.asarray(report.done)
        # Without a draft model it equals `accepted`.
        repeated = None
        if self._programs.draft is not None and report.repeated is not None:
            repeated = np.asarray(report.repeated)
        self._tiers.read(levels, accepted, current, done, repeated)
        if self._thresholds is not None and report.confidence is not None:
            self._thresholds.read(np.asarray(report.confidence), accepted, current & ~done)

    def _time(self, report: Report, levels: int, seconds: float) -> None:
        """Learn how long a round of some levels takes."""
        found = None
        # Without a draft model, a round that looks up in vain is a step of plain decoding.
        if report.repeated is not None and (self._programs.draft is None or levels == 0):
            found = bool((report.drafted + report.forced).any())
        self._tiers.times.add(levels, seconds, found=found)
        # Rounds of other tiers differ by more than the draft's passes.
        whole = levels == self._programs.config.levels
        if self._thresholds is not None and whole and report.confidence is not None:
            self._thresholds.time(np.asarray(report.confidence), seconds)
