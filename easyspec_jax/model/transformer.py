"""The decoder: embedding, blocks, head.

Every method computes one device's part and is called inside `shard_map`.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from easyspec_jax.checkpoint.config import Activation, ModelConfig
from easyspec_jax.kernels import gate_up as kernel
from easyspec_jax.model.activation import gated
from easyspec_jax.model.attention import Attention, soft_cap
from easyspec_jax.model.cache import KVCache
from easyspec_jax.model.experts import Experts
from easyspec_jax.model.kept_window import first_kept, kept_entries
from easyspec_jax.model.matrix import Matrix
from easyspec_jax.model.norm import RMSNorm
from easyspec_jax.model.projection import Output, Projection
from easyspec_jax.model.windows import Nodes, Windows, chain_windows, tree_windows
from easyspec_jax.parallel.collectives import all_reduce, shard_index
from easyspec_jax.parallel.mesh import Axes

Hidden = Float[Array, "batch tokens hidden"]
Caches = tuple[KVCache, ...]
"""One KVCache per block; a block of several layers stacks its own on a leading axis."""


class MLP(nnx.Module):
    """One device's share of a gated feed-forward part, its pre-norm included.

    Attributes:
        gate_up: Projection whose outputs are [gate | up] of this share.
        down: Output product, [hidden, inner].
        activation: Function of the gate.
        fused: Whether a kernel computes what is multiplied by `down`, where it supports the shapes.
        interpret: Run the kernel in Pallas' interpreter, as a CPU must.
    """

    def __init__(
        self,
        gate_up: Projection,
        down: Output,
        *,
        activation: Activation = "silu",
        fused: bool = False,
        interpret: bool = False,
    ) -> None:
        self.gate_up, self.down = gate_up, down
        self.activation: Activation = activation
        self.fused, self.interpret = fused, interpret

    def __call__(self, h: Hidden, gate_up: Projection | None = None) -> Hidden:
        """Compute this share's addend of the output.

        Args:
            h: Hidden states.
            gate_up: A projection to use instead of the layer's own.
        """
        return self.down(self.inner(h, gate_up))

    def inner(
        self, h: Hidden, gate_up: Projection | None = None
    ) -> Float[Array, "batch tokens inner"]:
        """Compute this share's input of `down`; the arguments are those of a call."""
        own = gate_up or self.gate_up
        norm = own.fusible_norm
        if norm is not None and self._fuses(own):
            bias = None if own.bias is None else own.bias[...]
            arrays = h, norm.weight[...], own.weight.values[...], bias
            return kernel.gate_up(*arrays, eps=norm.eps, interpret=self.interpret)
        # A shard's rows are [its gate | its up], so that one product computes both.
        gate, up = jnp.split(own(h), 2, axis=-1)
        return gated(self.activation, gate, up)

    def _fuses(self, own: Projection) -> bool:
        """Return whether the kernel takes these shapes and types."""
        hidden, inner = self.down.weight.shape
        plain = self.activation == "silu" and own.weight.dtype == own.dtype
        return self.fused and plain and kernel.supports(hidden, inner, own.dtype)


class PostNorms(nnx.Module):
    """Norms of a layer's outputs before they are added to the hidden states, in some families.

    They take whole outputs, after the all-reduces: a sum of normed addends would be another thing.

    Attributes:
        attention: Norm of the attention's output, or None.
        mlp: Norm of the MLP's output, or None.
    """

    def __init__(self, attention: RMSNorm | None = None, mlp: RMSNorm | None = None) -> None:
        self.attention, self.mlp = attention, mlp

    def after_attention(self, output: Hidden) -> Hidden:
        """Norm an attention's output where the family does."""
        return output if self.attention is None else self.attention(output)

    def after_mlp(self, output: Hidden) -> Hidden:
        """Norm an MLP's output where the family does."""
        return output if self.mlp is None else self.mlp(output)


