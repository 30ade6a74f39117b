"""Texts of any tiers follow the target's joint distribution, if tiers are chosen by the past alone.

Each row has tiers of its own, which its noise and its last round decide.
"""

from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easyspec_jax.decode.round import speculative_round
from easyspec_jax.decode.state import Report, RoundConfig, State
from easyspec_jax.parallel.mesh import MeshShape
from easyspec_jax.sampling.noise import Purpose
from easyspec_jax.verify import Rejection, rejection
from tests.support.helpers import goodness_of_fit
from tests.verify.markov import count, draw_texts, joint, make_pairs, make_request, program

LEVELS, TIERS = 2, (0, 1, 2)
PAIR = make_pairs()["bad"]
TEMPERATURE = 0.7
DRAWS = 40_000
FAULTS = ("none", "the choice sees a drafted token", "plain rounds repeat the last draft's noise")


def a_tier_for_each_row(fault: str) -> Any:
    """Return a round that runs every tier, and keeps for each row the one of its choice."""

    def step(target: Any, draft: Any, state: State, config: RoundConfig) -> tuple[State, Report]:
        ways = [speculative_round(target, draft, state, config.tier(n)) for n in TIERS]
        # The text so far and the round say which: nothing that this round's noise decides.
        tier = (state.root + state.request.round + state.request.seed.astype(jnp.int32)) % 3
        if fault == "the choice sees a drafted token":
            tier = jnp.where(ways[2][1].accepted > 0, 2, 0)  # a draft that fails is not tried
        taken = padded(ways[0])
        for number, way in enumerate(ways):
            taken = jax.tree.map(
                lambda x, y, own=tier == number: choose(own, y, x), taken, padded(way)
            )
        state, report = taken
        if fault == "plain rounds repeat the last draft's noise":
            round_ = state.request.round - (tier == 0).astype(jnp.int32)
            state = replace(state, request=replace(state.request, round=round_))
        return state, report

    def padded(way: tuple[State, Report]) -> tuple[State, Report]:
        state, report = way
        more = LEVELS + 1 - report.tokens.shape[1]
        return state, report._replace(tokens=jnp.pad(report.tokens, ((0, 0), (0, more))))

    def choose(rows: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.where(rows.reshape(-1, *[1] * (x.ndim - 1)), x, y)

    return step


@cache
def compiled(width: int, fault: str) -> Any:
    config = RoundConfig(LEVELS, True, Rejection(), (), width, tiers=TIERS[:-1])
    return program(config, MeshShape(1, 1), step=a_tier_for_each_row(fault))


def p_value(width: int, fault: str) -> float:
    seeds = np.arange(DRAWS) + 10**6
    texts = draw_texts(compiled(width, fault), PAIR, make_request(seeds, TEMPERATURE))
    expected = joint(PAIR, TEMPERATURE)
    return goodness_of_fit(count(texts).reshape(1, -1), expected.reshape(1, -1))


@pytest.mark.slow
@pytest.mark.parametrize("width", [1, 3])
def test_texts_of_all_tiers_have_the_target_distribution(width):
    assert p_value(width, "none") > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS[1:])
def test_planted_faults_are_noticed(fault, monkeypatch):
    if "noise" in fault:
        # Noise keyed by the round alone, as it would be if a round could come at any position.
        real = rejection.noise_keys

        def by_round(seeds: Any, positions: Any, rounds: Any, purpose: Purpose) -> Any:
            return real(seeds, 0 * positions, rounds, purpose)

        monkeypatch.setattr(rejection, "noise_keys", by_round)
    assert p_value(1, fault) < 1e-9
