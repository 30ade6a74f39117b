"""One round as a pure function of the state: calibrate, draft, verify, accept, commit.

Everything here runs inside one `shard_map`; rows of a batch are independent, each with its own lengths.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from easyspec_jax.draft.parallel import run_fuzzy
from easyspec_jax.mesh import ALL_AXES
from easyspec_jax.model.collectives import from_first_device
from easyspec_jax.model.transformer import Caches, Decoder, run_exact
from easyspec_jax.verify import Request, Verdict, Verifier


@dataclass(frozen=True)
class RoundConfig:
    """What a compiled round is specialised to.

    levels: drafted tokens, 0 for plain decoding. calibration: the draft's KV of accepted tokens is rebuilt exactly
    every round; otherwise what drafting wrote is kept. stop_ids end a text.
    """

    levels: int
    calibration: bool
    verifier: Verifier
    stop_ids: tuple[int, ...]

    @property
    def pending_size(self) -> int:
        """The most tokens that the draft's cache can lack at the start of a round."""
        if self.calibration or self.levels == 0:
            return self.levels + 1
        return 2  # drafting writes no KV for its last token, and none for the bonus token


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["target", "draft", "length", "draft_length", "pending", "pending_count", "remaining", "request"],
    meta_fields=[],
)
@dataclass(frozen=True)
class State:
    """Where every row stands between rounds.

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
    request: Request


class Report(NamedTuple):
    """What a pass added to each row: its first `num_tokens` tokens; of `drafted` levels `accepted` are among them.

    Levels that the text cannot reach, past a stop token or the limit, count as neither drafted nor accepted.
    """

    tokens: Int[Array, "batch levels+1"]
    num_tokens: Int[Array, " batch"]
    drafted: Int[Array, " batch"]
    accepted: Int[Array, " batch"]
    done: Bool[Array, " batch"]


class Draft(NamedTuple):
    """A drafted chain, and the logits each token was drawn from."""

    tokens: Int[Array, "batch levels"]
    logits: Float[Array, "batch levels vocab_shard"]
    caches: Caches


def init_state(
    target: Decoder, draft: Decoder | None, request: Request, limit: Int[Array, " batch"], capacity: int, size: int
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
    logits = target.logits(_take(h, jnp.maximum(count - 1, 0))[:, None])
    nothing = _no_draft(target, tokens.shape[0])
    verdict = config.verifier.verify(
        logits, nothing.logits, nothing.tokens, state.length + count, state.request, draft_axes=ALL_AXES
    )
    report, remaining = _accept(verdict, nothing.tokens, state.remaining, last & (state.remaining > 0), config)
    first = jnp.pad(report.tokens, [(0, 0), (0, config.pending_size - 1)])
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
    bonus = _take(state.pending, state.pending_count - 1)
    drafted = _no_draft(target, bonus.shape[0]) if draft is None else draft_chain(draft, state, config)
    tokens = jnp.concatenate([bonus[:, None], drafted.tokens], axis=1)
    h, target_caches = target(tokens, state.target, state.length)
    verdict = config.verifier.verify(
        target.logits(h),
        drafted.logits,
        drafted.tokens,
        state.length + 1,
        state.request,
        draft_axes=ALL_AXES if draft is None else draft.axes,
    )
    live = state.remaining > 0
    report, remaining = _accept(verdict, drafted.tokens, state.remaining, live, config)
    verified = replace(state, target=target_caches, draft=drafted.caches, remaining=remaining)
    return _commit(verified, report, live, config), report


def draft_chain(draft: Decoder, state: State, config: RoundConfig) -> Draft:
    """Drafts config.levels tokens a row: the first from the pass over the pending tokens, the rest fuzzily."""
    h, caches = draft(state.pending, state.draft, state.draft_length, run_exact if config.calibration else run_fuzzy)
    start = state.draft_length + state.pending_count

    def choose(h: Float[Array, "batch hidden"], level: Int[Array, ""]) -> tuple[Array, Array]:
        logits = draft.logits(h[:, None])[:, 0]
        return config.verifier.propose(logits, state.length + 1 + level, state.request, draft.axes), logits

    def extend(carry: tuple[Array, Caches], level: Int[Array, ""]) -> tuple[tuple[Array, Caches], tuple[Array, Array]]:
        token, caches = carry
        h, caches = draft(token[:, None], caches, start + (level - 1), run_fuzzy)
        token, logits = choose(h[:, 0], level)
        return (token, caches), (token, logits)

    token, logits = choose(_take(h, state.pending_count - 1), jnp.zeros((), jnp.int32))
    # A loop, because its body compiles once however many levels there are.
    (_, caches), later = jax.lax.scan(extend, (token, caches), jnp.arange(1, config.levels, dtype=jnp.int32))
    tokens, logits = (
        jnp.concatenate([x[:, None], jnp.swapaxes(xs, 0, 1)], axis=1)
        for x, xs in zip((token, logits), later, strict=True)
    )
    if not draft.axes:  # each device has drafted for itself, and kernels need not round alike
        tokens = from_first_device(tokens, ALL_AXES)
    return Draft(tokens, logits, caches)


def _no_draft(target: Decoder, batch: int) -> Draft:
    vocab_shard = target.embedding.shape[0]
    return Draft(jnp.zeros((batch, 0), jnp.int32), jnp.zeros((batch, 0, vocab_shard), jnp.float32), ())


def _accept(
    verdict: Verdict,
    drafted: Int[Array, "batch levels"],
    remaining: Int[Array, " batch"],
    live: Bool[Array, " batch"],
    config: RoundConfig,
) -> tuple[Report, Int[Array, " batch"]]:
    """The longest accepted prefix and one token more, cut at a stop token and the limit; and what then remains."""
    levels = drafted.shape[1]
    columns = jnp.arange(levels + 1, dtype=jnp.int32)[None, :]
    passed = jnp.sum(jnp.cumprod(verdict.accept, axis=1, dtype=jnp.int32), axis=1, dtype=jnp.int32)
    tokens = jnp.where(columns < passed[:, None], jnp.pad(drafted, [(0, 0), (0, 1)]), verdict.token)

    reach = jnp.minimum(passed + 1, remaining)
    is_stop = jnp.isin(tokens, jnp.asarray(config.stop_ids, jnp.int32)) & (columns < reach[:, None])
    stopped = jnp.any(is_stop, axis=1)
    count = jnp.where(stopped, jnp.argmax(is_stop, axis=1).astype(jnp.int32) + 1, reach)
    offered = jnp.minimum(levels, jnp.where(stopped, count, remaining))

    count, offered, accepted = (jnp.where(live, x, 0) for x in (count, offered, jnp.minimum(passed, count)))
    remaining = jnp.where(live & stopped, 0, remaining - count)
    return Report(tokens, count, offered, accepted, remaining == 0), remaining


def _commit(state: State, report: Report, live: Bool[Array, " batch"], config: RoundConfig) -> State:
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
        draft_length=jnp.where(live, state.draft_length + state.pending_count + kept, state.draft_length),
        pending=jnp.where(live[:, None], pending, state.pending),
        pending_count=jnp.where(live, report.num_tokens - kept, state.pending_count),
        request=request,
    )


def _take(x: Array, index: Int[Array, " batch"]) -> Array:
    """x[b, index[b]] for every row b."""
    return jax.vmap(lambda row, i: jax.lax.dynamic_index_in_dim(row, i, keepdims=False))(x, index)
