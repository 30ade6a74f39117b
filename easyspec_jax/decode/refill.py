"""A running batch whose rows take new texts, and whose caches grow: pure functions of the state, like a round."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from easyspec_jax.decode.round import Report, RoundConfig, State, prefill
from easyspec_jax.model.cache import KVCache, extend, put_row, take_row
from easyspec_jax.model.transformer import Caches, Decoder
from easyspec_jax.verify import RowSampling


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Entrance:
    """A chunk of the prompt of a text that takes a row over, behind `start` tokens of it; every field is of one row.

    limit, request: the text's own; count, last: as for prefill().
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
    """prefill() of one row, whatever text it had, while the others rest; the report is of that row alone."""
    batch = state.length.shape[0]
    first = text.start[0] == 0

    def own(cache: KVCache) -> KVCache:
        # Masked entries weigh nothing, but nothing times a NaN that another text left is a NaN.
        return jax.tree.map(
            lambda x: jnp.where(first, jnp.zeros_like(x), x), take_row(cache, row, batch)
        )

    alone = State(
        target=tuple(map(own, state.target)),
        draft=tuple(map(own, state.draft)),
        length=text.start,
        draft_length=text.start,
        pending=jnp.zeros((1, config.pending_size), jnp.int32),
        pending_count=jnp.zeros_like(text.start),
        remaining=text.limit,
        request=text.request,
    )
    alone, report = prefill(target, draft, alone, text.tokens, text.count, text.last, config)

    def put(caches: Caches, new: Caches) -> Caches:
        return tuple(put_row(*pair, row, batch) for pair in zip(caches, new, strict=True))

    entered = jax.tree.map(
        lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, row, axis=0),
        replace(state, target=(), draft=()),
        replace(alone, target=(), draft=()),
    )
    caches = put(state.target, alone.target), put(state.draft, alone.draft)
    return replace(entered, target=caches[0], draft=caches[1]), report


def extended(target: Decoder, draft: Decoder | None, state: State, capacity: int) -> State:
    """The state with larger caches."""
    of_target, of_draft = (
        tuple(extend(cache, capacity) for cache in caches) for caches in (state.target, state.draft)
    )
    return replace(state, target=of_target, draft=of_draft)
