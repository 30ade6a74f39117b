"""Load modules from a checkpoint, each shard of their arrays read by itself.

`shard_plan.py` says which windows of which tensors make up a shard. Here a shard's memory is made
once, in its final layout and type, and filled in blocks of a few MiB. So no tensor is ever whole
in host memory, unless one device needs all of it.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from math import gcd, prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from easyspec_jax.arithmetic import ceil_div, packed_width, round_up
from easyspec_jax.checkpoint.config import MixtureConfig, ModelConfig
from easyspec_jax.checkpoint.families import EMBEDDING, FINAL_NORM, HEAD, ROUTER, SINKS
from easyspec_jax.checkpoint.quantized import OFFSET, Dequantized, Quantized, scale_name
from easyspec_jax.checkpoint.rounding import INTEGERS
from easyspec_jax.checkpoint.tensors import Slices, TensorSource, window_blocks
from easyspec_jax.checkpoint.translated import UNKNOWN
from easyspec_jax.model.attention import Attention
from easyspec_jax.model.experts import Experts, FeedForward, reads
from easyspec_jax.model.head_norms import FullNorms, HeadNorms
from easyspec_jax.model.matrix import Matrix
from easyspec_jax.model.norm import RMSNorm
from easyspec_jax.model.projection import Output, Projection
from easyspec_jax.model.shard_plan import (
    ArrayPlan,
    Copy,
    bias_of,
    bias_once,
    matrix,
    scales_of,
    split_vector,
    vector,
)
from easyspec_jax.model.sharding import (
    Entries,
    HeadLayout,
    even_entries,
    head_entries,
    head_layout,
)
from easyspec_jax.model.transformer import MLP, Block, Decoder, Layer, PostNorms
from easyspec_jax.options import KVDType, Weights
from easyspec_jax.parallel.mesh import LAYER, TENSOR, Axes, axes_size
from easyspec_jax.parallel.platforms import PlatformSettings, settings_for

_LAYER = "model.layers.{}."
_MLP_NORM = "post_attention_layernorm"
_READERS = 8
# How much wider than its share a device's part may be, so that it ends where a group ends.
_MOST_PADDED = 9 / 8
# Bytes. On a CPU, XLA takes over memory that starts at a multiple of this, and copies any other.
_ALIGNMENT = 64


@dataclass(frozen=True)
class Loader:
    """Loads the modules of a model, their arrays placed on the mesh in the final layout and type.

    Attributes:
        source: Tensors of the checkpoint.
        config: The model.
        mesh: Devices.
        axes: Mesh axes that the dense parts are split over: all but stacked attentions.
        dtype: Type of every array but quantized matrices and their scales.
        vocab_rows: Rows of the embedding and the head after padding.
        num_ids: Number of token ids; higher ids never get probability.
        settings: Which kernels the modules use; None for those of the mesh's devices.
        weights: Type of the matrices; None for that of the checkpoint if it is quantized, else
            `dtype`.
        kv_dtype: Type of the caches; "auto" is `dtype`.
        tokens: Tokens of the passes that experts are split for; None if devices always have shares
            of all.
    """

    source: TensorSource
    config: ModelConfig
    mesh: Mesh
    axes: Axes
    dtype: np.dtype
    vocab_rows: int
    num_ids: int
    settings: PlatformSettings | None = None
    weights: Weights | None = None
    kv_dtype: KVDType = "auto"
    tokens: int | None = None

    @cached_property
    def _kept(self) -> TensorSource:
        """The tensors in the types that they are kept in on the devices."""
        if self.weights is None:
            return self.source
        if self.weights in INTEGERS:
            return Quantized(self.source, self.weights)
        return Dequantized(self.source)

    @cached_property
    def _dtypes(self) -> Mapping[str, str]:
        """Types of these tensors. Some sources make a new list at every call."""
        return self._kept.dtypes()

    @property
    def platform(self) -> str:
        """Platform of the devices, as JAX names it."""
        return self.mesh.devices.flat[0].platform

    @property
    def kernels(self) -> PlatformSettings:
        """Settings that say which kernels the modules use."""
        return self.settings or settings_for(self.mesh.devices.flat[0])

    def decoder(self, blocks: Sequence[Block]) -> Decoder:
        """Load the embedding, final norm and head, and put them around blocks."""
        return Decoder(
            embedding=self._vocabulary(EMBEDDING),
            blocks=blocks,
            norm=self._norm(FINAL_NORM, self.config.hidden_size),
            head=None if self.config.tie_word_embeddings else self._vocabulary(HEAD),
            config=self.config,
            axes=self.axes,
            num_ids=self.num_ids,
            unknown=self._unknown(),
            parts=self.kernels.reads_parts,
        )

    def layer(self, index: int) -> Layer:
        """Load one transformer layer, split over the dense axes."""
        return Layer(
            self.attention(index),
            self.mlp(index),
            self.post_norms(index),
            axes=self.axes,
            kind=self.config.kind_of(index),
        )

    def attention(self, index: int) -> Attention:
        """Load one layer's attention, its heads split over the dense axes."""
        return self._attention(self.axes, (index,))

    def stacked_attention(self, layers: Sequence[int], slots: int) -> Attention:
        """Load the attentions of several layers, stacked.

        Args:
            layers: Numbers of the layers.
            slots: Length of the stack, over all devices of the mesh axis "layer". Slots after the
                last layer are zero. Heads are split over "tensor".
        """
        return self._attention((TENSOR,), layers, slots)

    def stacked_qkv(self, layers: Sequence[int], slots: int) -> Projection:
        """Load only the projection of stacked_attention().

        Where some layers have biases, those of the others are zero.
        """
        return self._qkv((TENSOR,), layers, slots)

    def post_norms(self, index: int) -> PostNorms:
        """Load the norms of one layer's outputs, in families that have them."""
        if not self.config.post_norm:
            return PostNorms()
        of_attention, of_mlp = (
            self._norm(f"{_LAYER}{part}.output_norm.weight", self.config.hidden_size, (index,))
            for part in ("self_attn", "mlp")
        )
        return PostNorms(of_attention, of_mlp)

    def mlp(self, index: int) -> MLP | Experts:
        """Load one layer's feed-forward part or parts, their columns padded to whole shards."""
        mixture = self.config.mixture
        if mixture is not None and index not in mixture.dense_layers:
            return self._experts(index, mixture)
        entries = self._mlp_entries(index)
        return MLP(
            self.gate_up(index),
            self._output("mlp.down_proj", entries, self.axes, (index,)),
            activation=self.config.hidden_act,
            fused=self.kernels.fused_mlp,
            interpret=self.platform == "cpu",
        )

    def gate_up(self, index: int) -> Projection:
        """Load only the projection of mlp()."""
        entries = self._mlp_entries(index)
        tensors = _gate_and_up(f"{_LAYER}mlp.", entries)
        return self._projection(_MLP_NORM, tensors, self.axes, (index,))

    def _experts(self, index: int, mixture: MixtureConfig) -> Experts:
        """Load one layer's mixture of experts."""
        hidden, count = self.config.hidden_size, mixture.num_experts
        of_expert, every = f"{_LAYER}mlp.experts.{{}}.", even_entries(count, count, shards=1)
        down_proj = f"{of_expert}down_proj.weight".format(index, 0)
        inner = mixture.moe_intermediate_size
        entries = self._inner_entries(inner, down_proj)
        whole = self._deals_out_experts(mixture, down_proj, entries.shape[1])
        dealt, axes = (self.axes, ()) if whole else ((), self.axes)
        if whole:
            entries = even_entries(inner, inner, shards=1)
        gate_up = matrix(_gate_and_up(of_expert, entries), hidden, axes, dimension=0)
        down = matrix({f"{of_expert}down_proj.weight": entries}, hidden, axes, dimension=1)
        down_bias = bias_once(f"{of_expert}down_proj.bias", hidden, axes, len(entries))

        def every_expert(plan: ArrayPlan) -> ArrayPlan:
            return plan.for_experts(index, count, dealt, axes_size(self.mesh, dealt))

        parts = FeedForward(
            self.matrix(every_expert(gate_up)),
            self.matrix(every_expert(down)),
            self._bias(every_expert(bias_of(gate_up))),
            self._bias(every_expert(down_bias)),
        )
        return Experts(
            self._projection(_MLP_NORM, {f"{_LAYER}{ROUTER}": every}, (), (index,)),
            parts,
            per_token=mixture.num_experts_per_tok,
            normalizes=mixture.norm_topk_prob,
            activation=self.config.hidden_act,
            sorts=self.kernels.sorts_by_expert,
            axes=dealt,
        )

    def _deals_out_experts(self, mixture: MixtureConfig, down: str, width: int) -> bool:
        """Return whether devices read less if they have whole experts, not shares of all.

        Args:
            mixture: The experts.
            down: Name of an expert's output matrix.
            width: Inner channels of a share.
        """
        if self.tokens is None:
            return False
        inner = mixture.moe_intermediate_size
        held = ceil_div(mixture.num_experts, axes_size(self.mesh, self.axes))
        whole = reads(self.tokens, mixture, inner, held) * self._bits(down, inner)
        return whole < reads(self.tokens, mixture, width) * self._bits(down, width)

    def _bits(self, down: str, width: int) -> float:
        """Count the bits of an inner channel for each hidden one, in shares of some width."""
        bits = 8 * packed_width(np.dtype(self._dtypes[down]))
        group = self._group_of(down) if scale_name(down) in self._dtypes else None
        # A row of gate, one of up and a column of down. Only down's groups are cut by shares.
        return 3 * bits + (32 / gcd(group, width) if group else 0)

    def place(self, array: np.ndarray, spec: P) -> Array:
        """Put a host array on the mesh, in the loader's type.

        Args:
            array: The whole array. Each process hands over only the shards of its own devices.
            spec: Mesh axes that each dimension is split over. They have to divide it.
        """

        def shard(bounds: Any) -> np.ndarray:
            memory = _aligned_zeros(array[bounds].shape, self.dtype)
            memory[...] = array[bounds]
            return memory

        return jax.make_array_from_callback(array.shape, NamedSharding(self.mesh, spec), shard)

    def load(
        self, plan: ArrayPlan, dtype: np.dtype | None = None, source: TensorSource | None = None
    ) -> Array:
        """Carry out a plan. Each process makes the shards of its own devices, each of them once.

        Args:
            plan: What goes where.
            dtype: Type of the array; by default the loader's.
            source: Where the tensors come from; by default the checkpoint, quantized or not.
        """
        source, dtype = source or self._kept, dtype or self.dtype
        sharding = NamedSharding(self.mesh, plan.spec)
        own = set()
        for bounds in sharding.addressable_devices_indices_map(plan.shape).values():
            own.add(plan.shard_at(bounds or ()))
        shards = {shard: _aligned_zeros(plan.shard_shape, dtype) for shard in own}

        def fill(block: tuple[np.ndarray, str, Slices]) -> None:
            out, tensor, window = block
            out[...] = source.read(tensor, window)

        # Threads take blocks rather than shards, so that a single device is filled by all of them.
        with ThreadPoolExecutor(_READERS) as pool:
            for _ in pool.map(fill, _blocks(plan.copies, shards)):
                pass
        # A CPU's devices keep this very memory, and replicas of a shard share it.
        return jax.make_array_from_callback(
            plan.shape, sharding, lambda bounds: shards[plan.shard_at(bounds or ())]
        )

    def matrix(self, plan: ArrayPlan) -> Matrix:
        """Carry out the plan of a matrix, and of its scales and offsets if it is quantized.

        Where only some of the tensors it is made of are quantized, all become floats.
        """
        dtypes, tensors = self._dtypes, {copy.tensor for copy in plan.copies}
        integers = {dtypes[tensor] for tensor in tensors} & INTEGERS.keys()
        if not all(dtypes[tensor] in INTEGERS for tensor in tensors):
            source = Dequantized(self._kept) if integers else self._kept
            dtype = jnp.dtype(jnp.bfloat16) if self.weights == "bfloat16" else self.dtype
            return Matrix(self.load(plan, dtype, source))
        # Values of four bits are values of eight bits too.
        values = self.load(plan, jnp.dtype("int8" if "int8" in integers else "int4"))
        groups = {tensor: self._group_of(tensor) for tensor in tensors}
        scale = self.load(scales_of(plan, groups), np.dtype(np.float32))
        # Where only some of the tensors have offsets, those of the others are zero.
        offsets = scales_of(plan, groups, OFFSET).only(self._kept.shapes())
        offset = self.load(offsets, np.dtype(np.float32)) if offsets.copies else None
        return Matrix(
            values,
            scale,
            offset,
            fused=self.kernels.fused_groups,
            interpret=self.platform == "cpu",
            pairs=self.kernels.pairs_tokens,
        )

    def _group_of(self, tensor: str) -> int | None:
        """Return how many columns of a quantized tensor share a scale; None if all of a row do."""
        shapes = self._kept.shapes()
        groups = shapes[scale_name(tensor)][1]
        return None if groups == 1 else shapes[tensor][1] // groups

    def _vocabulary(self, tensor: str) -> Matrix:
        shards = axes_size(self.mesh, self.axes)
        # 300 ids in 1024 rows on 8 shards: the first three have 128, 128 and 44 of them.
        rows = even_entries(self.config.vocab_size, self.vocab_rows // shards, shards)
        return self.matrix(matrix({tensor: rows}, self.config.hidden_size, self.axes, dimension=0))

    def _unknown(self) -> Array | None:
        """Load what keeps a draft from ids that its own vocabulary lacks, if there are any."""
        if UNKNOWN not in self._dtypes:
            return None
        shards = axes_size(self.mesh, self.axes)
        rows = even_entries(self.config.vocab_size, self.vocab_rows // shards, shards)
        return self.load(split_vector(UNKNOWN, rows, self.axes))

    def _attention(self, axes: Axes, layers: Sequence[int], slots: int | None = None) -> Attention:
        """Load one layer's attention or, with slots, a stack of several."""
        layout = self._head_layout(axes)
        columns = head_entries(layout.query_index, self.config.head_dim)
        return Attention(
            self._qkv(axes, layers, slots),
            self._output("self_attn.o_proj", columns, axes, layers, slots),
            self._head_norms(axes, layers, slots),
            kv_heads=layout.kv_heads,
            group=layout.group,
            sinks=self._sinks(axes, layers, slots),
            scale=self.config.attention_multiplier,
            soft_cap=self.config.attn_logit_softcapping,
            kv_dtype=self.kv_dtype,
            split_keys_from=self.kernels.split_keys_from,
            interpret=self.platform == "cpu",
        )

    def _head_norms(
        self, axes: Axes, layers: Sequence[int], slots: int | None
    ) -> HeadNorms | FullNorms | None:
        """Load the norms of queries and keys."""
        query, key = f"{_LAYER}self_attn.q_norm.weight", f"{_LAYER}self_attn.k_norm.weight"
        head_dim, heads = self.config.head_dim, self._head_layout(axes)
        if self.config.qk_norm == "none":
            return None
        if self.config.qk_norm == "head":
            return HeadNorms(
                self._norm(query, head_dim, layers, slots), self._norm(key, head_dim, layers, slots)
            )
        of_queries = split_vector(query, head_entries(heads.query_index, head_dim), axes)
        of_keys = split_vector(key, head_entries(heads.kv_index, head_dim), axes)
        return FullNorms(
            self._load(of_queries, layers, slots),
            self._load(of_keys, layers, slots),
            kv_index=heads.kv_index,
            eps=self.config.rms_norm_eps,
            sizes=(self.config.num_attention_heads, self.config.num_key_value_heads),
            axes=axes,
        )

    def _sinks(self, axes: Axes, layers: Sequence[int], slots: int | None) -> Array | None:
        """Load the sinks of a share's heads, in families that have them."""
        if not self.config.attention_sinks:
            return None
        heads = self._head_layout(axes).query_index
        return self._load(split_vector(f"{_LAYER}{SINKS}", heads, axes), layers, slots)

    def _output(
        self,
        name: str,
        columns: Entries,
        axes: Axes,
        layers: Sequence[int],
        slots: int | None = None,
    ) -> Output:
        """Load the matrix that leads out of an attention or MLP, and its bias."""
        hidden = self.config.hidden_size
        weight = matrix({f"{_LAYER}{name}.weight": columns}, hidden, axes, dimension=1)
        bias = bias_once(f"{_LAYER}{name}.bias", hidden, axes, shards=len(columns))
        return Output(
            self.matrix(self._of_layers(weight, layers, slots)),
            self._bias(self._of_layers(bias, layers, slots)),
            multiplier=self.config.residual_multiplier,
        )

    def _qkv(self, axes: Axes, layers: Sequence[int], slots: int | None) -> Projection:
        layout, prefix = self._head_layout(axes), f"{_LAYER}self_attn."
        queries = head_entries(layout.query_index, self.config.head_dim)
        keys = head_entries(layout.kv_index, self.config.head_dim)
        tensors = {
            f"{prefix}q_proj.weight": queries,
            f"{prefix}k_proj.weight": keys,
            f"{prefix}v_proj.weight": keys,
        }
        return self._projection("input_layernorm", tensors, axes, layers, slots)

    def _projection(
        self,
        norm: str,
        tensors: Mapping[str, Entries],
        axes: Axes,
        layers: Sequence[int],
        slots: int | None = None,
    ) -> Projection:
        """Load a pre-norm and the matrix that has rows of these tensors."""
        hidden = self.config.hidden_size
        weight = matrix(tensors, hidden, axes, dimension=0)
        has_norm = self.config.pre_norm
        return Projection(
            self._norm(f"{_LAYER}{norm}.weight", hidden, layers, slots) if has_norm else None,
            self.matrix(self._of_layers(weight, layers, slots)),
            self._bias(self._of_layers(bias_of(weight), layers, slots)),
            dtype=self.dtype,
        )

    def _bias(self, plan: ArrayPlan) -> Array | None:
        """Carry out the plan of a bias, if the checkpoint has any of its tensors."""
        # Where a layer of a stack has no bias, its part stays zero.
        plan = plan.only(self.source.shapes())
        return self.load(plan) if plan.copies else None

    def _norm(
        self, weight: str, size: int, layers: Sequence[int] = (0,), slots: int | None = None
    ) -> RMSNorm:
        """Load a norm whose weight every device holds."""
        return RMSNorm(
            self._load(vector(weight, size), layers, slots),
            eps=self.config.rms_norm_eps,
            offset=self.config.norm_offset,
        )

    def _load(self, plan: ArrayPlan, layers: Sequence[int], slots: int | None) -> Array:
        return self.load(self._of_layers(plan, layers, slots))

    def _of_layers(self, plan: ArrayPlan, layers: Sequence[int], slots: int | None) -> ArrayPlan:
        if slots is None:
            return plan.for_layer(layers[0])
        return plan.stacked(layers, slots, self.mesh.shape[LAYER])

    def _mlp_entries(self, index: int) -> Entries:
        down = f"{_LAYER}mlp.down_proj.weight".format(index)
        return self._inner_entries(self.config.intermediate_size, down)

    def _inner_entries(self, inner: int, down: str) -> Entries:
        """Deal a feed-forward part's inner entries out to the shards.

        Args:
            inner: How many there are.
            down: Name of the matrix that has a column for each.
        """
        # 60 entries on 8 shards: the width is 8, and the last shard has 4 of padding.
        shards = axes_size(self.mesh, self.axes)
        width = ceil_div(inner, shards)
        group = self._group_of(down) if scale_name(down) in self._dtypes else None
        # A shard that ends within a group of columns that share a scale makes all groups as narrow
        # as its part. So round up to whole groups, unless that is much, or leaves a shard empty.
        whole = round_up(width, group or 1)
        if whole <= _MOST_PADDED * width and (shards - 1) * whole < inner:
            width = whole
        return even_entries(inner, width, shards)

    def _head_layout(self, axes: Axes) -> HeadLayout:
        shards = axes_size(self.mesh, axes)
        return head_layout(self.config.num_attention_heads, self.config.num_key_value_heads, shards)


def _gate_and_up(prefix: str, entries: Entries) -> dict[str, Entries]:
    return {f"{prefix}gate_proj.weight": entries, f"{prefix}up_proj.weight": entries}


def _blocks(
    copies: Sequence[Copy], shards: Mapping[int, np.ndarray]
) -> Iterator[tuple[np.ndarray, str, Slices]]:
    """Split copies into blocks of a few MiB: a place in a shard, a tensor and its slices."""
    for copy in copies:
        if copy.shard in shards:
            # A view of the shard: what is put into it lands in the shard.
            out = shards[copy.shard][copy.target]
            for rows, window in window_blocks(out.shape, copy.source):
                yield out[rows], copy.tensor, window


def _aligned_zeros(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return zeros that a CPU's devices can take over. Pages are not in memory until written."""
    size = prod(shape) * dtype.itemsize
    memory = np.zeros(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)
