"""Tensors on disk, of which any window is read by its byte ranges: safetensors files and Orbax checkpoints.

Files are read, never mapped: mapped pages count as memory of the process. Nothing is ever unpickled.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes  # noqa: F401  (teaches NumPy bfloat16)
import numpy as np

from easyspec_jax.config import LARGEST_JSON, read_json
from easyspec_jax.errors import EasySpecError, first_line

SAFETENSORS = "model.safetensors"
"""Name of the weights inside a Hugging Face directory, where they are one file."""

INDEX = "model.safetensors.index.json"
"""Name of the file that says which tensor is in which, where they are several."""

Window = tuple[slice, ...]
"""Of a tensor's first one or two dimensions; of the others it has everything. Without steps, within bounds."""

_BLOCK = 4 << 20  # bytes that are read at a time on their way into a larger array
_MOST_COMPRESSED = 16  # times, at most, that weights are larger than what is stored of them

_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_OTHER_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
               "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64}  # fmt: skip


class TensorSource(Protocol):
    """Canonical tensors by name, read a window at a time."""

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of every tensor, without reading any."""
        ...

    def read(self, name: str, window: Window = ()) -> np.ndarray:
        """A window of one tensor in host memory, in its stored dtype; by default all of it."""
        ...


class StoredSource(TensorSource, Protocol):
    """A TensorSource that knows how its tensors are stored."""

    def dtypes(self) -> Mapping[str, str]:
        """Each tensor's type: NumPy's name, or the file's own for a type that is not supported."""
        ...


def read_into(out: np.ndarray, source: TensorSource, name: str, window: Window = ()) -> None:
    """Fills out, however its memory lies, with a window of a tensor in out's dtype; beside it lie a few MiB at most.

    Rows are read in powers of two, so that reads begin and end where most stored chunks do.
    """
    first = window[0].start if window else 0
    for rows in row_blocks(out.shape):
        out[rows] = source.read(name, (slice(first + rows.start, first + rows.stop), *window[1:]))


