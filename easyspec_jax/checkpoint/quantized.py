"""Quantized matrices: small integers, and a scale for each group of a row's columns.

    weight[o, i] ≈ values[o, i] · scale[o, i // group] + offset[o, i // group]

A matrix N.weight of int8 or int4 has its scales in N.weight_scale, float32 [out, in / group], and
the offsets in N.weight_offset, of the same shape and type, if it has any. Matrices that are
rounded here have none; formats with zero points, or with a least number in each group, need them.
One scale a row, [out, 1], is quantization by channel; it can wait until after the product. Whatever
else is in a checkpoint stays as it is: norms and biases are too small to matter.

`Quantized` makes such tensors out of any others while they are read, so a checkpoint is quantized
the same way when it is opened and when it is converted.
"""

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import cast

import numpy as np
from jaxtyping import Float

from easyspec_jax.checkpoint.families import ROUTER
from easyspec_jax.checkpoint.rounding import (
    INT4_GROUPS,
    INTEGERS,
    of_columns,
    rounded,
    scales_for,
)
from easyspec_jax.checkpoint.tensors import Slices, TensorSource, row_blocks
from easyspec_jax.errors import EasySpecError
from easyspec_jax.options import Weights

SCALE = "_scale"
"""Suffix of the name of a matrix's scales."""

OFFSET = "_offset"
"""Suffix of the name of a matrix's offsets."""

_KEPT = 64 << 20
"""Bytes of scales that are kept: those of gate and up of a 70B model, say, are 15 MB."""

Integers = tuple[tuple[str, str, int, bool], ...]
"""Name, type, scales of a row and whether there are offsets, of each quantized matrix."""

_VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")


def scale_name(matrix: str) -> str:
    """Return the name of a matrix's scales.

    Examples:
        >>> scale_name("lm_head.weight")
        'lm_head.weight_scale'
    """
    return matrix + SCALE


def offset_name(matrix: str) -> str:
    """Return the name of a matrix's offsets.

    Examples:
        >>> offset_name("lm_head.weight")
        'lm_head.weight_offset'
    """
    return matrix + OFFSET


def is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Return whether a tensor is one that tokens are multiplied by, or an embedding.

    Routers are not: they are small, and a rounded score may choose another expert.
    """
    return len(shape) == 2 and name.endswith(".weight") and not name.endswith(ROUTER)


@dataclass(frozen=True)
class Dequantized:
    """A source whose quantized matrices are multiplied by their scales as they are read.

    They are float32, and their scales and offsets are not among the tensors. Others stay as they
    are stored.

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
        floats = values.astype(np.float32) * of_columns(scale, columns, group)
        if offset_name(name) in self.below.shapes():
            floats += of_columns(self.below.read(offset_name(name), (rows,)), columns, group)
        return floats

    @cached_property
    def _quantized(self) -> frozenset[str]:
        dtypes = self.below.dtypes()
        return frozenset(name for name, dtype in dtypes.items() if dtype in INTEGERS)

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = dict(self.below.shapes())
        for name in self._quantized:
            del shapes[scale_name(name)]
            shapes.pop(offset_name(name), None)
        return shapes

    @cached_property
    def _dtypes(self) -> dict[str, str]:
        dtypes = dict(self.below.dtypes())
        for name in self._quantized:
            del dtypes[scale_name(name)]
            dtypes.pop(offset_name(name), None)
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


class _Kept:
    """Arrays that threads compute once, whichever asks first; the latest ones are kept."""

    def __init__(self) -> None:
        self._arrays = OrderedDict[tuple[str, int], Future[np.ndarray]]()
        self._bytes, self._lock = 0, threading.Lock()

    def get(self, key: tuple[str, int], compute: Callable[[], np.ndarray]) -> np.ndarray:
        """Return the array under a key; threads that ask meanwhile wait for the first one."""
        with self._lock:
            first = key not in self._arrays
            future = self._arrays.setdefault(key, Future())
            self._arrays.move_to_end(key)
        if first:
            try:
                self._keep(future, compute())
            except BaseException as error:  # threads that wait for this array must not hang
                with self._lock:
                    del self._arrays[key]
                future.set_exception(error)
        return future.result()

    def _keep(self, future: Future[np.ndarray], array: np.ndarray) -> None:
        """Hand over a new array, and drop those that have not been used for the longest."""
        with self._lock:
            future.set_result(array)
            self._bytes += array.nbytes
            while self._bytes > _KEPT:
                oldest = next(key for key, future in self._arrays.items() if future.done())
                self._bytes -= self._arrays.pop(oldest).result().nbytes


