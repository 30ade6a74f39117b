"""Attention of one layer: rotary embeddings, grouped queries, a per-row cache."""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from easyspec_jax.checkpoint.config import ModelConfig
from easyspec_jax.checkpoint.rope import rope_frequencies
from easyspec_jax.model.cache import KVCache, write
from easyspec_jax.model.norm import rms_norm
from easyspec_jax.model.projection import Projection


@partial(
    jax.tree_util.register_dataclass, data_fields=["start", "mask", "cos", "sin"], meta_fields=[]
)
@dataclass(frozen=True)
class Window:
    """Positions of the tokens of one pass: row b's tokens take the cache entries from start[b] on.

    mask[b, t, s]: token t may read entry s. cos, sin: the rotation of each token, in float32.
    """

    start: Int[Array, " batch"]
    mask: Bool[Array, "batch tokens capacity"]
    cos: Float[Array, "batch tokens half"]
    sin: Float[Array, "batch tokens half"]


def chain_window(
    start: Int[Array, " batch"], tokens: int, capacity: int, config: ModelConfig
) -> Window:
    """The window of consecutive tokens, each reading everything up to itself."""
    positions = start[:, None] + jnp.arange(tokens, dtype=start.dtype)[None, :]
    mask = jnp.arange(capacity, dtype=start.dtype)[None, None, :] <= positions[:, :, None]
    return _window(start, mask, positions, config)


class Nodes(NamedTuple):
    """Positions of some nodes of token trees: they take the cache entries from start[b] on.

    Node i of row b's tree has the entry root[b] + i, behind everything that all nodes may read. depth: levels below
    the root; ancestors[b, t, i]: token t may read node i.
    """

    start: Int[Array, " batch"]
    root: Int[Array, " batch"]
    depth: Int[Array, "batch tokens"]
    ancestors: Bool[Array, "batch tokens nodes"]


def tree_window(nodes: Nodes, capacity: int, config: ModelConfig) -> Window:
    """The window of nodes, each reading the text and its own path."""
    start, root, depth, ancestors = nodes
    before = jnp.arange(capacity, dtype=root.dtype)[None, None, :] < root[:, None, None]
    before = jnp.broadcast_to(before, (*depth.shape, capacity))
    put = jax.vmap(partial(jax.lax.dynamic_update_slice_in_dim, axis=1))
    return _window(start, put(before, ancestors, root), root[:, None] + depth, config)


def _window(
    start: Int[Array, " batch"],
    mask: Bool[Array, "batch tokens capacity"],
    positions: Int[Array, "batch tokens"],
    config: ModelConfig,
) -> Window:
    frequencies = jnp.asarray(rope_frequencies(config))
    angles = positions[:, :, None].astype(jnp.float32) * frequencies[None, None, :]
    return Window(start, mask, jnp.cos(angles), jnp.sin(angles))


def rotate(
    x: Float[Array, "batch heads tokens head_dim"], window: Window
) -> Float[Array, "batch heads tokens head_dim"]:
    """Rotary position embedding in Hugging Face's layout: channel i pairs with channel i + head_dim / 2."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = window.cos[:, None], window.sin[:, None]
    return jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    ).astype(x.dtype)


class Attention(nnx.Module):
    """One device's share of a layer's attention, its pre-norm included.

    Columns of the projection are [queries | keys | values] of this share, with kv_heads keys and as many values for
    kv_heads * group queries. head_norms: what each query's and each key's norm is scaled by, in families that have one.
    Leaves may carry a leading slot axis to `vmap` over.
    """

    def __init__(
        self,
        qkv: Projection,
        out: Float[Array, "*slots queries_dim hidden"],
        head_norms: tuple[Float[Array, "*slots head_dim"], Float[Array, "*slots head_dim"]] | None,
        *,
        kv_heads: int,
        group: int,
    ) -> None:
        self.qkv, self.out = qkv, nnx.Param(out)
        self.query_norm, self.key_norm = (
            (None, None) if head_norms is None else map(nnx.Param, head_norms)
        )
        self.kv_heads, self.group = kv_heads, group

    def __call__(
        self,
        h: Float[Array, "batch tokens hidden"],
        cache: KVCache,
        window: Window,
        slot: int | None = None,
        where: Bool[Array, ""] | None = None,
        qkv: Projection | None = None,
    ) -> tuple[Float[Array, "batch tokens hidden"], KVCache]:
        """This share's addend of the attention output, and the cache with the window's entries written.

        slot: this layer's place if the cache is a stack of several. where: a scalar; where false, the cache stays as it
        is (the output is then meaningless). qkv: another projection than the layer's own.
        """
        q, k, v = self.heads((qkv or self.qkv)(h))
        cache = write(cache, rotate(k, window), v, window.start, slot, where)
        own = cache if slot is None else KVCache(cache.k[slot], cache.v[slot])
        return self._attend(rotate(q, window), own, window.mask), cache

    def init_cache(self, batch: int, capacity: int) -> KVCache:
        """This share's part of an empty cache."""
        weight = self.qkv.weight
        width = weight.shape[-1] // (self.kv_heads * (self.group + 2))
        empty = jnp.zeros((batch * self.kv_heads, capacity, width), weight.dtype)
        return KVCache(empty, empty)

    def heads(self, x: Float[Array, "batch tokens heads_dim"]) -> tuple[Array, Array, Array]:
        """Queries [batch, kv_heads * group, tokens, head_dim], keys and values [batch, kv_heads, tokens, head_dim]."""
        heads = self.kv_heads * (self.group + 2)
        x = x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)
        queries = self.kv_heads * self.group
        q, k, v = jnp.split(x, [queries, queries + self.kv_heads], axis=1)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = (
                rms_norm(q, self.query_norm[...], self.qkv.eps),
                rms_norm(k, self.key_norm[...], self.qkv.eps),
            )
        return q, k, v

    def _attend(
        self, q: Array, cache: KVCache, mask: Bool[Array, "batch tokens capacity"]
    ) -> Array:
        batch, _, tokens, head_dim = q.shape
        # A key head's queries are extra rows of one product, so keys are read once.
        q = q.reshape(batch * self.kv_heads, self.group * tokens, head_dim)
        scores = jnp.einsum("kqd,ksd->kqs", q, cache.k, preferred_element_type=jnp.float32)
        scores = scores.reshape(batch, self.kv_heads, self.group, tokens, -1) * np.float32(
            head_dim**-0.5
        )
        scores = jnp.where(mask[:, None, None], scores, np.float32(-np.inf))
        weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
        weights = weights.reshape(batch * self.kv_heads, self.group * tokens, -1)
        mixed = jnp.einsum("kqs,ksd->kqd", weights, cache.v)
        mixed = mixed.reshape(batch, self.kv_heads * self.group, tokens, head_dim).transpose(
            0, 2, 1, 3
        )
        return mixed.reshape(batch, tokens, -1) @ self.out[...]
