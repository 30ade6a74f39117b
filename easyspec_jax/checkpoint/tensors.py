"""Named tensors of which any rows can be read: the interface between checkpoints and their readers.

Files are read, never memory-mapped: mapped pages would count as memory of the process. Nothing is
ever unpickled.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Protocol

import ml_dtypes  # noqa: F401  (teaches NumPy bfloat16)
import numpy as np

Slices = tuple[slice, ...]
"""Slices of a tensor's first dimensions, one or two unless a source says otherwise;
the other dimensions are read whole.

Each has a start and a stop within bounds, and no step.
"""

_BLOCK = 4 << 20  # bytes that are read at a time on their way into a larger array


class TensorSource(Protocol):
    """Canonical tensors by name, of which slices can be read."""

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return the shape of every tensor without reading any."""
        ...

    def dtypes(self) -> Mapping[str, str]:
        """Return each tensor's dtype: NumPy's name, or the file's own name if unsupported."""
        ...

    def read(self, name: str, window: Slices = ()) -> np.ndarray:
        """Read a slice of one tensor (by default all of it) in its stored dtype."""
        ...


def window_blocks(shape: tuple[int, ...], window: Slices = ()) -> Iterator[tuple[slice, Slices]]:
    """Split a window of a tensor into blocks of a few MiB.

    Args:
        shape: The window's shape.
        window: Its slices; all of the tensor by default.

    Yields:
        The rows of a block within the window, and its slices of the tensor.

    Examples:
        >>> list(window_blocks((4096, 512), (slice(10, 4106), slice(0, 512))))[1]
        (slice(2048, 4096, None), (slice(2058, 4106, None), slice(0, 512, None)))
    """
    first = window[0].start if window else 0
    for rows in row_blocks(shape):
        yield rows, (slice(first + rows.start, first + rows.stop), *window[1:])


def row_blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Split the rows of a tensor into slices of at most 4 MiB in float32 (at least one row each).

    Examples:
        >>> list(row_blocks((2500, 1024)))
        [slice(0, 1024, None), slice(1024, 2048, None), slice(2048, 2500, None)]
    """
    fitting = max(1, _BLOCK // max(1, 4 * prod(shape[1:])))
    # A power of two, so that blocks begin and end where most chunks of an Orbax checkpoint do;
    # otherwise a chunk at a border would be read twice.
    step = 1 << (fitting.bit_length() - 1)
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def read_bytes(file: int, out: np.ndarray, offset: int) -> None:
    """Fill a contiguous array with bytes from an open file.

    Args:
        file: A file descriptor. Its position is neither used nor moved, so threads may share it.
        out: The array to fill.
        offset: Byte of the file to start from.

    Raises:
        EOFError: The file ends too early.
    """
    left = out.reshape(-1).view(np.uint8).data
    # One read may return less than it was asked for: Linux stops at 2 GiB.
    while left:
        count = os.preadv(file, [left], offset)
        if not count:
            raise EOFError("it ends too early")
        left, offset = left[count:], offset + count


@dataclass(frozen=True)
class Overlay:
    """Two sources as one: a tensor comes from `above` if it is there, otherwise from `below`.

    Examples:
        >>> both = Overlay(Held({"a": np.zeros(2), "b": np.zeros(2)}), Held({"b": np.ones(2)}))
        >>> both.read("b")
        array([1., 1.])
    """

    below: TensorSource
    above: TensorSource

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {**self.below.shapes(), **self.above.shapes()}

    def dtypes(self) -> Mapping[str, str]:
        return {**self.below.dtypes(), **self.above.dtypes()}

    def read(self, name: str, window: Slices = ()) -> np.ndarray:
        return (self.above if name in self.above.shapes() else self.below).read(name, window)


@dataclass(frozen=True)
class Held:
    """A TensorSource whose tensors are in host memory.

    Examples:
        >>> source = Held({"a": np.arange(6).reshape(3, 2)})
        >>> source.read("a", (slice(1, 3),))
        array([[2, 3],
               [4, 5]])
    """

    tensors: Mapping[str, np.ndarray]

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    def dtypes(self) -> Mapping[str, str]:
        return {name: tensor.dtype.name for name, tensor in self.tensors.items()}

    def read(self, name: str, window: Slices = ()) -> np.ndarray:
        return self.tensors[name][window]
