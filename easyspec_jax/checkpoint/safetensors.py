"""Safetensors files: read by byte ranges from a Hugging Face directory, and written.

A file is a length (8 bytes, little-endian), a JSON header of that length, and the data. The header
maps each name to a dtype, a shape and the tensor's bytes as `[start, stop]` within the data.
"""

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
"""Name of the weights in a Hugging Face directory that keeps them in one file."""

INDEX = "model.safetensors.index.json"
"""Name of the file that maps tensors to files in a directory that has several."""

_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}

# Parts of quantized matrices, which are no weights by themselves; see `stored_matrices`.
_PARTS = {
    **{"I8": "int8", "U8": "uint8", "I32": "int32", "I64": "int64"},
    "F8_E4M3": "float8_e4m3fn",
}

# Bits of dtypes that are not supported as weights. Their tensors' sizes are checked all the same.
_OTHER_BITS: dict[str, int] = {
    **{"BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8},
    **{"U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64},
}


@dataclass(frozen=True)
class _ByteRange:
    """Location of a tensor: `offset` bytes from the start of a file, in row-major order."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int


class SafetensorsSource:
    """Tensors of a Hugging Face directory, from the files that transformers would read.

    That is `model.safetensors` if there is one, even next to an index. Otherwise it is every file
    that the index lists, with all the tensors it holds; if two files hold the same tensor, the one
    whose name sorts last wins. `transformers_weights` in `config.json` can name either kind of
    file.

    Args:
        directory: The checkpoint.
        wanted: The tensors that are needed. A missing file is ignored if the index lists none of
            them for it, because it is then left over from an older state of the directory.

    Raises:
        EasySpecError: A file is missing, truncated or malformed.
    """

    def __init__(self, directory: Path, wanted: frozenset[str] | None = None) -> None:
        self._places: dict[str, _ByteRange] = {}
        for path, listed in _shards(directory):
            needed = listed is None or wanted is None or not listed.isdisjoint(wanted)
            if needed or path.is_file():
                self._places |= _header(path)
        places = self._places.items()
        # Formats of quantized checkpoints ask for these once for each of thousands of matrices.
        self._shapes = {name: place.shape for name, place in places}
        self._dtypes = {name: _DTYPES.get(place.dtype, place.dtype) for name, place in places}

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def dtypes(self) -> Mapping[str, str]:
        return self._dtypes

    def read(self, name: str, window: Slices = ()) -> np.ndarray:
        place = self._places[name]
        if place.dtype not in _DTYPES | _PARTS:
            raise EasySpecError(
                f"{place.path}: {name} is stored as {place.dtype}, which is not supported"
            )
        try:
            # Opened anew for every read: a model of hundreds of files must not exhaust descriptors.
            with place.path.open("rb", buffering=0) as file:
                return _read_window(file.fileno(), place, window)
        except (OSError, EOFError) as error:
            raise EasySpecError(
                f"{place.path} cannot be read ({first_line(error)}); fetch it again"
            ) from None


def _read_window(file: int, place: _ByteRange, window: Slices) -> np.ndarray:
    dtype = np.dtype((_DTYPES | _PARTS)[place.dtype])
    # Slices of the dimensions that the window leaves out.
    whole = tuple(slice(0, size) for size in place.shape[len(window) :])
    slices = window + whole
    out = np.empty([part.stop - part.start for part in slices], dtype)
    _fill(file, out, place.offset, place.shape, slices)
    return out


def _fill(file: int, out: np.ndarray, offset: int, shape: tuple[int, ...], window: Slices) -> None:
    """Read a window, with a slice for each dimension, of an array from some byte on."""
    row = prod(shape[1:]) * out.itemsize
    if out.shape[1:] == shape[1:]:
        # Whole rows, and scalars, are one range of bytes.
        read_bytes(file, out, offset + (window[0].start * row if window else 0))
        return
    for number, part in enumerate(out, window[0].start):
        _fill(file, part, offset + number * row, shape[1:], window[1:])


def _shards(directory: Path) -> Iterator[tuple[Path, set[str] | None]]:
    """Yield each file, in order, with the tensors that the index lists for it (None: no index)."""
    main = _main_file(directory)
    if not main.name.endswith(".index.json"):
        yield main, None
        return
    weight_map = read_json(main).get("weight_map")
    if not isinstance(weight_map, dict) or set(map(type, weight_map.values())) - {str}:
        raise EasySpecError(f"{main} has no weight_map from tensor names to files")
    listed: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        listed.setdefault(file, set()).add(name)
    for file, names in sorted(listed.items()):
        yield _inside(directory, file, main), names


def _main_file(directory: Path) -> Path:
    """Return the safetensors file or the index that transformers would start from."""
    config = directory / "config.json"
    named = read_json(config).get("transformers_weights") if config.exists() else None
    if isinstance(named, str) and named.endswith((".safetensors", ".safetensors.index.json")):
        return _inside(directory, named, config)
    if named is not None:
        raise EasySpecError(
            f"{config}: transformers_weights={named!r} must name a safetensors file or an index"
        )
    for name in (SAFETENSORS, INDEX):
        if (directory / name).exists():
            return directory / name
    raise EasySpecError(
        f"{directory} holds no weights; "
        f"expected {SAFETENSORS}, {INDEX} or a converted checkpoint (weights/)"
    )


def _inside(directory: Path, file: str, named_by: Path) -> Path:
    # An index is not to be trusted: "../../secret" must not be read, and "\0" is not a file name.
    if Path(file).name != file or "\0" in file:
        raise EasySpecError(f"{named_by}: {file!r} points outside the checkpoint directory")
    return directory / file


def _header(path: Path) -> dict[str, _ByteRange]:
    """Locate each tensor of a file, and check that every byte belongs to exactly one of them."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            data = 8 + length
            if not 2 <= length <= LARGEST_JSON or data > size:
                raise ValueError("its header does not fit")
            entries = json.loads(file.read(length), object_pairs_hook=_unique)
        entries.pop("__metadata__", None)
        places = {name: _place(path, name, entry, data) for name, entry in entries.items()}
        # In order of their offsets, each tensor must begin where the one before it ends, so that
        # none overlap and none can hide bytes from a reader that checks shapes only.
        ranges = sorted(entry["data_offsets"] for entry in entries.values())
        for before, after in pairwise([[0, 0], *ranges, [size - data, size - data]]):
            if before[1] != after[0]:
                raise ValueError("its tensors do not fill it")
        return places
    except FileNotFoundError:
        raise EasySpecError(f"{path} is missing; fetch the whole checkpoint again") from None
    # What a header provokes that is valid JSON but of other types: a list instead of an object,
    # a missing field, a thousand nested brackets.
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
    """Make an object of its pairs; json alone would keep the last of two equal names."""
    entries = dict(pairs)
    if len(entries) < len(pairs):
        raise ValueError("a name appears twice in its header")
    return entries


def _place(path: Path, name: str, entry: dict[str, Any], data: int) -> _ByteRange:
    dtype, shape, (start, stop) = str(entry["dtype"]), entry["shape"], entry["data_offsets"]
    if len(shape) > 8 or not all(map(_is_size, (*shape, start, stop))):
        raise ValueError(f"{name[:100]!r} has an invalid shape or place")
    bits = 8 * np.dtype(_DTYPES[dtype]).itemsize if dtype in _DTYPES else _OTHER_BITS.get(dtype)
    if bits is not None and prod(shape) * bits != 8 * (stop - start):
        raise ValueError(f"the size of {name[:100]!r} does not match its shape")
    return _ByteRange(path, dtype, tuple(shape), data + start)


def _is_size(number: Any) -> bool:
    # JSON's true is an int to isinstance(); and huge integers would make their product slow.
    return type(number) is int and 0 <= number < 2**62


def write_safetensors(path: Path, tensors: Iterable[tuple[str, np.ndarray]]) -> None:
    """Write tensors as a safetensors file that transformers reads.

    Args:
        path: The file to create or replace.
        tensors: Their names and values.

    Raises:
        EasySpecError: The write fails.
    """
    # The library copies memory as it lies and ignores strides.
    values = {name: np.ascontiguousarray(tensor) for name, tensor in tensors}
    try:
        # It also makes its file readable by the owner only; ours keeps the mode that a new file
        # gets here.
        path.touch()
        mode = path.stat().st_mode
        save_file(values, path, metadata={"format": "pt"})
        path.chmod(mode)
    except (OSError, SafetensorError) as error:
        raise EasySpecError(f"{path.parent} cannot be written: {first_line(error)}") from None
