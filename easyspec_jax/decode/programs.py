"""Compiled steps of one pair of models, each compiled once per cache size."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from easyspec_jax.decode.refill import Entrance, enter, extended
from easyspec_jax.decode.round import (
    Report,
    RoundConfig,
    State,
    init_state,
    prefill,
    speculative_round,
)
from easyspec_jax.model.transformer import Decoder
from easyspec_jax.options import SamplingParams
from easyspec_jax.parallel.mesh import replicated
from easyspec_jax.verify import RowSampling

AHEAD = 256
"""Tokens behind its prompt for which a text gets cache entries at first."""

PREFILL_CHUNK = 128
"""Prompt tokens per prefill step; caches are multiples of it, so that a padded last chunk still fits."""


@dataclass(frozen=True)
class Programs:
    """The jitted steps of one pair of models and one RoundConfig; each compiles once per cache size.

    States are donated, and come back under the very shardings they went in with. max_length: no text is longer.
    """

    mesh: Mesh
    target: Decoder
    draft: Decoder | None
    config: RoundConfig
    max_length: int | None = None

    def capacity(self, tokens: int) -> int:
        """Cache entries for texts of `tokens`: a power of two, so that few sizes are ever compiled.

        Behind the text there is room for one round's padding and drafts. No cache is larger than max_length asks for.
        """
        size = 1 << (max(self._needed(tokens), PREFILL_CHUNK) - 1).bit_length()
        if self.max_length is None:
            return size
        return min(
            size, -(-self._needed(max(tokens, self.max_length)) // PREFILL_CHUNK) * PREFILL_CHUNK
        )

    def _needed(self, tokens: int) -> int:
        return tokens + self.config.scratch + 1

    def capacities(self, prompt: int, limit: int) -> tuple[int, ...]:
        """Cache sizes on the way from a prompt of `prompt` tokens to its limit."""
        sizes = [self.capacity(prompt + min(limit, AHEAD))]
        while sizes[-1] < self.capacity(prompt + limit):
            sizes.append(self.capacity(sizes[-1]))
        return tuple(sizes)

    def start(self, sampling: SamplingParams, limits: Sequence[int], capacity: int) -> State:
        """Empty rows, one per limit (tokens to generate). Row i's noise is that of seed + i."""
        request = self._request(sampling, len(limits))
        return self._start(
            self.leaves, request, self._replicated(np.asarray(limits, np.int32)), capacity
        )

    def prefill(
        self, state: State, tokens: np.ndarray, count: np.ndarray, last: np.ndarray
    ) -> tuple[State, Report]:
        """One chunk of every row's prompt; int32 [batch, PREFILL_CHUNK], int32 and bool [batch]."""
        arrays = (self._replicated(x) for x in (tokens, count, last))
        return self._prefill(self.leaves, state, *arrays)

    def enter(
        self, state: State, row: int, prompt: Sequence[int], limit: int, sampling: SamplingParams
    ) -> tuple[State, Report]:
        """Gives a row another text, whose first token the report of this one row holds; other rows keep their state.

        Its noise is that of sampling's seed. The caches must have room for the prompt.
        """
        report = None
        for start in range(0, len(prompt), PREFILL_CHUNK):
            part = prompt[start : start + PREFILL_CHUNK]
            tokens = np.zeros((1, PREFILL_CHUNK), np.int32)
            tokens[0, : len(part)] = part
            numbers = (np.full(1, number, np.int32) for number in (start, len(part), limit))
            begun, count, limits = (self._replicated(number) for number in numbers)
            last = self._replicated(np.full(1, start + PREFILL_CHUNK >= len(prompt)))
            text = Entrance(
                self._replicated(tokens), begun, count, last, limits, self._request(sampling, 1)
            )
            state, report = self._enter(self.leaves, state, self._replicated(np.int32(row)), text)
        assert report is not None, "an empty prompt"
        return state, report

    def extend(self, state: State, capacity: int) -> State:
        """The state with larger caches; compiles once for each pair of sizes."""
        return self._extend(self.leaves, state, capacity)

    def round(self, state: State) -> tuple[State, Report]:
        """One round of every row."""
        return self._round(self.leaves, state)

    def _request(self, sampling: SamplingParams, rows: int) -> RowSampling:
        seeds = (sampling.seed + np.arange(rows)) % 2**32
        return RowSampling(
            seed=self._replicated(seeds.astype(np.uint32)),
            round=self._replicated(np.zeros(rows, np.int32)),
            temperature=self._replicated(np.full(rows, sampling.temperature, np.float32)),
            top_k=self._replicated(np.full(rows, sampling.top_k, np.int32)),
            top_p=self._replicated(np.full(rows, sampling.top_p, np.float32)),
        )

    def _replicated(self, x: np.ndarray | np.int32) -> jax.Array:
        return replicated(x, self.mesh)

    @cached_property
    def leaves(self) -> list[jax.Array]:
        """The arrays of both models: flattening their modules at every call would cost more than a small round."""
        return jax.tree.leaves((self.target, self.draft))

    @property
    def state_spec(self) -> Any:
        return State(
            target=self.target.cache_specs(),
            draft=() if self.draft is None else self.draft.cache_specs(),
            **dict.fromkeys(
                ("length", "draft_length", "pending", "pending_count", "remaining", "request"), P()
            ),  # pyright: ignore[reportArgumentType]
        )

    @cached_property
    def _start(self) -> Callable[..., State]:
        def program(
            leaves: list[jax.Array], request: RowSampling, limit: jax.Array, capacity: int
        ) -> State:
            body = partial(init_state, capacity=capacity, size=self.config.pending_size)
            return self.mapped(body, (P(), P()), self.state_spec)(leaves, request, limit)

        return jax.jit(program, static_argnums=3, out_shardings=self._shardings[0])

    @cached_property
    def _prefill(self) -> Callable[..., tuple[State, Report]]:
        body = self.mapped(
            partial(prefill, config=self.config), (self.state_spec, P(), P(), P()), self._results
        )
        return jax.jit(body, donate_argnums=1, out_shardings=self._shardings)

    @cached_property
    def _enter(self) -> Callable[..., tuple[State, Report]]:
        body = self.mapped(
            partial(enter, config=self.config), (self.state_spec, P(), P()), self._results
        )
        return jax.jit(body, donate_argnums=1, out_shardings=self._shardings)

    @cached_property
    def _extend(self) -> Callable[..., State]:
        def program(leaves: list[jax.Array], state: State, capacity: int) -> State:
            body = partial(extended, capacity=capacity)
            return self.mapped(body, (self.state_spec,), self.state_spec)(leaves, state)

        return jax.jit(
            program, static_argnums=2, out_shardings=self._shardings[0]
        )  # no size fits the donated one

    @cached_property
    def _round(self) -> Callable[..., tuple[State, Report]]:
        body = self.mapped(
            partial(speculative_round, config=self.config), (self.state_spec,), self._results
        )
        return jax.jit(body, donate_argnums=1, out_shardings=self._shardings)

    @property
    def _results(self) -> Any:
        return self.state_spec, P()

    @property
    def _shardings(self) -> Any:
        """Shardings of the results, spelled out: JAX infers several equal spellings, and each would compile again."""
        return jax.tree.map(partial(NamedSharding, self.mesh), self._results)

    def mapped(
        self, body: Callable[..., Any], in_specs: tuple[Any, ...], out_specs: Any
    ) -> Callable[..., Any]:
        """body(target, draft, …) on every device of the mesh, as a function of the models' leaves."""
        models = jax.tree.structure((self.target, self.draft))
        # Otherwise a GPU rounds float32 products to TF32 and a TPU to bfloat16.
        precision = "highest" if self.target.embedding.dtype == np.float32 else "default"

        def on_device(leaves: list[jax.Array], *args: Any) -> Any:
            with jax.default_matmul_precision(precision):
                return body(*jax.tree.unflatten(models, leaves), *args)

        specs = [leaf.sharding.spec for leaf in self.leaves]  # pyright: ignore[reportAttributeAccessIssue]
        return jax.shard_map(
            on_device,
            mesh=self.mesh,
            in_specs=(specs, *in_specs),
            out_specs=out_specs,
            check_vma=False,
        )
