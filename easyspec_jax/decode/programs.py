"""Compiled steps of one pair of models, each compiled once per cache size (and chunk size).

The steps themselves are pure functions in `round.py` and `refill.py`. Here they are wrapped in
`shard_map` and `jit`, and their arguments are put on the mesh.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from easyspec_jax.arithmetic import round_up
from easyspec_jax.decode.chunks import PASS_OVERHEAD, PREFILL_SIZES, chunks
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
from easyspec_jax.parallel.platforms import PlatformSettings, settings_of
from easyspec_jax.parallel.spmd import partition_specs, spmd
from easyspec_jax.verify import RowSampling

AHEAD = 256
"""Tokens after a prompt that a text gets cache entries for at first, whatever its limit."""

CAPACITY_UNIT = 128
"""Capacities of caches are multiples of it, and at least that."""


@dataclass(frozen=True)
class Programs:
    """The jitted steps of one pair of models and one RoundConfig.

    Each compiles once per cache size. Every step but `start` and `extend` donates the state: its
    buffers are reused for the new state, and the old one can no longer be read.

    Attributes:
        mesh: The mesh of both models.
        target: The target.
        draft: The draft, or None for plain decoding.
        config: The round's configuration.
        max_length: Length that no text exceeds, or None.
        settings: Whose compiler options the steps are compiled with; None for the settings of the
            mesh's platform.
    """

    mesh: Mesh
    target: Decoder
    draft: Decoder | None
    config: RoundConfig
    max_length: int | None = None
    settings: PlatformSettings | None = None

    def capacity(self, tokens: int) -> int:
        """Return the size of caches for texts of a length.

        It is a power of two, so that few sizes are ever compiled, and leaves room behind the text
        for what one round writes. No cache is larger than texts of max_length need.

        Args:
            tokens: Length of the text.

        Returns:
            Cache entries per row.
        """
        # The next power of two: 300 -> 512, 512 -> 512.
        size = 1 << (max(self._needed(tokens), CAPACITY_UNIT) - 1).bit_length()
        if self.max_length is None:
            return size
        most = self._needed(max(tokens, self.max_length))
        return min(size, round_up(most, CAPACITY_UNIT))

    def _needed(self, tokens: int) -> int:
        """Count the entries that a round may write for a text of a length."""
        return tokens + self.config.scratch + 1

    def capacities(self, prompt: int, limit: int) -> tuple[int, ...]:
        """List the sizes that caches may have while a text grows to its limit.

        Args:
            prompt: Tokens of the prompt.
            limit: Tokens that may follow.
        """
        # A prompt of 100 tokens with a limit of 1000 starts with room for 356 and grows by powers
        # of two: 512, 1024, 2048.
        sizes = [self.capacity(prompt + min(limit, AHEAD))]
        while sizes[-1] < self.capacity(prompt + limit):
            sizes.append(self.capacity(sizes[-1]))
        return tuple(sizes)

    def chunks(self, prompt: int, capacity: int, rows: int = 1) -> tuple[int, ...]:
        """List the sizes of the chunks in which rows are prefilled together.

        Args:
            prompt: Tokens of the longest prompt.
            capacity: Cache entries per row.
            rows: Rows of the batch.
        """
        platform = self.mesh.devices.flat[0].platform
        listed = PREFILL_SIZES.get(platform, PREFILL_SIZES["gpu"])
        # Several rows fill a pass as well as a long chunk does, and take as much working memory.
        most = max(CAPACITY_UNIT, listed[-1] // rows)
        sizes = [listed[0], *(size for size in listed[1:] if size <= most)]
        # The rows share what a pass costs whatever its tokens.
        overhead = PASS_OVERHEAD.get(platform, PASS_OVERHEAD["gpu"])
        return chunks(prompt, sizes, overhead / rows, capacity)

    def start(self, sampling: SamplingParams, limits: Sequence[int], capacity: int) -> State:
        """Make the state of rows that hold no text yet.

        Args:
            sampling: Temperature, top-k and top-p. Row i has seed `(sampling.seed + i) % 2**32`.
            limits: Tokens to generate in each row; 0 for a row that is finished.
            capacity: Cache entries per row.
        """
        request = self._request(sampling, len(limits))
        return self._start(
            self.leaves, request, self._replicated(np.asarray(limits, np.int32)), capacity
        )

    def prefill(
        self, state: State, tokens: np.ndarray, count: np.ndarray, last: np.ndarray
    ) -> tuple[State, Report]:
        """Run round.prefill: append one chunk of every row's prompt.

        Args:
            state: The state; donated.
            tokens: int32 [batch, chunk], padded with any ids.
            count: Tokens of each row's chunk, int32 [batch].
            last: Whether a row's prompt ends with it, bool [batch].
        """
        arrays = map(self._replicated, (tokens, count, last))
        return self._prefill(self.leaves, state, *arrays)

    def enter(
        self, state: State, row: int, prompt: Sequence[int], limit: int, sampling: SamplingParams
    ) -> tuple[State, Report]:
        """Run refill.enter: give a row another text; other rows keep their state.

        Args:
            state: The state; donated. Its caches must have room for the prompt.
            row: The row.
            prompt: Token ids, at least one.
            limit: Tokens to generate.
            sampling: Temperature, top-k, top-p and seed of this text.

        Returns:
            The new state; and a report of this one row, with the text's first token.
        """
        report, start = None, 0
        for size in self.chunks(len(prompt), state.target[0].capacity):
            part = prompt[start : start + size]
            tokens = np.zeros((1, size), np.int32)
            tokens[0, : len(part)] = part
            text = Entrance(
                tokens=self._replicated(tokens),
                start=self._replicated(np.full(1, start, np.int32)),
                count=self._replicated(np.full(1, len(part), np.int32)),
                last=self._replicated(np.full(1, start + size >= len(prompt))),
                limit=self._replicated(np.full(1, limit, np.int32)),
                request=self._request(sampling, 1),
            )
            state, report = self._enter(self.leaves, state, self._replicated(np.int32(row)), text)
            start += size
        assert report is not None, "an empty prompt"
        return state, report

    def extend(self, state: State, capacity: int) -> State:
        """Return the state with larger caches; compiles once for each pair of sizes."""
        return self._extend(self.leaves, state, capacity)

    def round(self, state: State) -> tuple[State, Report]:
        """Run round.speculative_round for every row. The state is donated."""
        return self._round(self.leaves, state)

    def _request(self, sampling: SamplingParams, rows: int) -> RowSampling:
        """Put each row's noise and distribution on the mesh, with consecutive seeds."""
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
        """Arrays of both models, in the order of jax.tree.leaves.

        Kept, because flattening the modules at every call would cost more than a small round.
        """
        return jax.tree.leaves((self.target, self.draft))

    @property
    def state_spec(self) -> Any:
        """PartitionSpecs of a State: caches are split, everything else is replicated."""
        return State(
            target=self.target.cache_specs(),
            draft=() if self.draft is None else self.draft.cache_specs(),
            **dict.fromkeys(
                ("length", "draft_length", "pending", "pending_count", "remaining", "request"), P()
            ),  # pyright: ignore[reportArgumentType]
        )

    @cached_property
    def _start(self) -> Callable[..., State]:
        # The capacity is a shape, so it is static: a program for each.
        def program(
            leaves: list[jax.Array], request: RowSampling, limit: jax.Array, capacity: int
        ) -> State:
            body = partial(init_state, capacity=capacity, size=self.config.pending_size)
            return self.mapped(body, (P(), P()), self.state_spec)(leaves, request, limit)

        return self._jit(program, static_argnums=3, out_shardings=self._shardings[0])

    @cached_property
    def _prefill(self) -> Callable[..., tuple[State, Report]]:
        body = self.mapped(
            partial(prefill, config=self.config), (self.state_spec, P(), P(), P()), self._results
        )
        return self._jit(body, donate_argnums=1, out_shardings=self._shardings)

    @cached_property
    def _enter(self) -> Callable[..., tuple[State, Report]]:
        body = self.mapped(
            partial(enter, config=self.config), (self.state_spec, P(), P()), self._results
        )
        return self._jit(body, donate_argnums=1, out_shardings=self._shardings)

    @cached_property
    def _extend(self) -> Callable[..., State]:
        def program(leaves: list[jax.Array], state: State, capacity: int) -> State:
            body = partial(extended, capacity=capacity)
            return self.mapped(body, (self.state_spec,), self.state_spec)(leaves, state)

        # Not donated: buffers of the old size could not hold the new caches.
        return self._jit(program, static_argnums=2, out_shardings=self._shardings[0])

    @cached_property
    def _round(self) -> Callable[..., tuple[State, Report]]:
        body = self.mapped(
            partial(speculative_round, config=self.config), (self.state_spec,), self._results
        )
        return self._jit(body, donate_argnums=1, out_shardings=self._shardings)

    def _jit(self, body: Callable[..., Any], **options: Any) -> Any:
        """Jit a step with the compiler options of the platform."""
        settings = self.settings or settings_of(self.mesh.devices.flat[0].platform)
        return jax.jit(body, compiler_options=dict(settings.compiler_options) or None, **options)

    @property
    def _results(self) -> Any:
        """PartitionSpecs of a step's results, (State, Report)."""
        return self.state_spec, P()

    @property
    def _shardings(self) -> Any:
        """Shardings of a step's results, spelled out.

        Left to itself, JAX may spell equal shardings differently, and the next step would compile
        once for each spelling.
        """
        return jax.tree.map(partial(NamedSharding, self.mesh), self._results)

    def mapped(
        self, body: Callable[..., Any], in_specs: tuple[Any, ...], out_specs: Any
    ) -> Callable[..., Any]:
        """Wrap body(target, draft, ...) in `shard_map`, as a function of `leaves` and the rest.

        Args:
            body: Computes one device's part.
            in_specs: PartitionSpecs of the arguments after the models.
            out_specs: PartitionSpecs of the results.
        """
        models = jax.tree.structure((self.target, self.draft))
        # By default a GPU rounds the factors of float32 products to TF32, and a TPU to bfloat16.
        precision = "highest" if self.target.norm.dtype == np.float32 else "default"

        # Inside `shard_map` leaves are this device's parts; put together again they are modules.
        def on_device(leaves: list[jax.Array], *args: Any) -> Any:
            with jax.default_matmul_precision(precision):
                return body(*jax.tree.unflatten(models, leaves), *args)

        specs = partition_specs(self.leaves)
        return spmd(on_device, self.mesh, (specs, *in_specs), out_specs)
