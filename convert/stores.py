"""The interface of formats that are written piece by piece."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from easyspec_jax.checkpoint.config import ModelConfig

Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of tensors by name."""


class Store(Protocol):
    """Tensors in a directory, written in pieces of whole rows by several threads."""

    def rows(self, name: str) -> int:
        """Return the rows of a chunk: pieces of this tensor must begin at multiples of it."""
        ...

    def write(self, name: str, start: int, values: np.ndarray) -> None:
        """Write the rows of a tensor from `start` on; later reads see them.

        Raises:
            EasySpecError: The write fails.
        """
        ...

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Read rows that were written, by this process or an earlier one.

        Raises:
            EasySpecError: They are missing or damaged.
        """
        ...

    def finish(self) -> None:
        """Make a complete checkpoint of everything written. May be called again after a failure."""
        ...


@dataclass(frozen=True)
class Format:
    """A format that models can be written in.

    Attributes:
        name: Its name.
        make: Opens a Store in a directory for a model, or reopens the one that is there. It gets
            the shapes and the dtypes of all tensors, scales of quantized ones included.
        floats_only: Whether quantized matrices have to be written as floats.
    """

    name: str
    make: Callable[[Path, ModelConfig, Shapes, Mapping[str, str]], Store]
    floats_only: bool = False


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file, indented as Hugging Face indents them."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
