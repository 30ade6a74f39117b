"""Values of a round: its static configuration, the state of the rows, and its report."""

from dataclasses import dataclass, replace
from enum import IntEnum
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from easyspec_jax.decode.lookup import Lookup, Text
from easyspec_jax.model.transformer import Caches, Decoder
from easyspec_jax.options import SamplingParams, SpeculativeConfig
from easyspec_jax.sampling.adjustments import PLAIN, Kinds, RowAdjustments
from easyspec_jax.sampling.grammar import MOST_FORCED, Grammars
from easyspec_jax.sampling.logprobs import Logprobs
from easyspec_jax.verify import Coupled, Greedy, RowSampling, Verdict, Verifier, choose
from easyspec_jax.verify.tree import Tree
from easyspec_jax.verify.verifier import CANDIDATES

TIERS = (0, 2, 5)
"""Levels of the rounds that can take the place of one of more levels; 0 has no draft model."""

CATCH_UP = 32
"""Tokens of a pass by which a draft catches up on what plain rounds added."""


@dataclass(frozen=True)
class RoundConfig:
    """Static options that a compiled round is specialised to.

    Attributes:
        levels: Levels of the drafted tree; 0 for plain decoding.
        calibration: Whether the draft's keys and values of accepted tokens are rebuilt exactly in
            every round. If not, those that drafting wrote are kept.
        verifier: Rules by which drafts are proposed and accepted.
        stop_ids: Token ids that end a text.
        width: Nodes per level; 1 for a chain.
        nodes: How many nodes are verified, the root not counted; None for all.
        rows: Tokens of every pass of the target over a chain, however many are drafted; None for
            as many as are.
        lookup: Which repeats of the text are drafts; None if they are not looked up.
        kinds: Sampling options that the round has arrays and operations for.
        tiers: Levels of the rounds that may take this one's place, fewest first; see tier().
        most_pending: Most tokens that rounds of other tiers leave to the draft; None without.
        grammars: What rows with a grammar ask for masks; None if kinds has none.
        confidence_threshold: Another level is drafted where the best path has this probability.
        learns_threshold: The state says which probability that is, and reports what to learn it
            from.
        keeps_windows: Caches of sliding layers keep only what may still be read. Then no beginning
            of a text can be taken out of them later.

    Examples:
        >>> config = RoundConfig.of(SpeculativeConfig(), SamplingParams(temperature=0.8), (2,))
        >>> config.levels, config.calibration, config.verifier
        (5, True, Rejection(truncates=False))
        >>> config.pending_size, config.scratch
        (6, 6)
    """

    levels: int
    calibration: bool
    verifier: Verifier
    stop_ids: tuple[int, ...]
    width: int = 1
    nodes: int | None = None
    rows: int | None = None
    lookup: Lookup | None = None
    kinds: Kinds = PLAIN
    tiers: tuple[int, ...] = ()
    most_pending: int | None = None
    grammars: Grammars | None = None
    confidence_threshold: float = 0.0
    learns_threshold: bool = False
    keeps_windows: bool = False

    @classmethod
    def of(
        cls, speculative: SpeculativeConfig, sampling: SamplingParams, stop_ids: tuple[int, ...]
    ) -> "RoundConfig":
        """Derive the round for a way to speculate and a way to sample.

        Only whether sampling is greedy, whether it truncates and which other options it uses enter
        here. Its numbers are arrays of the state (RowSampling, RowAdjustments), so that they do not
        need programs of their own.

        Args:
            speculative: How to draft.
            sampling: How to sample.
            stop_ids: Token ids that end a text.
        """
        lookup = None
        if speculative.looks_up:
            lookup = Lookup(speculative.prompt_lookup_max, speculative.prompt_lookup_min)
        levels = 0 if speculative.method == "vanilla" else speculative.num_speculative_tokens
        verifier = choose(speculative.chosen_verifier, sampling)
        adapts = speculative.adapt
        if adapts == "auto":
            # The noise of other verifiers depends on the round that drafts a token.
            adapts = isinstance(verifier, Greedy | Coupled)
        threshold, learns = speculative.confidence_threshold, False
        if threshold == "auto":
            # Of a single level nothing can be left out, nor of what is looked up.
            threshold, learns = 0.0, speculative.needs_draft and levels > 1
        return cls(
            levels=levels,
            # An exact draft's own KV is exact already: there is nothing to calibrate. But it has
            # none for what was looked up.
            calibration=speculative.calibration
            and (speculative.method == "easyspec" or speculative.prompt_lookup),
            verifier=verifier,
            stop_ids=stop_ids,
            width=speculative.width,
            nodes=speculative.tree_nodes,
            rows=speculative.stable_rows,
            lookup=lookup,
            kinds=Kinds.of(sampling),
            tiers=tuple(n for n in TIERS if n < levels) if adapts else (),
            confidence_threshold=float(threshold),
            learns_threshold=learns,
        )

    def tier(self, levels: int) -> "RoundConfig":
        """Return the round of fewer levels, or of as many, that works on the same state.

        It drafts as this one does, up to its last level. Without levels it is plain decoding, or,
        where lookups join the drafts of a model, a round of lookups alone.

        Examples:
            >>> tree = SpeculativeConfig(method="tree", tree_nodes=12, adapt=True)
            >>> config = RoundConfig.of(tree, SamplingParams(), ())
            >>> [(config.tier(n).levels, config.tier(n).verified) for n in (*config.tiers, 5)]
            [(0, 0), (2, 8), (5, 12)]
        """
        if levels == 0 and self.grafts:
            return replace(
                self,
                calibration=False,
                width=1,
                nodes=None,
                tiers=(),
                most_pending=self.pending_size,
                learns_threshold=False,
            )
        width = self.width if levels else 1
        nodes = None if self.nodes is None or not levels else min(self.nodes, levels * width)
        return replace(
            self,
            levels=levels,
            width=width,
            nodes=nodes,
            lookup=self.lookup if levels else None,
            tiers=(),
            most_pending=self.pending_size,
            learns_threshold=self.learns_threshold and levels > 0,
        )

    @property
    def catch_up_size(self) -> int:
        """Tokens of a pass by which the draft catches up on plain rounds; 0 if there are none."""
        # Fixed rows are the scratch of plain decoding too. With more, caches could have another
        # size, and bit-stable texts other bits.
        return (self.rows or CATCH_UP) if self.tiers else 0

    @property
    def pending_size(self) -> int:
        """Most tokens that the draft's cache can lack at the start of a round that drafts."""
        if self.most_pending is not None:
            return self.most_pending
        if self.calibration or self.levels == 0:
            return self.depth + 1  # all that the last round added
        return 2  # drafting writes no KV for its last level, and none for the token after it

    @property
    def forced(self) -> int:
        """Most tokens that a round takes before it drafts, because a grammar allows no others."""
        # Passes of a fixed number of rows have no room for more, and plain ones are of one token.
        return MOST_FORCED if self.kinds.grammar and self.levels and not self.rows else 0

    @property
    def ends_early(self) -> bool:
        """Whether a draft may end above its last level."""
        return self.learns_threshold or self.confidence_threshold > 0

    @property
    def depth(self) -> int:
        """Levels of the tree that is verified: those that are drafted, below what is forced."""
        return self.forced + self.levels

    @property
    def grafts(self) -> bool:
        """Whether what is looked up joins the trees of a draft model, which is then calibrated."""
        return self.lookup is not None and self.calibration

    @property
    def verified(self) -> int:
        """Nodes that the target verifies, the root not counted."""
        of_path = self.levels if self.grafts else 0
        return self.forced + (self.nodes or self.levels * self.width) + of_path

    @property
    def split_for(self) -> int:
        """Tokens of the target's passes that its experts are split for; see Loader.

        Options of single texts do not count, because all share the weights. Nor does how bit-stable
        rounds draft: texts of every method have the same bits.
        """
        # Rounds that may be plain steps read few experts, of which whole ones would be more.
        if not self.rows and (0 in self.tiers or (self.lookup is not None and not self.grafts)):
            return 1
        return self.rows or 1 + replace(self, kinds=PLAIN).verified

    @property
    def candidates(self) -> int:
        """Likeliest ids of the draft that are considered after a node."""
        wanted = self.verifier.candidates(self.width)
        # How likely a token is shows next to others only.
        return max(wanted, CANDIDATES) if self.ends_early else wanted

    @property
    def scratch(self) -> int:
        """Cache entries that a round may write behind a text's last token."""
        drafted = max(self.forced + self.levels * self.width, self.verified)
        return max(drafted, self.taken_in, self.rows or 0, self.catch_up_size)

    @property
    def taken_in(self) -> int:
        """Most tokens that the draft takes in before it drafts."""
        return self.pending_size + self.forced


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "target",
        "draft",
        "length",
        "draft_length",
        "remaining",
        "request",
        "text",
        "adjustments",
        "corpus",
        "threshold",
    ],
    meta_fields=[],
)
@dataclass(frozen=True)
class State:
    """State of every row between rounds.

    The last token of a text is in no cache yet, because the pass over it is the next one to come.
    The draft's cache may lack more. With calibration, after a round that added t4 and t5 to t0-t3:

        text      t0   t1   t2   t3   t4   t5
        target    kv   kv   kv   kv   kv         length = 5
        draft     kv   kv   kv   kv              draft_length = 4: t4 and t5 are pending

    So a state does not say which round wrote it: whatever the draft lacks, the next one that drafts
    takes from the text.

    Attributes:
        target: The target's caches; the first `length` entries of a row are committed. Some keep
            only the last of them; see model/kept_window.py.
        draft: The draft's caches, likewise up to `draft_length`; () without a draft.
        length: Committed entries of the target's caches.
        draft_length: Committed entries of the draft's caches, likewise; it means nothing without a
            draft.
        remaining: Tokens that may still be generated; 0 when the row is finished. Rounds then
            leave it alone.
        request: Each row's noise and distribution.
        text: The text's tokens up to index `length`; those behind mean nothing.
        adjustments: Each row's changes to logits; None if no row has any.
        corpus: Tokens in which repeats are looked up besides the texts themselves, or None.
        threshold: Confidence that another level needs; None where the configuration says it.
    """

    target: Caches
    draft: Caches
    length: Int[Array, " batch"]
    draft_length: Int[Array, " batch"]
    remaining: Int[Array, " batch"]
    request: RowSampling
    text: Text
    adjustments: RowAdjustments | None = None
    corpus: Int[Array, " tokens"] | None = None
    threshold: Float[Array, ""] | None = None

    @property
    def capacity(self) -> int:
        """Entries of each row in caches that keep everything."""
        return self.text.shape[1]

    @property
    def root(self) -> Int[Array, " batch"]:
        """The last token of each text."""
        return jnp.take_along_axis(self.text, self.length[:, None], axis=1)[:, 0]

    def pending(self, size: int) -> Int[Array, "batch size"]:
        """Return the first tokens that the draft's cache lacks.

        Args:
            size: How many to return; those past the last one of a text mean nothing.
        """
        columns = self.draft_length[:, None] + jnp.arange(size, dtype=jnp.int32)[None, :]
        return jnp.take_along_axis(self.text, jnp.minimum(columns, self.text.shape[1] - 1), axis=1)


