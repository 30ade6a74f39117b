"""Quantized matrices: small integers, and a scale for each group of a row's columns.

    weight[o, i] ≈ values[o, i] · scale[o, i // group]

A matrix N.weight of int8 or int4 has its scales in N.weight_scale, float32 [out, in / group]. One
scale a row, [out, 1], is quantization by channel; it can wait until after the product. Whatever
else is in a checkpoint stays as it is: norms and biases are too small to matter.

`Quantized` makes such tensors out of any others while they are read, so a checkpoint is quantized
the same way when it is opened and when it is converted.
"""

import threading
from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import cast

import ml_dtypes  # noqa: F401  (teaches NumPy int4)
import numpy as np
from jaxtyping import Float, Int, Shaped

from easyspec_jax.checkpoint.tensors import Slices, TensorSource, row_blocks
from easyspec_jax.errors import EasySpecError
from easyspec_jax.options import Weights

SCALE = "_scale"
"""Suffix of the name of a matrix's scales."""

INTEGERS = {"int8": 127, "int4": 7}
"""Types of quantized values, and the largest value of each. The range is symmetric."""

INT4_GROUPS = (128, 64, 32)
"""Columns that share a scale in int4: the first of these that divides a row, or else all of it."""

CLIPPING = np.linspace(0.7, 1.0, 16, dtype=np.float32)
"""Candidates for an int4 scale, as shares of the one that reaches the group's largest value."""

_KEPT = 16
"""Matrices whose scales are kept: as many as are read at the same time, and a few more."""

_VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")


def scale_name(matrix: str) -> str:
    """Return the name of a matrix's scales.

    Examples:
        >>> scale_name("lm_head.weight")
        'lm_head.weight_scale'
    """
    return matrix + SCALE


