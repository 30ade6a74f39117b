"""Changes to logits themselves, made before anything else: bans, least length, bias, penalties.

The distribution of the token after a node of a tree is warp(adjust(logits)). Every verifier, plain
decoding and the draft get adjusted logits, so none of them knows about these options. The order is
vLLM's: what a grammar forbids, bad words and stop tokens are masked, biases are added, and
penalties are applied.

adjustments.py has the arrays that say what each row asks for.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from easyspec_jax.parallel.mesh import ALL_AXES, Axes
from easyspec_jax.sampling.adjustments import ANY_TOKEN, BadWords, Penalties, RowAdjustments, Stops
from easyspec_jax.sampling.grammar import Grammars
from easyspec_jax.sampling.grammar_rows import Forced, within_grammar
from easyspec_jax.sampling.vocabulary import NO_CHOICE, NO_TOKEN, local_ids


def whole(rows: RowAdjustments) -> RowAdjustments:
    """Collect every device's part of the vocabulary, for a draft that each device has whole."""
    gather = partial(jax.lax.all_gather, axis_name=ALL_AXES, axis=1, tiled=True)
    if rows.bias is not None:
        rows = replace(rows, bias=gather(rows.bias))
    if (own := rows.penalties) is not None:
        gathered = replace(own, prompted=gather(own.prompted), counts=gather(own.counts))
        rows = replace(rows, penalties=gathered)
    return rows


def adjust(
    logits: Float[Array, "batch nodes vocab_shard"],
    position: Int[Array, "batch nodes"],
    drafted: Int[Array, "batch nodes levels"],
    rows: RowAdjustments,
    stop_ids: tuple[int, ...],
    axes: Axes,
    grammars: Grammars | None = None,
) -> Float[Array, "batch nodes vocab_shard"]:
    """Change logits as each row asks.

    Args:
        logits: A model's logits after each node.
        position: Absolute position of the token after each node.
        drafted: Tokens of the path from the root, itself not counted, to each node, and NO_TOKEN.
            They belong to the output that the node's penalties are for.
        rows: Each row's changes, split over the same axes.
        stop_ids: The checkpoint's stop tokens.
        axes: Mesh axes that split the vocabulary.
        grammars: The grammars that rows have by number; None if there are none.

    Returns:
        The logits whose warped distribution is the target's.

    Examples:
        >>> from easyspec_jax.options import SamplingParams
        >>> from easyspec_jax.sampling.adjustments import Kinds, row_adjustments
        >>> sampling = SamplingParams(logit_bias={2: 1.5}, min_new_tokens=1)
        >>> rows = row_adjustments(Kinds.of(sampling), sampling, [[5, 6]], vocab=4)
        >>> rows = jax.tree.map(jnp.asarray, rows)
        >>> nodes = jnp.array([[2, 3]]), jnp.array([[[-1], [3]]])
        >>> adjust(jnp.zeros((1, 2, 4)), *nodes, rows, stop_ids=(0,), axes=())[0].tolist()
        [[-inf, 0.0, 1.5, 0.0], [0.0, 0.0, 1.5, 0.0]]
    """
    if rows.grammar is not None and grammars is not None:
        logits = within_grammar(logits, drafted, rows.grammar, axes, grammars)
    if rows.bad_words is not None:
        logits = _without_bad_words(logits, drafted, rows.bad_words, axes)
    if rows.stops is not None:
        early = position < rows.stops.earliest[:, None]
        is_stop = _stop_mask(rows.stops, stop_ids, logits.shape[-1], axes)
        masked = early[:, :, None] & is_stop[:, None, :]
        logits = jnp.where(masked, -jnp.inf, logits)
    if rows.bias is not None:
        logits = logits + rows.bias[:, None, :]
    if rows.penalties is not None:
        logits = _penalised(logits, drafted, rows.penalties, axes)
    return logits


def _without_bad_words(
    logits: Float[Array, "batch nodes vocab_shard"],
    drafted: Int[Array, "batch nodes levels"],
    words: BadWords,
    axes: Axes,
) -> Float[Array, "batch nodes vocab_shard"]:
    """Mask the last token of each word whose other tokens the output ends with."""
    context = _last_tokens(drafted, words.output)
    before = words.before[:, None]  # [batch, 1, words, length]
    fits = (before == ANY_TOKEN) | (before == context[:, :, None, :])
    banned = jnp.where(jnp.all(fits, axis=3), words.last[:, None, :], NO_TOKEN)
    local = local_ids(banned, logits.shape[-1], axes)
    mask = jnp.vectorize(
        lambda row, places: row.at[places].set(-jnp.inf, mode="drop"), signature="(v),(w)->(v)"
    )
    return mask(logits, local)


def _last_tokens(
    drafted: Int[Array, "batch nodes levels"], output: Int[Array, "batch length"]
) -> Int[Array, "batch nodes length"]:
    """Continue an output, written from its end back, by each node's path: its last tokens."""
    # Path "7 6 -" of a node of depth 2 and output "5 4 3" give "7 6 5": the first two columns of
    # the path, and then those of the output.
    levels, length = drafted.shape[2], output.shape[1]
    behind = jnp.broadcast_to(output[:, None, :], (*drafted.shape[:2], length))
    both = jnp.concatenate([drafted, behind], axis=2)
    depth = jnp.sum(drafted != NO_TOKEN, axis=2, dtype=jnp.int32)[:, :, None]
    column = jnp.arange(length, dtype=jnp.int32)[None, None, :]
    column = jnp.where(column < depth, column, levels + column - depth)
    return jnp.take_along_axis(both, column, axis=2)


