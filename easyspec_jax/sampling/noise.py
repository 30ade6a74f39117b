"""Noise that depends on the request and the position in its text, never on the mesh or the batch."""

from enum import IntEnum

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from easyspec_jax.model.sharding import VOCAB_BLOCK

Keys = Array
"""Typed JAX random keys."""


class Purpose(IntEnum):
    """What a draw is for; draws for different purposes are independent."""

    DRAFT = 0
    ACCEPT = 1
    RESIDUAL = 2
    TOKEN = 3


def noise_keys(
    seeds: UInt32[Array, " batch"],
    positions: Int[Array, "batch tokens"],
    rounds: Int[Array, " batch"],
    purpose: Purpose,
) -> Keys:
    """A key per request seed, absolute token position, round of that request and purpose: [batch, tokens]."""

    def one(seed: Array, position: Array, number: Array) -> Keys:
        key = jax.random.key(seed)
        for data in (position, number, jnp.asarray(int(purpose))):
            key = jax.random.fold_in(key, data)
        return key

    per_token = jax.vmap(one, in_axes=(None, 0, None))
    return jax.vmap(per_token)(seeds, positions, rounds)


def gumbel(keys: Keys, first_id: Int[Array, ""] | int, size: int) -> Float[Array, "rows ids"]:
    """Gumbel noise for ids [first_id, first_id + size), both multiples of VOCAB_BLOCK, and a vector of keys.

    Drawn block by block, so a shard of the vocabulary draws just its own part of the row. mode="high" because the
    default truncates the tail.
    """
    blocks = first_id // VOCAB_BLOCK + jnp.arange(size // VOCAB_BLOCK)

    def block(key: Keys, number: Array) -> Array:
        return jax.random.gumbel(jax.random.fold_in(key, number), (VOCAB_BLOCK,), jnp.float32, mode="high")

    drawn = jax.vmap(jax.vmap(block, in_axes=(None, 0)), in_axes=(0, None))(keys, blocks)
    return drawn.reshape(drawn.shape[0], -1)


def uniform(keys: Keys) -> Float[Array, " rows"]:
    """One number in [0, 1) per key of a vector."""
    return jax.vmap(lambda key: jax.random.uniform(key, (), jnp.float32))(keys)
