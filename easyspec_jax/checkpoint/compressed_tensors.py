"""Matrices of compressed-tensors, the format of llm-compressor and vLLM.

Layouts, as in its `compressors` package; N is a module:

- pack-quantized: N.weight_packed, int32 [out, in · bits / 32], the lowest bits first; a code is the
  integer plus 2^(bits - 1). N.weight_shape holds [out, in]. Zero points N.weight_zero_point are
  packed in the same way, but along the rows.
- int-quantized, naive-quantized: N.weight of int8.
- float-quantized: N.weight of float8_e4m3fn.

N.weight_scale has one number, or one for each row, group or block. The tensors say which of these a
module has, so modules that are left out need no list.
"""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from jaxtyping import Int

from easyspec_jax.checkpoint.stored_matrices import (
    Coded,
    Matrix,
    Parts,
    Scales,
    Zeros,
    blocks_of,
    covering,
    fields,
    is_in_order,
    scales_of,
    unpacked,
)
from easyspec_jax.errors import EasySpecError

_FORMATS = (
    "pack-quantized",
    "int-quantized",
    "naive-quantized",
    "float-quantized",
    "mixed-precision",
)
_BITS = {"int": (4, 8), "float": (8,)}


def matrices(
    parts: Parts, settings: Mapping[str, Any], known: Collection[str]
) -> dict[str, Matrix]:
    """Find the matrices of a checkpoint, as a stored_matrices.Format."""
    schemes = _schemes(parts, settings)
    found: dict[str, Matrix] = {}
    for name, dtype in parts.source.dtypes().items():
        if name.endswith(".weight_packed"):
            weight = name.removesuffix("_packed")
            found[weight] = _packed(parts, weight, schemes)
        elif name.endswith(".weight") and dtype in ("I8", "F8_E4M3"):
            found[name] = _plain(parts, name, dtype, schemes)
    for name in found:
        # Rounding of activations, which are not rounded here.
        module = name.removesuffix("weight")
        parts.drop(module + "input_scale", module + "input_zero_point")
    return found


