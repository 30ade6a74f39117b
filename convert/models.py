"""The inputs of a conversion: an open model and, if it is asked for, a calibration."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from easyspec_jax.checkpoint.tensors import TensorSource


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
