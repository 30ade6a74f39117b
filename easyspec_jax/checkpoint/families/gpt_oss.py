"""gpt-oss: attention sinks, windows in every other layer, experts with biases."""

from typing import Any

from easyspec_jax.checkpoint.families.tensors import (
    ATTENTION_BIASES,
    KEYS,
    PRE_NORMS,
    QUERIES,
    SHARED,
    SINKS,
    Family,
    Tensor,
    experts,
)
from easyspec_jax.checkpoint.layer_kinds import FULL, SLIDING
from easyspec_jax.errors import EasySpecError

GPT_OSS = (
    *SHARED,
    *PRE_NORMS,
    QUERIES,
    KEYS,
    *ATTENTION_BIASES,
    Tensor(f"model.layers.{{}}.{SINKS}", ("heads",)),
    *experts(router="router", biases=True),
)


def read_gpt_oss(config: dict[str, Any]) -> dict[str, Any]:
    """Fill in the defaults of gpt-oss, and call its fields what Qwen's are called."""
    for name, only in (("swiglu_limit", 7.0), ("swiglu_alpha", 1.702)):
        if config.get(name, only) != only:
            raise EasySpecError(f"{name}={config[name]} is not supported; only {only}")
    layers = config["num_hidden_layers"]
    rope = {
        "rope_type": "yarn",
        "factor": 32.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    }
    defaults = {
        "attention_bias": True,
        "head_dim": 64,
        "num_key_value_heads": 8,
        "num_experts_per_tok": 4,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150000.0,
        "sliding_window": 128,
    }
    own = {
        "hidden_act": "clamped_swiglu",
        "layer_types": config.get("layer_types") or ([SLIDING, FULL] * layers)[:layers],
        "rope_parameters": config.get("rope_parameters") or rope,
        "num_experts": config.get("num_local_experts") or config.get("num_experts") or 128,
        "moe_intermediate_size": config["intermediate_size"],
        "norm_topk_prob": True,
    }
    return defaults | config | own


FAMILIES = {
    "gpt_oss": Family(
        "gpt-oss",
        GPT_OSS,
        read_gpt_oss,
        "GptOssForCausalLM",
        fields=("attention_bias", "sliding_window", "layer_types"),
        stacks_experts=True,
    ),
}
