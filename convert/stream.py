"""Conversion of any open model to a directory, a few pieces of tensors at a time.

Pieces are read, cast, checked, written and recorded by a few threads. A byte budget bounds the
pieces in flight, so memory does not grow with the model.
"""

import hashlib
import json
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from convert.losses import NO_LOSS, Loss, Losses, loss_of
from convert.orbax import ORBAX
from convert.stores import Format, Shapes, Store, write_json
from convert.workplace import Workplace, workplace
from easyspec_jax.checkpoint.config import ModelConfig, model_config
from easyspec_jax.checkpoint.directory import open_checkpoint
from easyspec_jax.checkpoint.orbax import WEIGHTS
from easyspec_jax.checkpoint.quantized import (
    Dequantized,
    Quantized,
    check_narrower,
    is_matrix,
    offset_name,
    scale_name,
)
from easyspec_jax.checkpoint.rounding import INT4_GROUPS, INTEGERS
from easyspec_jax.checkpoint.tensors import Overlay, TensorSource
from easyspec_jax.errors import EasySpecError
from easyspec_jax.options import FLOAT_DTYPES, Weights
from easyspec_jax.progress import bar

DEFAULT_MEMORY = 2 << 30
"""Bytes that the whole process may take."""

_BASE = 256 << 20  # bytes of them for the interpreter and the libraries
_PIECE = 8 << 20  # bytes written at a time, unless one row of chunks is more
_COPIES = 2  # copies of a piece, both as stored and as written, that are in memory at once
_FLOATS = 6  # copies of a quantized piece in float32, at most
_WORKERS = 8
_CALIBRATION = "calibration"  # the directory of a calibration, while an output grows


@dataclass(frozen=True)
class Model:
    """A model about to be converted.

    Attributes:
        origin: Names it in error messages.
        config: The contents of its `config.json`.
        source: Its canonical tensors.
        dtype: The dtype to write by default.
        files: The files that hold the tensors. A conversion is resumed only if they are unchanged.
        has_tokenizer: Whether there is a tokenizer.
        write_companions: Writes the generation configuration and the tokenizer into a directory.
        exact: The same tensors as floats, if the source rounds some; otherwise None.
    """

    origin: str
    config: dict[str, Any]
    source: TensorSource
    dtype: str
    files: tuple[Path, ...]
    has_tokenizer: bool
    write_companions: Callable[[Path], None]
    exact: TensorSource | None = None


@dataclass(frozen=True)
class Calibration:
    """A search for better integers than the ones nearest to each number.

    Attributes:
        digest: Identifies what is calibrated on.
        size: Bytes of the files that it writes, at most.
        run: Finds them, and keeps them in a directory that it creates. Called again with the same
            directory after an interruption, it goes on.
    """

    digest: str
    size: int
    run: Callable[[Path], TensorSource]


@dataclass(frozen=True)
class Result:
    """Summary of a conversion.

    Attributes:
        parameters: Number of parameters; scales are none.
        dtype: The dtype that was written, of the tensors that are not quantized.
        size: Bytes of all tensors.
        reused: Bytes of these that an interrupted run had already written.
        integers: The types of the quantized matrices: "int8", "int4", both or neither.
        errors: What rounding to integers lost, by the name of each matrix that was floats before:
            the root of the squared errors over that of the squares. Not measured by verify().
    """

    parameters: int
    dtype: str
    size: int
    reused: int
    integers: tuple[str, ...] = ()
    errors: Mapping[str, float] = field(default_factory=dict)