class Layer(nnx.Module):
    """A transformer layer under tensor parallelism over `axes`: two all-reduces.

    Attributes:
        attention: The attention, its pre-norm included.
        mlp: The feed-forward part or mixture of experts, its pre-norm included.
        post_norms: Norms of both outputs.
        axes: Mesh axes that split both parts.
        kind: Number of its kind among `ModelConfig.kinds`.
    """

    def __init__(
        self,
        attention: Attention,
        mlp: MLP | Experts,
        post_norms: PostNorms,
        *,
        axes: Axes,
        kind: int = 0,
    ) -> None:
        self.attention, self.mlp, self.post_norms = attention, mlp, post_norms
        self.axes, self.kind = axes, kind

    def __call__(self, h: Hidden, cache: KVCache, windows: Windows) -> tuple[Hidden, KVCache]:
        """Run attention, then MLP; each adds to the hidden states. See Block for arguments."""
        attended, cache = self.attention(h, cache, windows[self.kind])
        h = h + self.post_norms.after_attention(all_reduce(attended, self.axes))
        return h + self.post_norms.after_mlp(all_reduce(self.mlp(h), self.axes)), cache

    @property
    def kinds(self) -> tuple[int, ...]:
        """Its kind, as of a block of one layer."""
        return (self.kind,)

    def init_cache(self, batch: int, capacity: int) -> KVCache:
        """Make this device's part of an empty cache."""
        return self.attention.init_cache(batch, capacity)

    def cache_spec(self) -> KVCache:
        """Return how the cache is split: each device has all rows of its own heads."""
        return self.attention.cache_spec(P(self.axes or None, None, None))


class Block(Protocol):
    """One or more layers that share a cache."""

    @property
    def kinds(self) -> tuple[int, ...]:
        """Number of each layer's kind among `ModelConfig.kinds`."""
        ...

    def __call__(self, h: Hidden, cache: KVCache, windows: Windows) -> tuple[Hidden, KVCache]:
        """Run the exact pass.

        Args:
            h: Hidden states before the block, the same on every device.
            cache: This device's cache.
            windows: Positions of the tokens, for every kind of layer.

        Returns:
            Hidden states after the block, and the cache with the tokens' entries written.
        """
        ...

    def init_cache(self, batch: int, capacity: int) -> KVCache:
        """Make this device's part of an empty cache."""
        ...

    def cache_spec(self) -> KVCache:
        """Return the PartitionSpec of each field of the cache."""
        ...


def run_exact(block: Block, h: Hidden, cache: KVCache, windows: Windows) -> tuple[Hidden, KVCache]:
    """Run a block in the exact pass."""
    return block(h, cache, windows)


