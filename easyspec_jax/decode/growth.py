"""Host-side bounds on row lengths, used to grow caches before they are full."""

import numpy as np
from jaxtyping import Array, Int

from easyspec_jax.decode.programs import AHEAD, Programs
from easyspec_jax.decode.round import State


class CacheGrowth:
    """Caches grow to the next size when some row could need it in the round that is dispatched next.

    One report of each row may be unread by then. Rows that are left may run over: what they overwrite is their own.
    """

    def __init__(self, programs: Programs, rows: int, capacity: int = 0) -> None:
        self.programs, self.capacity = programs, capacity
        self._lengths, self._first, self._ends = (np.zeros(rows, np.int64) for _ in range(3))

    def enter(self, row: int, prompt: int, limit: int) -> None:
        """Note that a row has a text of `prompt` tokens, to be continued by up to `limit` more."""
        self._lengths[row], self._first[row], self._ends[row] = (
            prompt,
            prompt + min(limit, AHEAD),
            prompt + limit,
        )

    def leave(self, row: int) -> None:
        """A row's text is finished."""
        self._lengths[row] = self._first[row] = self._ends[row] = 0

    def read(self, num_tokens: Int[Array | np.ndarray, " batch"]) -> None:
        """So many tokens of each row have been reported."""
        self._lengths += np.asarray(num_tokens)

    def needed(self) -> int:
        """The capacity that the next round needs, whatever the unread report says."""
        longest = np.maximum(self._lengths + self.programs.config.levels + 1, self._first)
        return self.programs.capacity(max(1, int(np.minimum(longest, self._ends).max())))

    def grow_if_needed(self, state: State) -> State:
        """The state, with larger caches if the next round may need them."""
        if self.needed() <= self.capacity:
            return state
        self.capacity = self.needed()
        return self.programs.extend(state, self.capacity)
