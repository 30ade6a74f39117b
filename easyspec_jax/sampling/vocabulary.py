"""Rows of scores whose vocabulary is split over devices, and how to work on them in place.

Device d holds ids [d * shard, (d + 1) * shard) of every row. Most functions find their answer on
each shard and merge a few numbers; whole_rows() moves the logits themselves. All are called inside
`shard_map`. With no axes, or on one device, a "shard" is the whole row, nothing is sent, and they
can be called anywhere.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from easyspec_jax.arithmetic import round_up
from easyspec_jax.parallel.collectives import all_reduce, shard_count, shard_index
from easyspec_jax.parallel.mesh import Axes

LOWEST = np.finfo(np.float32).min
"""Least finite float32."""
NO_TOKEN = -1
"""Stands for no token where an array has room for one; no token has this id."""
NO_CHOICE = -1
"""Id that choice() returns for a row of scores it cannot choose from."""


def argmax(scores: Float[Array, "rows vocab_shard"], axes: Axes) -> Int[Array, " rows"]:
    """Find the id of each row's greatest score; of equal scores, the lowest id wins.

    All-gathers two words per row and shard.

    Args:
        scores: This device's shard of every row.
        axes: Mesh axes that split the vocabulary.

    Returns:
        int32 ids of the whole vocabulary, on every device.

    Examples:
        >>> argmax(jnp.array([[0.1, 0.7, 0.7], [3.0, 2.0, 1.0]]), axes=()).tolist()
        [1, 0]
    """
    return _greatest(scores, axes)[1]


def choice(scores: Float[Array, "rows vocab_shard"], axes: Axes) -> Int[Array, " rows"]:
    """Find the argmax() of each row that has one, at the same cost.

    Args:
        scores: This device's shard of every row.
        axes: Mesh axes that split the vocabulary.

    Returns:
        int32 ids; NO_CHOICE for a row that holds a NaN or +inf, or nothing but -inf.

    Examples:
        >>> choice(jnp.array([[0.1, 0.7], [-jnp.inf, -jnp.inf], [jnp.nan, 1.0]]), ()).tolist()
        [1, -1, -1]
    """
    score, best = _greatest(scores, axes)
    return jnp.where(jnp.isfinite(score), best, NO_CHOICE)


def _greatest(
    scores: Float[Array, "rows vocab_shard"], axes: Axes
) -> tuple[Float[Array, " rows"], Int[Array, " rows"]]:
    """Find each row's greatest score and its id. If the row holds a NaN, the score is a NaN."""
    best = _argmax(scores)
    score = jnp.take_along_axis(scores, best[:, None], axis=-1)[:, 0]
    if shard_count(axes) == 1:
        return score, best
    ids = best + shard_index(axes) * scores.shape[-1]
    # Score and id travel together as int32: [2, rows] -> [shards, 2, rows].
    words = jnp.stack([jax.lax.bitcast_convert_type(score, jnp.int32), ids])
    words = jax.lax.all_gather(words, axes)
    scores = jax.lax.bitcast_convert_type(words[:, 0], jnp.float32)
    # Shards come in the order of their ids, and jnp.argmax takes the first of equals.
    winner = jnp.argmax(scores, axis=0)[None]
    score = jnp.take_along_axis(scores, winner, axis=0)[0]
    return score, jnp.take_along_axis(words[:, 1], winner, axis=0)[0]