class Decoder(nnx.Module):
    """A causal language model whose embedding and head are split by vocabulary.

    Attributes:
        embedding: This device's rows; rows that pad the vocabulary are zero, and so their ids embed
            as zero.
        blocks: Layers and groups of layers, in order.
        norm: The final norm.
        head: This device's rows, or None where the embedding serves as head.
        config: The model's configuration.
        axes: Mesh axes that split the embedding and the head; () if replicated.
        num_ids: Ids at and above this never get probability.
        unknown: -inf at this device's further ids that get none, 0 at others; None without any.
        cuts: Whether sliding layers cut what they read out of large caches. Where a cut begins
            depends on the pass, and so do the last bits of sums over it.
        parts: Whether other layers read only as large a part of them as texts need.
        reach: Most entries that are written behind the committed ones before the caches of sliding
            layers move on, which then keep only what may be read; None if they keep everything.
    """

    def __init__(
        self,
        embedding: Matrix,
        blocks: Sequence[Block],
        norm: RMSNorm,
        head: Matrix | None,
        *,
        config: ModelConfig,
        axes: Axes,
        num_ids: int,
        unknown: Float[Array, " rows"] | None = None,
        parts: bool = False,
    ) -> None:
        self.embedding, self.norm, self.head = embedding, norm, head
        self.blocks = nnx.List(blocks)
        self.config, self.axes, self.num_ids = config, axes, num_ids
        self.unknown = nnx.data(unknown)
        self.cuts, self.parts = True, parts
        self.reach: int | None = None

    def __call__(
        self,
        tokens: Int[Array, "batch tokens"],
        caches: Caches,
        at: Int[Array, " batch"] | Nodes | Windows,
        run: Callable[[Block, Hidden, KVCache, Windows], tuple[Hidden, KVCache]] = run_exact,
        committed: Int[Array, " batch"] | None = None,
    ) -> tuple[Hidden, Caches]:
        """Run the model over some tokens.

        Args:
            tokens: Token ids.
            caches: This device's caches.
            at: Position, and cache entry, of each row's first token, if they are consecutive; or
                nodes of token trees; or any windows.
            run: How to run a block: run_exact, or a draft's run_fuzzy.
            committed: Committed entries of each row, where those are not all that come before the
                tokens, or before the root of their tree.

        Returns:
            Final hidden states, normed; and the caches with the tokens' entries written.
        """
        # Masks and rotations are the same for all layers of a kind, so they are computed once.
        made: dict[tuple[int, int | None], Windows] = {}
        h = self.embed(tokens)
        written = []
        for block, cache, kept in zip(self.blocks, caches, self.kept_windows, strict=True):
            key = cache.capacity, kept
            if key not in made:
                made[key] = self._windows(at, tokens.shape[1], *key, committed)
            h, cache = run(block, h, cache, made[key])
            written.append(cache)
        return self.norm(h), tuple(written)

    def _windows(
        self,
        at: Int[Array, " batch"] | Nodes | Windows,
        tokens: int,
        capacity: int,
        kept: int | None,
        committed: Int[Array, " batch"] | None,
    ) -> Windows:
        """Make the windows of whatever says where the tokens are, for caches that keep a window."""
        first, options = None, (self.config, self.cuts, self.parts)
        if isinstance(at, tuple) and not isinstance(at, Nodes):
            return at
        if kept is not None:
            before = at.root if isinstance(at, Nodes) else at
            first = first_kept(before if committed is None else committed, kept)
        if isinstance(at, Nodes):
            return tree_windows(at, capacity, *options, first)
        return chain_windows(at, tokens, capacity, *options, first)

    @property
    def kept_windows(self) -> tuple[int | None, ...]:
        """Tokens that each block's cache keeps besides those to come; None for all."""
        return tuple(map(self._kept, self.blocks))

    def _kept(self, block: Block) -> int | None:
        # Layers of a group share an array, so a group of several kinds keeps everything.
        kinds = set(block.kinds)
        if self.reach is None or len(kinds) > 1:
            return None
        return self.config.kinds[kinds.pop()].window

    def capacities(self, capacity: int) -> tuple[int, ...]:
        """Return the entries of each block's cache, where others have `capacity` of them."""
        return tuple(
            capacity
            if kept is None or self.reach is None
            else min(capacity, kept_entries(kept, self.reach))
            for kept in self.kept_windows
        )

    def embed(self, tokens: Int[Array, "batch tokens"]) -> Hidden:
        """Look up embeddings; one all-reduce where the embedding is split."""
        rows = self.embedding.shape[0]
        local = tokens - shard_index(self.axes) * rows
        is_local = (local >= 0) & (local < rows)
        # [batch, tokens, hidden]
        found = self.embedding.rows(jnp.clip(local, 0, rows - 1), self.norm.dtype)
        # One device has each token's row and the others add zero.
        found = jnp.where(is_local[:, :, None], found, np.zeros((), found.dtype))
        h, multiplier = all_reduce(found, self.axes), self.config.embedding_multiplier
        # Rounded to the dtype first, as Gemma does with the root of its width.
        return h if multiplier == 1 else h * np.asarray(multiplier, h.dtype)

    def logits(self, h: Hidden) -> Float[Array, "batch tokens vocab_shard"]:
        """Compute this shard's logits in float32; -inf for ids that get no probability.

        Args:
            h: Final hidden states.
        """
        # Rows of zeros, which pad the vocabulary, would give logits of 0: hence -inf below.
        head = self.embedding if self.head is None else self.head
        logits, rows = head(h, jnp.float32), head.shape[0]
        if self.config.logits_scaling != 1:
            logits = logits / np.float32(self.config.logits_scaling)
        logits = soft_cap(logits, self.config.final_logit_softcapping)
        if self.unknown is not None:
            logits = logits + self.unknown.astype(jnp.float32)[None, None, :]
        ids = shard_index(self.axes) * rows + jnp.arange(rows, dtype=jnp.int32)
        return jnp.where((ids < self.num_ids)[None, None, :], logits, np.float32(-np.inf))

    def init_caches(self, batch: int, capacity: int) -> Caches:
        """Make this device's part of empty caches.

        Args:
            batch: Rows.
            capacity: Entries of each row, where caches keep everything.
        """
        sizes = self.capacities(capacity)
        return tuple(
            block.init_cache(batch, size) for block, size in zip(self.blocks, sizes, strict=True)
        )

    def cache_specs(self) -> Caches:
        """Return the PartitionSpec of every cache array."""
        return tuple(block.cache_spec() for block in self.blocks)
