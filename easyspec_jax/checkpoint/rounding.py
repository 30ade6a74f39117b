"""Rounding of matrices to small integers with scales; quantized.py says how these are stored."""

import ml_dtypes  # noqa: F401  (teaches NumPy int4)
import numpy as np
from jaxtyping import Float, Int, Shaped

from easyspec_jax.arithmetic import ceil_div

INTEGERS = {"int8": (-127, 127), "int4": (-8, 7)}
"""Types of quantized values, and the least and the largest value of each."""

INT4_GROUPS = (128, 64, 32)
"""Columns that share a scale in int4: the first of these that divides a row, or else all of it."""

CLIPPING = np.linspace(0.7, 1.0, 8).tolist()
"""Candidates for an int4 scale, as shares of the one with which the largest value becomes 7 or -7.
"""

_CACHED = 1 << 15
"""Numbers that are rounded at a time: the scales tried on them find them in a core's cache."""


def quantize(
    weight: Float[np.ndarray, "out inner"], dtype: str, group: int
) -> tuple[Int[np.ndarray, "out inner"], Float[np.ndarray, "out groups"]]:
    """Round a matrix to integers.

    An int8 group's scale reaches its largest value. An int4 group has so few steps that its largest
    value may cost the others more than it gains: of several roundings, each with the scale that
    fits it best, the one with the least squared error is taken. The scale may be negative: int4
    reaches from -8 to 7, and the longer side may suit the positive numbers.

    Args:
        weight: The matrix.
        dtype: "int8" or "int4".
        group: Columns that share a scale; divides `inner`.

    Returns:
        Values and float32 scales.

    Examples:
        >>> values, scale = quantize(np.array([[0.5, -1.0, 0.25, 0.0]]), "int8", group=4)
        >>> values.tolist()
        [[64, -127, 32, 0]]
    """
    scale = scales_for(weight, dtype, group)
    return rounded(weight, of_columns(scale, slice(0, weight.shape[1]), group), dtype), scale


def scales_for(
    weight: Float[np.ndarray, "out inner"],
    dtype: str,
    group: int,
    importance: Float[np.ndarray, " inner"] | None = None,
) -> Float[np.ndarray, "out groups"]:
    """Choose the scales of quantize().

    Args:
        weight: As for quantize().
        dtype: As for quantize().
        group: As for quantize().
        importance: Weight of each column's squared errors, above 0, where int4's scales are chosen;
            all alike by default.
    """
    _, most = INTEGERS[dtype]
    out, inner = weight.shape
    # [out, inner] -> [out * groups, group]
    grouped = weight.astype(np.float32, copy=False).reshape(-1, group)
    scale = np.empty(len(grouped), np.float32)
    step = max(1, _CACHED // group)
    for start in range(0, len(grouped), step):
        part = grouped[start : start + step]
        reach = np.maximum(part.max(axis=1), -part.min(axis=1)) / np.float32(most)
        # A group of zeros has no reach, and any scale would do.
        reach = np.where(reach > 0, reach, np.float32(1))
        if dtype == "int4":
            own = _of_groups(importance, group, range(start, start + len(part)))
            reach *= _least_error(part / reach[:, None], own, *INTEGERS[dtype])
        scale[start : start + step] = reach
    return scale.reshape(out, inner // group)


def _of_groups(
    importance: Float[np.ndarray, " inner"] | None, group: int, numbers: range
) -> Float[np.ndarray, "groups group"] | None:
    """Return the importance of columns in some groups of a matrix, at most 1 in each.

    Args:
        importance: That of each column, or None.
        group: Columns of a group.
        numbers: The groups, counted row by row.

    Examples:
        Rows of two groups: the groups 1 and 2 are the second of row 0 and the first of row 1.

        >>> _of_groups(np.array([1.0, 1.0, 8.0, 2.0]), 2, range(1, 3)).tolist()
        [[1.0, 0.25], [1.0, 1.0]]
    """
    if importance is None:
        return None
    by_group = importance.reshape(-1, group)
    by_group = (by_group / by_group.max(axis=1, keepdims=True)).astype(np.float32)
    return by_group[np.asarray(numbers) % len(by_group)]


def _least_error(
    relative: Float[np.ndarray, "groups group"],
    importance: Float[np.ndarray, "groups group"] | None,
    least: int,
    most: int,
) -> Float[np.ndarray, " groups"]:
    """Choose each group's scale by the squared error that it leaves.

    Args:
        relative: The weights over the scale that reaches the largest, so that no square overflows.
        importance: Weights of the squared errors, or None if all count alike.
        least: The least integer.
        most: The largest.

    Returns:
        Scales, over that one. They are negative where that is better.
    """
    best, chosen = np.zeros(len(relative), np.float32), np.ones(len(relative), np.float32)
    tried = np.empty_like(relative)
    for share in (*CLIPPING, *(-share for share in CLIPPING)):
        np.multiply(relative, 1 / share, out=tried)
        np.rint(tried, out=tried)
        np.clip(tried, least, most, out=tried)
        # The scale s with the least |s q - w|^2 is (q·w) / (q·q), which leaves |w|^2 less the gain.
        weighted = tried if importance is None else tried * importance
        along = np.einsum("ng,ng->n", weighted, relative)
        squares = np.einsum("ng,ng->n", weighted, tried)
        # Integers that are all zero gain nothing, and divide nothing.
        squares = np.where(squares > 0, squares, np.float32(1))
        gain = along * along / squares
        chosen, best = np.where(gain > best, along / squares, chosen), np.maximum(gain, best)
    return chosen


def rounded(
    weight: Float[np.ndarray, "rows columns"], scale: Float[np.ndarray, "rows columns"], dtype: str
) -> Int[np.ndarray, "rows columns"]:
    """Divide by scales and round to integers.

    Examples:
        >>> rounded(np.array([[0.9, -2.0]]), np.array([[0.2, 0.2]]), "int4").tolist()
        [[4, -8]]
    """
    least, most = INTEGERS[dtype]
    values = weight.astype(np.float32, copy=False) / scale
    np.clip(np.rint(values, out=values), least, most, out=values)
    return values.astype(np.int8).astype(dtype, copy=False)


def dequantize(
    values: Int[np.ndarray, "out inner"], scale: Float[np.ndarray, "out groups"]
) -> Float[np.ndarray, "out inner"]:
    """Multiply values by their scales, in float32.

    Examples:
        >>> values, scale = quantize(np.array([[0.5, -1.0, 0.25, 0.0]]), "int8", group=4)
        >>> dequantize(values, scale).round(2).tolist()
        [[0.5, -1.0, 0.25, 0.0]]
    """
    (out, inner), groups = values.shape, scale.shape[1]
    grouped = values.astype(np.float32).reshape(out, groups, inner // groups)
    return (grouped * scale[:, :, None]).reshape(out, inner)


def of_columns(
    by_group: Shaped[np.ndarray, "rows groups"], columns: slice, group: int
) -> Shaped[np.ndarray, "rows columns"]:
    """Repeat what groups of columns share for each of some columns.

    Args:
        by_group: A value for every group of a row.
        columns: The columns.
        group: Columns of a group.

    Examples:
        >>> of_columns(np.array([[0.5, 2.0]]), slice(1, 4), group=2).tolist()
        [[0.5, 2.0, 2.0]]
    """
    if by_group.shape[1] == 1:
        return np.broadcast_to(by_group, (len(by_group), columns.stop - columns.start))
    first, last = columns.start // group, ceil_div(columns.stop, group)
    repeated = np.repeat(by_group[:, first:last], group, axis=1)
    return repeated[:, columns.start - first * group : columns.stop - first * group]
