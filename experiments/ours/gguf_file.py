"""Write a checkpoint as GGUF in float32, so that llama.cpp decodes with the same weights."""

from pathlib import Path

import numpy as np
from gguf import GGUFValueType, GGUFWriter

from convert.gguf_fields import OPTIONAL_FIELDS, REQUIRED_FIELDS, ROPE_FACTORS
from easyspec_jax.checkpoint.canonical import places
from easyspec_jax.checkpoint.config import ModelConfig
from easyspec_jax.checkpoint.directory import Checkpoint
from easyspec_jax.checkpoint.families import FAMILIES
from easyspec_jax.checkpoint.rope import plain_frequencies


def write_gguf(checkpoint: Checkpoint, path: Path) -> None:
    """Write the whole model without its tokenizer, for readers that are given token ids.

    All tensors are in memory at once.
    """
    config = checkpoint.config
    architecture = FAMILIES[config.model_type].gguf or "llama"  # Mistral's files say so too
    writer = GGUFWriter(path, architecture)
    for key, value in _metadata(config).items():
        kind = GGUFValueType.UINT32 if isinstance(value, int) else GGUFValueType.FLOAT32
        writer.add_key_value(f"{architecture}.{key}", value, kind)
    writer.add_string("tokenizer.ggml.model", "no_vocab")
    for name, place in places(config, "gguf").items():
        values = np.asarray(checkpoint.source.read(name), np.float32)
        if place.unit > 1:
            values = permute(values, place.unit)
        writer.add_tensor(place.name, np.ascontiguousarray(values))
    rope = config.layers[0].rope
    if rope.scaling is not None:
        factors = plain_frequencies(rope.theta, rope.dim) / rope.frequencies()
        writer.add_tensor(ROPE_FACTORS, factors.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def permute(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Reorder rows [heads * head_dim, ...] from Hugging Face's order to llama.cpp's.

    Hugging Face stores a head by halves, llama.cpp as pairs side by side.
    """
    halves = rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def _metadata(config: ModelConfig) -> dict[str, int | float]:
    """Return the fields without the architecture in front of their names."""
    fields = {
        key: getattr(config, field)
        for field, key in (REQUIRED_FIELDS | OPTIONAL_FIELDS).items()
        if getattr(config, field, None) is not None
    }
    return fields | {
        "attention.value_length": config.head_dim,
        "rope.dimension_count": config.layers[0].rope.dim,
        "rope.freq_base": config.layers[0].rope.theta,
        "vocab_size": config.vocab_size,
    }
