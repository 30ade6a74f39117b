"""Models for benchmarks: known shapes with weights made on the spot, here and for transformers.

Weights are random, or such that a text has a known acceptance at full cost. In the latter case
attention and feed-forward outputs are zero, so a token's hidden state is its embedding, and the
head maps it to the one token that follows.
"""

import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any

import jax
import ml_dtypes  # noqa: F401  (teaches NumPy bfloat16)
import numpy as np
from jax.sharding import Mesh

from easyspec_jax.checkpoint.canonical import expected_shapes
from easyspec_jax.checkpoint.config import ModelConfig, model_config, read_json
from easyspec_jax.checkpoint.families import EMBEDDING, HEAD
from easyspec_jax.checkpoint.tensors import Slices
from easyspec_jax.draft.grouping import Group, Layout
from easyspec_jax.draft.layer_group import load_draft
from easyspec_jax.engine.abstract import bytes_of
from easyspec_jax.model.attention import Attention
from easyspec_jax.model.experts import Experts
from easyspec_jax.model.loader import Loader
from easyspec_jax.model.sharding import padded_vocab_size
from easyspec_jax.model.transformer import MLP, Decoder
from easyspec_jax.options import Weights
from easyspec_jax.parallel.mesh import ALL_AXES
from easyspec_jax.parallel.platforms import PlatformSettings
from easyspec_jax.plan.configurations import BUNDLED

Fields = dict[str, Any]
"""The content of a config.json."""


def _bundled(name: str, **others: Any) -> Fields:
    """Return a bundled configuration, without the tokens that would end a text."""
    return read_json(BUNDLED)[name] | {"eos_token_id": None} | others


SMOLLM2_135M = {
    "model_type": "llama",
    "num_hidden_layers": 30,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "rope_theta": 1e5,
    "bos_token_id": None,
    "eos_token_id": None,
}
SMALL = SMOLLM2_135M | {
    "num_hidden_layers": 12,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}

TINY = SMOLLM2_135M | {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 384,
    "max_position_embeddings": 1024,
}

SHAPES: dict[str, tuple[Fields, Fields]] = {
    "tiny": (TINY, TINY | {"num_hidden_layers": 5, "hidden_size": 48}),
    "cpu": (SMOLLM2_135M, SMALL),
    "h200-8b-1b": (_bundled("Llama-3.1-8B"), _bundled("Llama-3.2-1B")),
    # Assisted generation wants as many ids in the draft as in the target: 152,064, not 151,936.
    "h200-32b-1.5b": (_bundled("Qwen2.5-32B"), _bundled("Qwen2.5-1.5B", vocab_size=152064)),
}
"""Target and draft, which share their token ids. "tiny" is for rehearsals: it measures nothing."""


@dataclass(frozen=True)
class Walk:
    """A text in which every token has one successor, and a draft that knows some of them.

    Attributes:
        order: All ids, int [vocabulary]; each is followed by the next, the last by the first.
        agrees: bool [vocabulary]; whether the draft knows the successor of an id.
    """

    order: np.ndarray
    agrees: np.ndarray

    @classmethod
    def of(cls, vocab_size: int, agreement: float, seed: int = 0) -> "Walk":
        """Draw a random order of all ids, on about the given share of which the models agree."""
        rng = np.random.default_rng(seed)
        agrees = rng.random(vocab_size) < agreement
        if np.sum(~agrees) == 1:  # its successor is the only one left
            agrees[:] = True
        return cls(rng.permutation(vocab_size), agrees)

    def text(self, start: int, count: int) -> list[int]:
        """Return `count` tokens of the text, beginning with the start-th."""
        return self.order[np.arange(start, start + count) % len(self.order)].tolist()

    @property
    def target(self) -> np.ndarray:
        """Each id's successor, int [vocabulary]."""
        successor = np.empty_like(self.order)
        successor[self.order] = np.roll(self.order, -1)
        return successor

    @property
    def draft(self) -> np.ndarray:
        """The draft's guess of it: also a permutation, wrong wherever it does not agree."""
        successor, (wrong,) = self.target, np.nonzero(~self.agrees)
        successor[wrong] = np.roll(successor[wrong], 1)
        return successor


