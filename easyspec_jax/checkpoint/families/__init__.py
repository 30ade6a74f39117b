"""Model families: each is a table of tensors and a reader of `config.json`.

docs/families.md shows how to add one.
"""

from easyspec_jax.checkpoint.families import gemma, gpt_oss, llama, mixtral, olmo, phi, qwen
from easyspec_jax.checkpoint.families.tensors import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    ROUTER,
    SINKS,
    Family,
    QKNorm,
    Tensor,
)

FAMILIES: dict[str, Family] = {
    model_type: family
    for module in (gemma, gpt_oss, llama, mixtral, olmo, phi, qwen)
    for model_type, family in module.FAMILIES.items()
}
"""Every supported `model_type`."""

__all__ = [
    "EMBEDDING",
    "FAMILIES",
    "FINAL_NORM",
    "HEAD",
    "ROUTER",
    "SINKS",
    "Family",
    "QKNorm",
    "Tensor",
]
