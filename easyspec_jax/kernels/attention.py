"""Attention over caches with split keys: partial results of stretches of keys, then one sum.

A step of one token has few queries, so one program for each key head would leave most of a GPU
idle. The keys are therefore split among programs (flash-decoding): each mixes the values of its own
stretch, and a second kernel weighs these mixtures by their softmax denominators.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float, Int

from easyspec_jax.arithmetic import power_of_two
from easyspec_jax.kernels.tiles import (
    estimate,
    row_tile,
    span,
    times,
    times_transposed,
    triton,
)

MAX_SPLITS = 32
"""Stretches at most that the keys of one head are cut into."""

PROGRAMS = 256
"""Programs that fill a GPU; keys are split until there are about as many."""

STAGE_BYTES = 2**14
"""Bytes of keys, and of values, that a program loads at a time."""

COMBINED = 8192
"""Numbers of partial results that a program sums."""

LOWEST = np.float32(-1e30)
"""Score of an entry that is masked; finite, because -inf minus -inf is NaN."""


def attend(
    q: Float[Array, "slots batch_heads group_tokens head_dim"],
    k: Float[Array, "more_slots batch_heads capacity head_dim"],
    v: Float[Array, "more_slots batch_heads capacity head_dim"],
    mask: Bool[Array, "batch tokens capacity"],
    *,
    slot: int = 0,
    splits: int | None = None,
    interpret: bool = False,
) -> Float[Array, "slots batch tokens queries_dim"]:
    """Mix values by the softmax of masked scores.

    Keys before the first and past the last entry that any token of a row may read are not loaded;
    the others are loaded once for all queries of their group, if these are 64 at most.

    Args:
        q: Rotated queries, those of one key head next to each other; see project_and_write().
        k: Keys.
        v: Values.
        mask: `mask[b, t, s]` says that token t of row b may read entry s, in every slot.
        slot: Slot of k and v that belongs to the first of q, so that none has to be cut out.
        splits: Stretches of keys, a power of two; by default as many as fill a GPU.
        interpret: Run in Pallas' interpreter, on any platform.

    Returns:
        Mixtures in q's dtype, a token's heads side by side.
    """
    (slots, heads, queries, head_dim), (batch, tokens, capacity) = q.shape, mask.shape
    rows = row_tile(queries, 64 if head_dim <= 128 else 32)
    grid = heads, slots, pl.cdiv(queries, rows)
    # head_dim 64, 128 and 256 in bfloat16: 64, 64 and 32 entries at a time.
    entries = min(64, STAGE_BYTES // (head_dim * q.dtype.itemsize))
    splits = splits or _splits(slots * heads * grid[2], pl.cdiv(capacity, entries))
    shape = slots, batch, tokens, heads // batch * queries // tokens * head_dim
    mixed = jax.ShapeDtypeStruct(shape, q.dtype)
    partial_results = (
        jax.ShapeDtypeStruct((slots, heads, splits, queries, head_dim), jnp.float32),
        jax.ShapeDtypeStruct((slots, heads, splits, queries), jnp.float32),
    )
    own = jax.ShapeDtypeStruct((slots, *k.shape[1:]), k.dtype)
    call = partial(
        pl.pallas_call,
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
    )
    attended = call(
        partial(_attend, first=slot, rows=rows, entries=entries),
        name="attend",
        out_shape=mixed if splits == 1 else partial_results,
        grid=(splits, *grid),
        # Two products, and both caches of these slots up to their capacity.
        cost_estimate=estimate(4 * q.size * capacity, q, *2 * [own], mixed),
    )(q, k, v, mask, *_bounds(mask))
    if splits == 1:
        return attended
    rows = min(power_of_two(queries), max(COMBINED // (splits * head_dim), 1))
    return call(
        partial(_combine, rows=rows),
        name="combine",
        out_shape=mixed,
        cost_estimate=estimate(2 * partial_results[0].size, *partial_results, mixed),
        grid=(heads, slots, pl.cdiv(queries, rows)),
    )(*attended)


def _splits(programs: int, tiles: int) -> int:
    """Return how many stretches the keys of each program are cut into, a power of two.

    Args:
        programs: Programs of one stretch.
        tiles: Tiles of keys.

    Examples:
        >>> _splits(4 * 8, tiles=8), _splits(1 * 8, tiles=128), _splits(1 * 8, tiles=7)
        (8, 32, 4)
    """
    wanted = max(min(PROGRAMS // programs, tiles, MAX_SPLITS), 1)
    return power_of_two(wanted + 1) // 2


def _bounds(
    mask: Bool[Array, "batch tokens capacity"],
) -> tuple[Int[Array, " batch"], Int[Array, " batch"]]:
    """Return the first entry that any token of a row may read, and the one behind the last."""
    capacity = mask.shape[2]
    entries = jnp.arange(capacity, dtype=jnp.int32)[None, None, :]
    begin = jnp.min(jnp.where(mask, entries, capacity), axis=(1, 2))
    return begin, jnp.max(jnp.where(mask, entries + 1, 0), axis=(1, 2))


def _attend(
    q: Any,
    k: Any,
    v: Any,
    mask: Any,
    begin: Any,
    end: Any,
    *out: Any,
    first: int,
    rows: int,
    entries: int,
) -> None:
    """Attend with some queries of one key head to one stretch of its keys."""
    split, head, slot = (pl.program_id(axis) for axis in range(3))
    splits = pl.num_programs(0)
    (_, heads, queries, head_dim), (batches, tokens, _) = q.shape, mask.shape
    row, channel = span(pl.program_id(3), rows), span(0, head_dim)
    real = row < queries  # others are padding
    token, batch = jax.lax.rem(row, tokens), jax.lax.div(head, heads // batches)
    query = triton.load(
        q.at[slot, head, row[:, None], channel[None, :]], mask=real[:, None], other=0
    )
    last = end[batch]

    def step(index: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        best, total, mixed = carry
        entry = span(index, entries)
        inside = (entry < last)[:, None]
        place = first + slot, head, entry[:, None], channel[None, :]
        key = triton.load(k.at[place], mask=inside, other=0)
        readable = triton.load(
            mask.at[batch, token[:, None], entry[None, :]],
            mask=real[:, None] & (entry < last)[None, :],
            other=False,
        )
        scores = times_transposed(query, key) * np.float32(head_dim**-0.5)
        scores = jnp.where(readable, scores, LOWEST)
        # A higher score than any before shrinks all that has been summed so far.
        higher = jnp.maximum(best, jnp.max(scores, axis=1))
        shrink = jnp.exp(best - higher)
        weights = jnp.where(readable, jnp.exp(scores - higher[:, None]), np.float32(0))
        value = triton.load(v.at[place], mask=inside, other=0)
        mixed = mixed * shrink[:, None] + times(weights.astype(v.dtype), value)
        return higher, total * shrink + jnp.sum(weights, axis=1), mixed

    # Entries 100 to 363 are in tiles 1 to 5 of 64; 4 splits take 2, 2, 1 and 0 of them.
    skipped = jax.lax.div(begin[batch], entries)
    tiles = jax.lax.div(last + (entries - 1), entries)
    each = jax.lax.div(tiles - skipped + splits - 1, splits)
    nothing = jnp.full(rows, LOWEST), jnp.zeros(rows, jnp.float32)
    best, total, mixed = jax.lax.fori_loop(
        skipped + split * each,
        jnp.minimum(skipped + (split + 1) * each, tiles),
        step,
        (*nothing, jnp.zeros((rows, head_dim), jnp.float32)),
    )
    empty = total == 0
    mixed = mixed / jnp.where(empty, np.float32(1), total)[:, None]
    if len(out) == 1:
        _store(out[0], slot, head, heads, row, real, mixed)
        return
    partial_mixed, log_total = out
    triton.store(
        partial_mixed.at[slot, head, split, row[:, None], channel[None, :]],
        mixed,
        mask=real[:, None],
    )
    # The logarithm of the softmax's denominator is the weight of this stretch.
    weight = jnp.where(empty, LOWEST, best + jnp.log(jnp.where(empty, np.float32(1), total)))
    triton.store(log_total.at[slot, head, split, row], weight, mask=real)


def _combine(mixed: Any, log_total: Any, out: Any, *, rows: int) -> None:
    """Weigh the mixtures of all stretches of one key head, for some of its queries."""
    head, slot = pl.program_id(0), pl.program_id(1)
    _, heads, splits, queries, head_dim = mixed.shape
    row, split, channel = span(pl.program_id(2), rows), span(0, splits), span(0, head_dim)
    real = row < queries
    weight = triton.load(
        log_total.at[slot, head, split[:, None], row[None, :]], mask=real[None, :], other=LOWEST
    )
    weight = jnp.exp(weight - jnp.max(weight, axis=0)[None, :])
    weight = weight / jnp.sum(weight, axis=0)[None, :]
    place = slot, head, split[:, None, None], row[None, :, None], channel[None, None, :]
    parts = triton.load(mixed.at[place], mask=real[None, :, None], other=0)
    _store(out, slot, head, heads, row, real, jnp.sum(weight[:, :, None] * parts, axis=0))


def _store(
    out: Any,
    slot: Array,
    head: Array,
    heads: int,
    row: Int[Array, " rows"],
    real: Bool[Array, " rows"],
    mixed: Float[Array, "rows head_dim"],
) -> None:
    """Store some of a key head's queries, [group * tokens], at their tokens' places."""
    (_, batches, tokens, width), head_dim = out.shape, mixed.shape[1]
    kv_heads = heads // batches
    group = width // (kv_heads * head_dim)
    # Query 1 of key head 2 with groups of 4 is head 9: channels 9 * head_dim and on.
    query = jax.lax.rem(head, kv_heads) * group + jax.lax.div(row, tokens)
    channel = query[:, None] * head_dim + span(0, head_dim)[None, :]
    triton.store(
        out.at[slot, jax.lax.div(head, kv_heads), jax.lax.rem(row, tokens)[:, None], channel],
        mixed.astype(out.dtype),
        mask=real[:, None],
    )
