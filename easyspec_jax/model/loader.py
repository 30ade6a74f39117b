"""Load modules from a checkpoint: which tensors their arrays are made of, and how they are split.

`arrays.py` reads the arrays.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import gcd

import numpy as np
from jaxtyping import Array

from easyspec_jax.arithmetic import ceil_div, packed_width, round_up
from easyspec_jax.checkpoint.config import MixtureConfig, ModelConfig
from easyspec_jax.checkpoint.families import EMBEDDING, FINAL_NORM, HEAD, ROUTER, SINKS
from easyspec_jax.checkpoint.quantized import offset_name
from easyspec_jax.checkpoint.translated import UNKNOWN
from easyspec_jax.model.arrays import ArrayLoader
from easyspec_jax.model.attention import Attention
from easyspec_jax.model.experts import Experts, FeedForward, reads
from easyspec_jax.model.head_norms import FullNorms, HeadNorms
from easyspec_jax.model.matrix import Matrix
from easyspec_jax.model.norm import RMSNorm
from easyspec_jax.model.projection import Output, Projection
from easyspec_jax.model.shard_plan import (
    ArrayPlan,
    bias_of,
    bias_once,
    matrix,
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
from easyspec_jax.options import KVDType
from easyspec_jax.parallel.mesh import LAYER, TENSOR, Axes, axes_size

_LAYER = "model.layers.{}."
_MLP_NORM = "post_attention_layernorm"
# How much wider than its share a device's part may be, so that it ends where a group ends.
_MOST_PADDED = 9 / 8


@dataclass(frozen=True, kw_only=True)
class Loader(ArrayLoader):
    """Loads the modules of a model, their arrays placed on the mesh in the final layout and type.

    Attributes:
        config: The model.
        axes: Mesh axes that the dense parts are split over: all but stacked attentions.
        vocab_rows: Rows of the embedding and the head after padding.
        num_ids: Number of token ids; higher ids never get probability.
        kv_dtype: Type of the caches; "auto" is `dtype`.
        tokens: Tokens of the passes that experts are split for; None if devices always have shares
            of all.
    """

    config: ModelConfig
    axes: Axes
    vocab_rows: int
    num_ids: int
    kv_dtype: KVDType = "auto"
    tokens: int | None = None

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
        group = self._group_of(down)
        by_group = 32 * (1 + (offset_name(down) in self._dtypes))
        # A row of gate, one of up and a column of down. Only down's groups are cut by shares.
        return 3 * bits + (by_group / gcd(group, width) if group else 0)

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
        group = self._group_of(down)
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
