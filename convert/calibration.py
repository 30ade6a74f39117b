"""Calibration of int4: a text is read and cut, and what does not fit is refused at once."""

import hashlib
from functools import partial
from itertools import takewhile
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from jaxtyping import Int

from convert.models import Calibration, Model
from easyspec_jax.checkpoint.config import ModelConfig, model_config
from easyspec_jax.checkpoint.quantized import is_matrix
from easyspec_jax.checkpoint.tensors import TensorSource
from easyspec_jax.errors import EasySpecError
from easyspec_jax.progress import bar
from easyspec_jax.tokenizer import encode, load_tokenizer

TOKENS = 16384
"""Tokens to calibrate on by default."""

LEAST_TOKENS = 2048
"""Fewest tokens to calibrate on: from fewer, outputs are not known well enough."""

LENGTH = 512
"""Tokens of a text, where the model takes as many."""

CHARACTERS_A_TOKEN = 64
"""Most characters of the file that are read for each token; more is not in memory."""

_BASE = 1 << 30  # bytes for the interpreter, the libraries and compiled programs
_SQUARES = 8  # float64 arrays [inputs, inputs] at once, at most
_COPIES = 10  # float32 arrays as large as the largest matrix
_LAYERS = 3  # copies of a layer's weights in float32
_BATCH = 8 * LENGTH  # tokens that go through a layer together


def calibration_on(text: Path, tokens: int, model: Model, group: int, memory: int) -> Calibration:
    """Prepare the calibration of a model on a text.

    Args:
        text: The file, in UTF-8.
        tokens: Tokens of it to use at most.
        model: The model.
        group: The most columns that share a scale.
        memory: Bytes that the process may take.

    Raises:
        EasySpecError: The file cannot be read or is too short, or the model is a mixture of
            experts, is int4 already, has no tokenizer, or needs more memory.
    """
    config = model_config(model.config | {"dtype": "float32"}, origin=model.origin)
    if config.mixture is not None:
        raise EasySpecError(
            f"{model.origin} is a mixture of experts, which cannot be calibrated; "
            "leave out `calibration`"
        )
    if _has_int4_layers(model.source):
        raise EasySpecError(f"{model.origin} has layers of int4 already; leave out `calibration`")
    if not model.has_tokenizer:
        raise EasySpecError(f"{model.origin} has no tokenizer, which `calibration` needs")
    needed = memory_needed(config, tokens)
    if needed > memory:
        raise EasySpecError(
            f"{model.origin}: `calibration` needs more memory; "
            f"give `memory` of at least {needed} bytes"
        )
    texts = read_texts(text, tokens, model, config)
    digest = hashlib.sha256(texts.tobytes()).hexdigest()
    run = partial(_calibrated, model.source, config, texts, group)
    return Calibration(digest, space_needed(config, texts.size), run)


def _has_int4_layers(source: TensorSource) -> bool:
    """Return whether there is nothing to round in any layer."""
    dtypes = source.dtypes()
    return all(
        dtypes[name] == "int4"
        for name, shape in source.shapes().items()
        if ".layers." in name and is_matrix(name, shape)
    )


def read_texts(
    path: Path, tokens: int, model: Model, config: ModelConfig
) -> Int[np.ndarray, "texts length"]:
    """Cut a file into texts of LENGTH tokens, or of as many as the model takes.

    Args:
        path: The file, in UTF-8.
        tokens: Tokens to use at most.
        model: The model, which has a tokenizer.
        config: Its configuration.

    Raises:
        EasySpecError: The file cannot be read, has fewer than LEAST_TOKENS, or has some that the
            model lacks.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            content = file.read(CHARACTERS_A_TOKEN * tokens)
    except (OSError, UnicodeDecodeError) as error:
        raise EasySpecError(f"`calibration` {path} cannot be read: {error}") from None
    with TemporaryDirectory() as directory:
        model.write_companions(Path(directory))
        tokenizer = load_tokenizer(Path(directory))
    ids = encode(tokenizer, content)[:tokens] if content else []
    if len(ids) < LEAST_TOKENS:
        raise EasySpecError(
            f"`calibration` {path} holds {len(ids)} tokens; give at least {LEAST_TOKENS}"
        )
    if max(ids) >= config.vocab_size:
        raise EasySpecError(
            f"the tokenizer gives id {max(ids)}, for which {model.origin} has no embedding"
        )
    # What the tokenizer puts first goes first in every text: models rely on it.
    first = list(takewhile(lambda number: number in tokenizer.all_special_ids, ids))
    body = ids[len(first) :]
    length = min(LENGTH, config.max_position_embeddings) - len(first)
    # What is left over at the end is too short for a text.
    starts = range(0, len(body) - length + 1, length)
    return np.asarray([first + body[start : start + length] for start in starts], np.int32)


def memory_needed(config: ModelConfig, tokens: int) -> int:
    """Return the bytes that calibrating a model takes at most."""
    hidden, inner = config.hidden_size, config.intermediate_size
    heads = config.num_attention_heads * config.head_dim
    inputs, largest = max(hidden, inner, heads), hidden * max(inner, heads)
    layer = hidden * (3 * inner + 4 * heads)
    # Embeddings of all texts, and what a layer makes of a batch of them.
    texts = tokens * hidden + _BATCH * (4 * hidden + 4 * inner)
    floats = _COPIES * largest + _LAYERS * layer + texts
    return _BASE + _SQUARES * 8 * inputs**2 + 4 * floats


def space_needed(config: ModelConfig, tokens: int) -> int:
    """Return the bytes of files that calibrating a model writes at most."""
    hidden, inner = config.hidden_size, config.intermediate_size
    heads = config.num_attention_heads * config.head_dim
    # A byte a number of every layer; and hidden states before and behind one, in float32.
    layers = config.num_hidden_layers * hidden * (3 * inner + 4 * heads)
    return layers + 2 * 4 * tokens * (hidden + max(inner, heads, hidden))


def _calibrated(
    source: TensorSource,
    config: ModelConfig,
    texts: Int[np.ndarray, "texts length"],
    group: int,
    directory: Path,
) -> TensorSource:
    """Calibrate; JAX and the model are imported only here, as other conversions need neither."""
    from easyspec_jax.calibrate.calibrating import calibrate

    return calibrate(source, config, texts, group, directory, bar)
