"""The two distributions that sampled drafts and their verification compare."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from easyspec_jax.parallel.mesh import ALL_AXES
from easyspec_jax.sampling.noise import Purpose, gumbel, noise_keys
from easyspec_jax.sampling.vocabulary import (
    NO_TOKEN,
    choice,
    local_ids,
    normaliser,
    shard_ids,
    take,
)
from easyspec_jax.verify.tree import Tree
from easyspec_jax.verify.verifier import RowSampling, warp_rows

ROUNDING = 1e-6
"""Probability left of p below which float32 cannot tell a residual from rounding errors."""
NEGLIGIBLE = 60.0
"""Ids this many nats or more below the draft's likeliest one are never drafted.

Exactness does not depend on it: whatever q is, the residual makes up for it.
"""


def draft_log_probs(
    logits: Float[Array, "batch frontier ids"], request: RowSampling, truncates: bool
) -> Float[Array, "batch frontier ids"]:
    """Return log q: the draft's warped distribution over its likeliest ids, renormalised.

    Args:
        logits: The draft's greatest logits after each node.
        request: Each row's distribution.
        truncates: Whether some request asks for top-k or top-p.
    """
    warped = warp_rows(logits, request, (), truncates)
    # A drafted token's q must be a float32 that a verifier can divide by: exp(-60) is 1e-26.
    warped = jnp.where(
        warped > jnp.max(warped, axis=-1, keepdims=True) - NEGLIGIBLE, warped, -jnp.inf
    )
    return jax.nn.log_softmax(warped, axis=-1)


class TargetRows(NamedTuple):
    """The target's warped distribution p after each node, on vocabulary shards.

    Attributes:
        logits: Warped logits, a row for each node of each text.
        greatest: The greatest of each whole row.
        total: Sum of exp(logits - greatest) over each whole row.
    """

    logits: Float[Array, "rows vocab_shard"]
    greatest: Float[Array, "rows 1"]
    total: Float[Array, "rows 1"]


def target_rows(
    target: Float[Array, "batch nodes vocab_shard"],
    tree: Tree,
    request: RowSampling,
    truncates: bool,
) -> tuple[TargetRows, Float[Array, "batch nodes ids"]]:
    """Warp the target's logits after each node, and return p at the node's candidates.

    Acceptance needs no more of p, so rows stay on their shards. See Verifier.verify for arguments.
    """
    logits = warp_rows(target, request, ALL_AXES, truncates)
    rows = logits.reshape(-1, logits.shape[-1])  # [batch * nodes, vocab_shard]
    greatest, total = normaliser(rows, ALL_AXES)
    found = take(rows, tree.candidates.reshape(rows.shape[0], -1), ALL_AXES)
    p = (jnp.exp(found - greatest) / total).reshape(tree.q.shape)
    p = jnp.where(tree.candidates == NO_TOKEN, 0.0, p)
    return TargetRows(rows, greatest, total), p


def draw_after(
    leaf: Int[Array, " batch"],
    residual: Float[Array, "batch ids"],
    target: TargetRows,
    tree: Tree,
    position: Int[Array, " batch"],
    request: RowSampling,
) -> Int[Array, " batch"]:
    """Draw the token after the accepted path.

    Args:
        leaf: The last accepted node.
        residual: What is left of p at the leaf's candidates; other ids keep p. Not normalised.
        target: The target's distributions.
        tree: The drafted trees.
        position: Absolute position of the token after the root.
        request: Each row's noise.
    """
    # Whole rows from here on, but of one node per text: log p after the leaf, on shards ...
    row = jnp.arange(leaf.shape[0], dtype=jnp.int32) * tree.tokens.shape[1] + leaf
    weights = target.logits[row] - target.greatest[row] - jnp.log(target.total[row])
    # ... where the candidates get what rejections left of them. Below a leaf that has no children
    # nothing was rejected, and the residual is p itself.
    ids = jnp.take_along_axis(tree.candidates, leaf[:, None, None], axis=1)[:, 0]
    weights = _replace(weights, ids, jnp.log(residual))
    # Weights need no normalisation: the arg-max of log-weights plus Gumbel noise is a sample.
    depth = jnp.take_along_axis(tree.depth, leaf[:, None], axis=1)[:, 0]
    after_leaf = (position + depth)[:, None]
    keys = noise_keys(request.seed, after_leaf, request.round, Purpose.RESIDUAL)[:, 0]
    return choice(weights + gumbel(keys, shard_ids(weights, ALL_AXES)), ALL_AXES)


def _replace(
    row: Float[Array, "batch vocab_shard"],
    ids: Int[Array, "batch ids"],
    values: Float[Array, "batch ids"],
) -> Float[Array, "batch vocab_shard"]:
    """Put values at some ids of the whole vocabulary, on whichever shard holds them."""
    local = local_ids(ids, row.shape[-1], ALL_AXES)
    return jax.vmap(lambda r, i, x: r.at[i].set(x, mode="drop"))(row, local, values)
