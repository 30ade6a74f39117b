"""Attention of one layer: rotary embeddings, grouped queries, and a mask over a per-row cache."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

from easyspec_jax.kernels import attention as split_attention
from easyspec_jax.kernels import projection as fused_projection
from easyspec_jax.kernels.tiles import supports_heads
from easyspec_jax.model.cache import KVCache, empty, write
from easyspec_jax.model.head_norms import FullNorms, HeadNorms
from easyspec_jax.model.projection import Output, Projection
from easyspec_jax.model.windows import Window
from easyspec_jax.options import KVDType


def rotate(
    x: Float[Array, "batch heads tokens head_dim"], window: Window
) -> Float[Array, "batch heads tokens head_dim"]:
    """Apply rotary position embedding in Hugging Face's layout.

    Channel i is paired with channel i + dim / 2, and each pair turns by its token's angle. If a
    model rotates only the first `dim` channels of a head, the others stay as they are.

    Args:
        x: Queries or keys.
        window: Positions of the tokens.

    Returns:
        Rotated x, in its dtype; computed in float32.
    """
    dim = 2 * window.cos.shape[-1]
    if dim < x.shape[-1]:
        return jnp.concatenate([rotate(x[..., :dim], window), x[..., dim:]], axis=-1)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = window.cos[:, None], window.sin[:, None]  # [batch, 1, tokens, dim / 2]
    return jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    ).astype(x.dtype)


def soft_cap(x: Float[Array, "*shape"], cap: float | None) -> Float[Array, "*shape"]:
    """Bend x so that it stays between -cap and cap; None leaves it.

    Examples:
        >>> round(float(soft_cap(jnp.array(1000.0), cap=50.0)), 3)
        50.0
    """
    return x if cap is None else jnp.tanh(x / np.float32(cap)) * np.float32(cap)


def attention_weights(
    scores: Float[Array, "batch kv_heads group tokens size"],
    sinks: Float[Array, "kv_heads group"] | None = None,
) -> Float[Array, "batch kv_heads group tokens size"]:
    """Return the softmax of scores.

    Args:
        scores: Scores of cache entries; -inf for those that are not read.
        sinks: One more score for each head, which belongs to no entry (arXiv 2309.17453): the
            weights then sum to less than 1.

    Examples:
        >>> scores = jnp.zeros((1, 1, 1, 1, 2))
        >>> attention_weights(scores, jnp.log(jnp.array([[2.0]])))[0, 0, 0, 0].tolist()
        [0.25, 0.25]
    """
    if sinks is None:
        return jax.nn.softmax(scores, axis=-1)
    sinks = sinks.astype(scores.dtype)[None, :, :, None, None]
    most = jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), sinks)
    weights = jnp.exp(scores - most)
    return weights / (jnp.sum(weights, axis=-1, keepdims=True) + jnp.exp(sinks - most))


def _first(cache: KVCache, size: int, slot: int | None) -> KVCache:
    """Take a cache's first entries, of one layer if it is a stack of several."""
    return jax.tree.map(lambda x: x[:, :size] if slot is None else x[slot, :, :size], cache)


