"""Key-value caches whose rows each have a length of their own.

Lengths are kept elsewhere (`decode.state.State`), so rolling back is a change of an integer.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Num


class KVCache(NamedTuple):
    """Keys and values of one device's share of a layer, or of a stack of layers.

    Arrays are [batch * kv_heads, capacity, head_dim], a row's heads next to each other; layers of
    one group are stacked in front. Batch and heads are one axis because attention's products would
    merge them anyway, and in a step of one token XLA then copied the whole cache.

    Entries at and behind a row's length are scratch: drafts, padding and rejected tokens are
    written there.

        entry              0    1    2    3        4        5
        row of length 3    k0   k1   k2   scratch  scratch  scratch

    A cache may be quantized: then its keys and values are int8, and each entry of each head has a
    scale of its own. Scales keep a last axis of one channel, so that everything which writes, moves
    or takes out entries treats all fields alike. An entry's integers depend on that entry alone:
    neither its neighbors nor the pass that wrote it matter.

    Attributes:
        k: Keys, rotated; floats or int8.
        v: Values, likewise.
        k_scale: Scales of a quantized cache's keys, else None.
        v_scale: Likewise of the values.
    """

    k: Num[Array, "*slots batch_heads capacity head_dim"]
    v: Num[Array, "*slots batch_heads capacity head_dim"]
    k_scale: Float[Array, "*slots batch_heads capacity 1"] | None = None
    v_scale: Float[Array, "*slots batch_heads capacity 1"] | None = None

    @property
    def capacity(self) -> int:
        """Number of entries of each row."""
        return self.k.shape[-2]

    @property
    def is_quantized(self) -> bool:
        """Whether keys and values are integers with scales."""
        return self.k_scale is not None


def empty(batch_heads: int, capacity: int, head_dim: int, dtype: DTypeLike) -> KVCache:
    """Make an empty cache of one layer; one of int8 is quantized.

    Examples:
        >>> cache = empty(2, capacity=4, head_dim=8, dtype=jnp.int8)
        >>> cache.k.shape, cache.k_scale.shape
        ((2, 4, 8), (2, 4, 1))
    """
    entries = jnp.zeros((batch_heads, capacity, head_dim), dtype)
    if entries.dtype != jnp.int8:
        return KVCache(entries, entries)
    scale = jnp.zeros((batch_heads, capacity, 1), jnp.float32)
    return KVCache(entries, entries, scale, scale)


def quantize(
    x: Float[Array, "*entries head_dim"],
) -> tuple[Int[Array, "*entries head_dim"], Float[Array, "*entries 1"]]:
    """Round entries to int8, symmetrically, so that the largest number of each becomes 127 or -127.

    Args:
        x: Keys or values.

    Returns:
        Integers, and float32 scales; their product is x, to half a scale.

    Examples:
        >>> values, scale = quantize(jnp.array([0.5, -1.0, 0.0]))
        >>> values.tolist(), round(float(scale[0]), 5)
        ([64, -127, 0], 0.00787)
    """
    x = x.astype(jnp.float32)
    most = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    # Heads that only pad a share are zero; they stay zero instead of becoming 0 / 0.
    share = x / jnp.where(most > 0, most, np.float32(1))
    return jnp.round(share * np.float32(127)).astype(jnp.int8), most * np.float32(1 / 127)


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
        cache: The cache. If it is quantized, so are the new entries.
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
        row: Num[Array, "*slots kv_heads capacity channels"],
        new: Num[Array, "*slots kv_heads tokens channels"],
        at: Int[Array, ""],
    ) -> Array:
        first = (zero + (slot or 0),) * (row.ndim - 3)
        corner = (*first, zero, at, zero)  # (slot, head, entry, channel)
        new = new.reshape((1,) * (row.ndim - new.ndim) + new.shape)
        if mask is not None:
            # Select among the few entries to write, not between two whole caches.
            new = jnp.where(mask, new, jax.lax.dynamic_slice(row, corner, new.shape))
        return jax.lax.dynamic_update_slice(row, new, corner)

    def put_all(x: Array, new: Array) -> Array:
        # Rows come first: [*slots, batch, kv_heads, ...] -> [batch, *slots, kv_heads, ...].
        return _by_row(put, x, jnp.moveaxis(new, -4, 0), start)

    new = KVCache(k, v)
    if cache.is_quantized:
        (k, k_scale), (v, v_scale) = quantize(k), quantize(v)
        new = KVCache(k, v, k_scale, v_scale)
    return jax.tree.map(put_all, cache, new)


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
        row: Num[Array, "*slots kv_heads capacity channels"],
        entries: Int[Array, " entries"],
        at: Int[Array, ""],
    ) -> Array:
        # A gather of whole entries, [kv_heads, entries, channels], then one contiguous write.
        return jax.lax.dynamic_update_slice_in_dim(row, row[..., entries, :], at, axis=-2)

    return jax.tree.map(lambda x: _by_row(put, x, source, start), cache)


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


def first_entries(cache: KVCache, count: Int[Array, ""], capacity: int) -> KVCache:
    """Return a cache of some capacity with the first entries of another, and zeros behind them.

    Args:
        cache: The other cache.
        count: How many entries to take, at most what either cache has.
        capacity: Capacity of the result.

    Examples:
        >>> entries = jnp.array([1.0, 2.0, 3.0])[None, :, None]
        >>> cache = first_entries(KVCache(entries, entries), jnp.array(2), capacity=4)
        >>> cache.k[0, :, 0].tolist()
        [1.0, 2.0, 0.0, 0.0]
    """

    def take(x: Num[Array, "*slots batch_heads entries channels"]) -> Array:
        x = x[..., :capacity, :]
        # Scratch goes: the mask gives it weight 0, but 0 times a NaN would be a NaN.
        entry = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 2)
        return jnp.where(entry < count, x, jnp.zeros_like(x))

    return extend(jax.tree.map(take, cache), capacity)


def _heads(
    x: Num[Array, "*slots batch_heads capacity channels"], row: Int[Array, ""], batch: int
) -> tuple[Any, int]:
    """Locate a row's heads on the axis of all rows' heads: the first, and how many."""
    # Two rows of three heads: [row 0: 0 1 2 | row 1: 3 4 5]. Row 1 starts at 3 and has 3.
    heads = x.shape[-3] // batch
    return row * heads, heads


def _by_row(
    put: Callable[..., Array],
    x: Num[Array, "*slots batch_heads capacity channels"],
    *of_rows: Array,
) -> Num[Array, "*slots batch_heads capacity channels"]:
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