@dataclass(frozen=True)
class Quantized:
    """A source whose matrices are quantized as they are read; it has their scales too.

    Scales are computed when they are first asked for, by reading the whole rows of a block, and
    kept for a while. Threads that read different blocks round them at the same time. Matrices that
    are stored as integers stay so, unless int8 is to become int4.

    Attributes:
        below: Where the tensors come from.
        weights: Type of the values. With "int4" the embedding and the head get "int8": they are a
            small part of a large model, and the head's errors are those of the logits.
        group: The most columns that share a scale in int4, one of INT4_GROUPS.
    """

    below: TensorSource
    weights: Weights
    group: int = INT4_GROUPS[0]
    _scales: _Kept = field(default_factory=_Kept, repr=False, compare=False)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def dtypes(self) -> Mapping[str, str]:
        return self._dtypes

    def read(self, name: str, window: Slices = ()) -> np.ndarray:
        matrix = name.removesuffix(SCALE)
        if name != matrix and matrix in self._new:
            rows, groups = whole_window(self._shapes[name], window)
            return self._scale_of(matrix, rows)[:, groups]
        if name not in self._new:
            return self.below.read(name, window)
        rows, columns = whole_window(self._new[name], window)
        scale = of_columns(self._scale_of(name, rows), columns, self._group(name))
        return rounded(self._floats.read(name, (rows, columns)), scale, self._dtype(name))

    @cached_property
    def _new(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the matrices that this source rounds."""
        dtypes, new = self.below.dtypes(), {}
        for name, shape in self.below.shapes().items():
            narrows = (dtypes[name], self._dtype(name)) == ("int8", "int4")
            if is_matrix(name, shape) and (dtypes[name] not in INTEGERS or narrows):
                new[name] = shape
        return new

    @cached_property
    def _floats(self) -> TensorSource:
        return Dequantized(self.below)

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = dict(self.below.shapes())
        for name, (rows, inner) in self._new.items():
            shapes[scale_name(name)] = rows, inner // self._group(name)
            shapes.pop(offset_name(name), None)
        return shapes

    @cached_property
    def _dtypes(self) -> dict[str, str]:
        dtypes = dict(self.below.dtypes())
        for name in self._new:
            dtypes[name] = self._dtype(name)
            dtypes[scale_name(name)] = "float32"
            dtypes.pop(offset_name(name), None)
        return dtypes

    def _dtype(self, name: str) -> str:
        return "int8" if name in _VOCABULARY else self.weights

    def _group(self, name: str) -> int:
        """Return how many columns of a matrix share a scale."""
        inner = self._new[name][1]
        if self._dtype(name) == "int8":
            return inner
        fitting = (group for group in INT4_GROUPS if group <= self.group and inner % group == 0)
        return next(fitting, inner)

    def _scale_of(self, name: str, rows: slice) -> Float[np.ndarray, "rows groups"]:
        """Return the scales of some rows, from the blocks that they are in."""
        found = [np.empty((0, self._shapes[scale_name(name)][1]), np.float32)]
        for block in row_blocks(self._new[name]):
            if block.start < rows.stop and rows.start < block.stop:
                measure = partial(self._measured, name, block)
                scale = self._scales.get((name, block.start), measure)
                found.append(scale[max(0, rows.start - block.start) : rows.stop - block.start])
        return np.concatenate(found)

    def _measured(self, name: str, rows: slice) -> Float[np.ndarray, "rows groups"]:
        """Read a block of rows for its scales."""
        block = self._floats.read(name, (rows,)).astype(np.float32, copy=False)
        # Rounded, a NaN would be an ordinary number.
        if not np.isfinite(block).all():
            raise EasySpecError(f"{name} has values that are not finite; it cannot be rounded")
        return scales_for(block, self._dtype(name), self._group(name))


def check_narrower(
    source: TensorSource, weights: Weights | None, origin: str, field: str = "weights"
) -> None:
    """Check that matrices are not to be kept in a wider integer than they are stored in.

    Args:
        source: The checkpoint.
        weights: Type asked for.
        origin: Names the checkpoint in error messages.
        field: Names the option.

    Raises:
        EasySpecError: They are.
    """
    if weights == "int8" and "int4" in source.dtypes().values():
        raise EasySpecError(
            f"{origin}: matrices are stored as int4, and `{field}` int8 would only take more "
            f"memory; leave `{field}` out to keep them"
        )


def stored_integers(source: TensorSource) -> Integers:
    """Return how each quantized matrix of a source is stored.

    Examples:
        >>> from easyspec_jax.checkpoint.tensors import Held
        >>> stored_integers(Quantized(Held({"a.weight": np.ones((3, 64))}), "int4"))
        (('a.weight', 'int4', 1, False),)
    """
    shapes = source.shapes()
    found = []
    for name, dtype in source.dtypes().items():
        if dtype in INTEGERS:
            groups, has_offsets = shapes[scale_name(name)][1], offset_name(name) in shapes
            found.append((name, dtype, groups, has_offsets))
    return tuple(found)


def stored_weights(source: TensorSource) -> Weights | None:
    """Return the type that most of a source's quantized matrices have; None if it has none."""
    types = Counter(dtype for dtype in source.dtypes().values() if dtype in INTEGERS)
    return cast("Weights", types.most_common(1)[0][0]) if types else None
