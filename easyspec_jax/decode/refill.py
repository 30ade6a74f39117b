"""Steps that change a running batch: rows that take new texts, and caches that grow.

Like a round, they are pure functions of the state that run inside `shard_map`.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from easyspec_jax.decode.round import Report, RoundConfig, State, prefill
from easyspec_jax.model.cache import extend, put_row, take_row
from easyspec_jax.model.transformer import Caches, Decoder
from easyspec_jax.verify import RowSampling


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Entrance:
    """A chunk of the prompt of a text that takes over a row; every field has one row.

    Attributes:
        tokens: Prompt tokens, padded to the chunk.
        start: Prompt tokens that came in earlier chunks.
        count: Tokens of this chunk.
        last: Whether the prompt ends with this chunk.
        limit: Tokens to generate.
        request: The text's noise and distribution.
    """

    tokens: Int[Array, "1 chunk"]
    start: Int[Array, "1"]
    count: Int[Array, "1"]
    last: Bool[Array, "1"]
    limit: Int[Array, "1"]
    request: RowSampling


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
        The new state, and a report of that one row.
    """
    batch = state.length.shape[0]
    is_first = text.start[0] == 0

    def take(caches: Caches) -> Caches:
        # The first chunk finds zeros. The mask gives old entries weight 0, but 0 times a NaN that
        # another text left behind would be a NaN.
        def clear(x: Array) -> Array:
            return jnp.where(is_first, jnp.zeros_like(x), x)

        return tuple(jax.tree.map(clear, take_row(cache, row, batch)) for cache in caches)

    def put(caches: Caches, new: Caches) -> Caches:
        pairs = zip(caches, new, strict=True)
        return tuple(put_row(cache, own, row, batch) for cache, own in pairs)

    # A prompt of several chunks: each continues at `start`, behind what the earlier ones wrote.
    alone = State(
        target=take(state.target),
        draft=take(state.draft),
        length=text.start,
        draft_length=text.start,
        pending=jnp.zeros((1, config.pending_size), jnp.int32),
        pending_count=jnp.zeros_like(text.start),
        remaining=text.limit,
        request=text.request,
    )
    alone, report = prefill(target, draft, alone, text.tokens, text.count, text.last, config)
    # Everything but the caches has rows in front, so one update serves all fields.
    entered = jax.tree.map(
        lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, row, axis=0),
        replace(state, target=(), draft=()),
        replace(alone, target=(), draft=()),
    )
    target_caches = put(state.target, alone.target)
    draft_caches = put(state.draft, alone.draft)
    return replace(entered, target=target_caches, draft=draft_caches), report


def extended(target: Decoder, draft: Decoder | None, state: State, capacity: int) -> State:
    """Return the state with larger caches.

    Args:
        target: The target; like the draft, given to every step and not needed here.
        draft: The draft.
        state: The state.
        capacity: The new capacity.
    """
    return replace(
        state,
        target=tuple(extend(cache, capacity) for cache in state.target),
        draft=tuple(extend(cache, capacity) for cache in state.draft),
    )
