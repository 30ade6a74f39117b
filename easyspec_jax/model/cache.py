"""Key-value caches whose rows each have a length of their own.

Lengths are kept elsewhere (`decode.round.State`), so rolling back is a change of an integer.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class KVCache(NamedTuple):
    """Keys and values of one device's share of a layer, or of a stack of layers.

    Arrays are [batch * kv_heads, capacity, head_dim], a row's heads next to each other; layers of
    one group are stacked in front. Batch and heads are one axis because attention's products would
    merge them anyway, and in a step of one token XLA then copied the whole cache.

    Entries at and behind a row's length are scratch: drafts, padding and rejected tokens are
    written there.

        entry              0    1    2    3        4        5
        row of length 3    k0   k1   k2   scratch  scratch  scratch

    Attributes:
        k: Keys, rotated.
        v: Values.
    """

    k: Float[Array, "*slots batch_heads capacity head_dim"]
    v: Float[Array, "*slots batch_heads capacity head_dim"]

    @property
    def capacity(self) -> int:
        """Number of entries of each row."""
        return self.k.shape[-2]


def write(
    cache: KVCache,
    k: Float[Array, "*slots batch kv_heads tokens head_dim"],
    v: Float[Array, "*slots batch kv_heads tokens head_dim"],
    start: Int[Array, " batch"],
    slot: int | None = None,
    mask: Bool[Array, ""] | None = None,
) -> KVCache:
    """Replace row b's entries [start[b], start[b] + tokens).

    Args:
        cache: The cache.
        k: New keys; of every layer if the cache is a stack and no slot is given.
        v: New values, likewise.
        start: First entry to replace in each row. start + tokens must not exceed the capacity: XLA
            would shift the write back, onto committed entries.
        slot: The only layer of a stack to replace them in.
        mask: A scalar; where false, the cache stays as it is.

    Returns:
        The new cache.

    Examples:
        >>> empty = jnp.zeros((2, 4, 1))  # two rows, one head, four entries, head_dim 1
        >>> new = jnp.array([1.0, 2.0]).reshape(2, 1, 1, 1)  # one token per row
        >>> cache = write(KVCache(empty, empty), new, new, start=jnp.array([0, 3]))
        >>> cache.k[:, :, 0].tolist()
        [[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 2.0]]
    """
    zero = jnp.zeros((), start.dtype)

    def put(
        row: Float[Array, "*slots kv_heads capacity head_dim"],
        new: Float[Array, "*slots kv_heads tokens head_dim"],
        at: Int[Array, ""],
    ) -> Array:
        first = (zero + (slot or 0),) * (row.ndim - 3)
        corner = (*first, zero, at, zero)  # (slot, head, entry, channel)
        new = new.reshape((1,) * (row.ndim - new.ndim) + new.shape)
        if mask is not None:
            # Select among the few entries to write, not between two whole caches.
            new = jnp.where(mask, new, jax.lax.dynamic_slice(row, corner, new.shape))
        return jax.lax.dynamic_update_slice(row, new, corner)

    # Rows come first: [*slots, batch, kv_heads, ...] -> [batch, *slots, kv_heads, ...].
    k, v = jnp.moveaxis(k, -4, 0), jnp.moveaxis(v, -4, 0)
    return KVCache(_by_row(put, cache.k, k, start), _by_row(put, cache.v, v, start))


def move(
    cache: KVCache, source: Int[Array, "batch entries"], start: Int[Array, " batch"]
) -> KVCache:
    """Copy row b's entries source[b] to start[b] and on, in every layer of a stack.

    All entries are read before any is written, so source and destination may overlap.

    Args:
        cache: The cache.
        source: Entries to copy, in order.
        start: First entry to write in each row.

    Returns:
        The new cache.

    Examples:
        A text of 2 tokens, and a tree of 5 nodes behind it, of which nodes 0, 1 and 4 are accepted:

        >>> entries = jnp.array([10.0, 11.0, 0.0, 1.0, 2.0, 3.0, 4.0])[None, :, None]
        >>> cache = move(KVCache(entries, entries), jnp.array([[2, 3, 6]]), jnp.array([2]))
        >>> cache.k[0, :, 0].tolist()
        [10.0, 11.0, 0.0, 1.0, 4.0, 3.0, 4.0]
    """

    def put(
        row: Float[Array, "*slots kv_heads capacity head_dim"],
        entries: Int[Array, " entries"],
        at: Int[Array, ""],
    ) -> Array:
        # A gather of whole entries, [kv_heads, entries, head_dim], then one contiguous write.
        return jax.lax.dynamic_update_slice_in_dim(row, row[..., entries, :], at, axis=-2)

    return KVCache(_by_row(put, cache.k, source, start), _by_row(put, cache.v, source, start))


def take_row(cache: KVCache, row: Int[Array, ""], batch: int) -> KVCache:
    """Take one row out, as the cache of a batch of one.

    Args:
        cache: The cache.
        row: The row.
        batch: Rows of the cache.
    """
    return jax.tree.map(
        lambda x: jax.lax.dynamic_slice_in_dim(x, *_heads(x, row, batch), axis=-3), cache
    )


def put_row(cache: KVCache, own: KVCache, row: Int[Array, ""], batch: int) -> KVCache:
    """Put a row back that take_row() took out.

    Args:
        cache: The cache.
        own: The row's new entries.
        row: The row.
        batch: Rows of the cache.
    """

    def put(x: Array, new: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(x, new, _heads(x, row, batch)[0], axis=-3)

    return jax.tree.map(put, cache, own)


def extend(cache: KVCache, capacity: int) -> KVCache:
    """Grow a cache to a larger capacity, with zeros behind its entries.

    Examples:
        >>> extend(KVCache(jnp.zeros((2, 4, 8)), jnp.zeros((2, 4, 8))), capacity=16).k.shape
        (2, 16, 8)
    """
    return jax.tree.map(
        lambda x: jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, capacity - x.shape[-2]), (0, 0)]), cache
    )


def _heads(
    x: Float[Array, "*slots batch_heads capacity head_dim"], row: Int[Array, ""], batch: int
) -> tuple[Any, int]:
    """Locate a row's heads on the axis of all rows' heads: the first, and how many."""
    # Two rows of three heads: [row 0: 0 1 2 | row 1: 3 4 5]. Row 1 starts at 3 and has 3.
    heads = x.shape[-3] // batch
    return row * heads, heads


def _by_row(
    put: Callable[..., Array],
    x: Float[Array, "*slots batch_heads capacity head_dim"],
    *of_rows: Array,
) -> Float[Array, "*slots batch_heads capacity head_dim"]:
    """Call put(row, ...) for every row of a cache, with the row's part of each other argument."""
    batch, axis = len(of_rows[0]), x.ndim - 3
    if batch == 1:
        # An update in one place. Under vmap it would be a scatter, around which XLA makes copies.
        return put(x, *(y[0] for y in of_rows))
    # [*slots, batch * kv_heads, ...] -> [*slots, batch, kv_heads, ...], and vmap over batch.
    rows = x.reshape(*x.shape[:axis], batch, -1, *x.shape[-2:])
    in_axes = (axis, *(0,) * len(of_rows))
    written = jax.vmap(put, in_axes=in_axes, out_axes=axis)(rows, *of_rows)
    return written.reshape(x.shape)
