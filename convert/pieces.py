"""The pieces of tensors that a conversion reads, casts and writes, a few at a time.

A few threads work on them. A byte budget bounds the pieces in flight, so memory does not grow with
the model.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import numpy as np

from convert.models import Model
from convert.stores import Shapes
from easyspec_jax.checkpoint.config import ModelConfig
from easyspec_jax.checkpoint.quantized import (
    Dequantized,
    Quantized,
    check_narrower,
    is_matrix,
    offset_name,
    scale_name,
)
from easyspec_jax.checkpoint.rounding import INT4_GROUPS, INTEGERS
from easyspec_jax.checkpoint.tensors import TensorSource
from easyspec_jax.errors import EasySpecError
from easyspec_jax.options import Weights

DEFAULT_MEMORY = 2 << 30
"""Bytes that the whole process may take."""

_BASE = 256 << 20  # bytes of them for the interpreter and the libraries
_PIECE = 8 << 20  # bytes written at a time, unless one row of chunks is more
_COPIES = 2  # copies of a piece, both as stored and as written, that are in memory at once
_FLOATS = 6  # copies of a quantized piece in float32, at most
_WORKERS = 8


class Piece(NamedTuple):
    """Rows `start` to `stop` of a tensor, `size` bytes when written."""

    name: str
    start: int
    stop: int
    size: int


@dataclass(frozen=True)
class Job:
    """A walk over all tensors, a few pieces at a time; `budget` limits their bytes in memory.

    Attributes:
        origin: Names the model in error messages.
        source: The tensors to write, up to a cast of floats.
        exact: The same as floats, before anything was rounded.
        shapes: Their shapes, scales of quantized matrices included.
        dtypes: The type to write of each.
        stored: The type that the source has it in.
        rounded: Matrices that become integers, or narrower ones, only now.
        dtype: The type of those that are not quantized.
        budget: Bytes.
    """

    origin: str
    source: TensorSource
    exact: TensorSource
    shapes: Shapes
    dtypes: Mapping[str, str]
    stored: Mapping[str, str]
    rounded: frozenset[str]
    dtype: str
    budget: int

    @property
    def parameters(self) -> int:
        others = {
            part(name)
            for name, dtype in self.dtypes.items()
            if dtype in INTEGERS
            for part in (scale_name, offset_name)
        }
        return sum(prod(shape) for name, shape in self.shapes.items() if name not in others)

    @property
    def size(self) -> int:
        return sum(_size(self.dtypes[name], prod(shape)) for name, shape in self.shapes.items())

    @property
    def integers(self) -> tuple[str, ...]:
        return tuple(sorted({dtype for dtype in self.dtypes.values() if dtype in INTEGERS}))

    def pieces(self, rows: Callable[[str], int] = lambda name: 1) -> Iterator[Piece]:
        """Split all tensors into pieces that begin at multiples of rows(name)."""
        for name, shape in self.shapes.items():
            row, dtype = prod(shape[1:]), self.dtypes[name]
            # Integers are several arrays of floats on their way.
            itemsize = 8 if dtype in INTEGERS else np.dtype(dtype).itemsize
            # The largest multiple of a chunk's rows that fits, so that no two threads ever write
            # to the same chunk.
            step = max(1, _PIECE // (row * itemsize) // rows(name)) * rows(name)
            for start in range(0, shape[0], step):
                stop = min(start + step, shape[0])
                yield Piece(name, start, stop, _size(dtype, (stop - start) * row))

    def read(self, piece: Piece) -> np.ndarray:
        """Read a piece in the dtype to write. Raises EasySpecError if it is not finite."""
        values = self.source.read(piece.name, (slice(piece.start, piece.stop),))
        dtype = self.dtypes[piece.name]
        return values if dtype in INTEGERS else cast(piece.name, values, dtype)

    def cost(self, piece: Piece) -> int:
        """Return the bytes that working on a piece takes."""
        count = (piece.stop - piece.start) * prod(self.shapes[piece.name][1:])
        if self.dtypes[piece.name] in INTEGERS:
            return _FLOATS * 4 * count
        stored = np.dtype(self.stored[piece.name]).itemsize
        return _COPIES * (piece.size + stored * count)

    def run(
        self, work: Callable[[Piece], Any], pieces: Iterable[Piece]
    ) -> Iterator[tuple[Piece, Any]]:
        """Work on pieces with several threads within the budget; yield each with its result.

        Results come in any order.
        """
        pending, used = dict[Future[Any], tuple[Piece, int]](), 0
        with ThreadPoolExecutor(_WORKERS) as pool:
            try:
                for piece in pieces:
                    cost = self.cost(piece)
                    if cost > self.budget:
                        raise EasySpecError(
                            f"{self.origin}: {piece.name} needs more memory; "
                            f"give `memory` of at least {_BASE + cost} bytes"
                        )
                    # Wait for earlier pieces until this one fits.
                    while used + cost > self.budget:
                        for future in wait(pending, return_when=FIRST_COMPLETED).done:
                            done, freed = pending.pop(future)
                            used -= freed
                            yield done, future.result()
                    pending[pool.submit(work, piece)] = piece, cost
                    used += cost
                while pending:
                    for future in wait(pending, return_when=FIRST_COMPLETED).done:
                        yield pending.pop(future)[0], future.result()
            finally:
                # After an error or Ctrl-C, pieces that wait for a thread are not started.
                pool.shutdown(cancel_futures=True)


def _size(dtype: str, count: int) -> int:
    """Return the bytes of some numbers as they are written."""
    return count // 2 if dtype == "int4" else count * np.dtype(dtype).itemsize


def job_of(
    model: Model,
    config: ModelConfig,
    memory: int,
    weights: Weights | None = None,
    floats_only: bool = False,
    group: int = INT4_GROUPS[0],
) -> Job:
    """Plan the walk over a model's tensors.

    Args:
        model: The model.
        config: Its configuration, with the dtype of all tensors that are not quantized.
        memory: Bytes that the process may take.
        weights: Type of the matrices; None leaves them as they are.
        floats_only: Whether the output cannot hold integers.
        group: The most columns that share a scale in int4.

    Raises:
        EasySpecError: The output cannot hold such matrices, or they would only grow.
    """
    if floats_only and weights is not None:
        raise EasySpecError(
            f"{model.origin}: `weights` {weights} is for Orbax checkpoints; "
            "a Hugging Face directory holds floats"
        )
    source = model.source
    check_narrower(source, weights, model.origin)
    if floats_only or weights == "bfloat16":
        source = Dequantized(source)
    elif weights is not None:
        source = Quantized(source, weights, group)
    shapes, stored = source.shapes(), source.dtypes()
    dtypes = _types_to_write(shapes, stored, config.dtype, None if floats_only else weights)
    exact = model.source if model.exact is None else model.exact
    before = exact.dtypes()
    rounded = {n for n in shapes if dtypes[n] in INTEGERS and before[n] != dtypes[n]}
    return Job(
        origin=model.origin,
        source=source,
        exact=Dequantized(exact),
        shapes=_ordered(shapes),
        dtypes=dtypes,
        stored=stored,
        rounded=frozenset(rounded),
        dtype=config.dtype,
        budget=memory - _BASE,
    )


def _types_to_write(
    shapes: Shapes, stored: Mapping[str, str], dtype: str, weights: Weights | None
) -> dict[str, str]:
    """Return the type to write of each tensor."""
    dtypes = dict[str, str]()
    for name, shape in shapes.items():
        if stored[name] in INTEGERS:
            dtypes[name] = stored[name]
        elif weights == "bfloat16" and is_matrix(name, shape):
            dtypes[name] = weights
        else:
            dtypes[name] = dtype
    # Scales and offsets stay as exact as they are.
    for name in shapes:
        if stored[name] in INTEGERS:
            parts = scale_name(name), offset_name(name)
            dtypes |= {part: "float32" for part in parts if part in shapes}
    return dtypes


def _ordered(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Put scales and offsets after their matrices: sources keep the scales of a few."""
    ordered: dict[str, tuple[int, ...]] = {}
    for name in shapes:
        for each in (name, scale_name(name), offset_name(name)):
            if each in shapes:
                ordered.setdefault(each, shapes[each])
    return ordered


