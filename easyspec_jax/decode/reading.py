"""Prompts that the target has read, and that the draft reads before it drafts.

A text may end, or be continued by lookups and plain rounds, before any round asks for the draft.
Until then its prompt is not read twice.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from easyspec_jax.decode.state import State


class Prompts(NamedTuple):
    """Prompts that are read together.

    Attributes:
        rows: Their rows.
        tokens: Tokens of the passes, padding counted.
        read: Lets the draft read them; donates the state.
    """

    rows: Int[np.ndarray, " some"]
    tokens: int
    read: Callable[[State], State]


class DraftReading:
    """The prompts of a batch that the draft has yet to read, in the order in which they came."""

    def __init__(self) -> None:
        """Begin without prompts."""
        self._waiting: list[Prompts] = []

    def add(self, prompts: Prompts) -> None:
        """Note prompts that the target has read."""
        self._waiting.append(prompts)

    def leave(self, row: int) -> None:
        """Note that a row's text is finished, so that its prompt need not be read."""
        self._waiting = [one for one in self._waiting if one.rows.tolist() != [row]]

    @property
    def rows(self) -> Int[np.ndarray, " some"]:
        """Rows whose prompts are waiting."""
        return np.concatenate([np.zeros(0, np.int64), *(one.rows for one in self._waiting)])

    @property
    def tokens(self) -> int:
        """Tokens of the passes that are waiting."""
        return sum(one.tokens for one in self._waiting)

    def run(self, state: State) -> State:
        """Let the draft read all of them.

        Args:
            state: The state; donated if anything is waiting.
        """
        for prompts in self._waiting:
            state = prompts.read(state)
        self._waiting = []
        return state