class Attention(nnx.Module):
    """One device's share of a layer's attention, its pre-norm included.

    Leaves may carry a leading slot axis to `vmap` over.

    Attributes:
        qkv: Projection whose outputs are [queries | keys | values] of this share.
        out: Output product, [hidden, kv_heads * group * head_dim].
        head_norms: Norms of queries and keys, in families that have them, else None.
        kv_heads: Key heads of this share; it has as many value heads.
        group: Query heads for each key head.
        sinks: One more score for each query head, or None; see attention_weights().
        scale: Multiplies scores; None for head_dim ** -0.5.
        soft_cap: Scores stay between this and its negative; None if they are not capped.
        kv_dtype: Type of the caches; "auto" is that of the hidden states.
        split_keys_from: Cache entries from which a kernel splits the keys; None for never.
        interpret: Run kernels in Pallas' interpreter, as a CPU must.
    """

    def __init__(
        self,
        qkv: Projection,
        out: Output,
        head_norms: HeadNorms | FullNorms | None,
        *,
        kv_heads: int,
        group: int,
        sinks: Float[Array, "*slots heads"] | None = None,
        scale: float | None = None,
        soft_cap: float | None = None,
        kv_dtype: KVDType = "auto",
        split_keys_from: int | None = None,
        interpret: bool = False,
    ) -> None:
        self.qkv, self.out, self.head_norms = qkv, out, nnx.data(head_norms)
        self.kv_heads, self.group, self.kv_dtype = kv_heads, group, kv_dtype
        self.split_keys_from, self.interpret = split_keys_from, interpret
        self.scale, self.soft_cap = scale, soft_cap
        self.sinks = None if sinks is None else nnx.Param(sinks)

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
        own, norms = qkv or self.qkv, self.head_norms
        assert own.norm is not None and not isinstance(norms, FullNorms), "see can_fuse()"
        weights = fused_projection.Weights(
            norm=own.norm.weight[...],
            matrix=own.weight.values[...],
            bias=None if own.bias is None else own.bias[...],
            query_norm=None if norms is None else norms.query.weight[...],
            key_norm=None if norms is None else norms.key.weight[...],
        )
        q, written = fused_projection.project_and_write(
            h,
            weights,
            (cache.k, cache.v),
            window.start,
            (window.cos, window.sin),
            kv_heads=self.kv_heads,
            eps=own.norm.eps,
            interpret=self.interpret,
        )
        mixed = split_attention.attend(q, *written, window.mask, interpret=self.interpret)
        out = self.out.weight.values[...]
        out = fused_projection.project_out(mixed, out, interpret=self.interpret)
        return out, KVCache(*written)

    def can_fuse(self) -> bool:
        """Return whether fused() takes these shapes and types."""
        weight, dtype = self.qkv.weight, self.qkv.dtype
        if self.kv_dtype != "auto" or not weight.dtype == self.out.weight.dtype == dtype:
            return False
        plain_norms = self.qkv.fusible_norm is not None and (
            self.head_norms is None or self.head_norms.is_plain
        )
        if not (plain_norms and self.out.is_plain and self._scores_plainly):
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

    @property
    def _scores_plainly(self) -> bool:
        """Whether scores are what kernels compute."""
        plain = self.sinks is None and self.soft_cap is None
        return plain and self.scale in (None, self._head_dim**-0.5)

    def init_cache(self, batch: int, capacity: int) -> KVCache:
        """Make this share's part of an empty cache."""
        dtype = self.qkv.dtype if self.kv_dtype == "auto" else self.kv_dtype
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
        if self.head_norms is not None:
            q, k = self.head_norms(q, k)
        return q, k, v

    def attend(
        self,
        q: Float[Array, "batch heads tokens head_dim"],
        cache: KVCache,
        window: Window,
        slot: int | None = None,
    ) -> Float[Array, "batch tokens hidden"]:
        """Mix values by softmax of masked scores, and project.

        Arguments are those of mix().

        Returns:
            This share's addend of the attention output.
        """
        return self.out(self.mix(q, cache, window, slot))

    def mix(
        self,
        q: Float[Array, "batch heads tokens head_dim"],
        cache: KVCache,
        window: Window,
        slot: int | None = None,
    ) -> Float[Array, "batch tokens heads_dim"]:
        """Mix values by softmax of masked scores.

        Args:
            q: Rotated queries.
            cache: This layer's cache, in which the tokens' own entries are written.
            window: Positions of the tokens.
            slot: This layer's place, if the cache is a stack of several.

        Returns:
            The input of the output product.
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
            return mixed[0]
        if window.size:
            own = jax.tree.map(window.cut, _first(cache, cache.capacity, slot))
            mixed = self._mix(q, own, window.cut_mask)
        else:
            parts = window.parts or (cache.capacity,)
            branches = [partial(self._mix_part, size=size, slot=slot) for size in parts]
            part = np.int32(0) if window.part is None else window.part
            mixed = jax.lax.switch(part, branches, q, cache, window.mask)
        # Back to one row per token, heads side by side: [batch, tokens, queries * head_dim].
        mixed = mixed.reshape(batch, self.kv_heads * self.group, tokens, head_dim)
        return mixed.transpose(0, 2, 1, 3).reshape(batch, tokens, -1)

    def _mix_part(
        self, q: Array, cache: KVCache, mask: Array, *, size: int, slot: int | None
    ) -> Array:
        """Mix the values of a cache's first entries; see _mix()."""
        # The entries are taken out within the branch, so that the others cost nothing.
        return self._mix(q, _first(cache, size, slot), mask[..., :size])

    def _mix(
        self,
        q: Float[Array, "batch_heads group_tokens head_dim"],
        cache: KVCache,
        mask: Bool[Array, "batch tokens capacity"],
    ) -> Float[Array, "batch_heads group_tokens head_dim"]:
        """Mix values by softmax of masked scores."""
        (batch, tokens, _), head_dim = mask.shape, q.shape[-1]
        # int8 is exact in every float type. Scales multiply scores and weights, which are small,
        # so that no float copy of the cache is needed: (q · k_int8) * scale = q · (k_int8 * scale).
        k, v = cache.k.astype(q.dtype), cache.v.astype(q.dtype)
        scores = jnp.einsum("kqd,ksd->kqs", q, k, preferred_element_type=jnp.float32)
        if cache.k_scale is not None:
            scores = scores * jnp.swapaxes(cache.k_scale, 1, 2)  # [batch * kv_heads, 1, size]
        # The mask is per token, so unfold: [batch, kv_heads, group, tokens, size].
        scores = scores.reshape(batch, self.kv_heads, self.group, tokens, -1)
        scale = head_dim**-0.5 if self.scale is None else self.scale
        scores = soft_cap(scores * np.float32(scale), self.soft_cap)
        scores = jnp.where(mask[:, None, None], scores, np.float32(-np.inf))
        sinks = None
        if self.sinks is not None:
            sinks = self.sinks[...].reshape(self.kv_heads, self.group)
        weights = attention_weights(scores, sinks)
        weights = weights.reshape(batch * self.kv_heads, self.group * tokens, -1)
        if cache.v_scale is not None:
            weights = weights * jnp.swapaxes(cache.v_scale, 1, 2)
        return jnp.einsum("kqs,ksd->kqd", weights.astype(q.dtype), v)

    def _splits_keys(self, cache: KVCache) -> bool:
        """Return whether a kernel mixes the values of this cache."""
        return (
            self.split_keys_from is not None
            and self._scores_plainly
            and not cache.is_quantized
            and cache.capacity >= self.split_keys_from
            and supports_heads(self._head_dim, cache.k.dtype)
        )
