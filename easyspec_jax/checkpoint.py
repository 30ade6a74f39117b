"""Opening checkpoints: an Orbax directory of our own, or a Hugging Face directory as it is.

Canonical tensors carry Hugging Face's Llama names and layouts (linear weights are [out, in]); every other naming is
translated by `convert` once.
"""

import hashlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from easyspec_jax.config import ModelConfig, read_model_config
from easyspec_jax.errors import EasySpecError, first_line
from easyspec_jax.options import FLOAT_DTYPES
from easyspec_jax.sources import OrbaxSource, SafetensorsSource, StoredSource

WEIGHTS = "weights"
"""Name of the Orbax checkpoint inside a directory of ours."""

EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"

# Buffers that older exports kept beside the weights; they follow from the configuration.
_DERIVED = ("rotary_emb.inv_freq", "attn.masked_bias", "attn.bias")

_STORED_DTYPES = (*FLOAT_DTYPES, "float64")


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

    Raises EasySpecError if it is neither, is damaged, or holds other tensors than its configuration asks for.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise EasySpecError(f"{directory} is no directory; expected a converted or a Hugging Face checkpoint")
    config = read_model_config(directory)
    if (directory / WEIGHTS).is_dir():
        source = OrbaxSource(directory / WEIGHTS)
    else:
        source = SafetensorsSource(directory, frozenset(expected_shapes(config)))
    check_tensors(config, source.shapes(), source.dtypes(), origin=str(directory))
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


def check_tensors(
    config: ModelConfig, shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, str], origin: str
) -> None:
    """Raises one EasySpecError that counts every missing, unknown, misshapen and mistyped tensor, and names a few."""
    expected = expected_shapes(config)
    present = {name: shape for name, shape in shapes.items() if not name.endswith(_DERIVED)}
    if config.tie_word_embeddings:
        present.pop(HEAD, None)  # a duplicate of the embedding
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
