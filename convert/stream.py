"""Conversion of any open model to a directory, a few pieces of tensors at a time.

Each piece (see pieces.py) is read, cast, checked, written and recorded, so that an interrupted run
goes on where it stopped.
"""

import hashlib
import json
import shutil
import zlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from convert.losses import NO_LOSS, Loss, Losses, loss_of
from convert.models import Calibration, Model
from convert.orbax import ORBAX
from convert.pieces import DEFAULT_MEMORY, Job, Piece, job_of
from convert.stores import Format, Store, write_json
from convert.workplace import Workplace, workplace
from easyspec_jax.checkpoint.config import ModelConfig, model_config
from easyspec_jax.checkpoint.directory import open_checkpoint
from easyspec_jax.checkpoint.orbax import WEIGHTS
from easyspec_jax.checkpoint.quantized import offset_name, scale_name
from easyspec_jax.checkpoint.rounding import INT4_GROUPS, INTEGERS
from easyspec_jax.checkpoint.tensors import Overlay, TensorSource
from easyspec_jax.errors import EasySpecError
from easyspec_jax.files import flush
from easyspec_jax.options import FLOAT_DTYPES, Weights
from easyspec_jax.progress import bar

_CALIBRATION = "calibration"  # the directory of a calibration, while an output grows


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
    job = job_of(model, parsed, memory, weights, format.floats_only, group)
    # Companions come first: a tokenizer that cannot be written fails before the long part.
    digest = "" if calibration is None else calibration.digest
    # Besides files and types, these decide the values.
    settings = weights, group, model.exact is None, digest
    with workplace(out, _task(model, job, config, format, settings)) as place:
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
        if calibrated.is_dir():
            flush(place.directory)  # the long part: interrupted, it must not cost the calibration
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
    job = job_of(model, parsed, memory, weights, floats_only, group)
    _compare(job, out, opened.source)
    return Result(job.parameters, job.dtype, job.size, 0, job.integers)


def _transfer(job: Job, store: Store, place: Workplace, piece: Piece) -> tuple[bool, Loss]:
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


def _loss(job: Job, piece: Piece, values: np.ndarray) -> Loss:
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


def _compare(job: Job, out: Path, written: TensorSource) -> None:
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


def _task(
    model: Model, job: Job, config: dict[str, Any], format: Format, settings: Sequence[Any]
) -> str:
    """Return a digest of source, settings and format; a run with the same one can be resumed."""
    files: list[tuple[str, int, int]] = []
    for path in sorted(set(model.files)):
        files.append((str(path), path.stat().st_size, path.stat().st_mtime_ns))
    tensors = sorted((name, job.dtypes[name], shape) for name, shape in job.shapes.items())
    described = json.dumps([config, format.name, files, tensors, list(settings)], sort_keys=True)
    return hashlib.sha256(described.encode()).hexdigest()


def _remove(calibrated: Path) -> None:
    """Remove what a calibration has found, under a name that is never read: half would mislead."""
    gone = calibrated.with_suffix(".gone")
    shutil.rmtree(gone, ignore_errors=True)
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