def _schemes(parts: Parts, settings: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the settings of weights, of each group of modules."""
    groups = settings.get("config_groups")
    groups = list(groups.values()) if isinstance(groups, dict) else []
    weights = [group.get("weights") for group in groups if isinstance(group, dict)]
    schemes: list[Mapping[str, Any]] = [each for each in weights if isinstance(each, dict)]
    sections = [settings, *(group for group in groups if isinstance(group, dict))]
    formats = [str(section.get("format") or _FORMATS[0]) for section in sections]
    for name in set(formats) - set(_FORMATS):
        raise EasySpecError(
            f"{parts.origin}: compressed-tensors format {name!r} is not supported; "
            f"supported: {', '.join(_FORMATS)}"
        )
    for name in ("sparsity_config", "transform_config"):
        section = settings.get(name) or {}
        if not isinstance(section, dict) or section.get("format", "dense") != "dense":
            raise EasySpecError(f"{parts.origin}: compressed-tensors {name} is not supported")
        if name == "transform_config" and section.get("config_groups"):
            raise EasySpecError(f"{parts.origin}: compressed-tensors {name} is not supported")
    for scheme in schemes:
        kind, bits = str(scheme.get("type", "int")), scheme.get("num_bits", 8)
        if type(bits) is not int or bits not in _BITS.get(kind, ()):
            raise EasySpecError(
                f"{parts.origin}: compressed-tensors weights of {bits} bits and type {kind!r} are "
                "not supported; supported: int of 4 and 8 bits, float of 8 bits"
            )
    return schemes


def _packed(parts: Parts, weight: str, schemes: list[Mapping[str, Any]]) -> Matrix:
    packed = weight + "_packed"
    rows, words = parts.matrix(packed, "I32")
    if parts.take(weight + "_shape", "I64", "I32") != (2,):
        raise parts.wrong(weight + "_shape", "(2,)")
    out, inner = (int(size) for size in parts.source.read(weight + "_shape"))
    given = {scheme.get("num_bits", 8) for scheme in schemes} or {4, 8}
    fitting = [bits for bits in sorted(given) if words == -(-inner * bits // 32)]
    if out != rows or inner < 1 or not fitting:
        raise parts.wrong(packed, f"codes of {' or '.join(map(str, given))} bits for {out, inner}")
    shape, bits = (rows, inner), fitting[0]
    scales = _whole_groups(
        parts, scales_of(parts, weight + "_scale", shape, _blocks(schemes)), shape
    )
    if parts.has(weight + "_g_idx") and not is_in_order(
        parts, weight + "_g_idx", inner, scales.group
    ):
        raise EasySpecError(
            f"{parts.origin}: {weight}_g_idx reorders columns (actorder), which is not supported"
        )

    def codes(rows: slice, columns: slice) -> np.ndarray:
        of_words, within = covering(columns, 32 // bits)
        return fields(parts.source.read(packed, (rows, of_words)), bits)[:, within]

    middle = 1 << (bits - 1)
    zeros = _zeros(parts, weight + "_zero_point", shape, scales, bits, schemes, middle)
    return Coded(weight, shape, f"int{bits}", scales, codes, middle, zeros)


def _plain(parts: Parts, weight: str, dtype: str, schemes: list[Mapping[str, Any]]) -> Matrix:
    shape = parts.matrix(weight, dtype)
    scales = scales_of(parts, weight + "_scale", shape, _blocks(schemes))
    if dtype == "F8_E4M3":
        parts.drop(weight + "_zero_point")
        return unpacked(parts, weight, "bfloat16", scales)
    scales = _whole_groups(parts, scales, shape)
    zeros = _zeros(parts, weight + "_zero_point", shape, scales, 8, schemes, middle=0)
    return unpacked(parts, weight, "int8", scales, zeros)


def _blocks(schemes: list[Mapping[str, Any]]) -> tuple[int, int] | None:
    for scheme in schemes:
        blocks = scheme.get("block_structure")
        if isinstance(blocks, list) and len(blocks) == 2 and all(_is_count(n) for n in blocks):
            return blocks[0], blocks[1]
    return None


def _is_count(number: Any) -> bool:
    return type(number) is int and 0 < number < 2**31


def _whole_groups(parts: Parts, scales: Scales, matrix: tuple[int, int]) -> Scales:
    if matrix[1] != scales.groups * scales.group:
        raise parts.wrong(scales.name, f"scales of equal groups of a matrix of {matrix}")
    return scales


def _zeros(
    parts: Parts,
    name: str,
    matrix: tuple[int, int],
    scales: Scales,
    bits: int,
    schemes: list[Mapping[str, Any]],
    middle: int,
) -> Zeros | None:
    """Return how to read zero points, as codes; None if all are the middle code."""
    symmetric = all(scheme.get("symmetric", True) for scheme in schemes)
    if not parts.has(name):
        if symmetric or any(scheme.get("symmetric", True) for scheme in schemes):
            return None
        raise EasySpecError(f"{parts.origin}: {name} is missing; fetch the whole checkpoint")
    # Only codes that are packed have packed zero points.
    shape, count = parts.take(name, *(("I32", "I8") if middle else ("I8",))), 32 // bits
    rows, groups = matrix[0], scales.groups
    is_packed = parts.source.dtypes()[name] == "I32"
    if symmetric:
        # Early versions stored zero points all the same, each of them zero.
        stored = parts.source.read(name)
        if is_packed and len(shape) == 2:
            stored = fields(stored.T, bits)[:, :rows] != middle
        if stored.any():
            raise EasySpecError(
                f"{parts.origin}: {name} is not zero, though the format is symmetric"
            )
        return None
    blocks, half = -(-rows // scales.block), 1 << (bits - 1)
    if is_packed and shape == (-(-rows // count), groups) and scales.block == 1:

        def packed(rows: slice) -> Int[np.ndarray, "rows groups"]:
            of_words, within = covering(rows, count)
            words = parts.source.read(name, (of_words,))
            return fields(words.T, bits)[:, within].T.astype(np.int16)

        return packed
    if is_packed or (shape != (blocks, groups) and (shape, groups) != ((blocks,), 1)):
        raise parts.wrong(name, f"zero points of {groups} groups in {rows} rows")

    def plain(rows: slice) -> Int[np.ndarray, "rows groups"]:
        of_blocks, of_rows = blocks_of(rows, scales.block)
        zeros = parts.source.read(name, (of_blocks,)).astype(np.int16)
        if (zeros != zeros.clip(-half, half - 1)).any():
            raise EasySpecError(
                f"{parts.origin}: {name} holds numbers of more than {bits} bits; fetch it again"
            )
        return zeros.reshape(-1, groups)[of_rows] + np.int16(middle)

    return plain
