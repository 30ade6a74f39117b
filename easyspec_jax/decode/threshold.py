"""The confidence below which a draft ends, learned from the rounds themselves.

Another pass of the draft pays where the token that it may add is worth the pass's time:

    P(next level is accepted | confidence of this one)  >=  seconds of a pass * tokens a second

The confidence of a level is the probability of its likeliest path under the draft. Drafts may be
too sure or not sure enough, so how often the next level is accepted is counted, by bins of
confidence:

    confidence    drafted below    accepted    share    worth 0.3?
    0.70 - 1.00   40               36          0.90     yes
    0.50 - 0.70   25               14          0.56     yes
    0.40 - 0.50   12               3           0.25     no: the threshold is 0.5

A pass's time is how much longer rounds of more passes take. Below the threshold nothing is drafted
and nothing is seen. So what was seen there ages, which leaves the draft's own confidence; and one
round in EVERY has the next lower threshold. Where there is none, because all levels are drafted,
that round drafts a single level, so that a pass's time stays known.

Nothing here touches a device. All decisions come from reports that have been read.
"""

from collections import defaultdict, deque
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

THRESHOLDS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7)
"""Confidence thresholds to choose from, besides 0 (every level) and NONE."""

NONE = 1.0
"""A threshold that leaves hardly anything below the first level."""

_FALLING = (NONE, *THRESHOLDS[::-1], 0.0)

FADING = 0.97
"""Factor that an observation's weight takes with each newer one of the same bin."""

AGEING = 0.98
"""Factor that it takes with each round."""

PRIOR = 2.0
"""Observations that the draft's own confidence is worth."""

AVERAGED = 0.9
"""Factor that a round's weight takes with each newer one, in the averages over rounds."""

KEPT = 128
"""Latest rounds whose times count."""

FIRST = 3
"""Rounds at first that draft all levels; as many then draft one. Only so is a pass's time known."""

EVERY = 32
"""Rounds of which one has another threshold, to see what it gains."""

DECIDES = 8
"""Rounds between two decisions."""


class ThresholdChoice:
    """Chooses the threshold of every round of batches with as many rows.

    Examples:
        A draft whose confidence means nothing: it is right seven times of ten. A pass takes a
        thousandth of a second, and the rest of a round one second. So every pass pays:

        >>> choice, draws = ThresholdChoice(), np.random.default_rng(0)
        >>> for _ in range(200):
        ...     confidence = np.cumprod(draws.uniform(0.3, 0.9, (1, 4)), axis=1)
        ...     passes = 1 + int((confidence[0, :-1] >= choice.next()).cumprod().sum())
        ...     confidence[:, passes:] = 0
        ...     right = (draws.random(passes) < 0.7).cumprod().sum()
        ...     choice.read(confidence, np.array([right]), np.ones(1, bool))
        ...     choice.time(confidence, 1 + 0.001 * passes)
        >>> choice.learned()
        0.0

        With passes of two seconds none does:

        >>> for _ in range(200):
        ...     choice.time(np.array([[0.9, 0.0]]), 3.0)
        ...     choice.time(np.array([[0.9, 0.8]]), 5.0)
        >>> choice.learned()
        1.0
    """

    def __init__(self, agree: Callable[[Any], Any] = lambda threshold: threshold) -> None:
        """Start without any observation.

        Args:
            agree: Returns the threshold that all processes use. Each of them has its own clock, and
                would choose differently.
        """
        edges = np.asarray([0.0, *THRESHOLDS, 1.0])
        self._belief = (edges[1:] + edges[:-1]) / 2  # a draft that is as sure as it should be
        self._drafted = np.zeros(len(self._belief))
        self._accepted = np.zeros(len(self._belief))
        self._times = deque[tuple[int, float]](maxlen=KEPT)  # passes and seconds of rounds
        self._tokens = 1.0  # of a round, for each row, on average
        self._agree, self._agreed = agree, 0.0
        self._rounds = 0

    def next(self) -> float:
        """Return the threshold of the next round."""
        number = self._rounds
        self._rounds += 1
        if number % DECIDES == 0:
            self._agreed = self._agree(self.learned())
        if number < 2 * FIRST:
            return 0.0 if number < FIRST else NONE
        if number % EVERY:
            return self._agreed
        return _below(self._agreed) if self._agreed > 0 else NONE

    def learned(self) -> float:
        """Return the lowest threshold above which every bin pays."""
        price = self._price()
        share = (self._accepted + PRIOR * self._belief) / (self._drafted + PRIOR)
        pays = np.cumprod((share >= price)[::-1])  # from the most confident bin down
        return _FALLING[int(pays.sum())]

    def read(
        self,
        confidence: Float[np.ndarray, "rows levels"],
        accepted: Int[np.ndarray, " rows"],
        rows: Bool[np.ndarray, " rows"],
    ) -> None:
        """Take in the report of a round.

        Args:
            confidence: As in Report.
            accepted: Levels that each row accepted.
            rows: Rows whose texts go on. The last round of a text ends with the text, whatever it
                would have accepted.
        """
        if not rows.any():
            return
        self._tokens += (1 - AVERAGED) * (1 + accepted[rows].mean() - self._tokens)
        above, below = confidence[rows, :-1], confidence[rows, 1:]
        levels = np.arange(2, 2 + below.shape[1])
        right = accepted[rows, None] >= levels
        bins = np.searchsorted(THRESHOLDS, above, side="right")
        self._drafted *= AGEING
        self._accepted *= AGEING
        for number in range(len(self._belief)):
            seen = (below > 0) & (bins == number)
            count = seen.sum()
            # Those of one round are as old as each other.
            fading = FADING**count
            self._drafted[number] = fading * self._drafted[number] + count
            self._accepted[number] = fading * self._accepted[number] + (seen & right).sum()

    def time(self, confidence: Float[np.ndarray, "rows levels"], seconds: float) -> None:
        """Add the time of a round.

        Args:
            confidence: As in its report; the row with the most levels decides on the passes.
            seconds: Its time.
        """
        self._times.append((int((confidence > 0).sum(axis=1).max()), seconds))

    def _price(self) -> float:
        """Return the tokens that a row's text gains elsewhere in the time of a pass."""
        by_passes = defaultdict[int, list[float]](list)
        for passes, seconds in self._times:
            by_passes[passes].append(seconds)
        if len(by_passes) < 2:
            return 0.0
        medians = [median(seconds) for seconds in by_passes.values()]
        counts = [len(seconds) for seconds in by_passes.values()]
        slope, _ = np.polyfit(list(by_passes), medians, 1, w=np.sqrt(counts))
        a_round = np.average(medians, weights=counts)
        return float(max(slope, 0.0) * self._tokens / a_round)


def _below(threshold: float) -> float:
    """Return the next lower threshold.

    Examples:
        >>> _below(0.5)
        0.4
    """
    return _FALLING[_FALLING.index(threshold) + 1]
