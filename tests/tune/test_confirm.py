"""Speeds are compared within a prompt, in an order that changes."""

import pytest

from easyspec_jax.errors import EasySpecError
from easyspec_jax.tune.confirm import alternate, confirmed


def test_ways_take_turns_at_being_first():
    order = []

    def way(name: str):
        return lambda prompt: order.append((prompt, name)) or 1.0

    alternate({name: way(name) for name in "abc"}, 3, go_on=lambda number: True)
    assert ["".join(name for _, name in order[i : i + 3]) for i in (0, 3, 6)] == [
        "abc",
        "bca",
        "cab",
    ]
    assert [prompt for prompt, _ in order] == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_out_of_time_after_the_first_prompt():
    speeds = alternate({"a": float, "b": float}, 5, go_on=lambda number: number < 2)
    assert speeds == {"a": [0.0, 1.0], "b": [0.0, 1.0]}
    assert alternate({"a": float}, 5, go_on=lambda number: False) == {"a": [0.0]}


def test_a_machine_that_slows_down_changes_no_comparison():
    speeds = {"plain": [10.0, 5.0, 1.0], "fast": [15.0, 7.5, 1.5], "slow": [100.0, 4.0, 0.8]}
    assert confirmed(speeds, "plain") == pytest.approx({"plain": 5.0, "fast": 7.5, "slow": 4.0})


def test_texts_without_a_round_do_not_count():
    """A text that ends with its first token has no speed: 0 tokens a second."""
    speeds = {"plain": [0.0, 10.0], "fast": [0.0, 15.0]}
    assert confirmed(speeds, "plain") == {"plain": 10.0, "fast": 15.0}
    with pytest.raises(EasySpecError, match="ends every text with its first token"):
        confirmed({"plain": [0.0, 0.0], "fast": [0.0, 0.0]}, "plain")
