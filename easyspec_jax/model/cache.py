"""Key-value caches with a length of their own per row: rolling back is an integer change elsewhere."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class KVCache(NamedTuple):
    """Keys and values of one layer: [batch, kv_heads, capacity, head_dim].

    Entries at and behind a row's length are scratch: drafts, padding and rejected tokens are written there.
    """

    k: Float[Array, "batch kv_heads capacity head_dim"]
    v: Float[Array, "batch kv_heads capacity head_dim"]

    @property
    def capacity(self) -> int:
        return self.k.shape[-2]


def write(
    cache: KVCache,
    k: Float[Array, "batch kv_heads tokens head_dim"],
    v: Float[Array, "batch kv_heads tokens head_dim"],
    start: Int[Array, " batch"],
    where: Bool[Array, ""] | None = None,
) -> KVCache:
    """The cache with row b's entries [start[b], start[b] + tokens) replaced, or left alone where `where` is false.

    The caller keeps start + tokens within the capacity: XLA would clamp the window onto committed entries.
    """

    def put(
        row: Float[Array, "kv_heads capacity head_dim"],
        new: Float[Array, "kv_heads tokens head_dim"],
        at: Int[Array, ""],
    ) -> Array:
        if where is not None:
            new = jnp.where(where, new, jax.lax.dynamic_slice_in_dim(row, at, new.shape[1], axis=1))
        return jax.lax.dynamic_update_slice_in_dim(row, new, at, axis=1)

    return KVCache(jax.vmap(put)(cache.k, k, start), jax.vmap(put)(cache.v, v, start))


def move(cache: KVCache, source: Int[Array, "batch entries"], start: Int[Array, " batch"]) -> KVCache:
    """The cache with row b's entries source[b] copied to start[b] and on; leading axes may come before the batch's."""

    def put(
        row: Float[Array, "kv_heads capacity head_dim"], entries: Int[Array, " entries"], at: Int[Array, ""]
    ) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(row, row[:, entries], at, axis=1)

    rows = jax.vmap(put)
    for _ in range(cache.k.ndim - 4):
        rows = jax.vmap(rows, in_axes=(0, None, None))
    return KVCache(rows(cache.k, source, start), rows(cache.v, source, start))
