"""Compiling what decoding will use, before a text waits for it."""

from collections.abc import Iterable, Mapping, Sequence

import jax
import numpy as np

from easyspec_jax.decode.prefixes import PrefillSizes
from easyspec_jax.decode.programs import Programs
from easyspec_jax.decode.state import RoundConfig, State
from easyspec_jax.options import SamplingParams
from easyspec_jax.progress import Bar, no_bar


class Warmed:
    """Programs of an engine that XLA has compiled already, so that none is run twice for that."""

    def __init__(self) -> None:
        # Round, cache sizes, chunk size and batch size.
        self._rounds: set[tuple[RoundConfig, tuple[int, ...], int, int]] = set()
        # Of what rows share: round, cache size, kind of step, its size and batch size.
        self._shared: set[tuple[RoundConfig, int, str, int, int]] = set()

    def warm(
        self,
        programs: Programs,
        wanted: Mapping[tuple[int, ...], set[int]],
        rows: int,
        bar: Bar = no_bar,
    ) -> None:
        """Compile what decoding whole batches will use.

        Args:
            programs: Compiled steps.
            wanted: Sizes of the prompts' chunks, by the sizes that the caches go through.
            rows: Rows of a batch.
            bar: Shows the progress, if there is anything to compile.
        """
        missing: dict[tuple[int, ...], list[int]] = {}
        for capacities, chunks in sorted(wanted.items()):
            for chunk in sorted(chunks):
                if (programs.config, capacities, chunk, rows) not in self._rounds:
                    missing.setdefault(capacities, []).append(chunk)
        if not missing:
            return
        with bar("Compiling", len(missing)) as advance:
            for capacities, chunks in missing.items():
                # Rows that are finished from the start compile everything without decoding
                # anything.
                warm_up(programs, capacities, chunks, rows)
                for chunk in chunks:
                    self._rounds.add((programs.config, capacities, chunk, rows))
                advance(1)

    def warm_sharing(
        self, programs: Programs, capacity: int, sizes: PrefillSizes, rows: int
    ) -> None:
        """Compile what prefills one row and copies it to others.

        Args:
            programs: Compiled steps.
            capacity: Cache entries of each row.
            sizes: Sizes of the chunks of one row, and of the copies.
            rows: Rows of a batch.
        """
        steps = [("alone", size) for size in sorted(sizes.alone)]
        steps += [("copy", size) for size in sorted(sizes.copies)]
        for step, size in steps:
            key = programs.config, capacity, step, size, rows
            if key in self._shared:
                continue
            state = programs.start(SamplingParams(), [0] * rows, capacity)
            if step == "alone":
                prompt = [0] * (size + 1)
                state, _ = programs.enter(state, 0, prompt, 0, SamplingParams(), 0, size)
            else:
                copy = programs.copy_row(state, 0, size)
                state = programs.restore(state, 0, copy, 1)
            jax.block_until_ready(state.length)
            self._shared.add(key)


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
    state = run_rounds(programs, programs.stop(state, 0))
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
