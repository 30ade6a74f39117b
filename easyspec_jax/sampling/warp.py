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
    """Logits over temperature, which must be positive; those under the row's cutoff become -inf. A NaN stays one."""
    scaled = logits / temperature[:, None]
    return scaled if cutoff is None else jnp.where(scaled < cutoff[:, None], -jnp.inf, scaled)


def cutoff(
    scaled: Float[Array, "rows vocab"], top_k: Int[Array, " rows"], top_p: Float[Array, " rows"]
) -> Float[Array, " rows"]:
    """The least logit, already over temperature, that top-k and then top-p keep; equal logits stay together.

    top_k 0 and top_p 1 keep all. Top-p keeps the likeliest ids until their probability among the top k reaches it
    (Holtzman et al., arXiv 1904.09751).
    """
    vocab = scaled.shape[-1]
    descending = -jnp.sort(-scaled, axis=-1)
    number = jnp.where(top_k > 0, jnp.minimum(top_k, vocab), vocab)[:, None]
    among_top = jnp.arange(vocab, dtype=jnp.int32)[None, :] < number
    probability = jax.nn.softmax(jnp.where(among_top, descending, -jnp.inf), axis=-1)
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
    """cutoff() of rows whose vocabulary is split over axes: one all-to-all, and one all-gather of a number a row."""
    scaled = whole_rows(warp(logits, temperature), axes)
    own = cutoff(scaled, own_rows(top_k, axes), own_rows(top_p, axes))
    return gather_rows(own, logits.shape[0], axes)
