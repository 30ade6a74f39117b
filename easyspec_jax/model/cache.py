"""Key-value caches with a length of their own per row: rolling back is an integer change elsewhere."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class KVCache(NamedTuple):
    """Keys and values of one device's share of a layer: [batch * kv_heads, capacity, head_dim], a row's heads together.

    Batch and heads are one axis because the products of attention would make them one, and where a step has but one
    token, XLA then copied the whole cache. Layers of one group are stacked in front. Entries at and behind a row's
    length are scratch: drafts, padding and rejected tokens are written there.
    """

    k: Float[Array, "*slots batch_heads capacity head_dim"]
    v: Float[Array, "*slots batch_heads capacity head_dim"]

    @property
    def capacity(self) -> int:
        return self.k.shape[-2]


def write(
    cache: KVCache,
    k: Float[Array, "batch kv_heads tokens head_dim"],
    v: Float[Array, "batch kv_heads tokens head_dim"],
    start: Int[Array, " batch"],
    slot: int | None = None,
    where: Bool[Array, ""] | None = None,
) -> KVCache:
    """The cache with row b's entries [start[b], start[b] + tokens) replaced, or left alone where `where` is false.

    slot: the layer to replace them in, if the cache is a stack of several. The caller keeps start + tokens within the
    capacity: XLA would clamp the window onto committed entries.
    """
    zero = jnp.zeros((), start.dtype)
    layer = () if slot is None else (zero + slot,)

    def put(
        row: Float[Array, "*slots kv_heads capacity head_dim"],
        new: Float[Array, "kv_heads tokens head_dim"],
        at: Int[Array, ""],
    ) -> Array:
        here = (*layer, zero, at, zero)
        new = new.reshape((1,) * len(layer) + new.shape)
        if where is not None:
            new = jnp.where(where, new, jax.lax.dynamic_slice(row, here, new.shape))
        return jax.lax.dynamic_update_slice(row, new, here)

    return KVCache(_by_row(put, cache.k, k, start), _by_row(put, cache.v, v, start))


def move(
    cache: KVCache, source: Int[Array, "batch entries"], start: Int[Array, " batch"]
) -> KVCache:
    """The cache with row b's entries source[b] copied to start[b] and on, in every layer of a stack."""

    def put(
        row: Float[Array, "*slots kv_heads capacity head_dim"],
        entries: Int[Array, " entries"],
        at: Int[Array, ""],
    ) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(row, row[..., entries, :], at, axis=-2)

    return KVCache(_by_row(put, cache.k, source, start), _by_row(put, cache.v, source, start))


def take_row(cache: KVCache, row: Int[Array, ""], batch: int) -> KVCache:
    """One row, as a cache of a batch of one."""
    return jax.tree.map(
        lambda x: jax.lax.dynamic_slice_in_dim(x, *_heads(x, row, batch), axis=-3), cache
    )


def put_row(cache: KVCache, own: KVCache, row: Int[Array, ""], batch: int) -> KVCache:
    """The inverse of take_row: the cache with the row replaced."""

    def put(x: Array, new: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(x, new, _heads(x, row, batch)[0], axis=-3)

    return jax.tree.map(put, cache, own)


def extend(cache: KVCache, capacity: int) -> KVCache:
    """The cache with zeros behind its entries, up to a greater capacity."""
    return jax.tree.map(
        lambda x: jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, capacity - x.shape[-2]), (0, 0)]), cache
    )


def _heads(
    x: Float[Array, "*slots batch_heads capacity head_dim"], row: Int[Array, ""], batch: int
) -> tuple[Any, int]:
    """The first of a row's heads among all rows', and how many there are."""
    heads = x.shape[-3] // batch
    return row * heads, heads


def _by_row(
    put: Callable[..., Array],
    x: Float[Array, "*slots batch_heads capacity head_dim"],
    *of_rows: Array,
) -> Float[Array, "*slots batch_heads capacity head_dim"]:
    """put(row, …) of every row of a cache, with the row's part of each other argument."""
    batch, axis = len(of_rows[0]), x.ndim - 3
    if (
        batch == 1
    ):  # an update at one place; under vmap it would be a scatter, around which XLA makes copies
        return put(x, *(y[0] for y in of_rows))
    rows = x.reshape(*x.shape[:axis], batch, -1, *x.shape[-2:])
    return jax.vmap(put, in_axes=(axis, *(0,) * len(of_rows)), out_axes=axis)(
        rows, *of_rows
    ).reshape(x.shape)
