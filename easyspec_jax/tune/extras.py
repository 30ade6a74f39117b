"""Ways to draft whose gain no measured pass predicts; they run next to the best prediction."""

from dataclasses import replace

from easyspec_jax.tune.candidates import Candidate
from easyspec_jax.tune.predict import Prediction

LEAST = 0.02
"""Confidence threshold below which drafting would hardly ever end early."""


def extras(best: Prediction) -> list[Candidate]:
    """Return further ways to draft as the best prediction does.

    Drafting ends early, rounds adapt, or the text is looked up as well.
    """
    shape, own = best.candidate.shape, best.candidate.speculative
    ways = []
    threshold = worth_a_step(best)
    if own.num_speculative_tokens > 1 and threshold >= LEAST:
        ways.append(replace(own, confidence_threshold=threshold))
    ways += [replace(own, adapt=True), replace(own, prompt_lookup=True)]
    return [Candidate(shape, way) for way in ways]


def worth_a_step(prediction: Prediction) -> float:
    """Return how likely a path must be for the next step of the draft to pay.

    A step adds a token with at most the probability that the path above is right, and costs the
    tokens that could be decoded meanwhile. Where the one is less than the other, it does not pay.

    Args:
        prediction: A way to draft.

    Returns:
        A threshold for SpeculativeConfig.confidence_threshold, of two digits.
    """
    return min(1.0, round(prediction.step * prediction.tokens_per_second, 2))
