"""The steps of decoding in `shard_map` and `jit`; each compiles once per cache size and chunk size.

The steps themselves are pure functions in round.py and refill.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from easyspec_jax.decode.refill import (
    Entrance,
    RowCaches,
    copied,
    enter,
    enter_draft,
    extended,
    restored,
    stopped,
)
from easyspec_jax.decode.round import catch_up, prefill, prefill_draft, speculative_round
from easyspec_jax.decode.sizes import Sizes
from easyspec_jax.decode.state import Report, RoundConfig, State, init_state
from easyspec_jax.model.transformer import Decoder
from easyspec_jax.parallel.platforms import PlatformSettings, settings_of
from easyspec_jax.parallel.spmd import partition_specs, spmd
from easyspec_jax.sampling.adjustments import RowAdjustments, adjustment_specs
from easyspec_jax.verify import RowSampling


@dataclass(frozen=True)
class Compiled:
    """The jitted steps of one pair of models and one RoundConfig.

    Except for those that copy or stop rows, they take `leaves` first, and then the arguments that
    the function of the same name takes after the models. Every step but `start`, `extend`,
    `copy_row` and `stop` donates the state: its buffers are reused for the new state, and the old
    one can no longer be read.

    Attributes:
        mesh: The mesh of both models.
        target: The target.
        draft: The draft, or None for plain decoding.
        config: The round's configuration.
        has_corpus: Whether states have a corpus.
        settings: What the steps are compiled with; None for the settings of the mesh's platform.
    """

    mesh: Mesh
    target: Decoder
    draft: Decoder | None
    config: RoundConfig
    has_corpus: bool = False
    settings: PlatformSettings | None = None

    @cached_property
    def leaves(self) -> list[jax.Array]:
        """Arrays of both models, in the order of jax.tree.leaves.

        Kept, because flattening the modules at every call would cost more than a small round.
        """
        return jax.tree.leaves((self.target, self.draft))

    @cached_property
    def start(self) -> Callable[..., State]:
        # The capacity is a shape, so it is static: a program for each.
        def program(
            leaves: list[jax.Array],
            request: RowSampling,
            limit: jax.Array,
            adjustments: RowAdjustments | None,
            corpus: jax.Array | None,
            threshold: jax.Array | None,
            capacity: int,
        ) -> State:
            body = partial(init_state, capacity=capacity)
            shared = self.corpus_spec, self._threshold_spec
            specs = P(), P(), adjustment_specs(self.config.kinds), *shared
            started = self.mapped(body, specs, self.state_spec)
            return started(leaves, request, limit, adjustments, corpus, threshold)

        return self._jit(program, static_argnums=6, out_shardings=self._shardings[0])

    @cached_property
    def prefill(self) -> Callable[..., tuple[State, Report]]:
        body = self.mapped(
            partial(prefill, config=self.config), (self.state_spec, P(), P(), P()), self._results
        )
        return self._jit(body, donate_argnums=1, out_shardings=self._shardings)

    @cached_property
    def prefill_draft(self) -> Callable[..., State]:
        body = self.mapped(prefill_draft, (self.state_spec, P(), P()), self.state_spec)
        return self._jit(body, donate_argnums=1, out_shardings=self._shardings[0])

    @cached_property
    def enter(self) -> Callable[..., tuple[State, Report]]:
        one = P()
        text = Entrance(one, one, one, one, one, one, adjustment_specs(self.config.kinds))  # pyright: ignore[reportArgumentType]
        body = self.mapped(
            partial(enter, config=self.config), (self.state_spec, P(), text), self._results
        )
        return self._jit(body, donate_argnums=1, out_shardings=self._shardings)

    @cached_property
    def enter_draft(self) -> Callable[..., State]:
        body = self.mapped(enter_draft, (self.state_spec, *[P()] * 4), self.state_spec)
        return self._jit(body, donate_argnums=1, out_shardings=self._shardings[0])

    @cached_property
    def copy_row(self) -> Callable[..., RowCaches]:
        specs = self._row_spec

        def program(state: State, row: jax.Array, size: int) -> RowCaches:
            body = partial(copied, size=size)
            return spmd(body, self.mesh, (self.state_spec, P()), specs)(state, row)

        shardings = jax.tree.map(partial(NamedSharding, self.mesh), specs)
        return self._jit(program, static_argnums=2, out_shardings=shardings)

    @cached_property
    def restore(self) -> Callable[..., State]:
        specs = self.state_spec, P(), self._row_spec, P()
        body = self.mapped(restored, specs, self.state_spec)
        return self._jit(body, donate_argnums=1, out_shardings=self._shardings[0])

    @cached_property
    def stop(self) -> Callable[..., jax.Array]:
        return self._jit(stopped, out_shardings=NamedSharding(self.mesh, P()))

    @cached_property
    def extend(self) -> Callable[..., State]:
        def program(leaves: list[jax.Array], state: State, capacity: int) -> State:
            body = partial(extended, capacity=capacity)
            return self.mapped(body, (self.state_spec,), self.state_spec)(leaves, state)

        # Not donated: buffers of the old size could not hold the new caches.
        return self._jit(program, static_argnums=2, out_shardings=self._shardings[0])

    @cached_property
    def round(self) -> Callable[..., tuple[State, Report]]:
        return self._round_of(self.config)

    @cached_property
    def tiers(self) -> dict[int, Callable[..., tuple[State, Report]]]:
        """Rounds of fewer levels than `config` has, by their levels."""
        return {n: self._round_of(self.config.tier(n)) for n in self.config.tiers}

    def _round_of(self, config: RoundConfig) -> Callable[..., tuple[State, Report]]:
        run = partial(speculative_round, config=config, shortens=self._settings.shortens_passes)
        body = self.mapped(run, (self.state_spec,), self._results)
        return self._jit(body, donate_argnums=1, out_shardings=self._shardings)

    @cached_property
    def catch_up(self) -> Callable[..., State]:
        body = self.mapped(
            partial(catch_up, config=self.config), (self.state_spec, P()), self.state_spec
        )
        return self._jit(body, donate_argnums=1, out_shardings=self._shardings[0])

    def _jit(self, body: Callable[..., Any], **options: Any) -> Any:
        """Jit a step with the compiler options of the platform."""
        compiler_options = dict(self._settings.compiler_options)
        if self.config.rows:
            # Or XLA leaves out roundings between operations that it fuses, which differ by program.
            compiler_options["xla_allow_excess_precision"] = False
        return jax.jit(body, compiler_options=compiler_options or None, **options)

    @property
    def _settings(self) -> PlatformSettings:
        return self.settings or settings_of(self.mesh.devices.flat[0].platform)

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
            target, draft = jax.tree.unflatten(models, leaves)
            for model in (target, draft):
                if model is not None:
                    model.cuts, model.reach = self.config.rows is None, self._reach
            with jax.default_matmul_precision(precision):
                return body(target, draft, *args)

        specs = partition_specs(self.leaves)
        return spmd(on_device, self.mesh, (specs, *in_specs), out_specs)

    @property
    def _reach(self) -> int | None:
        """See Decoder."""
        platform = self.mesh.devices.flat[0].platform
        return Sizes(self.config, platform).reach if self.config.keeps_windows else None

    @property
    def state_spec(self) -> Any:
        """PartitionSpecs of a State.

        Caches are split, and what spans the vocabulary; everything else is replicated.
        """
        return State(
            target=self.target.cache_specs(),
            draft=() if self.draft is None else self.draft.cache_specs(),
            **dict.fromkeys(("length", "draft_length", "remaining", "request", "text"), P()),  # pyright: ignore[reportArgumentType]
            adjustments=adjustment_specs(self.config.kinds),
            corpus=self.corpus_spec,
            threshold=self._threshold_spec,
        )

    @property
    def corpus_spec(self) -> Any:
        """PartitionSpec of the corpus, or None if there is none."""
        return P() if self.has_corpus else None

    @property
    def _threshold_spec(self) -> Any:
        """PartitionSpec of the threshold, or None if the configuration says it."""
        return P() if self.config.learns_threshold else None

    @property
    def row_specs(self) -> Any:
        """PartitionSpecs of Programs.row_arrays()."""
        request = RowSampling(*[P()] * 5, min_p=P() if self.config.kinds.min_p else None)  # pyright: ignore[reportArgumentType]
        return request, adjustment_specs(self.config.kinds)

    @property
    def _row_spec(self) -> RowCaches:
        """PartitionSpecs of a row's caches, which are those of all rows."""
        spec = self.state_spec
        return RowCaches(spec.target, spec.draft, spec.text)
