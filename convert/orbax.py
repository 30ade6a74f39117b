"""Writes tensors in pieces and lets Orbax make a checkpoint of them."""

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from convert.stores import Format, Shapes
from easyspec_jax.checkpoint.config import ModelConfig
from easyspec_jax.checkpoint.int4 import PACKED, pack, unpack
from easyspec_jax.checkpoint.orbax import WEIGHTS
from easyspec_jax.errors import EasySpecError, first_line

_CHUNK = 1 << 20  # bytes of a chunk at most, unless one row is larger
_TILE = (512, 256)  # rows and columns of a chunk, where tensor parallelism splits columns
_SPLIT_BY_COLUMNS = ("o_proj.weight", "down_proj.weight")
_PIECES = "ocdbt.process_0"  # where tensors grow; Orbax's name for the store of its first process


class OrbaxStore:
    """An OCDBT store of zarr arrays that becomes the Orbax checkpoint `weights/`.

    Orbax writes whole tensors, so the pieces are written here; `finish` hands them over. Chunks are
    small: reading a shard of any mesh reads few bytes beyond it. They are not
    compressed, since weights hardly shrink and a reader would wait for it. Each chunk carries a
    CRC-32C that every reader checks.

    Args:
        directory: Where `weights/` is to be. Pieces of an earlier run are kept.
        shapes: The shape of every tensor, by name.
        dtypes: The type of all tensors, or of each by name. Matrices of int4 are packed, see
            `easyspec_jax.checkpoint.int4`.

    Raises:
        EasySpecError: The directory cannot be written, or a matrix cannot be packed.
    """

    def __init__(self, directory: Path, shapes: Shapes, dtypes: str | Mapping[str, str]) -> None:
        import tensorstore as ts

        self._parent = directory
        self._directory = directory / _PIECES
        self._tensors: dict[str, _Tensor] = {}
        for name, shape in shapes.items():
            dtype = dtypes if isinstance(dtypes, str) else dtypes[name]
            self._tensors[name] = _stored(name, shape, dtype)
        # The workplace flushes everything once, at the end.
        self._context = ts.Context({"file_io_sync": False})
        try:
            self._take_back()
            self._arrays = self._opened()
        except (OSError, ValueError):  # an earlier run left a damaged store; start anew
            shutil.rmtree(self._directory, ignore_errors=True)
            try:
                self._arrays = self._opened()
            except (OSError, ValueError) as error:
                raise self._unwritable(error) from None

    def rows(self, name: str) -> int:
        return self._chunk(name)[0]

    def write(self, name: str, start: int, values: np.ndarray) -> None:
        values = pack(values) if self._tensors[name].is_packed else values
        target = self._arrays[name][start : start + len(values)]
        try:
            target.write(values, can_reference_source_data_indefinitely=True).result()
        except (OSError, ValueError) as error:  # a full disk raises either
            raise self._unwritable(error) from None

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        try:
            values = self._arrays[name][start:stop].read().result()
        except (OSError, ValueError) as error:
            raise EasySpecError(f"{self._directory} is damaged: {first_line(error)}") from None
        return unpack(values) if self._tensors[name].is_packed else values

    def finish(self) -> None:
        """Drop what interrupted runs left, and let Orbax commit the rest as a checkpoint."""
        from easyspec_jax.checkpoint.orbax_handlers import commit

        try:
            self._take_back()
            kept = set(_files(self._directory))
            for pattern in ("d/*", "**/*.__lock"):
                for path in set(self._directory.glob(pattern)) - kept:
                    path.unlink()
            tensors = {each.name: (each.shape, each.dtype) for each in self._tensors.values()}
            commit(self._parent / WEIGHTS, self._directory, tensors)
        except (OSError, ValueError) as error:
            raise self._unwritable(error) from None

    def _take_back(self) -> None:
        """Undo a commit, whole or half done, so that an interrupted run goes on with its pieces.

        Some versions of Orbax give the checkpoint a temporary name until it is complete.
        """
        from_orbax = (
            self._parent / WEIGHTS,
            *self._parent.glob(f"{WEIGHTS}.orbax-checkpoint-tmp*"),
        )
        for checkpoint in from_orbax:
            if (checkpoint / _PIECES).is_dir():
                (checkpoint / _PIECES).rename(self._directory)
            if checkpoint.is_dir():
                shutil.rmtree(checkpoint)

    def _opened(self) -> dict[str, Any]:
        import tensorstore as ts

        with ts.Transaction() as transaction:  # one commit
            for future in [self._open(name, transaction) for name in self._tensors]:
                future.result()
        opening = {name: self._open(name) for name in self._tensors}
        return {name: future.result() for name, future in opening.items()}

    def _open(self, name: str, transaction: Any = None) -> Any:
        import tensorstore as ts

        tensor = self._tensors[name]
        metadata = {
            "shape": tensor.shape,
            "data_type": tensor.dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": self._chunk(name)}},
            "codecs": [
                {"name": "bytes", "configuration": {"endian": "little"}},
                {"name": "crc32c"},
            ],
        }
        spec = {
            "driver": "zarr3",
            # Every piece that is committed rewrites the nodes it changes, so they are small.
            "kvstore": _ocdbt(self._directory)
            | {"path": f"{tensor.name}/", "config": {"max_decoded_node_bytes": 1 << 16}},
            "metadata": metadata,
            "store_data_equal_to_fill_value": True,
            "fill_missing_data_reads": False,
        }
        return ts.open(spec, open=True, create=True, context=self._context, transaction=transaction)

    def _chunk(self, name: str) -> list[int]:
        tensor = self._tensors[name]
        rows, *rest = tensor.shape
        if name.endswith(_SPLIT_BY_COLUMNS):
            return [min(rows, _TILE[0]), min(rest[0], _TILE[1])]
        # Readers and writers of a packed chunk also hold it unpacked.
        unpacked = 2 if tensor.is_packed else 1
        fitting = max(1, _CHUNK // (prod(rest) * tensor.dtype.itemsize * unpacked))
        return [min(rows, 1 << (fitting.bit_length() - 1)), *rest]

    def _unwritable(self, error: Exception) -> EasySpecError:
        return EasySpecError(f"{self._parent} cannot be written: {first_line(error)}")


@dataclass(frozen=True)
class _Tensor:
    """A tensor as it is stored."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    is_packed: bool


def _stored(name: str, shape: tuple[int, ...], dtype: str) -> _Tensor:
    if dtype != "int4":
        return _Tensor(name, shape, np.dtype(dtype), False)
    rows, inner = shape
    if inner % 2:
        raise EasySpecError(
            f"{name} has {inner} columns, and int4 needs an even number; choose other `weights`"
        )
    return _Tensor(name + PACKED, (rows, inner // 2), np.dtype(np.uint8), True)


def _ocdbt(directory: Path) -> dict[str, Any]:
    return {"driver": "ocdbt", "base": directory.resolve().as_uri() + "/"}


def _files(directory: Path) -> Iterator[Path]:
    """Yield the files that the newest version of an OCDBT store refers to."""
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


def _make(
    directory: Path, config: ModelConfig, shapes: Shapes, dtypes: Mapping[str, str]
) -> OrbaxStore:
    return OrbaxStore(directory, shapes, dtypes)


ORBAX = Format("orbax", _make)
