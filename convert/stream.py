"""From any opened model to a directory of ours, or of Hugging Face's."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from easyspec_jax.checkpoint import (
    SAFETENSORS,
    WEIGHTS,
    TensorSource,
    check_tensors,
    expected_shapes,
    new_directory,
    write_orbax,
    write_safetensors,
)
from easyspec_jax.config import model_config
from easyspec_jax.errors import EasySpecError
from easyspec_jax.options import FLOAT_DTYPES
from easyspec_jax.progress import Advance, bar


@dataclass(frozen=True)
class Model:
    """A model about to be converted.

    origin: names it in error messages. config: the contents of its `config.json`. source: its canonical tensors.
    dtype: what to write where nobody asks for another. write_companions: puts tokenizer and generation
    configuration into a directory.
    """

    origin: str
    config: dict[str, Any]
    source: TensorSource
    dtype: str
    write_companions: Callable[[Path], None]


@dataclass(frozen=True)
class Format:
    """How a directory keeps its tensors: under which name, and what writes them there."""

    weights: str
    write: Callable[[Path, Iterable[tuple[str, np.ndarray]]], None]


ORBAX = Format(WEIGHTS, write_orbax)
HUGGING_FACE = Format(SAFETENSORS, write_safetensors)


@dataclass(frozen=True)
class Result:
    """What was written; size is that of the tensors, in bytes."""

    parameters: int
    dtype: str
    size: int


def convert(model: Model, out: Path, dtype: str | None = None, format: Format = ORBAX) -> Result:
    """Writes a model to a directory that must not exist; on any error, nothing is left of it.

    Raises EasySpecError if the model is unsupported or incomplete, a value does not fit dtype, or out is unusable.
    """
    dtype = dtype or model.dtype
    if dtype not in FLOAT_DTYPES:
        raise EasySpecError(f"{model.origin}: the embedding is stored as {dtype}; choose a --dtype to write")
    config = {name: value for name, value in model.config.items() if name != "torch_dtype"} | {"dtype": dtype}
    parsed = model_config(config, origin=model.origin)
    check_tensors(parsed, model.source.shapes(), model.origin)
    shapes = expected_shapes(parsed)  # a tied head is none of them
    parameters = sum(prod(shape) for shape in shapes.values())
    result = Result(parameters, dtype, parameters * np.dtype(dtype).itemsize)
    with new_directory(out) as directory:
        write_json(directory / "config.json", config)
        model.write_companions(directory)
        with bar("Reading", result.size, in_bytes=True) as advance:
            tensors = dict(_read(model.source, shapes, dtype, advance))
        with bar("Writing"):
            format.write(directory / format.weights, tensors.items())
    return result


def _read(source: TensorSource, names: Iterable[str], dtype: str, advance: Advance) -> Iterator[tuple[str, np.ndarray]]:
    for name in names:
        values = cast(name, source.read(name), dtype)
        advance(values.nbytes)
        yield name, values


def cast(name: str, values: np.ndarray, dtype: str) -> np.ndarray:
    """The same shape in another dtype. Raises EasySpecError, naming the tensor, if the result is not finite."""
    if values.dtype == np.dtype(dtype):
        return values
    with np.errstate(over="ignore", invalid="ignore"):
        result = values.astype(dtype)
    if not np.isfinite(result).all():
        raise EasySpecError(f"{name} has values that are not finite in {dtype}; choose another --dtype")
    return result


def write_json(path: Path, value: dict[str, Any]) -> None:
    """A JSON file as Hugging Face writes them."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
