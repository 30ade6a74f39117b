"""Ways to read and write memory, to be timed next to the passes of a model."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from easyspec_jax.decode.timing import Case
from easyspec_jax.parallel.mesh import ALL_AXES


def memory_cases(mesh: Mesh, dtype: np.dtype, size: int) -> list[Case]:
    """Return ways to go through an array of `size` bytes, split over all devices.

    The array is far larger than any cache. Which way is fastest depends on the backend: writing in
    place, summing, or multiplying one row by a matrix.
    """
    columns = 4096
    shape = (max(size // (columns * dtype.itemsize * mesh.size), 1) * mesh.size, columns)
    spread = NamedSharding(mesh, P(ALL_AXES))

    def fill() -> Array:
        row, column = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
        return ((row * 7919 + column * 104729) % 1021 - 510).astype(dtype)

    def summed(x: Array, last: Array) -> Array:
        return last * 0 + jnp.sum(x, axis=1, dtype=jnp.float32)

    def product(x: Array, last: Array) -> Array:
        row = jnp.full((1, columns), last[0] * 0 + 1).astype(dtype)
        return jnp.einsum("td,vd->tv", row, x, preferred_element_type=jnp.float32)[0]

    array = jax.jit(fill, out_shardings=spread)()
    last = jax.device_put(np.zeros(shape[0], np.float32), spread)
    copy = jax.jit(jnp.negative, donate_argnums=0, out_shardings=spread)
    own = jax.jit(fill, out_shardings=spread)()
    reads = [
        Case(
            f"read, {name}", partial(jax.jit(way, out_shardings=spread), array), last, array.nbytes
        )
        for name, way in (("sum", summed), ("product", product))
    ]
    return [Case("copy", copy, own, 2 * own.nbytes), *reads]
