"""The end of a round: cut the accepted path, move its cache entries, and advance the state."""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from easyspec_jax.decode.lookup import append
from easyspec_jax.decode.state import Drafted, Fault, Report, RoundConfig, State
from easyspec_jax.decode.window_caches import move_entries, move_on
from easyspec_jax.model.transformer import Decoder
from easyspec_jax.sampling.adjust import ends_text, with_output
from easyspec_jax.sampling.vocabulary import NO_CHOICE
from easyspec_jax.verify import Verdict
from easyspec_jax.verify.tree import Tree, path_to


def accept(
    verdict: Verdict,
    drafted: Drafted,
    state: State,
    live: Bool[Array, " batch"],
    config: RoundConfig,
    levels: int,
) -> tuple[Report, Int[Array, " batch"], Int[Array, "batch levels+1"]]:
    """Cut the accepted path and one token more at stop tokens, the limit and faults.

    Where the draft is not finite nothing is accepted.

    Args:
        verdict: The verifier's decision.
        drafted: What it was about.
        state: The state before the round.
        live: Rows that are not finished.
        config: The round's configuration.
        levels: Levels that the tree has at most.

    Returns:
        The report, what then remains of the limit, and the path's nodes.
    """
    tree, remaining = drafted.tree, state.remaining
    columns = jnp.arange(levels + 1, dtype=jnp.int32)[None, :]
    tokens, path, depth = followed(verdict, tree, levels)

    # The first stop token within reach ends the text and is part of it. NO_CHOICE ends it, too, but
    # does not stand for a token.
    reach = jnp.minimum(depth + 1, remaining)
    ends = ends_text(tokens, state.adjustments, config.stop_ids) & (columns < reach[:, None])
    ended = jnp.any(ends, axis=1)
    end = jnp.argmax(ends, axis=1).astype(jnp.int32)
    chosen = take_each(tokens, end) != NO_CHOICE
    fault = jnp.where(ended & ~chosen, Fault.TARGET.value, Fault.NONE.value)
    fault = jnp.where(drafted.is_finite, fault, Fault.DRAFT.value)
    fault = jnp.where(live, fault, Fault.NONE.value).astype(jnp.int32)

    count = jnp.where(ended, end + chosen.astype(jnp.int32), reach)
    levels_below = drafted.forced + drafted.levels
    reachable = jnp.minimum(levels_below, jnp.where(ended, count, remaining))
    accepted = jnp.minimum(depth, count)
    counts = live & drafted.is_finite
    count, reachable, accepted = (jnp.where(counts, x, 0) for x in (count, reachable, accepted))
    remaining = jnp.where((live & ended) | (fault != Fault.NONE.value), 0, remaining - count)
    lookup_drafted, lookup_accepted = _count_lookups(drafted, path, reachable, accepted, config)
    forced = jnp.minimum(drafted.forced, accepted)
    report = Report(
        tokens=tokens,
        num_tokens=count,
        drafted=reachable - jnp.minimum(drafted.forced, reachable),
        accepted=accepted - forced,
        done=remaining <= 0,
        fault=fault,
        lookup_drafted=lookup_drafted,
        lookup_accepted=lookup_accepted,
        forced=forced,
        levels=jnp.asarray(config.levels, jnp.int32),
        confidence=drafted.confidence,
        repeated=_count_repeated(drafted, tokens, accepted - forced),
    )
    return report, remaining, path


def followed(
    verdict: Verdict, tree: Tree, levels: int
) -> tuple[Int[Array, "batch levels+1"], Int[Array, "batch levels+1"], Int[Array, " batch"]]:
    """Follow a tree as far as the verdict does.

    Args:
        verdict: The verifier's decision.
        tree: What it was about.
        levels: Levels that the tree has at most.

    Returns:
        The tokens of the accepted path and one more, the path's nodes, and its depth.
    """
    columns = jnp.arange(levels + 1, dtype=jnp.int32)[None, :]
    depth = take_each(tree.depth, verdict.leaf)
    path = path_to(tree, verdict.leaf, levels)
    # Column j of the new tokens is the path's node at depth j + 1, up to the leaf, and then the
    # verdict's token. With levels = 3, and the leaf, node 5, at depth 2:
    #   path     0    2    5    0     nodes of depth 0, 1, 2; the last column means nothing
    #   on_path  t2   t5   .    .     tokens of the path shifted by one
    #   tokens   t2   t5   v    v     where columns < 2, else the verdict's token
    on_path = jnp.take_along_axis(tree.tokens, jnp.roll(path, -1, axis=1), axis=1)
    return jnp.where(columns < depth[:, None], on_path, verdict.token[:, None]), path, depth


