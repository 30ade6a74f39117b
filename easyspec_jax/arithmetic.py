"""Arithmetic helpers that several packages share."""

import ml_dtypes  # noqa: F401  (teaches NumPy int4)
import numpy as np


def ceil_div(dividend: int, divisor: int) -> int:
    """Divide and round up.

    Examples:
        >>> ceil_div(7, 4)
        2
    """
    return -(-dividend // divisor)


def round_up(size: int, multiple: int) -> int:
    """Return the smallest multiple of `multiple` that is at least `size`.

    Examples:
        >>> round_up(130, 128)
        256
    """
    return ceil_div(size, multiple) * multiple


def power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least n.

    Examples:
        >>> [power_of_two(n) for n in (1, 5, 64)]
        [1, 8, 64]
    """
    return 1 << (n - 1).bit_length()


def packed_width(dtype: np.dtype) -> float:
    """Return the bytes that a number takes in an accelerator's memory, where int4 is packed.

    Examples:
        >>> packed_width(np.dtype("int4")), packed_width(np.dtype("float32"))
        (0.5, 4)
    """
    return 0.5 if dtype.name == "int4" else dtype.itemsize


def wrap_seed(seed: int) -> int:
    """Reduce a seed to the 32 bits that the noise is keyed with."""
    return seed % 2**32
