"""Host-side bounds on row lengths, used to grow caches before they are full."""

import numpy as np
from jaxtyping import Array, Int

from easyspec_jax.decode.programs import Programs
from easyspec_jax.decode.state import State


class CacheGrowth:
    """Bounds on the lengths of all rows, and the capacity that follows from them.

    Caches grow to their next size when some row could need it in the round to be dispatched next.
    By then, the report of the round before may be unread, so a row may be longer than the host
    knows by up to depth + 1 tokens. A row that was left may run past the capacity; it then
    overwrites entries of its own only.

    Attributes:
        programs: Compiled steps, which know the sizes of caches.
        capacity: Capacity of the caches now.
    """

    def __init__(self, programs: Programs, rows: int, capacity: int = 0) -> None:
        self.programs, self.capacity = programs, capacity
        self._lengths = np.zeros(rows, np.int64)  # tokens of each row's text that the host knows
        self._first = np.zeros(rows, np.int64)  # tokens that get room at once
        self._ends = np.zeros(rows, np.int64)  # tokens of the text at its limit

    def enter(self, row: int, prompt: int, limit: int) -> None:
        """Note that a row has a new text.

        Args:
            row: The row.
            prompt: Tokens of its prompt.
            limit: Tokens that may follow.
        """
        self._lengths[row] = prompt
        self._first[row] = prompt + self.programs.sizes.ahead(limit)
        self._ends[row] = prompt + limit

    def leave(self, row: int) -> None:
        """Note that a row's text is finished: it needs no room any more."""
        self._lengths[row] = self._first[row] = self._ends[row] = 0

    def read(self, num_tokens: Int[Array | np.ndarray, " batch"]) -> None:
        """Note how many new tokens each row has reported."""
        self._lengths += np.asarray(num_tokens)

    def needed(self) -> int:
        """Return the capacity that the next round needs, whatever the unread report says."""
        # depth = 5, a row known to have 200 tokens, at most 206 after the unread report. The next
        # round starts from there, and `capacity` adds what a round writes behind a text. A text
        # does not grow past its limit, whatever levels a round drafts.
        longest = np.maximum(self._lengths + self.programs.config.depth + 1, self._first)
        return self.programs.sizes.capacity(max(1, int(np.minimum(longest, self._ends).max())))

    def grow_if_needed(self, state: State) -> State:
        """Return the state, with larger caches if the next round may need them."""
        if self.needed() <= self.capacity:
            return state
        self.capacity = self.needed()
        return self.programs.extend(state, self.capacity)
