"""Warping: temperature, top-k and top-p, which are part of the distribution being preserved."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from easyspec_jax.parallel.mesh import Axes
from easyspec_jax.sampling.vocabulary import gather_rows, own_rows, whole_rows


def warp(
    logits: Float[Array, "rows vocab"],
    temperature: Float[Array, " rows"],
    cutoff: Float[Array, " rows"] | None = None,
) -> Float[Array, "rows vocab"]:
    """Divide logits by the temperature and drop those under a cutoff.

    Args:
        logits: Logits; the rows may be vocabulary shards.
        temperature: Each row's temperature, which must be positive.
        cutoff: Each row's least logit to keep, already divided by the temperature; None keeps all.

    Returns:
        Warped logits, -inf where dropped. A NaN stays a NaN.

    Examples:
        >>> warp(jnp.array([[2.0, 4.0, 1.0]]), jnp.array([2.0]), jnp.array([1.0])).tolist()
        [[1.0, 2.0, -inf]]
    """
    scaled = logits / temperature[:, None]
    return scaled if cutoff is None else jnp.where(scaled < cutoff[:, None], -jnp.inf, scaled)


def cutoff(
    scaled: Float[Array, "rows vocab"], top_k: Int[Array, " rows"], top_p: Float[Array, " rows"]
) -> Float[Array, " rows"]:
    """Find the least logit that top-k and then top-p keep.

    Top-p (nucleus sampling; Holtzman et al., arXiv 1904.09751) keeps the likeliest ids until their
    probability among the top k reaches it. At least one id is kept, and logits equal to the least
    one are kept with it.

    Args:
        scaled: Whole rows of logits, already divided by the temperature.
        top_k: Ids to keep; 0 keeps all.
        top_p: Probability to keep; 1 keeps all.

    Returns:
        Each row's cutoff, for warp().

    Examples:
        >>> scaled = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
        >>> least = cutoff(scaled, top_k=jnp.array([0]), top_p=jnp.array([0.6]))
        >>> (scaled >= least[:, None]).tolist()
        [[True, True, False, False]]
    """
    vocab = scaled.shape[-1]
    descending = -jnp.sort(-scaled, axis=-1)
    number = jnp.where(top_k > 0, jnp.minimum(top_k, vocab), vocab)[:, None]
    among_top = jnp.arange(vocab, dtype=jnp.int32)[None, :] < number
    probability = jax.nn.softmax(jnp.where(among_top, descending, -jnp.inf), axis=-1)
    # Probability of all likelier ids. With top_p = 0.6:
    #   probability  0.5   0.3   0.15  0.05
    #   before       0     0.5   0.8   0.95
    #   kept         yes   yes   no    no
    before = jnp.cumsum(probability, axis=-1) - probability
    kept = among_top & ((before < top_p[:, None]) | (top_p[:, None] >= 1.0))
    last = jnp.maximum(jnp.sum(kept, axis=-1, dtype=jnp.int32), 1) - 1
    return jnp.take_along_axis(descending, last[:, None], axis=-1)[:, 0]


def shard_cutoff(
    logits: Float[Array, "rows vocab_shard"],
    temperature: Float[Array, " rows"],
    top_k: Int[Array, " rows"],
    top_p: Float[Array, " rows"],
    axes: Axes,
) -> Float[Array, " rows"]:
    """Find the cutoff() of rows whose vocabulary is split over mesh axes.

    The devices share the rows out among themselves: one all-to-all moves the logits, each device
    sorts its rows, and one all-gather of a number per row tells every device all cutoffs.

    Args:
        logits: This device's vocabulary shard of every row, not yet divided by the temperature.
        temperature: Each row's temperature; every device has all rows of this and what follows.
        top_k: Ids to keep; 0 keeps all.
        top_p: Probability to keep; 1 keeps all.
        axes: Mesh axes that split the vocabulary.

    Returns:
        Every row's cutoff, on every device.
    """
    scaled = whole_rows(warp(logits, temperature), axes)
    own = cutoff(scaled, own_rows(top_k, axes), own_rows(top_p, axes))
    return gather_rows(own, logits.shape[0], axes)
