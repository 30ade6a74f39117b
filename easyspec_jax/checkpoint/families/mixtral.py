"""Mixtral."""

from typing import Any

from easyspec_jax.checkpoint.families.tensors import (
    KEYS,
    PRE_NORMS,
    QUERIES,
    SHARED,
    Family,
    experts,
)

MIXTRAL = (*SHARED, *PRE_NORMS, QUERIES, KEYS, *experts("block_sparse_moe", ("w1", "w3", "w2")))


def read_mixtral(config: dict[str, Any]) -> dict[str, Any]:
    """Fill in Mixtral's defaults, and call its fields what Qwen's are called."""
    defaults = {
        "num_key_value_heads": 8,
        "num_experts_per_tok": 2,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-5,
    }
    return (defaults | config) | {
        "num_experts": config.get("num_local_experts", 8),
        "moe_intermediate_size": config["intermediate_size"],
        "norm_topk_prob": True,
    }


FAMILIES = {
    "mixtral": Family(
        "Mixtral", MIXTRAL, read_mixtral, "MixtralForCausalLM", fields=("sliding_window",)
    ),
}
