"""Opening checkpoints: an Orbax directory of our own, or a Hugging Face directory as it is.

Canonical tensors carry Hugging Face's Llama names and layouts (linear weights are [out, in]); every other naming is
translated by `convert` once.
"""

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from easyspec_jax.config import ModelConfig, read_model_config
from easyspec_jax.errors import EasySpecError, first_line
from easyspec_jax.families import FAMILIES, HEAD, Tensor
from easyspec_jax.options import FLOAT_DTYPES
from easyspec_jax.sources import OrbaxSource, SafetensorsSource, StoredSource, Window

WEIGHTS = "weights"
"""Name of the Orbax checkpoint inside a directory of ours."""

# Buffers that older exports kept beside the weights; they follow from the configuration.
_DERIVED = ("rotary_emb.inv_freq", "attn.masked_bias", "attn.bias")

_STORED_DTYPES = (*FLOAT_DTYPES, "float64")

Scheme = Literal["hf", "gguf"]
"""Whose names tensors have, see `families.Tensor`."""


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint directory, its tensors checked against its configuration but not yet read."""

    directory: Path
    config: ModelConfig
    source: StoredSource

    @cached_property
    def fingerprint(self) -> str:
        """A hash of every tensor as it is stored; the same for a converted copy in the same dtype."""

        def digest(name: str) -> bytes:
            tensor = np.ascontiguousarray(self.source.read(name))
            described = f"{name} {tensor.dtype} {tensor.shape} ".encode()
            return hashlib.sha256(described + tensor.reshape(-1).view(np.uint8).data).digest()

        with ThreadPoolExecutor() as pool:
            digests = pool.map(digest, sorted(expected_shapes(self.config)))
            return hashlib.sha256(b"".join(digests)).hexdigest()


def open_checkpoint(directory: Path | str) -> Checkpoint:
    """Opens a converted (Orbax) or a Hugging Face (safetensors) directory.

    Raises EasySpecError if it is neither, is damaged, leads out of itself, or holds other tensors than its
    configuration asks for.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise EasySpecError(f"{directory} is no directory; expected a converted or a Hugging Face checkpoint")
    check_files(directory)
    config = read_model_config(directory)
    if (directory / WEIGHTS).is_dir():
        source = OrbaxSource(directory / WEIGHTS)
        check_tensors(config, source, origin=str(directory))
    else:
        stored = SafetensorsSource(directory, frozenset(stored_shapes(config, "hf")))
        source = canonical(config, stored, "hf", origin=str(directory))
    return Checkpoint(directory, config, source)


def check_files(directory: Path) -> None:
    """Raises EasySpecError if a file of a checkpoint is a link that leads out of the directory, or is no file at all.

    What is read is also copied by `convert`, and a pipe would never end. The hub's cache keeps a snapshot's files
    beside it, in `blobs`, which may be linked to.
    """
    root = directory.resolve()
    homes = [root] + ([root.parents[1] / "blobs"] if root.parent.name == "snapshots" else [])
    for path in itertools.chain(directory.iterdir(), (directory / WEIGHTS).rglob("*"), (directory / "refit").glob("*")):
        if path.is_symlink() and not any(path.resolve().is_relative_to(home) for home in homes):
            raise EasySpecError(f"{path} is a link that leads out of the checkpoint directory; put the file there")
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise EasySpecError(f"{path} is no ordinary file; remove it from the checkpoint directory")


def sizes(config: ModelConfig) -> dict[str, int]:
    """What the sizes in a family's table stand for."""
    return {
        "hidden": config.hidden_size,
        "inner": config.intermediate_size,
        "queries": config.num_attention_heads * config.head_dim,
        "keys": config.num_key_value_heads * config.head_dim,
        "vocab": config.vocab_size,
        "head_dim": config.head_dim,
    }


