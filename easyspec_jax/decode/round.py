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

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from easyspec_jax.decode.accepting import accept, commit, followed, move_path, take_each
from easyspec_jax.decode.branch import run_if
from easyspec_jax.decode.drafting import draft_tree
from easyspec_jax.decode.lookup import Found, append, find
from easyspec_jax.decode.state import Drafted, Report, RoundConfig, State, Verified
from easyspec_jax.decode.window_caches import move_on
from easyspec_jax.draft.layer_group import run_fuzzy
from easyspec_jax.model.transformer import Caches, Decoder, run_exact
from easyspec_jax.model.windows import Nodes
from easyspec_jax.parallel.mesh import ALL_AXES
from easyspec_jax.sampling.adjust import adjust, whole, with_forced, with_output
from easyspec_jax.sampling.adjustments import RowAdjustments
from easyspec_jax.sampling.grammar_rows import Forced, forced_tokens
from easyspec_jax.sampling.logprobs import logprobs_of, prompt_logprobs
from easyspec_jax.sampling.vocabulary import NO_TOKEN
from easyspec_jax.verify.tree import (
    Tree,
    bare_root,
    drafted_tokens,
    first_nodes,
    graft,
    hang,
    prune,
    sure_chain,
    without_nodes,
)


def append_chunk(
    target: Decoder, state: State, tokens: Int[Array, "batch chunk"], count: Int[Array, " batch"]
) -> tuple[State, Float[Array, "batch chunk hidden"]]:
    """Append a chunk of each row's prompt to the target's caches.

    Args:
        target: The target.
        state: Rows whose earlier prompt chunks are already in the caches.
        tokens: Each row's next prompt tokens, padded to the chunk.
        count: How many of them there are; 0 for a row whose prompt has ended before.

    Returns:
        The new state, and the target's hidden states after all of the tokens.
    """
    h, caches = target(tokens, state.target, state.length)
    text, length = append(state.text, tokens, state.length, count), state.length + count
    caches = move_on(target, caches, state.length, length)
    return replace(state, target=caches, length=length, text=text), h


