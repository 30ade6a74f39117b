"""Rejection sampling: the output has exactly the target's distribution, whatever the draft.

Along a chain as in Leviathan, Kalman, Matias 2022 (arXiv 2211.17192) and Chen et al. 2023 (arXiv 2302.01318); on a tree
as in recursive speculative decoding (Jeon et al. 2024, arXiv 2402.14160): children are drawn without replacement.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from easyspec_jax.parallel.collectives import shard_index
from easyspec_jax.parallel.mesh import ALL_AXES
from easyspec_jax.sampling.noise import Purpose, gumbel, noise_keys, numbered, uniform
from easyspec_jax.sampling.vocabulary import choice, normaliser, shard_ids, take
from easyspec_jax.verify.tree import Tree, children, deepest
from easyspec_jax.verify.verifier import CANDIDATES, Branches, RowSampling, Verdict, warp_rows

ROUNDING = 1e-6
"""A probability below which float32 cannot tell what is left of a distribution from nothing."""
NEGLIGIBLE = 60.0
"""Nats below the draft's likeliest id: what lies further down is never drafted, which costs exactness nothing."""


@dataclass(frozen=True)
class Rejection:
    """The draft samples from its own warped distribution q, cut to its likeliest ids; the target accepts with p / q.

    truncates: some request asks for top-k or top-p.
    """

    truncates: bool = False

    def candidates(self, width: int) -> int:
        """Candidate ids; all others are never drafted, and left to the residual."""
        return max(width, CANDIDATES)

    def branch(
        self,
        logits: Float[Array, "batch frontier ids"],
        ids: Int[Array, "batch frontier ids"],
        score: Float[Array, "batch frontier"],
        log_prob: Float[Array, "batch frontier"],
        position: Int[Array, " batch"],
        request: RowSampling,
    ) -> Branches:
        """A stochastic beam (Kool et al. 2019, arXiv 1903.06059): paths sampled without replacement.

        In descending order of score a node's children are a sample without replacement of q, and which of them become
        nodes depends on scores alone, never on their own tokens. That is what the verifier's exactness rests on.
        """
        warped = warp_rows(logits, request, (), self.truncates)
        # What exists must have a probability that float32 can hold and divide by.
        warped = jnp.where(
            warped > jnp.max(warped, axis=-1, keepdims=True) - NEGLIGIBLE, warped, -jnp.inf
        )
        log_q = jax.nn.log_softmax(warped, axis=-1)
        keys = noise_keys(request.seed, position[:, None], request.round, Purpose.DRAFT)[:, 0]
        noise = gumbel(numbered(keys, logits.shape[1]), ids)
        return Branches(
            score=conditioned(log_q + noise, score, log_prob),
            log_prob=log_prob[:, :, None] + log_q,
            q=jnp.exp(log_q),
        )

    def verify(
        self,
        target: Float[Array, "batch nodes vocab_shard"],
        tree: Tree,
        position: Int[Array, " batch"],
        request: RowSampling,
    ) -> Verdict:
        """Decides about all nodes at once, from the target's probabilities of the candidates alone."""
        logits = warp_rows(target, request, ALL_AXES, self.truncates)
        rows = logits.reshape(-1, logits.shape[-1])
        greatest, total = normaliser(rows, ALL_AXES)
        found = take(rows, tree.candidates.reshape(rows.shape[0], -1), ALL_AXES)
        p = (jnp.exp(found - greatest) / total).reshape(tree.q.shape)
        key = noise_keys(request.seed, position[:, None], request.round, Purpose.ACCEPT)[:, 0]
        accept, rest = accept_children(p, tree, uniform(numbered(key, tree.tokens.shape[1])))

        leaf = deepest(tree, accept)
        at = leaf[:, None, None]
        row = jnp.arange(leaf.shape[0], dtype=jnp.int32) * tree.tokens.shape[1] + leaf
        weights = rows[row] - greatest[row] - jnp.log(total[row])
        ids, rest = (jnp.take_along_axis(x, at, axis=1)[:, 0] for x in (tree.candidates, rest))
        weights = _replace(weights, ids, jnp.log(rest))
        place = position + jnp.take_along_axis(tree.depth, leaf[:, None], axis=1)[:, 0]
        keys = noise_keys(request.seed, place[:, None], request.round, Purpose.RESIDUAL)[:, 0]
        return Verdict(leaf, choice(weights + gumbel(keys, shard_ids(weights, ALL_AXES)), ALL_AXES))


