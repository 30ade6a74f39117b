"""Model configurations by name or from a file, enough to plan without weights."""

from functools import cache
from math import prod
from pathlib import Path

from easyspec_jax.checkpoint.canonical import expected_shapes
from easyspec_jax.checkpoint.config import ModelConfig, model_config, read_json, read_model_config
from easyspec_jax.errors import EasySpecError

BUNDLED = Path(__file__).with_name("configurations.json")
"""What the publishers' `config.json` and `generation_config.json` say of each model's shape, by name."""

PADDING = 0.01
"""Vocabularies of one tokenizer differ by less than this share: rows that round the embedding up."""


@cache
def bundled() -> dict[str, ModelConfig]:
    """The configurations that come with the package."""
    return {
        name: model_config(config, config, origin=name)
        for name, config in read_json(BUNDLED).items()
    }


def find_config(text: str, flag: str) -> tuple[str, ModelConfig]:
    """Name and configuration of a bundled model, a `config.json` or a checkpoint directory.

    A bundled name may be spelled as on the Hugging Face hub. Raises EasySpecError, naming the flag, for anything else.
    """
    wanted = text.rpartition("/")[2].lower().removesuffix("-instruct")
    for name, config in bundled().items():
        if name.lower() == wanted and not Path(text).exists():
            return name, config
    path = Path(text)
    if path.is_dir():
        return path.resolve().name, read_model_config(path)
    if path.is_file():
        return path.stem, model_config(read_json(path), origin=text)
    raise EasySpecError(
        f"{flag} {text!r} is no file, no directory and none of the bundled models: {', '.join(bundled())}"
    )


def check_pair(target: ModelConfig, draft: ModelConfig) -> None:
    """Raises EasySpecError where the two cannot share token ids. Whether they do, only their tokenizers could tell."""
    sizes = sorted((target.vocab_size, draft.vocab_size))
    if sizes[1] - sizes[0] > PADDING * sizes[1]:
        raise EasySpecError(
            f"the target has {target.vocab_size} embedding rows and the draft {draft.vocab_size}: "
            "they cannot share token ids; choose a draft of the target's family"
        )


def parameter_count(config: ModelConfig) -> int:
    """Count the parameters of a checkpoint, a tied head once."""
    return sum(prod(shape) for shape in expected_shapes(config).values())
