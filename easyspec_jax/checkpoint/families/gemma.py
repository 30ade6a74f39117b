"""Gemma 2 and 3: norms on both sides, soft caps, windows in most layers."""

from dataclasses import replace
from typing import Any

from easyspec_jax.checkpoint.families.tensors import (
    ATTENTION_BIASES,
    COMMON,
    HEAD_NORMS,
    KEYS,
    POST_NORMS,
    PRE_NORMS,
    QUERIES,
    Family,
    Tensor,
)
from easyspec_jax.checkpoint.layer_kinds import FULL, SLIDING
from easyspec_jax.errors import EasySpecError


def _gemma(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Name the norm before the feed-forward part as Gemma does, and mark all norms for GGUF."""
    found = []
    for tensor in tensors:
        hf = tensor.hf
        if tensor.name == PRE_NORMS[1].name:
            hf = "model.layers.{}.pre_feedforward_layernorm.weight"
        offset = 1.0 if tensor.name.endswith("norm.weight") else 0.0
        found.append(replace(tensor, hf=hf, gguf_offset=offset))
    return tuple(found)


GEMMA2 = _gemma(*COMMON, *POST_NORMS, QUERIES, KEYS, *ATTENTION_BIASES)
GEMMA3 = _gemma(*COMMON, *POST_NORMS, QUERIES, KEYS, *HEAD_NORMS, *ATTENTION_BIASES)


def read_gemma2(config: dict[str, Any]) -> dict[str, Any]:
    """Translate the fields of Gemma 2, with its soft caps and a window in every other layer."""
    caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    return _read_gemma(caps | config | {"sliding_window_pattern": 2})


def read_gemma3(config: dict[str, Any]) -> dict[str, Any]:
    """Translate the fields of Gemma 3's text models, whose windows have a rotation of their own."""
    ropes = config.get("rope_parameters") or {}
    full, sliding = (ropes.get(kind) or {"rope_type": "default"} for kind in (FULL, SLIDING))
    # The older spelling has a scaling for layers that read the whole text, and both thetas.
    full = {"rope_theta": config.get("rope_theta", 1e6)} | full | (config.get("rope_scaling") or {})
    sliding = {"rope_theta": config.get("rope_local_base_freq", 1e4)} | sliding
    own = {"rope_scaling": None, "rope_parameters": {FULL: full, SLIDING: sliding}}
    defaults = {"sliding_window_pattern": 6, "max_position_embeddings": 131072}
    return _read_gemma(defaults | config | own)


def _read_gemma(config: dict[str, Any]) -> dict[str, Any]:
    if config.get("use_bidirectional_attention"):
        raise EasySpecError("use_bidirectional_attention is not supported")
    layers, pattern = config["num_hidden_layers"], config["sliding_window_pattern"]
    # Every `pattern`-th layer reads the whole text.
    kinds = [SLIDING] * layers
    kinds[pattern - 1 :: pattern] = [FULL] * (layers // pattern)
    defaults = {"head_dim": 256, "tie_word_embeddings": True, "sliding_window": 4096}
    own = {
        "hidden_act": config.get("hidden_activation") or "gelu_pytorch_tanh",
        "layer_types": config.get("layer_types") or kinds,
        "attention_multiplier": config.get("query_pre_attn_scalar", 256) ** -0.5,
        "embedding_multiplier": config["hidden_size"] ** 0.5,
        "norm_offset": 1.0,
    }
    return defaults | config | own


FAMILIES = {
    "gemma2": Family(
        "Gemma 2",
        GEMMA2,
        read_gemma2,
        "Gemma2ForCausalLM",
        gguf="gemma2",
        fields=(
            "attention_bias",
            "attn_logit_softcapping",
            "final_logit_softcapping",
            "sliding_window",
            "layer_types",
        ),
    ),
    "gemma3_text": Family(
        "Gemma 3, text (270M, 1B)",
        GEMMA3,
        read_gemma3,
        "Gemma3ForCausalLM",
        gguf="gemma3",
        fields=("attention_bias", "final_logit_softcapping", "sliding_window", "layer_types"),
    ),
}