class Fault(IntEnum):
    """Reason why a row cannot go on: which model's logits are not finite."""

    NONE = 0
    TARGET = 1
    DRAFT = 2


class Report(NamedTuple):
    """Result of one pass for each row.

    Levels that the text cannot reach, past a stop token, the limit or a fault, count as neither
    drafted nor accepted. Nor do tokens that were forced.

    Attributes:
        tokens: New tokens of the text; only the first `num_tokens` count. Forced ones come first,
            then accepted levels.
        num_tokens: How many there are.
        drafted: Levels that were drafted.
        accepted: How many of them were accepted.
        done: Whether the row is finished.
        fault: A Fault, which ends the row.
        lookup_drafted: Drafted levels that have a token from a lookup.
        lookup_accepted: Accepted levels whose token came from a lookup.
        forced: New tokens that a grammar left no choice about, and that were not drafted.
        levels: Levels that a round of this kind drafts at most; of the lowest tier, 0.
        logprobs: Those of `tokens` under the target; None if no row asks for any.
        prompt: Those of the tokens after each token of the chunk, if some row asks for them; one
            element for each chunk of the prompt that the report is about.
        confidence: Probability under the draft of the best path to each level, 0 where there is
            none; None unless a threshold is learned.
        repeated: Accepted levels whose tokens a lookup found, whether or not a draft model proposed
            them, too; None without lookups.
    """

    tokens: Int[Array, "batch depth+1"]
    num_tokens: Int[Array, " batch"]
    drafted: Int[Array, " batch"]
    accepted: Int[Array, " batch"]
    done: Bool[Array, " batch"]
    fault: Int[Array, " batch"]
    lookup_drafted: Int[Array, " batch"]
    lookup_accepted: Int[Array, " batch"]
    forced: Int[Array, " batch"]
    levels: Int[Array, ""]
    logprobs: Logprobs | None = None
    prompt: tuple[Logprobs, ...] | None = None
    confidence: Float[Array, "batch levels"] | None = None
    repeated: Int[Array, " batch"] | None = None