def _penalised(
    logits: Float[Array, "batch nodes vocab_shard"],
    drafted: Int[Array, "batch nodes levels"],
    rows: Penalties,
    axes: Axes,
) -> Float[Array, "batch nodes vocab_shard"]:
    """Apply penalties for the text and for each node's own path."""
    counts = jnp.broadcast_to(rows.counts[:, None, :], logits.shape)
    # A path adds its few tokens to the counts of the text. With a text "a b a" and paths of a chain
    #   node        root   c      c a
    #   counts of a  2     2      3
    #   counts of c  0     1      1
    counts = _add_at(counts, drafted, axes)
    is_said = counts > 0
    is_repeated = is_said | rows.prompted[:, None, :]
    factor = jnp.where(is_repeated, rows.repetition[:, None, None], 1.0)
    logits = jnp.where(logits > 0, logits / factor, logits * factor)
    logits = logits - rows.frequency[:, None, None] * counts.astype(jnp.float32)
    return logits - jnp.where(is_said, rows.presence[:, None, None], 0.0)


def _add_at(
    counts: Int[Array, "*rows vocab_shard"], ids: Int[Array, "*rows some"], axes: Axes
) -> Int[Array, "*rows vocab_shard"]:
    """Count ids, on whichever shard holds them; NO_TOKEN is dropped."""
    if ids.shape[-1] == 0:
        return counts
    local = local_ids(ids, counts.shape[-1], axes)
    add = jnp.vectorize(
        lambda row, places: row.at[places].add(1, mode="drop"), signature="(v),(i)->(v)"
    )
    return add(counts, local)


def with_output(
    rows: RowAdjustments | None, tokens: Int[Array, "batch some"], num_tokens: Int[Array, " batch"]
) -> RowAdjustments | None:
    """Count new tokens of each row's output.

    Args:
        rows: Each row's changes, or None.
        tokens: New tokens; only the first `num_tokens` count.
        num_tokens: How many there are.
    """
    if rows is None or (rows.penalties is None and rows.bad_words is None and rows.grammar is None):
        return rows
    columns = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
    new = jnp.where(columns < num_tokens[:, None], tokens, NO_TOKEN)
    if rows.penalties is not None:
        counts = _add_at(rows.penalties.counts, new, ALL_AXES)
        rows = replace(rows, penalties=replace(rows.penalties, counts=counts))
    if rows.bad_words is not None:
        # From the end back, the new tokens are a path like a node's: "6 7 -" -> "7 6 -".
        back = jnp.maximum(num_tokens[:, None] - 1 - columns, 0)
        path = jnp.where(new != NO_TOKEN, jnp.take_along_axis(new, back, axis=1), NO_TOKEN)
        output = _last_tokens(path[:, None, :], rows.bad_words.output)[:, 0]
        rows = replace(rows, bad_words=replace(rows.bad_words, output=output))
    if (own := rows.grammar) is not None:
        rows = replace(rows, grammar=own.with_output(new, num_tokens))
    return rows


def with_forced(rows: RowAdjustments | None, forced: Forced) -> RowAdjustments | None:
    """Count forced tokens as output, though no pass of the target has verified them yet."""
    rows = with_output(rows, forced.tokens, forced.num_tokens)
    if rows is None or rows.grammar is None:
        return rows
    return replace(rows, grammar=replace(rows.grammar, ahead=forced.num_tokens))


def _stop_mask(
    stops: Stops, stop_ids: tuple[int, ...], size: int, axes: Axes
) -> Bool[Array, "batch vocab_shard"]:
    """Mark the ids of this shard that min_new_tokens keeps away: also an eos that is ignored."""
    batch = stops.ids.shape[0]
    eos = jnp.broadcast_to(jnp.asarray(stop_ids, jnp.int32), (batch, len(stop_ids)))
    local = local_ids(jnp.concatenate([stops.ids, eos], axis=1), size, axes)
    none = jnp.zeros((batch, size), bool)
    return jax.vmap(lambda row, ids: row.at[ids].set(True, mode="drop"))(none, local)


def ends_text(
    tokens: Int[Array, "batch tokens"], rows: RowAdjustments | None, stop_ids: tuple[int, ...]
) -> Bool[Array, "batch tokens"]:
    """Find the tokens that end their row's text; NO_CHOICE always does.

    Args:
        tokens: Token ids.
        rows: Each row's changes; None for none.
        stop_ids: The checkpoint's stop tokens.
    """
    ends = jnp.isin(tokens, jnp.asarray((*stop_ids, NO_CHOICE), jnp.int32))
    if rows is None or rows.stops is None:
        return ends
    own = jnp.any(tokens[:, :, None] == rows.stops.ids[:, None, :], axis=2)
    return (ends & ~rows.stops.ignore_eos[:, None]) | own | (tokens == NO_CHOICE)