@dataclass(frozen=True)
class Synthetic:
    """A TensorSource of made-up tensors, the same in every layer.

    Attributes:
        successor: The greedy choice after every id, by an untied head; None for random weights.
    """

    config: ModelConfig
    dtype: np.dtype
    successor: np.ndarray | None = None

    def dtypes(self) -> Mapping[str, str]:
        return dict.fromkeys(self._shapes, self.dtype.name)

    def read(self, name: str, window: Slices = ()) -> np.ndarray:
        shape = self._shapes[name]
        rows = window[0] if window else slice(0, shape[0])
        return self._rows(name, shape, rows)[(slice(None), *window[1:])]

    def _rows(self, name: str, shape: tuple[int, ...], rows: slice) -> np.ndarray:
        chosen = (rows.stop - rows.start, *shape[1:])
        if "norm" in name:
            return np.ones(chosen, self.dtype)
        if self.successor is not None:
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                return np.zeros(chosen, self.dtype)
            if name == EMBEDDING:
                return self._signs[rows].astype(self.dtype)
            if name == HEAD:
                # The row with an embedding's signs is that of the token to come.
                return self._signs[np.argsort(self.successor)[rows]].astype(self.dtype)
        block = self._block(re.sub(r"layers\.\d+", "layers", name), shape)
        return np.resize(np.roll(block, -rows.start * prod(shape[1:])), chosen)

    def _block(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Return a million numbers to repeat, and a few more so that rows differ.

        Billions of draws would take minutes.
        """
        if name not in self._blocks:
            rng = np.random.default_rng(zlib.crc32(name.encode()))
            scale = shape[-1] ** -0.5
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                scale *= (2 * self.config.num_hidden_layers) ** -0.5
            block = scale * rng.standard_normal(min(prod(shape), 1_000_003), np.float32)
            self._blocks[name] = block.astype(self.dtype)
        return self._blocks[name]

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return expected_shapes(self.config)

    @cached_property
    def _blocks(self) -> dict[str, np.ndarray]:
        return {}

    @cached_property
    def _signs(self) -> np.ndarray:
        """An embedding of -1 and 1: exact in every type, and of unit mean square."""
        draws = np.random.default_rng(0).integers(0, 2, self._shapes[EMBEDDING], np.int8)
        return 2 * draws - 1


class AlikeLoader(Loader):
    """A Loader for models whose layers are alike: it reads one and copies it on the devices."""

    @cached_property
    def _first(self) -> tuple[Attention, MLP | Experts]:
        return super().attention(0), super().mlp(0)

    @cached_property
    def _stacks(self) -> dict[tuple[int, int], Attention]:
        return {}

    def attention(self, index: int) -> Attention:
        """Load one layer's attention."""
        return copied(self._first[0])

    def mlp(self, index: int) -> MLP:
        """Load one layer's feed-forward part."""
        return copied(self._first[1])

    def stacked_attention(self, layers: Sequence[int], slots: int) -> Attention:
        """Load the attentions of several layers as one stack."""
        kind = len(layers), slots
        if kind not in self._stacks:
            self._stacks[kind] = super().stacked_attention(layers, slots)
        return copied(self._stacks[kind])


def copied(module: Any) -> Any:
    """Copy a module into buffers of its own with the same shardings."""
    return jax.tree.map(lambda x: jax.device_put(x, x.sharding, may_alias=False), module)


def load(
    source: Synthetic,
    mesh: Mesh,
    groups: Sequence[Group] | None = None,
    mlp_lp_size: int = 1,
    settings: PlatformSettings | None = None,
    weights: Weights | None = None,
) -> Decoder:
    """Load a target or, with groups, a draft, split over all devices."""
    config = source.config
    rows = padded_vocab_size(mesh, config)
    loader = AlikeLoader(
        source=source,
        config=config,
        mesh=mesh,
        axes=ALL_AXES,
        dtype=source.dtype,
        vocab_rows=rows,
        num_ids=config.vocab_size,
        settings=settings,
        weights=weights,
    )
    if groups is None:
        return loader.decoder([loader.layer(index) for index in range(config.num_hidden_layers)])
    return load_draft(loader, Layout.uniform(tuple(groups), mlp_lp_size))


def random_source(fields: Fields, dtype: str) -> Synthetic:
    """Make random weights of a shape."""
    return Synthetic(model_config(fields), np.dtype(dtype))


def constructed_source(fields: Fields, dtype: str, successor: np.ndarray) -> Synthetic:
    """Make weights with which every id is followed by its `successor`.

    The head is a matrix of its own even if the shape ties it to the embedding, because a tied head
    cannot encode an arbitrary successor. That costs memory but no time: a pass reads only the
    tokens' rows of an embedding, and the whole head either way.
    """
    config = replace(model_config(fields), tie_word_embeddings=False)
    return Synthetic(config, np.dtype(dtype), successor)


def weight_bytes(config: ModelConfig, dtype: np.dtype) -> int:
    """Count the bytes of weights that a pass reads: all but an untied embedding."""
    sizes = {name: prod(shape) for name, shape in expected_shapes(config).items()}
    if not config.tie_word_embeddings:
        del sizes[EMBEDDING]
    return sum(sizes.values()) * dtype.itemsize


def read_bytes(model: Decoder) -> int:
    """Count the bytes that a pass reads of a loaded model, whatever types its matrices have."""
    read = [model.blocks, model.norm, model.embedding if model.head is None else model.head]
    platform = model.norm.weight.sharding.mesh.devices.flat[0].platform
    return sum(bytes_of(leaf.size, leaf.dtype, platform) for leaf in jax.tree.leaves(read))


def kv_bytes(config: ModelConfig, dtype: np.dtype, tokens: int) -> int:
    """Count the bytes of all layers' keys and values for that many tokens."""
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return per_token * tokens * dtype.itemsize


def torch_model(fields: Fields, source: Synthetic, device: str) -> Any:
    """Build transformers' model of a shape with the same tensors."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = fields | {"tie_word_embeddings": source.config.tie_word_embeddings}
    config = AutoConfig.for_model(**fields)
    dtype = getattr(torch, source.dtype.name)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name in source.shapes():
            # By way of integers, because torch does not read NumPy's bfloat16.
            words = source.read(name).view(f"int{8 * source.dtype.itemsize}")
            parameters.pop(name).copy_(torch.from_numpy(words).view(dtype))
    assert not parameters, f"{next(iter(parameters))} was not set"
    return model.eval()
