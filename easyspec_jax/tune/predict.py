"""Predict the speed of every candidate from what has been measured.

A round is the draft's first pass, a fuzzy step for each further level, and the target's
verification of all nodes; their times add up. A figure that has not been measured is assumed to be
as good as it could be, so that no candidate is dropped for lack of a measurement.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf, isfinite
from typing import Literal

import numpy as np

from easyspec_jax.decode.state import RoundConfig
from easyspec_jax.options import SamplingParams, SpeculativeConfig
from easyspec_jax.tune.candidates import Candidate, Draft

Phase = Literal["step", "verification", "acceptance", "first"]

SLACK = 1.05
"""How far an unmeasured figure may beat its bound, because figures are noisy."""


@dataclass(frozen=True)
class Figures:
    """Measurements so far, in seconds unless said otherwise.

    Attributes:
        plain: A step of plain decoding.
        overhead: The host's share of a step or round, on top.
        verification: The target's pass, by number of nodes including the root; at least two.
        step: A draft's fuzzy pass, by number of nodes.
        first: A draft's exact pass, by number of pending tokens, for drafts that calibrate.
        acceptance: Mean accepted tokens of rounds of 1, 2, … levels, by tree width.
    """

    plain: float
    overhead: float
    verification: dict[int, float]
    step: dict[Draft, dict[int, float]] = field(default_factory=dict)
    first: dict[Draft, dict[int, float]] = field(default_factory=dict)
    acceptance: dict[SpeculativeConfig, dict[int, tuple[float, ...]]] = field(default_factory=dict)

    def timed(self, draft: Draft) -> bool:
        """Whether a step of a draft was timed. One that does not fit a device takes forever."""
        return isfinite(self.step.get(draft, {}).get(1, inf))


@dataclass(frozen=True)
class Prediction:
    """Predicted figures of one candidate; times in seconds.

    Attributes:
        candidate: The candidate.
        first: The draft's first pass.
        step: One fuzzy step.
        verification: The target's pass.
        overhead: The host's share of a round.
        accepted: Accepted tokens of a round, on average.
        missing: Figures that were not measured, and are as good as they could be.
    """

    candidate: Candidate
    first: float
    step: float
    verification: float
    overhead: float
    accepted: float
    missing: tuple[Phase, ...]

    @property
    def seconds(self) -> float:
        """Seconds of a round."""
        steps = self.candidate.speculative.num_speculative_tokens - 1
        return self.first + steps * self.step + self.verification + self.overhead

    @property
    def score(self) -> float:
        """Speed, less SLACK if something is missing: a gain below that is not worth measuring."""
        return self.tokens_per_second / (SLACK if self.missing else 1.0)

    @property
    def tokens_per_second(self) -> float:
        """Speed: a round yields the accepted tokens and one more."""
        return (1.0 + self.accepted) / self.seconds


def predict(figures: Figures, candidate: Candidate) -> Prediction:
    """Return a candidate's figures, as measured or as good as they could be."""
    speculative, draft = candidate.speculative, candidate.draft
    width, levels = speculative.width, speculative.num_speculative_tokens
    pending, calibrates = pending_size(speculative), is_calibrated(speculative)
    step = figures.step.get(draft, {})
    # An ordinary draft's first pass is one more step, timed already.
    first = figures.first.get(draft, {}) if calibrates else step
    nodes = 1 + levels * width
    missing: dict[Phase, bool] = {
        # A narrower tree than the widest timed is interpolated; a wider one is not known.
        "step": width > max(step, default=0),
        "verification": nodes > max(figures.verification),
        "acceptance": width not in figures.acceptance.get(draft.drafting, {}),
        "first": calibrates and not first,
    }
    # A pass over several tokens takes at least as long as over one, and as the fastest of its kind.
    at_best = max(_interpolated(step, 1), _fastest_first(figures, draft, pending))
    return Prediction(
        candidate=candidate,
        first=at_best if missing["first"] else _interpolated(first, pending),
        step=_interpolated(step, width),
        verification=_verification(figures.verification, nodes),
        overhead=figures.overhead,
        accepted=_accepted(figures, draft.drafting, width, levels),
        missing=tuple(name for name, absent in missing.items() if absent),
    )


