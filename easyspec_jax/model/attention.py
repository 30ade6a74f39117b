"""Attention of one layer: rotary embeddings, grouped queries, and a mask over a per-row cache.

One pass may hold consecutive tokens of a text (chain_window) or nodes of a token tree
(tree_window). Both are just masks and positions: the attention itself does not know the difference.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from easyspec_jax.checkpoint.config import ModelConfig
from easyspec_jax.checkpoint.rope import rope_frequencies
from easyspec_jax.kernels import attention as split_attention
from easyspec_jax.kernels import projection as fused_projection
from easyspec_jax.kernels.tiles import supports_heads
from easyspec_jax.model.cache import KVCache, empty, write
from easyspec_jax.model.matrix import Matrix
from easyspec_jax.model.norm import rms_norm
from easyspec_jax.model.projection import Projection
from easyspec_jax.options import KVDType


@partial(
    jax.tree_util.register_dataclass, data_fields=["start", "mask", "cos", "sin"], meta_fields=[]
)
@dataclass(frozen=True)
class Window:
    """Positions of the tokens of one pass.

    Attributes:
        start: Row b's tokens take the cache entries from start[b] on.
        mask: `mask[b, t, s]` says that token t may read entry s.
        cos: Cosines of each token's rotation, float32.
        sin: Sines of each token's rotation, float32.
    """

    start: Int[Array, " batch"]
    mask: Bool[Array, "batch tokens capacity"]
    cos: Float[Array, "batch tokens half"]
    sin: Float[Array, "batch tokens half"]


def chain_window(
    start: Int[Array, " batch"], tokens: int, capacity: int, config: ModelConfig
) -> Window:
    """Make the window of consecutive tokens, each of which reads everything up to itself.

    Args:
        start: Position, and cache entry, of each row's first token.
        tokens: Tokens of each row.
        capacity: Entries of the cache.
        config: The model's configuration, for the rotation.
    """
    positions = start[:, None] + jnp.arange(tokens, dtype=start.dtype)[None, :]
    # Two tokens behind a text of three, capacity 6:
    #   token 0   1 1 1 1 0 0
    #   token 1   1 1 1 1 1 0
    mask = jnp.arange(capacity, dtype=start.dtype)[None, None, :] <= positions[:, :, None]
    return _window(start, mask, positions, config)


class Nodes(NamedTuple):
    """Positions of some nodes of token trees.

    Node i of row b's tree has the cache entry root[b] + i, behind everything that all nodes may
    read. Its position in the text is root[b] + depth: siblings share a position, not an entry.

    Attributes:
        start: First entry that the nodes take; they take consecutive ones.
        root: Entry, and position, of the tree's root.
        depth: Levels below the root.
        ancestors: `ancestors[b, t, i]` says that token t may read node i.
    """

    start: Int[Array, " batch"]
    root: Int[Array, " batch"]
    depth: Int[Array, "batch tokens"]
    ancestors: Bool[Array, "batch tokens nodes"]


def tree_window(nodes: Nodes, capacity: int, config: ModelConfig) -> Window:
    """Make the window of nodes, each of which reads the text and its own path (tree attention).

    Args:
        nodes: The nodes.
        capacity: Entries of the cache.
        config: The model's configuration, for the rotation.
    """
    start, root, depth, ancestors = nodes
    # A text of two tokens, then a root (node 0) with children 1 and 2, capacity 6:
    #            text  tree
    #   node 0   1 1   1 0 0   0
    #   node 1   1 1   1 1 0   0
    #   node 2   1 1   1 0 1   0
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
    """Add each token's rotation to its mask."""
    frequencies = jnp.asarray(rope_frequencies(config))  # [head_dim / 2], radians per position
    angles = positions[:, :, None].astype(jnp.float32) * frequencies[None, None, :]
    return Window(start, mask, jnp.cos(angles), jnp.sin(angles))


