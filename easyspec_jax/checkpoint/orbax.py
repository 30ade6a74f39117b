"""Orbax checkpoints as tensors by name, read by byte ranges."""

from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (teaches NumPy bfloat16)
import numpy as np

from easyspec_jax.checkpoint.config import read_json
from easyspec_jax.checkpoint.int4 import PACKED, unpack
from easyspec_jax.checkpoint.quantized import whole_window
from easyspec_jax.checkpoint.tensors import Slices
from easyspec_jax.errors import EasySpecError, first_line

WEIGHTS = "weights"
"""Name of the Orbax checkpoint inside a directory of ours."""

_MOST_COMPRESSED = 16  # weights are at most this many times as large as their files


class OrbaxSource:
    """Tensors of an Orbax checkpoint.

    Orbax lists the tensors and a type handler of ours opens them (see `orbax_handlers`). Windows
    are then read through tensorstore, because Orbax restores whole tensors only. Chunks that
    `convert` wrote carry checksums, so a read notices damage. Matrices of int4, which are stored
    two values to a byte (see `int4`), have their own names and types here.

    Args:
        directory: The Orbax checkpoint.

    Raises:
        EasySpecError: The checkpoint is damaged, or claims more data than its files can hold.
    """

    def __init__(self, directory: Path) -> None:
        from easyspec_jax.checkpoint.orbax_handlers import open_tensors

        self._directory = directory
        try:
            # Read here too, because Orbax would read a file of any size.
            metadata = read_json(directory / "_METADATA")
            zeros = bool(metadata.get("store_array_data_equal_to_fill_value"))
            self._arrays = open_tensors(directory, zeros_are_stored=zeros)
            _check_sizes(self._arrays.values(), directory)
            for name, array in self._arrays.items():
                if _is_packed(name, array) and name.removesuffix(PACKED) in self._arrays:
                    raise ValueError(f"{name.removesuffix(PACKED)} is stored twice")
        except Exception as error:  # the layers of the store raise errors of many types
            raise _unreadable(directory, error) from None

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for name, array in self._arrays.items():
            shapes[name] = tuple(array.shape)
            if _is_packed(name, array):
                rows, half = shapes.pop(name)
                shapes[name.removesuffix(PACKED)] = rows, 2 * half
        return shapes

    def dtypes(self) -> Mapping[str, str]:
        dtypes: dict[str, str] = {}
        for name, array in self._arrays.items():
            if _is_packed(name, array):
                dtypes[name.removesuffix(PACKED)] = "int4"
            else:
                dtypes[name] = array.dtype.name
        return dtypes

    def read(self, name: str, window: Slices = ()) -> np.ndarray:
        if name in self._arrays:
            return self._read(name, window)
        packed = name + PACKED
        rows, half = self._arrays[packed].shape
        rows, columns = whole_window((rows, 2 * half), window)
        # Columns 3 to 6 are halves of the bytes 1 to 3.
        first = columns.start // 2
        stored = self._read(packed, (rows, slice(first, -(-columns.stop // 2))))
        return unpack(stored)[:, columns.start - 2 * first : columns.stop - 2 * first]

    def _read(self, name: str, window: Slices) -> np.ndarray:
        try:
            return self._arrays[name][window].read().result()
        except ValueError as error:
            raise _unreadable(self._directory, error) from None


def _is_packed(name: str, array: Any) -> bool:
    return name.endswith(PACKED) and len(array.shape) == 2 and array.dtype.name == "uint8"


def _check_sizes(arrays: Iterable[Any], directory: Path) -> None:
    """Raise ValueError unless the files can hold the tensors, and the tensors their chunks.

    A chunk is read whole, so one that is larger than its tensor could ask for any amount of memory.
    """
    claimed = sum(prod(array.shape) * array.dtype.numpy_dtype.itemsize for array in arrays)
    stored = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    if claimed > _MOST_COMPRESSED * stored:
        raise ValueError(f"{claimed} bytes of tensors cannot lie in files of {stored}")
    for array in arrays:
        metadata = array.spec().to_json()["metadata"]
        if "chunks" in metadata:  # zarr 2
            chunk = metadata["chunks"]
        else:
            chunk = metadata["chunk_grid"]["configuration"]["chunk_shape"]
        if any(part > whole for part, whole in zip(chunk, array.shape, strict=True)):
            raise ValueError(f"chunks of shape {chunk} are larger than their tensor")


def _unreadable(directory: Path, error: Exception) -> EasySpecError:
    reason = first_line(error).partition(" [tensorstore_spec")[0]
    return EasySpecError(
        f"{directory} is not a readable Orbax checkpoint ({reason}); convert again"
    )
