"""The steps of one pair of models, called with what the host has.

Their arguments are put on the mesh here; compiled.py has the steps as devices run them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from easyspec_jax.decode.compiled import Compiled
from easyspec_jax.decode.refill import Entrance, RowCaches
from easyspec_jax.decode.sizes import Sizes
from easyspec_jax.decode.state import Report, RoundConfig, State
from easyspec_jax.decode.threshold import ThresholdChoice
from easyspec_jax.decode.tiers import Common, RoundTimes, TierChoice, no_common
from easyspec_jax.draft.layer_group import LayerGroup
from easyspec_jax.model.transformer import Decoder
from easyspec_jax.options import SamplingParams
from easyspec_jax.parallel import hosts
from easyspec_jax.parallel.mesh import placed, replicated
from easyspec_jax.parallel.platforms import PlatformSettings
from easyspec_jax.sampling.adjustments import RowAdjustments, row_adjustments
from easyspec_jax.sampling.grammar import NO_GRAMMAR
from easyspec_jax.verify import RowSampling

AGREED = 8
"""Rounds between two times at which several processes agree on what rounds take."""


class Part(NamedTuple):
    """A chunk of the prompts of one row or of all, which the draft is to read.

    Attributes:
        tokens: Its tokens, padded.
        start: Tokens of each prompt before it.
        num_tokens: How many tokens each prompt has of it.
    """

    tokens: Int[np.ndarray, "some chunk"]
    start: Int[np.ndarray, " some"]
    num_tokens: Int[np.ndarray, " some"]


@dataclass(frozen=True)
class Programs:
    """The steps of one pair of models and one RoundConfig.

    A state that a step is documented to donate can no longer be read.

    Attributes:
        mesh: The mesh of both models.
        target: The target.
        draft: The draft, or None for plain decoding.
        config: The round's configuration.
        max_length: Length that no text exceeds, or None.
        corpus: Tokens in which repeats are looked up besides the texts themselves, int32, or None.
        settings: What the steps are compiled with; None for the settings of the mesh's platform.
    """

    mesh: Mesh
    target: Decoder
    draft: Decoder | None
    config: RoundConfig
    max_length: int | None = None
    corpus: np.ndarray | None = field(default=None, repr=False, compare=False)
    settings: PlatformSettings | None = None

    @cached_property
    def compiled(self) -> Compiled:
        """The steps as devices run them."""
        own = self.mesh, self.target, self.draft, self.config
        return Compiled(*own, self.corpus is not None, self.settings)

    @property
    def leaves(self) -> list[jax.Array]:
        """Arrays of both models, which most steps take."""
        return self.compiled.leaves

    @cached_property
    def sizes(self) -> Sizes:
        """Sizes of caches and chunks."""
        return Sizes(self.config, self._platform, self.max_length)

    @property
    def keeps_exact_draft(self) -> bool:
        """Whether the draft's committed entries are those of exact passes, after rounds too."""
        if self.draft is None or self.config.calibration:
            return True
        # Without groups of layers a fuzzy pass is an exact one.
        return not any(isinstance(block, LayerGroup) for block in self.draft.blocks)

    def start(
        self,
        sampling: SamplingParams,
        limits: Sequence[int],
        capacity: int,
        prompts: Sequence[Sequence[int]] | None = None,
    ) -> State:
        """Make the state of rows that hold no text yet.

        Args:
            sampling: How to sample. Row i has seed `(sampling.seed + i) % 2**32`.
            limits: Tokens to generate in each row; 0 for a row that is finished.
            capacity: Cache entries per row.
            prompts: Each row's prompt, which some options depend on; by default none.
        """
        rows = prompts or [()] * len(limits)
        request, adjustments = self._placed(self.row_arrays(sampling, rows))
        limit = self._replicated(np.asarray(limits, np.int32))
        threshold = self._replicated(np.float32(0)) if self.config.learns_threshold else None
        arrays = request, limit, adjustments, self._corpus, threshold
        return self.compiled.start(self.leaves, *arrays, capacity)

    def columns(self, size: int) -> int:
        """Return how many columns of tokens prefill() takes for a chunk of some size."""
        return size + self.config.kinds.prompt_logprobs

    def prefill(
        self, state: State, tokens: np.ndarray, count: np.ndarray, last: np.ndarray
    ) -> tuple[State, Report]:
        """Run round.prefill: append one chunk of every row's prompt.

        Args:
            state: The state; donated.
            tokens: int32 [batch, columns(chunk)], padded with any ids.
            count: Tokens of each row's chunk, int32 [batch].
            last: Whether a row's prompt ends with it, bool [batch].
        """
        arrays = map(self._replicated, (tokens, count, last))
        return self.compiled.prefill(self.leaves, state, *arrays)

    def prefill_draft(self, state: State, tokens: np.ndarray, count: np.ndarray) -> State:
        """Run round.prefill_draft: append one chunk of every row's prompt to the draft's caches.

        Args:
            state: The state; donated.
            tokens: int32 [batch, chunk], padded with any ids.
            count: Tokens of each row's chunk, int32 [batch].
        """
        arrays = map(self._replicated, (tokens, count))
        return self.compiled.prefill_draft(self.leaves, state, *arrays)

    def enter(
        self,
        state: State,
        row: int,
        prompt: Sequence[int],
        limit: int,
        sampling: SamplingParams,
        start: int = 0,
        end: int | None = None,
    ) -> tuple[State, Report]:
        """Run enter_target() and enter_draft(); arguments as for the former.

        Returns:
            The new state; and a report of this one row, with the text's first token if no token of
            the prompt was left.
        """
        state, report, parts = self.enter_target(state, row, prompt, limit, sampling, start, end)
        return self.enter_draft(state, row, parts), report

    def enter_target(
        self,
        state: State,
        row: int,
        prompt: Sequence[int],
        limit: int,
        sampling: SamplingParams,
        start: int = 0,
        end: int | None = None,
    ) -> tuple[State, Report, list[Part]]:
        """Run refill.enter: give a row another text; other rows keep their state.

        Args:
            state: The state; donated. Its caches must have room for the prompt.
            row: The row.
            prompt: Token ids, at least one.
            limit: Tokens to generate.
            sampling: How to sample this text, and its seed.
            start: First token to prefill; those before it have been restored.
            end: First token that is left to a later prefill; by default none is.

        Returns:
            The new state; a report of this one row, with the text's first token if no token of the
            prompt was left; and what the draft has to read before it can draft for the row.
        """
        report, capacity, length = None, state.capacity, len(prompt[:end])
        request, adjustments = self._placed(self.row_arrays(sampling, [prompt]))
        place, parts = self._replicated(np.int32(row)), list[Part]()
        for size in self.sizes.chunks(length - start, capacity - start):
            tokens = np.zeros((1, self.columns(size)), np.int32)
            part = prompt[start : start + tokens.shape[1]]
            tokens[0, : len(part)] = part
            begin, count = (np.full(1, n, np.int32) for n in (start, min(size, length - start)))
            text = Entrance(
                tokens=self._replicated(tokens),
                start=self._replicated(begin),
                count=self._replicated(count),
                last=self._replicated(np.full(1, start + size >= len(prompt) == length)),
                limit=self._replicated(np.full(1, limit, np.int32)),
                request=request,
                adjustments=adjustments,
            )
            earlier = report.prompt if report is not None else ()
            state, report = self.compiled.enter(self.leaves, state, place, text)
            if report.prompt is not None:
                report = report._replace(prompt=(earlier or ()) + report.prompt)
            parts.append(Part(tokens[:, :size], begin, count))
            start += size
        assert report is not None, "an empty prompt"
        return state, report, parts

    def enter_draft(self, state: State, row: int, parts: Sequence[Part]) -> State:
        """Run refill.enter_draft: let the draft read the prompt of a row, if there is a draft.

        Args:
            state: The state; donated.
            row: The row.
            parts: What enter_target() returned for it.
        """
        if self.draft is None:
            return state
        place = self._replicated(np.int32(row))
        for part in parts:
            arrays = map(self._replicated, part)
            state = self.compiled.enter_draft(self.leaves, state, place, *arrays)
        return state

    def copy_row(self, state: State, row: int, size: int) -> RowCaches:
        """Run refill.copied: copy a row's caches; compiles once for each pair of sizes.

        Args:
            state: The state; it stays.
            row: The row.
            size: Entries to copy; see prefix_size.
        """
        return self.compiled.copy_row(state, self._replicated(np.int32(row)), size)

    def restore(self, state: State, row: int, kept: RowCaches, count: int) -> State:
        """Run refill.restored: begin a row's text with the first tokens of another.

        Args:
            state: The state; donated. Its caches must have room for the prompt.
            row: The row.
            kept: What copy_row() returned of the other text.
            count: How many tokens to take.
        """
        place, shared = map(self._replicated, (np.int32(row), np.int32(count)))
        return self.compiled.restore(self.leaves, state, place, kept, shared)

    def stop(self, state: State, row: int) -> State:
        """Return the state with a row stopped: rounds add nothing more to its text.

        Args:
            state: The state.
            row: The row.
        """
        place = self._replicated(np.int32(row))
        return replace(state, remaining=self.compiled.stop(state.remaining, place))

    def extend(self, state: State, capacity: int) -> State:
        """Return the state with larger caches; compiles once for each pair of sizes."""
        return self.compiled.extend(self.leaves, state, capacity)

    def round(
        self, state: State, levels: int | None = None, threshold: float | None = None
    ) -> tuple[State, Report]:
        """Run round.speculative_round for every row.

        Args:
            state: The state; donated.
            levels: Which of the tiers of `config` to run; None for `config` itself.
            threshold: Confidence that another level needs, if `config` learns it; None for that of
                the round before.
        """
        if threshold is not None:
            state = replace(state, threshold=self._replicated(np.float32(threshold)))
        if levels is None or levels == self.config.levels:
            return self.compiled.round(self.leaves, state)
        if levels == 0 and self.draft is not None:
            after, report = self._undrafted.round(replace(state, draft=(), threshold=None))
            # Lookups may have levels, but the round is that of the lowest tier.
            report = report._replace(levels=self._no_levels)
            return replace(after, draft=state.draft, threshold=state.threshold), report
        return self.compiled.tiers[levels](self.leaves, state)

    def catch_up(self, state: State, *, finished: bool = False) -> State:
        """Run round.catch_up: let the draft take in what rounds without it added.

        Args:
            state: The state; donated.
            finished: Whether that of finished rows is taken in, too.
        """
        if self.draft is None:
            return state
        return self.compiled.catch_up(self.leaves, state, self._replicated(np.bool_(finished)))

    def tier_choice(self, rows: int) -> TierChoice:
        """Return what chooses the tiers of a new batch.

        Args:
            rows: Rows of the batch. Batches of as many share what is known of the rounds' times;
                all share what texts have shown.
        """
        tiers = (*self.config.tiers, self.config.levels)
        times = self._times.setdefault(rows, RoundTimes(tiers))
        every = AGREED if hosts.count() > 1 else 1
        return TierChoice(
            tiers,
            rows,
            times,
            hosts.from_first,
            every,
            waits=self.config.grafts,
            common=self._common,
        )

    def threshold_choice(self, rows: int) -> ThresholdChoice | None:
        """Return what chooses the thresholds of a new batch, if `config` learns them.

        Args:
            rows: Rows of the batch. Batches of as many share what has been learned.
        """
        if not self.config.learns_threshold:
            return None
        return self._thresholds.setdefault(rows, ThresholdChoice(hosts.from_first))

    @cached_property
    def _thresholds(self) -> dict[int, ThresholdChoice]:
        """The ThresholdChoice of each number of rows."""
        return {}

    @cached_property
    def _common(self) -> Common:
        """Observations of earlier texts; those of later batches begin with some of them."""
        return no_common(self.config.levels)

    @cached_property
    def _times(self) -> dict[int, RoundTimes]:
        """Times of rounds, by the number of rows in a batch."""
        return {}

    @property
    def _platform(self) -> Any:
        return self.mesh.devices.flat[0].platform

    def row_arrays(
        self, sampling: SamplingParams, prompts: Sequence[Sequence[int]]
    ) -> tuple[RowSampling, RowAdjustments | None]:
        """Make the NumPy arrays of rows with consecutive seeds.

        Args:
            sampling: How to sample. It may use options that `config.kinds` has, and no others.
            prompts: Each row's prompt.
        """
        rows, kinds = len(prompts), self.config.kinds

        def full(value: float, dtype: Any) -> Any:
            return np.full(rows, value, dtype)

        seeds: Any = ((sampling.seed + np.arange(rows)) % 2**32).astype(np.uint32)
        request = RowSampling(
            seed=seeds,
            round=full(0, np.int32),
            temperature=full(sampling.temperature, np.float32),
            top_k=full(sampling.top_k, np.int32),
            top_p=full(sampling.top_p, np.float32),
            min_p=full(sampling.min_p, np.float32) if kinds.min_p else None,
        )
        vocab = self.target.embedding.shape[0]
        grammars = self.config.grammars
        number = NO_GRAMMAR if grammars is None else grammars.number(sampling)
        return request, row_adjustments(kinds, sampling, prompts, vocab, number)

    def _placed(self, arrays: Any) -> Any:
        """Put row_arrays() on the mesh."""
        specs = self.compiled.row_specs
        return jax.tree.map(lambda x, spec: placed(x, self.mesh, spec), arrays, specs)

    def _replicated(self, x: np.ndarray | np.int32 | np.float32 | np.bool_) -> jax.Array:
        return replicated(x, self.mesh)

    @cached_property
    def _corpus(self) -> jax.Array | None:
        return None if self.corpus is None else self._replicated(self.corpus)

    @cached_property
    def _undrafted(self) -> "Programs":
        """The lowest tier: passing the draft's arrays on would cost a tenth of a small round."""
        return replace(self, draft=None, config=self.config.tier(0))

    @cached_property
    def _no_levels(self) -> jax.Array:
        return self._replicated(np.int32(0))
