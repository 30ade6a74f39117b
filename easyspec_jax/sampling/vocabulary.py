"""Between vocabulary shards and whole rows."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from easyspec_jax.parallel.collectives import all_reduce, shard_count, shard_index
from easyspec_jax.parallel.mesh import Axes

LOWEST = np.finfo(np.float32).min
NO_CHOICE = -1


def argmax(scores: Float[Array, "rows vocab_shard"], axes: Axes) -> Int[Array, " rows"]:
    """The id of each row's greatest score, ties to the lowest id; one all-gather of two words a row and shard."""
    return _greatest(scores, axes)[1]


def choice(scores: Float[Array, "rows vocab_shard"], axes: Axes) -> Int[Array, " rows"]:
    """argmax(), or NO_CHOICE for a row with a NaN, with +inf, or with nothing but -inf; no collective more."""
    score, best = _greatest(scores, axes)
    return jnp.where(jnp.isfinite(score), best, NO_CHOICE)


def _greatest(
    scores: Float[Array, "rows vocab_shard"], axes: Axes
) -> tuple[Float[Array, " rows"], Int[Array, " rows"]]:
    """Each row's greatest score, which is a NaN if there is any, and its id."""
    best = _argmax(scores)
    score = jnp.take_along_axis(scores, best[:, None], axis=-1)[:, 0]
    if shard_count(axes) == 1:
        return score, best
    ids = best + shard_index(axes) * scores.shape[-1]
    words = jnp.stack([jax.lax.bitcast_convert_type(score, jnp.int32), ids])
    words = jax.lax.all_gather(words, axes)
    scores = jax.lax.bitcast_convert_type(words[:, 0], jnp.float32)
    winner = jnp.argmax(scores, axis=0)[None]
    score, best = (jnp.take_along_axis(x, winner, axis=0)[0] for x in (scores, words[:, 1]))
    return score, best


def _argmax(scores: Float[Array, "rows ids"]) -> Int[Array, " rows"]:
    """jnp.argmax by blocks: on a CPU a maximum of numbers alone is many times faster than one of numbers and places."""
    rows, size = scores.shape
    block = math.gcd(size, 128)
    blocks = scores.reshape(rows, size // block, block)
    first = jnp.argmax(jnp.max(blocks, axis=-1), axis=-1)
    within = jnp.argmax(jnp.take_along_axis(blocks, first[:, None, None], axis=1)[:, 0], axis=-1)
    return (first * block + within).astype(jnp.int32)


def top(
    scores: Float[Array, "rows vocab_shard"], k: int, axes: Axes
) -> tuple[Float[Array, "rows k"], Int[Array, "rows k"]]:
    """Each row's k greatest scores in descending order, and their ids, ties by id; fewer if there are no more ids.

    One all-gather of as many pairs from each shard. A NaN counts as +inf, so that it is never overlooked.
    """
    scores = jnp.where(jnp.isnan(scores), jnp.inf, scores)
    best, local = jax.lax.top_k(scores, min(k, scores.shape[-1]))
    if shard_count(axes) == 1:
        return best, local
    ids = local + shard_index(axes) * scores.shape[-1]
    words = jnp.stack([jax.lax.bitcast_convert_type(best, jnp.int32), ids])
    words = jax.lax.all_gather(words, axes, axis=2, tiled=True)
    best, place = jax.lax.top_k(
        jax.lax.bitcast_convert_type(words[0], jnp.float32), min(k, words.shape[-1])
    )
    return best, jnp.take_along_axis(words[1], place, axis=1)


def take(
    x: Float[Array, "rows vocab_shard"], ids: Int[Array, "rows ids"], axes: Axes
) -> Float[Array, "rows ids"]:
    """The row's entries at some ids of the whole vocabulary; one all-reduce."""
    local = ids - shard_index(axes) * x.shape[-1]
    mine = (local >= 0) & (local < x.shape[-1])
    found = jnp.take_along_axis(x, jnp.clip(local, 0, x.shape[-1] - 1), axis=-1)
    return all_reduce(jnp.where(mine, found, jnp.zeros_like(found)), axes)


def normaliser(
    x: Float[Array, "rows vocab_shard"], axes: Axes
) -> tuple[Float[Array, "rows 1"], Float[Array, "rows 1"]]:
    """The greatest entry of whole rows, and their sum of exp(x - greatest); one all-gather of two numbers a row.

    exp(x - greatest) / sum is accurate where exp(x - logsumexp(x)) would round a large logarithm.
    """
    greatest = jnp.max(x, axis=-1, keepdims=True)
    total = jnp.sum(jnp.exp(x - jnp.maximum(greatest, LOWEST)), axis=-1, keepdims=True)
    if shard_count(axes) == 1:
        return greatest, total
    greatests, totals = jax.lax.all_gather((greatest, total), axes)
    greatest = jnp.max(greatests, axis=0)
    return greatest, jnp.sum(totals * jnp.exp(greatests - greatest[None]), axis=0)


def shard_ids(x: Float[Array, "rows vocab_shard"], axes: Axes) -> Int[Array, "rows vocab_shard"]:
    """The id of each of a shard's entries."""
    ids = shard_index(axes) * x.shape[-1] + jnp.arange(x.shape[-1], dtype=jnp.int32)
    return jnp.broadcast_to(ids, x.shape)


def padded_rows(rows: int, axes: Axes) -> int:
    """rows rounded up to a multiple of the number of devices."""
    devices = shard_count(axes)
    return -(-rows // devices) * devices


def whole_rows(
    x: Float[Array, "rows vocab_shard"], axes: Axes
) -> Float[Array, "rows_per_device vocab"]:
    """Rows dealt out to the devices of axes, whole, by one all-to-all."""
    if shard_count(axes) == 1:
        return x
    return jax.lax.all_to_all(_pad(x, axes), axes, split_axis=0, concat_axis=1, tiled=True)


def own_rows(x: Shaped[Array, "rows *rest"], axes: Axes) -> Shaped[Array, "rows_per_device *rest"]:
    """The rows that whole_rows gives this device, of an array that every device has."""
    per_device = padded_rows(x.shape[0], axes) // shard_count(axes)
    return jax.lax.dynamic_slice_in_dim(_pad(x, axes), shard_index(axes) * per_device, per_device)


def gather_rows(
    x: Shaped[Array, "rows_per_device *rest"], rows: int, axes: Axes
) -> Shaped[Array, "rows *rest"]:
    """The inverse of own_rows; one all-gather."""
    return jax.lax.all_gather(x, axes, tiled=True)[:rows] if shard_count(axes) > 1 else x


def _pad(x: Shaped[Array, "rows *rest"], axes: Axes) -> Shaped[Array, "padded *rest"]:
    extra = padded_rows(x.shape[0], axes) - x.shape[0]
    return jnp.concatenate([x, jnp.broadcast_to(x[:1], (extra, *x.shape[1:]))]) if extra else x
