"""Safetensors files: read by byte ranges out of a Hugging Face directory, and written."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (teaches NumPy bfloat16)
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from easyspec_jax.checkpoint.config import LARGEST_JSON, read_json
from easyspec_jax.checkpoint.tensors import Slices, read_bytes
from easyspec_jax.errors import EasySpecError, first_line

SAFETENSORS = "model.safetensors"
"""Name of the weights inside a Hugging Face directory, where they are one file."""

INDEX = "model.safetensors.index.json"
"""Name of the file that says which tensor is in which, where they are several."""

_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}

_OTHER_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
               "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64}  # fmt: skip


@dataclass(frozen=True)
class _ByteRange:
    """Location of a tensor in a safetensors file: `offset` bytes from its start, in row-major order."""

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
        self._places: dict[str, _ByteRange] = {}
        for path, listed in _shards(directory):
            if (
                listed is not None
                and wanted is not None
                and not listed & wanted
                and not path.is_file()
            ):
                continue
            self._places |= _header(path)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: place.shape for name, place in self._places.items()}

    def dtypes(self) -> Mapping[str, str]:
        return {name: _DTYPES.get(place.dtype, place.dtype) for name, place in self._places.items()}

    def read(self, name: str, window: Slices = ()) -> np.ndarray:
        place = self._places[name]
        if place.dtype not in _DTYPES:
            raise EasySpecError(
                f"{place.path}: {name} is stored as {place.dtype}, which is not supported"
            )
        try:
            with place.path.open("rb", buffering=0) as file:
                return _read_window(file.fileno(), place, window)
        except (OSError, EOFError) as error:
            raise EasySpecError(
                f"{place.path} cannot be read ({first_line(error)}); fetch it again"
            ) from None


def _read_window(file: int, place: _ByteRange, window: Slices) -> np.ndarray:
    dtype = np.dtype(_DTYPES[place.dtype])
    ranges = [(part.start, part.stop) for part in window] + [
        (0, size) for size in place.shape[len(window) :]
    ]
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
    if not isinstance(weight_map, dict) or not all(
        isinstance(file, str) for file in weight_map.values()
    ):
        raise EasySpecError(f"{main} has no weight_map from tensor names to files")
    listed: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        listed.setdefault(file, set()).add(name)
    for file, names in sorted(listed.items()):
        yield _inside(directory, file, main), names


def _main_file(directory: Path) -> Path:
    """The safetensors file or index that transformers would start from."""
    config = directory / "config.json"
    named = read_json(config).get("transformers_weights") if config.exists() else None
    if isinstance(named, str) and named.endswith((".safetensors", ".safetensors.index.json")):
        return _inside(directory, named, config)
    if named is not None:
        raise EasySpecError(
            f"{config}: transformers_weights={named!r} names no safetensors file and no index of some"
        )
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


def _header(path: Path) -> dict[str, _ByteRange]:
    """Locate each tensor of a file; every byte of the file belongs to exactly one."""
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
        if any(
            first[1] != second[0]
            for first, second in pairwise([[0, 0], *ranges, [size - data, size - data]])
        ):
            raise ValueError("its tensors do not fill it")
        return places
    except FileNotFoundError:
        raise EasySpecError(f"{path} is missing; fetch the whole checkpoint again") from None
    except (
        OSError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        RecursionError,
        MemoryError,
    ) as error:
        raise EasySpecError(
            f"{path} is truncated or damaged ({first_line(error)[:200]}); fetch it again"
        ) from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        raise ValueError("a name appears twice in its header")
    return entries


def _place(path: Path, name: str, entry: dict[str, Any], data: int) -> _ByteRange:
    dtype, shape, (start, stop) = str(entry["dtype"]), entry["shape"], entry["data_offsets"]
    if len(shape) > 8 or not all(
        type(number) is int and 0 <= number < 2**62 for number in (*shape, start, stop)
    ):
        raise ValueError(f"{name[:100]!r} has no proper place")
    bits = 8 * np.dtype(_DTYPES[dtype]).itemsize if dtype in _DTYPES else _OTHER_BITS.get(dtype)
    if bits is not None and prod(shape) * bits != 8 * (stop - start):
        raise ValueError(f"{name[:100]!r} has another size than its shape")
    return _ByteRange(path, dtype, tuple(shape), data + start)


def write_safetensors(path: Path, tensors: Iterable[tuple[str, np.ndarray]]) -> None:
    """Writes canonical tensors as a safetensors file that transformers reads.

    Raises EasySpecError if the place cannot hold them.
    """
    # The library copies memory as it lies, whatever the strides say.
    values = {name: np.ascontiguousarray(tensor) for name, tensor in tensors}
    try:
        path.touch()
        mode = path.stat().st_mode
        save_file(values, path, metadata={"format": "pt"})
        path.chmod(mode)  # the library's file is readable by its owner only
    except (OSError, SafetensorError) as error:
        raise EasySpecError(f"{path.parent} cannot be written: {first_line(error)}") from None
