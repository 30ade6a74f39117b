"""The int4 matrices of a converted checkpoint: two values to a byte.

Orbax has no type of four bits, and NumPy's takes a byte for each value. A matrix N.weight of int4
is therefore stored as N.weight_int4, uint8 [out, in / 2]. Byte j holds column 2j in its low half
and column 2j + 1 in its high half, each in two's complement.
"""

import ml_dtypes
import numpy as np
from jaxtyping import Int, UInt8

PACKED = "_int4"
"""Suffix of the name of a packed matrix."""


def pack(values: Int[np.ndarray, "out inner"]) -> UInt8[np.ndarray, "out half"]:
    """Put every two columns into one.

    Args:
        values: Numbers from -8 to 7; `inner` is even.

    Examples:
        >>> pack(np.array([[1, -1, -8, 7]], "int4")).tolist()
        [[241, 120]]
    """
    nibbles = values.astype(np.int8).view(np.uint8) & 15
    return nibbles[:, 0::2] | nibbles[:, 1::2] << 4


def unpack(packed: UInt8[np.ndarray, "out half"]) -> Int[np.ndarray, "out inner"]:
    """Undo pack().

    Examples:
        >>> unpack(np.array([[241, 120]], np.uint8)).tolist()
        [[1, -1, -8, 7]]
    """
    rows, half = packed.shape
    # [rows, half] -> [rows, half, 2] -> [rows, 2 * half]
    nibbles = np.stack([packed & 15, packed >> 4], axis=-1).reshape(rows, 2 * half)
    # 0 ... 15 -> 0 ... 7, -8 ... -1: flip the sign bit, then move the range down.
    return ((nibbles ^ 8).astype(np.int8) - 8).astype(ml_dtypes.int4)
