"""Steps that change a running batch: rows that take new texts, and caches that grow.

Rows may also be copied out of the caches, and come back as the beginning of another text.

Like a round, they are pure functions of the state that run inside `shard_map`.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from easyspec_jax.decode.lookup import Text
from easyspec_jax.decode.round import prefill
from easyspec_jax.decode.state import Report, RoundConfig, State
from easyspec_jax.decode.window_caches import beginning, move_on
from easyspec_jax.model.cache import extend, put_row, take_row
from easyspec_jax.model.transformer import Caches, Decoder
from easyspec_jax.sampling.adjustments import RowAdjustments
from easyspec_jax.verify import RowSampling


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Entrance:
    """A chunk of the prompt of a text that takes over a row; every field has one row.

    Attributes:
        tokens: Prompt tokens, padded to the chunk; see round.prefill.
        start: Prompt tokens that are in the caches: earlier chunks, or a prefix that was restored.
        count: Tokens of this chunk.
        last: Whether the prompt ends with this chunk.
        limit: Tokens to generate.
        request: The text's noise and distribution.
        adjustments: Its changes to logits.
    """

    tokens: Int[Array, "1 chunk"]
    start: Int[Array, "1"]
    count: Int[Array, "1"]
    last: Bool[Array, "1"]
    limit: Int[Array, "1"]
    request: RowSampling
    adjustments: RowAdjustments | None = None


def enter(
    target: Decoder,
    draft: Decoder | None,
    state: State,
    row: Int[Array, ""],
    text: Entrance,
    config: RoundConfig,
) -> tuple[State, Report]:
    """Run prefill() for one row, whatever text it had; the others keep their state.

    The row is taken out as a batch of one, which prefill() works on, and put back.

    Args:
        target: The target.
        draft: The draft, or None.
        state: The running batch.
        row: The row to take over.
        text: A chunk of the new text's prompt.
        config: The round's configuration.

    Returns:
        The new state, and a report of that one row. The draft has none of the chunk yet.
    """
    # A prompt of several chunks: each continues at `start`, behind what is in the caches.
    alone = State(
        target=_taken(state.target, row, state.length.shape[0], text.start),
        draft=(),
        length=text.start,
        draft_length=text.start,
        remaining=text.limit,
        request=text.request,
        text=_row(state.text, row),
        adjustments=text.adjustments,
    )
    alone, report = prefill(target, draft, alone, text.tokens, text.count, text.last, config)
    # Everything but the caches and what all rows share has rows in front, so one update serves all.
    entered = jax.tree.map(
        lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, row, axis=0),
        replace(state, target=(), draft=(), corpus=None, threshold=None),
        replace(alone, target=()),
    )
    caches = _put(state.target, alone.target, row, state.length.shape[0])
    entered = replace(entered, target=caches, draft=state.draft)
    return replace(entered, corpus=state.corpus, threshold=state.threshold), report


def enter_draft(
    target: Decoder,
    draft: Decoder,
    state: State,
    row: Int[Array, ""],
    tokens: Int[Array, "1 chunk"],
    start: Int[Array, "1"],
    count: Int[Array, "1"],
) -> State:
    """Run prefill_draft() for one row; the others keep their state.

    Args:
        target: The target; like the draft, given to every step and not needed here.
        draft: The draft.
        state: The running batch.
        row: The row that a text has taken over.
        tokens: A chunk of its prompt; see Entrance, like start and count.
    """
    batch = state.length.shape[0]
    caches = draft(tokens, _taken(state.draft, row, batch, start), start)[1]
    caches = move_on(draft, caches, start, start + count)
    return replace(
        state,
        draft=_put(state.draft, caches, row, batch),
        draft_length=state.draft_length.at[row].set((start + count)[0]),
    )


def stopped(remaining: Int[Array, " batch"], row: Int[Array, ""]) -> Int[Array, " batch"]:
    """Return how many tokens each row may still generate, with 0 for one row.

    Examples:
        >>> stopped(jnp.array([5, 7]), jnp.array(1)).tolist()
        [5, 0]
    """
    return remaining.at[row].set(0)


def _taken(caches: Caches, row: Int[Array, ""], batch: int, start: Int[Array, "1"]) -> Caches:
    """Take out a row that a text enters, as a batch of one.

    Args:
        caches: Caches of all rows.
        row: The row.
        batch: How many rows there are.
        start: Tokens of the text that are in the caches.
    """

    # The first chunk finds zeros, or a prefix and zeros (see restored). The mask gives old entries
    # weight 0, but 0 times a NaN that another text left behind would be a NaN.
    def clear(x: Array) -> Array:
        return jnp.where(start[0] == 0, jnp.zeros_like(x), x)

    return tuple(jax.tree.map(clear, take_row(cache, row, batch)) for cache in caches)


def _put(caches: Caches, new: Caches, row: Int[Array, ""], batch: int) -> Caches:
    """Put a row back that _taken() took out."""
    pairs = zip(caches, new, strict=True)
    return tuple(put_row(cache, own, row, batch) for cache, own in pairs)


class RowCaches(NamedTuple):
    """Both models' caches of one row, as of a batch of one, cut to their first entries.

    Attributes:
        target: The target's caches.
        draft: The draft's.
        text: The row's tokens; see State.
    """

    target: Caches
    draft: Caches
    text: Text


def copied(state: State, row: Int[Array, ""], size: int) -> RowCaches:
    """Copy the first entries of a row's caches.

    Args:
        state: The state.
        row: The row.
        size: How many entries.
    """
    batch = state.length.shape[0]

    def copy(caches: Caches) -> Caches:
        rows = (take_row(cache, row, batch) for cache in caches)
        return tuple(jax.tree.map(lambda x: x[..., :size, :], own) for own in rows)

    return RowCaches(copy(state.target), copy(state.draft), _row(state.text, row)[:, :size])


def restored(
    target: Decoder,
    draft: Decoder | None,
    state: State,
    row: Int[Array, ""],
    kept: RowCaches,
    count: Int[Array, ""],
) -> State:
    """Return the state with a row whose text begins with the first tokens of another.

    The row holds these tokens and is to prefill the rest; everything else of it stays.

    Args:
        target: The target.
        draft: The draft, or None.
        state: The state; its caches have room for the tokens.
        row: The row.
        kept: What copied() returned of the other text.
        count: How many tokens they share. Where caches keep only a window, those are all tokens
            that the other text had when it was copied.
    """
    batch = state.length.shape[0]

    def put(model: Decoder | None, caches: Caches, kept: Caches) -> Caches:
        if model is None:
            return caches
        # Zeros behind the shared tokens take the place of whatever the row had there.
        own = beginning(model, kept, count, [cache.capacity for cache in caches])
        return _put(caches, own, row, batch)

    capacity = state.text.shape[1]
    # Tokens behind `length` mean nothing, so as many as there are may come back.
    text = _padded(kept.text[:, :capacity], capacity)
    return replace(
        state,
        target=put(target, state.target, kept.target),
        draft=put(draft, state.draft, kept.draft),
        length=state.length.at[row].set(count),
        draft_length=state.draft_length.at[row].set(count),
        text=jax.lax.dynamic_update_slice_in_dim(state.text, text, row, axis=0),
    )


def extended(target: Decoder, draft: Decoder | None, state: State, capacity: int) -> State:
    """Return the state with larger caches.

    Args:
        target: The target.
        draft: The draft, or None.
        state: The state.
        capacity: The new capacity, where caches keep everything.
    """
    return replace(
        state,
        target=tuple(map(extend, state.target, target.capacities(capacity))),
        draft=() if draft is None else tuple(map(extend, state.draft, draft.capacities(capacity))),
        text=_padded(state.text, capacity),
    )


def _row(x: Int[Array, "batch capacity"], row: Int[Array, ""]) -> Int[Array, "1 capacity"]:
    """Take out a row."""
    return jax.lax.dynamic_slice_in_dim(x, row, 1, axis=0)


def _padded(x: Int[Array, "rows some"], capacity: int) -> Int[Array, "rows capacity"]:
    """Add zeros behind each row."""
    return jnp.pad(x, ((0, 0), (0, capacity - x.shape[1])))