def conditioned(
    perturbed: Float[Array, "batch frontier ids"],
    score: Float[Array, "batch frontier"],
    log_prob: Float[Array, "batch frontier"],
) -> Float[Array, "batch frontier ids"]:
    """Scores of children: Gumbel-perturbed log-probabilities given that the greatest of siblings is their parent's.

    perturbed: log q plus noise. Monotone among siblings (Kool et al. 2019, appendix B.3).
    """
    greatest = jnp.max(perturbed, axis=-1, keepdims=True)
    score, log_prob = score[:, :, None], log_prob[:, :, None]
    possible = (perturbed > -jnp.inf) & (score > -jnp.inf)
    own = jnp.where(possible, perturbed, greatest)
    v = score - (log_prob + own) + jnp.log1p(-jnp.exp(own - greatest))
    result = score - jnp.maximum(v, 0.0) - jnp.log1p(jnp.exp(-jnp.abs(v)))
    return jnp.where(possible, result, -jnp.inf)


class Trial(NamedTuple):
    """State of every node after some of its children have been tried.

    left[b, i, c]: candidate c was not rejected. The target's distribution has become max(0, p - spent * q), not
    normalised, and the draft's q without the rejected. accepted: the child that was, or 0.
    """

    left: Bool[Array, "batch nodes ids"]
    spent: Float[Array, "batch nodes"]
    accepted: Int[Array, "batch nodes"]


def accept_children(
    p: Float[Array, "batch nodes ids"], tree: Tree, u: Float[Array, "batch nodes"]
) -> tuple[Bool[Array, "batch nodes"], Float[Array, "batch nodes ids"]]:
    """Which nodes are accepted if their parents are, and what each node leaves of p if none of its children is.

    p: the target's probabilities of each node's candidates; u: uniform in [0, 1). In the order drawn, child k is
    accepted with min(1, p(k) / q(k)); if not, p <- norm(max(0, p - q)) and q <- q without k, renormalised. Composed,
    the subtractions are one with a growing factor, so nothing but that factor is kept of a rejection.
    """

    def try_child(trial: Trial, child: Int[Array, "batch nodes"]) -> tuple[Trial, None]:
        rank = jnp.take_along_axis(tree.rank, child, axis=1)[:, :, None]
        (target, target_norm), (draft, draft_norm) = (
            target_left(p, tree.q, trial),
            draft_left(tree.q, trial),
        )
        target_at, draft_at = (
            jnp.take_along_axis(x, rank, axis=-1)[:, :, 0] for x in (target, draft)
        )
        passes = (
            jnp.take_along_axis(u, child, axis=1) * draft_at * target_norm < target_at * draft_norm
        )
        tried = (child > 0) & (trial.accepted == 0)
        rejected = tried & ~passes
        chosen = jnp.arange(p.shape[2], dtype=jnp.int32)[None, None, :] == rank
        factor = target_norm / jnp.where(rejected, draft_norm, 1.0)
        return Trial(
            left=trial.left & ~(chosen & rejected[:, :, None]),
            spent=trial.spent + jnp.where(rejected, factor, 0.0),
            accepted=jnp.where(tried & passes, child, trial.accepted),
        ), None

    nodes = tree.tokens.shape
    start = Trial(
        jnp.ones(p.shape, bool), jnp.zeros(nodes, jnp.float32), jnp.zeros(nodes, jnp.int32)
    )
    end, _ = jax.lax.scan(try_child, start, jnp.moveaxis(children(tree), 2, 0))
    own = jnp.arange(nodes[1], dtype=jnp.int32)[None, :]
    accept = jnp.take_along_axis(end.accepted, tree.parent, axis=1) == own
    rest, norm = target_left(p, tree.q, end)
    return accept, jnp.where(norm[:, :, None] < ROUNDING, p, rest)


def target_left(
    p: Float[Array, "batch nodes ids"], q: Float[Array, "batch nodes ids"], trial: Trial
) -> tuple[Float[Array, "batch nodes ids"], Float[Array, "batch nodes"]]:
    """Target's distribution after rejections, unnormalised, and its sum over the whole vocabulary."""
    rest = jnp.where(trial.left, jnp.maximum(p - trial.spent[:, :, None] * q, 0.0), 0.0)
    outside = jnp.maximum(1.0 - jnp.sum(p, axis=-1), 0.0)
    return rest, outside + jnp.sum(rest, axis=-1)


def draft_left(
    q: Float[Array, "batch nodes ids"], trial: Trial
) -> tuple[Float[Array, "batch nodes ids"], Float[Array, "batch nodes"]]:
    """Draft's distribution after rejections, unnormalised, and its sum."""
    rest = jnp.where(trial.left, q, 0.0)
    return rest, jnp.sum(rest, axis=-1)


def _replace(
    row: Float[Array, "batch vocab_shard"],
    ids: Int[Array, "batch ids"],
    values: Float[Array, "batch ids"],
) -> Float[Array, "batch vocab_shard"]:
    """A shard of rows with other values at some ids of the whole vocabulary."""
    size = row.shape[-1]
    local = ids - shard_index(ALL_AXES) * size
    local = jnp.where(local >= 0, local, size)
    return jax.vmap(lambda r, i, x: r.at[i].set(x, mode="drop"))(row, local, values)
