"""The choice of how many levels the next round drafts, if any.

A draft pays where its tokens are accepted, and costs where they are not. So texts are decoded by
rounds of several numbers of levels, the tiers, and the host takes for each round the one from which
it expects the most tokens a second: tokens by what was accepted lately, seconds by the clock.

    levels    expected tokens of a row        seconds    tokens/s
    0         1                               0.020      50
    2         1 + 0.7 + 0.7 * 0.6             0.035      61
    5         1 + 0.7 + 0.7 * 0.6 + ...       0.056      47

A level's acceptance is an estimate from few and old observations, or from none. It fades to that of
the level above it, and the first level's to FIRST, which is high. So a tier that has not been tried
for long begins to look good, and is tried again: a failure then costs one round, and a success
brings drafting back at once. The dearer a draft, the later it is tried.

Before the draft can draft at all, it has to read the prompt. Where lookups may continue a text
without it, it waits until drafts would have gained as much as reading takes, by estimate. So a
text loses about twice the time of reading at most, and next to nothing if it goes on repeating.

Nothing here touches a device. All decisions come from reports that have been read.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

FIRST = 0.8
"""Acceptance of the first level where nothing is known about it."""

PRIOR = 1.0
"""Observations that this belief, and that of a level about the next one, are worth."""

FADING = 0.94
"""Factor that an observation's weight takes with each newer one of the same level."""

AGEING = 0.98
"""Factor that it takes with each round that did not draft that level."""

REPEATING = 0.3
"""Weight of the latest round in the estimate of what lookups alone would add."""

INHERITED = 4.0
"""Observations, at most, that a new text begins with: those of the texts before it."""

GAIN = 1.01
"""How much faster another tier must look to be taken."""

SAMPLES = 3
"""Rounds of a tier's turn that are timed, and the fewest with which it is compared."""

KEPT = 9
"""Latest times of a tier that count."""

LATEST = 3
"""Latest rounds that say how fast the machine is."""

DOUBT, STALE = 0.4, 512
"""Discount on a tier's cost; it grows to DOUBT after STALE rounds without timing the tier."""


Common = Float[np.ndarray, "2 levels"]
"""Observations of each level, and how many of them were acceptances."""


def no_common(levels: int) -> Common:
    """Return what is known before any text: no observations."""
    return np.zeros((2, levels))


class Acceptance:
    """Running estimate, for each row, of how likely a level is accepted if the one above it is.

    Attributes:
        tried: Observations of each level, faded: [rows, levels].
        accepted: How many of them were acceptances.
        repeated: Tokens that lookups alone would add to a round, on average: [rows].

    Examples:
        A text whose first two levels were accepted, and then one where none was:

        >>> seen = Acceptance(rows=1, levels=3)
        >>> one = np.ones(1, bool)
        >>> seen.enter(0)
        >>> [round(float(x), 2) for x in seen.expected()[0]]
        [1.0, 1.8, 2.44, 2.95]
        >>> seen.add(levels=3, accepted=np.array([2]), rows=one)
        >>> [round(float(x), 2) for x in seen.expected()[0]]
        [1.0, 1.9, 2.75, 3.16]
        >>> for _ in range(4):
        ...     seen.add(levels=3, accepted=np.array([0]), rows=one)
        >>> [round(float(x), 2) for x in seen.expected()[0]]
        [1.0, 1.29, 1.48, 1.54]
    """

    def __init__(self, rows: int, levels: int, common: Common | None = None) -> None:
        """Start without texts.

        Args:
            rows: Rows of the batch.
            levels: The most levels.
            common: The same of all texts together, those of other batches too, which new ones begin
                with; it is kept up to date. None if there was no batch before.
        """
        self.tried = np.zeros((rows, levels))
        self.accepted = np.zeros((rows, levels))
        self.repeated = np.zeros(rows)
        self._common = no_common(levels) if common is None else common

    def enter(self, row: int) -> None:
        """Begin a text in a row with some of what other texts have shown."""
        tried, accepted = self._common
        share = np.minimum(1.0, INHERITED / np.maximum(tried, 1e-9))
        self.tried[row], self.accepted[row] = tried * share, accepted * share
        self.repeated[row] = 0.0

    def add(
        self,
        levels: int,
        accepted: Int[np.ndarray, " rows"],
        rows: Bool[np.ndarray, " rows"],
        repeated: Int[np.ndarray, " rows"] | None = None,
    ) -> None:
        """Add what a round has shown.

        Args:
            levels: Levels that a model drafted.
            accepted: How many were accepted in each row.
            rows: Rows whose texts go on. The last round of a text ends with the text, whatever it
                would have accepted.
            repeated: How many lookups alone would have added; None where nothing is looked up.
        """
        if not rows.any():
            return
        depth = np.arange(self.tried.shape[1])
        if repeated is not None:
            # A repeat that is as long as a round could tell may be as long as any.
            is_cut = (levels > 0) & (repeated[rows] == levels)
            tokens = np.where(is_cut, len(depth), repeated[rows])
            self.repeated[rows] += REPEATING * (tokens - self.repeated[rows])
        # With 1 of 3 accepted, levels 1 and 2 were observed; level 3 had no chance.
        accepted = accepted[rows, None]
        observed = (depth <= accepted) & (depth < levels)
        # Levels that had no chance say as much as before. Those that were not drafted grow old.
        fading = np.where(observed, FADING, np.where(depth < levels, 1.0, AGEING))
        self.tried[rows] = self.tried[rows] * fading + observed
        self.accepted[rows] = self.accepted[rows] * fading + (observed & (depth < accepted))
        self._common[:] = self.tried[rows].mean(axis=0), self.accepted[rows].mean(axis=0)

    def expected(self) -> Float[np.ndarray, "rows levels+1"]:
        """Return each row's expected tokens from a round of 0, 1, 2, … levels.

        That of 0 has no draft model, but may have lookups.
        """
        rows, levels = self.tried.shape
        likely, reached = np.full(rows, FIRST), np.ones(rows)
        tokens = [reached]
        for level in range(levels):
            known = self.accepted[:, level] + PRIOR * likely
            likely = known / (self.tried[:, level] + PRIOR)
            reached = reached * likely
            tokens.append(tokens[-1] + reached)
        tokens[0] = 1.0 + self.repeated
        return np.stack(tokens, axis=1)


