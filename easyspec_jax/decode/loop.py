"""The host's side of decoding: dispatch one round ahead, hand out reports.

Calls to compiled steps return before the devices are done. So the host dispatches round n + 1 first
and reads the report of round n while the devices already work on the next:

    devices   | round 1 | round 2 | round 3 |
    host      dispatch 2, read 1, dispatch 3, read 2, ...
"""

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
    """Generate text after several prompts, one per row of a batch.

    Args:
        programs: Compiled steps.
        prompts: Token ids of each prompt, none empty.
        limits: How many tokens to generate after each prompt, at most.
        sampling: Temperature, top-k and top-p. Row i has seed `(sampling.seed + i) % 2**32`.

    Yields:
        A Report of NumPy arrays for the prefill, and one for each round, until every row is done.
    """
    growth = CacheGrowth(programs, len(prompts))
    for row, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
        growth.enter(row, len(prompt), limit)
    growth.capacity = growth.needed()
    state = programs.start(sampling, limits, growth.capacity)
    try:
        state, chunks = prefill_all(programs, state, prompts)
        state, dispatched = programs.round(state)
        report = first_tokens(chunks)
        yield report
        # Here `report` has been read, and `dispatched` is that of the round in progress.
        while not report.done.all():
            growth.read(report.num_tokens)
            state = growth.grow_if_needed(state)
            state, ahead = programs.round(state)
            report, dispatched = jax.device_get(dispatched), ahead
            yield report
    finally:
        settle(state)


def settle(state: State) -> None:
    """Wait for the devices to finish with a state.

    Another program must not start before: on a CPU, two programs with collectives that run at once
    could starve each other of threads.
    """
    # If Ctrl-C came between a call and its result, the state was donated and is gone.
    if not state.length.is_deleted():
        jax.block_until_ready(state.length)


def warm_up(programs: Programs, capacities: Sequence[int], rows: int = 1) -> None:
    """Compile what decode() will use, by running it on rows that are finished from the start.

    Args:
        programs: Compiled steps.
        capacities: Sizes that the caches will have, in order; see Programs.capacities.
        rows: Rows of the batch.
    """
    state = programs.start(SamplingParams(), [0] * rows, capacities[0])
    state, _ = prefill_all(programs, state, [[0]] * rows)
    state, _ = programs.round(state)
    for capacity in capacities[1:]:
        state, _ = programs.round(programs.extend(state, capacity))
    jax.block_until_ready(state.length)


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
