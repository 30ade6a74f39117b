"""Variants of the best prediction (early ends, adapting, lookups), measured next to it."""

from collections.abc import Sequence
from dataclasses import replace

from easyspec_jax.tune.acceptance import EarlyEnd
from easyspec_jax.tune.candidates import Candidate
from easyspec_jax.tune.predict import Figures, Prediction, predict


def extras(
    best: Prediction, figures: Figures, early: Sequence[EarlyEnd], levels: int
) -> list[Candidate]:
    """Return drafts that end early, rounds that adapt, lookups in addition, and both of these.

    Args:
        best: The best prediction.
        figures: What was measured.
        early: What rounds of the same draft and width do that end below several thresholds.
        levels: The most levels of these rounds.
    """
    shape, own = best.candidate.shape, best.candidate.speculative
    looking_up = replace(own, prompt_lookup=True)
    ways = [replace(own, adapt=True), looking_up, replace(looking_up, adapt=True)]
    if early and levels > 1:
        whole = predict(
            figures, Candidate(shape, replace(own, num_speculative_tokens=levels, tree_nodes=None))
        )
        end = max(early, key=lambda end: tokens_per_second(whole, end))
        deep = whole.candidate.speculative
        ways.insert(0, replace(deep, confidence_threshold=end.threshold))
    return [Candidate(shape, way) for way in ways]


def tokens_per_second(whole: Prediction, end: EarlyEnd) -> float:
    """Predict the speed of rounds that may end early.

    Args:
        whole: The prediction for rounds that never do.
        end: Tokens and steps of those that do.
    """
    seconds = whole.first + end.steps * whole.step + whole.verification + whole.overhead
    return (1 + end.accepted) / seconds
