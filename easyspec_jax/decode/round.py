"""One round as a pure function of the state: calibrate, draft, verify, accept, commit.

Everything here runs inside one `shard_map`. Rows of a batch are independent, each with its own
lengths; no step waits for the longest.

A round in the order of speculative_round():

1. *Calibrate*: the draft runs exactly over the pending tokens, those that its cache lacks, and so
   overwrites the inexact keys and values that drafting left there.
2. *Draft*: fuzzy passes grow a token tree below the last token of the text.
3. *Verify*: one pass of the target over the whole tree; a verifier decides what is accepted.
4. *Accept*: the accepted path and one more token, cut at stop tokens and the limit.
5. *Commit*: lengths advance past what the caches now hold of the text.
"""

from dataclasses import dataclass, replace
from enum import IntEnum
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from easyspec_jax.decode.drafting import draft_tree
from easyspec_jax.draft.layer_group import run_fuzzy
from easyspec_jax.model.attention import Nodes
from easyspec_jax.model.cache import move
from easyspec_jax.model.transformer import Caches, Decoder, run_exact
from easyspec_jax.options import SamplingParams, SpeculativeConfig
from easyspec_jax.sampling.vocabulary import NO_CHOICE
from easyspec_jax.verify import RowSampling, Verdict, Verifier, choose
from easyspec_jax.verify.tree import Tree, bare_root, path_to, prune


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

    @classmethod
    def of(
        cls, speculative: SpeculativeConfig, sampling: SamplingParams, stop_ids: tuple[int, ...]
    ) -> "RoundConfig":
        """Derive the round for a way to speculate and a way to sample.

        Only whether sampling is greedy, and whether it truncates, enters here. Its numbers are
        arrays of the state (RowSampling), so that they do not need programs of their own.

        Args:
            speculative: How to draft.
            sampling: How to sample.
            stop_ids: Token ids that end a text.
        """
        return cls(
            levels=0 if speculative.method == "vanilla" else speculative.num_speculative_tokens,
            # An exact draft's own KV is exact already: there is nothing to calibrate.
            calibration=speculative.calibration and speculative.method == "easyspec",
            verifier=choose(speculative.chosen_verifier, sampling),
            stop_ids=stop_ids,
            width=speculative.width,
            nodes=speculative.tree_nodes,
        )

    @property
    def pending_size(self) -> int:
        """Most tokens that the draft's cache can lack at the start of a round."""
        if self.calibration or self.levels == 0:
            return self.levels + 1  # all that the last round added
        return 2  # drafting writes no KV for its last level, and none for the token after it

    @property
    def scratch(self) -> int:
        """Cache entries that a round may write behind a text's last token."""
        return max(self.levels * self.width, self.pending_size)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "target",
        "draft",
        "length",
        "draft_length",
        "pending",
        "pending_count",
        "remaining",
        "request",
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
        draft     kv   kv   kv   kv              draft_length = 4, pending = t4, t5

    Once the prompt is in, draft_length + pending_count = length + 1, the tokens of the text.

    Attributes:
        target: The target's caches; the first `length` entries of a row are committed.
        draft: The draft's caches, likewise up to `draft_length`; () without a draft.
        length: Committed entries of the target's caches.
        draft_length: Committed entries of the draft's caches.
        pending: Last tokens of the text, which the draft's cache lacks; beyond `pending_count`
            they mean nothing.
        pending_count: How many tokens are pending.
        remaining: Tokens that may still be generated; 0 when the row is finished. Rounds then
            leave it alone.
        request: Each row's noise and distribution.
    """

    target: Caches
    draft: Caches
    length: Int[Array, " batch"]
    draft_length: Int[Array, " batch"]
    pending: Int[Array, "batch pending"]
    pending_count: Int[Array, " batch"]
    remaining: Int[Array, " batch"]
    request: RowSampling


class Fault(IntEnum):
    """Reason why a row cannot go on: which model's logits are not finite."""

    NONE = 0
    TARGET = 1
    DRAFT = 2


