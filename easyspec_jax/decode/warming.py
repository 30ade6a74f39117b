"""Compiling what decoding will use, before a text waits for it."""

from collections.abc import Iterable, Sequence

import jax
import numpy as np

from easyspec_jax.decode.programs import Programs
from easyspec_jax.decode.state import State
from easyspec_jax.options import SamplingParams


def warm_up(
    programs: Programs, capacities: Sequence[int], sizes: Iterable[int], rows: int = 1
) -> None:
    """Compile what decode() will use, by running it on rows that are finished from the start.

    What is compiled already costs only its run.

    Args:
        programs: Compiled steps.
        capacities: Sizes that the caches will have, in order; see Programs.capacities.
        sizes: Sizes of the prompts' chunks; see Programs.chunks.
        rows: Rows of the batch.
    """
    state = programs.start(SamplingParams(), [0] * rows, capacities[0])
    for size in sizes:
        tokens = np.zeros((rows, programs.columns(size)), np.int32)
        count = np.zeros(rows, np.int32)
        state, _ = programs.prefill(state, tokens, count, np.zeros(rows, bool))
        if programs.draft is not None:
            state = programs.prefill_draft(state, tokens[:, :size], count)
    state = run_rounds(programs, state)
    for capacity in capacities[1:]:
        state = run_rounds(programs, programs.extend(state, capacity))
    jax.block_until_ready(state.length)


def run_rounds(programs: Programs, state: State) -> State:
    """Run a round of every tier."""
    for levels in programs.config.tiers:
        state, _ = programs.round(state, levels)
    if programs.config.tiers:
        state = programs.catch_up(state)
    return programs.round(state)[0]
