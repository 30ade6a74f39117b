"""Phi-3 and Phi-4, which keep queries, keys and values as one tensor, gate and up as another."""

from dataclasses import replace
from typing import Any

from easyspec_jax.checkpoint.families.tensors import COMMON, KEYS, QUERIES, Family, Tensor

_JOINED = {
    "q_proj": ("qkv_proj", "attn_qkv", ()),
    "k_proj": ("qkv_proj", "attn_qkv", ("queries",)),
    "v_proj": ("qkv_proj", "attn_qkv", ("queries", "keys")),
    "gate_proj": ("gate_up_proj", "ffn_up", ()),
    "up_proj": ("gate_up_proj", "ffn_up", ("inner",)),
}


def _joined(tensor: Tensor) -> Tensor:
    """Store queries, keys and values as one tensor, and gate and up as another."""
    part = tensor.name.split(".")[-2]
    if part not in _JOINED:
        return tensor
    whole, gguf, after = _JOINED[part]
    hf = tensor.name.replace(part, whole)
    return replace(tensor, hf=hf, gguf=f"blk.{{}}.{gguf}.weight", after=after)


PHI3 = tuple(map(_joined, (*COMMON, QUERIES, KEYS)))


def read_phi3(config: dict[str, Any]) -> dict[str, Any]:
    """Fill in Phi-3's defaults, and call longrope by its name: old files have "su" or "yarn"."""
    scaling = config.get("rope_scaling") or {}
    if "short_factor" in scaling:
        scaling = {"original_max_position_embeddings": 4096} | scaling | {"rope_type": "longrope"}
        config = config | {"rope_scaling": scaling}
    return {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096} | config


FAMILIES = {
    "phi3": Family(
        "Phi-3, Phi-3.5, Phi-4",
        PHI3,
        read_phi3,
        "Phi3ForCausalLM",
        gguf="phi3",
        fields=("sliding_window",),
    ),
}
