"""Tensors by name, of which any slices can be read: what every checkpoint is to those who read it.

Files are read, never mapped: mapped pages count as memory of the process. Nothing is ever unpickled.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Protocol

import ml_dtypes  # noqa: F401  (teaches NumPy bfloat16)
import numpy as np

Slices = tuple[slice, ...]
"""A window of a tensor: slices of its first one or two dimensions, without steps and within bounds.

Of any further dimension it has everything.
"""

_BLOCK = 4 << 20  # bytes that are read at a time on their way into a larger array


class TensorSource(Protocol):
    """Canonical tensors by name, read a window at a time."""

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of every tensor, without reading any."""
        ...

    def read(self, name: str, window: Slices = ()) -> np.ndarray:
        """A window of one tensor in host memory, in its stored dtype; by default all of it."""
        ...


class StoredSource(TensorSource, Protocol):
    """A TensorSource that knows how its tensors are stored."""

    def dtypes(self) -> Mapping[str, str]:
        """Each tensor's type: NumPy's name, or the file's own for a type that is not supported."""
        ...


def read_into(out: np.ndarray, source: TensorSource, name: str, window: Slices = ()) -> None:
    """Read a window of a tensor into an array, a few MiB at a time.

    Rows are read in powers of two, so that reads begin and end where most stored chunks do.

    Args:
        out: Array of the window's shape. Its memory may have any strides; values take its type.
        source: Holds the tensor.
        name: The tensor's name.
        window: Slices of the tensor; by default all of it.
    """
    first = window[0].start if window else 0
    for rows in row_blocks(out.shape):
        out[rows] = source.read(name, (slice(first + rows.start, first + rows.stop), *window[1:]))


def row_blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Split the rows of a tensor into slices of a few MiB, each a power of two of rows but the last."""
    fitting = max(1, _BLOCK // max(1, 4 * prod(shape[1:])))
    step = 1 << (fitting.bit_length() - 1)
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def read_bytes(file: int, out: np.ndarray, offset: int) -> None:
    """Fills a contiguous array from an open file. Raises EOFError if the file ends before."""
    left = out.reshape(-1).view(np.uint8).data
    while left:
        count = os.preadv(file, [left], offset)
        if not count:
            raise EOFError("it ends too early")
        left, offset = left[count:], offset + count


@dataclass(frozen=True)
class Overlay:
    """A TensorSource: what `above` holds, and otherwise what `below` does."""

    below: TensorSource
    above: TensorSource

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {**self.below.shapes(), **self.above.shapes()}

    def read(self, name: str, window: Slices = ()) -> np.ndarray:
        return (self.above if name in self.above.shapes() else self.below).read(name, window)


@dataclass(frozen=True)
class Held:
    """Tensors in host memory, as a TensorSource."""

    tensors: Mapping[str, np.ndarray]

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    def read(self, name: str, window: Slices = ()) -> np.ndarray:
        return self.tensors[name][window]
