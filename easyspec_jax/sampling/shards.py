"""Between vocabulary shards and whole rows."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from easyspec_jax.mesh import Axes
from easyspec_jax.model.collectives import shard_count, shard_index


def argmax(scores: Float[Array, "rows vocab_shard"], axes: Axes) -> Int[Array, " rows"]:
    """The id of each row's greatest score, ties to the lowest id; one all-gather of two words a row and shard."""
    best = jnp.argmax(scores, axis=-1).astype(jnp.int32)
    if not axes:
        return best
    score = jnp.take_along_axis(scores, best[:, None], axis=-1)[:, 0]
    ids = best + shard_index(axes) * scores.shape[-1]
    words = jnp.stack([jax.lax.bitcast_convert_type(score, jnp.int32), ids])
    words = jax.lax.all_gather(words, axes)
    winner = jnp.argmax(jax.lax.bitcast_convert_type(words[:, 0], jnp.float32), axis=0)
    return jnp.take_along_axis(words[:, 1], winner[None], axis=0)[0]


def padded_rows(rows: int, axes: Axes) -> int:
    """rows rounded up to a multiple of the number of devices."""
    devices = shard_count(axes)
    return -(-rows // devices) * devices


def whole_rows(
    x: Float[Array, "rows vocab_shard"], axes: Axes, split: bool = True
) -> Float[Array, "rows_per_device vocab"]:
    """Rows dealt out to the devices of axes, whole: by one all-to-all, or, where x is not split, by a slice.

    Which rows a device gets, and the order of reductions over them, do not depend on how the vocabulary was split.
    """
    if not split:
        return own_rows(x, axes)
    x = _pad(x, axes)
    return jax.lax.all_to_all(x, axes, split_axis=0, concat_axis=1, tiled=True)


def own_rows(x: Shaped[Array, "rows *rest"], axes: Axes) -> Shaped[Array, "rows_per_device *rest"]:
    """The rows that whole_rows gives this device, of an array that every device has."""
    per_device = padded_rows(x.shape[0], axes) // shard_count(axes)
    return jax.lax.dynamic_slice_in_dim(_pad(x, axes), shard_index(axes) * per_device, per_device)


def gather_rows(x: Shaped[Array, "rows_per_device *rest"], rows: int, axes: Axes) -> Shaped[Array, "rows *rest"]:
    """The inverse of own_rows; one all-gather."""
    return jax.lax.all_gather(x, axes, tiled=True)[:rows]


def _pad(x: Shaped[Array, "rows *rest"], axes: Axes) -> Shaped[Array, "padded *rest"]:
    extra = padded_rows(x.shape[0], axes) - x.shape[0]
    return jnp.concatenate([x, jnp.broadcast_to(x[:1], (extra, *x.shape[1:]))]) if extra else x
