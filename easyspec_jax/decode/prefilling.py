"""Prefill of a whole batch: all prompts at once, chunk by chunk."""

from collections.abc import Sequence
from functools import partial

import jax
import numpy as np

from easyspec_jax.decode.programs import PREFILL_CHUNK, Programs
from easyspec_jax.decode.round import Report, State

Chunk = tuple[np.ndarray, Report]
"""For a chunk of all prompts: whose prompts end with it, bool [batch], and its prefill's report."""


def prefill_all(
    programs: Programs, state: State, prompts: Sequence[Sequence[int]]
) -> tuple[State, list[Chunk]]:
    """Run prefill over all prompts, chunk by chunk.

    Args:
        programs: Compiled steps.
        state: Rows that hold no text yet.
        prompts: Token ids of each prompt, none empty.

    Returns:
        The state after all prompts, and the chunks that first_tokens() needs.
    """
    # Prompts of 150 and 20 tokens take two chunks of 128, with counts [128, 20] and [22, 0], and
    # last [False, True] and [True, False].
    lengths = np.asarray([len(prompt) for prompt in prompts])
    chunks = []
    for start in range(0, int(lengths.max()), PREFILL_CHUNK):
        count = np.clip(lengths - start, 0, PREFILL_CHUNK).astype(np.int32)
        tokens = np.zeros((len(prompts), PREFILL_CHUNK), np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, : count[row]] = prompt[start : start + PREFILL_CHUNK]
        last = (count > 0) & (lengths <= start + PREFILL_CHUNK)
        state, report = programs.prefill(state, tokens, count, last)
        chunks.append((last, report))
    return state, chunks


def first_tokens(chunks: list[Chunk]) -> Report:
    """Merge prefill reports: take each row from the chunk its prompt ended with.

    Args:
        chunks: Chunks of prefill_all().

    Returns:
        A Report of NumPy arrays.
    """
    (_, merged), *others = jax.device_get(chunks)
    for last, report in others:
        merged = jax.tree.map(partial(_choose_rows, last), report, merged)
    return merged


def _choose_rows(rows: np.ndarray, new: np.ndarray, old: np.ndarray) -> np.ndarray:
    """Take some rows from new, the others from old; arrays are [batch] or [batch, tokens]."""
    return np.where(rows.reshape(-1, *[1] * (new.ndim - 1)), new, old)