def prefill_draft(
    target: Decoder,
    draft: Decoder,
    state: State,
    tokens: Int[Array, "batch chunk"],
    count: Int[Array, " batch"],
) -> State:
    """Append a chunk of each row's prompt to the draft's caches, exactly.

    Args:
        target: The target; like the draft, given to every step and not needed here.
        draft: The draft.
        state: Rows whose earlier prompt chunks are already in the draft's caches.
        tokens: As for append_chunk(), like count.
    """
    draft_length = state.draft_length + count
    caches = draft(tokens, state.draft, state.draft_length)[1]
    caches = move_on(draft, caches, state.draft_length, draft_length)
    return replace(state, draft=caches, draft_length=draft_length)


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

    The draft reads prompts by prefill_draft(), for which no first token needs to wait.

    Args:
        target: The target.
        draft: The draft or None, given to every step and not needed here.
        state: As for append_chunk().
        tokens: As for append_chunk(). If config.kinds.prompt_logprobs, one column more: each row's
            prompt token after the chunk, if there is one.
        count: As for append_chunk().
        last: Whether the row's prompt ends with this chunk.
        config: The round's configuration.

    Returns:
        The new state; and a report with the first token of rows whose prompt ends here. That token
        belongs to no round. Other rows report no token.
    """
    following = of_prompt = None
    if config.kinds.prompt_logprobs:
        tokens, following = tokens[:, :-1], tokens[:, 1:]
    appended, every_h = append_chunk(target, state, tokens, count)
    if following is not None:
        of_prompt = (prompt_logprobs(target.logits, every_h, following, ALL_AXES),)
    h = take_each(every_h, _end(count))
    tree = bare_root(take_each(tokens, _end(count)))

    def choose() -> Verified:
        logits = target.logits(h[:, None])  # after the prompt's last token: [batch, 1, ids]
        return _decide(logits, tree, appended.length, state, config, 0)

    # Most chunks of a long prompt end no row's, and need not be multiplied by the whole vocabulary.
    # All devices have the same `last` and so take the same branch, in which they may communicate.
    nothing = jax.tree.map(jnp.zeros_like, jax.eval_shape(choose))
    verdict, logprobs = jax.lax.cond(jnp.any(last), choose, lambda: nothing)
    live = last & (state.remaining > 0)
    report, remaining, _ = accept(verdict, _nothing(tree), state, live, config, 0)
    appended = replace(
        appended,
        remaining=remaining,
        text=append(appended.text, report.tokens, appended.length, last.astype(jnp.int32)),
        adjustments=with_output(state.adjustments, report.tokens, report.num_tokens),
    )
    return appended, report._replace(logprobs=logprobs, prompt=of_prompt)


def catch_up(
    target: Decoder,
    draft: Decoder,
    state: State,
    finished: Bool[Array, ""],
    config: RoundConfig,
) -> State:
    """Run the draft over what it lacks, until a round that drafts can take in the rest.

    Rounds without the draft leave it behind. Where they have not, nothing is run.

    Args:
        target: The target; like the draft, given to every step and not needed here.
        draft: The draft.
        state: Rows whose prompts are in the caches.
        finished: Whether rows that are finished catch up, too, so that what they hold can be kept.
        config: The configuration of rounds that draft.
    """

    def behind(draft_length: Int[Array, " batch"]) -> Bool[Array, " batch"]:
        lacking = state.length + 1 - draft_length
        return (finished | (state.remaining > 0)) & (lacking > config.pending_size)

    def run_chunk(carry: tuple[Caches, Array]) -> tuple[Caches, Array]:
        caches, draft_length = carry
        tokens = replace(state, draft_length=draft_length).pending(config.catch_up_size)
        caches = draft(tokens, caches, draft_length)[1]
        # The root is left to the round, which needs the draft's hidden state there.
        end = jnp.minimum(draft_length + config.catch_up_size, state.length)
        end = jnp.where(behind(draft_length), end, draft_length)
        return move_on(draft, caches, draft_length, end), end

    caches, draft_length = jax.lax.while_loop(
        lambda carry: jnp.any(behind(carry[1])), run_chunk, (state.draft, state.draft_length)
    )
    return replace(state, draft=caches, draft_length=draft_length)


def speculative_round(
    target: Decoder,
    draft: Decoder | None,
    state: State,
    config: RoundConfig,
    *,
    shortens: bool = False,
) -> tuple[State, Report]:
    """Run one round: draft, verify and commit up to config.depth + 1 tokens per row.

    The method is EasySpec (arXiv 2502.02493). Without a draft, a round is a step of plain decoding.

    Args:
        target: The target.
        draft: The draft, or None.
        state: Rows whose prompts are in the caches.
        config: The round's configuration.
        shortens: Whether to verify the draft model's nodes alone where lookups add none.

    Returns:
        The state after the round, and what the round added to each row.
    """
    live = state.remaining > 0
    draft_caches = state.draft
    forced = None
    ahead = state
    if config.forced:
        forced = _forced(state, config)
        ahead = _run_ahead(state, forced)
    if draft is not None and config.levels > 0:
        drafted, draft_caches = _draft(draft, ahead.root, ahead, config)
    elif config.lookup is not None:
        drafted = _draft_by_lookup(ahead.root, ahead, config)
    else:
        drafted = _nothing(bare_root(ahead.root))
    if forced is not None:
        tree = hang(drafted.tree, state.root, forced.tokens, forced.num_tokens)
        drafted = drafted._replace(tree=tree, forced=forced.num_tokens)
    (verdict, logprobs), target_caches = _verify(target, drafted, live, state, config, shortens)
    report, remaining, path = accept(verdict, drafted, state, live, config, config.depth)
    report = report._replace(logprobs=logprobs)
    verified = replace(state, target=target_caches, draft=draft_caches, remaining=remaining)
    moved = move_path(target, draft, verified, drafted.tree, path, config)
    return commit(target, draft, moved, report, live, config), report


def _nothing(tree: Tree) -> Drafted:
    """Return what plain decoding verifies: bare roots."""
    zero = jnp.zeros(tree.tokens.shape[:1], jnp.int32)
    return Drafted(tree, zero, jnp.ones(zero.shape, bool))


def _forced(state: State, config: RoundConfig) -> Forced:
    """Find what each row's grammar forces, up to the last token but one of the text's limit."""
    assert state.adjustments is not None
    assert state.adjustments.grammar is not None
    assert config.grammars is not None
    found = forced_tokens(state.adjustments.grammar, config.forced, config.grammars)
    return found._replace(num_tokens=jnp.clip(state.remaining - 1, 0, found.num_tokens))


def _run_ahead(state: State, forced: Forced) -> State:
    """Return the state from which a round drafts: the texts go on with what is forced.

    The draft takes it in with all else that it lacks, and the target verifies it with the draft.
    """
    return replace(
        state,
        length=state.length + forced.num_tokens,
        text=append(state.text, forced.tokens, state.length + 1, forced.num_tokens),
        adjustments=with_forced(state.adjustments, forced),
    )


def _look_up(state: State, config: RoundConfig) -> Found:
    """Find what followed the last tokens of each text where they stood before."""
    assert config.lookup is not None
    return find(state.text, state.length, config.lookup, config.levels, state.corpus)


def _draft_by_lookup(root: Int[Array, " batch"], state: State, config: RoundConfig) -> Drafted:
    """Draft a chain where a text repeats, and nothing elsewhere."""
    found = _look_up(state, config)
    exists = found.matched > 0
    tree = sure_chain(root, found.tokens, exists)
    levels = jnp.where(exists, config.levels, 0)
    return Drafted(tree, levels, jnp.ones(root.shape, bool), looked_up=_tokens(found))


def _tokens(found: Found) -> Int[Array, "batch levels"]:
    """Return what was found, and NO_TOKEN elsewhere."""
    return jnp.where(found.matched[:, None] > 0, found.tokens, NO_TOKEN)


def _verify(
    target: Decoder,
    drafted: Drafted,
    live: Bool[Array, " batch"],
    state: State,
    config: RoundConfig,
    shortens: bool,
) -> tuple[Verified, Caches]:
    """Run the target over all drafts, and decide how far each text follows its own."""

    def over(tree: Tree, found: tuple[Any, Caches]) -> tuple[Verified, Caches]:
        logits, caches = _score(target, tree, found[1], state.length, config)
        return _decide(logits, tree, state.length + 1, state, config, config.depth), caches

    tree = drafted.tree
    has_fewer = config.lookup is not None and (shortens or not config.grafts)
    if not has_fewer or config.rows is not None:
        return over(tree, (None, state.target))
    shapes = jax.eval_shape(partial(over, tree), (None, state.target))[0]
    found = jax.tree.map(jnp.zeros_like, shapes), state.target
    # Where lookups add nothing for any live row, the pass is that of a round without lookups, at
    # its cost: over the draft model's nodes, which come first, or over the roots alone. All
    # devices agree, so the passes may communicate.
    few = 1 + config.verified - config.levels if config.grafts else 1
    some = jnp.any(tree.exists[:, few:] & live[:, None])
    found = run_if(some, partial(over, tree), found)
    return run_if(~some, partial(over, first_nodes(tree, few)), found)


def _decide(
    logits: Float[Array, "batch nodes vocab_shard"],
    tree: Tree,
    position: Int[Array, " batch"],
    state: State,
    config: RoundConfig,
    levels: int,
) -> Verified:
    """Let the verifier decide by the target's logits, changed as each row asks.

    position: that of the token after the root. levels: how many the tree has at most.
    """
    changed = logits
    if state.adjustments is not None:
        after = position[:, None] + tree.depth
        tokens = drafted_tokens(tree, levels)
        changed = adjust(
            *(logits, after, tokens, state.adjustments, config.stop_ids, ALL_AXES),
            config.grammars,
        )
    verdict = config.verifier.verify(changed, tree, position, state.request)
    if not config.kinds.logprobs:
        return Verified(verdict, None)
    tokens, path, _ = followed(verdict, tree, levels)
    # Column j of the new tokens was chosen by the logits after the path's node of depth j.
    chosen_by = jnp.take_along_axis(logits, path[:, :, None], axis=1)
    return Verified(verdict, logprobs_of(chosen_by, tokens, ALL_AXES))


def _draft(
    draft: Decoder, root: Int[Array, " batch"], state: State, config: RoundConfig
) -> tuple[Drafted, Caches]:
    """Catch up on the pending tokens, then grow a tree from the last one's hidden state."""
    # Calibration is this very pass: run exactly, it replaces what drafting wrote for these tokens.
    # Without calibration it is a fuzzy pass like those of drafting, over one or two tokens.
    h, caches = draft(
        state.pending(config.pending_size + config.forced),
        state.draft,
        state.draft_length,
        run_exact if config.calibration else run_fuzzy,
    )
    # The root is the last of them: [batch, pending, hidden] -> [batch, hidden].
    h = take_each(h, state.length - state.draft_length)

    def grow(
        caches: Caches, live: Bool[Array, " batch"]
    ) -> tuple[Tree, Float[Array, "batch levels"] | None, Caches]:
        return draft_tree(
            draft,
            h,
            caches,
            root,
            state.length,
            state.request,
            config,
            _for_draft(draft, state),
            live,
            state.threshold,
            state.draft_length,
        )

    if not config.grafts:
        tree, confidence, caches = grow(caches, state.remaining > 0)
        levels, is_finite = _levels(tree, config), _is_finite(tree)
        drafted = Drafted(_pruned(tree, config), levels, is_finite, confidence=confidence)
        return drafted, caches
    # Rows that match as far as is compared need no other draft: what follows there is all but
    # certain. Passes are skipped where that holds for all rows, and a row has the same draft
    # whether or not they are.
    found = _look_up(state, config)
    wanted = ~found.is_long & (state.remaining > 0)
    like, confidence, _ = jax.eval_shape(grow, caches, wanted)
    # Where nothing is drafted, nothing is confident.
    nothing = without_nodes(like, root), jax.tree.map(jnp.zeros_like, confidence), caches
    tree, confidence, caches = run_if(
        jnp.any(wanted), lambda drafted: grow(drafted[-1], wanted), nothing
    )
    if confidence is not None:
        confidence = jnp.where(found.is_long[:, None], 0.0, confidence)
    is_finite = _is_finite(tree) | found.is_long
    tree = _pruned(tree, config)
    tree = jax.tree.map(partial(_choose, found.is_long), without_nodes(tree, root), tree)
    tree = graft(tree, found.tokens, found.matched > 0)
    levels, tokens = _levels(tree, config), _tokens(found)
    return Drafted(tree, levels, is_finite, confidence=confidence, looked_up=tokens), caches


