"""Fuzzy passes over whole texts at once, each token as it would be drafted: everything before the draft is exact.

A cache of (depth + 1) * tokens entries holds the exact KV of a text in its first `tokens` entries and behind them, for
each draft depth, that of the text's tokens drafted at this depth. A token drafted at depth d reads the exact KV of all
but the d - 1 tokens before it, and those as drafted at the depths 1 to d - 1.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from easyspec_jax.checkpoint.config import ModelConfig
from easyspec_jax.model.attention import Window, chain_window


def exact_window(batch: int, tokens: int, capacity: int, config: ModelConfig) -> Window:
    """The window of whole texts, to be gone through before any at a depth."""
    return chain_window(jnp.zeros((batch,), jnp.int32), tokens, capacity, config)


def drafted_window(
    depth: int, batch: int, tokens: int, capacity: int, config: ModelConfig
) -> Window:
    """The window of whole texts, every token drafted at this depth; to be gone through in order of depth, from 1."""
    exact = exact_window(batch, tokens, capacity, config)
    mask = np.broadcast_to(_mask(depth, tokens, capacity), (batch, tokens, capacity))
    start: Int[Array, " batch"] = jnp.full((batch,), depth * tokens, jnp.int32)
    return Window(start, jnp.asarray(mask), exact.cos, exact.sin)


def sampled_positions(every: int, depths: int, tokens: int) -> Int[np.ndarray, " sampled"]:
    """Positions of a text at which drafts begin: every `every`-th one whose draft does not go past the end."""
    return np.concatenate(
        [np.arange(first, first + depths) for first in range(0, tokens - depths + 1, every)]
    )


def sampled_window(
    every: int, depths: int, batch: int, tokens: int, capacity: int, config: ModelConfig
) -> Window:
    """The window of sampled_positions(): chains of tokens, drafted at the depths from 1 on; their KV lies behind the
    texts'."""
    exact = exact_window(batch, tokens, capacity, config)
    positions = sampled_positions(every, depths, tokens)
    chain, depth = np.divmod(np.arange(len(positions)), depths)
    mask = np.zeros((len(positions), capacity), bool)
    mask[:, :tokens] = np.arange(tokens) < (positions - depth)[:, None]
    mask[:, tokens : tokens + len(positions)] = (chain == chain[:, None]) & (
        depth <= depth[:, None]
    )
    start: Int[Array, " batch"] = jnp.full((batch,), tokens, jnp.int32)
    mask = jnp.asarray(np.broadcast_to(mask, (batch, *mask.shape)))
    return Window(start, mask, exact.cos[:, positions], exact.sin[:, positions])


def _mask(depth: int, tokens: int, capacity: int) -> Bool[np.ndarray, "tokens capacity"]:
    mask = np.zeros((tokens, capacity), bool)
    mask[:, :tokens] = np.tri(tokens, k=-depth)
    for earlier in range(1, depth + 1):
        behind = depth - earlier
        position = np.arange(behind, tokens)
        mask[position, earlier * tokens + position - behind] = True
    return mask
