"""Operations on the tiles of a kernel. Triton wants sizes that are powers of two."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

SMALLEST_DOT = 16
"""Rows and columns that a tensor core multiplies at least; fewer are padded."""


def is_power_of_two(n: int) -> bool:
    """Return whether n is 1, 2, 4, …"""
    return n > 0 and n & (n - 1) == 0


def power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least n.

    Examples:
        >>> [power_of_two(n) for n in (1, 5, 64)]
        [1, 8, 64]
    """
    return 1 << (n - 1).bit_length()


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