def cast(name: str, values: np.ndarray, dtype: str) -> np.ndarray:
    """Cast a tensor to another dtype.

    Args:
        name: Names the tensor in error messages.
        values: The tensor; floating-point, any shape.
        dtype: NumPy's name of the dtype.

    Raises:
        EasySpecError: The tensor holds NaN or infinity, before or after the cast.
    """
    if not is_finite(values):
        raise EasySpecError(
            f"{name} holds NaN or infinity, so the checkpoint is damaged; fetch it again"
        )
    if values.dtype == np.dtype(dtype):
        return values
    with np.errstate(over="ignore", invalid="ignore"):  # overflow is reported below, with a name
        result = values.astype(dtype)
    if not is_finite(result):
        raise EasySpecError(f"{name} has values that overflow {dtype}; choose another `dtype`")
    return result


def is_finite(values: np.ndarray) -> bool:
    """Whether no floating-point number is NaN or infinite.

    Unlike np.isfinite(values).all(), this allocates no array of answers.
    """
    if not values.size:
        return True
    # The bits of a float, read as an integer, sort by magnitude: finite < infinity < NaN. The sign
    # is the highest bit. As signed integers, negative floats are below zero, so the maximum is the
    # largest positive float; as unsigned ones, they are above all others, so the maximum is the
    # negative float of the largest magnitude, if there is one.
    signed, unsigned = f"i{values.itemsize}", f"u{values.itemsize}"
    infinity, negative = np.array([np.inf, -np.inf], values.dtype)
    return bool(
        values.view(signed).max() < infinity.view(signed)
        and values.view(unsigned).max() < negative.view(unsigned)
    )
