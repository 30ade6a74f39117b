"""Model configurations by name or from a file, enough to plan without weights."""

from functools import cache
from math import prod
from pathlib import Path

from easyspec_jax.checkpoint.canonical import expected_shapes
from easyspec_jax.checkpoint.config import ModelConfig, model_config, read_json, read_model_config
from easyspec_jax.errors import EasySpecError

BUNDLED = Path(__file__).with_name("configurations.json")
"""By name, the fields of each publisher's `config.json` and `generation_config.json` that say the
model's shape and stop ids."""

PADDING = 0.01
"""Largest share by which the vocabularies of one tokenizer differ, because embeddings are padded.

Qwen2.5-72B has 152,064 rows and Qwen2.5-0.5B 151,936 for the same ids: a share of 0.0008.
"""


@cache
def bundled() -> dict[str, ModelConfig]:
    """Return the configurations that come with the package, by name."""
    configs = {}
    for name, fields in read_json(BUNDLED).items():
        # One entry has the fields of both of a publisher's files.
        configs[name] = model_config(fields, fields, origin=name)
    return configs


def find_config(text: str | Path, field: str) -> tuple[str, ModelConfig]:
    """Find a configuration by name, file or directory.

    Args:
        text: A bundled name, which may be spelled as on the Hugging Face hub, a `config.json`, or
            a checkpoint directory. A file or directory of this name takes precedence.
        field: The field that an error names.

    Returns:
        The name, for people to read, and the configuration.

    Raises:
        EasySpecError: There is nothing of this name, or it is not a configuration.

    Examples:
        >>> name, config = find_config("meta-llama/Llama-3.2-1B-Instruct", "draft")
        >>> name, config.num_hidden_layers
        ('Llama-3.2-1B', 16)
    """
    text = str(text)
    path = Path(text)
    # "meta-llama/Llama-3.2-1B-Instruct" -> "llama-3.2-1b": fine-tuning does not change the shape.
    wanted = text.rpartition("/")[2].lower().removesuffix("-instruct")
    for name, config in bundled().items():
        if name.lower() == wanted and not path.exists():
            return name, config
    if path.is_dir():
        return path.resolve().name, read_model_config(path)
    if path.is_file():
        return path.stem, model_config(read_json(path), origin=text)
    raise EasySpecError(
        f"`{field}` {text!r} is not a file, a directory or one of the bundled models: "
        f"{', '.join(bundled())}"
    )


def check_pair(target: ModelConfig, draft: ModelConfig) -> None:
    """Check that two models can share token ids. Whether they do, only their tokenizers can tell.

    Raises:
        EasySpecError: Their vocabularies differ by more than PADDING.
    """
    fewer, more = sorted((target.vocab_size, draft.vocab_size))
    if more - fewer > PADDING * more:
        raise EasySpecError(
            f"the target has {target.vocab_size} embedding rows and the draft {draft.vocab_size}: "
            "they cannot share token ids; choose a draft of the target's family"
        )


def parameter_count(config: ModelConfig) -> int:
    """Count the parameters of a checkpoint, a tied head once.

    Examples:
        >>> round(parameter_count(bundled()["Llama-3.1-8B"]) / 1e9, 2)
        8.03
    """
    return sum(prod(shape) for shape in expected_shapes(config).values())
