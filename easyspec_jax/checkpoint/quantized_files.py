"""Quantized Hugging Face checkpoints: which format a configuration names, and how it is read."""

from collections.abc import Collection, Mapping
from typing import Any

from easyspec_jax.checkpoint import awq, compressed_tensors, fp8, gptq
from easyspec_jax.checkpoint.stored_matrices import Assembled, Parts
from easyspec_jax.checkpoint.tensors import TensorSource
from easyspec_jax.errors import EasySpecError

METHODS = ("awq", "compressed-tensors", "fp8", "gptq")
"""Every supported `quant_method`."""


def quantization(config: Mapping[str, Any], origin: str) -> Mapping[str, Any] | None:
    """Return how a checkpoint is quantized, or None if it is not.

    Args:
        config: The contents of `config.json`.
        origin: Names it in error messages.

    Raises:
        EasySpecError: The method is not supported.
    """
    settings = config.get("quantization_config") or config.get("compression_config")
    if not settings:
        return None
    method = settings.get("quant_method") if isinstance(settings, dict) else settings
    if method not in METHODS:
        raise EasySpecError(
            f"{origin}: quantization method {str(method)[:40]!r} is not supported; "
            f"supported: {', '.join(METHODS)}"
        )
    return settings


def assembled(
    source: TensorSource, settings: Mapping[str, Any], known: Collection[str], origin: str
) -> TensorSource:
    """Present the matrices of a quantized checkpoint as `quantized` describes them.

    Args:
        source: Its tensors as they are stored.
        settings: Its `quantization_config`.
        known: The tensors that the model has, by the names they have if nothing is quantized.
        origin: Names it in error messages.

    Raises:
        EasySpecError: The layout is not supported, or parts of a matrix do not fit together.
    """
    parts = Parts(source, origin)
    match settings["quant_method"]:
        case "awq":
            matrices = awq.matrices(parts, settings)
        case "compressed-tensors":
            matrices = compressed_tensors.matrices(parts, settings)
        case "fp8":
            matrices = fp8.matrices(parts, settings)
        case _:
            matrices = gptq.matrices(parts, settings, known)
    return Assembled(source, matrices, frozenset(parts.used))
