"""Fuzzy passes over whole texts at once, each token as it would be drafted after an exact text.

A cache of (depth + 1) * tokens entries holds the exact KV of a text in its first `tokens` entries.
Behind them come, for each draft depth, the KV of all the text's tokens as drafted at this depth.
A token drafted at depth d reads the exact KV of the tokens up to d before it, and the KV of the
d - 1 tokens in between as drafted at depths 1 to d - 1.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from easyspec_jax.checkpoint.config import ModelConfig
from easyspec_jax.model.windows import Windows, chain_windows, make_windows


def exact_window(batch: int, tokens: int, capacity: int, config: ModelConfig) -> Windows:
    """Return the windows of whole texts read exactly; this pass comes before any drafted one.

    Args:
        batch: Number of texts.
        tokens: Tokens of each.
        capacity: Entries of the cache, at least `tokens`.
        config: The model's.
    """
    return chain_windows(jnp.zeros((batch,), jnp.int32), tokens, capacity, config)


def drafted_window(
    depth: int, batch: int, tokens: int, capacity: int, config: ModelConfig
) -> Windows:
    """Return the windows of whole texts with every token drafted at one depth.

    Passes go in order of depth, from 1, because each reads the KV of those before it.

    Args:
        depth: The depth, from 1.
        batch: Number of texts.
        tokens: Tokens of each.
        capacity: Entries of the cache, at least (depth + 1) * tokens.
        config: The model's.
    """
    mask = np.broadcast_to(_mask(depth, tokens, capacity), (batch, tokens, capacity))
    positions = jnp.asarray(np.broadcast_to(np.arange(tokens, dtype=np.int32), (batch, tokens)))
    # Every depth's entries are those of the whole text: 0 1 2 3 | 0 1 2 3 | 0 1 2 3.
    entries = np.arange(capacity, dtype=np.int32)[None, None, :] % tokens
    # The KV of this depth is written behind the exact and all shallower ones.
    start: Int[Array, " batch"] = jnp.full((batch,), depth * tokens, jnp.int32)
    return make_windows(start, jnp.asarray(mask), positions, entries, config)


def sampled_positions(every: int, depths: int, tokens: int) -> Int[np.ndarray, " sampled"]:
    """List the positions of sampled drafts, chain by chain.

    Args:
        every: Tokens from the start of one draft to the next.
        depths: Tokens of a draft.
        tokens: Tokens of the text, past which no draft goes.

    Examples:
        >>> sampled_positions(every=3, depths=2, tokens=6).tolist()
        [0, 1, 3, 4]
    """
    starts = range(0, tokens - depths + 1, every)
    return np.concatenate([np.arange(first, first + depths) for first in starts])


def sampled_window(
    every: int, depths: int, batch: int, tokens: int, capacity: int, config: ModelConfig
) -> Windows:
    """Return the windows of sampled drafts: all their tokens in one pass, at depths 1, 2, ….

    One pass serves all depths, because attention within a draft is causal.

    Args:
        every: As for `sampled_positions`, which lists the tokens of the pass.
        depths: As for `sampled_positions`.
        batch: Number of texts.
        tokens: Tokens of each text, whose exact KV are in the cache's first entries.
        capacity: Entries of the cache; the drafts' KV go behind the texts'.
        config: The model's.
    """
    positions = sampled_positions(every, depths, tokens)
    # every=3, depths=2, tokens=6: positions 0 1 3 4, of chains 0 0 1 1, at depths 0 1 0 1.
    chain, depth = np.divmod(np.arange(len(positions)), depths)
    # A row reads the exact text before its chain, and its own chain up to itself:
    #       the text      the drafts
    #   0   0 0 0 0 0 0   1 0 0 0
    #   1   0 0 0 0 0 0   1 1 0 0
    #   3   1 1 1 0 0 0   0 0 1 0
    #   4   1 1 1 0 0 0   0 0 1 1
    before = np.arange(tokens) < (positions - depth)[:, None]
    within = (chain == chain[:, None]) & (depth <= depth[:, None])
    mask = np.zeros((len(positions), capacity), bool)
    mask[:, :tokens] = before
    mask[:, tokens : tokens + len(positions)] = within
    start: Int[Array, " batch"] = jnp.full((batch,), tokens, jnp.int32)
    mask = jnp.asarray(np.broadcast_to(mask, (batch, *mask.shape)))
    entries = np.zeros(capacity, np.int32)
    entries[:tokens] = np.arange(tokens)
    entries[tokens : tokens + len(positions)] = positions
    of_rows = jnp.asarray(np.broadcast_to(positions.astype(np.int32), (batch, len(positions))))
    return make_windows(start, mask, of_rows, entries[None, None, :], config)


def _mask(depth: int, tokens: int, capacity: int) -> Bool[np.ndarray, "tokens capacity"]:
    """Mark the entries that each token reads when it is drafted at a depth."""
    # depth=2, tokens=4, capacity=12:
    #       exact     depth 1   depth 2
    #   0   0 0 0 0   0 0 0 0   1 0 0 0
    #   1   0 0 0 0   1 0 0 0   0 1 0 0
    #   2   1 0 0 0   0 1 0 0   0 0 1 0
    #   3   1 1 0 0   0 0 1 0   0 0 0 1
    mask = np.zeros((tokens, capacity), bool)
    mask[:, :tokens] = np.tri(tokens, k=-depth)
    for earlier in range(1, depth + 1):
        # The token drafted at depth `earlier` lies this many positions before the one that reads.
        behind = depth - earlier
        position = np.arange(behind, tokens)
        mask[position, earlier * tokens + position - behind] = True
    return mask
