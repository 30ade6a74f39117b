"""Random numbers keyed by request, position, round and purpose.

Neither the mesh nor the row of the batch enters a key. A request therefore draws the same numbers
alone or in a batch, on one device or on eight.
"""

from enum import IntEnum
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

Keys = Array
"""Typed JAX random keys, as `jax.random.key` makes them."""


class Purpose(IntEnum):
    """Purpose of a draw; draws for different purposes are independent.

    Attributes:
        DRAFT: Gumbel noise by which a draft samples its tokens (rejection sampling).
        ACCEPT: Uniform numbers that decide whether a drafted token is accepted.
        RESIDUAL: Gumbel noise for the token after the accepted path (rejection sampling).
        TOKEN: Gumbel noise that draft and target share (coupled sampling).
    """

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
    """Make one key per token from request seed, absolute position, round and purpose.

    Args:
        seeds: Each request's seed.
        positions: Absolute positions of tokens in each request's text.
        rounds: Rounds that each request has had. A position can be drafted again in a later round,
            and must then see new noise.
        purpose: Purpose of the draw.

    Returns:
        Keys [batch, tokens].

    Examples:
        >>> seeds, rounds = jnp.array([7, 8], jnp.uint32), jnp.array([0, 0])
        >>> keys = noise_keys(seeds, jnp.array([[4, 5], [4, 5]]), rounds, Purpose.DRAFT)
        >>> keys.shape
        (2, 2)
        >>> alone = noise_keys(seeds[1:], jnp.array([[5]]), rounds[1:], Purpose.DRAFT)
        >>> bool(alone[0, 0] == keys[1, 1])  # neither the batch nor the neighbours matter
        True
    """

    def one(seed: Array, position: Array, number: Array) -> Keys:
        key = jax.random.key(seed)
        for data in (position, number, jnp.asarray(int(purpose))):
            key = jax.random.fold_in(key, data)
        return key

    # Inner vmap: the tokens of one request. Outer vmap: requests. [batch], [batch, tokens], [batch]
    # -> [batch, tokens].
    per_token = jax.vmap(one, in_axes=(None, 0, None))
    return jax.vmap(per_token)(seeds, positions, rounds)


def numbered(keys: Keys, count: int) -> Keys:
    """Derive `count` independent keys from each key: [*rows] -> [*rows, count].

    The i-th depends on its parent and on i alone, so asking for fewer gives the first of the same.

    Examples:
        >>> parent = jax.random.key(0)
        >>> bool((numbered(parent, 5)[:3] == numbered(parent, 3)).all())
        True
    """
    return jnp.vectorize(
        lambda key: jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(count, dtype=jnp.int32)),
        signature="()->(n)",
    )(keys)


def gumbel(keys: Keys, ids: Int[Array, "*rows ids"]) -> Float[Array, "*rows ids"]:
    """Draw Gumbel(0, 1) noise for token ids; an id's noise does not depend on the other ids.

    A draft that looks at its likeliest ids, a device that holds one vocabulary shard, and a program
    that has the whole row all find the same noise for an id.

    Args:
        keys: One key per row, [*rows].
        ids: Token ids of each row.

    Returns:
        float32 noise in the shape of ids.

    Examples:
        >>> key = jax.random.key(0)
        >>> vocabulary = gumbel(key, jnp.arange(100))
        >>> few = gumbel(key, jnp.array([42, 7]))
        >>> bool((few == vocabulary[jnp.array([42, 7])]).all())
        True
    """
    folded = jnp.vectorize(
        lambda key, row: jax.vmap(partial(jax.random.fold_in, key))(row), signature="(),(i)->(i)"
    )
    # Folding an id into a key hashes it to two 32-bit words: [*rows, ids] -> [*rows, ids, 2].
    words = jax.random.key_data(folded(keys, ids)).astype(jnp.float32)
    # Both words make one uniform u. Large noise comes from a small u: with the first word alone
    # nothing would lie between 0 and 2**-32, and no noise above 22.2 (= 32 log 2) would be finite.
    u = words[..., 0] * np.float32(2.0**-32) + words[..., 1] * np.float32(2.0**-64)
    # -log(1 - u) is exponential, and minus its logarithm is Gumbel. u may round up to 1, where the
    # logarithm would be infinite; 1 - 2**-24 is the greatest float32 below.
    return -jnp.log(-jnp.log1p(-jnp.minimum(u, np.float32(1 - 2.0**-24))))


def uniform(keys: Keys) -> Float[Array, "*rows"]:
    """Draw one float32 number in [0, 1) per key.

    Examples:
        >>> numbers = uniform(numbered(jax.random.key(0), 4))
        >>> numbers.shape, bool(((numbers >= 0) & (numbers < 1)).all())
        ((4,), True)
    """
    return jnp.vectorize(lambda key: jax.random.uniform(key, (), jnp.float32))(keys)
