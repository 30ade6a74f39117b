"""Opening a directory for conversion: a Hugging Face checkpoint or a converted one."""

import shutil
from collections.abc import Iterator
from pathlib import Path

from convert.models import Model
from easyspec_jax.checkpoint.config import read_json
from easyspec_jax.checkpoint.directory import Checkpoint, open_checkpoint
from easyspec_jax.checkpoint.families import EMBEDDING
from easyspec_jax.checkpoint.orbax import WEIGHTS
from easyspec_jax.checkpoint.rounding import INTEGERS
from easyspec_jax.options import FLOAT_DTYPES
from easyspec_jax.tokenizer import load_tokenizer

COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "additional_chat_templates/*.jinja",
)
"""Patterns of the files that are copied unchanged."""

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


def open_huggingface(directory: Path, allow_links: bool = False) -> Model:
    """Open a directory with `config.json` and safetensors, or a converted one.

    Args:
        directory: The checkpoint.
        allow_links: Follow links that point outside the directory.

    Raises:
        EasySpecError: The directory or its tokenizer is damaged or not supported.
    """
    opened = open_checkpoint(directory, allow_links=allow_links)
    config = read_json(directory / "config.json")
    # This names files of the source directory; the output has others.
    config.pop("transformers_weights", None)
    # The output says itself how its matrices are quantized.
    config.pop("quantization_config", None)
    config.pop("compression_config", None)
    # The output must say that it is untied if the source stores a head that differs.
    if opened.config.tie_word_embeddings != bool(config.get("tie_word_embeddings", False)):
        config["tie_word_embeddings"] = opened.config.tie_word_embeddings
    has_tokenizer = any(path.name in _TOKENIZERS for path in directory.iterdir())
    if has_tokenizer:
        load_tokenizer(directory)  # a broken one is refused before the weights are converted
    return Model(
        origin=str(directory),
        config=config,
        source=opened.source,
        dtype=_float_dtype(opened),
        files=tuple(_files(directory)),
        has_tokenizer=has_tokenizer,
        write_companions=lambda out: _copy_companions(directory, out),
    )


def _files(directory: Path) -> Iterator[Path]:
    """Return the files that make up a checkpoint, and not what else its directory may hold."""
    for pattern in ("*.json", "*.safetensors", f"{WEIGHTS}/**/*", *COMPANIONS):
        yield from filter(Path.is_file, directory.glob(pattern))


def _float_dtype(opened: Checkpoint) -> str:
    """Return the embedding's dtype, or the one that its configuration names if it is quantized."""
    stored = opened.source.dtypes()[EMBEDDING]
    if stored not in INTEGERS:
        return stored
    return opened.config.dtype if opened.config.dtype in FLOAT_DTYPES else "bfloat16"


def _copy_companions(directory: Path, out: Path) -> None:
    for pattern in COMPANIONS:
        for path in filter(Path.is_file, directory.glob(pattern)):
            copy = out / path.relative_to(directory)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)
