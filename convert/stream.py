"""From any opened model to a directory of ours, or of Hugging Face's, a few pieces of tensors at a time."""

import hashlib
import json
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from convert.orbax import ORBAX
from convert.stores import Format, Shapes, Store, write_json
from convert.workplace import Workplace, workplace
from easyspec_jax.checkpoint.canonical import expected_shapes
from easyspec_jax.checkpoint.config import ModelConfig, model_config
from easyspec_jax.checkpoint.directory import open_checkpoint
from easyspec_jax.checkpoint.tensors import StoredSource
from easyspec_jax.errors import EasySpecError
from easyspec_jax.options import FLOAT_DTYPES
from easyspec_jax.progress import bar

DEFAULT_MEMORY = 2 << 30
"""Bytes of the whole process."""

_BASE = 256 << 20  # what the interpreter and the libraries take of them
_PIECE = 8 << 20  # bytes written at a time, unless one row of chunks is more
_COPIES = 2  # of a piece as it is read, and as it is written, that are in memory at once
_WORKERS = 8


@dataclass(frozen=True)
class Model:
    """A model about to be converted.

    origin: names it in error messages. config: the contents of its `config.json`. source: its canonical tensors.
    dtype: what to write where nobody asks for another. files: what holds the tensors; a conversion goes on only if
    they are unchanged. write_companions: puts generation configuration and tokenizer, if it has_tokenizer, into a
    directory.
    """

    origin: str
    config: dict[str, Any]
    source: StoredSource
    dtype: str
    files: tuple[Path, ...]
    has_tokenizer: bool
    write_companions: Callable[[Path], None]


@dataclass(frozen=True)
class Result:
    """What was written; size is that of the tensors, reused what of it an earlier run had written, in bytes."""

    parameters: int
    dtype: str
    size: int
    reused: int


def convert(
    model: Model,
    out: Path,
    dtype: str | None = None,
    format: Format = ORBAX,
    *,
    memory: int = DEFAULT_MEMORY,
    verify: bool = False,
) -> Result:
    """Writes a model to a directory that must not exist; on any error, nothing is left of it.

    Interrupted, it goes on where it stopped when called again. memory: bytes that the process may take. verify: what
    was written is read again and compared with its source. Raises EasySpecError if the model is unsupported,
    incomplete or not finite, a value does not fit dtype, memory is too little, or out is unusable.
    """
    config, parsed = _configuration(model, dtype)
    job = _job(model, parsed, memory)
    with workplace(out, _task(model, config, format)) as place:
        write_json(place.directory / "config.json", config)
        model.write_companions(place.directory)
        store = format.make(place.directory, parsed)
        pieces = list(job.pieces(store.rows))
        _check_space(place, pieces)
        reused = 0
        with bar("Converting", job.size, in_bytes=True) as advance:
            for piece, whole in job.run(partial(_transfer, job, store, place), pieces):
                reused += piece.size if whole else 0
                advance(piece.size)
        store.finish()
        if verify:
            _compare(job, place.directory, open_checkpoint(place.directory).source)
    return Result(job.parameters, job.dtype, job.size, reused)


def verify(model: Model, out: Path, memory: int = DEFAULT_MEMORY) -> Result:
    """Compares what was converted, in whatever dtype, with its source.

    Raises EasySpecError that names the first tensor which differs.
    """
    opened = open_checkpoint(out)
    _, parsed = _configuration(model, opened.config.dtype)
    found = asdict(opened.config)
    for name, value in asdict(parsed).items():
        if name != "stop_ids" and found[name] != value:  # these are those of the companions too
            raise EasySpecError(
                f"{out}: {name} is {found[name]!r}, not {value!r} as in {model.origin}; convert again"
            )
    job = _job(model, parsed, memory)
    _compare(job, out, opened.source)
    return Result(job.parameters, job.dtype, job.size, 0)


class Piece(NamedTuple):
    """Rows start to stop of a tensor; size: in bytes, when written."""

    name: str
    start: int
    stop: int
    size: int


