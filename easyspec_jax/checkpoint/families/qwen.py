"""Qwen2, Qwen3, and mixtures of experts of the latter."""

from dataclasses import replace
from typing import Any

from easyspec_jax.checkpoint.families.tensors import (
    ATTENTION_BIASES,
    COMMON,
    HEAD_NORMS,
    KEYS,
    MLP,
    QKV_BIASES,
    QUERIES,
    Family,
    experts,
)
from easyspec_jax.checkpoint.layer_kinds import FULL, SLIDING

QWEN2 = (*COMMON, QUERIES, KEYS, *QKV_BIASES)
QWEN3 = (*COMMON, QUERIES, KEYS, *HEAD_NORMS, *ATTENTION_BIASES)
QWEN3_MOE = (
    *(replace(tensor, mixture=False) if tensor in MLP else tensor for tensor in QWEN3),
    *experts(),
)


def read_qwen_window(config: dict[str, Any]) -> dict[str, Any]:
    """List which layers slide: none without `use_sliding_window`."""
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
    types = config.get("layer_types")
    if types is None:
        full = config.get("max_window_layers", 28) if window else config["num_hidden_layers"]
        types = [SLIDING if i >= full else FULL for i in range(config["num_hidden_layers"])]
    return config | {"sliding_window": window, "layer_types": types}


def read_qwen3(config: dict[str, Any]) -> dict[str, Any]:
    """Fill in Qwen3's defaults."""
    return read_qwen_window(config) | {"head_dim": config.get("head_dim") or 128}


def read_qwen3_moe(config: dict[str, Any]) -> dict[str, Any]:
    """Fill in the defaults of Qwen3's mixtures of experts."""
    # transformers 5 writes num_local_experts; Qwen's own files say num_experts.
    count = config.get("num_experts") or config.get("num_local_experts") or 128
    defaults = {"num_key_value_heads": 4, "moe_intermediate_size": 768}
    # Unlike the dense models of the family, either all layers slide or none.
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
    return defaults | config | {"num_experts": count, "sliding_window": window}


FAMILIES = {
    "qwen2": Family(
        "Qwen2, Qwen2.5, Qwen2-Math, Qwen2.5-Coder",
        QWEN2,
        read_qwen_window,
        "Qwen2ForCausalLM",
        gguf="qwen2",
        fields=("sliding_window", "layer_types"),
    ),
    "qwen3": Family(
        "Qwen3, dense",
        QWEN3,
        read_qwen3,
        "Qwen3ForCausalLM",
        gguf="qwen3",
        fields=("attention_bias", "sliding_window", "layer_types"),
    ),
    "qwen3_moe": Family(
        "Qwen3, mixtures of experts",
        QWEN3_MOE,
        read_qwen3_moe,
        "Qwen3MoeForCausalLM",
        fields=("attention_bias", "sliding_window"),
    ),
}
