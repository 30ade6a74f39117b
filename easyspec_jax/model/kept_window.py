"""Caches of sliding layers that keep only the entries which may still be read.

Such a cache has a row's entries from some entry on. Which one that is depends only on how many
entries are committed, and it moves on in steps, so that entries are seldom moved. With a window of
4 tokens and steps of 4:

    committed entries      0 ... 6   7 ... 10   11 ... 14
    first entry that stays    0         4           8

Passes read and write a cache as it is for the entries that were committed before them.
"""

import jax.numpy as jnp
from jaxtyping import Array, Int

from easyspec_jax.arithmetic import round_up

STEP = 128
"""Entries by which a cache moves on."""

ALIGNMENT = 128
"""Multiple of entries that a cache has."""


def first_kept(committed: Int[Array, " batch"], window: int) -> Int[Array, " batch"]:
    """Return the first entry that each row's cache has.

    Args:
        committed: Committed entries of each row.
        window: Tokens that the layer reads, the reading one included.

    Examples:
        >>> first_kept(jnp.array([100, 255, 256, 384]), window=129).tolist()
        [0, 0, 128, 256]
    """
    # The token after 256 committed ones reads entries 128 to 256.
    return jnp.maximum(committed - (window - 1), 0) // STEP * STEP


def kept_entries(window: int, reach: int) -> int:
    """Return how many entries a cache needs, however long texts are.

    Args:
        window: As for first_kept().
        reach: Most entries that are written behind the committed ones before it moves on.

    Examples:
        >>> kept_entries(window=512, reach=128)
        768
    """
    return round_up(window - 1 + STEP - 1 + reach, ALIGNMENT)
