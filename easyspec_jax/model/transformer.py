"""The decoder: embedding, blocks, head; every method computes one device's part inside `shard_map`."""

from collections.abc import Callable, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from easyspec_jax.checkpoint.config import ModelConfig
from easyspec_jax.model.attention import Attention, Nodes, Window, chain_window, tree_window
from easyspec_jax.model.cache import KVCache
from easyspec_jax.model.norm import rms_norm
from easyspec_jax.model.projection import Projection
from easyspec_jax.parallel.collectives import all_reduce, shard_index
from easyspec_jax.parallel.mesh import Axes

Hidden = Float[Array, "batch tokens hidden"]
Caches = tuple[KVCache, ...]
"""One KVCache per block; a block of several layers stacks its own on a leading axis."""


class MLP(nnx.Module):
    """One device's share of a gated feed-forward part, its pre-norm included; gate and up are one projection."""

    def __init__(self, gate_up: Projection, down: Float[Array, "hidden inner"]) -> None:
        self.gate_up, self.down = gate_up, nnx.Param(down)

    def __call__(self, h: Hidden, gate_up: Projection | None = None) -> Hidden:
        """This share's addend of the output. gate_up: another projection than the layer's own."""
        gate, up = jnp.split((gate_up or self.gate_up)(h), 2, axis=-1)
        return _product(self.down[...], jax.nn.silu(gate) * up)


class Layer(nnx.Module):
    """A transformer layer under tensor parallelism over `axes`: two all-reduces."""

    def __init__(self, attention: Attention, mlp: MLP, *, axes: Axes) -> None:
        self.attention, self.mlp, self.axes = attention, mlp, axes

    def __call__(self, h: Hidden, cache: KVCache, window: Window) -> tuple[Hidden, KVCache]:
        attended, cache = self.attention(h, cache, window)
        h = h + all_reduce(attended, self.axes)
        return h + all_reduce(self.mlp(h), self.axes), cache

    def init_cache(self, batch: int, capacity: int) -> KVCache:
        """This device's part of an empty cache."""
        return self.attention.init_cache(batch, capacity)

    def cache_spec(self) -> KVCache:
        """Heads are split; a device's rows and heads are one axis."""
        spec = P(self.axes or None, None, None)
        return KVCache(spec, spec)  # pyright: ignore[reportArgumentType]


class Block(Protocol):
    """One or more layers that share a cache."""

    def __call__(self, h: Hidden, cache: KVCache, window: Window) -> tuple[Hidden, KVCache]:
        """The exact pass: hidden states after the block, and its cache with the window's entries written."""
        ...

    def init_cache(self, batch: int, capacity: int) -> KVCache:
        """This device's part of an empty cache."""
        ...

    def cache_spec(self) -> KVCache:
        """The PartitionSpec of each field of the cache."""
        ...


def run_exact(block: Block, h: Hidden, cache: KVCache, window: Window) -> tuple[Hidden, KVCache]:
    """The exact pass through one block."""
    return block(h, cache, window)


class Decoder(nnx.Module):
    """A causal language model whose embedding and head are split by vocabulary.

    Ids at and above num_ids get no probability; ids without an embedding row embed as zero.
    """

    def __init__(
        self,
        embedding: Float[Array, "vocab hidden"],
        blocks: Sequence[Block],
        norm: Float[Array, " hidden"],
        head: Float[Array, "vocab hidden"] | None,
        *,
        config: ModelConfig,
        axes: Axes,
        num_ids: int,
    ) -> None:
        self.embedding, self.norm = nnx.Param(embedding), nnx.Param(norm)
        self.head = None if head is None else nnx.Param(head)
        self.blocks = nnx.List(blocks)
        self.config, self.axes, self.num_ids = config, axes, num_ids

    def __call__(
        self,
        tokens: Int[Array, "batch tokens"],
        caches: Caches,
        where: Int[Array, " batch"] | Nodes | Window,
        run: Callable[[Block, Hidden, KVCache, Window], tuple[Hidden, KVCache]] = run_exact,
    ) -> tuple[Hidden, Caches]:
        """Final hidden states of tokens, and the caches with their entries written.

        where: the first entry, and position, of each row's consecutive tokens; or nodes of trees; or any window. run:
        how to go through a block; by default exactly.
        """
        window = self._window(where, tokens.shape[1], caches[0].capacity)
        h = self.embed(tokens)
        written = []
        for block, cache in zip(self.blocks, caches, strict=True):
            h, cache = run(block, h, cache, window)
            written.append(cache)
        return rms_norm(h, self.norm[...], self.config.rms_norm_eps), tuple(written)

    def _window(
        self, where: Int[Array, " batch"] | Nodes | Window, tokens: int, capacity: int
    ) -> Window:
        if isinstance(where, Window):
            return where
        if isinstance(where, Nodes):
            return tree_window(where, capacity, self.config)
        return chain_window(where, tokens, capacity, self.config)

    def embed(self, tokens: Int[Array, "batch tokens"]) -> Hidden:
        """Rows of the embedding; one all-reduce where it is split."""
        rows = self.embedding[...]
        local = tokens - shard_index(self.axes) * rows.shape[0]
        mine = (local >= 0) & (local < rows.shape[0])
        found = rows[jnp.clip(local, 0, rows.shape[0] - 1)]
        return all_reduce(jnp.where(mine[:, :, None], found, np.zeros((), rows.dtype)), self.axes)

    def logits(self, h: Hidden) -> Float[Array, "batch tokens vocab_shard"]:
        """This shard's logits in float32; -inf for ids that do not exist."""
        rows = (self.embedding if self.head is None else self.head)[...]
        logits = _product(rows, h, jnp.float32)
        ids = shard_index(self.axes) * rows.shape[0] + jnp.arange(rows.shape[0], dtype=jnp.int32)
        return jnp.where((ids < self.num_ids)[None, None, :], logits, np.float32(-np.inf))

    def init_caches(self, batch: int, capacity: int) -> Caches:
        """This device's part of empty caches for `capacity` tokens a row."""
        return tuple(block.init_cache(batch, capacity) for block in self.blocks)

    def cache_specs(self) -> Caches:
        """The PartitionSpec of every cache array."""
        return tuple(block.cache_spec() for block in self.blocks)


def _product(
    matrix: Float[Array, "out inner"],
    x: Float[Array, "batch tokens inner"],
    dtype: DTypeLike | None = None,
) -> Float[Array, "batch tokens out"]:
    """Every token's x times the rows of a matrix; dtype: of the result, by default x's.

    The matrix is the left operand: so XLA's CPU backend reads it faster. Accelerators do not mind.
    """
    return jnp.moveaxis(jnp.einsum("oi,bti->obt", matrix, x, preferred_element_type=dtype), 0, 2)
