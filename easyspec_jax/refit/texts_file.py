"""Generated texts, kept on disk so that a refit of another size is fitted on the same ones.

A target takes minutes to answer the prompts, and its answers depend on nothing that differs between
refits of one draft.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int

from easyspec_jax.engine.engine import Engine
from easyspec_jax.options import SamplingParams
from easyspec_jax.refit.kept import read_kept, write_kept
from easyspec_jax.refit.texts import LENGTH

TEXTS = "texts.json"
"""Name of the file, which lies next to the refits."""

_TEXTS = "texts"


def texts_key(
    writer: Engine,
    starts: Sequence[Sequence[int]],
    stop_ids: Sequence[int],
    count: int,
    sampling: SamplingParams,
    vocabulary: int,
) -> str:
    """Hash everything that generated texts depend on: 64 hexadecimal digits.

    Args:
        writer: The model, opened by itself. The whole checkpoint is read once.
        starts: Token ids to continue: the prompts, or what a text without one begins with.
        stop_ids: Ids that end its answers.
        count: Most texts.
        sampling: Temperature and seed.
        vocabulary: Number of ids that may be in a text.
    """
    model = writer.target
    types = writer.dtype, writer.weights, writer.kv_dtype
    ends = tuple(stop_ids), writer.max_length, LENGTH
    parts = model.fingerprint, types, ends, [*map(list, starts)], count, sampling, vocabulary
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def read_written(path: Path, key: str) -> Int[np.ndarray, "texts tokens"] | None:
    """Read the texts written under a key.

    Args:
        path: The file.
        key: The result of `texts_key`.

    Returns:
        Token ids, int32 [texts, LENGTH]; None without such a file.
    """
    try:
        texts = np.array(read_kept(path, key, _TEXTS), np.int32)
    except (ValueError, TypeError, OverflowError):
        return None
    return texts if texts.ndim == 2 and texts.shape[1] == LENGTH else None


def keep_written(path: Path, key: str, texts: Int[np.ndarray, "texts tokens"]) -> None:
    """Write texts and their key, whole or not at all.

    Raises:
        EasySpecError: The file cannot be written.
    """
    write_kept(path, key, _TEXTS, texts.tolist())