def row_blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Split the rows of a tensor into slices of a few MiB, each a power of two of rows but the last."""
    fitting = max(1, _BLOCK // max(1, 4 * prod(shape[1:])))
    step = 1 << (fitting.bit_length() - 1)
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies in a safetensors file: `offset` bytes from its start, in row-major order."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int


class SafetensorsSource:
    """Tensors of a Hugging Face directory, out of the files that transformers would read.

    These are `model.safetensors` if there is one, whatever an index says; otherwise all shards that the index lists,
    each with all that it holds, the last one in order of names where two hold the same tensor. A `transformers_weights`
    in `config.json` names either kind of file itself.

    Args:
        directory: The checkpoint.
        wanted: The tensors that are needed. A shard that is missing and listed for none of these is an entry from an
            older state of the directory.

    Raises:
        EasySpecError: A shard is missing, truncated or malformed.
    """

    def __init__(self, directory: Path, wanted: frozenset[str] | None = None) -> None:
        self._places: dict[str, _Place] = {}
        for path, listed in _shards(directory):
            if listed is not None and wanted is not None and not listed & wanted and not path.is_file():
                continue
            self._places |= _header(path)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: place.shape for name, place in self._places.items()}

    def dtypes(self) -> Mapping[str, str]:
        return {name: _DTYPES.get(place.dtype, place.dtype) for name, place in self._places.items()}

    def read(self, name: str, window: Window = ()) -> np.ndarray:
        place = self._places[name]
        if place.dtype not in _DTYPES:
            raise EasySpecError(f"{place.path}: {name} is stored as {place.dtype}, which is not supported")
        try:
            with place.path.open("rb", buffering=0) as file:
                return _read_window(file.fileno(), place, window)
        except (OSError, EOFError) as error:
            raise EasySpecError(f"{place.path} cannot be read ({first_line(error)}); fetch it again") from None


def read_bytes(file: int, out: np.ndarray, offset: int) -> None:
    """Fills a contiguous array from an open file. Raises EOFError if the file ends before."""
    left = out.reshape(-1).view(np.uint8).data
    while left:
        count = os.preadv(file, [left], offset)
        if not count:
            raise EOFError("it ends too early")
        left, offset = left[count:], offset + count


def _read_window(file: int, place: _Place, window: Window) -> np.ndarray:
    dtype = np.dtype(_DTYPES[place.dtype])
    ranges = [(part.start, part.stop) for part in window] + [(0, size) for size in place.shape[len(window) :]]
    out = np.empty([stop - start for start, stop in ranges], dtype)
    row = prod(place.shape[1:]) * dtype.itemsize
    if out.shape[1:] == place.shape[1:]:  # whole rows are one range
        read_bytes(file, out, place.offset + (ranges[0][0] * row if ranges else 0))
    else:
        run = place.offset + ranges[1][0] * prod(place.shape[2:]) * dtype.itemsize
        for number, part in enumerate(out, ranges[0][0]):
            read_bytes(file, part, run + number * row)
    return out


def _shards(directory: Path) -> Iterator[tuple[Path, set[str] | None]]:
    """Each safetensors file, in order, with the tensors that the index lists for it (None without an index)."""
    main = _main_file(directory)
    if not main.name.endswith(".index.json"):
        yield main, None
        return
    weight_map = read_json(main).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise EasySpecError(f"{main} has no weight_map from tensor names to files")
    for file in sorted(set(weight_map.values())):
        yield _inside(directory, file, main), {name for name, place in weight_map.items() if place == file}


def _main_file(directory: Path) -> Path:
    """The safetensors file or index that transformers would start from."""
    config = directory / "config.json"
    named = read_json(config).get("transformers_weights") if config.exists() else None
    if isinstance(named, str) and named.endswith((".safetensors", ".safetensors.index.json")):
        return _inside(directory, named, config)
    if named is not None:
        raise EasySpecError(f"{config}: transformers_weights={named!r} names no safetensors file and no index of some")
    for name in (SAFETENSORS, INDEX):
        if (directory / name).exists():
            return directory / name
    raise EasySpecError(
        f"{directory} holds no weights; expected {SAFETENSORS}, {INDEX} or a converted checkpoint (weights/)"
    )


def _inside(directory: Path, file: str, named_by: Path) -> Path:
    if Path(file).name != file or "\0" in file:
        raise EasySpecError(f"{named_by}: {file!r} leads out of the checkpoint directory")
    return directory / file


def _header(path: Path) -> dict[str, _Place]:
    """Where each tensor of a file lies; every byte of it belongs to exactly one."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            data = 8 + length
            if not 2 <= length <= LARGEST_JSON or data > size:
                raise ValueError("no header fits it")
            entries = json.loads(file.read(length), object_pairs_hook=_unique)
        entries.pop("__metadata__", None)
        places = {name: _place(path, name, entry, data) for name, entry in entries.items()}
        ranges = sorted(entry["data_offsets"] for entry in entries.values())
        if any(first[1] != second[0] for first, second in pairwise([[0, 0], *ranges, [size - data, size - data]])):
            raise ValueError("its tensors do not fill it")
        return places
    except FileNotFoundError:
        raise EasySpecError(f"{path} is missing; fetch the whole checkpoint again") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, MemoryError) as error:
        raise EasySpecError(f"{path} is truncated or damaged ({first_line(error)[:200]}); fetch it again") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        raise ValueError("a name appears twice in its header")
    return entries


def _place(path: Path, name: str, entry: dict[str, Any], data: int) -> _Place:
    dtype, shape, (start, stop) = str(entry["dtype"]), entry["shape"], entry["data_offsets"]
    if not all(type(number) is int and 0 <= number < 2**62 for number in (*shape, start, stop)):
        raise ValueError(f"{name[:100]!r} has no proper place")
    bits = 8 * np.dtype(_DTYPES[dtype]).itemsize if dtype in _DTYPES else _OTHER_BITS.get(dtype)
    if bits is not None and prod(shape) * bits != 8 * (stop - start):
        raise ValueError(f"{name[:100]!r} has another size than its shape")
    return _Place(path, dtype, tuple(shape), data + start)


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
                spec["fill_missing_data_reads"] = False  # where zeros are stored as well, what is absent is lost
            leaves = metadata["tree_metadata"].values()
            names = [".".join(key["key"] for key in leaf["key_metadata"]) for leaf in leaves]
            opening = {
                name: tensorstore.open(spec | {"kvstore": store | {"path": f"{name}/"}}, open=True) for name in names
            }
            self._arrays = {name: future.result() for name, future in opening.items()}
            _check_sizes(self._arrays.values(), directory)
        except Exception as error:  # whatever the layers of the store raise
            raise _unreadable(directory, error) from None

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tuple(array.shape) for name, array in self._arrays.items()}

    def dtypes(self) -> Mapping[str, str]:
        return {name: array.dtype.name for name, array in self._arrays.items()}

    def read(self, name: str, window: Window = ()) -> np.ndarray:
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
