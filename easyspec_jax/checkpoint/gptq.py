"""Matrices of GPTQ, as AutoGPTQ and GPTQModel write them.

N.qweight is int32 [in · bits / 32, out]: a word holds neighbouring columns of one row of the
matrix, the lowest bits first. N.scales are [groups, out]. N.qzeros, int32
[groups, out · bits / 32], hold neighbouring rows' zero points, less 1 in the first version of the
format. N.g_idx is the group of every column.
"""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from jaxtyping import Int

from easyspec_jax.checkpoint.stored_matrices import (
    FLOATS,
    Coded,
    Matrix,
    Parts,
    Scales,
    covering,
    fields,
    is_in_order,
)
from easyspec_jax.errors import EasySpecError

_LESS = {"gptq": 1, "gptq_v2": 0}
"""Offset that stored zero points lack, by the version of the format."""


def matrices(
    parts: Parts, settings: Mapping[str, Any], known: Collection[str]
) -> dict[str, Matrix]:
    """Find the matrices of a checkpoint, as a stored_matrices.Format."""
    bits: Any = settings.get("bits")
    group = settings.get("group_size", -1)
    version = str(settings.get("checkpoint_format") or settings.get("format") or "gptq")
    for field, value, supported in (
        ("bits", bits, (4, 8)),
        ("format", version, tuple(_LESS)),
        ("dynamic", settings.get("dynamic") or None, (None,)),
    ):
        if type(value) not in (int, str, type(None)) or value not in supported:
            raise EasySpecError(f"{parts.origin}: GPTQ with {field}={value!r} is not supported")
    if type(group) is not int or group == 0 or group < -1:
        raise EasySpecError(f"{parts.origin}: GPTQ with group_size={group!r} is not supported")
    found: dict[str, Matrix] = {}
    for name in parts.source.shapes():
        if name.endswith(".qweight"):
            module = name.removesuffix("qweight")
            symmetric = settings.get("sym") is True
            weight = _matrix(parts, module, bits, group, symmetric, _LESS[version])
            found[module + "weight"] = weight
            _drop_bias(parts, module + "bias", known)
    return found


def _matrix(parts: Parts, module: str, bits: int, group: int, symmetric: bool, less: int) -> Matrix:
    weight, count, middle = module + "qweight", 32 // bits, 1 << (bits - 1)
    words, out = parts.matrix(weight, "I32")
    inner = words * count
    scales = transposed_scales(parts, module, (out, inner), group)
    if parts.take(module + "qzeros", "I32") != (scales.groups, -(-out // count)):
        raise parts.wrong(module + "qzeros", str((scales.groups, -(-out // count))))
    if parts.has(module + "g_idx") and not is_in_order(
        parts, module + "g_idx", inner, scales.group
    ):
        raise EasySpecError(
            f"{parts.origin}: {module}g_idx reorders columns (desc_act), which is not supported; "
            "quantize with desc_act=False"
        )

    def codes(rows: slice, columns: slice) -> np.ndarray:
        of_words, within = covering(columns, count)
        if symmetric and (zeros(rows) != middle).any():
            raise EasySpecError(
                f"{parts.origin}: {module}qzeros is not symmetric, though the format says so"
            )
        # [words, rows] -> [rows, words] -> [rows, codes]
        return fields(parts.source.read(weight, (of_words, rows)).T, bits)[:, within]

    def zeros(rows: slice) -> Int[np.ndarray, "rows groups"]:
        of_words, within = covering(rows, count)
        words = parts.source.read(module + "qzeros", (slice(0, scales.groups), of_words))
        return fields(words, bits)[:, within].T.astype(np.int16) + np.int16(less)

    given = None if symmetric else zeros
    return Coded(module + "weight", (out, inner), f"int{bits}", scales, codes, middle, given)


def transposed_scales(parts: Parts, module: str, matrix: tuple[int, int], group: int) -> Scales:
    """Find the scales N.scales of a matrix, [groups, out].

    Args:
        parts: Where they are.
        module: N and a dot.
        matrix: The matrix's shape.
        group: Columns of a group; -1 for all.

    Raises:
        EasySpecError: They do not fit the matrix.
    """
    (out, inner), name = matrix, module + "scales"
    group = inner if group == -1 else group
    if inner % group:
        raise EasySpecError(
            f"{parts.origin}: {module}weight has {inner} columns, not a multiple of "
            f"group_size={group}"
        )
    if parts.take(name, *FLOATS) != (inner // group, out):
        raise parts.wrong(name, str((inner // group, out)))
    return Scales(parts, name, inner // group, group, transposed=True)


def _drop_bias(parts: Parts, name: str, known: Collection[str]) -> None:
    """Ignore a bias that the model does not have, if it is zero."""
    if parts.has(name) and name not in known:
        if parts.take(name, *FLOATS) and not np.any(parts.source.read(name)):
            return
        raise EasySpecError(f"{parts.origin}: {name} is not zero, and the model has no such bias")
