"""Opens a directory for conversion: a Hugging Face checkpoint, or one of ours."""

import shutil
from pathlib import Path

from convert.stream import Model
from easyspec_jax.checkpoint import open_checkpoint
from easyspec_jax.config import read_json
from easyspec_jax.families import EMBEDDING

COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
)
"""Patterns of the files that keep their name and contents."""

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


def open_huggingface(directory: Path) -> Model:
    """A directory with `config.json` and safetensors, or a converted one.

    Raises EasySpecError if it is damaged or unsupported.
    """
    source = open_checkpoint(directory).source
    return Model(
        origin=str(directory),
        config=read_json(directory / "config.json"),
        source=source,
        dtype=source.dtypes()[EMBEDDING],
        files=tuple(path for path in directory.rglob("*") if path.is_file()),
        has_tokenizer=any(path.name in _TOKENIZERS for path in directory.iterdir()),
        write_companions=lambda out: _copy_companions(directory, out),
    )


def _copy_companions(directory: Path, out: Path) -> None:
    for pattern in COMPANIONS:
        for path in filter(Path.is_file, directory.glob(pattern)):
            shutil.copyfile(path, out / path.name)