@dataclass(frozen=True)
class _Job:
    """Tensors to go through, a few pieces at a time; budget: bytes that their buffers may take."""

    origin: str
    source: StoredSource
    shapes: Shapes
    dtype: str
    budget: int

    @property
    def parameters(self) -> int:
        return sum(map(prod, self.shapes.values()))

    @property
    def size(self) -> int:
        return self.parameters * np.dtype(self.dtype).itemsize

    def pieces(self, rows: Callable[[str], int] = lambda name: 1) -> Iterator[Piece]:
        """All tensors in pieces that begin at multiples of some row."""
        for name, shape in self.shapes.items():
            row = prod(shape[1:]) * np.dtype(self.dtype).itemsize
            step = max(1, _PIECE // row // rows(name)) * rows(name)
            for start in range(0, shape[0], step):
                stop = min(start + step, shape[0])
                yield Piece(name, start, stop, (stop - start) * row)

    def read(self, piece: Piece) -> np.ndarray:
        """A piece out of the source, as it is to be written. Raises EasySpecError, naming it, if it is not finite."""
        return cast(
            piece.name, self.source.read(piece.name, (slice(piece.start, piece.stop),)), self.dtype
        )

    def run(
        self, work: Callable[[Piece], Any], pieces: Iterable[Piece]
    ) -> Iterator[tuple[Piece, Any]]:
        """Each piece with what work makes of it, in any order, several at once within the budget."""
        stored, pending, used = self.source.dtypes(), dict[Future[Any], tuple[Piece, int]](), 0
        with ThreadPoolExecutor(_WORKERS) as pool:
            try:
                for piece in pieces:
                    itemsize = np.dtype(self.dtype).itemsize
                    cost = _COPIES * (
                        piece.size + piece.size // itemsize * np.dtype(stored[piece.name]).itemsize
                    )
                    if cost > self.budget:
                        raise EasySpecError(
                            f"{self.origin}: {piece.name} needs --memory {_BASE + cost} or more"
                        )
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
                pool.shutdown(cancel_futures=True)


def _job(model: Model, config: ModelConfig, memory: int) -> _Job:
    shapes = expected_shapes(config)  # a tied head is none of them
    return _Job(model.origin, model.source, shapes, config.dtype, memory - _BASE)


def _transfer(job: _Job, store: Store, place: Workplace, piece: Piece) -> bool:
    """Writes a piece, unless an earlier run has written it; returns whether that is so."""
    recorded = place.done.get((piece.name, piece.start))
    if recorded is not None:
        with suppress(EasySpecError):
            if _checksum(store.read(piece.name, piece.start, piece.stop)) == recorded:
                return True
    values = job.read(piece)
    store.write(piece.name, piece.start, values)
    place.record(piece.name, piece.start, _checksum(values))
    return False


def _compare(job: _Job, out: Path, written: StoredSource) -> None:
    """Raise EasySpecError unless what was written has the source's bits; the tensors are those of one configuration."""

    def same(piece: Piece) -> bool:
        values = written.read(piece.name, (slice(piece.start, piece.stop),))
        expected = job.read(piece)
        return values.dtype == expected.dtype and np.array_equal(_bits(values), _bits(expected))

    with bar("Verifying", job.size, in_bytes=True) as advance:
        for piece, equal in job.run(same, job.pieces()):
            if not equal:
                raise EasySpecError(f"{out}: {piece.name} differs from {job.origin}; convert again")
            advance(piece.size)


def cast(name: str, values: np.ndarray, dtype: str) -> np.ndarray:
    """The same shape in another dtype. Raises EasySpecError, naming the tensor, if either is not finite."""
    if not is_finite(values):
        raise EasySpecError(
            f"{name} holds NaN or infinity: the checkpoint is damaged; fetch it again"
        )
    if values.dtype == np.dtype(dtype):
        return values
    with np.errstate(over="ignore", invalid="ignore"):
        result = values.astype(dtype)
    if not is_finite(result):
        raise EasySpecError(
            f"{name} has values that are not finite in {dtype}; choose another --dtype"
        )
    return result


def is_finite(values: np.ndarray) -> bool:
    """Whether floating-point numbers are neither NaN nor infinite, without an array of answers.

    Read as an integer, a number is at least infinity exactly if it is not finite; below zero, with the sign bit set.
    """
    if not values.size:
        return True
    limit = np.array([np.inf, -np.inf], values.dtype)
    return all(
        values.view(f"{kind}{values.itemsize}").max() < bound
        for kind, bound in (
            ("i", limit.view(f"i{values.itemsize}")[0]),
            ("u", limit.view(f"u{values.itemsize}")[1]),
        )
    )


def _bits(values: np.ndarray) -> np.ndarray:
    return values.view(f"u{values.itemsize}")


def _checksum(values: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)


def _configuration(model: Model, dtype: str | None) -> tuple[dict[str, Any], ModelConfig]:
    """What `config.json` is to say, and what it means."""
    dtype = dtype or model.dtype
    if dtype not in FLOAT_DTYPES:
        raise EasySpecError(
            f"{model.origin}: the embedding is stored as {dtype}; choose a --dtype to write"
        )
    config = {name: value for name, value in model.config.items() if name != "torch_dtype"} | {
        "dtype": dtype
    }
    return config, model_config(config, origin=model.origin)


def _task(model: Model, config: dict[str, Any], format: Format) -> str:
    """A digest of what is written from what: a run with the same one can go on with this one's pieces."""
    files = [
        (str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(model.files)
    ]
    return hashlib.sha256(
        json.dumps([config, format.name, files], sort_keys=True).encode()
    ).hexdigest()


def _check_space(place: Workplace, pieces: Iterable[Piece]) -> None:
    needed = sum(piece.size for piece in pieces if (piece.name, piece.start) not in place.done)
    free = shutil.disk_usage(place.directory).free
    if needed > free:
        sizes = f"{needed / 1e6:,.1f} MB are needed, {free / 1e6:,.1f} MB are free"
        raise EasySpecError(f"{place.directory.parent} cannot be written: {sizes}")
