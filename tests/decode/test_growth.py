"""Caches have room for the round that is dispatched, whatever the unread report says."""

from functools import cached_property
from typing import Any

import numpy as np
import pytest

from easyspec_jax.decode.growth import CacheGrowth
from easyspec_jax.decode.programs import Programs
from easyspec_jax.decode.sizes import Sizes
from easyspec_jax.decode.state import RoundConfig
from easyspec_jax.sampling.adjustments import PLAIN, Kinds
from easyspec_jax.verify import Greedy

LIMITS = np.array([700, 40, 300])


class Recorder(Programs):
    """Programs without models; their state is the capacity of the caches."""

    @cached_property
    def sizes(self) -> Sizes:
        return Sizes(self.config, "cpu")

    def extend(self, state: Any, capacity: int) -> Any:
        assert capacity > state
        return capacity


def rounds_with_room(levels, width, seed, kinds=PLAIN):
    """Simulate two texts in every row, one after the other; fail where a round has no room."""
    config = RoundConfig(
        levels=levels,
        calibration=True,
        verifier=Greedy(),
        stop_ids=(),
        width=width,
        kinds=kinds,
    )
    programs, random = Recorder(None, None, None, config), np.random.default_rng(seed)  # pyright: ignore[reportArgumentType]
    for prompts in random.integers(1, 200, (2, len(LIMITS))):
        books, rounds = CacheGrowth(programs, len(LIMITS)), 0
        state: Any = 0
        for row, prompt in enumerate(prompts):
            books.enter(row, int(prompt), int(LIMITS[row]))
        true, unread = prompts.copy(), np.zeros_like(prompts)
        while (true < prompts + LIMITS).any():
            state = books.grow_if_needed(state)
            live = true < prompts + LIMITS
            assert (true + config.scratch + 1 <= state)[live].all()
            added = np.where(
                live,
                np.minimum(
                    random.integers(1, config.depth + 2, len(true)), prompts + LIMITS - true
                ),
                0,
            )
            books.read(unread)
            true, unread, rounds = true + added, added, rounds + 1
        assert rounds >= LIMITS.max() // (config.depth + 1)


@pytest.mark.parametrize("levels, width", [(0, 1), (4, 1), (5, 4), (16, 1)])
def test_every_round_has_room(levels, width, monkeypatch):
    monkeypatch.setattr("easyspec_jax.decode.sizes.AHEAD", 1)
    for seed in range(20):
        rounds_with_room(levels, width, seed)


def test_a_round_has_room_for_what_is_forced_too(monkeypatch):
    monkeypatch.setattr("easyspec_jax.decode.sizes.AHEAD", 1)
    for seed in range(20):
        rounds_with_room(5, 1, seed, Kinds(grammar=8))


@pytest.mark.parametrize("levels, width", [(0, 1), (4, 1), (5, 4), (16, 1)])
def test_room_that_comes_too_late_would_be_found(levels, width, monkeypatch):
    """Plant a fault: room for what has been read, as if no report were in flight."""
    monkeypatch.setattr(
        CacheGrowth, "needed", lambda self: self.programs.sizes.capacity(int(self._lengths.max()))
    )
    with pytest.raises(AssertionError):
        for seed in range(20):
            rounds_with_room(levels, width, seed)