LOOKUP = -1
"""Kind of a round without a draft model that has found something by lookups."""


class RoundTimes:
    """Times of each tier's rounds, in times of the first tier that ran.

    Machines change speed while one measures, and a tier may not run for long. So a tier is timed
    right after another one, against the speed that the machine had just then. What has not been
    timed for long is taken for somewhat less than it was, and so timed again if that would matter.

    Examples:
        A machine that takes twice as long from the seventh round on:

        >>> times = RoundTimes([0, 5])
        >>> for levels, seconds in [(5, 2.0)] * 3 + [(0, 1.0)] * 3 + [(0, 2.0)] * 5 + [(5, 4.0)]:
        ...     times.add(levels, seconds)
        >>> [round(cost, 2) for cost in times.costs()]
        [0.5, 1.0]
    """

    def __init__(self, tiers: Sequence[int]) -> None:
        """Start with no time of any tier."""
        self._tiers = tuple(tiers)
        self._timed = {kind: deque[float](maxlen=KEPT) for kind in (LOOKUP, *tiers)}
        self._share = dict.fromkeys(tiers, 1.0)  # of the rounds in which there was a draft
        self._age = dict.fromkeys(self._timed, 0)
        self._speed = deque[float](maxlen=LATEST)  # seconds of a round that costs 1
        self._reading = deque[float](maxlen=KEPT)  # seconds for each token of a prompt
        # What kind of round ran last, and how many such rounds were timed since another one.
        self._running: int | None = None
        self._turn = 0

    def add(self, levels: int, seconds: float, *, found: bool | None = None) -> None:
        """Add the time of a round.

        Args:
            levels: Its tier.
            seconds: Its time.
            found: Whether lookups alone drafted anything for any row; None in rounds without
                lookups or with a draft model. Where they found nothing, the round took the time of
                plain decoding, and counts as such.
        """
        kind = levels
        if found is not None:
            rate = 1 - FADING if levels else REPEATING
            self._share[levels] += rate * (found - self._share[levels])
            kind = _drafting(levels) if found or 0 not in self._tiers else 0
        self._turn = self._turn + 1 if kind == self._running else 1
        self._running = kind
        timed = self._timed[kind]
        # Later in its turn, a kind would be compared with itself.
        if self._turn <= SAMPLES or len(timed) < SAMPLES:
            timed.append(seconds / median(self._speed) if self._others(kind) else 1.0)
        for other in self._age:
            self._age[other] += 1
        self._age[kind] = 0
        self._speed.append(seconds / self._cost(kind))

    def add_reading(self, tokens: int, seconds: float) -> None:
        """Add the time that the draft took to read prompts.

        Args:
            tokens: Tokens of its passes, at least one, padding counted.
            seconds: The time.
        """
        self._reading.append(seconds / tokens)

    def reading_cost(self) -> float | None:
        """Return the time in which the draft reads a token of a prompt; None if it is unknown."""
        if not self._reading or not self._speed:
            return None
        return median(self._reading) / median(self._speed)

    def costs(self) -> list[float | None]:
        """Return each tier's time; None if too few of its rounds have been timed."""
        return [
            self._mean(levels) * (1.0 - DOUBT * min(1.0, self._unseen(levels) / STALE))
            if sum(len(self._timed[kind]) for kind in {levels, _drafting(levels)}) >= SAMPLES
            else None
            for levels in self._tiers
        ]

    def _mean(self, levels: int) -> float:
        """Return what a round takes on average, with and without a draft."""
        kinds = _drafting(levels), 0
        costs = [self._cost(kind) for kind in kinds if self._timed.get(kind)]
        if len(costs) == 1:
            return costs[0]
        share = self._share[levels]
        return share * costs[0] + (1 - share) * costs[1]

    def _unseen(self, levels: int) -> int:
        """Return how many rounds ago the tier was timed."""
        return min(self._age[levels], self._age[_drafting(levels)])

    def _others(self, kind: int) -> bool:
        return any(timed for other, timed in self._timed.items() if other != kind)

    def _cost(self, kind: int) -> float:
        return median(self._timed[kind])