class Verified(NamedTuple):
    """The target's decision about a tree.

    Attributes:
        verdict: How far the text follows it.
        logprobs: Log-probabilities of the tokens that follow; None if no row asks for any.
    """

    verdict: Verdict
    logprobs: Logprobs | None


class Drafted(NamedTuple):
    """Drafts of all rows.

    Attributes:
        tree: The tokens to verify.
        levels: Levels of each row's draft.
        is_finite: Whether the draft's probabilities are.
        forced: How many levels above the draft's hold what a grammar forces.
        confidence: As in Report.
        looked_up: Tokens that a lookup found below the forced ones, NO_TOKEN where it found none;
            None without lookups.
    """

    tree: Tree
    levels: Int[Array, " batch"]
    is_finite: Bool[Array, " batch"]
    forced: Int[Array, " batch"] | int = 0
    confidence: Float[Array, "batch levels"] | None = None
    looked_up: Int[Array, "batch levels"] | None = None


def init_state(
    target: Decoder,
    draft: Decoder | None,
    request: RowSampling,
    limit: Int[Array, " batch"],
    adjustments: RowAdjustments | None = None,
    corpus: Int[Array, " tokens"] | None = None,
    threshold: Float[Array, ""] | None = None,
    *,
    capacity: int,
) -> State:
    """Make the state of rows that hold no text yet.

    Args:
        target: The target.
        draft: The draft, or None for plain decoding.
        request: Each row's noise and distribution.
        limit: Tokens to generate in each row.
        adjustments: Each row's changes to logits.
        corpus: Tokens in which repeats are looked up as well.
        threshold: Confidence that another level needs, if that is learned.
        capacity: Cache entries of each row.
    """
    batch = limit.shape[0]
    zero = jnp.zeros((batch,), jnp.int32)
    return State(
        target=target.init_caches(batch, capacity),
        draft=() if draft is None else draft.init_caches(batch, capacity),
        length=zero,
        draft_length=zero,
        remaining=limit,
        request=request,
        text=jnp.zeros((batch, capacity), jnp.int32),
        adjustments=adjustments,
        corpus=corpus,
        threshold=threshold,
    )
