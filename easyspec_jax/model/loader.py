"""From a checkpoint's tensors to modules whose arrays lie on the mesh, every shard read by itself.

A shard's memory is made once, in its final layout and type; what fills it is read in blocks of a few MiB. So no tensor
is ever whole in host memory, unless a device is to have all of it.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from math import prod

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from easyspec_jax.config import ModelConfig
from easyspec_jax.families import EMBEDDING, FINAL_NORM, HEAD
from easyspec_jax.mesh import LAYER, TENSOR, Axes, axes_size
from easyspec_jax.model.attention import Attention
from easyspec_jax.model.sharding import HeadLayout, head_layout
from easyspec_jax.model.transformer import MLP, Block, Decoder, Layer
from easyspec_jax.sources import TensorSource, Window, read_into

Fill = Callable[[np.ndarray, Window], None]
"""Puts what is not zero of a shard into its memory: an array in its final layout and type, and where it lies."""

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

        def place(shape: tuple[int, ...], spec: P, fill: Callable[[np.ndarray, Window, int], None]) -> Array:
            return self.place_shards(shape, spec, lambda out, where: fill(out, where, index))

        return self._attention(self.axes, place)

    def stacked_attention(self, layers: Sequence[int], slots: int) -> Attention:
        """The attention of several layers on an axis of `slots` that is split over "layer", heads over "tensor".

        slots counts those of all devices; the ones beyond the layers are zero.
        """

        def place(shape: tuple[int, ...], spec: P, fill: Callable[[np.ndarray, Window, int], None]) -> Array:
            def fill_slots(out: np.ndarray, where: Window) -> None:
                for part, index in zip(out, layers[where[0]], strict=False):
                    fill(part, where[1:], index)

            return self.place_shards((slots, *shape), P(LAYER, *spec), fill_slots)

        return self._attention((TENSOR,), place)

    def mlp(self, index: int) -> MLP:
        """A layer's feed-forward part, its columns padded to whole shards."""
        shards, split = axes_size(self.mesh, self.axes), self.axes or None
        prefix, hidden, inner = f"model.layers.{index}.", self.config.hidden_size, self.config.intermediate_size
        width = -(-inner // shards)

        def fill_gate_up(out: np.ndarray, where: Window) -> None:
            part = _clipped(where[1].start // 2, width, inner)
            for name, columns in (("gate", out[:, :width]), ("up", out[:, width:])):
                self._read(columns[:, : _length(part)].T, f"{prefix}mlp.{name}_proj.weight", part)

        def fill_down(out: np.ndarray, where: Window) -> None:
            part = _clipped(where[1].start, width, inner)
            self._read(out[:, : _length(part)], f"{prefix}mlp.down_proj.weight", slice(0, hidden), part)

        return MLP(
            norm=self._vector(f"{prefix}post_attention_layernorm.weight"),
            gate_up=self.place_shards((hidden, 2 * width * shards), P(None, split), fill_gate_up),
            down=self.place_shards((hidden, width * shards), P(None, split), fill_down),
            eps=self.config.rms_norm_eps,
        )

    def place(self, array: np.ndarray, spec: P) -> Array:
        """A host array on the mesh; each process hands over only the shards of its own devices."""
        return self.place_shards(array.shape, spec, lambda out, where: np.copyto(out, array[where], casting="unsafe"))

    def place_shards(self, shape: tuple[int, ...], spec: P, fill: Fill) -> Array:
        """An array on the mesh, of which each process makes only the shards of its own devices."""
        sharding = NamedSharding(self.mesh, spec)

        def shard(bounds: tuple[tuple[int, int], ...]) -> np.ndarray:
            out = _aligned_zeros(tuple(stop - start for start, stop in bounds), self.dtype)
            fill(out, tuple(slice(start, stop) for start, stop in bounds))
            return out

        places = {
            device: tuple(part.indices(size)[:2] for part, size in zip(index or (), shape, strict=True))
            for device, index in sharding.addressable_devices_indices_map(shape).items()
        }
        distinct = list(dict.fromkeys(places.values()))
        with ThreadPoolExecutor(_READERS) as pool:
            shards = dict(zip(distinct, pool.map(shard, distinct), strict=True))
        arrays = [jax.device_put(shards[place], device) for device, place in places.items()]
        return jax.make_array_from_single_device_arrays(shape, sharding, arrays)

    def _vocabulary(self, name: str) -> Array:
        def fill(out: np.ndarray, where: Window) -> None:
            rows = _clipped(where[0].start, len(out), self.config.vocab_size)
            self._read(out[: _length(rows)], name, rows)

        return self.place_shards((self.vocab_rows, self.config.hidden_size), P(self.axes or None, None), fill)

    def _vector(self, name: str) -> Array:
        return self.place_shards((self.config.hidden_size,), P(None), lambda out, where: self._read(out, name, *where))

    def _attention(
        self,
        head_axes: Axes,
        place: Callable[[tuple[int, ...], P, Callable[[np.ndarray, Window, int], None]], Array],
    ) -> Attention:
        """place: puts an array on the mesh of which it knows how to fill a layer's part, and which layers it has."""
        layout, split = self._head_layout(head_axes), head_axes or None
        shards, head_dim, hidden = len(layout.kv_index), self.config.head_dim, self.config.hidden_size
        queries = layout.query_index.shape[1] * head_dim
        fused = queries + 2 * layout.kv_heads * head_dim

        def fill_fused(out: np.ndarray, shard: int, layer: int, kind: str) -> None:
            """[fused, ...]: a shard's queries, keys and values, one after another."""
            indices = layout.query_index[shard], layout.kv_index[shard], layout.kv_index[shard]
            start = 0
            for name, heads in zip("qkv", indices, strict=True):
                part = out[start : start + len(heads) * head_dim]
                for rows, stored in _head_runs(heads, head_dim):
                    self._read(part[rows], f"model.layers.{layer}.self_attn.{name}_proj.{kind}", stored)
                start += len(part)

        def fill_qkv(out: np.ndarray, where: Window, layer: int) -> None:
            fill_fused(out.T, where[1].start // fused, layer, "weight")

        def fill_bias(out: np.ndarray, where: Window, layer: int) -> None:
            fill_fused(out, where[0].start // fused, layer, "bias")

        def fill_out(out: np.ndarray, where: Window, layer: int) -> None:
            for rows, stored in _head_runs(layout.query_index[where[0].start // queries], head_dim):
                self._read(out[rows].T, f"model.layers.{layer}.self_attn.o_proj.weight", slice(0, hidden), stored)

        def vector(name: str, size: int) -> Array:
            def fill(out: np.ndarray, where: Window, layer: int) -> None:
                self._read(out, f"model.layers.{layer}.{name}.weight", *where)

            return place((size,), P(None), fill)

        norms = None
        if self.config.qk_norm:
            norms = vector("self_attn.q_norm", head_dim), vector("self_attn.k_norm", head_dim)
        return Attention(
            norm=vector("input_layernorm", hidden),
            qkv=place((hidden, shards * fused), P(None, split), fill_qkv),
            bias=place((shards * fused,), P(split), fill_bias) if self.config.qkv_bias else None,
            out=place((shards * queries, hidden), P(split, None), fill_out),
            head_norms=norms,
            kv_heads=layout.kv_heads,
            group=layout.group,
            eps=self.config.rms_norm_eps,
        )

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
    """What of start to start + size there is below the limit; beyond it is padding."""
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
            yield slice(first * head_dim, stop * head_dim), slice(run[0] * head_dim, (run[-1] + 1) * head_dim)