def convert(
    model: Model,
    out: Path,
    dtype: str | None = None,
    format: Format = ORBAX,
    *,
    memory: int = DEFAULT_MEMORY,
    verify: bool = False,
    weights: Weights | None = None,
    group: int = INT4_GROUPS[0],
    calibration: Calibration | None = None,
) -> Result:
    """Write a model to a new directory.

    An error leaves nothing behind. After an interruption, the same call resumes where it stopped.

    Args:
        model: The model, from `open_gguf` or `open_huggingface`.
        out: The directory to create.
        dtype: The dtype of all tensors that are not quantized; by default the model's.
        format: The format, ORBAX or HUGGING_FACE. The latter holds floats only.
        memory: Bytes that the process may take.
        verify: Read everything again at the end and compare it with the source.
        weights: Type of the matrices. Those that are stored as integers stay as they are, except
            that "int4" rounds int8 further, "bfloat16" makes floats of them, and "int8" is refused
            for int4. None leaves all as they are.
        group: The most columns that share a scale in int4, one of INT4_GROUPS.
        calibration: Finds the integers of int4 where they are not to be the nearest ones.

    Raises:
        EasySpecError: The model is not supported, incomplete or not finite, a value does not fit
            the dtype, the memory is too small, or `out` exists or cannot be written.
    """
    config, parsed = _configuration(model, dtype)
    job = _job(model, parsed, memory, weights, format.floats_only, group)
    # Companions come first: a tokenizer that cannot be written fails before the long part.
    digest = "" if calibration is None else calibration.digest
    with workplace(out, _task(model, job, config, format, digest)) as place:
        write_json(place.directory / "config.json", config)
        model.write_companions(place.directory)
        store = format.make(place.directory, parsed, job.shapes, job.dtypes)
        pieces = list(job.pieces(store.rows))
        calibrated = place.directory / _CALIBRATION
        further = 0 if calibration is None or calibrated.is_dir() else calibration.size
        _check_space(place, pieces, further)
        if calibration is not None:
            job = replace(job, source=Overlay(job.source, calibration.run(calibrated)))
        reused, losses = 0, Losses()
        with bar("Converting", job.size, in_bytes=True) as advance:
            for piece, (whole, loss) in job.run(partial(_transfer, job, store, place), pieces):
                reused += piece.size if whole else 0
                losses.add(piece.name, loss)
                advance(piece.size)
        store.finish()
        if verify:
            _compare(job, place.directory, open_checkpoint(place.directory).source)
        _remove(calibrated)
    errors = losses.relative(job.shapes)
    return Result(job.parameters, job.dtype, job.size, reused, job.integers, errors)


def verify(
    model: Model,
    out: Path,
    memory: int = DEFAULT_MEMORY,
    weights: Weights | None = None,
    group: int = INT4_GROUPS[0],
) -> Result:
    """Compare a converted directory with its source, in the dtype it was converted to.

    Args:
        model: The source.
        out: The converted directory.
        memory: Bytes that the process may take.
        weights: Type of the matrices that it was converted with.
        group: The most columns that share a scale in int4.

    Raises:
        EasySpecError: They differ; names the first tensor or field that does.
    """
    opened = open_checkpoint(out)
    _, parsed = _configuration(model, opened.config.dtype)
    found = asdict(opened.config)
    for name, value in asdict(parsed).items():
        # Stop ids also come from companions, which the source's configuration does not have.
        if name != "stop_ids" and found[name] != value:
            raise EasySpecError(
                f"{out}: {name} is {found[name]!r}, but {value!r} in {model.origin}; convert again"
            )
    # A Hugging Face directory with integers is not one that convert() wrote.
    has_integers = not INTEGERS.keys().isdisjoint(opened.source.dtypes().values())
    is_exported = not (out / WEIGHTS).is_dir()
    floats_only = (weights is None or is_exported) and not has_integers
    job = _job(model, parsed, memory, weights, floats_only, group)
    _compare(job, out, opened.source)
    return Result(job.parameters, job.dtype, job.size, 0, job.integers)


class Piece(NamedTuple):
    """Rows `start` to `stop` of a tensor, `size` bytes when written."""

    name: str
    start: int
    stop: int
    size: int


@dataclass(frozen=True)
class _Job:
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


