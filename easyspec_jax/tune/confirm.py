"""Confirm predictions by running them: whole texts, the ways alternating."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np

from easyspec_jax.progress import Advance

Name = TypeVar("Name")

Complete = Callable[[int], float]
"""Decodes one of the sample's prompts; returns tokens a second."""


def alternate(
    ways: Mapping[Name, Complete],
    prompts: int,
    go_on: Callable[[int], bool],
    advance: Advance = lambda amount: None,
) -> dict[Name, list[float]]:
    """Tokens a second of every way for one prompt after the other; go_on(n): whether to begin after n of them."""
    speeds: dict[Name, list[float]] = {name: [] for name in ways}
    order = list(ways)
    for number in range(prompts):
        if number and not go_on(number):
            break
        for name in order:
            speeds[name].append(ways[name](number))
            advance(1)
        order = [*order[1:], order[0]]  # nobody always comes first
    return speeds


def confirmed(speeds: Mapping[Name, Sequence[float]], baseline: Name) -> dict[Name, float]:
    """Tokens a second of every way: its median gain over the baseline, within a prompt, times the baseline's median.

    A shared machine drifts from prompt to prompt, and prompts are not equally easy.
    """
    plain = np.asarray(speeds[baseline])
    return {
        name: float(np.median(np.asarray(own) / plain) * np.median(plain))
        for name, own in speeds.items()
    }