class Report(NamedTuple):
    """Result of one pass for each row.

    Levels that the text cannot reach, past a stop token, the limit or a fault, count as neither
    drafted nor accepted.

    Attributes:
        tokens: New tokens of the text; only the first `num_tokens` count.
        num_tokens: How many there are.
        drafted: Levels that were drafted.
        accepted: How many of them were accepted.
        done: Whether the row is finished.
        fault: A Fault, which ends the row.
    """

    tokens: Int[Array, "batch levels+1"]
    num_tokens: Int[Array, " batch"]
    drafted: Int[Array, " batch"]
    accepted: Int[Array, " batch"]
    done: Bool[Array, " batch"]
    fault: Int[Array, " batch"]


def init_state(
    target: Decoder,
    draft: Decoder | None,
    request: RowSampling,
    limit: Int[Array, " batch"],
    capacity: int,
    size: int,
) -> State:
    """Make the state of rows that hold no text yet.

    Args:
        target: The target.
        draft: The draft, or None for plain decoding.
        request: Each row's noise and distribution.
        limit: Tokens to generate in each row.
        capacity: Cache entries of each row.
        size: RoundConfig.pending_size.
    """
    batch = limit.shape[0]
    zero = jnp.zeros((batch,), jnp.int32)
    return State(
        target=target.init_caches(batch, capacity),
        draft=() if draft is None else draft.init_caches(batch, capacity),
        length=zero,
        draft_length=zero,
        pending=jnp.zeros((batch, size), jnp.int32),
        pending_count=zero,
        remaining=limit,
        request=request,
    )


def append_chunk(
    target: Decoder,
    draft: Decoder | None,
    state: State,
    tokens: Int[Array, "batch chunk"],
    count: Int[Array, " batch"],
) -> tuple[State, Float[Array, "batch hidden"]]:
    """Append a chunk of each row's prompt to both caches, exactly.

    Args:
        target: The target.
        draft: The draft, or None.
        state: Rows whose earlier prompt chunks are already in the caches.
        tokens: Each row's next prompt tokens, padded to the chunk.
        count: How many of them there are; 0 for a row whose prompt has ended before.

    Returns:
        The new state, and the target's hidden state after the last of the tokens.
    """
    h, target_caches = target(tokens, state.target, state.length)
    draft_caches = () if draft is None else draft(tokens, state.draft, state.draft_length)[1]
    appended = replace(
        state,
        target=target_caches,
        draft=draft_caches,
        length=state.length + count,
        draft_length=state.draft_length + count,
    )
    return appended, _take(h, _end(count))


def prefill(
    target: Decoder,
    draft: Decoder | None,
    state: State,
    tokens: Int[Array, "batch chunk"],
    count: Int[Array, " batch"],
    last: Bool[Array, " batch"],
    config: RoundConfig,
) -> tuple[State, Report]:
    """Append a chunk of each row's prompt, and sample the first token of rows that it ends.

    Args:
        target: The target.
        draft: The draft, or None.
        state: As for append_chunk().
        tokens: As for append_chunk().
        count: As for append_chunk().
        last: Whether the row's prompt ends with this chunk.
        config: The round's configuration.

    Returns:
        The new state; and a report with the first token of rows whose prompt ends here. That token
        belongs to no round. Other rows report no token.
    """
    appended, h = append_chunk(target, draft, state, tokens, count)
    tree = bare_root(_take(tokens, _end(count)))

    def choose() -> Verdict:
        logits = target.logits(h[:, None])  # after the prompt's last token: [batch, 1, ids]
        return config.verifier.verify(logits, tree, appended.length, state.request)

    # Most chunks of a long prompt end no row's, and need not be multiplied by the whole vocabulary.
    # All devices have the same `last` and so take the same branch, in which they may communicate.
    nothing = jnp.zeros_like(state.length)
    verdict = jax.lax.cond(jnp.any(last), choose, lambda: Verdict(nothing, nothing))
    live = last & (state.remaining > 0)
    report, remaining, _ = _accept(
        verdict, tree, state.remaining, live, jnp.ones_like(live), config, 0
    )
    first = jnp.broadcast_to(report.tokens[:, :1], state.pending.shape)
    appended = replace(
        appended,
        pending=jnp.where(last[:, None], first, state.pending),
        pending_count=jnp.where(last, 1, state.pending_count),
        remaining=remaining,
    )
    return appended, report


