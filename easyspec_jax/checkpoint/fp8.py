"""Matrices of 8-bit floats (float8_e4m3fn) with a scale for every block, as DeepSeek's and Qwen's.

No integers stand for these exactly, so they are read as bfloat16. The scales, N.weight_scale_inv
(N.weight_scale in older files), are factors in spite of their name.
"""

from collections.abc import Collection, Mapping
from typing import Any

from easyspec_jax.checkpoint.stored_matrices import Matrix, Parts, scales_of, unpacked
from easyspec_jax.errors import EasySpecError


def matrices(
    parts: Parts, settings: Mapping[str, Any], known: Collection[str]
) -> dict[str, Matrix]:
    """Find the matrices of a checkpoint, as a stored_matrices.Format."""
    kind, blocks = settings.get("fmt", "e4m3"), settings.get("weight_block_size")
    if kind != "e4m3":
        raise EasySpecError(f"{parts.origin}: fp8 with fmt={kind!r} is not supported; only 'e4m3'")
    if blocks is not None and not _are_blocks(blocks):
        raise EasySpecError(
            f"{parts.origin}: fp8 with weight_block_size={blocks!r} is not supported"
        )
    found: dict[str, Matrix] = {}
    for name, dtype in parts.source.dtypes().items():
        if name.endswith(".weight") and dtype == "F8_E4M3":
            found[name] = _matrix(parts, name, None if blocks is None else tuple(blocks))
    return found


def _are_blocks(blocks: Any) -> bool:
    if not isinstance(blocks, list) or len(blocks) != 2:
        return False
    return all(type(size) is int and 0 < size < 2**31 for size in blocks)


def _matrix(parts: Parts, weight: str, blocks: Any) -> Matrix:
    shape = parts.matrix(weight, "F8_E4M3")
    older = parts.has(weight + "_scale") and not parts.has(weight + "_scale_inv")
    scales = scales_of(parts, weight + ("_scale" if older else "_scale_inv"), shape, blocks)
    # Rounding of activations, which are not rounded here.
    module = weight.removesuffix("weight")
    parts.drop(module + "input_scale", module + "activation_scale")
    return unpacked(parts, weight, "bfloat16", scales)
