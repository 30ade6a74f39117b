"""How likely a level must be for the rounds of `--adapt on` to draft it, as an estimate."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from easyspec_jax.decode.state import TIERS
from easyspec_jax.plan.cost import Cost
from easyspec_jax.plan.machines import Machine
from easyspec_jax.plan.steps import MakeMesh, Pair, Way, rounds

LIKELY = np.linspace(0.0, 1.0, 1001)
"""Probabilities that are tried."""


@dataclass(frozen=True)
class Tier:
    """Rounds of a number of levels.

    Attributes:
        levels: The levels; 0 is plain decoding.
        seconds: Time of a round.
        pays_from: Least probability of a level, given the one above it, at which no other tier has
            more tokens a second; None if there is none.
    """

    levels: int
    seconds: float
    pays_from: float | None


def tiers(pair: Pair, way: Way, plain: Cost, make_mesh: MakeMesh, machine: Machine) -> list[Tier]:
    """Count the tiers of a way of drafting.

    Args:
        pair: The pair, with the most levels and the tree width.
        way: The way.
        plain: A round of plain decoding.
        make_mesh: Makes a mesh.
        machine: The device.
    """
    most = pair.num_speculative_tokens
    counted = rounds(pair, way, make_mesh, most)
    drafted = {n: counted[n - 1].cost for n in (*TIERS, most) if 0 < n <= most}
    costs = {0: plain} | drafted
    return tiers_of({levels: cost.seconds(machine) for levels, cost in costs.items()})


def tiers_of(seconds: Mapping[int, float]) -> list[Tier]:
    """Find where each tier is the fastest.

    Args:
        seconds: Time of a round, by its levels.

    Examples:
        Two levels take twice the time of a plain step. They pay if they yield two tokens:

        >>> [tier.pays_from for tier in tiers_of({0: 1.0, 2: 2.0})]
        [0.0, 0.619]
    """
    # 1 + p + p² + …, up to each number of levels: [levels + 1, probabilities]
    tokens = np.cumsum(LIKELY ** np.arange(max(seconds) + 1)[:, None], axis=0)[list(seconds)]
    # Of equals the tier of fewer levels comes first, and is taken.
    fastest = np.argmax(tokens / np.asarray(list(seconds.values()))[:, None], axis=0)
    found = []
    for number, (levels, time) in enumerate(seconds.items()):
        where = np.flatnonzero(fastest == number)
        found.append(Tier(levels, time, float(LIKELY[where[0]]) if len(where) else None))
    return found
