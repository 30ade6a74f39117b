"""Writes an Orbax checkpoint in pieces, without Orbax, which wants a model's tensors all at once."""

import shutil
import time
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from convert.stores import Format, Shapes, write_json
from easyspec_jax.checkpoint.canonical import expected_shapes
from easyspec_jax.checkpoint.orbax import WEIGHTS
from easyspec_jax.errors import EasySpecError, first_line

_CHUNK = 1 << 20  # bytes, at most, unless one row is more
_TILE = (512, 256)  # rows and columns of a chunk of what tensor parallelism splits by columns
_SPLIT_BY_COLUMNS = ("o_proj.weight", "down_proj.weight")


class OrbaxStore:
    """An OCDBT store of zarr arrays, laid out as Orbax lays it out, in `weights/`.

    Chunks are small enough that a shard of any mesh is read by few bytes more than it has, are not compressed (weights
    hardly are compressible, and reading would wait for it), and carry a CRC-32C that every reader checks.
    """

    def __init__(self, directory: Path, shapes: Shapes, dtype: str) -> None:
        import tensorstore as ts

        self._directory, self._dtype = directory / WEIGHTS, np.dtype(dtype)
        self._written = self._directory / "ocdbt.process_0"  # where Orbax's first process writes
        self._shapes = shapes
        # The workplace flushes everything once, at the end.
        self._context = ts.Context({"file_io_sync": False})
        try:
            self._arrays = self._opened()
        except (OSError, ValueError):  # what an earlier run left cannot be gone on with
            shutil.rmtree(self._directory, ignore_errors=True)
            try:
                self._arrays = self._opened()
            except (OSError, ValueError) as error:
                raise self._unwritable(error) from None

    def rows(self, name: str) -> int:
        return self._chunk(name)[0]

    def write(self, name: str, start: int, values: np.ndarray) -> None:
        target = self._arrays[name][start : start + len(values)]
        try:
            target.write(values, can_reference_source_data_indefinitely=True).result()
        except (OSError, ValueError) as error:  # a full disk is either, by the layer that meets it
            raise self._unwritable(error) from None

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        try:
            return self._arrays[name][start:stop].read().result()
        except (OSError, ValueError) as error:
            raise EasySpecError(f"{self._directory} is damaged: {first_line(error)}") from None

    def finish(self) -> None:
        """Lists all chunks in an index at the top, which is Orbax's commit, and drops what interruptions left."""
        import tensorstore as ts

        try:
            (self._directory / "manifest.ocdbt").unlink(missing_ok=True)
            child, parent = (
                ts.KvStore.open(_ocdbt(directory), context=self._context).result()
                for directory in (self._written, self._directory)
            )
            with ts.Transaction() as transaction:
                child.experimental_copy_range_to(parent.with_transaction(transaction)).result()
            kept = set(_files(self._directory)) | set(_files(self._written))
            for pattern in ("d/*", f"{self._written.name}/d/*", "**/*.__lock"):
                for path in set(self._directory.glob(pattern)) - kept:
                    path.unlink()
            write_json(self._directory / "_METADATA", _orbax_metadata(self._shapes))
            write_json(self._directory / "_CHECKPOINT_METADATA", _checkpoint_metadata())
        except (OSError, ValueError) as error:
            raise self._unwritable(error) from None

    def _opened(self) -> dict[str, Any]:
        import tensorstore as ts

        with ts.Transaction() as transaction:  # one commit
            for future in [self._open(name, transaction) for name in self._shapes]:
                future.result()
        opening = {name: self._open(name) for name in self._shapes}
        return {name: future.result() for name, future in opening.items()}

    def _open(self, name: str, transaction: Any = None) -> Any:
        import tensorstore as ts

        metadata = {
            "shape": self._shapes[name],
            "data_type": self._dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": self._chunk(name)}},
            "codecs": [
                {"name": "bytes", "configuration": {"endian": "little"}},
                {"name": "crc32c"},
            ],
        }
        spec = {
            "driver": "zarr3",
            # Small nodes: each piece's commit writes those that it changes anew.
            "kvstore": _ocdbt(self._written)
            | {"path": f"{name}/", "config": {"max_decoded_node_bytes": 1 << 16}},
            "metadata": metadata,
            "store_data_equal_to_fill_value": True,
            "fill_missing_data_reads": False,
        }
        return ts.open(spec, open=True, create=True, context=self._context, transaction=transaction)

    def _chunk(self, name: str) -> list[int]:
        rows, *rest = self._shapes[name]
        if name.endswith(_SPLIT_BY_COLUMNS):
            return [min(rows, _TILE[0]), min(rest[0], _TILE[1])]
        fitting = max(1, _CHUNK // (prod(rest) * self._dtype.itemsize))
        return [min(rows, 1 << (fitting.bit_length() - 1)), *rest]

    def _unwritable(self, error: Exception) -> EasySpecError:
        return EasySpecError(f"{self._directory.parent} cannot be written: {first_line(error)}")


def _ocdbt(directory: Path) -> dict[str, Any]:
    return {"driver": "ocdbt", "base": directory.resolve().as_uri() + "/"}


def _files(directory: Path) -> Iterator[Path]:
    """The files that the newest version of an OCDBT store refers to."""
    import tensorstore as ts

    base = ts.KvStore.open(directory.resolve().as_uri() + "/").result()
    places = [ts.ocdbt.dump(base).result()["versions"][-1]["root"].get("location")]
    while places:
        place = places.pop()
        if place is not None:
            kind, folder, rest = place.split(":", 2)
            yield directory / folder / rest.rsplit(":", 2)[0]
            if kind == "btreenode":
                entries = ts.ocdbt.dump(base, place).result()["entries"]
                places += [entry.get("location", entry.get("indirect_value")) for entry in entries]


def _orbax_metadata(names: Shapes) -> dict[str, Any]:
    """Orbax's description of a flat tree of NumPy arrays."""
    leaf = {"value_type": "np.ndarray", "skip_deserialize": False}
    return {
        "tree_metadata": {
            str((name,)): {"key_metadata": [{"key": name, "key_type": 2}], "value_metadata": leaf}
            for name in names
        },
        "use_ocdbt": True,
        "use_zarr3": True,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }


def _checkpoint_metadata() -> dict[str, Any]:
    handler = "orbax.checkpoint._src.handlers.standard_checkpoint_handler.StandardCheckpointHandler"
    now = time.time_ns()
    return {
        "item_handlers": handler,
        "metrics": {},
        "performance_metrics": {},
        "init_timestamp_nsecs": now,
        "commit_timestamp_nsecs": now,
        "custom_metadata": {},
    }


ORBAX = Format(
    "orbax", lambda directory, config: OrbaxStore(directory, expected_shapes(config), config.dtype)
)
