"""The host's side of decoding: compile once per cache size, dispatch one round ahead, hand out reports."""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from easyspec_jax.decode.round import Report, RoundConfig, State, init_state, prefill, speculative_round
from easyspec_jax.model.transformer import Decoder
from easyspec_jax.options import SamplingParams
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
        needed = max(tokens + self.config.scratch + 1, PREFILL_CHUNK)
        return 1 << (needed - 1).bit_length()

    def start(self, sampling: SamplingParams, limits: Sequence[int], capacity: int) -> State:
        """Empty rows, one per limit (tokens to generate). Row i's noise is that of seed + i."""
        rows = len(limits)
        seeds = (sampling.seed + np.arange(rows)) % 2**32
        request = Request(
            seed=self._replicated(seeds.astype(np.uint32)),
            round=self._replicated(np.zeros(rows, np.int32)),
            temperature=self._replicated(np.full(rows, sampling.temperature, np.float32)),
            top_k=self._replicated(np.full(rows, sampling.top_k, np.int32)),
            top_p=self._replicated(np.full(rows, sampling.top_p, np.float32)),
        )
        return self._start(self.leaves, request, self._replicated(np.asarray(limits, np.int32)), capacity)

    def prefill(self, state: State, tokens: np.ndarray, count: np.ndarray, last: np.ndarray) -> tuple[State, Report]:
        """One chunk of every row's prompt; int32 [batch, PREFILL_CHUNK], int32 and bool [batch]."""
        arrays = (self._replicated(x) for x in (tokens, count, last))
        return self._prefill(self.leaves, state, *arrays)

    def round(self, state: State) -> tuple[State, Report]:
        """One round of every row."""
        return self._round(self.leaves, state)

    def _replicated(self, x: np.ndarray) -> jax.Array:
        return jax.device_put(x, NamedSharding(self.mesh, P()))

    @cached_property
    def leaves(self) -> list[jax.Array]:
        """The arrays of both models: flattening their modules at every call would cost more than a small round."""
        return jax.tree.leaves((self.target, self.draft))

    @property
    def state_spec(self) -> Any:
        return State(
            target=self.target.cache_specs(),
            draft=() if self.draft is None else self.draft.cache_specs(),
            **dict.fromkeys(("length", "draft_length", "pending", "pending_count", "remaining", "request"), P()),  # pyright: ignore[reportArgumentType]
        )

    @cached_property
    def _start(self) -> Callable[..., State]:
        def program(leaves: list[jax.Array], request: Request, limit: jax.Array, capacity: int) -> State:
            body = partial(init_state, capacity=capacity, size=self.config.pending_size)
            return self.mapped(body, (P(), P()), self.state_spec)(leaves, request, limit)

        return jax.jit(program, static_argnums=3, out_shardings=self._shardings[0])

    @cached_property
    def _prefill(self) -> Callable[..., tuple[State, Report]]:
        body = self.mapped(partial(prefill, config=self.config), (self.state_spec, P(), P(), P()), self._results)
        return jax.jit(body, donate_argnums=1, out_shardings=self._shardings)

    @cached_property
    def _round(self) -> Callable[..., tuple[State, Report]]:
        body = self.mapped(partial(speculative_round, config=self.config), (self.state_spec,), self._results)
        return jax.jit(body, donate_argnums=1, out_shardings=self._shardings)

    @property
    def _results(self) -> Any:
        return self.state_spec, P()

    @property
    def _shardings(self) -> Any:
        """Of the results, spelled out: JAX spells what it infers in several ways, and each would compile anew."""
        return jax.tree.map(partial(NamedSharding, self.mesh), self._results)

    def mapped(self, body: Callable[..., Any], in_specs: tuple[Any, ...], out_specs: Any) -> Callable[..., Any]:
        """body(target, draft, …) on every device of the mesh, as a function of the models' leaves."""
        models = jax.tree.structure((self.target, self.draft))
        # Otherwise a GPU rounds float32 products to TF32 and a TPU to bfloat16.
        precision = "highest" if self.target.embedding.dtype == np.float32 else "default"

        def on_device(leaves: list[jax.Array], *args: Any) -> Any:
            with jax.default_matmul_precision(precision):
                return body(*jax.tree.unflatten(models, leaves), *args)

        specs = [leaf.sharding.spec for leaf in self.leaves]  # pyright: ignore[reportAttributeAccessIssue]
        return jax.shard_map(
            on_device, mesh=self.mesh, in_specs=(specs, *in_specs), out_specs=out_specs, check_vma=False
        )


def decode(
    programs: Programs, prompts: Sequence[Sequence[int]], limits: Sequence[int], sampling: SamplingParams
) -> Generator[Report]:
    """Generates up to limits[i] tokens after prompts[i] (token ids, none empty).

    Yields a Report of NumPy arrays for the prefill and for each round, until every row is done. The next round is
    dispatched before a report is read, so the devices never wait for the host.
    """
    longest = max(len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True))
    state = programs.start(sampling, limits, programs.capacity(longest))
    try:
        state, chunks = prefill_all(programs, state, prompts)
        state, report = programs.round(state)
        now = first_tokens(chunks)
        yield now
        while not now.done.all():
            state, ahead = programs.round(state)
            now, report = jax.device_get(report), ahead
            yield now
    finally:
        # Two programs with collectives at once could starve each other of the CPU's threads.
        if not state.length.is_deleted():  # as it is if Ctrl-C came between a call and its result
            jax.block_until_ready(state.length)


def warm_up(programs: Programs, capacity: int, rows: int = 1) -> None:
    """Compiles what decode() uses for so many rows and this cache capacity, by decoding rows that are finished."""
    state = programs.start(SamplingParams(), [0] * rows, capacity)
    state, _ = prefill_all(programs, state, [[0]] * rows)
    state, _ = programs.round(state)
    jax.block_until_ready(state.length)


Chunk = tuple[np.ndarray, Report]
"""Which rows' prompts end with a chunk, bool [batch], and what its prefill reported."""


def prefill_all(programs: Programs, state: State, prompts: Sequence[Sequence[int]]) -> tuple[State, list[Chunk]]:
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
