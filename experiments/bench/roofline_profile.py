"""The kernels of a round and the gaps between them, from a profile."""

from collections import defaultdict
from typing import Any

import numpy as np

from easyspec_jax import EasySpecError
from experiments.paper.timeline import (
    Operation,
    all_operations,
    kind,
    middle,
    rounds_of,
    spans,
    union,
)

LONGEST = 12
"""Kinds of kernels to list."""


def kernels(profile: Any) -> dict[str, Any]:
    """Describe the round of median duration of a ProfileData, as its first device runs it.

    Args:
        profile: A profile of waited-for rounds; see timeline.recorded().

    Returns:
        `kernels`, how many there are; `traced_seconds`, the round from dispatch to the end of the
        wait; `busy_share`, of the time from the first kernel's begin to the last one's end;
        `gaps_seconds` and `median_gap_seconds`, the rest of that time; `first_seconds`, from
        dispatch to the first kernel; and `longest`, the kinds of kernels that take most time.

    Raises:
        EasySpecError: The profile has no rounds, or no kernels in the median one.
    """
    rounds = rounds_of(profile)
    if not len(rounds):
        raise EasySpecError("the profile shows no rounds")
    begin, end = middle(rounds)
    inside = [own for own in all_operations(profile) if begin <= own.begin < end]
    if not inside:
        raise EasySpecError("the profile shows no kernels in the median round")
    device = min(own.device for own in inside)
    own = [each for each in inside if each.device == device]
    busy = union(spans((each.begin, each.end) for each in own))
    gaps = busy[1:, 0] - busy[:-1, 1]
    covered = float(busy[-1, 1] - busy[0, 0])
    return {
        "kernels": len(own),
        "traced_seconds": (end - begin) / 1e9,
        "busy_share": 1 - float(gaps.sum()) / covered if covered else 1.0,
        "gaps_seconds": float(gaps.sum()) / 1e9,
        "median_gap_seconds": float(np.median(gaps)) / 1e9 if len(gaps) else 0.0,
        "first_seconds": float(busy[0, 0] - begin) / 1e9,
        "longest": longest(own),
    }


def longest(operations: list[Operation]) -> list[dict[str, Any]]:
    """Sum up operations by kind, and return those that take most time."""
    sums: dict[str, list[float]] = defaultdict(list)
    for own in operations:
        sums[kind(own.name)].append((own.end - own.begin) / 1e9)
    rows = [
        {"kind": name, "count": len(seconds), "seconds": sum(seconds)}
        for name, seconds in sums.items()
    ]
    return sorted(rows, key=lambda row: row["seconds"], reverse=True)[:LONGEST]