def speculative_round(
    target: Decoder, draft: Decoder | None, state: State, config: RoundConfig
) -> tuple[State, Report]:
    """Run one round: draft, verify and commit up to config.levels + 1 tokens per row.

    The method is EasySpec (arXiv 2502.02493). Without a draft, a round is a step of plain decoding.

    Args:
        target: The target.
        draft: The draft, or None.
        state: Rows whose prompts are in the caches.
        config: The round's configuration.

    Returns:
        The state after the round, and what the round added to each row.
    """
    root = _take(state.pending, state.pending_count - 1)
    if draft is None:
        tree, draft_is_finite, draft_caches = bare_root(root), jnp.ones(root.shape, bool), ()
    else:
        tree, draft_is_finite, draft_caches = _draft(draft, root, state, config)
    nodes = Nodes(state.length, state.length, tree.depth, tree.ancestors)
    h, target_caches = target(tree.tokens, state.target, nodes)
    verdict = config.verifier.verify(target.logits(h), tree, state.length + 1, state.request)
    live = state.remaining > 0
    report, remaining, path = _accept(
        verdict, tree, state.remaining, live, draft_is_finite, config, config.levels
    )
    verified = replace(state, target=target_caches, draft=draft_caches, remaining=remaining)
    return _commit(_move_path(verified, tree, path, config), report, live, config), report


def _draft(
    draft: Decoder, root: Int[Array, " batch"], state: State, config: RoundConfig
) -> tuple[Tree, Bool[Array, " batch"], Caches]:
    """Catch up on the pending tokens, then grow a tree from the last one's hidden state.

    Also returns whether the draft's probabilities are finite in each row.
    """
    # Calibration is this very pass: run exactly, it replaces what drafting wrote for these tokens.
    # Without calibration it is a fuzzy pass like those of drafting, over one or two tokens.
    h, caches = draft(
        state.pending,
        state.draft,
        state.draft_length,
        run_exact if config.calibration else run_fuzzy,
    )
    h = _take(h, state.pending_count - 1)  # [batch, pending, hidden] -> [batch, hidden]
    tree, caches = draft_tree(
        draft,
        h,
        caches,
        root,
        state.length,
        state.request,
        config.verifier,
        config.levels,
        config.width,
    )
    # Logits that are not finite make no probabilities. Nodes that do not exist may have any q.
    finite = jnp.isfinite(tree.q) | jnp.isneginf(tree.score)[:, :, None]
    is_finite = jnp.all(finite, axis=(1, 2))
    return (tree if config.nodes is None else prune(tree, config.nodes)), is_finite, caches


def _accept(
    verdict: Verdict,
    tree: Tree,
    remaining: Int[Array, " batch"],
    live: Bool[Array, " batch"],
    draft_is_finite: Bool[Array, " batch"],
    config: RoundConfig,
    levels: int,
) -> tuple[Report, Int[Array, " batch"], Int[Array, "batch levels+1"]]:
    """Cut the accepted path and one token more at stop tokens, the limit and faults.

    Where the draft is not finite nothing is accepted. Returns the report, what then remains of the
    limit, and the path's nodes.
    """
    columns = jnp.arange(levels + 1, dtype=jnp.int32)[None, :]
    depth = _take(tree.depth, verdict.leaf)
    path = path_to(tree, verdict.leaf, levels)
    # Column j of the new tokens is the path's node at depth j + 1, up to the leaf, and then the
    # verdict's token. With levels = 3, and the leaf, node 5, at depth 2:
    #   path     0    2    5    0     nodes of depth 0, 1, 2; the last column means nothing
    #   drafted  t2   t5   .    .     tokens of the path shifted by one
    #   tokens   t2   t5   v    v     where columns < 2, else the verdict's token
    drafted = jnp.take_along_axis(tree.tokens, jnp.roll(path, -1, axis=1), axis=1)
    tokens = jnp.where(columns < depth[:, None], drafted, verdict.token[:, None])

    # The first stop token within reach ends the text and is part of it. NO_CHOICE ends it, too, but
    # does not stand for a token.
    reach = jnp.minimum(depth + 1, remaining)
    ends = jnp.isin(tokens, jnp.asarray((*config.stop_ids, NO_CHOICE), jnp.int32)) & (
        columns < reach[:, None]
    )
    ended = jnp.any(ends, axis=1)
    end = jnp.argmax(ends, axis=1).astype(jnp.int32)
    chosen = _take(tokens, end) != NO_CHOICE
    fault = jnp.where(ended & ~chosen, Fault.TARGET.value, Fault.NONE.value)
    fault = jnp.where(draft_is_finite, fault, Fault.DRAFT.value)
    fault = jnp.where(live, fault, Fault.NONE.value).astype(jnp.int32)

    count = jnp.where(ended, end + chosen.astype(jnp.int32), reach)
    reachable = jnp.minimum(levels, jnp.where(ended, count, remaining))
    accepted = jnp.minimum(depth, count)
    counts = live & draft_is_finite
    count = jnp.where(counts, count, 0)
    reachable = jnp.where(counts, reachable, 0)
    accepted = jnp.where(counts, accepted, 0)
    remaining = jnp.where((live & ended) | (fault != Fault.NONE.value), 0, remaining - count)
    return Report(tokens, count, reachable, accepted, remaining == 0, fault), remaining, path


