"""Reading and writing checkpoints: an Orbax directory of our own, or a Hugging Face directory as it is.

Canonical tensors carry Hugging Face's Llama names and layouts (linear weights are [out, in]); every other naming is
translated by `convert` once. Nothing is ever unpickled.
"""

import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import ml_dtypes  # noqa: F401  (teaches NumPy, and so safetensors, bfloat16)
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from easyspec_jax.config import ModelConfig, read_json, read_model_config
from easyspec_jax.errors import EasySpecError, first_line

WEIGHTS = "weights"
"""Name of the Orbax checkpoint inside a directory of ours."""

SAFETENSORS = "model.safetensors"
"""Name of the weights inside a Hugging Face directory, where they are one file."""

EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"

# Buffers that older exports kept beside the weights; they follow from the configuration.
_DERIVED = ("rotary_emb.inv_freq", "attn.masked_bias", "attn.bias")


class TensorSource(Protocol):
    """Canonical tensors by name, read one at a time."""

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of every tensor, without reading any."""
        ...

    def read(self, name: str) -> np.ndarray:
        """One tensor in host memory, in its stored dtype."""
        ...


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint directory, its tensors checked against its configuration but not yet read."""

    directory: Path
    config: ModelConfig
    source: TensorSource


def open_checkpoint(directory: Path | str) -> Checkpoint:
    """Opens a converted (Orbax) or a Hugging Face (safetensors) directory.

    Raises EasySpecError if it is neither, is damaged, or holds other tensors than its configuration asks for.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise EasySpecError(f"{directory} is no directory; expected a converted or a Hugging Face checkpoint")
    config = read_model_config(directory)
    source = OrbaxSource(directory / WEIGHTS) if (directory / WEIGHTS).is_dir() else SafetensorsSource(directory)
    check_tensors(config, source.shapes(), origin=str(directory))
    return Checkpoint(directory, config, source)


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every canonical tensor of a model, an untied head included."""
    hidden, inner = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, hidden), FINAL_NORM: (hidden,)}
    if not config.tie_word_embeddings:
        shapes[HEAD] = (config.vocab_size, hidden)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        for projection, size in (("q", queries), ("k", keys), ("v", keys)):
            shapes[f"{prefix}self_attn.{projection}_proj.weight"] = (size, hidden)
            if config.qkv_bias:
                shapes[f"{prefix}self_attn.{projection}_proj.bias"] = (size,)
        if config.qk_norm:
            shapes |= {f"{prefix}self_attn.{name}_norm.weight": (config.head_dim,) for name in "qk"}
        shapes[f"{prefix}self_attn.o_proj.weight"] = (hidden, queries)
        shapes[f"{prefix}mlp.gate_proj.weight"] = (inner, hidden)
        shapes[f"{prefix}mlp.up_proj.weight"] = (inner, hidden)
        shapes[f"{prefix}mlp.down_proj.weight"] = (hidden, inner)
        shapes[f"{prefix}input_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}post_attention_layernorm.weight"] = (hidden,)
    return shapes


def check_tensors(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]], origin: str) -> None:
    """Raises one EasySpecError that lists every missing, unknown and misshapen tensor (the first few by name)."""
    expected = expected_shapes(config)
    present = {name: shape for name, shape in shapes.items() if not name.endswith(_DERIVED)}
    if config.tie_word_embeddings:
        present.pop(HEAD, None)  # a duplicate of the embedding
    faults = [f"{name} is missing" for name in expected if name not in present]
    faults += [f"{name} is unknown" for name in present if name not in expected]
    faults += [
        f"{name} has shape {present[name]} instead of {shape}"
        for name, shape in expected.items()
        if name in present and present[name] != shape
    ]
    if faults:
        more = f" (and {len(faults) - 3} more)" if len(faults) > 3 else ""
        raise EasySpecError(f"{origin}: tensors do not match the configuration: {'; '.join(faults[:3])}{more}")


