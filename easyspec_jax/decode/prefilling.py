"""Prefill of a whole batch: all prompts at once, chunk by chunk."""

from collections.abc import Sequence
from functools import partial

import jax
import numpy as np

from easyspec_jax.decode.programs import Part, Programs
from easyspec_jax.decode.state import Report, State
from easyspec_jax.progress import Bar, no_bar

FEW = 4
"""Chunks that are prefilled without a progress bar."""

Chunk = tuple[np.ndarray, Report]
"""For a chunk of all prompts: whose prompts end with it, bool [batch], and its prefill's report."""


def prefill_all(
    programs: Programs,
    state: State,
    prompts: Sequence[Sequence[int]],
    bar: Bar = no_bar,
    starts: Sequence[int] | None = None,
) -> tuple[State, list[Chunk]]:
    """Run prefill_target() and prefill_draft(); arguments as for the former.

    Returns:
        The state after all prompts, and the chunks that first_tokens() needs.
    """
    state, chunks, parts = prefill_target(programs, state, prompts, bar, starts)
    return prefill_draft(programs, state, parts), chunks


def prefill_target(
    programs: Programs,
    state: State,
    prompts: Sequence[Sequence[int]],
    bar: Bar = no_bar,
    starts: Sequence[int] | None = None,
) -> tuple[State, list[Chunk], list[Part]]:
    """Run the target's prefill over all prompts, chunk by chunk.

    First tokens need nothing else.

    Args:
        programs: Compiled steps.
        state: Rows that hold no text yet, or the first tokens of their prompts.
        prompts: Token ids of each prompt, none empty.
        bar: Shows the progress of long prompts.
        starts: First token to prefill in each row; by default 0. Rows of shorter prompts are never
            prefilled, so these must be finished from the start.

    Returns:
        The state; the chunks that first_tokens() needs; and what the draft has to read before it
        can draft.
    """
    # Prompts of 150 and 20 tokens may take chunks of 128 and 32, with counts [128, 20] and [22, 0],
    # and last [False, True] and [True, False].
    begun = np.asarray(starts or [0] * len(prompts))
    left = np.asarray([len(prompt) for prompt in prompts]) - begun
    room = state.capacity - int(begun.max())
    sizes, done = programs.sizes.chunks(int(left.max()), room, len(prompts)), 0
    chunks: list[Chunk] = []
    parts: list[Part] = []
    shown = bar if len(sizes) > FEW else no_bar
    with shown("Reading the prompt", sum(sizes)) as advance:
        for size in sizes:
            count = np.clip(left - done, 0, size).astype(np.int32)
            tokens = np.zeros((len(prompts), programs.columns(size)), np.int32)
            for row, prompt in enumerate(prompts):
                start = begun[row] + done
                part = prompt[start : start + tokens.shape[1]]
                tokens[row, : len(part)] = part
            last = (count > 0) & (left <= done + size)
            state, report = programs.prefill(state, tokens, count, last)
            if shown is not no_bar and chunks:
                # Calls return at once. A bar waits for the chunk before, so that the devices always
                # have one to work on.
                jax.block_until_ready(chunks[-1][1])
                advance(sizes[len(chunks) - 1])
            chunks.append((last, report))
            parts.append(Part(tokens[:, :size], begun + done, count))
            done += size
    return state, chunks, parts


def prefill_draft(programs: Programs, state: State, parts: Sequence[Part]) -> State:
    """Let the draft read all prompts, if there is a draft.

    Args:
        programs: Compiled steps.
        state: The state; donated.
        parts: What prefill_target() returned.
    """
    if programs.draft is not None:
        for part in parts:
            state = programs.prefill_draft(state, part.tokens, part.num_tokens)
    return state


def first_tokens(chunks: list[Chunk]) -> Report:
    """Merge prefill reports: take each row from the chunk its prompt ended with.

    Args:
        chunks: Those of prefill_target().

    Returns:
        A Report of NumPy arrays.
    """
    read: list[Chunk] = jax.device_get(chunks)
    # Each chunk's log-probabilities of the prompt are about other tokens of it: all are kept.
    parts = [report.prompt for _, report in read if report.prompt is not None]
    (_, merged), *others = [(last, report._replace(prompt=None)) for last, report in read]
    for last, report in others:
        merged = jax.tree.map(partial(_choose_rows, last), report, merged)
    return merged._replace(prompt=sum(parts, ()) if parts else None)


def _choose_rows(rows: np.ndarray, new: np.ndarray, old: np.ndarray) -> np.ndarray:
    """Take some rows from new, the others from old; arrays are [batch, ...]."""
    return np.where(rows.reshape(-1, *[1] * (new.ndim - 1)), new, old)
