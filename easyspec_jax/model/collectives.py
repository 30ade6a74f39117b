"""The collectives of the model, each a no-op where nothing is split; to be called inside `shard_map`."""

from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

from easyspec_jax.mesh import Axes

T = TypeVar("T")


def all_reduce(x: Shaped[Array, "*shape"], axes: Axes) -> Shaped[Array, "*shape"]:
    """The sum of every shard's addend; one all-reduce."""
    return jax.lax.psum(x, axes) if axes else x


def shard_index(axes: Axes) -> Int[Array, ""]:
    """This device's position along axes, the last axis counting fastest."""
    return jax.lax.axis_index(axes) if axes else jnp.zeros((), jnp.int32)


def shard_count(axes: Axes) -> int:
    """Number of shards along axes."""
    return jax.lax.axis_size(axes) if axes else 1


def from_first_device(tree: T, axes: Axes) -> T:
    """The first device's arrays on every device; one all-reduce for all of them."""
    if not axes:
        return tree
    first = shard_index(axes) == 0
    sums = jax.lax.psum(jax.tree.map(lambda x: jnp.where(first, x, jnp.zeros_like(x)), tree), axes)
    return jax.tree.map(lambda x, total: total.astype(x.dtype), tree, sums)  # sums of bool are integers