def is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Return whether a tensor is one that tokens are multiplied by, or an embedding."""
    return len(shape) == 2 and name.endswith(".weight")


def quantize(
    weight: Float[np.ndarray, "out inner"], dtype: str, group: int
) -> tuple[Int[np.ndarray, "out inner"], Float[np.ndarray, "out groups"]]:
    """Round a matrix to integers.

    An int8 group's scale reaches its largest value. An int4 group has so few steps that its largest
    value may cost the others more than it gains: of several scales, the one with the least squared
    error is taken.

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
    most = np.float32(INTEGERS[dtype])
    out, inner = weight.shape
    # [out, inner] -> [out, groups, group]
    grouped = weight.astype(np.float32).reshape(out, inner // group, group)
    reach = np.abs(grouped).max(axis=2, keepdims=True) / most
    # A group of zeros has no reach, and any scale would do.
    scale = np.where(reach > 0, reach, np.float32(1))
    if dtype == "int4":
        scale = _least_error(grouped, scale, most)
    values = _rounded(grouped, scale, most)
    return values.astype(dtype).reshape(out, inner), scale[:, :, 0]


def _rounded(grouped: np.ndarray, scale: np.ndarray | np.float32, most: np.float32) -> np.ndarray:
    return np.clip(np.rint(grouped / scale), -most, most)


def _least_error(grouped: np.ndarray, reach: np.ndarray, most: np.float32) -> np.ndarray:
    """Choose each group's scale by the squared error that it leaves."""
    # In units of the widest scale, so that no square overflows.
    relative = grouped / reach
    best, chosen = np.full(reach.shape, np.inf, np.float32), np.ones_like(reach)
    for share in CLIPPING:
        error = np.square(_rounded(relative, share, most) * share - relative)
        total = error.sum(axis=2, keepdims=True)
        chosen, best = np.where(total < best, share, chosen), np.minimum(total, best)
    return reach * chosen


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


@dataclass(frozen=True)
class Dequantized:
    """A source whose quantized matrices are multiplied by their scales as they are read.

    They are float32, and their scales are not among the tensors. Others stay as they are stored.

    Attributes:
        below: Where the tensors come from.
    """

    below: TensorSource

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def dtypes(self) -> Mapping[str, str]:
        return self._dtypes

    def read(self, name: str, window: Slices = ()) -> np.ndarray:
        if name not in self._quantized:
            return self.below.read(name, window)
        rows, columns = whole_window(self._shapes[name], window)
        scale = self.below.read(scale_name(name), (rows,))
        group = self._shapes[name][1] // scale.shape[1]
        values = self.below.read(name, (rows, columns))
        return values.astype(np.float32) * of_columns(scale, columns, group)

    @cached_property
    def _quantized(self) -> frozenset[str]:
        dtypes = self.below.dtypes()
        return frozenset(name for name, dtype in dtypes.items() if dtype in INTEGERS)

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = dict(self.below.shapes())
        for name in self._quantized:
            del shapes[scale_name(name)]
        return shapes

    @cached_property
    def _dtypes(self) -> dict[str, str]:
        dtypes = dict(self.below.dtypes())
        for name in self._quantized:
            del dtypes[scale_name(name)]
            dtypes[name] = "float32"
        return dtypes


def whole_window(shape: tuple[int, ...], window: Slices) -> tuple[slice, slice]:
    """Return the rows and the columns of a matrix that a window selects.

    Examples:
        >>> whole_window((3, 4), (slice(1, 2),))
        (slice(1, 2, None), slice(0, 4, None))
    """
    whole = slice(0, shape[0]), slice(0, shape[1])
    rows, columns = (*window, *whole[len(window) :])
    return rows, columns


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
    return by_group[:, np.arange(columns.start, columns.stop) // group]


@dataclass(frozen=True)
class Quantized:
    """A source whose matrices are quantized as they are read; it has their scales too.

    A matrix's scales are computed by reading it once, when the first part of it is asked for, and
    kept for a while. Matrices that are quantized already stay as they are stored.

    Attributes:
        below: Where the tensors come from.
        weights: Type of the values. With "int4" the embedding and the head get "int8": they are a
            small part of a large model, and the head's errors are those of the logits.
    """

    below: TensorSource
    weights: Weights
    _scales: OrderedDict[str, np.ndarray] = field(
        default_factory=OrderedDict, repr=False, compare=False
    )
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def dtypes(self) -> Mapping[str, str]:
        return self._dtypes

    def read(self, name: str, window: Slices = ()) -> np.ndarray:
        matrix = name.removesuffix(SCALE)
        if name != matrix and matrix in self._new:
            return self._scale_of(matrix)[window]
        if name not in self._new:
            return self.below.read(name, window)
        rows, columns = whole_window(self._new[name], window)
        weight = self.below.read(name, (rows, columns)).astype(np.float32)
        scale = of_columns(self._scale_of(name)[rows], columns, self._group(name))
        dtype = self._dtype(name)
        most = np.float32(INTEGERS[dtype])
        return _rounded(weight, scale, most).astype(dtype)

    @cached_property
    def _new(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the matrices that this source quantizes."""
        dtypes, new = self.below.dtypes(), {}
        for name, shape in self.below.shapes().items():
            if is_matrix(name, shape) and dtypes[name] not in INTEGERS:
                new[name] = shape
        return new

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = dict(self.below.shapes())
        for name, (rows, inner) in self._new.items():
            shapes[scale_name(name)] = rows, inner // self._group(name)
        return shapes

    @cached_property
    def _dtypes(self) -> dict[str, str]:
        dtypes = dict(self.below.dtypes())
        for name in self._new:
            dtypes[name] = self._dtype(name)
            dtypes[scale_name(name)] = "float32"
        return dtypes

    def _dtype(self, name: str) -> str:
        return "int8" if name in _VOCABULARY else self.weights

    def _group(self, name: str) -> int:
        """Return how many columns of a matrix share a scale."""
        inner = self._new[name][1]
        if self._dtype(name) == "int8":
            return inner
        return next((group for group in INT4_GROUPS if inner % group == 0), inner)

    def _scale_of(self, name: str) -> Float[np.ndarray, "out groups"]:
        with self._lock:
            if name not in self._scales:
                self._scales[name] = self._measured(name)
            self._scales.move_to_end(name)
            while len(self._scales) > _KEPT:
                self._scales.popitem(last=False)
            return self._scales[name]

    def _measured(self, name: str) -> Float[np.ndarray, "out groups"]:
        """Read a matrix block by block for its scales."""
        shape, group = self._new[name], self._group(name)
        scale = np.empty((shape[0], shape[1] // group), np.float32)
        for rows in row_blocks(shape):
            block = self.below.read(name, (rows,))
            # Rounded, a NaN would be an ordinary number.
            if not np.isfinite(block.astype(np.float32)).all():
                raise EasySpecError(f"{name} has values that are not finite; it cannot be rounded")
            scale[rows] = quantize(block, self._dtype(name), group)[1]
        return scale


def stored_weights(source: TensorSource) -> Weights | None:
    """Return the type that most of a source's quantized matrices have; None if it has none."""
    types = Counter(dtype for dtype in source.dtypes().values() if dtype in INTEGERS)
    return cast("Weights", types.most_common(1)[0][0]) if types else None
