"""Llama and what has its tensors: Mistral and Granite."""

from dataclasses import replace
from typing import Any

from easyspec_jax.checkpoint.families.tensors import (
    ATTENTION_BIASES,
    COMMON,
    KEYS,
    MLP_BIASES,
    QUERIES,
    Family,
    Tensor,
)

# llama.cpp rotates neighbouring channels for Llama and the two halves of a head for Qwen, so only
# Llama's query and key rows are permuted in GGUF files.
MISTRAL = (
    *COMMON,
    replace(QUERIES, pairs="num_attention_heads"),
    replace(KEYS, pairs="num_key_value_heads"),
)


def _permuted(bias: Tensor) -> Tensor:
    """Permute a bias in GGUF as the weight that it belongs to."""
    weights = {tensor.name.removesuffix("weight"): tensor.pairs for tensor in MISTRAL}
    return replace(bias, pairs=weights[bias.name.removesuffix("bias")])


LLAMA = (*MISTRAL, *map(_permuted, ATTENTION_BIASES), *MLP_BIASES)


def read_llama(config: dict[str, Any]) -> dict[str, Any]:
    """Return a Llama configuration as it is."""
    return config


def read_mistral(config: dict[str, Any]) -> dict[str, Any]:
    """Fill in the defaults of Mistral 7B v0.1."""
    # An absent sliding_window means 4096; only an explicit null turns the window off.
    return {"sliding_window": 4096, "num_key_value_heads": 8} | config


def read_granite(config: dict[str, Any]) -> dict[str, Any]:
    """Fill in Granite's defaults."""
    return {"attention_multiplier": 1.0} | config


FAMILIES = {
    "granite": Family(
        "Granite 3, dense",
        LLAMA,
        read_granite,
        "GraniteForCausalLM",
        gguf="granite",
        fields=(
            "attention_bias",
            "mlp_bias",
            "attention_multiplier",
            "embedding_multiplier",
            "residual_multiplier",
            "logits_scaling",
        ),
    ),
    "llama": Family(
        "Llama 2, 3, 3.1, 3.2, 3.3; TinyLlama; SmolLM2",
        LLAMA,
        read_llama,
        "LlamaForCausalLM",
        gguf="llama",
        fields=("attention_bias", "mlp_bias"),
    ),
    # GGUF files of Mistral models say that their architecture is llama.
    "mistral": Family(
        "Mistral, Nemo",
        MISTRAL,
        read_mistral,
        "MistralForCausalLM",
        fields=("sliding_window", "layer_types"),
    ),
}
