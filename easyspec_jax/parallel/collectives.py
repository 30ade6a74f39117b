"""The collectives of the model, for use inside `spmd`. Each is a no-op if nothing is split."""

from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Shaped

from easyspec_jax.parallel.mesh import Axes

T = TypeVar("T")


def all_reduce(x: Shaped[Array, "*shape"], axes: Axes) -> Shaped[Array, "*shape"]:
    """Return the sum over all shards along axes, by one all-reduce."""
    return jax.lax.psum(x, axes) if shard_count(axes) > 1 else x


def shard_index(axes: Axes) -> Int[Array, ""]:
    """Return this device's position along axes; the last axis counts fastest."""
    return jax.lax.axis_index(axes) if axes else jnp.zeros((), jnp.int32)


def shard_count(axes: Axes) -> int:
    """Return the number of shards along axes."""
    return jax.lax.axis_size(axes) if axes else 1


def from_first_device(tree: T, axes: Axes) -> T:
    """Return the first device's arrays on every device.

    Devices may round alike results differently, for example the sums of an all-reduce. Decisions
    that all must share, such as which tokens are accepted, are therefore taken from one device.

    Args:
        tree: A pytree of float32, int32 or bool arrays.
        axes: Mesh axes of the devices.
    """
    if shard_count(axes) == 1:
        return tree
    leaves, structure = jax.tree.flatten(tree)
    # One all-reduce for everything: all arrays as integers, end to end, and zeros on every device
    # but the first. A sum of one number and zeros is exact, for NaN and -0.0 as well.
    words = jnp.concatenate([_words(leaf).reshape(-1) for leaf in leaves])
    words = all_reduce(jnp.where(shard_index(axes) == 0, words, jnp.zeros_like(words)), axes)
    # Back from one row of words to the arrays, by their sizes.
    parts = jnp.split(words, np.cumsum([leaf.size for leaf in leaves])[:-1])
    arrays = []
    for part, leaf in zip(parts, leaves, strict=True):
        arrays.append(_from_words(part.reshape(leaf.shape), leaf.dtype))
    return jax.tree.unflatten(structure, arrays)


def _words(x: Array) -> Int[Array, "*shape"]:
    """Return each entry as an int32 that holds its bits."""
    if x.dtype == jnp.float32:
        return jax.lax.bitcast_convert_type(x, jnp.int32)
    return x.astype(jnp.int32)


def _from_words(words: Int[Array, "*shape"], dtype: jnp.dtype) -> Array:
    """Invert _words()."""
    if dtype == jnp.float32:
        return jax.lax.bitcast_convert_type(words, jnp.float32)
    return words.astype(dtype)
