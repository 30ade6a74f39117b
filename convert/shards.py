"""Safetensors files that are written piece by piece."""

import json
import os
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from convert.stores import Format, Shapes, write_json
from easyspec_jax.checkpoint.canonical import places, stored_shapes
from easyspec_jax.checkpoint.config import ModelConfig
from easyspec_jax.checkpoint.families import FAMILIES
from easyspec_jax.checkpoint.safetensors import INDEX, SAFETENSORS
from easyspec_jax.checkpoint.tensors import read_bytes
from easyspec_jax.errors import EasySpecError, first_line

_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


class SafetensorsStore:
    """Safetensors files that transformers reads, as a Store.

    A small model becomes `model.safetensors`, a large one several shards and an index. Since every
    size is known from the start, the headers are written first, and pieces then go to their offsets
    in any order.

    Args:
        directory: Where to write.
        config: The model.
        largest: Bytes of a shard's tensors, at most, unless a single tensor is larger.

    Raises:
        EasySpecError: The files cannot be written.
    """

    def __init__(self, directory: Path, config: ModelConfig, largest: int = 5 * 10**9) -> None:
        self._directory, self._dtype = directory, np.dtype(config.dtype)
        self._shapes, self._stored = stored_shapes(config, "hf"), places(config, "hf")
        self._places: dict[str, tuple[Path, int]] = {}
        shards = list(_grouped(self._shapes, self._dtype.itemsize, largest))
        for number, names in enumerate(shards, 1):
            several = f"model-{number:05}-of-{len(shards):05}.safetensors"
            path = directory / (SAFETENSORS if len(shards) == 1 else several)
            header, offsets = self._header(names)
            for name, offset in offsets.items():
                self._places[name] = path, offset
            try:
                # Opened without truncation: an earlier run's pieces stay where they are.
                with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT, 0o666), "wb") as file:
                    file.write(header)
            except OSError as error:
                raise self._unwritable(error) from None

    def rows(self, name: str) -> int:
        return 1

    def write(self, name: str, start: int, values: np.ndarray) -> None:
        """Write rows at their offset; a file with a hole in front of them is sparse."""
        path, offset = self._at(name, start)
        left = np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
        try:
            # A write may take less than it is given: Linux stops at 2 GiB.
            with path.open("r+b", buffering=0) as file:
                while left:
                    count = os.pwrite(file.fileno(), left, offset)
                    left, offset = left[count:], offset + count
        except OSError as error:
            raise self._unwritable(error) from None

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        path, offset = self._at(name, start)
        values = np.empty((stop - start, *self._shapes[self._stored[name].name][1:]), self._dtype)
        try:
            with path.open("rb", buffering=0) as file:
                read_bytes(file.fileno(), values, offset)
        except (OSError, EOFError) as error:
            raise EasySpecError(f"{path} is damaged ({first_line(error)}); convert again") from None
        return values

    def finish(self) -> None:
        weight_map = {name: path.name for name, (path, _) in self._places.items()}
        if len(set(weight_map.values())) > 1:
            total = sum(map(prod, self._shapes.values())) * self._dtype.itemsize
            write_json(
                self._directory / INDEX,
                {"metadata": {"total_size": total}, "weight_map": weight_map},
            )

    def _header(self, names: list[str]) -> tuple[bytes, dict[str, int]]:
        """Return the bytes at the start of a file, and the offset of each tensor in it."""
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offsets, end = {}, 0
        for name in names:
            offsets[name], shape = end, self._shapes[name]
            end += prod(shape) * self._dtype.itemsize
            dtype = _NAMES[self._dtype.name]
            entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offsets[name], end]}
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # tensors begin at multiples of 8 bytes
        header = len(text).to_bytes(8, "little") + text
        return header, {name: offset + len(header) for name, offset in offsets.items()}

    def _at(self, name: str, row: int) -> tuple[Path, int]:
        """Return the file, and the byte in it, where a row of a canonical tensor begins."""
        stored = self._stored[name]
        path, offset = self._places[stored.name]
        row_bytes = prod(self._shapes[stored.name][1:]) * self._dtype.itemsize
        return path, offset + (stored.start + row) * row_bytes

    def _unwritable(self, error: Exception) -> EasySpecError:
        return EasySpecError(f"{self._directory} cannot be written: {first_line(error)}")


def _grouped(shapes: Shapes, itemsize: int, largest: int) -> Iterator[list[str]]:
    """Group names so that their tensors have at most `largest` bytes, if each has fewer."""
    group, size = [], 0
    for name, shape in shapes.items():
        added = prod(shape) * itemsize
        if group and size + added > largest:
            yield group
            group, size = [], 0
        group.append(name)
        size += added
    yield group


def _make(
    directory: Path, config: ModelConfig, shapes: Shapes, dtypes: Mapping[str, str]
) -> SafetensorsStore:
    if FAMILIES[config.model_type].stacks_experts:
        # Rows of such an expert are columns there, a few bytes at a time.
        raise EasySpecError(
            f"models of model_type {config.model_type!r} cannot be written as Hugging Face files; "
            "keep those that this one came from"
        )
    return SafetensorsStore(directory, config)


HUGGING_FACE = Format("huggingface", _make, floats_only=True)
