"""A learned threshold is near the best one there is, whatever the draft thinks of itself."""

import numpy as np
import pytest

from easyspec_jax.decode.threshold import (
    DECIDES,
    EVERY,
    FIRST,
    NONE,
    THRESHOLDS,
    ThresholdChoice,
)

LEVELS = 12
ONE = np.ones(1, bool)


class Texts:
    """Rounds of a draft whose tokens are as likely to be right as it says, to some power.

    power: Above 1 it is surer than it should be, below 1 not as sure.
    """

    def __init__(self, seed: int, power: float, low: float = 0.3) -> None:
        self._random, self._power, self._low = np.random.default_rng(seed), power, low

    def round(self) -> tuple[np.ndarray, int]:
        """Return the confidence of every level, and how many of all would be accepted."""
        own = self._random.uniform(self._low, 1.0, LEVELS)
        right = self._random.random(LEVELS) < own**self._power
        return np.cumprod(own), int(np.cumprod(right).sum())


def played(confidence: np.ndarray, reached: int, threshold: float) -> tuple[np.ndarray, int]:
    """End a round below a threshold; return its confidence as reported, and what is accepted."""
    passes = 1 + int((confidence[:-1] >= threshold).cumprod().sum())
    return np.where(np.arange(LEVELS) < passes, confidence, 0.0)[None], min(reached, passes)


def speed(choose, texts: Texts, cost: float, rounds: int, learn=None) -> float:
    """Return tokens a second; a pass takes `cost`, and the rest of a round one second."""
    tokens, spent = 0, 0.0
    for _ in range(rounds):
        confidence, accepted = played(*texts.round(), choose())
        seconds = 1.0 + cost * (confidence > 0).sum()
        tokens, spent = tokens + 1 + accepted, spent + seconds
        if learn is not None:
            learn.read(confidence, np.array([accepted]), ONE)
            learn.time(confidence, seconds)
    return tokens / spent


@pytest.mark.parametrize("power", [0.3, 1.0, 2.0], ids=["unsure", "right", "too sure"])
@pytest.mark.parametrize("cost", [0.01, 0.1, 0.4])
def test_the_loss_against_the_best_threshold_is_small(power, cost):
    """The best is the one of all thresholds that is the fastest in 5,000 rounds."""
    fixed = {
        threshold: speed(lambda own=threshold: own, Texts(1, power), cost, 5000)
        for threshold in (0.0, *THRESHOLDS, NONE)
    }
    speeds = []
    for seed in range(5):
        choice = ThresholdChoice()
        speeds.append(speed(choice.next, Texts(seed, power), cost, 600, choice))
    assert np.mean(speeds) > 0.93 * max(fixed.values())
    # The best one is worth choosing: others lose far more.
    assert min(fixed.values()) < 0.9 * max(fixed.values())


def test_confidence_alone_would_mislead():
    """A draft that is less sure than it should be needs a threshold below the price."""
    cost, power = 0.1, 0.3
    choice = ThresholdChoice()
    learned = speed(choice.next, Texts(0, power), cost, 600, choice)
    assert learned > 1.02 * speed(lambda: 0.5, Texts(0, power), cost, 600)
    assert choice.learned() < 0.3


def test_it_follows_a_draft_that_changes():
    choice = ThresholdChoice()
    good, bad = Texts(0, 0.1), Texts(1, 8.0)
    speed(choice.next, good, 0.1, 300, choice)
    assert choice.learned() <= 0.1
    speed(choice.next, bad, 0.1, 300, choice)
    assert choice.learned() >= 0.4
    speed(choice.next, good, 0.1, 600, choice)
    assert choice.learned() <= 0.15


def test_all_levels_are_drafted_at_first_and_less_is_asked_now_and_then():
    choice = ThresholdChoice()
    taken = []
    for number in range(3 * EVERY):
        taken.append(choice.next())
        passes = 2 if taken[-1] == 0 else 1
        choice.time(np.array([[0.5, 0.4]]) * (np.arange(2) < passes), 1.0 + 5.0 * passes)
        choice.read(np.array([[0.5, 0.4]]) * (np.arange(2) < passes), np.zeros(1, int), ONE)
        assert number >= 2 * FIRST or taken[-1] == (0.0 if number < FIRST else NONE)
    assert taken[2 * FIRST : DECIDES] == [0.0] * (DECIDES - 2 * FIRST)  # no decision yet
    assert set(taken[DECIDES:EVERY]) == {0.7}
    assert [n for n, own in enumerate(taken) if n >= DECIDES and own < 0.7] == [EVERY, 2 * EVERY]
    assert taken[EVERY] == 0.5


def test_processes_choose_alike_whatever_their_clocks_say():
    said: list[float] = []
    heard = iter(said)
    first = ThresholdChoice(lambda own: said.append(own) or own)
    other = ThresholdChoice(lambda own: next(heard))
    texts, random = Texts(0, 1.0), np.random.default_rng(0)
    for _ in range(200):
        threshold = first.next()
        assert threshold == other.next()
        confidence, accepted = played(*texts.round(), threshold)
        for choice, pace in ((first, 0.3), (other, 3.0)):
            choice.read(confidence, np.array([accepted]), ONE)
            choice.time(confidence, pace * (confidence > 0).sum() + random.random())
    assert len(said) == 200 / DECIDES
    assert first.learned() != other.learned()


def test_texts_that_end_and_rows_without_a_draft_say_nothing():
    """A text's last round accepts no more than the text has; a long match needs no draft."""
    choice, none = ThresholdChoice(), np.zeros(1, bool)
    confidence = np.array([[0.9, 0.8, 0.7]])
    for _ in range(20):
        choice.read(confidence, np.zeros(1, int), none)
    choice.read(np.zeros((1, 3)), np.full(1, 3), ONE)
    for _ in range(20):
        choice.time(confidence, 1.4)
        choice.time(confidence * [1, 0, 0], 1.2)
    assert choice.learned() == 0.1
    for _ in range(20):
        choice.read(confidence, np.zeros(1, int), ONE)
    assert choice.learned() > 0.8


@pytest.mark.parametrize("cost", [0.05, 0.1])
def test_it_follows_a_draft_that_was_never_wrong_for_long(cost):
    """As all levels are drafted, no round says what a pass costs, unless some draft fewer."""
    sure, bad = Texts(0, 0.01, low=0.995), Texts(1, 8.0)
    choice = ThresholdChoice()
    speed(choice.next, sure, cost, 400, choice)
    speed(choice.next, bad, cost, 300, choice)
    found = speed(choice.next, bad, cost, 700, choice)
    fixed = [
        speed(lambda own=own: own, Texts(1, 8.0), cost, 700) for own in (0.0, *THRESHOLDS, NONE)
    ]
    assert found > 0.9 * max(fixed)
    assert fixed[0] < 0.8 * max(fixed)  # where it would stay otherwise


def test_times_that_misled_at_first_are_seen_again():
    """The rounds of one level at first are slow by chance, so a pass seems to cost nothing."""
    choice, cost = ThresholdChoice(), 0.1
    for _ in range(2 * FIRST):
        choice.next()
        confidence = np.full((1, LEVELS), 0.5)
        choice.time(confidence, 1.0)
        choice.time(confidence * (np.arange(LEVELS) < 1), 3.0)
    assert choice.learned() == 0.0
    bad = Texts(1, 8.0)
    speed(choice.next, bad, cost, 400, choice)
    assert choice.learned() >= 0.3