def _count_lookups(
    drafted: Drafted,
    path: Int[Array, "batch levels+1"],
    reachable: Int[Array, " batch"],
    accepted: Int[Array, " batch"],
    config: RoundConfig,
) -> tuple[Int[Array, " batch"], Int[Array, " batch"]]:
    """Count how many of the reachable and of the accepted levels have a token from a lookup."""
    if config.lookup is None:
        return jnp.zeros_like(reachable), jnp.zeros_like(accepted)
    # Nodes of a looked-up path are the last ones, one for each level, but for those that are
    # missing because fewer tokens are forced than could be.
    tree = drafted.tree
    nodes = tree.tokens.shape[1]
    unforced = (config.forced if nodes > 1 else 0) - drafted.forced
    first = jnp.maximum(nodes - unforced - config.levels, 1).reshape(-1, 1)
    number = jnp.arange(nodes, dtype=jnp.int32)[None, :]
    proposed = (number >= first) & tree.exists & (tree.depth <= reachable[:, None])
    columns = jnp.arange(path.shape[1], dtype=jnp.int32)[None, :]
    taken = (path >= first) & (columns > 0) & (columns <= accepted[:, None])
    return jnp.sum(proposed, axis=1, dtype=jnp.int32), jnp.sum(taken, axis=1, dtype=jnp.int32)


def _count_repeated(
    drafted: Drafted, tokens: Int[Array, "batch levels+1"], accepted: Int[Array, " batch"]
) -> Int[Array, " batch"] | None:
    """Count how many of the accepted levels a lookup found, from the first one on."""
    if drafted.looked_up is None:
        return None
    columns = jnp.arange(drafted.looked_up.shape[1], dtype=jnp.int32)[None, :]
    below = columns + jnp.broadcast_to(drafted.forced, accepted.shape)[:, None]
    agrees = jnp.take_along_axis(tokens, below, axis=1) == drafted.looked_up
    agrees &= columns < accepted[:, None]
    return jnp.sum(jnp.cumprod(agrees.astype(jnp.int32), axis=1), axis=1, dtype=jnp.int32)


def move_path(
    target: Decoder,
    draft: Decoder | None,
    state: State,
    tree: Tree,
    path: Int[Array, "batch levels+1"],
    config: RoundConfig,
) -> State:
    """Move the accepted path's cache entries right behind the text; a chain's are there already.

    With a text of length n and an accepted path of nodes 0, 2, 5:

        entry    n    n+1  n+2  n+3  n+4  n+5
        before   0    1    2    3    4    5       numbers of nodes
        after    0    2    5    ...

    Args:
        target: The target.
        draft: The draft, or None.
        state: The state; its caches hold all nodes.
        tree: The verified tree.
        path: The accepted path's nodes.
        config: The round's configuration.
    """
    if config.width == 1 and not config.grafts:
        return state
    draft_caches, start = state.draft, state.length
    if draft is not None and not config.calibration:
        # The draft's entries have the numbers that nodes had before pruning. Calibration rebuilds
        # them, so they need not move then.
        entries = start[:, None] + jnp.take_along_axis(tree.entry, path, axis=1)
        draft_caches = move_entries(draft, draft_caches, entries, start, state.draft_length)
    caches = move_entries(target, state.target, start[:, None] + path, start, start)
    return replace(state, target=caches, draft=draft_caches)


def commit(
    target: Decoder,
    draft: Decoder | None,
    state: State,
    report: Report,
    live: Bool[Array, " batch"],
    config: RoundConfig,
) -> State:
    """Append the new tokens to the texts, and advance the lengths past what the caches now hold.

    Args:
        target: The target.
        draft: The draft, or None.
        state: The state after move_path().
        report: What the round adds to each row.
        live: Rows that were not finished before it.
        config: The round's configuration.
    """
    draft_length, draft_caches = state.draft_length, state.draft
    if draft is not None and config.levels > 0:
        # A draft model that drafts takes in all of the text. New tokens whose draft KV is kept as
        # drafting wrote it are, without calibration, those of all levels but the last. Three
        # levels, all accepted, and one token more:
        #   new tokens     t1   t2   t3   v
        #   draft's cache  kv   kv              kept = 2; t3 and v are pending
        # With calibration nothing is kept, and all four are pending.
        drafted = jnp.maximum(report.forced + report.drafted, 1)
        kept = 0 if config.calibration else jnp.clip(report.num_tokens, 1, drafted) - 1
        draft_length = jnp.where(live, state.length + 1 + kept, draft_length)
        draft_caches = move_on(draft, draft_caches, state.draft_length, draft_length)
    length = state.length + report.num_tokens
    request = replace(state.request, round=state.request.round + live.astype(jnp.int32))
    return replace(
        state,
        target=move_on(target, state.target, state.length, length),
        draft=draft_caches,
        length=length,
        draft_length=draft_length,
        request=request,
        text=append(state.text, report.tokens, state.length + 1, report.num_tokens),
        adjustments=with_output(state.adjustments, report.tokens, report.num_tokens),
    )


def take_each(x: Array, index: Int[Array, " batch"]) -> Array:
    """Select x[b, index[b]] for every row b: [batch, n, ...] -> [batch, ...]."""
    return jax.vmap(lambda row, i: jax.lax.dynamic_index_in_dim(row, i, keepdims=False))(x, index)
