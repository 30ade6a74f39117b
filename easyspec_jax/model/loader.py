"""From a checkpoint's tensors to modules whose arrays lie on the mesh, one block in host memory at a time."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from easyspec_jax.checkpoint import EMBEDDING, FINAL_NORM, HEAD
from easyspec_jax.config import ModelConfig
from easyspec_jax.mesh import LAYER, TENSOR, Axes, axes_size
from easyspec_jax.model.attention import Attention
from easyspec_jax.model.sharding import HeadLayout, head_layout
from easyspec_jax.model.transformer import MLP, Block, Decoder, Layer
from easyspec_jax.sources import TensorSource


@dataclass(frozen=True)
class Loader:
    """Reads a checkpoint block by block and places it on the mesh in its final layout and dtype.

    axes: what the model's dense parts are split over; vocab_rows: embedding rows after padding; num_ids: ids at and
    above it never get probability.
    """

    source: TensorSource
    config: ModelConfig
    mesh: Mesh
    axes: Axes
    dtype: np.dtype
    vocab_rows: int
    num_ids: int

    def decoder(self, blocks: Sequence[Block]) -> Decoder:
        """The embedding, final norm and head around blocks."""
        spec = P(self.axes or None, None)
        tied = self.config.tie_word_embeddings
        return Decoder(
            embedding=self.place(self._vocabulary(EMBEDDING), spec),
            blocks=blocks,
            norm=self.place(self.source.read(FINAL_NORM), P(None)),
            head=None if tied else self.place(self._vocabulary(HEAD), spec),
            config=self.config,
            axes=self.axes,
            num_ids=self.num_ids,
        )

    def layer(self, index: int) -> Layer:
        """One transformer layer, split over the dense axes."""
        return Layer(self.attention(index), self.mlp(index), axes=self.axes)

    def attention(self, index: int) -> Attention:
        """One layer's attention, its heads split over the dense axes."""
        layout = self._head_layout(self.axes)
        return self._place_attention(self._attention_arrays(index, layout), layout, self.axes)

    def stacked_attention(self, layers: Sequence[int], slots: int) -> Attention:
        """The attention of several layers on an axis of `slots` that is split over "layer", heads over "tensor".

        slots counts those of all devices; the ones beyond the layers are zero.
        """
        layout = self._head_layout((TENSOR,))
        parts = [self._attention_arrays(index, layout) for index in layers]
        empty = [jax.tree.map(np.zeros_like, parts[0])] * (slots - len(parts))
        stacked = jax.tree.map(lambda *fields: np.stack(fields), *parts, *empty)
        return self._place_attention(stacked, layout, (TENSOR,), LAYER)

    def mlp(self, index: int) -> MLP:
        """A layer's feed-forward part, its columns padded to whole shards."""
        shards, split = axes_size(self.mesh, self.axes), self.axes or None
        prefix = f"model.layers.{index}."
        gate, up, down = (self.source.read(f"{prefix}mlp.{name}_proj.weight") for name in ("gate", "up", "down"))
        rows = -(-gate.shape[0] // shards) * shards
        gate, up, down = _pad(gate, rows), _pad(up, rows), _pad(down, rows, axis=1)
        fused = np.stack([gate.reshape(shards, rows // shards, -1), up.reshape(shards, rows // shards, -1)], axis=1)
        return MLP(
            norm=self.place(self.source.read(f"{prefix}post_attention_layernorm.weight"), P(None)),
            gate_up=self.place(fused.reshape(2 * rows, -1).T, P(None, split)),
            down=self.place(down, P(None, split)),
            eps=self.config.rms_norm_eps,
        )

    def place(self, array: np.ndarray, spec: P) -> Array:
        """A host array on the mesh; each process hands over only the shards of its own devices."""
        array = array.astype(self.dtype, copy=False)
        return jax.make_array_from_callback(array.shape, NamedSharding(self.mesh, spec), array.__getitem__)

    def _vocabulary(self, name: str) -> np.ndarray:
        return _pad(self.source.read(name), self.vocab_rows)

    def _head_layout(self, axes: Axes) -> HeadLayout:
        shards = axes_size(self.mesh, axes)
        return head_layout(self.config.num_attention_heads, self.config.num_key_value_heads, shards)

    def _place_attention(
        self, arrays: "_AttentionArrays", layout: HeadLayout, head_axes: Axes, *slot_axis: str
    ) -> Attention:
        split = head_axes or None
        norms = arrays.head_norms
        if norms is not None:
            norms = self.place(norms[0], P(*slot_axis, None)), self.place(norms[1], P(*slot_axis, None))
        return Attention(
            norm=self.place(arrays.norm, P(*slot_axis, None)),
            qkv=self.place(arrays.qkv, P(*slot_axis, None, split)),
            bias=None if arrays.bias is None else self.place(arrays.bias, P(*slot_axis, split)),
            out=self.place(arrays.out, P(*slot_axis, split, None)),
            head_norms=norms,
            kv_heads=layout.kv_heads,
            group=layout.group,
            eps=self.config.rms_norm_eps,
        )

    def _attention_arrays(self, index: int, layout: HeadLayout) -> "_AttentionArrays":
        prefix = f"model.layers.{index}."
        head_dim = self.config.head_dim

        def fused(kind: str) -> np.ndarray:
            """[shards * heads * head_dim, ...]: each shard's queries, keys and values side by side."""
            q, k, v = (self.source.read(f"{prefix}self_attn.{name}_proj.{kind}") for name in "qkv")
            indices = (layout.query_index, layout.kv_index, layout.kv_index)
            parts = [_take_heads(x, i, head_dim) for x, i in zip((q, k, v), indices, strict=True)]
            return np.concatenate(parts, axis=1).reshape(-1, *q.shape[1:])

        def read(name: str) -> np.ndarray:
            return self.source.read(f"{prefix}self_attn.{name}_norm.weight")

        out = self.source.read(f"{prefix}self_attn.o_proj.weight").T
        return _AttentionArrays(
            norm=self.source.read(f"{prefix}input_layernorm.weight"),
            qkv=fused("weight").T,
            bias=fused("bias") if self.config.qkv_bias else None,
            out=_take_heads(out, layout.query_index, head_dim).reshape(-1, out.shape[-1]),
            head_norms=(read("q"), read("k")) if self.config.qk_norm else None,
        )


class _AttentionArrays(NamedTuple):
    """A layer's attention as Attention has it, all shards side by side, in host memory."""

    norm: np.ndarray
    qkv: np.ndarray
    bias: np.ndarray | None
    out: np.ndarray
    head_norms: tuple[np.ndarray, np.ndarray] | None


def _take_heads(x: np.ndarray, index: np.ndarray, head_dim: int) -> np.ndarray:
    """[heads * head_dim, ...] to [shards, chosen, head_dim, ...], zeros where the index is -1."""
    heads = x.reshape(-1, head_dim, *x.shape[1:])
    return np.concatenate([heads, np.zeros_like(heads[:1])])[index]


def _pad(x: np.ndarray, size: int, axis: int = 0) -> np.ndarray:
    """x with zeros behind it along an axis."""
    missing = size - x.shape[axis]
    return np.pad(x, [(0, missing if dim == axis else 0) for dim in range(x.ndim)]) if missing else x