class SafetensorsSource:
    """Tensors of a Hugging Face directory: `model.safetensors`, or shards listed by an index.

    Raises EasySpecError on construction for a missing, truncated or malformed shard.
    """

    def __init__(self, directory: Path) -> None:
        self._files: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for path, listed in _shards(directory):
            for name, shape in _header(path).items():
                if listed is None or name in listed:
                    self._files[name], self._shapes[name] = path, shape
            absent = sorted(set(listed or ()) - self._files.keys())
            if absent:
                raise EasySpecError(f"{path} does not hold {absent[0]}, which the index places there; fetch it again")

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def read(self, name: str) -> np.ndarray:
        path = self._files[name]
        try:
            with safe_open(path, framework="numpy") as file:
                return file.get_tensor(name)
        except (AttributeError, TypeError, SafetensorError) as error:  # what NumPy lacks fails in either way
            raise EasySpecError(f"{path}: {name} is stored in a type that is not supported ({error})") from None


def _shards(directory: Path) -> Iterator[tuple[Path, set[str] | None]]:
    """Each safetensors file with the tensors the index places in it (None: all it holds)."""
    index = directory / "model.safetensors.index.json"
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise EasySpecError(f"{index} has no weight_map from tensor names to files")
        for file in sorted(set(weight_map.values())):
            if Path(file).name != file:
                raise EasySpecError(f"{index}: {file!r} leads out of the checkpoint directory")
            yield directory / file, {name for name, place in weight_map.items() if place == file}
    elif (directory / SAFETENSORS).exists():
        yield directory / SAFETENSORS, None
    else:
        raise EasySpecError(
            f"{directory} holds no weights; expected {SAFETENSORS}, model.safetensors.index.json "
            f"or a converted checkpoint ({WEIGHTS}/)"
        )


def _header(path: Path) -> dict[str, tuple[int, ...]]:
    if not path.exists():
        raise EasySpecError(f"{path} is missing; fetch the whole checkpoint again")
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, struct.error) as error:
        raise EasySpecError(f"{path} is truncated or damaged ({error}); fetch it again") from None


class OrbaxSource:
    """Tensors of a checkpoint that `convert` wrote.

    Reads Orbax's storage (zarr arrays in an OCDBT store) through tensorstore: a restore per tensor costs fifteen
    times as much, a restore of all at once needs the whole model in host memory, and Orbax answers a damaged store
    with stack traces from its event loop.
    """

    def __init__(self, directory: Path) -> None:
        import tensorstore

        self._directory = directory
        store = {"driver": "ocdbt", "base": directory.resolve().as_uri() + "/"}
        try:
            metadata = read_json(directory / "_METADATA")
            driver = "zarr3" if metadata["use_zarr3"] else "zarr"
            leaves = metadata["tree_metadata"].values()
            names = [".".join(key["key"] for key in leaf["key_metadata"]) for leaf in leaves]
            opening = {
                name: tensorstore.open({"driver": driver, "kvstore": store | {"path": f"{name}/"}}, open=True)
                for name in names
            }
            self._arrays = {name: future.result() for name, future in opening.items()}
        except Exception as error:  # whatever the layers of the store raise
            raise _unreadable(directory, error) from None

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tuple(array.shape) for name, array in self._arrays.items()}

    def read(self, name: str) -> np.ndarray:
        try:
            return self._arrays[name].read().result()
        except ValueError as error:
            raise _unreadable(self._directory, error) from None


def _unreadable(directory: Path, error: Exception) -> EasySpecError:
    reason = first_line(error).partition(" [tensorstore_spec")[0]
    return EasySpecError(f"{directory} is no readable Orbax checkpoint ({reason}); convert again")


def write_orbax(directory: Path, tensors: Iterable[tuple[str, np.ndarray]]) -> None:
    """Writes canonical tensors as an Orbax checkpoint at a path that must not exist.

    Raises EasySpecError if the place cannot hold them.
    """
    import orbax.checkpoint as ocp

    values = dict(tensors)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(directory.resolve(), values)
            checkpointer.wait_until_finished()
    except (OSError, ValueError) as error:  # a full disk is either, by the storage layer that meets it
        raise EasySpecError(f"{directory.parent} cannot be written: {first_line(error)}") from None


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


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A directory that appears under its name only when the block ends without an error.

    Raises EasySpecError if the path exists or its parent cannot be written.
    """
    if path.exists():
        raise EasySpecError(f"{path} exists already; choose another --out or remove it")
    temporary = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
    except OSError as error:
        raise EasySpecError(f"{path.parent} cannot be written: {error.strerror}") from None
    try:
        yield temporary
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
