"""Confirm predictions by decoding whole texts, alternately in each way."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np

from easyspec_jax.errors import EasySpecError
from easyspec_jax.progress import Advance

Name = TypeVar("Name")

Complete = Callable[[int], float]
"""Decodes the prompt of a number and returns its speed in tokens a second."""


def alternate(
    ways: Mapping[Name, Complete],
    prompts: int,
    go_on: Callable[[int], bool],
    advance: Advance = lambda amount: None,
) -> dict[Name, list[float]]:
    """Decode prompts in every way.

    Args:
        ways: Ways to decode, by name.
        prompts: How many prompts there are.
        go_on: Called with the number of prompts done; returns whether to begin another.
        advance: Called after every text.

    Returns:
        Speeds in tokens a second, by name, one per prompt.
    """
    speeds: dict[Name, list[float]] = {name: [] for name in ways}
    order = list(ways)
    for number in range(prompts):
        if number and not go_on(number):
            break
        for name in order:
            speeds[name].append(ways[name](number))
            advance(1)
        order = [*order[1:], order[0]]  # so that no way always comes first
    return speeds


def confirmed(speeds: Mapping[Name, Sequence[float]], baseline: Name) -> dict[Name, float]:
    """Return the speed of every way in tokens a second.

    Prompts are not equally easy, and a shared machine drifts from one to the next. So a way's gain
    over the baseline is taken per prompt; its median times the median of the baseline is its speed.
    Prompts whose text ends with its first token have no speed, and do not count.

    Args:
        speeds: See alternate().
        baseline: The name of the baseline among them.

    Raises:
        EasySpecError: No prompt counts.

    Examples:
        >>> confirmed({"plain": [2.0, 0.0, 4.0], "fast": [3.0, 0.0, 6.0]}, "plain")
        {'plain': 3.0, 'fast': 4.5}
    """
    plain = np.asarray(speeds[baseline])
    counts = plain > 0
    if not counts.any():
        raise EasySpecError(
            "the target ends every text with its first token, so nothing can be timed; "
            "give other `prompts`"
        )
    result = {}
    for name, own in speeds.items():
        gain = np.median(np.asarray(own)[counts] / plain[counts])
        result[name] = float(gain * np.median(plain[counts]))
    return result
