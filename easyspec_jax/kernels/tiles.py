"""Operations on the tiles of a kernel. Triton wants sizes that are powers of two."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from easyspec_jax.arithmetic import packed_width, power_of_two

try:
    from jax.experimental.pallas import triton
except ImportError:  # JAX 0.11 has deprecated this backend and will remove it
    triton: Any = None

SMALLEST_DOT = 16
"""Rows and columns that a tensor core multiplies at least; fewer are padded."""


def supports_heads(head_dim: int, dtype: DTypeLike) -> bool:
    """Return whether kernels of this JAX take heads of a size and dtype.

    Examples:
        >>> supports_heads(128, jnp.float32), supports_heads(80, jnp.float32)
        (True, False)
    """
    # Half a head, which rotation needs as a tile of its own, must be at least SMALLEST_DOT.
    is_power_of_two = head_dim & (head_dim - 1) == 0
    known = jnp.dtype(dtype) in (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16))
    return triton is not None and is_power_of_two and 32 <= head_dim <= 256 and known


def estimate(flops: int, *arrays: Any) -> pl.CostEstimate:
    """Return the cost of a kernel, which easyspec_jax.plan counts.

    Args:
        flops: Operations of its products.
        arrays: What it reads or writes whole: arrays, or anything with a size and a dtype.
    """
    moved = sum(x.size * packed_width(x.dtype) for x in arrays)
    return pl.CostEstimate(flops=flops, transcendentals=0, bytes_accessed=round(moved))


def row_tile(rows: int, most: int) -> int:
    """Return how many rows a program takes: all if they are few, padded for a tensor core.

    Args:
        rows: Rows in all.
        most: Rows of a program at most.

    Examples:
        >>> [row_tile(rows, most=64) for rows in (1, 20, 500)]
        [16, 32, 64]
    """
    return min(power_of_two(max(rows, SMALLEST_DOT)), most)


def span(index: Int[Array, ""] | int, size: int) -> Int[Array, " size"]:
    """Return the positions of tile number `index` of an axis that is cut into tiles."""
    return index * size + jnp.arange(size, dtype=jnp.int32)


def times_transposed(
    a: Float[Array, "rows inner"], b: Float[Array, "columns inner"]
) -> Float[Array, "rows columns"]:
    """Return a @ b.T in float32, without rounding float32 factors to TF32."""
    return _dot(a, b, 1)


def times(
    a: Float[Array, "rows inner"], b: Float[Array, "inner columns"]
) -> Float[Array, "rows columns"]:
    """Return a @ b in float32, without rounding float32 factors to TF32."""
    return _dot(a, b, 0)


def _dot(a: Array, b: Array, contracted: int) -> Array:
    return jax.lax.dot_general(
        a,
        b,
        (((1,), (contracted,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
