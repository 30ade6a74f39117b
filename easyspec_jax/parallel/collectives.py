"""The collectives of the model, each a no-op where nothing is split; to be called inside `shard_map`."""

from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Shaped

from easyspec_jax.parallel.mesh import Axes

T = TypeVar("T")


def all_reduce(x: Shaped[Array, "*shape"], axes: Axes) -> Shaped[Array, "*shape"]:
    """The sum of every shard's addend; one all-reduce."""
    return jax.lax.psum(x, axes) if shard_count(axes) > 1 else x


def shard_index(axes: Axes) -> Int[Array, ""]:
    """This device's position along axes, the last axis counting fastest."""
    return jax.lax.axis_index(axes) if axes else jnp.zeros((), jnp.int32)


def shard_count(axes: Axes) -> int:
    """Number of shards along axes."""
    return jax.lax.axis_size(axes) if axes else 1


def from_first_device(tree: T, axes: Axes) -> T:
    """The first device's arrays, float32, int32 or bool, on every device; one all-reduce for all of them."""
    if shard_count(axes) == 1:
        return tree
    leaves, structure = jax.tree.flatten(tree)
    words = jnp.concatenate([_words(leaf).reshape(-1) for leaf in leaves])
    words = all_reduce(jnp.where(shard_index(axes) == 0, words, jnp.zeros_like(words)), axes)
    parts = jnp.split(words, np.cumsum([leaf.size for leaf in leaves])[:-1])
    arrays = (
        _from_words(part.reshape(leaf.shape), leaf.dtype)
        for part, leaf in zip(parts, leaves, strict=True)
    )
    return jax.tree.unflatten(structure, arrays)


def _words(x: Array) -> Int[Array, "*shape"]:
    """Each entry as an integer that holds its bits."""
    return (
        jax.lax.bitcast_convert_type(x, jnp.int32)
        if x.dtype == jnp.float32
        else x.astype(jnp.int32)
    )


def _from_words(words: Int[Array, "*shape"], dtype: jnp.dtype) -> Array:
    """The inverse of _words()."""
    return (
        jax.lax.bitcast_convert_type(words, jnp.float32)
        if dtype == jnp.float32
        else words.astype(dtype)
    )
