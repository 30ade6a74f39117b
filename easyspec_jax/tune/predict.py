"""From what has been measured to tokens a second of every candidate: times add, and what is unknown is guessed high.

A round is the draft's first pass, a fuzzy step for each further level, and the target's verification of all nodes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from easyspec_jax.decode.round import RoundConfig
from easyspec_jax.options import SamplingParams, SpeculativeConfig
from easyspec_jax.tune.candidates import Candidate, Draft

Phase = Literal["step", "verification", "acceptance", "first"]

SLACK = 1.05
"""How much better than what bounds it an unmeasured figure may turn out: figures are noisy."""


@dataclass(frozen=True)
class Figures:
    """Measurements so far; times in seconds.

    plain: of a step of plain decoding. overhead: of the host for a step or round, on top. verification: of a target's
    pass over so many nodes, the root included, of two sizes at least. step: of a draft's fuzzy pass over so
    many nodes. first: of a draft's exact pass over so many pending tokens, where that calibrates. acceptance: by tree
    width, the mean accepted tokens of a round of 1, 2, … levels.
    """

    plain: float
    overhead: float
    verification: dict[int, float]
    step: dict[Draft, dict[int, float]] = field(default_factory=dict)
    first: dict[Draft, dict[int, float]] = field(default_factory=dict)
    acceptance: dict[SpeculativeConfig, dict[int, tuple[float, ...]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Prediction:
    """Prediction for one candidate; figures not measured (missing) are assumed to be as good as they could be.

    accepted: tokens of a round, on average.
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
        """Tokens a second, less a little where something was not measured: what gains less is not worth measuring."""
        return self.tokens_per_second / (SLACK if self.missing else 1.0)

    @property
    def tokens_per_second(self) -> float:
        """A round yields what was accepted and one token more."""
        return (1.0 + self.accepted) / self.seconds


def predict(figures: Figures, candidate: Candidate) -> Prediction:
    """The candidate's figures, each the measured one or, where there is none, the best that it could be."""
    speculative, draft = candidate.speculative, candidate.draft
    width, levels = speculative.width, speculative.num_speculative_tokens
    pending, calibrates = pending_size(speculative), is_calibrated(speculative)
    step = figures.step.get(draft, {})
    first = figures.first.get(draft, {}) if calibrates else step
    nodes = 1 + levels * width
    missing: dict[Phase, bool] = {
        "step": width > max(step, default=0),
        "verification": nodes > max(figures.verification),
        "acceptance": width not in figures.acceptance.get(draft.drafting, {}),
        "first": calibrates and not first,
    }
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
    """Speed of plain decoding."""
    return 1 / (figures.plain + figures.overhead)


def is_calibrated(speculative: SpeculativeConfig) -> bool:
    """Whether the draft's first pass differs from others; an ordinary draft's is one more step."""
    return RoundConfig.of(speculative, SamplingParams(), ()).calibration


def pending_size(speculative: SpeculativeConfig) -> int:
    """Tokens of the draft's first pass."""
    return RoundConfig.of(speculative, SamplingParams(), ()).pending_size


def _interpolated(known: Mapping[int, float], at: int) -> float:
    """Between measured sizes; beyond the largest that one's time, and 0 where nothing is known."""
    if not known:
        return 0.0
    sizes = sorted(known)
    return float(np.interp(at, sizes, [known[size] for size in sizes]))


def _verification(known: Mapping[int, float], nodes: int) -> float:
    """Beyond the largest size on a straight line: first memory takes the time, then arithmetic; it gets no flatter."""
    *_, second, most = sorted(known)
    if nodes <= most:
        return _interpolated(known, nodes)
    return known[most] + max(0.0, known[most] - known[second]) / (most - second) * (nodes - most)


def _fastest_first(figures: Figures, draft: Draft, pending: int) -> float:
    """Exact passes of drafts that are placed alike take about the same time, whatever the groups."""
    tp = draft.layout.draft_tensor_parallel_size
    times = [
        _interpolated(known, pending)
        for other, known in figures.first.items()
        if other.layout.draft_tensor_parallel_size == tp
    ]
    return min(times, default=0.0) / SLACK


def _accepted(figures: Figures, drafting: SpeculativeConfig, width: int, levels: int) -> float:
    known = figures.acceptance.get(drafting, {})
    if width in known:
        return known[width][levels - 1]
    bounds = [
        measured[levels - 1] * SLACK
        for better, by_width in figures.acceptance.items()
        for wider, measured in by_width.items()
        if wider >= width and _at_least_as_exact(better, drafting)
    ]
    return min([*bounds, levels])


def _at_least_as_exact(one: SpeculativeConfig, other: SpeculativeConfig) -> bool:
    """Whether a draft is known to see as far as another: exact ones do, and those of smaller groups otherwise alike."""
    if one.method == "sd":
        return True
    smaller = one.lp_size <= other.lp_size and one.mlp_lp_size <= other.mlp_lp_size
    return smaller and one == replace(other, lp_size=one.lp_size, mlp_lp_size=one.mlp_lp_size)


def frontier(points: Sequence[tuple[float, float]], measured: Sequence[bool]) -> list[bool]:
    """Pareto frontier of measured (time, acceptance) points."""
    known = {point for point, real in zip(points, measured, strict=True) if real}
    return [
        real and not any(other[0] <= point[0] and other[1] >= point[1] for other in known - {point})
        for point, real in zip(points, measured, strict=True)
    ]
