"""The collectives of the model, each a no-op where nothing is split; to be called inside `shard_map`."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

from easyspec_jax.mesh import Axes


def all_reduce(x: Shaped[Array, "*shape"], axes: Axes) -> Shaped[Array, "*shape"]:
    """The sum of every shard's addend; one all-reduce."""
    return jax.lax.psum(x, axes) if axes else x


def shard_index(axes: Axes) -> Int[Array, ""]:
    """This device's position along axes, the last axis counting fastest."""
    return jax.lax.axis_index(axes) if axes else jnp.zeros((), jnp.int32)


def shard_count(axes: Axes) -> int:
    """Number of shards along axes."""
    return jax.lax.axis_size(axes) if axes else 1


def from_first_device(x: Shaped[Array, "*shape"], axes: Axes) -> Shaped[Array, "*shape"]:
    """The first device's value on every device; one all-reduce."""
    return all_reduce(jnp.where(shard_index(axes) == 0, x, jnp.zeros_like(x)), axes)
