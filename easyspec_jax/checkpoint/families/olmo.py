"""OLMo 2, whose norms come after attention and MLP only."""

from typing import Any

from easyspec_jax.checkpoint.families.tensors import (
    ATTENTION_BIASES,
    BODY,
    KEYS,
    POST_NORMS,
    QUERIES,
    Family,
    layer,
)

OLMO2 = (
    *BODY,
    *POST_NORMS,
    QUERIES,
    KEYS,
    layer("self_attn.q_norm.weight", ("queries",), "attn_q_norm.weight"),
    layer("self_attn.k_norm.weight", ("keys",), "attn_k_norm.weight"),
    *ATTENTION_BIASES,
)


def read_olmo2(config: dict[str, Any]) -> dict[str, Any]:
    """Fill in OLMo 2's defaults."""
    return {"rms_norm_eps": 1e-5, "max_position_embeddings": 2048} | config


FAMILIES = {
    "olmo2": Family(
        "OLMo 2", OLMO2, read_olmo2, "Olmo2ForCausalLM", gguf="olmo2", fields=("attention_bias",)
    ),
}