def _argmax(scores: Float[Array, "rows ids"]) -> Int[Array, " rows"]:
    """jnp.argmax(axis=-1) by blocks.

    On a CPU a plain maximum is many times faster than a maximum that keeps track of positions.
    """
    rows, size = scores.shape
    block = math.gcd(size, 128)
    # [rows, ids] -> [rows, blocks, block]: find the first block that holds the maximum, then look
    # for it inside that block only.
    blocks = scores.reshape(rows, size // block, block)
    first = jnp.argmax(jnp.max(blocks, axis=-1), axis=-1)
    within = jnp.argmax(jnp.take_along_axis(blocks, first[:, None, None], axis=1)[:, 0], axis=-1)
    return (first * block + within).astype(jnp.int32)


def top(
    scores: Float[Array, "rows vocab_shard"], k: int, axes: Axes
) -> tuple[Float[Array, "rows k"], Int[Array, "rows k"]]:
    """Find each row's k greatest scores, in descending order, and their ids.

    Of equal scores, the lower id comes first. All-gathers k pairs from each shard.

    Args:
        scores: This device's shard of every row. A NaN counts as +inf, so it is always among the
            first.
        k: How many to find; the result has fewer columns if the vocabulary does.
        axes: Mesh axes that split the vocabulary.

    Returns:
        float32 scores and int32 ids of the whole vocabulary, on every device.

    Examples:
        >>> best, ids = top(jnp.array([[0.5, 2.0, 1.0, 2.0]]), k=3, axes=())
        >>> best.tolist(), ids.tolist()
        ([[2.0, 2.0, 1.0]], [[1, 3, 2]])
    """
    scores = jnp.where(jnp.isnan(scores), jnp.inf, scores)
    if k == 1:
        # A reduction: on a GPU, top_k is a custom call, between two copies.
        greatest, ids = _greatest(scores, axes)
        return greatest[:, None], ids[:, None]
    best, local = jax.lax.top_k(scores, min(k, scores.shape[-1]))
    if shard_count(axes) == 1:
        return best, local
    ids = local + shard_index(axes) * scores.shape[-1]
    # [2, rows, k] on each shard -> [2, rows, shards * k], whose greatest k are the whole row's.
    words = jnp.stack([jax.lax.bitcast_convert_type(best, jnp.int32), ids])
    words = jax.lax.all_gather(words, axes, axis=2, tiled=True)
    best, column = jax.lax.top_k(
        jax.lax.bitcast_convert_type(words[0], jnp.float32), min(k, words.shape[-1])
    )
    return best, jnp.take_along_axis(words[1], column, axis=1)


def take(
    x: Float[Array, "rows vocab_shard"], ids: Int[Array, "rows ids"], axes: Axes
) -> Float[Array, "rows ids"]:
    """Take each row's entries at ids of the whole vocabulary; one all-reduce.

    Args:
        x: This device's shard of every row.
        ids: Ids within the vocabulary, the same on every device.
        axes: Mesh axes that split the vocabulary.

    Returns:
        The entries, on every device.

    Examples:
        >>> take(jnp.array([[0.0, 0.1, 0.2, 0.3]]), jnp.array([[3, 1, 1]]), axes=()).round(1)
        Array([[0.3, 0.1, 0.1]], dtype=float32)
    """
    local = ids - shard_index(axes) * x.shape[-1]
    is_local = (local >= 0) & (local < x.shape[-1])
    found = jnp.take_along_axis(x, jnp.clip(local, 0, x.shape[-1] - 1), axis=-1)
    # Each id is on one shard and the others add zero, so the sum is the entry, even if it is -inf.
    return all_reduce(jnp.where(is_local, found, jnp.zeros_like(found)), axes)


def normaliser(
    x: Float[Array, "rows vocab_shard"], axes: Axes
) -> tuple[Float[Array, "rows 1"], Float[Array, "rows 1"]]:
    """Find what softmax needs of whole rows; all-gathers two numbers per row.

    `exp(x - greatest) / total` is the softmax. It is accurate where `exp(x - logsumexp(x))` is not:
    far from zero, float32 rounds the logarithm of the sum.

    Args:
        x: This device's shard of every row.
        axes: Mesh axes that split the vocabulary.

    Returns:
        The greatest entry of each whole row, and the row's sum of exp(x - greatest).

    Examples:
        >>> x = jnp.log(jnp.array([[0.1, 0.4, 0.2]]))
        >>> greatest, total = normaliser(x, axes=())
        >>> bool(jnp.allclose(jnp.exp(x - greatest) / total, jax.nn.softmax(x)))
        True
    """
    greatest = jnp.max(x, axis=-1, keepdims=True)
    # A shard may hold nothing but -inf. Then exp(-inf - LOWEST) = 0, but -inf - -inf would be NaN.
    total = jnp.sum(jnp.exp(x - jnp.maximum(greatest, LOWEST)), axis=-1, keepdims=True)
    if shard_count(axes) == 1:
        return greatest, total
    greatests, totals = jax.lax.all_gather((greatest, total), axes)  # [shards, rows, 1] each
    greatest = jnp.max(greatests, axis=0)
    # A shard's sum is relative to its own greatest entry; rescale it to the greatest of all.
    return greatest, jnp.sum(totals * jnp.exp(greatests - greatest[None]), axis=0)


def shard_ids(x: Float[Array, "rows vocab_shard"], axes: Axes) -> Int[Array, "rows vocab_shard"]:
    """Number each of a shard's entries by its id in the whole vocabulary.

    Examples:
        >>> shard_ids(jnp.zeros((2, 3)), axes=()).tolist()
        [[0, 1, 2], [0, 1, 2]]
    """
    ids = shard_index(axes) * x.shape[-1] + jnp.arange(x.shape[-1], dtype=jnp.int32)
    return jnp.broadcast_to(ids, x.shape)


def local_ids(ids: Int[Array, "*shape"], size: int, axes: Axes) -> Int[Array, "*shape"]:
    """Number ids within this device's shard, for scatters that drop what is out of bounds.

    Args:
        ids: Ids of the whole vocabulary, or negative numbers for none.
        size: Ids of a shard.
        axes: Mesh axes that split the vocabulary.

    Returns:
        Places in the shard; at least `size`, which is out of bounds, for what is not in it.

    Examples:
        >>> local_ids(jnp.array([3, -1]), size=8, axes=()).tolist()
        [3, 8]
    """
    local = ids - shard_index(axes) * size
    # A negative place would count from the end.
    return jnp.where(local >= 0, local, size)


def padded_rows(rows: int, axes: Axes) -> int:
    """Round a number of rows up to a multiple of the number of devices along axes."""
    return round_up(rows, shard_count(axes))


def whole_rows(
    x: Float[Array, "rows vocab_shard"], axes: Axes
) -> Float[Array, "rows_per_device vocab"]:
    """Exchange shards of all rows for some whole rows, by one all-to-all.

    Args:
        x: This device's shard of every row.
        axes: Mesh axes that split the vocabulary.

    Returns:
        This device's rows, in order: device d has rows [d * n, (d + 1) * n), where
        n = padded_rows(rows) / devices. Rows added as padding repeat row 0.
    """
    if shard_count(axes) == 1:
        return x
    # Three rows on two devices, vocabulary of four; each device has [4, 2] after padding:
    #   device 0: a0 a1 | b0 b1 | c0 c1 | a0 a1        device 0: a0 a1 a2 a3 | b0 b1 b2 b3
    #   device 1: a2 a3 | b2 b3 | c2 c3 | a2 a3   ->   device 1: c0 c1 c2 c3 | a0 a1 a2 a3
    return jax.lax.all_to_all(_pad(x, axes), axes, split_axis=0, concat_axis=1, tiled=True)


def own_rows(x: Shaped[Array, "rows *rest"], axes: Axes) -> Shaped[Array, "rows_per_device *rest"]:
    """Select the rows that whole_rows() gives this device from an array that every device has."""
    per_device = padded_rows(x.shape[0], axes) // shard_count(axes)
    return jax.lax.dynamic_slice_in_dim(_pad(x, axes), shard_index(axes) * per_device, per_device)


def gather_rows(
    x: Shaped[Array, "rows_per_device *rest"], rows: int, axes: Axes
) -> Shaped[Array, "rows *rest"]:
    """Undo own_rows(): collect every device's rows on every device, by one all-gather.

    Args:
        x: This device's rows.
        rows: How many rows there were before padding.
        axes: Mesh axes over which the rows are dealt out.
    """
    return jax.lax.all_gather(x, axes, tiled=True)[:rows] if shard_count(axes) > 1 else x


def _pad(x: Shaped[Array, "rows *rest"], axes: Axes) -> Shaped[Array, "padded *rest"]:
    """Add copies of row 0 until the rows divide among the devices."""
    extra = padded_rows(x.shape[0], axes) - x.shape[0]
    return jnp.concatenate([x, jnp.broadcast_to(x[:1], (extra, *x.shape[1:]))]) if extra else x
