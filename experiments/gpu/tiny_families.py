"""A tiny random model of every family, and its logits.

The weights come from NumPy alone, so that any machine makes the same ones.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from easyspec_jax.draft.grouping import paper_groups
from easyspec_jax.draft.layer_group import run_fuzzy
from easyspec_jax.model.transformer import Decoder, run_exact
from easyspec_jax.parallel.spmd import partition_specs, spmd
from experiments.bench import roofline_models as models

VOCAB = 48

_SHAPE = {
    "num_hidden_layers": 5,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
}

FAMILIES: dict[str, models.Fields] = {
    "llama3": _SHAPE
    | {
        "model_type": "llama",
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "smollm2": _SHAPE
    | {
        "model_type": "llama",
        "hidden_size": 72,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 8,
        "tie_word_embeddings": True,
    },
    "qwen2": _SHAPE | {"model_type": "qwen2", "tie_word_embeddings": True},
    "mistral": _SHAPE | {"model_type": "mistral", "sliding_window": None},
    "qwen3": _SHAPE | {"model_type": "qwen3", "num_attention_heads": 8, "head_dim": 24},
}
"""Configurations with what sets a family apart: scaled RoPE, a tied head, biases, norms of
queries and keys, heads that do not make up the hidden size."""

IDS = np.random.default_rng(0).integers(VOCAB, size=(1, 12)).astype(np.int32)
"""The text whose logits are compared, [1, tokens]."""


def logits(family: str, mesh: Mesh) -> dict[str, Float[np.ndarray, "tokens vocab"]]:
    """Compute the logits of IDS in float32.

    Args:
        family: A name in FAMILIES.
        mesh: One device.

    Returns:
        Those of the model, `exact`; of the model as a draft with groups of two layers, which runs
        them in order, `grouped`, or at once, `fuzzy`.
    """
    source = models.random_source(FAMILIES[family], "float32")
    groups = paper_groups(source.config.num_hidden_layers, 2)
    plain, draft = models.load(source, mesh), models.load(source, mesh, groups)
    return {
        "exact": _forward(plain, mesh, run_exact),
        "grouped": _forward(draft, mesh, run_exact),
        "fuzzy": _forward(draft, mesh, run_fuzzy),
    }


def _forward(model: Decoder, mesh: Mesh, run: Any) -> Float[np.ndarray, "tokens vocab"]:
    def body(model: Decoder, ids: Int[Array, "1 tokens"]) -> Float[Array, "tokens vocab"]:
        caches = model.init_caches(1, ids.shape[1])
        with jax.default_matmul_precision("highest"):  # a GPU would round to TF32
            h, _ = model(ids, caches, jnp.zeros((1,), jnp.int32), run)
            return model.logits(h)[0]

    program = jax.jit(spmd(body, mesh, (partition_specs(model), P()), P()))
    return np.asarray(program(model, IDS), np.float32)[:, :VOCAB]