def _move_path(
    state: State, tree: Tree, path: Int[Array, "batch levels+1"], config: RoundConfig
) -> State:
    """Move the accepted path's cache entries right behind the text; a chain's are there already.

    With a text of length n and an accepted path of nodes 0, 2, 5:

        entry    n    n+1  n+2  n+3  n+4  n+5
        before   0    1    2    3    4    5       numbers of nodes
        after    0    2    5    ...
    """
    if config.width == 1:
        return state
    draft, start = state.draft, state.length
    if not config.calibration:
        # The draft's entries have the numbers that nodes had before pruning. Calibration rebuilds
        # them, so they need not move then.
        entries = start[:, None] + jnp.take_along_axis(tree.entry, path, axis=1)
        draft = tuple(move(cache, entries, start) for cache in draft)
    target = tuple(move(cache, start[:, None] + path, start) for cache in state.target)
    return replace(state, target=target, draft=draft)


def _commit(
    state: State, report: Report, live: Bool[Array, " batch"], config: RoundConfig
) -> State:
    """Advance the lengths past what the caches now hold, and keep other new tokens as pending."""
    # New tokens whose draft KV is kept as drafting wrote it: without calibration those of all
    # levels but the last. Three levels, all accepted, and one token more:
    #   new tokens     t1   t2   t3   v
    #   draft's cache  kv   kv              kept = 2, pending = t3, v
    # With calibration nothing is kept, and all four are pending.
    kept = jnp.zeros_like(report.num_tokens)
    if not config.calibration and config.levels > 0:
        kept = jnp.clip(report.num_tokens, 1, config.levels) - 1
    columns = jnp.arange(config.pending_size, dtype=jnp.int32)[None, :] + kept[:, None]
    pending = jnp.take_along_axis(report.tokens, jnp.minimum(columns, config.levels), axis=1)
    request = replace(state.request, round=state.request.round + live.astype(jnp.int32))
    return replace(
        state,
        length=state.length + report.num_tokens,
        draft_length=jnp.where(
            live, state.draft_length + state.pending_count + kept, state.draft_length
        ),
        pending=jnp.where(live[:, None], pending, state.pending),
        pending_count=jnp.where(live, report.num_tokens - kept, state.pending_count),
        request=request,
    )


def _end(count: Int[Array, " batch"]) -> Int[Array, " batch"]:
    """Return the index of a chunk's last token; 0, which means nothing, where there is none."""
    return jnp.maximum(count - 1, 0)


def _take(x: Array, index: Int[Array, " batch"]) -> Array:
    """Select x[b, index[b]] for every row b: [batch, n, ...] -> [batch, ...]."""
    return jax.vmap(lambda row, i: jax.lax.dynamic_index_in_dim(row, i, keepdims=False))(x, index)