def _for_draft(draft: Decoder, state: State) -> RowAdjustments | None:
    """Return the rows' changes to logits over the ids that this device's draft has."""
    if state.adjustments is None or draft.axes:
        return state.adjustments
    return whole(state.adjustments)


def _levels(tree: Tree, config: RoundConfig) -> Int[Array, " batch"]:
    """Return how many levels each row has drafted."""
    if not config.ends_early:
        return jnp.full(tree.tokens.shape[:1], config.levels, jnp.int32)
    return jnp.max(jnp.where(tree.exists, tree.depth, 0), axis=1)


def _is_finite(tree: Tree) -> Bool[Array, " batch"]:
    """Return whether the draft's probabilities in each row's tree are finite."""
    # Logits that are not finite make no probabilities. Nodes that do not exist may have any q.
    finite = jnp.isfinite(tree.q) | jnp.isneginf(tree.score)[:, :, None]
    return jnp.all(finite, axis=(1, 2))


def _pruned(tree: Tree, config: RoundConfig) -> Tree:
    return tree if config.nodes is None else prune(tree, config.nodes)


def _score(
    target: Decoder,
    tree: Tree,
    caches: Caches,
    position: Int[Array, " batch"],
    config: RoundConfig,
) -> tuple[Float[Array, "batch nodes vocab_shard"], Caches]:
    """Run the target over a tree; return the logits after each node, and the caches."""
    if config.rows is None:
        nodes = Nodes(position, position, tree.depth, tree.ancestors)
        h, caches = target(tree.tokens, caches, nodes)
        return target.logits(h), caches
    # Products of one row and of several are computed by different kernels, which round differently.
    # So a chain is filled up to a fixed number of rows; what comes after a token does not reach it.
    drafted = tree.tokens.shape[1]
    tokens = jnp.pad(tree.tokens, ((0, 0), (0, config.rows - drafted)))
    h, caches = target(tokens, caches, position)
    return target.logits(h)[:, :drafted], caches


def _choose(rows: Bool[Array, " batch"], x: Array, y: Array) -> Array:
    """Take some rows from x, the others from y; arrays are [batch, ...]."""
    return jnp.where(rows.reshape(-1, *[1] * (x.ndim - 1)), x, y)


def _end(count: Int[Array, " batch"]) -> Int[Array, " batch"]:
    """Return the index of a chunk's last token; 0, which means nothing, where there is none."""
    return jnp.maximum(count - 1, 0)
