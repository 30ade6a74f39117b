"""Noise that depends on the request and the position in its text, never on the mesh or the batch."""

from enum import IntEnum
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

Keys = Array
"""Typed JAX random keys."""


class Purpose(IntEnum):
    """Purpose of a draw; draws for different purposes are independent."""

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


def numbered(keys: Keys, count: int) -> Keys:
    """`count` independent keys for each one: [*rows, count]."""
    return jnp.vectorize(
        lambda key: jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(count, dtype=jnp.int32)),
        signature="()->(n)",
    )(keys)


def gumbel(keys: Keys, ids: Int[Array, "*rows ids"]) -> Float[Array, "*rows ids"]:
    """Gumbel noise of each id under its row's key, whichever ids are asked for together; keys: [*rows].

    Folding an id into a key hashes it to 64 bits. They make one uniform number: 32 bits alone would truncate the tail.
    """
    folded = jnp.vectorize(
        lambda key, row: jax.vmap(partial(jax.random.fold_in, key))(row), signature="(),(i)->(i)"
    )
    words = jax.random.key_data(folded(keys, ids)).astype(jnp.float32)
    u = words[..., 0] * np.float32(2.0**-32) + words[..., 1] * np.float32(2.0**-64)
    return -jnp.log(-jnp.log1p(-jnp.minimum(u, np.float32(1 - 2.0**-24))))


def uniform(keys: Keys) -> Float[Array, "*rows"]:
    """One number in [0, 1) per key."""
    return jnp.vectorize(lambda key: jax.random.uniform(key, (), jnp.float32))(keys)
