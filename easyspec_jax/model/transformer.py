"""The decoder: embedding, blocks, head.

Every method computes one device's part and is called inside `shard_map`.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from easyspec_jax.checkpoint.config import ModelConfig
from easyspec_jax.kernels import gate_up as kernel
from easyspec_jax.model.attention import Attention, Nodes, Window, chain_window, tree_window
from easyspec_jax.model.cache import KVCache
from easyspec_jax.model.matrix import Matrix
from easyspec_jax.model.norm import rms_norm
from easyspec_jax.model.projection import Projection
from easyspec_jax.parallel.collectives import all_reduce, shard_index
from easyspec_jax.parallel.mesh import Axes

Hidden = Float[Array, "batch tokens hidden"]
Caches = tuple[KVCache, ...]
"""One KVCache per block; a block of several layers stacks its own on a leading axis."""


class MLP(nnx.Module):
    """One device's share of a gated feed-forward part, its pre-norm included.

    Attributes:
        gate_up: Projection whose outputs are [gate | up] of this share.
        down: Output matrix, [hidden, inner].
        fused: Whether a kernel computes what is multiplied by `down`, where it supports the shapes.
        interpret: Run the kernel in Pallas' interpreter, as a CPU must.
    """

    def __init__(
        self,
        gate_up: Projection,
        down: Matrix,
        *,
        fused: bool = False,
        interpret: bool = False,
    ) -> None:
        self.gate_up, self.down = gate_up, down
        self.fused, self.interpret = fused, interpret

    def __call__(self, h: Hidden, gate_up: Projection | None = None) -> Hidden:
        """Compute this share's addend of the output.

        Args:
            h: Hidden states.
            gate_up: A projection to use instead of the layer's own.
        """
        own, (hidden, inner) = gate_up or self.gate_up, self.down.shape
        dtype = own.norm.dtype
        if self.fused and own.weight.dtype == dtype and kernel.supports(hidden, inner, dtype):
            bias = None if own.bias is None else own.bias[...]
            arrays = h, own.norm[...], own.weight.values[...], bias
            x = kernel.gate_up(*arrays, eps=own.eps, interpret=self.interpret)
        else:
            # A shard's rows are [its gate | its up], so that one product computes both.
            gate, up = jnp.split(own(h), 2, axis=-1)
            x = jax.nn.silu(gate) * up
        return self.down(x)


class Layer(nnx.Module):
    """A transformer layer under tensor parallelism over `axes`: two all-reduces."""

    def __init__(self, attention: Attention, mlp: MLP, *, axes: Axes) -> None:
        self.attention, self.mlp, self.axes = attention, mlp, axes

    def __call__(self, h: Hidden, cache: KVCache, window: Window) -> tuple[Hidden, KVCache]:
        """Run attention, then MLP; each adds to the hidden states. See Block for arguments."""
        attended, cache = self.attention(h, cache, window)
        h = h + all_reduce(attended, self.axes)
        return h + all_reduce(self.mlp(h), self.axes), cache

    def init_cache(self, batch: int, capacity: int) -> KVCache:
        """Make this device's part of an empty cache."""
        return self.attention.init_cache(batch, capacity)

    def cache_spec(self) -> KVCache:
        """Return how the cache is split: each device has all rows of its own heads."""
        return self.attention.cache_spec(P(self.axes or None, None, None))


class Block(Protocol):
    """One or more layers that share a cache."""

    def __call__(self, h: Hidden, cache: KVCache, window: Window) -> tuple[Hidden, KVCache]:
        """Run the exact pass.

        Args:
            h: Hidden states before the block, the same on every device.
            cache: This device's cache.
            window: Positions of the tokens.

        Returns:
            Hidden states after the block, and the cache with the window's entries written.
        """
        ...

    def init_cache(self, batch: int, capacity: int) -> KVCache:
        """Make this device's part of an empty cache."""
        ...

    def cache_spec(self) -> KVCache:
        """Return the PartitionSpec of each field of the cache."""
        ...


def run_exact(block: Block, h: Hidden, cache: KVCache, window: Window) -> tuple[Hidden, KVCache]:
    """Run a block in the exact pass."""
    return block(h, cache, window)


