"""Matrices that a file keeps in parts, put together as integers with scales or as floats.

Quantized checkpoints store each matrix N.weight as several tensors: codes (small unsigned or signed
integers, often several to a word), scales, and sometimes zero points. A module for each format
finds these parts; here they become

    weight[o, i] = (code[o, i] - zero[o, i // group]) · scale[o, i // group]

The integer of `quantized` is the code less the middle of all codes. Where a zero point is another
code, their difference times the scale becomes the group's offset, so that codes of 4 bits stay
integers of 4 bits. Only the bytes of a window are read.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import ml_dtypes
import numpy as np
from jaxtyping import Float, Int, Int32, UInt8

from easyspec_jax.arithmetic import ceil_div
from easyspec_jax.checkpoint.rounding import INTEGERS, of_columns
from easyspec_jax.checkpoint.tensors import TensorSource
from easyspec_jax.errors import EasySpecError

FLOATS = ("float32", "bfloat16", "float16")
"""Types of scales."""


class ByGroup(Protocol):
    """Scales or offsets of a matrix."""

    @property
    def groups(self) -> int:
        """How many a row has."""
        ...

    def read(self, rows: slice) -> Float[np.ndarray, "rows groups"]:
        """Read those of some rows, in float32."""
        ...


class Matrix(Protocol):
    """A matrix in parts."""

    @property
    def shape(self) -> tuple[int, int]:
        """Its rows and columns."""
        ...

    @property
    def dtype(self) -> str:
        """Its type: "int8" or "int4", which have scales, or a float."""
        ...

    @property
    def scales(self) -> ByGroup:
        """Its scales."""
        ...

    @property
    def offsets(self) -> ByGroup | None:
        """Its offsets, if it has any."""
        ...

    def read(self, rows: slice, columns: slice) -> np.ndarray:
        """Read a window in that type."""
        ...


@dataclass(frozen=True)
class Parts:
    """Tensors of a file, for a format to look at.

    Attributes:
        source: The file.
        origin: Names it in error messages.
        used: The tensors that matrices were made of, filled in by those who look.
    """

    source: TensorSource
    origin: str
    used: set[str] = field(default_factory=set)

    def has(self, name: str) -> bool:
        """Return whether there is a tensor."""
        return name in self.source.shapes()

    def take(self, name: str, *dtypes: str) -> tuple[int, ...]:
        """Mark a tensor as used and return its shape.

        Raises:
            EasySpecError: It is missing, or of another type.
        """
        if not self.has(name):
            raise EasySpecError(f"{self.origin}: {name} is missing; fetch the whole checkpoint")
        stored = self.source.dtypes()[name]
        if stored not in dtypes:
            raise EasySpecError(
                f"{self.origin}: {name} is stored as {stored}, and only {' and '.join(dtypes)} "
                "can be read there"
            )
        self.used.add(name)
        return self.source.shapes()[name]

    def wrong(self, name: str, wanted: str) -> EasySpecError:
        """Make the error of a tensor whose shape is wrong."""
        shape = self.source.shapes()[name]
        return EasySpecError(f"{self.origin}: {name} has shape {shape}; expected {wanted}")

    def matrix(self, name: str, *dtypes: str) -> tuple[int, int]:
        """Take a tensor that must have two dimensions, neither of them empty."""
        shape = self.take(name, *dtypes)
        if len(shape) != 2 or 0 in shape:
            raise self.wrong(name, "a matrix")
        return shape[0], shape[1]

    def drop(self, *names: str) -> None:
        """Mark tensors as used that the weights do not depend on, if they are there."""
        self.used.update(filter(self.has, names))


class Format(Protocol):
    """A format of quantized checkpoints."""

    def __call__(
        self, parts: Parts, settings: Mapping[str, Any], known: Collection[str]
    ) -> dict[str, Matrix]:
        """Find the matrices of a checkpoint.

        Args:
            parts: Its tensors.
            settings: Its `quantization_config`.
            known: The tensors that the model has, by the names they have if nothing is quantized.
                Some writers add biases of zeros.

        Raises:
            EasySpecError: The layout is not supported, or parts of a matrix do not fit together.
        """
        ...


def blocks_of(rows: slice, block: int) -> tuple[slice, Int[np.ndarray, " rows"]]:
    """Return the blocks that hold some rows, and which of these blocks each row is in.

    Args:
        rows: The rows.
        block: Rows of a block.

    Examples:
        >>> blocks, of_rows = blocks_of(slice(3, 9), block=4)
        >>> blocks, of_rows.tolist()
        (slice(0, 3, None), [0, 1, 1, 1, 1, 2])
    """
    blocks = slice(rows.start // block, ceil_div(rows.stop, block))
    return blocks, np.arange(rows.start, rows.stop) // block - blocks.start


@dataclass(frozen=True)
class Scales:
    """Scales of blocks of a matrix.

    Attributes:
        parts: Where they are.
        name: The stored tensor.
        groups: Scales of a row.
        group: Columns that share one; the last group may have fewer.
        block: Rows that share them.
        transposed: Whether they are stored as [groups, rows].
    """

    parts: Parts
    name: str
    groups: int
    group: int
    block: int = 1
    transposed: bool = False

    def read(self, rows: slice) -> Float[np.ndarray, "rows groups"]:
        """Read the scales of some rows, in float32."""
        blocks, of_rows = blocks_of(rows, self.block)
        source = self.parts.source
        if self.transposed:
            stored = source.read(self.name, (slice(0, self.groups), blocks)).T
        elif source.shapes()[self.name] in ((), (1,), (1, 1)):
            of_rows, stored = np.zeros_like(of_rows), source.read(self.name)
        else:
            stored = source.read(self.name, (blocks,))
        scales = stored.astype(np.float32).reshape(-1, self.groups)
        if not np.isfinite(scales).all():
            raise EasySpecError(
                f"{self.parts.origin}: {self.name} holds NaN or infinity; fetch it again"
            )
        return scales[of_rows]


def scales_of(
    parts: Parts, name: str, matrix: tuple[int, int], blocks: tuple[int, int] | None = None
) -> Scales:
    """Find out from the shape of scales which entries of a matrix share one.

    Args:
        parts: Where they are.
        name: The stored tensor: one number, one a row, [rows, groups] or one a block.
        matrix: The matrix's shape.
        blocks: Rows and columns of a block, if the scales may be those of blocks.

    Raises:
        EasySpecError: The scales fit none of these.
    """
    shape = parts.take(name, *FLOATS)
    rows, inner = matrix
    if shape in ((), (1,), (1, 1)):
        return Scales(parts, name, 1, inner, block=rows)
    if blocks is not None and shape == (-(-rows // blocks[0]), -(-inner // blocks[1])):
        return Scales(parts, name, shape[1], blocks[1], block=blocks[0])
    if shape in ((rows,), (rows, 1)):
        return Scales(parts, name, 1, inner)
    if len(shape) == 2 and shape[0] == rows and shape[1] > 0 and inner % shape[1] == 0:
        return Scales(parts, name, shape[1], inner // shape[1])
    raise parts.wrong(name, f"scales of equal groups of a matrix of {matrix}")


Codes = Callable[[slice, slice], np.ndarray]
"""Reads the codes of a window: some rows and columns."""

Zeros = Callable[[slice], Int[np.ndarray, "rows groups"]]
"""Reads the zero points of some rows, as codes."""


@dataclass(frozen=True)
class Offsets:
    """Offsets of groups whose zero points are not in the middle of all codes.

    Attributes:
        scales: Scales of the groups.
        zeros: Reads their zero points.
        middle: The code that becomes the integer 0.
    """

    scales: Scales
    zeros: Zeros
    middle: int

    @property
    def groups(self) -> int:
        return self.scales.groups

    def read(self, rows: slice) -> Float[np.ndarray, "rows groups"]:
        scales = self.scales.read(rows)
        with np.errstate(over="ignore"):  # reported below, with a name
            offsets = (self.middle - self.zeros(rows)).astype(np.float32) * scales
        if not np.isfinite(offsets).all():
            origin, name = self.scales.parts.origin, self.scales.name
            raise EasySpecError(f"{origin}: {name} holds values that overflow; fetch it again")
        return offsets


@dataclass(frozen=True)
class Coded:
    """A matrix of codes, scales and zero points.

    Attributes:
        name: Names it in error messages.
        shape: Its rows and columns.
        dtype: "int8" or "int4", or "bfloat16" if the codes are floats.
        scales: Its scales.
        codes: Reads its codes.
        middle: The code that becomes the integer 0.
        zeros: Reads the zero points of every group; None if they are all the middle.
    """

    name: str
    shape: tuple[int, int]
    dtype: str
    scales: Scales
    codes: Codes
    middle: int = 0
    zeros: Zeros | None = None

    @property
    def offsets(self) -> Offsets | None:
        return None if self.zeros is None else Offsets(self.scales, self.zeros, self.middle)

    def read(self, rows: slice, columns: slice) -> np.ndarray:
        codes = self.codes(rows, columns)
        if self.dtype in INTEGERS:
            return (codes.astype(np.int16) - self.middle).astype(self.dtype)
        with np.errstate(over="ignore", invalid="ignore"):  # reported below, with a name
            scales = of_columns(self.scales.read(rows), columns, self.scales.group)
            weight = (codes.astype(np.float32) * scales).astype(ml_dtypes.bfloat16)
        if not np.isfinite(weight).all():
            origin = self.scales.parts.origin
            raise EasySpecError(
                f"{origin}: {self.name} holds NaN or values that overflow; fetch it again"
            )
        return weight


def unpacked(
    parts: Parts, weight: str, dtype: str, scales: Scales, zeros: Zeros | None = None
) -> Coded:
    """Return a matrix whose codes are a tensor of its own shape, one signed number each.

    Args:
        parts: Where it is.
        weight: The stored tensor, which names the matrix as well.
        dtype: Type to read it in.
        scales: Its scales.
        zeros: Its zero points.
    """
    shape = parts.source.shapes()[weight]

    def codes(rows: slice, columns: slice) -> np.ndarray:
        return parts.source.read(weight, (rows, columns))

    return Coded(weight, (shape[0], shape[1]), dtype, scales, codes, zeros=zeros)


def fields(words: Int32[np.ndarray, "*rest words"], bits: int) -> UInt8[np.ndarray, "*rest codes"]:
    """Take words of 32 bits apart, the lowest bits first.

    Args:
        words: The words.
        bits: 4 or 8.

    Examples:
        >>> fields(np.array([[0x76543210]], np.int32), 4).tolist()
        [[0, 1, 2, 3, 4, 5, 6, 7]]
    """
    stored = np.ascontiguousarray(words, "<i4").view(np.uint8)
    if bits == 8:
        return stored
    # [..., bytes] -> [..., bytes, 2] -> [..., codes]
    halves = np.stack([stored & 15, stored >> 4], axis=-1)
    return halves.reshape(*words.shape[:-1], 8 * words.shape[-1])


def covering(window: slice, count: int) -> tuple[slice, slice]:
    """Return the words that hold some codes, and where the codes are in them.

    Args:
        window: The codes.
        count: Codes of a word.

    Examples:
        >>> covering(slice(3, 10), 8)
        (slice(0, 2, None), slice(3, 10, None))
    """
    first = window.start // count
    return (
        slice(first, max(first, -(-window.stop // count))),
        slice(window.start - first * count, window.stop - first * count),
    )


def is_in_order(parts: Parts, name: str, inner: int, group: int) -> bool:
    """Return whether an index of groups says that they follow each other.

    Args:
        parts: Where it is.
        name: The stored tensor: the group of every column. All -1 stands for no index.
        inner: The matrix's columns.
        group: Columns of a group.

    Raises:
        EasySpecError: It has another shape or type.
    """
    if parts.take(name, "I32") != (inner,):
        raise parts.wrong(name, str((inner,)))
    index = parts.source.read(name)
    return bool(np.array_equal(index, np.arange(inner) // group) or (index == -1).all())
