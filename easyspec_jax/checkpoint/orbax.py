"""Orbax checkpoints that `convert` wrote, read by byte ranges."""

from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (teaches NumPy bfloat16)
import numpy as np

from easyspec_jax.checkpoint.config import read_json
from easyspec_jax.checkpoint.tensors import Slices
from easyspec_jax.errors import EasySpecError, first_line

WEIGHTS = "weights"
"""Name of the Orbax checkpoint inside a directory of ours."""

_MOST_COMPRESSED = 16  # times, at most, that weights are larger than what is stored of them


class OrbaxSource:
    """Tensors of a checkpoint that `convert` wrote.

    Reads Orbax's storage (zarr arrays in an OCDBT store) through tensorstore: a restore per tensor costs fifteen
    times as much, a restore of all at once needs the whole model in host memory, and Orbax answers a damaged store
    with stack traces from its event loop. Chunks carry checksums, so damage is noticed by whoever reads it.
    """

    def __init__(self, directory: Path) -> None:
        import tensorstore

        self._directory = directory
        store = {"driver": "ocdbt", "base": directory.resolve().as_uri() + "/"}
        try:
            metadata = read_json(directory / "_METADATA")
            spec: dict[str, Any] = {"driver": "zarr3" if metadata["use_zarr3"] else "zarr"}
            if metadata.get("store_array_data_equal_to_fill_value"):
                spec["fill_missing_data_reads"] = (
                    False  # where zeros are stored as well, what is absent is lost
                )
            leaves = metadata["tree_metadata"].values()
            names = [".".join(key["key"] for key in leaf["key_metadata"]) for leaf in leaves]
            opening = {
                name: tensorstore.open(spec | {"kvstore": store | {"path": f"{name}/"}}, open=True)
                for name in names
            }
            self._arrays = {name: future.result() for name, future in opening.items()}
            _check_sizes(self._arrays.values(), directory)
        except Exception as error:  # whatever the layers of the store raise
            raise _unreadable(directory, error) from None

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tuple(array.shape) for name, array in self._arrays.items()}

    def dtypes(self) -> Mapping[str, str]:
        return {name: array.dtype.name for name, array in self._arrays.items()}

    def read(self, name: str, window: Slices = ()) -> np.ndarray:
        try:
            return self._arrays[name][window].read().result()
        except ValueError as error:
            raise _unreadable(self._directory, error) from None


def _check_sizes(arrays: Iterable[Any], directory: Path) -> None:
    """Raises ValueError if little on the disk is said to be much, as tensors or as chunks, which are read whole."""
    claimed = sum(prod(array.shape) * array.dtype.numpy_dtype.itemsize for array in arrays)
    stored = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    if claimed > _MOST_COMPRESSED * stored:
        raise ValueError(f"{claimed} bytes of tensors cannot lie in files of {stored}")
    for array in arrays:
        metadata = array.spec().to_json()["metadata"]
        chunk = metadata.get("chunks") or metadata["chunk_grid"]["configuration"]["chunk_shape"]
        if any(part > whole for part, whole in zip(chunk, array.shape, strict=True)):
            raise ValueError(f"chunks of shape {chunk} are larger than their tensor")


def _unreadable(directory: Path, error: Exception) -> EasySpecError:
    reason = first_line(error).partition(" [tensorstore_spec")[0]
    return EasySpecError(f"{directory} is no readable Orbax checkpoint ({reason}); convert again")
