"""What keeps a model's tensors in a directory while they come in pieces."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from easyspec_jax.checkpoint.config import ModelConfig

Shapes = Mapping[str, tuple[int, ...]]
"""Of tensors, by name."""


class Store(Protocol):
    """Tensors of one dtype that are written in pieces of whole rows, by several threads."""

    def rows(self, name: str) -> int:
        """Pieces of a tensor begin at multiples of this row."""
        ...

    def write(self, name: str, start: int, values: np.ndarray) -> None:
        """Write a piece; it is in place on return. Raises EasySpecError if the write fails."""
        ...

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """A piece that was written. Raises EasySpecError if it is not whole."""
        ...

    def finish(self) -> None:
        """Makes a checkpoint out of all that was written; may be repeated."""
        ...


@dataclass(frozen=True)
class Format:
    """How a directory keeps a model's tensors; make opens a Store in it."""

    name: str
    make: Callable[[Path, ModelConfig], Store]


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """A JSON file as Hugging Face writes them."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
