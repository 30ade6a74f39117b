"""One round as a pure function of the state: calibrate, draft, verify, accept, commit.

Everything here runs inside one `shard_map`; rows of a batch are independent, each with its own lengths.
"""

from dataclasses import dataclass, replace
from enum import IntEnum
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

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

    levels: of the drafted tree, 0 for plain decoding; width: nodes a level, 1 for a chain; nodes: how many of all nodes
    are verified, None for all.
    calibration: the draft's KV of accepted tokens is rebuilt exactly every round; otherwise what drafting wrote is
    kept. stop_ids end a text.
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
        """The round of a way to speculate, for a way of sampling; the numbers of the latter are arguments of it."""
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
        """The most tokens that the draft's cache can lack at the start of a round."""
        if self.calibration or self.levels == 0:
            return self.levels + 1
        return 2  # drafting writes no KV for its last level, and none for the bonus token

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

    target, draft: caches, of whose entries the first length (draft_length) are committed. pending: the last tokens of
    the text, which the draft's cache lacks; the last of them is also the one that the target's cache lacks. remaining:
    tokens that may still be generated; 0 when the row is finished, and rounds then leave it alone.
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
    """Why a row cannot go on: which model's logits are not finite."""

    NONE = 0
    TARGET = 1
    DRAFT = 2


