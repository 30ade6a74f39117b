"""Log-probabilities of tokens under a model's own distribution, found on vocabulary shards.

They are of the logits as the model gives them: before biases, penalties, temperature and
truncation, as in vLLM. So they do not depend on how a text was sampled.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from easyspec_jax.arithmetic import ceil_div
from easyspec_jax.options import MAX_LOGPROBS
from easyspec_jax.parallel.mesh import Axes
from easyspec_jax.sampling.vocabulary import normaliser, take, top

BLOCK = 16
"""Tokens of a prompt whose logits are computed at once, which bounds the memory that they take."""


class Logprobs(NamedTuple):
    """Log-probabilities of some tokens, and of the likeliest ones in their places.

    Attributes:
        chosen: Log-probability of each token.
        ids: Likeliest ids in its place, in descending order.
        best: Their log-probabilities.
    """

    chosen: Float[Array, "*rows"]
    ids: Int[Array, "*rows best"]
    best: Float[Array, "*rows best"]


def logprobs_of(
    logits: Float[Array, "batch tokens vocab_shard"], tokens: Int[Array, "batch tokens"], axes: Axes
) -> Logprobs:
    """Find the log-probabilities of tokens.

    Some numbers per token and shard are sent, whatever the size of the vocabulary.

    Args:
        logits: A model's logits before each token; the vocabulary is split over axes.
        tokens: The tokens. The log-probability of an id that does not exist means nothing.
        axes: Mesh axes that split the vocabulary.

    Returns:
        Log-probabilities, with up to MAX_LOGPROBS likeliest ids each.

    Examples:
        >>> logits = jnp.log(jnp.array([[[0.5, 0.2, 0.3]]])) + 7.0
        >>> found = logprobs_of(logits, jnp.array([[1]]), axes=())
        >>> f"{jnp.exp(found.chosen[0, 0]):.2f}", found.ids.tolist()
        ('0.20', [[[0, 2, 1]]])
    """
    rows = logits.reshape(-1, logits.shape[-1])
    greatest, total = normaliser(rows, axes)
    norm = greatest + jnp.log(total)
    chosen = take(rows, tokens.reshape(-1, 1), axes) - norm
    best, ids = top(rows, MAX_LOGPROBS, axes)
    shape = tokens.shape
    return Logprobs(
        chosen.reshape(shape), ids.reshape(*shape, -1), (best - norm).reshape(*shape, -1)
    )


def prompt_logprobs(
    head: Callable[[Array], Array],
    h: Float[Array, "batch tokens hidden"],
    tokens: Int[Array, "batch tokens"],
    axes: Axes,
) -> Logprobs:
    """Find the log-probabilities of many tokens, a few at a time.

    Args:
        head: Computes logits from hidden states.
        h: Hidden states before each token.
        tokens: The tokens.
        axes: Mesh axes that split the vocabulary.
    """
    batch, count = tokens.shape
    blocks = ceil_div(count, BLOCK)
    padded = blocks * BLOCK - count

    def split(x: Array) -> Array:
        """Cut tokens into blocks: [batch, tokens, ...] -> [blocks, batch, BLOCK, ...]."""
        x = jnp.pad(x, [(0, 0), (0, padded), *[(0, 0)] * (x.ndim - 2)])
        return jnp.moveaxis(x.reshape(batch, blocks, BLOCK, *x.shape[2:]), 1, 0)

    def join(x: Array) -> Array:
        return jnp.moveaxis(x, 0, 1).reshape(batch, blocks * BLOCK, *x.shape[3:])[:, :count]

    found = jax.lax.map(
        lambda block: logprobs_of(head(block[0]), block[1], axes), (split(h), split(tokens))
    )
    return jax.tree.map(join, found)
