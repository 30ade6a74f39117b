"""Questions about grammars that a compiled round asks the host."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easyspec_jax.sampling import grammar_rows as module


@pytest.mark.parametrize("room", [1, 3, 4, 9])
def test_the_host_is_given_all_numbers_in_pieces(room, monkeypatch):
    """Two rows of 2 to 10 numbers each, in pieces of 8."""
    monkeypatch.setattr(module, "PIECE", 8)
    rows = np.arange(2 * (1 + room), dtype=np.int32).reshape(2, 1 + room)

    def answer(*pieces: np.ndarray) -> np.ndarray:
        assert max(piece.size for piece in pieces) <= 8
        return np.concatenate(pieces).reshape(rows.shape)

    ask = jax.jit(lambda first, others: module._ask(answer, rows.shape, first, others))
    found = ask(jnp.asarray(rows[:, 0]), jnp.asarray(rows[:, 1:]))
    np.testing.assert_array_equal(found, rows)
