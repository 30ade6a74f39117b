"""Tensors of GGUF files: dequantized, or kept as integers with scales.

A quantized matrix is a sequence of blocks along its rows. Most kinds are integers and scales
already, some with a least number for each group, which becomes an offset: nothing is lost if they
are kept. The others are dequantized and rounded anew, to int8 with a scale for every 32 columns.

| kind | kept as | group | |
|-|-|-|-|
| Q8_0 | int8 | 32 | exact |
| Q4_0 | int4 | 32 | exact: 4 bits less 8 |
| Q5_0 | int8 | 32 | exact: 5 bits less 16 |
| Q6_K | int8 | 16 | exact: 6 bits less 32, and the product of two scales |
| Q4_1, Q4_K | int4 | 32 | exact but for float32's rounding: 4 bits less 8, and an offset |
| Q5_1, Q5_K | int8 | 32 | exact but for float32's rounding: 5 bits, and an offset |
| Q2_K | int4 | 16 | exact but for float32's rounding: 2 bits, and an offset |
| Q3_K | int4 | 16 | exact: 3 bits less 4, and the product of two scales |
| IQ4_NL | int8 | 32 | exact: 16 integers in a table |
| IQ4_XS | int8 | 32 | exact: the same, and the product of two scales |
| others | int8 | 32 | rounded |
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import ml_dtypes  # noqa: F401  (teaches NumPy int4)
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, ReaderTensor
from gguf.quants import dequantize
from jaxtyping import Float, Int8, UInt8

from easyspec_jax.checkpoint.quantized import (
    OFFSET,
    SCALE,
    is_matrix,
    offset_name,
    scale_name,
    whole_window,
)
from easyspec_jax.checkpoint.rounding import quantize
from easyspec_jax.checkpoint.tensors import Slices, read_bytes, row_blocks
from easyspec_jax.errors import EasySpecError, first_line

_FLOATS = ("F64", "F32", "F16", "BF16")
_ROUNDED_GROUP = 32
_TABLE = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8
)
"""Values of IQ4 numbers."""


class GGUFSource:
    """Tensors of GGUF files under their own names, dequantized to float32 when they are read.

    Args:
        tensors: Each tensor by name, with the file that holds it.
    """

    def __init__(self, tensors: Mapping[str, tuple[Path, ReaderTensor]]) -> None:
        self._places: dict[str, _ByteRange] = {}
        for name, (path, tensor) in tensors.items():
            offset, size = int(tensor.data_offset), int(tensor.n_bytes)
            self._places[name] = _ByteRange(
                path, tensor.tensor_type, shape_of(tensor), offset, size
            )

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: place.shape for name, place in self._places.items()}

    def dtypes(self) -> Mapping[str, str]:
        dtypes: dict[str, str] = {}
        for name, place in self._places.items():
            dtypes[name] = "float32" if _readable(place.kind) else place.kind.name
        return dtypes

    def read(self, name: str, window: Slices = ()) -> np.ndarray:
        place = self._places[name]
        rows = window[0] if window else slice(0, place.shape[0])
        return self._read_rows(place, rows)[(slice(None), *window[1:])]

    def kind(self, name: str) -> GGMLQuantizationType:
        """Return how a tensor is stored."""
        return self._places[name].kind

    def read_blocks(self, name: str, rows: slice) -> UInt8[np.ndarray, "rows bytes"]:
        """Read rows of a matrix as they are stored."""
        place = self._places[name]
        return self._read_bytes(place, rows.start, rows.stop, place.size // place.shape[0])

    def _read_rows(self, place: "_ByteRange", rows: slice) -> np.ndarray:
        # A quantized tensor is a sequence of blocks along its last dimension: Q4_0 keeps 32 numbers
        # in 18 bytes, a scale in float16 and 4 bits for each. Blocks never span two rows, so rows
        # [start, stop) of a matrix are one range of bytes. A vector is a single row, and is read
        # whole, since `rows` may begin inside a block.
        if len(place.shape) == 1:
            return dequantize(self._read_bytes(place, 0, 1, place.size), place.kind)[0, rows]
        row = place.size // place.shape[0]
        return dequantize(self._read_bytes(place, rows.start, rows.stop, row), place.kind)

    def _read_bytes(self, place: "_ByteRange", start: int, stop: int, row: int) -> np.ndarray:
        """Read rows of `row` bytes each: uint8 [stop - start, row]."""
        stored = np.empty((stop - start, row), np.uint8)
        try:
            with place.path.open("rb", buffering=0) as file:
                read_bytes(file.fileno(), stored, place.offset + start * row)
        except (OSError, EOFError) as error:
            raise EasySpecError(
                f"{place.path} cannot be read ({first_line(error)}); fetch it again"
            ) from None
        return stored


@dataclass(frozen=True)
class _ByteRange:
    """Location of a tensor in a GGUF file, in bytes, and its kind of quantization."""

    path: Path
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    size: int


@cache
def _readable(kind: GGMLQuantizationType) -> bool:
    """Whether the gguf library can dequantize a kind; it has no list, so one block is tried."""
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


Blocks = UInt8[np.ndarray, "blocks bytes"]
Integers = tuple[np.ndarray, ...]
"""Int8 [blocks, numbers], float32 scales [blocks, groups] and, of some kinds, offsets as well."""


def _q8_0(blocks: Blocks) -> Integers:
    """A scale in float16, and 32 numbers of 8 bits."""
    return blocks[:, 2:].view(np.int8), _halves(blocks[:, :2])


def _q4_0(blocks: Blocks) -> Integers:
    """A scale, and 16 bytes: number j is the low half of byte j, number 16 + j its high half."""
    return _nibbles(blocks[:, 2:]).view(np.int8) - np.int8(8), _halves(blocks[:, :2])


def _q4_1(blocks: Blocks) -> Integers:
    """A scale, the least number, and four bits of each as in Q4_0."""
    numbers = _nibbles(blocks[:, 4:]).view(np.int8) - np.int8(8)
    scale = _halves(blocks[:, :2])
    # q · scale + least = (q - 8) · scale + (least + 8 · scale)
    return numbers, scale, _halves(blocks[:, 2:4]) + 8 * scale


def _q5_0(blocks: Blocks) -> Integers:
    """A scale, the fifth bits of all 32 numbers, and four bits of each as in Q4_0."""
    return _five_bits(blocks[:, 2:]) - np.int8(16), _halves(blocks[:, :2])


def _q5_1(blocks: Blocks) -> Integers:
    """A scale, the least number, the fifth bits of all 32, and four bits of each as in Q4_0."""
    return _five_bits(blocks[:, 4:]), _halves(blocks[:, :2]), _halves(blocks[:, 2:4])


def _five_bits(stored: UInt8[np.ndarray, "blocks bytes"]) -> Int8[np.ndarray, "blocks 32"]:
    """Join the fifth bits in the first four bytes with the nibbles after them."""
    # [blocks, 4] -> [blocks, 32], the lowest bit of the first byte first
    fifth = np.unpackbits(stored[:, :4], axis=1, bitorder="little")
    return (_nibbles(stored[:, 4:]) | fifth << 4).view(np.int8)


def _q2_k(blocks: Blocks) -> Integers:
    """256 numbers of 2 bits: 16 bytes of scales and minima, 64 of numbers, and a scale of each."""
    # Number 128 h + 32 p + j has pair p of byte j of half h.
    pairs = blocks[:, 16:80].reshape(-1, 2, 1, 32) >> np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    numbers = (pairs & 3).reshape(-1, 256)
    scale = _halves(blocks[:, 80:82]) * (blocks[:, :16] & 15)
    least = _halves(blocks[:, 82:]) * (blocks[:, :16] >> 4)
    return numbers.view(np.int8), scale, -least


def _q4_k(blocks: Blocks) -> Integers:
    """256 numbers of 4 bits in 8 groups, which share 32 bytes two by two."""
    scale, least = _k_scales(blocks)
    # [blocks, 128] -> [blocks * 4, 32] -> [blocks * 4, 64] -> [blocks, 256]
    numbers = _nibbles(blocks[:, 16:].reshape(-1, 32)).reshape(-1, 256)
    return numbers.view(np.int8) - np.int8(8), scale, 8 * scale - least


def _q5_k(blocks: Blocks) -> Integers:
    """The same with a fifth bit: bit g of byte j of 32 belongs to number j of group g."""
    scale, least = _k_scales(blocks)
    fifth = blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    numbers = _nibbles(blocks[:, 48:].reshape(-1, 32)).reshape(-1, 256)
    return (numbers | fifth.reshape(-1, 256) << 4).view(np.int8), scale, -least


def _k_scales(blocks: Blocks) -> tuple[np.ndarray, np.ndarray]:
    """Return the scales and the minima of 8 groups: float32 [blocks, 8] each.

    Both are numbers of 6 bits in 12 bytes, times a scale in float16. Those of the first four groups
    are the low bits of bytes 0 to 3 and 4 to 7, whose upper pairs complete the halves of bytes 8 to
    11, which are those of the last four.
    """
    low, least, halves = (blocks[:, first : first + 4] for first in (4, 8, 12))
    scale = np.concatenate([low & 63, halves & 15 | low >> 6 << 4], axis=1)
    least = np.concatenate([least & 63, halves >> 4 | least >> 6 << 4], axis=1)
    return _halves(blocks[:, :2]) * scale, _halves(blocks[:, 2:4]) * least


def _q6_k(blocks: Blocks) -> Integers:
    """256 numbers of 6 bits: 128 bytes of low halves, 64 of upper pairs, 16 scales and a scale."""
    # Each half of a block has 128 numbers in four parts of 32. The low halves of parts 0 and 2
    # share 32 bytes, and so do those of 1 and 3; the upper pairs of all four share 32 others.
    low = blocks[:, :128].reshape(-1, 2, 1, 64)
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32)
    # -> [blocks, half, 2, 64], [blocks, half, 4, 32]
    low = low >> np.array([0, 4], np.uint8)[:, None] & 15
    high = high >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    numbers = low.reshape(-1, 256) | high.reshape(-1, 256) << 4
    scale = _halves(blocks[:, 208:]) * blocks[:, 192:208].view(np.int8).astype(np.float32)
    return numbers.view(np.int8) - np.int8(32), scale


def _q3_k(blocks: Blocks) -> Integers:
    """256 numbers of 3 bits: 32 bytes of upper bits, 64 of lower pairs, 12 of scales, a scale."""
    # Number 128 h + 32 p + j has pair p of byte j of half h, and bit 4 h + p of upper byte j.
    pairs = blocks[:, 32:96].reshape(-1, 2, 1, 32) >> np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    upper = blocks[:, None, :32] >> np.arange(8, dtype=np.uint8)[:, None]
    # -> [blocks, 2, 4, 32], [blocks, 8, 32] -> [blocks, 256]
    numbers = (pairs & 3).reshape(-1, 256) | (upper & 1).reshape(-1, 256) << 2
    # 16 scales: four bits of each, then two bits of each, four to a byte.
    high = blocks[:, None, 104:108] >> np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    scales = _nibbles(blocks[:, 96:104]) | (high & 3).reshape(-1, 16) << 4
    scale = _halves(blocks[:, 108:]) * (scales.astype(np.float32) - 32)
    return numbers.view(np.int8) - np.int8(4), scale


def _iq4_nl(blocks: Blocks) -> Integers:
    """A scale, and four bits of each of 32 numbers as in Q4_0: their places in a table."""
    return _TABLE[_nibbles(blocks[:, 2:])], _halves(blocks[:, :2])


def _iq4_xs(blocks: Blocks) -> Integers:
    """A scale, 8 scales of 6 bits (upper pairs, then low halves), and 8 times 32 numbers."""
    high = blocks[:, 2:4].view(np.uint16) >> np.arange(0, 16, 2, dtype=np.uint16)
    # Neighbours share a byte: [blocks, 4] -> [blocks, 4, 2] -> [blocks, 8]
    low = blocks[:, 4:8, None] >> np.array([0, 4], np.uint8)
    scales = (low & 15).reshape(-1, 8) | (high & 3).astype(np.uint8) << 4
    # [blocks, 128] -> [blocks * 8, 16] -> [blocks * 8, 32] -> [blocks, 256]
    numbers = _nibbles(blocks[:, 8:].reshape(-1, 16)).reshape(-1, 256)
    return _TABLE[numbers], _halves(blocks[:, :2]) * (scales.astype(np.float32) - 32)


def _halves(stored: UInt8[np.ndarray, "blocks two"]) -> Float[np.ndarray, "blocks 1"]:
    return stored.view(np.float16).astype(np.float32)


def _nibbles(stored: UInt8[np.ndarray, "blocks bytes"]) -> UInt8[np.ndarray, "blocks numbers"]:
    return np.concatenate([stored & 15, stored >> 4], axis=1)


@dataclass(frozen=True)
class _Exact:
    """A kind that is integers and scales already.

    Attributes:
        dtype: The type that holds its integers.
        group: Numbers that share a scale.
        parts: Takes blocks apart.
        has_offsets: Whether offsets are among the parts.
    """

    dtype: str
    group: int
    parts: Callable[[Blocks], Integers]
    has_offsets: bool = False


_EXACT: dict[str, _Exact] = {
    "Q8_0": _Exact("int8", 32, _q8_0),
    "Q4_0": _Exact("int4", 32, _q4_0),
    "Q4_1": _Exact("int4", 32, _q4_1, has_offsets=True),
    "Q4_K": _Exact("int4", 32, _q4_k, has_offsets=True),
    "Q5_0": _Exact("int8", 32, _q5_0),
    "Q5_1": _Exact("int8", 32, _q5_1, has_offsets=True),
    "Q5_K": _Exact("int8", 32, _q5_k, has_offsets=True),
    "Q2_K": _Exact("int4", 16, _q2_k, has_offsets=True),
    "Q6_K": _Exact("int8", 16, _q6_k),
    "Q3_K": _Exact("int4", 16, _q3_k),
    "IQ4_NL": _Exact("int8", 32, _iq4_nl),
    "IQ4_XS": _Exact("int8", 32, _iq4_xs),
}


@dataclass(frozen=True)
class KeptBlocks:
    """Tensors of GGUF files whose quantized matrices stay integers, with scales next to them.

    Attributes:
        below: The files.
    """

    below: GGUFSource

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        shapes = dict(self.below.shapes())
        for name, (rows, inner) in self._matrices.items():
            shapes[scale_name(name)] = rows, inner // self._group(name)
            if self._has_offsets(name):
                shapes[offset_name(name)] = shapes[scale_name(name)]
        return shapes

    def dtypes(self) -> Mapping[str, str]:
        dtypes = dict(self.below.dtypes())
        for name in self._matrices:
            exact = _EXACT.get(self.below.kind(name).name)
            dtypes[name] = "int8" if exact is None else exact.dtype
            dtypes[scale_name(name)] = "float32"
            if self._has_offsets(name):
                dtypes[offset_name(name)] = "float32"
        return dtypes

    def read(self, name: str, window: Slices = ()) -> np.ndarray:
        matrix, matrices = name.removesuffix(SCALE).removesuffix(OFFSET), self._matrices
        if matrix not in matrices:
            return self.below.read(name, window)
        shape = self.shapes()[name]
        rows, columns = whole_window(shape, window)
        if name == matrix:
            return self._parts(matrix, rows)[0][:, columns]
        part = 1 if name == scale_name(matrix) else 2
        # Rows of scales are short, but whole rows of the matrix are unpacked for them.
        found = [np.empty((0, shape[1]), np.float32)]
        for block in row_blocks((rows.stop - rows.start, matrices[matrix][1])):
            unpacked = slice(rows.start + block.start, rows.start + block.stop)
            found.append(self._parts(matrix, unpacked)[part])
        return np.concatenate(found)[:, columns]

    def _parts(self, name: str, rows: slice) -> tuple[np.ndarray, ...]:
        """Read rows as integers, scales and, if there are any, offsets."""
        count, inner = rows.stop - rows.start, self.below.shapes()[name][1]
        kind = self.below.kind(name)
        stored = self.below.read_blocks(name, rows)
        exact = _EXACT.get(kind.name)
        if exact is None:
            floats = np.empty((0, inner), np.float32)
            if count:  # the library cannot take no rows
                with np.errstate(invalid="ignore", over="ignore"):  # checked below, with a name
                    floats = dequantize(stored, kind)
            if not np.isfinite(floats).all():
                raise _damaged(name)
            return quantize(floats, "int8", self._group(name))
        # [rows, bytes of a row] -> [blocks, bytes of a block]
        values, *floats = exact.parts(stored.reshape(-1, GGML_QUANT_SIZES[kind][1]))
        if not all(np.isfinite(each).all() for each in floats):
            raise _damaged(name)
        values = values.reshape(count, inner).astype(exact.dtype)
        return values, *(each.reshape(count, inner // exact.group) for each in floats)

    def _has_offsets(self, name: str) -> bool:
        exact = _EXACT.get(self.below.kind(name).name)
        return exact is not None and exact.has_offsets

    def _group(self, name: str) -> int:
        exact = _EXACT.get(self.below.kind(name).name)
        return _ROUNDED_GROUP if exact is None else exact.group

    @cached_property
    def _matrices(self) -> dict[str, tuple[int, int]]:
        """Return the shapes of the quantized matrices."""
        found: dict[str, tuple[int, int]] = {}
        for name, shape in self.below.shapes().items():
            kind = self.below.kind(name)
            quantized = kind.name not in _FLOATS and GGML_QUANT_SIZES[kind][0] > 1
            if quantized and _readable(kind) and is_matrix(name, shape):
                rows, inner = shape
                found[name] = rows, inner
        return found


def _damaged(name: str) -> EasySpecError:
    return EasySpecError(f"{name} has scales that are NaN or infinite; fetch the file again")


def shape_of(tensor: ReaderTensor) -> tuple[int, ...]:
    """Return a tensor's shape in NumPy's order; GGUF's begins with the fastest dimension."""
    return tuple(int(size) for size in reversed(tensor.shape))