class Decoder(nnx.Module):
    """A causal language model whose embedding and head are split by vocabulary.

    Attributes:
        embedding: This device's rows; rows that pad the vocabulary are zero, and so their ids embed
            as zero.
        blocks: Layers and groups of layers, in order.
        norm: Weight of the final norm.
        head: This device's rows, or None where the embedding serves as head.
        config: The model's configuration.
        axes: Mesh axes that split the embedding and the head; () if replicated.
        num_ids: Ids at and above this never get probability.
    """

    def __init__(
        self,
        embedding: Matrix,
        blocks: Sequence[Block],
        norm: Float[Array, " hidden"],
        head: Matrix | None,
        *,
        config: ModelConfig,
        axes: Axes,
        num_ids: int,
    ) -> None:
        self.embedding, self.norm, self.head = embedding, nnx.Param(norm), head
        self.blocks = nnx.List(blocks)
        self.config, self.axes, self.num_ids = config, axes, num_ids

    def __call__(
        self,
        tokens: Int[Array, "batch tokens"],
        caches: Caches,
        at: Int[Array, " batch"] | Nodes | Window,
        run: Callable[[Block, Hidden, KVCache, Window], tuple[Hidden, KVCache]] = run_exact,
    ) -> tuple[Hidden, Caches]:
        """Run the model over some tokens.

        Args:
            tokens: Token ids.
            caches: This device's caches.
            at: Position, and cache entry, of each row's first token, if they are consecutive; or
                nodes of token trees; or any window.
            run: How to run a block: run_exact, or a draft's run_fuzzy.

        Returns:
            Final hidden states, normed; and the caches with the tokens' entries written.
        """
        # Mask and rotation are the same for every layer, so they are computed once.
        window = self._window(at, tokens.shape[1], caches[0].capacity)
        h = self.embed(tokens)
        written = []
        for block, cache in zip(self.blocks, caches, strict=True):
            h, cache = run(block, h, cache, window)
            written.append(cache)
        return rms_norm(h, self.norm[...], self.config.rms_norm_eps), tuple(written)

    def _window(
        self, at: Int[Array, " batch"] | Nodes | Window, tokens: int, capacity: int
    ) -> Window:
        """Make the window of whatever says where the tokens are."""
        if isinstance(at, Window):
            return at
        if isinstance(at, Nodes):
            return tree_window(at, capacity, self.config)
        return chain_window(at, tokens, capacity, self.config)

    def embed(self, tokens: Int[Array, "batch tokens"]) -> Hidden:
        """Look up embeddings; one all-reduce where the embedding is split."""
        rows = self.embedding.shape[0]
        local = tokens - shard_index(self.axes) * rows
        is_local = (local >= 0) & (local < rows)
        # [batch, tokens, hidden]
        found = self.embedding.rows(jnp.clip(local, 0, rows - 1), self.norm.dtype)
        # One device has each token's row and the others add zero.
        found = jnp.where(is_local[:, :, None], found, np.zeros((), found.dtype))
        return all_reduce(found, self.axes)

    def logits(self, h: Hidden) -> Float[Array, "batch tokens vocab_shard"]:
        """Compute this shard's logits in float32; -inf for ids at and above num_ids.

        Args:
            h: Final hidden states.
        """
        # Rows of zeros, which pad the vocabulary, would give logits of 0: hence -inf below.
        head = self.embedding if self.head is None else self.head
        logits, rows = head(h, jnp.float32), head.shape[0]
        ids = shard_index(self.axes) * rows + jnp.arange(rows, dtype=jnp.int32)
        return jnp.where((ids < self.num_ids)[None, None, :], logits, np.float32(-np.inf))

    def init_caches(self, batch: int, capacity: int) -> Caches:
        """Make this device's part of empty caches.

        Args:
            batch: Rows.
            capacity: Entries of each row.
        """
        return tuple(block.init_cache(batch, capacity) for block in self.blocks)

    def cache_specs(self) -> Caches:
        """Return the PartitionSpec of every cache array."""
        return tuple(block.cache_spec() for block in self.blocks)