def tensors(config: ModelConfig) -> Iterator[tuple[str, int, Tensor]]:
    """Name, layer and row of the family's table of every canonical tensor of a model, layer by layer."""
    table = [tensor for tensor in FAMILIES[config.model_type].tensors
             if tensor.name != HEAD or not config.tie_word_embeddings]  # fmt: skip
    yield from ((tensor.name, 0, tensor) for tensor in table if "{}" not in tensor.name)
    for layer in range(config.num_hidden_layers):
        yield from ((tensor.name.format(layer), layer, tensor) for tensor in table if "{}" in tensor.name)


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every canonical tensor of a model, an untied head included."""
    size = sizes(config)
    return {name: tuple(size[dim] for dim in tensor.shape) for name, _, tensor in tensors(config)}


@dataclass(frozen=True)
class Place:
    """Where others keep a canonical tensor: from a row of one of theirs.

    unit: rows of a head, where they are stored as pairs of channels; otherwise 1.
    """

    name: str
    start: int
    unit: int = 1


def places(config: ModelConfig, scheme: Scheme) -> dict[str, Place]:
    """The Place of every canonical tensor."""
    size, found = sizes(config), {}
    for name, layer, tensor in tensors(config):
        stored = tensor.gguf if scheme == "gguf" else tensor.hf or tensor.name
        unit = config.head_dim if scheme == "gguf" and tensor.pairs else 1
        found[name] = Place(stored.format(layer), sum(size[dim] for dim in tensor.after), unit)
    return found


def stored_shapes(config: ModelConfig, scheme: Scheme) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a model as others keep them."""
    expected, shapes = expected_shapes(config), dict[str, tuple[int, ...]]()
    for name, place in places(config, scheme).items():
        rows, *rest = expected[name]
        before = shapes.get(place.name, (0,))[0]
        shapes[place.name] = (max(before, place.start + rows), *rest)
    return shapes


def canonical(config: ModelConfig, source: StoredSource, scheme: Scheme, origin: str) -> StoredSource:
    """The canonical tensors of a source that keeps them as others do.

    Raises EasySpecError if those are not the ones that the configuration asks for.
    """
    check_tensors(config, source, origin, scheme)
    return CanonicalSource(source, places(config, scheme), expected_shapes(config))


@dataclass(frozen=True)
class CanonicalSource:
    """Canonical tensors out of a source that names, joins and permutes them as a family's table says."""

    stored: StoredSource
    places: Mapping[str, Place]
    expected: Mapping[str, tuple[int, ...]]

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self.expected

    def dtypes(self) -> Mapping[str, str]:
        dtypes = self.stored.dtypes()
        return {name: dtypes[place.name] for name, place in self.places.items()}

    def read(self, name: str, window: Window = ()) -> np.ndarray:
        place = self.places[name]
        rows = window[0] if window else slice(0, self.expected[name][0])
        # Whole heads, where a row's place depends on the head's others.
        first, last = rows.start // place.unit * place.unit, -(-rows.stop // place.unit) * place.unit
        values = self.stored.read(place.name, (slice(place.start + first, place.start + last), *window[1:]))
        if place.unit > 1:
            values = unpermute(values, place.unit)
        return values[rows.start - first : rows.stop - first]


def unpermute(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Puts [heads * head_dim, ...] rows from llama.cpp's order (pairs side by side) into Hugging Face's (by halves)."""
    pairs = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def check_tensors(config: ModelConfig, source: StoredSource, origin: str, scheme: Scheme | None = None) -> None:
    """Raises one EasySpecError that counts every missing, unknown, misshapen and mistyped tensor, and names a few.

    scheme: how the source names its tensors; None is canonically.
    """
    expected = expected_shapes(config) if scheme is None else stored_shapes(config, scheme)
    dtypes, head = source.dtypes(), "output.weight" if scheme == "gguf" else HEAD
    present = {name: shape for name, shape in source.shapes().items() if not name.endswith(_DERIVED)}
    if config.tie_word_embeddings:
        present.pop(head, None)  # a duplicate of the embedding
    both = [name for name in expected if name in present]
    kinds = (
        [f"{name} is missing" for name in expected if name not in present],
        [f"{name} is unknown" for name in present if name not in expected],
        [f"{name} has shape {present[name]} instead of {expected[name]}" for name in both
         if present[name] != expected[name]],
        [f"{name} is stored as {dtypes[name]}, which is not supported" for name in both
         if dtypes[name] not in _STORED_DTYPES],
    )  # fmt: skip
    if any(kinds):
        listed = [fault for faults in kinds for fault in (*faults[:3], *_more(len(faults) - 3))]
        raise EasySpecError(f"{origin}: tensors do not match the configuration: {'; '.join(listed)}")


def _more(count: int) -> tuple[str, ...]:
    return (f"and {count} more",) if count > 0 else ()


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