class Report(NamedTuple):
    """Tokens that a pass added to each row: the first `num_tokens`; of `drafted` levels `accepted` are among them.

    Levels that the text cannot reach, past a stop token, the limit or a fault, count as neither drafted nor accepted.
    fault: a Fault, which ends the row.
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
    """Empty rows. limit: tokens to generate; capacity: cache entries a row; size: RoundConfig.pending_size."""
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


def prefill(
    target: Decoder,
    draft: Decoder | None,
    state: State,
    tokens: Int[Array, "batch chunk"],
    count: Int[Array, " batch"],
    last: Bool[Array, " batch"],
    config: RoundConfig,
) -> tuple[State, Report]:
    """Appends each row's next `count` prompt tokens to both caches, exactly; samples the first token of the text.

    last: the row's prompt ends with this chunk, and the report holds its first token, which belongs to no round. Rows
    whose prompt has ended before pass count 0.
    """
    h, target_caches = target(tokens, state.target, state.length)
    draft_caches = () if draft is None else draft(tokens, state.draft, state.draft_length)[1]
    end = jnp.maximum(count - 1, 0)
    logits = target.logits(_take(h, end)[:, None])
    tree = bare_root(_take(tokens, end))
    verdict = config.verifier.verify(logits, tree, state.length + count, state.request)
    live = last & (state.remaining > 0)
    report, remaining, _ = _accept(
        verdict, tree, state.remaining, live, jnp.ones_like(live), config, 0
    )
    first = jnp.broadcast_to(report.tokens[:, :1], state.pending.shape)
    appended = replace(
        state,
        target=target_caches,
        draft=draft_caches,
        length=state.length + count,
        draft_length=state.draft_length + count,
        pending=jnp.where(last[:, None], first, state.pending),
        pending_count=jnp.where(last, 1, state.pending_count),
        remaining=remaining,
    )
    return appended, report


def speculative_round(
    target: Decoder, draft: Decoder | None, state: State, config: RoundConfig
) -> tuple[State, Report]:
    """Drafts, verifies and commits up to config.levels + 1 tokens a row (EasySpec, arXiv 2502.02493)."""
    root = _take(state.pending, state.pending_count - 1)
    tree, sound, draft_caches = (
        (bare_root(root), jnp.ones(root.shape, bool), ())
        if draft is None
        else _draft(draft, root, state, config)
    )
    nodes = Nodes(state.length, state.length, tree.depth, tree.ancestors)
    h, target_caches = target(tree.tokens, state.target, nodes)
    verdict = config.verifier.verify(target.logits(h), tree, state.length + 1, state.request)
    live = state.remaining > 0
    report, remaining, path = _accept(
        verdict, tree, state.remaining, live, sound, config, config.levels
    )
    verified = replace(state, target=target_caches, draft=draft_caches, remaining=remaining)
    return _commit(_move_path(verified, tree, path, config), report, live, config), report


def _draft(
    draft: Decoder, root: Int[Array, " batch"], state: State, config: RoundConfig
) -> tuple[Tree, Bool[Array, " batch"], Caches]:
    """The pass over the pending tokens, and the tree that grows from its last hidden state; whether that is sound."""
    h, caches = draft(
        state.pending,
        state.draft,
        state.draft_length,
        run_exact if config.calibration else run_fuzzy,
    )
    h = _take(h, state.pending_count - 1)
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
    # Logits that are not finite make no probabilities. What follows an impossible token is nobody's business.
    sound = jnp.all(jnp.isfinite(tree.q) | jnp.isneginf(tree.score)[:, :, None], axis=(1, 2))
    return (tree if config.nodes is None else prune(tree, config.nodes)), sound, caches


def _accept(
    verdict: Verdict,
    tree: Tree,
    remaining: Int[Array, " batch"],
    live: Bool[Array, " batch"],
    sound: Bool[Array, " batch"],
    config: RoundConfig,
    levels: int,
) -> tuple[Report, Int[Array, " batch"], Int[Array, "batch levels+1"]]:
    """The accepted path and one token more, cut at a stop token, the limit and where the target has no choice.

    sound: whether the draft is; otherwise nothing is accepted. Also what then remains, and the path's nodes.
    """
    columns = jnp.arange(levels + 1, dtype=jnp.int32)[None, :]
    passed = _take(tree.depth, verdict.leaf)
    path = path_to(tree, verdict.leaf, levels)
    drafted = jnp.take_along_axis(tree.tokens, jnp.roll(path, -1, axis=1), axis=1)
    tokens = jnp.where(columns < passed[:, None], drafted, verdict.token[:, None])

    reach = jnp.minimum(passed + 1, remaining)
    ends = jnp.isin(tokens, jnp.asarray((*config.stop_ids, NO_CHOICE), jnp.int32)) & (
        columns < reach[:, None]
    )
    ended = jnp.any(ends, axis=1)
    end = jnp.argmax(ends, axis=1).astype(jnp.int32)
    chosen = _take(tokens, end) != NO_CHOICE
    fault = jnp.where(ended & ~chosen, Fault.TARGET.value, Fault.NONE.value)
    fault = jnp.where(live, jnp.where(sound, fault, Fault.DRAFT.value), Fault.NONE.value).astype(
        jnp.int32
    )

    count = jnp.where(ended, end + chosen.astype(jnp.int32), reach)
    offered = jnp.minimum(levels, jnp.where(ended, count, remaining))
    counts = (count, offered, jnp.minimum(passed, count))
    count, offered, accepted = (jnp.where(live & sound, x, 0) for x in counts)
    remaining = jnp.where((live & ended) | (fault != Fault.NONE.value), 0, remaining - count)
    return Report(tokens, count, offered, accepted, remaining == 0, fault), remaining, path


def _move_path(
    state: State, tree: Tree, path: Int[Array, "batch levels+1"], config: RoundConfig
) -> State:
    """The state with the accepted path's entries right behind the text, where those of a chain are from the start."""
    if config.width == 1:
        return state
    draft, start = state.draft, state.length
    if not config.calibration:
        entries = start[:, None] + jnp.take_along_axis(tree.entry, path, axis=1)
        draft = tuple(move(cache, entries, start) for cache in draft)
    target = tuple(move(cache, start[:, None] + path, start) for cache in state.target)
    return replace(state, target=target, draft=draft)


def _commit(
    state: State, report: Report, live: Bool[Array, " batch"], config: RoundConfig
) -> State:
    """Advances the lengths past what the caches now hold, and keeps the rest of the new tokens as pending."""
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


def _take(x: Array, index: Int[Array, " batch"]) -> Array:
    """x[b, index[b]] for every row b."""
    return jax.vmap(lambda row, i: jax.lax.dynamic_index_in_dim(row, i, keepdims=False))(x, index)