def _job(
    model: Model,
    config: ModelConfig,
    memory: int,
    weights: Weights | None = None,
    floats_only: bool = False,
    group: int = INT4_GROUPS[0],
) -> _Job:
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
    shapes, stored, dtypes = source.shapes(), source.dtypes(), dict[str, str]()
    for name, shape in shapes.items():
        dtypes[name] = config.dtype
        if weights == "bfloat16" and not floats_only and is_matrix(name, shape):
            dtypes[name] = weights
        if stored[name] in INTEGERS:
            dtypes[name] = stored[name]
    # Scales and offsets stay as exact as they are.
    for name in shapes:
        if stored[name] in INTEGERS:
            dtypes |= {
                part(name): "float32" for part in (scale_name, offset_name) if part(name) in shapes
            }
    exact = model.source if model.exact is None else model.exact
    before = exact.dtypes()
    rounded = {n for n in shapes if dtypes[n] in INTEGERS and before[n] != dtypes[n]}
    return _Job(
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


def _ordered(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Put scales and offsets after their matrices: sources keep the scales of a few."""
    ordered: dict[str, tuple[int, ...]] = {}
    for name in shapes:
        for each in (name, scale_name(name), offset_name(name)):
            if each in shapes:
                ordered.setdefault(each, shapes[each])
    return ordered


def _transfer(job: _Job, store: Store, place: Workplace, piece: Piece) -> tuple[bool, Loss]:
    """Write a piece unless an earlier run has.

    Returns:
        Whether an earlier run had written it, and what rounding lost.
    """
    recorded = place.done.get((piece.name, piece.start))
    if recorded is not None:
        # The journal may be ahead of the data after a power failure, so the data is read back.
        with suppress(EasySpecError):
            values = store.read(piece.name, piece.start, piece.stop)
            if _checksum(values) == recorded:
                return True, _loss(job, piece, values)
    values = job.read(piece)
    store.write(piece.name, piece.start, values)
    place.record(piece.name, piece.start, _checksum(values))
    return False, _loss(job, piece, values)


def _loss(job: _Job, piece: Piece, values: np.ndarray) -> Loss:
    """Compare a piece with what it was before it was rounded to integers."""
    if piece.name not in job.rounded:
        return NO_LOSS
    rows = slice(piece.start, piece.stop)
    exact = job.exact.read(piece.name, (rows,)).astype(np.float32)
    offset = offset_name(piece.name)
    return loss_of(
        values,
        job.source.read(scale_name(piece.name), (rows,)),
        exact,
        job.source.read(offset, (rows,)) if offset in job.shapes else None,
    )


def _compare(job: _Job, out: Path, written: TensorSource) -> None:
    """Raise EasySpecError unless the written tensors equal the source's, bit for bit."""

    def same(piece: Piece) -> bool:
        values = written.read(piece.name, (slice(piece.start, piece.stop),))
        expected = job.read(piece)
        return values.dtype == expected.dtype and np.array_equal(_bits(values), _bits(expected))

    def differs(name: str) -> EasySpecError:
        return EasySpecError(f"{out}: {name} differs from {job.origin}; convert again")

    shapes = written.shapes()
    for name in {**job.shapes, **shapes}:
        if shapes.get(name) != job.shapes.get(name):
            raise differs(name)
    with bar("Verifying", job.size, in_bytes=True) as advance:
        for piece, equal in job.run(same, job.pieces()):
            if not equal:
                raise differs(piece.name)
            advance(piece.size)


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


def _bits(values: np.ndarray) -> np.ndarray:
    return values.view(f"u{values.itemsize}")


def _checksum(values: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)


def _configuration(model: Model, dtype: str | None) -> tuple[dict[str, Any], ModelConfig]:
    """Return the contents of the new `config.json`, and the model that they describe."""
    dtype = dtype or model.dtype
    if dtype not in FLOAT_DTYPES:
        raise EasySpecError(
            f"{model.origin}: the embedding is stored as {dtype}, which cannot be written; "
            "choose a `dtype`"
        )
    config = model.config | {"dtype": dtype}
    config.pop("torch_dtype", None)  # the older spelling of the same field
    return config, model_config(config, origin=model.origin)


def _task(model: Model, job: _Job, config: dict[str, Any], format: Format, calibration: str) -> str:
    """Return a digest of source, settings and format; a run with the same one can be resumed."""
    files: list[tuple[str, int, int]] = []
    for path in sorted(model.files):
        files.append((str(path), path.stat().st_size, path.stat().st_mtime_ns))
    tensors = sorted((name, job.dtypes[name], shape) for name, shape in job.shapes.items())
    described = json.dumps([config, format.name, files, tensors, calibration], sort_keys=True)
    return hashlib.sha256(described.encode()).hexdigest()


def _remove(calibrated: Path) -> None:
    """Remove what a calibration has found, under a name that is never read: half would mislead."""
    gone = calibrated.with_suffix(".gone")
    shutil.rmtree(gone, ignore_errors=True)
    if calibrated.is_dir():
        calibrated.rename(gone)
        shutil.rmtree(gone)


def _check_space(place: Workplace, pieces: Iterable[Piece], further: int) -> None:
    """Check the space for the pieces that are missing, and for further bytes."""
    missing = (piece.size for piece in pieces if (piece.name, piece.start) not in place.done)
    needed = sum(missing, further)
    free = shutil.disk_usage(place.directory).free
    if needed > free:
        raise EasySpecError(
            f"{place.directory.parent} needs {needed / 1e6:,.1f} MB of free space and has "
            f"{free / 1e6:,.1f} MB; free some space or choose another directory"
        )