def rotate(
    x: Float[Array, "batch heads tokens head_dim"], window: Window
) -> Float[Array, "batch heads tokens head_dim"]:
    """Apply rotary position embedding in Hugging Face's layout.

    Channel i is paired with channel i + head_dim / 2, and each pair turns by its token's angle.

    Args:
        x: Queries or keys.
        window: Positions of the tokens.

    Returns:
        Rotated x, in its dtype; computed in float32.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = window.cos[:, None], window.sin[:, None]  # [batch, 1, tokens, head_dim / 2]
    return jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    ).astype(x.dtype)


class Attention(nnx.Module):
    """One device's share of a layer's attention, its pre-norm included.

    Leaves may carry a leading slot axis to `vmap` over.

    Attributes:
        qkv: Projection whose outputs are [queries | keys | values] of this share.
        out: Output matrix, [hidden, kv_heads * group * head_dim].
        query_norm: Weight of the norm of each query, in families that have one, else None.
        key_norm: Likewise of each key.
        kv_heads: Key heads of this share; it has as many value heads.
        group: Query heads for each key head.
        kv_dtype: Type of the caches; "auto" is that of the hidden states.
        split_keys_from: Cache entries from which a kernel splits the keys; None for never.
        interpret: Run kernels in Pallas' interpreter, as a CPU must.
    """

    def __init__(
        self,
        qkv: Projection,
        out: Matrix,
        head_norms: tuple[Float[Array, "*slots head_dim"], Float[Array, "*slots head_dim"]] | None,
        *,
        kv_heads: int,
        group: int,
        kv_dtype: KVDType = "auto",
        split_keys_from: int | None = None,
        interpret: bool = False,
    ) -> None:
        self.qkv, self.out = qkv, out
        self.query_norm, self.key_norm = (
            (None, None) if head_norms is None else map(nnx.Param, head_norms)
        )
        self.kv_heads, self.group, self.kv_dtype = kv_heads, group, kv_dtype
        self.split_keys_from, self.interpret = split_keys_from, interpret

    def __call__(
        self,
        h: Float[Array, "batch tokens hidden"],
        cache: KVCache,
        window: Window,
        slot: int | None = None,
        mask: Bool[Array, ""] | None = None,
        qkv: Projection | None = None,
    ) -> tuple[Float[Array, "batch tokens hidden"], KVCache]:
        """Write the tokens' keys and values, then attend.

        Args:
            h: Hidden states.
            cache: This share's cache.
            window: Positions of the tokens.
            slot: This layer's place, if the cache is a stack of several.
            mask: A scalar; where false, the cache stays as it is and the output means nothing.
            qkv: A projection to use instead of the layer's own.

        Returns:
            This share's addend of the attention output, and the new cache.
        """
        q, k, v = self.rotated(h, window, qkv)
        cache = write(cache, k, v, window.start, slot, mask)
        return self.attend(q, cache, window, slot), cache

    def fused(
        self,
        h: Float[Array, "batch tokens hidden"],
        cache: KVCache,
        window: Window,
        qkv: Projection | None = None,
    ) -> tuple[Float[Array, "slots batch tokens hidden"], KVCache]:
        """Run a stack of attentions, which all read h, by kernels that take them all at once.

        Arguments and results are those of __call__() under `vmap`; see can_fuse().
        """
        own = qkv or self.qkv
        weights = fused_projection.Weights(
            norm=own.norm[...],
            matrix=own.weight.values[...],
            bias=None if own.bias is None else own.bias[...],
            query_norm=None if self.query_norm is None else self.query_norm[...],
            key_norm=None if self.key_norm is None else self.key_norm[...],
        )
        q, written = fused_projection.project_and_write(
            h,
            weights,
            (cache.k, cache.v),
            window.start,
            (window.cos, window.sin),
            kv_heads=self.kv_heads,
            eps=own.eps,
            interpret=self.interpret,
        )
        mixed = split_attention.attend(q, *written, window.mask, interpret=self.interpret)
        out = fused_projection.project_out(mixed, self.out.values[...], interpret=self.interpret)
        return out, KVCache(*written)

    def can_fuse(self) -> bool:
        """Return whether fused() takes these shapes and types."""
        weight, dtype = self.qkv.weight, self.qkv.norm.dtype
        if self.kv_dtype != "auto" or not weight.dtype == self.out.dtype == dtype:
            return False
        return fused_projection.supports(weight.shape[-1], self._head_dim, dtype)

    def rotated(
        self, h: Float[Array, "batch tokens hidden"], window: Window, qkv: Projection | None = None
    ) -> tuple[Array, Array, Array]:
        """Compute the tokens' queries, keys and values, the first two rotated.

        Args:
            h: Hidden states.
            window: Positions of the tokens.
            qkv: A projection to use instead of the layer's own.

        Returns:
            Shapes are those of heads().
        """
        q, k, v = self.heads((qkv or self.qkv)(h))
        return rotate(q, window), rotate(k, window), v

    @property
    def _head_dim(self) -> int:
        return self.qkv.weight.shape[-2] // (self.kv_heads * (self.group + 2))

    def init_cache(self, batch: int, capacity: int) -> KVCache:
        """Make this share's part of an empty cache."""
        dtype = self.qkv.norm.dtype if self.kv_dtype == "auto" else self.kv_dtype
        return empty(batch * self.kv_heads, capacity, self._head_dim, dtype)

    def cache_spec(self, spec: P) -> KVCache:
        """Return the PartitionSpec of each field of a cache: this one, as scales have all axes."""
        scale = None if self.kv_dtype == "auto" else spec
        return KVCache(spec, spec, scale, scale)  # pyright: ignore[reportArgumentType]

    def heads(self, x: Float[Array, "batch tokens heads_dim"]) -> tuple[Array, Array, Array]:
        """Split the projection's outputs into heads, and norm queries and keys where families do.

        Args:
            x: Outputs of the projection.

        Returns:
            Queries [batch, kv_heads * group, tokens, head_dim]; keys and values [batch, kv_heads,
            tokens, head_dim].
        """
        heads = self.kv_heads * (self.group + 2)
        # [batch, tokens, heads * head_dim] -> [batch, heads, tokens, head_dim]
        x = x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)
        queries = self.kv_heads * self.group
        q, k, v = jnp.split(x, [queries, queries + self.kv_heads], axis=1)
        if self.query_norm is not None and self.key_norm is not None:
            q = rms_norm(q, self.query_norm[...], self.qkv.eps)
            k = rms_norm(k, self.key_norm[...], self.qkv.eps)
        return q, k, v

    def attend(
        self,
        q: Float[Array, "batch heads tokens head_dim"],
        cache: KVCache,
        window: Window,
        slot: int | None = None,
    ) -> Float[Array, "batch tokens hidden"]:
        """Mix values by softmax of masked scores, and project.

        Args:
            q: Rotated queries.
            cache: This layer's cache, in which the tokens' own entries are written.
            window: Positions of the tokens.
            slot: This layer's place, if the cache is a stack of several.

        Returns:
            This share's addend of the attention output.
        """
        batch, _, tokens, head_dim = q.shape
        # A key head's queries are extra rows of one product, so its keys are read once:
        # from [batch, kv_heads * group, tokens, head_dim]
        # to   [batch * kv_heads, group * tokens, head_dim].
        q = q.reshape(batch * self.kv_heads, self.group * tokens, head_dim)
        if self._splits_keys(cache):
            k, v = (cache.k, cache.v) if slot is not None else (cache.k[None], cache.v[None])
            mixed = split_attention.attend(
                q[None], k, v, window.mask, slot=slot or 0, interpret=self.interpret
            )
            return self.out(mixed[0])
        if slot is not None:
            cache = jax.tree.map(lambda x: x[slot], cache)
        # int8 is exact in every float type. Scales multiply scores and weights, which are small,
        # so that no float copy of the cache is needed: (q · k_int8) * scale = q · (k_int8 * scale).
        k, v = cache.k.astype(q.dtype), cache.v.astype(q.dtype)
        scores = jnp.einsum("kqd,ksd->kqs", q, k, preferred_element_type=jnp.float32)
        if cache.k_scale is not None:
            scores = scores * jnp.swapaxes(cache.k_scale, 1, 2)  # [batch * kv_heads, 1, capacity]
        # The mask is per token, so unfold: [batch, kv_heads, group, tokens, capacity].
        scores = scores.reshape(batch, self.kv_heads, self.group, tokens, -1) * np.float32(
            head_dim**-0.5
        )
        scores = jnp.where(window.mask[:, None, None], scores, np.float32(-np.inf))
        weights = jax.nn.softmax(scores, axis=-1)
        weights = weights.reshape(batch * self.kv_heads, self.group * tokens, -1)
        if cache.v_scale is not None:
            weights = weights * jnp.swapaxes(cache.v_scale, 1, 2)
        mixed = jnp.einsum("kqs,ksd->kqd", weights.astype(q.dtype), v)
        # Back to one row per token, heads side by side: [batch, tokens, queries * head_dim].
        mixed = mixed.reshape(batch, self.kv_heads * self.group, tokens, head_dim)
        mixed = mixed.transpose(0, 2, 1, 3).reshape(batch, tokens, -1)
        return self.out(mixed)

    def _splits_keys(self, cache: KVCache) -> bool:
        """Return whether a kernel mixes the values of this cache."""
        return (
            self.split_keys_from is not None
            and not cache.is_quantized
            and cache.capacity >= self.split_keys_from
            and supports_heads(self._head_dim, cache.k.dtype)
        )
