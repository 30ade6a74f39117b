"""Counters that finished texts update."""

from types import SimpleNamespace
from typing import Any

import pytest

from easyspec_jax.decode.stats import Stats, TierStats

metrics = pytest.importorskip("easyspec_jax.server.metrics", reason="the extra `serve` is missing")

TIERS = (TierStats(0, rounds=7), TierStats(2, 3, 6, 4), TierStats(5, 2, 10, 9))
ADAPTING = Stats(
    rounds=12,
    drafted=16,
    accepted=13,
    accepted_per_position=(5, 4, 2, 1, 1),
    lookup_accepted=3,
    tiers=TIERS,
)


def test_rounds_and_what_they_accept_are_counted_by_tier():
    scheduler: Any = SimpleNamespace(running=0, waiting=0)
    counted = metrics.Metrics("model", 5, scheduler)
    fixed = Stats(rounds=4, accepted=6, accepted_per_position=(3, 2, 1, 0, 0))
    plain = Stats(rounds=20)
    for stats in (ADAPTING, fixed, plain):
        completion: Any = SimpleNamespace(prompt_ids=[1], finish_reason="stop", stats=stats)
        counted.ended(completion, 1.0)
    lines = counted.exposition().decode().splitlines()

    def of(name: str) -> dict[str, float]:
        found = [line.rpartition(" ") for line in lines if line.startswith(name + "{")]
        return {labels.split('"')[-2]: float(value) for labels, _, value in found}

    assert of("easyspec:rounds_total") == {"0": 27, "2": 3, "5": 6}
    assert of("easyspec:accepted_tokens_total") == {"0": 0, "2": 4, "5": 15}
    assert of("easyspec:lookup_accepted_tokens_total") == {"model": 3}