def plain_tokens_per_second(figures: Figures) -> float:
    """Return the speed of plain decoding in tokens a second."""
    return 1 / (figures.plain + figures.overhead)


def is_calibrated(speculative: SpeculativeConfig) -> bool:
    """Return whether the draft's first pass is exact; an ordinary draft's is one more step."""
    return RoundConfig.of(speculative, SamplingParams(), ()).calibration


def pending_size(speculative: SpeculativeConfig) -> int:
    """Return the number of tokens of the draft's first pass."""
    return RoundConfig.of(speculative, SamplingParams(), ()).pending_size


def _interpolated(known: Mapping[int, float], at: int) -> float:
    """Interpolate between measured sizes; past the largest its time, and 0 if nothing is known."""
    if not known:
        return 0.0
    sizes = sorted(known)
    return float(np.interp(at, sizes, [known[size] for size in sizes]))


def _verification(known: Mapping[int, float], nodes: int) -> float:
    """Interpolate, or extrapolate from the two largest sizes.

    Small passes are bound by memory and take the same time whatever their size. Larger ones are
    bound by arithmetic, so that the line gets steeper and never flatter.
    """
    if nodes <= max(known):
        return _interpolated(known, nodes)
    *_, second, most = sorted(known)
    return known[most] + max(0.0, known[most] - known[second]) / (most - second) * (nodes - most)


def _fastest_first(figures: Figures, draft: Draft, pending: int) -> float:
    """Bound an exact pass by those of drafts placed alike: groups hardly change its time."""
    tp = draft.layout.draft_tensor_parallel_size
    times = []
    for other, known in figures.first.items():
        if other.layout.draft_tensor_parallel_size == tp:
            times.append(_interpolated(known, pending))
    return min(times, default=0.0) / SLACK


def _accepted(figures: Figures, drafting: SpeculativeConfig, width: int, levels: int) -> float:
    # Measured at every depth at once, so there is nothing to interpolate.
    known = figures.acceptance.get(drafting, {})
    if width in known:
        return known[width][levels - 1]
    # A wider tree, or a draft that is at least as exact, accepts no less.
    best = float(levels)
    for better, by_width in figures.acceptance.items():
        for wider, measured in by_width.items():
            if wider >= width and _at_least_as_exact(better, drafting):
                best = min(best, measured[levels - 1] * SLACK)
    return best


def _at_least_as_exact(one: SpeculativeConfig, other: SpeculativeConfig) -> bool:
    """Return whether a draft accepts at least as much as another.

    Exact drafts do, and so do drafts with smaller groups that are alike otherwise.
    """
    if one.method == "sd":
        return True
    smaller = one.lp_size <= other.lp_size and one.mlp_lp_size <= other.mlp_lp_size
    return smaller and one == replace(other, lp_size=one.lp_size, mlp_lp_size=one.mlp_lp_size)


def frontier(points: Sequence[tuple[float, float]], measured: Sequence[bool]) -> list[bool]:
    """Return which points are on the Pareto frontier.

    Args:
        points: Times, of which less is better, and acceptances, of which more is.
        measured: Points that count.

    Examples:
        >>> frontier([(1, 0.5), (2, 0.9), (3, 0.7)], [True, True, True])
        [True, True, False]
    """
    known = {point for point, real in zip(points, measured, strict=True) if real}
    on_frontier = []
    for point, real in zip(points, measured, strict=True):
        beaten = any(
            time <= point[0] and acceptance >= point[1] for time, acceptance in known - {point}
        )
        on_frontier.append(real and not beaten)
    return on_frontier
