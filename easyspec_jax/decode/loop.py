"""The host's side of decoding: compile once per cache size, dispatch one round ahead, hand out reports."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from easyspec_jax.config import SamplingParams
from easyspec_jax.decode.round import Report, RoundConfig, State, init_state, prefill, speculative_round
from easyspec_jax.model.sharding import partition_specs
from easyspec_jax.model.transformer import Decoder
from easyspec_jax.verify import Request

PREFILL_CHUNK = 128
"""Prompt tokens per prefill step; caches are multiples of it, so that a padded last chunk still fits."""


@dataclass(frozen=True)
class Programs:
    """The jitted steps of one pair of models and one RoundConfig; each compiles once per cache size.

    States are donated, and come back under the very shardings they went in with.
    """

    mesh: Mesh
    target: Decoder
    draft: Decoder | None
    config: RoundConfig

    def capacity(self, tokens: int) -> int:
        """Cache entries for texts of `tokens`: a power of two, so that few sizes are ever compiled.

        Behind the text there is room for one round's padding and drafts.
        """
        needed = max(tokens + self.config.levels + 2, PREFILL_CHUNK)
        return 1 << (needed - 1).bit_length()

    def start(self, sampling: SamplingParams, limits: Sequence[int], capacity: int) -> State:
        """Empty rows, one per limit (tokens to generate). Row i's noise is that of seed + i."""
        seeds = (sampling.seed + np.arange(len(limits))) % 2**32
        request = Request(
            seed=self._replicated(seeds.astype(np.uint32)),
            temperature=self._replicated(np.full(len(limits), sampling.temperature, np.float32)),
            round=self._replicated(np.zeros(len(limits), np.int32)),
        )
        return self._start(self.target, self.draft, request, self._replicated(np.asarray(limits, np.int32)), capacity)

    def prefill(self, state: State, tokens: np.ndarray, count: np.ndarray, last: np.ndarray) -> tuple[State, Report]:
        """One chunk of every row's prompt; int32 [batch, PREFILL_CHUNK], int32 and bool [batch]."""
        arrays = (self._replicated(x) for x in (tokens, count, last))
        return self._prefill(self.target, self.draft, state, *arrays)

    def round(self, state: State) -> tuple[State, Report]:
        """One round of every row."""
        return self._round(self.target, self.draft, state)

    def _replicated(self, x: np.ndarray) -> jax.Array:
        return jax.device_put(x, NamedSharding(self.mesh, P()))

    @property
    def _model_specs(self) -> tuple[Any, Any]:
        return partition_specs(self.target), partition_specs(self.draft)

    @property
    def _state_spec(self) -> Any:
        return State(
            target=self.target.cache_specs(),
            draft=() if self.draft is None else self.draft.cache_specs(),
            **dict.fromkeys(("length", "draft_length", "pending", "pending_count", "remaining", "request"), P()),  # pyright: ignore[reportArgumentType]
        )

    @cached_property
    def _start(self) -> Callable[..., State]:
        def body(target: Decoder, draft: Decoder | None, request: Request, limit: jax.Array, capacity: int) -> State:
            return init_state(target, draft, request, limit, capacity, self.config.pending_size)

        def program(target: Decoder, draft: Decoder | None, request: Request, limit: jax.Array, capacity: int) -> State:
            mapped = self._mapped(partial(body, capacity=capacity), (*self._model_specs, P(), P()), self._state_spec)
            return mapped(target, draft, request, limit)

        return jax.jit(program, static_argnums=4)

    @cached_property
    def _prefill(self) -> Callable[..., tuple[State, Report]]:
        body = partial(prefill, config=self.config)
        specs = (*self._model_specs, self._state_spec, P(), P(), P())
        return jax.jit(self._mapped(body, specs, (self._state_spec, P())), donate_argnums=2)

    @cached_property
    def _round(self) -> Callable[..., tuple[State, Report]]:
        body = partial(speculative_round, config=self.config)
        specs = (*self._model_specs, self._state_spec)
        return jax.jit(self._mapped(body, specs, (self._state_spec, P())), donate_argnums=2)

    def _mapped(self, body: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        return jax.shard_map(body, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def decode(
    programs: Programs, prompts: Sequence[Sequence[int]], limits: Sequence[int], sampling: SamplingParams
) -> Iterator[Report]:
    """Generates up to limits[i] tokens after prompts[i] (token ids, none empty).

    Yields a Report of NumPy arrays for the prefill and for each round, until every row is done. The next round is
    dispatched before a report is read, so the devices never wait for the host.
    """
    longest = max(len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True))
    state = programs.start(sampling, limits, programs.capacity(longest))
    state, report = _prefill_all(programs, state, prompts)
    try:
        while True:
            state, ahead = programs.round(state)
            now = jax.device_get(report)
            yield now
            if now.done.all():
                return
            report = ahead
    finally:
        # Two programs with collectives at once could starve each other of the CPU's threads.
        jax.block_until_ready(state.length)


def warm_up(programs: Programs, capacity: int) -> None:
    """Compiles what decode() uses for one row and this cache capacity, by decoding a row that is finished."""
    state = programs.start(SamplingParams(), [0], capacity)
    state, _ = _prefill_all(programs, state, [[0]])
    state, _ = programs.round(state)
    jax.block_until_ready(state.length)


def _prefill_all(programs: Programs, state: State, prompts: Sequence[Sequence[int]]) -> tuple[State, Report]:
    """The state after all prompts, and the report with every row's first token."""
    lengths = np.asarray([len(prompt) for prompt in prompts])
    first: Report | None = None
    for start in range(0, int(lengths.max()), PREFILL_CHUNK):
        count = np.clip(lengths - start, 0, PREFILL_CHUNK).astype(np.int32)
        tokens = np.zeros((len(prompts), PREFILL_CHUNK), np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, : count[row]] = prompt[start : start + PREFILL_CHUNK]
        last = (count > 0) & (lengths <= start + PREFILL_CHUNK)
        state, report = programs.prefill(state, tokens, count, last)
        first = report if first is None else jax.tree.map(partial(_where_rows, jnp.asarray(last)), report, first)
    assert first is not None
    return state, first


def _where_rows(rows: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    return jnp.where(rows.reshape(-1, *[1] * (new.ndim - 1)), new, old)
