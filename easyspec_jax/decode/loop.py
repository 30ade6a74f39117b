"""The host's side of decoding: dispatch one round ahead, hand out reports."""

from collections.abc import Generator, Sequence
from functools import partial

import jax
import numpy as np

from easyspec_jax.decode.growth import CacheGrowth
from easyspec_jax.decode.programs import PREFILL_CHUNK, Programs
from easyspec_jax.decode.round import Report, State
from easyspec_jax.options import SamplingParams


def decode(
    programs: Programs,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    sampling: SamplingParams,
) -> Generator[Report]:
    """Generates up to limits[i] tokens after prompts[i] (token ids, none empty).

    Yields a Report of NumPy arrays for the prefill and for each round, until every row is done. The next round is
    dispatched before a report is read, so the devices never wait for the host.
    """
    growth = CacheGrowth(programs, len(prompts))
    for row, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
        growth.enter(row, len(prompt), limit)
    growth.capacity = growth.needed()
    state = programs.start(sampling, limits, growth.capacity)
    try:
        state, chunks = prefill_all(programs, state, prompts)
        state, report = programs.round(state)
        now = first_tokens(chunks)
        yield now
        while not now.done.all():
            growth.read(now.num_tokens)
            state = growth.grow_if_needed(state)
            state, ahead = programs.round(state)
            now, report = jax.device_get(report), ahead
            yield now
    finally:
        settle(state)


def settle(state: State) -> None:
    """Waits for the devices: two programs with collectives at once could starve each other of the CPU's threads."""
    if not state.length.is_deleted():  # as it is if Ctrl-C came between a call and its result
        jax.block_until_ready(state.length)


def warm_up(programs: Programs, capacities: Sequence[int], rows: int = 1) -> None:
    """Compile what decode() uses for rows whose caches grow like this, by decoding rows that are finished."""
    state = programs.start(SamplingParams(), [0] * rows, capacities[0])
    state, _ = prefill_all(programs, state, [[0]] * rows)
    state, _ = programs.round(state)
    for capacity in capacities[1:]:
        state, _ = programs.round(programs.extend(state, capacity))
    jax.block_until_ready(state.length)


Chunk = tuple[np.ndarray, Report]
"""Which rows' prompts end with a chunk, bool [batch], and what its prefill reported."""


def prefill_all(
    programs: Programs, state: State, prompts: Sequence[Sequence[int]]
) -> tuple[State, list[Chunk]]:
    """The state after all prompts, and what first_tokens needs."""
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
    """Each row's report from the chunk its prompt ended with, as NumPy arrays."""
    (_, merged), *others = jax.device_get(chunks)
    for last, report in others:
        merged = jax.tree.map(partial(_choose_rows, last), report, merged)
    return merged


def _choose_rows(rows: np.ndarray, new: np.ndarray, old: np.ndarray) -> np.ndarray:
    return np.where(rows.reshape(-1, *[1] * (new.ndim - 1)), new, old)
