"""The draft reads what waits for it, in order, and nothing of texts that have left."""

from typing import Any

import numpy as np

from easyspec_jax.decode.reading import DraftReading, Prompts


def waiting(read: list[int], *rows: int) -> Prompts:
    """Prompts whose reading is noted in a list; the state counts how often."""

    def step(state: Any) -> Any:
        read.extend(rows)
        return state + 1

    return Prompts(np.array(rows), 32 * len(rows), step)


def test_prompts_are_read_once_in_the_order_in_which_they_came():
    reading, read = DraftReading(), []
    reading.add(waiting(read, 2, 3))
    reading.add(waiting(read, 0))
    assert reading.rows.tolist() == [2, 3, 0] and reading.tokens == 96
    state: Any = 7
    assert reading.run(state) == 9
    assert read == [2, 3, 0]
    assert reading.rows.size == reading.tokens == 0
    assert reading.run(state) == 7


def test_a_prompt_leaves_with_its_text():
    reading, read = DraftReading(), []
    for row in (0, 1):
        reading.add(waiting(read, row))
    reading.leave(0)
    state: Any = 0
    reading.run(state)
    assert read == [1]
