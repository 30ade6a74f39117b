"""Matrices of AWQ, in AutoAWQ's layout `gemm`.

N.qweight is int32 [in, out / 8]: a word holds 8 neighbouring rows of the matrix in the order 0, 2,
4, 6, 1, 3, 5, 7, the lowest bits first. N.qzeros, [groups, out / 8], are packed in the same way,
and N.scales are [groups, out].
"""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from jaxtyping import Int, Int32, UInt8

from easyspec_jax.checkpoint.gptq import transposed_scales
from easyspec_jax.checkpoint.stored_matrices import Coded, Matrix, Parts, covering, fields
from easyspec_jax.errors import EasySpecError

_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Position of each of 8 neighbours in a word."""


def matrices(
    parts: Parts, settings: Mapping[str, Any], known: Collection[str]
) -> dict[str, Matrix]:
    """Find the matrices of a checkpoint, as a stored_matrices.Format."""
    version = settings.get("version") or settings.get("format") or "gemm"
    bits = settings.get("bits", settings.get("w_bit", 4))
    group = settings.get("group_size", settings.get("q_group_size", 128))
    if bits != 4:
        raise EasySpecError(f"{parts.origin}: AWQ with bits={bits!r} is not supported; only 4")
    if str(version).lower() != "gemm":
        raise EasySpecError(f"{parts.origin}: AWQ with version={version!r} is not supported")
    if type(group) is not int or group == 0 or group < -1:
        raise EasySpecError(f"{parts.origin}: AWQ with group_size={group!r} is not supported")
    found: dict[str, Matrix] = {}
    for name in parts.source.shapes():
        if name.endswith(".qweight"):
            module = name.removesuffix("qweight")
            found[module + "weight"] = _matrix(parts, module, group)
    return found


def _matrix(parts: Parts, module: str, group: int) -> Matrix:
    weight = module + "qweight"
    inner, words = parts.matrix(weight, "I32")
    out = 8 * words
    scales = transposed_scales(parts, module, (out, inner), group)
    if parts.take(module + "qzeros", "I32") != (scales.groups, words):
        raise parts.wrong(module + "qzeros", str((scales.groups, words)))

    def codes(rows: slice, columns: slice) -> np.ndarray:
        of_words, within = covering(rows, 8)
        return _in_order(parts.source.read(weight, (columns, of_words)))[:, within].T

    def zeros(rows: slice) -> Int[np.ndarray, "rows groups"]:
        of_words, within = covering(rows, 8)
        words = parts.source.read(module + "qzeros", (slice(0, scales.groups), of_words))
        return _in_order(words)[:, within].T.astype(np.int16)

    return Coded(module + "weight", (out, inner), "int4", scales, codes, 8, zeros)


def _in_order(words: Int32[np.ndarray, "n words"]) -> UInt8[np.ndarray, "n codes"]:
    """Take words apart and put the 8 codes of each in order."""
    count, width = words.shape
    # [n, words * 8] -> [n, words, 8] -> [n, words * 8]
    codes = fields(words, 4).reshape(count, width, 8)[:, :, _PLACES]
    return codes.reshape(count, 8 * width)
