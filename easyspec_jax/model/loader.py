"""From a checkpoint's tensors to modules whose arrays lie on the mesh, every shard read by itself.

A shard's memory is made once, in its final layout and type; what fills it is read in blocks of a few MiB. So no tensor
is ever whole in host memory, unless a device is to have all of it.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import prod

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from easyspec_jax.checkpoint.config import ModelConfig
from easyspec_jax.checkpoint.families import EMBEDDING, FINAL_NORM, HEAD
from easyspec_jax.checkpoint.tensors import Slices, TensorSource, read_into
from easyspec_jax.model.attention import Attention
from easyspec_jax.model.projection import Projection
from easyspec_jax.model.sharding import HeadLayout, head_layout
from easyspec_jax.model.transformer import MLP, Block, Decoder, Layer
from easyspec_jax.parallel.mesh import LAYER, TENSOR, Axes, axes_size

Fill = Callable[[np.ndarray, Slices], None]
"""Puts what is not zero of a shard into its memory: an array in its final layout and type, and where it lies."""

FillLayer = Callable[[np.ndarray, Slices, int], None]
"""The same for what belongs to a layer, which is given too."""

Place = Callable[[tuple[int, ...], P, FillLayer], Array]
"""Puts an array on the mesh; knows which layers it has, and gives them a leading axis if they are several."""

_ALIGNMENT = 64  # bytes; on a CPU XLA takes memory that starts at a multiple of this over, and copies any other
_READERS = 8


@dataclass(frozen=True)
class Loader:
    """Reads a checkpoint shard by shard and places it on the mesh in its final layout and dtype.

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
        return Decoder(
            embedding=self._vocabulary(EMBEDDING),
            blocks=blocks,
            norm=self._vector(FINAL_NORM),
            head=None if self.config.tie_word_embeddings else self._vocabulary(HEAD),
            config=self.config,
            axes=self.axes,
            num_ids=self.num_ids,
        )

    def layer(self, index: int) -> Layer:
        """One transformer layer, split over the dense axes."""
        return Layer(self.attention(index), self.mlp(index), axes=self.axes)

    def attention(self, index: int) -> Attention:
        """One layer's attention, its heads split over the dense axes."""
        return self._attention((index,), self.axes, self._place_layer(index))

    def stacked_attention(self, layers: Sequence[int], slots: int) -> Attention:
        """The attention of several layers on an axis of `slots` that is split over "layer", heads over "tensor".

        slots counts those of all devices; the ones beyond the layers are zero.
        """
        return self._attention(layers, (TENSOR,), self._place_slots(layers, slots))

    def stacked_qkv(self, layers: Sequence[int], slots: int) -> Projection:
        """The projection of stacked_attention() alone; biases that only some layers have are zero in the others."""
        return self._qkv(layers, (TENSOR,), self._place_slots(layers, slots))

    def mlp(self, index: int) -> MLP:
        """A layer's feed-forward part, its columns padded to whole shards."""
        hidden, inner, width, shards = self._mlp_sizes()

        def fill(out: np.ndarray, where: Slices) -> None:
            part = _clipped(where[1].start, width, inner)
            self._read(
                out[:, : _length(part)],
                f"model.layers.{index}.mlp.down_proj.weight",
                slice(0, hidden),
                part,
            )

        down = self.place_shards((hidden, width * shards), P(None, self.axes or None), fill)
        return MLP(self.gate_up(index), down)

    def gate_up(self, index: int) -> Projection:
        """The projection of mlp() alone."""
        hidden, inner, width, shards = self._mlp_sizes()
        prefix, split = f"model.layers.{index}.", self.axes or None

        def fill(out: np.ndarray, start: int, kind: str) -> None:
            """[2 * width, ...]: a shard's gate and up, one after another."""
            part = _clipped(start // 2, width, inner)
            for name, rows in (("gate", out[:width]), ("up", out[width:])):
                self._read(rows[: _length(part)], f"{prefix}mlp.{name}_proj.{kind}", part)

        def fill_weight(out: np.ndarray, where: Slices) -> None:
            fill(out.T, where[1].start, "weight")

        def fill_bias(out: np.ndarray, where: Slices) -> None:
            fill(out, where[0].start, "bias")

        biased = f"{prefix}mlp.gate_proj.bias" in self.source.shapes()
        return Projection(
            norm=self._vector(f"{prefix}post_attention_layernorm.weight"),
            weight=self.place_shards((hidden, 2 * width * shards), P(None, split), fill_weight),
            bias=self.place_shards((2 * width * shards,), P(split), fill_bias) if biased else None,
            eps=self.config.rms_norm_eps,
        )

    def place(self, array: np.ndarray, spec: P) -> Array:
        """A host array on the mesh; each process hands over only the shards of its own devices."""
        return self.place_shards(
            array.shape, spec, lambda out, where: np.copyto(out, array[where], casting="unsafe")
        )

    def place_shards(self, shape: tuple[int, ...], spec: P, fill: Fill) -> Array:
        """An array on the mesh, of which each process makes only the shards of its own devices."""
        sharding = NamedSharding(self.mesh, spec)

        def shard(bounds: tuple[tuple[int, int], ...]) -> np.ndarray:
            out = _aligned_zeros(tuple(stop - start for start, stop in bounds), self.dtype)
            fill(out, tuple(slice(start, stop) for start, stop in bounds))
            return out

        places = {
            device: tuple(
                part.indices(size)[:2] for part, size in zip(index or (), shape, strict=True)
            )
            for device, index in sharding.addressable_devices_indices_map(shape).items()
        }
        distinct = list(dict.fromkeys(places.values()))
        with ThreadPoolExecutor(_READERS) as pool:
            shards = dict(zip(distinct, pool.map(shard, distinct), strict=True))
        arrays = [jax.device_put(shards[place], device) for device, place in places.items()]
        return jax.make_array_from_single_device_arrays(shape, sharding, arrays)

    def _vocabulary(self, name: str) -> Array:
        def fill(out: np.ndarray, where: Slices) -> None:
            rows = _clipped(where[0].start, len(out), self.config.vocab_size)
            self._read(out[: _length(rows)], name, rows)

        return self.place_shards(
            (self.vocab_rows, self.config.hidden_size), P(self.axes or None, None), fill
        )

    def _vector(self, name: str) -> Array:
        return self.place_shards(
            (self.config.hidden_size,), P(None), lambda out, where: self._read(out, name, *where)
        )

    def _place_layer(self, layer: int) -> Place:
        """Puts what belongs to one layer on the mesh."""

        def place(shape: tuple[int, ...], spec: P, fill: FillLayer) -> Array:
            return self.place_shards(shape, spec, lambda out, where: fill(out, where, layer))

        return place

    def _place_slots(self, layers: Sequence[int], slots: int) -> Place:
        """Puts what belongs to several layers on the mesh, stacked."""

        def place(shape: tuple[int, ...], spec: P, fill: FillLayer) -> Array:
            def fill_slots(out: np.ndarray, where: Slices) -> None:
                for part, index in zip(out, layers[where[0]], strict=False):
                    fill(part, where[1:], index)

            return self.place_shards((slots, *shape), P(LAYER, *spec), fill_slots)

        return place

    def _attention(self, layers: Sequence[int], head_axes: Axes, place: Place) -> Attention:
        layout, head_dim, hidden = (
            self._head_layout(head_axes),
            self.config.head_dim,
            self.config.hidden_size,
        )
        queries = layout.query_index.shape[1] * head_dim

        def fill_out(out: np.ndarray, where: Slices, layer: int) -> None:
            for rows, stored in _head_runs(layout.query_index[where[0].start // queries], head_dim):
                self._read(
                    out[rows].T,
                    f"model.layers.{layer}.self_attn.o_proj.weight",
                    slice(0, hidden),
                    stored,
                )

        norm = partial(self._layer_vector, size=head_dim, place=place)
        return Attention(
            self._qkv(layers, head_axes, place),
            out=place(
                (len(layout.kv_index) * queries, hidden), P(head_axes or None, None), fill_out
            ),
            head_norms=(norm("self_attn.q_norm"), norm("self_attn.k_norm"))
            if self.config.qk_norm
            else None,
            kv_heads=layout.kv_heads,
            group=layout.group,
        )

    def _qkv(self, layers: Sequence[int], head_axes: Axes, place: Place) -> Projection:
        layout, split = self._head_layout(head_axes), head_axes or None
        shards, head_dim, hidden = (
            len(layout.kv_index),
            self.config.head_dim,
            self.config.hidden_size,
        )
        fused = (layout.query_index.shape[1] + 2 * layout.kv_heads) * head_dim
        present = self.source.shapes()

        def fill(out: np.ndarray, shard: int, layer: int, kind: str) -> None:
            """[fused, ...]: a shard's queries, keys and values, one after another."""
            indices = layout.query_index[shard], layout.kv_index[shard], layout.kv_index[shard]
            start = 0
            for name, heads in zip("qkv", indices, strict=True):
                part = out[start : start + len(heads) * head_dim]
                for rows, stored in _head_runs(heads, head_dim):
                    self._read(
                        part[rows], f"model.layers.{layer}.self_attn.{name}_proj.{kind}", stored
                    )
                start += len(part)

        def fill_weight(out: np.ndarray, where: Slices, layer: int) -> None:
            fill(out.T, where[1].start // fused, layer, "weight")

        def fill_bias(out: np.ndarray, where: Slices, layer: int) -> None:
            if f"model.layers.{layer}.self_attn.q_proj.bias" in present:
                fill(out, where[0].start // fused, layer, "bias")

        biased = any(f"model.layers.{layer}.self_attn.q_proj.bias" in present for layer in layers)
        return Projection(
            norm=self._layer_vector("input_layernorm", hidden, place),
            weight=place((hidden, shards * fused), P(None, split), fill_weight),
            bias=place((shards * fused,), P(split), fill_bias) if biased else None,
            eps=self.config.rms_norm_eps,
        )

    def _layer_vector(self, name: str, size: int, place: Place) -> Array:
        def fill(out: np.ndarray, where: Slices, layer: int) -> None:
            self._read(out, f"model.layers.{layer}.{name}.weight", *where)

        return place((size,), P(None), fill)

    def _mlp_sizes(self) -> tuple[int, int, int, int]:
        """Sizes of the hidden state, of the inner one and of a shard's part of it, and the number of shards."""
        shards, inner = axes_size(self.mesh, self.axes), self.config.intermediate_size
        return self.config.hidden_size, inner, -(-inner // shards), shards

    def _head_layout(self, axes: Axes) -> HeadLayout:
        shards = axes_size(self.mesh, axes)
        return head_layout(self.config.num_attention_heads, self.config.num_key_value_heads, shards)

    def _read(self, out: np.ndarray, name: str, *window: slice) -> None:
        read_into(out, self.source, name, window)


def _aligned_zeros(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = prod(shape) * dtype.itemsize
    memory = np.zeros(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def _clipped(start: int, size: int, limit: int) -> slice:
    """Part of start to start + size below the limit; beyond it is padding."""
    return slice(min(start, limit), min(start + size, limit))


def _length(part: slice) -> int:
    return part.stop - part.start


def _head_runs(heads: np.ndarray, head_dim: int) -> Iterator[tuple[slice, slice]]:
    """Rows of a shard and the stored rows that they are, for each run of heads that follow each other; not for -1."""
    starts = [0, *(np.flatnonzero(np.diff(heads) != 1) + 1), len(heads)]
    for start, stop in pairwise(starts):
        run = [head for head in heads[start:stop] if head >= 0]
        if run:
            first = stop - len(run)
            yield (
                slice(first * head_dim, stop * head_dim),
                slice(run[0] * head_dim, (run[-1] + 1) * head_dim),
            )