def _drafting(levels: int) -> int:
    """Return the kind of a tier's rounds that have a draft."""
    return levels or LOOKUP


class TierChoice:
    """Chooses the tier of every round of a batch.

    Every tier is run at first, until it has been timed.

    Attributes:
        tiers: Their levels, fewest first.
        times: What their rounds take. It outlives the batch.
    """

    def __init__(
        self,
        tiers: Sequence[int],
        rows: int,
        times: RoundTimes,
        agree: Callable[[Any], Any] = lambda costs: costs,
        every: int = 1,
        waits: bool = False,
        common: Common | None = None,
    ) -> None:
        """Start with rows that hold no text.

        Args:
            tiers: Levels of the rounds, fewest first.
            rows: Rows of the batch.
            times: What their rounds take.
            agree: Returns the costs that all processes choose by. Each of them has its own clock,
                and would choose differently; reports are the same everywhere.
            every: Rounds after which it is called again.
            waits: Whether to wait for what the lowest tier shows before the draft reads prompts.
            common: As for Acceptance.
        """
        self.tiers, self.times = tuple(tiers), times
        self._acceptance = Acceptance(rows, self.tiers[-1], common)
        self._live = np.zeros(rows, bool)
        self._now = self.tiers[-1]
        self._agree, self._every = agree, every
        self._rounds = 0
        self._costs: list[float | None] = []  # of the tiers, and of reading a token
        self._waits = waits
        self._drafts = np.zeros(rows, bool)  # whether a round has drafted for the row's text
        self._forgone = 0.0  # time that drafts would have saved while prompts were waiting

    def enter(self, row: int) -> None:
        """Note that a row has a new text."""
        self._acceptance.enter(row)
        if not self._live.any():
            self._forgone = 0.0
        self._live[row], self._drafts[row] = True, False

    def leave(self, row: int) -> None:
        """Note that a row has no text any more."""
        self._live[row] = False

    def read(
        self,
        levels: int,
        accepted: Int[np.ndarray, " rows"],
        current: Bool[np.ndarray, " rows"],
        done: Bool[np.ndarray, " rows"],
        repeated: Int[np.ndarray, " rows"] | None = None,
    ) -> None:
        """Take in the report of a round.

        Args:
            levels: Its tier.
            accepted: Levels that each row accepted.
            current: Rows that still have the text it is about.
            done: Rows whose texts are finished.
            repeated: Levels that lookups alone would have added, where the lowest tier has them.
        """
        if len(self.tiers) > 1:
            self._acceptance.add(levels, accepted, current & ~done, repeated)
        self._live &= ~(current & done)

    def next(self, unread: int = 0) -> int:
        """Return the levels of the next round.

        Args:
            unread: Tokens of prompts that the draft would have to read first.
        """
        if len(self.tiers) == 1:
            return self._now
        if self._rounds % self._every == 0:
            self._costs = self._agree([*self.times.costs(), self.times.reading_cost()])
        self._rounds += 1
        *costs, reading = self._costs
        # Where a text has been drafted for, the others would only delay it.
        may_wait = self._waits and not (self._drafts & self._live).any()
        wait = unread * (reading or 0.0) if may_wait else 0.0
        if not wait:
            self._forgone = 0.0
        self._now = self._chosen(dict(zip(self.tiers, costs, strict=True)), wait)
        if self._now:
            self._drafts |= self._live
        return self._now

    def _chosen(self, costs: Mapping[int, float | None], wait: float) -> int:
        tokens = self._acceptance.expected()[self._live].sum(axis=0)
        speed = dict[int, float]()
        # The tier that runs comes first, so that each keeps its turn until it is timed.
        for levels in (self._now, *reversed(self.tiers)):
            cost = costs[levels]
            if cost is None:
                return levels
            speed[levels] = tokens[levels] / cost
        best = max(self.tiers, key=speed.__getitem__)
        best = best if speed[best] > GAIN * speed[self._now] else self._now
        if best and self._forgone < wait and self._live.any():
            lowest = self.tiers[0]
            self._forgone += tokens[lowest] * (1 / speed[lowest] - 1 / speed[best])
            return lowest
        return best
