"""Warping: temperature, min-p, top-k and top-p, part of the distribution being preserved.

They are applied in this order, which is vLLM's. None of them changes which id is likeliest, so
greedy decoding needs none; what does change it is in adjust.py.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from easyspec_jax.parallel.mesh import Axes
from easyspec_jax.sampling.vocabulary import gather_rows, own_rows, top, whole_rows


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
    scaled: Float[Array, "rows vocab"],
    top_k: Int[Array, " rows"],
    top_p: Float[Array, " rows"],
    min_p: Float[Array, " rows"] | None = None,
) -> Float[Array, " rows"]:
    """Find the least logit that min-p, then top-k and then top-p keep.

    Top-p (nucleus sampling; Holtzman et al., arXiv 1904.09751) keeps the likeliest ids until their
    probability among the top k reaches it. At least one id is kept, and logits equal to the least
    one are kept with it.

    Args:
        scaled: Whole rows of logits, already divided by the temperature.
        top_k: Ids to keep; 0 keeps all.
        top_p: Probability to keep; 1 keeps all.
        min_p: Least probability to keep, as a share of the greatest; 0 keeps all.

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
    if min_p is not None:
        among_top &= descending >= _least(descending[:, 0], min_p)[:, None]
    probability = jax.nn.softmax(jnp.where(among_top, descending, -jnp.inf), axis=-1)
    # Probability of all likelier ids. With top_p = 0.6:
    #   probability  0.5   0.3   0.15  0.05
    #   before       0     0.5   0.8   0.95
    #   kept         yes   yes   no    no
    before = jnp.cumsum(probability, axis=-1) - probability
    kept = among_top & ((before < top_p[:, None]) | (top_p[:, None] >= 1.0))
    last = jnp.maximum(jnp.sum(kept, axis=-1, dtype=jnp.int32), 1) - 1
    return jnp.take_along_axis(descending, last[:, None], axis=-1)[:, 0]


def _least(greatest: Float[Array, " rows"], min_p: Float[Array, " rows"]) -> Float[Array, " rows"]:
    """Return the least logit that min-p keeps: p / greatest p >= min_p, in logarithms."""
    return greatest + jnp.log(min_p)


def min_p_cutoff(
    logits: Float[Array, "rows vocab_shard"],
    temperature: Float[Array, " rows"],
    min_p: Float[Array, " rows"],
    axes: Axes,
) -> Float[Array, " rows"]:
    """Find the least logit that min-p alone keeps (Nguyen et al., arXiv 2407.01082).

    Only the greatest logit of a row is needed, so nothing is sorted and no logits are sent.

    Args:
        logits: This device's vocabulary shard of every row, not yet divided by the temperature.
        temperature: Each row's temperature.
        min_p: Least probability to keep, as a share of the greatest; 0 keeps all.
        axes: Mesh axes that split the vocabulary.

    Returns:
        Each row's cutoff, for warp(), on every device.

    Examples:
        >>> logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
        >>> least = min_p_cutoff(logits, jnp.ones(1), min_p=jnp.array([0.2]), axes=())
        >>> (logits >= least[:, None]).tolist()
        [[True, True, True, False]]
    """
    greatest, _ = top(warp(logits, temperature), 1, axes)
    return _least(greatest[:, 0], min_p)


def shard_cutoff(
    logits: Float[Array, "rows vocab_shard"],
    temperature: Float[Array, " rows"],
    top_k: Int[Array, " rows"],
    top_p: Float[Array, " rows"],
    axes: Axes,
    min_p: Float[Array, " rows"] | None = None,
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
        min_p: As for cutoff().

    Returns:
        Every row's cutoff, on every device.
    """
    scaled = whole_rows(warp(logits, temperature), axes)
    own_min_p = None if min_p is None else own_rows(min_p, axes)
    own = cutoff(scaled, own_rows(top_k, axes), own_rows(top_p, axes), own_min_p)
    return gather_rows(own, logits.shape[0], axes)
