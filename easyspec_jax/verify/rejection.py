"""Rejection sampling: texts have exactly the target's distribution, whatever the draft proposes.

On a chain this is speculative sampling (Leviathan, Kalman, Matias 2022, arXiv 2211.17192; Chen et
al. 2023, arXiv 2302.01318); on a tree, recursive rejection sampling of children that are drawn
without replacement (Jeon et al. 2024, arXiv 2402.14160).

With target distribution p and draft distribution q, a token x drawn from q is accepted with
probability min(1, p(x) / q(x)). If it is rejected, the token is drawn from the residual
norm(max(0, p - q)) instead. Either way it is a sample of p:

    token             a     b     c
    q                0.6   0.3   0.1     what the draft proposes
    p                0.2   0.4   0.4     what the text must follow
    min(p, q)        0.2   0.3   0.1     proposed and accepted: 0.6 in total
    max(0, p - q)     0    0.1   0.3     the rejected 0.4 goes where p still lacks probability

Proposal and result then agree with probability sum(min(p, q)), the most that any pairing of a
sample of q with a sample of p can reach: this is a maximal coupling of p and q.

With several children, each further one is tried against what its rejected siblings left of p.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from easyspec_jax.sampling.noise import Purpose, gumbel, noise_keys, numbered, uniform
from easyspec_jax.verify.distributions import ROUNDING, draft_log_probs, draw_after, target_rows
from easyspec_jax.verify.tree import Tree, children, deepest
from easyspec_jax.verify.verifier import CANDIDATES, Branches, RowSampling, Verdict


@dataclass(frozen=True)
class Rejection:
    """Sample drafts from the draft's warped distribution q; accept with min(1, p / q).

    q is cut to the draft's likeliest ids and renormalised; p is the target's warped distribution
    over the whole vocabulary.

    Attributes:
        truncates: Whether some request asks for top-k or top-p.
    """

    truncates: bool = False

    def candidates(self, width: int) -> int:
        """Return CANDIDATES or width, whichever is more. Other ids come from the residual only."""
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
        """Score paths as a stochastic beam: a sample of paths without replacement.

        The method is that of Kool et al. 2019 (arXiv 1903.06059). In descending order of score, a
        node's children are a sample of q without replacement. Given its earlier siblings, a child's
        score says nothing about its token; and scores alone decide which children become nodes and
        which survive pruning. The exactness of verify() rests on that. See Verifier.branch for
        arguments.
        """
        log_q = draft_log_probs(logits, request, self.truncates)
        # One key per row and position, then one per node: [batch] -> [batch, frontier].
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
        """Accept and reject all nodes at once, then draw the token after the accepted path.

        Acceptance needs p at the tree's candidates only, so logits stay on their vocabulary shards.
        See Verifier.verify for arguments.
        """
        rows, p = target_rows(target, tree, request, self.truncates)
        key = noise_keys(request.seed, position[:, None], request.round, Purpose.ACCEPT)[:, 0]
        accept, residual = accept_children(p, tree, uniform(numbered(key, tree.tokens.shape[1])))

        leaf = deepest(tree, accept)
        residual = jnp.take_along_axis(residual, leaf[:, None, None], axis=1)[:, 0]
        return Verdict(leaf, draw_after(leaf, residual, rows, tree, position, request))


def conditioned(
    perturbed: Float[Array, "batch frontier ids"],
    score: Float[Array, "batch frontier"],
    log_prob: Float[Array, "batch frontier"],
) -> Float[Array, "batch frontier ids"]:
    """Shift Gumbel-perturbed log-probabilities so that the greatest of siblings is their parent's.

    Let value = log_prob + perturbed be the perturbed log-probability of a child's path, and G the
    greatest among siblings. The scores

        -log(exp(-T) - exp(-G) + exp(-value))

    are distributed as the values are, given that the greatest is T (Kool et al. 2019, appendix
    B.3, whose numerically stable form this is). Siblings keep their order.

    Args:
        perturbed: Each child's log q plus Gumbel noise; -inf for tokens that cannot follow.
        score: The parents' scores (T); -inf for a node that does not exist.
        log_prob: Log-probabilities of the parents' paths.

    Returns:
        Scores of the children, -inf where there can be none.

    Examples:
        >>> perturbed = jnp.array([[[-0.3, -1.2, -jnp.inf]]])
        >>> scores = conditioned(perturbed, score=jnp.array([[-0.5]]), log_prob=jnp.array([[-1.0]]))
        >>> [f"{x:.2f}" for x in scores[0, 0]]
        ['-0.50', '-1.95', '-inf']
    """
    greatest = jnp.max(perturbed, axis=-1, keepdims=True)
    score, log_prob = score[:, :, None], log_prob[:, :, None]
    possible = (perturbed > -jnp.inf) & (score > -jnp.inf)
    own = jnp.where(possible, perturbed, greatest)  # keeps inf - inf out of what follows
    # v = T - value + log(1 - exp(value - G)), which is -inf for the greatest: its score is T.
    v = score - (log_prob + own) + jnp.log1p(-jnp.exp(own - greatest))
    result = score - jnp.maximum(v, 0.0) - jnp.log1p(jnp.exp(-jnp.abs(v)))
    return jnp.where(possible, result, -jnp.inf)


class Trial(NamedTuple):
    """State of every node after some of its children have been tried.

    A rejection subtracts a multiple of q from p and takes the child out of q. Subtractions add up:
    what is left of p is max(0, p - spent * q), and 0 at rejected candidates. Neither distribution
    is kept normalised; target_left() and draft_left() compute them with their sums.

    Attributes:
        left: Candidates that have not been rejected.
        spent: The multiple of q that has been subtracted from p.
        accepted: The accepted child, or 0 if none has been.
    """

    left: Bool[Array, "batch nodes ids"]
    spent: Float[Array, "batch nodes"]
    accepted: Int[Array, "batch nodes"]


def accept_children(
    p: Float[Array, "batch nodes ids"], tree: Tree, u: Float[Array, "batch nodes"]
) -> tuple[Bool[Array, "batch nodes"], Float[Array, "batch nodes ids"]]:
    """Try each node's children in the order drawn, until one is accepted.

    Child k is accepted with probability min(1, p(k) / q(k)). If it is not, p becomes
    norm(max(0, p - q)), q loses k and is renormalised, and the next child is tried. A child that
    was proposed with certainty comes last; there q is 1 at k and 0 elsewhere.

    Args:
        p: The target's probabilities of each node's candidates.
        tree: The drafted trees, with q for the same candidates.
        u: One uniform number in [0, 1) per node, which decides whether that node is accepted.

    Returns:
        Whether each node is accepted, given that its parent is; and, for nodes whose children are
        all rejected, what is left of p at the candidates, not normalised.

    Examples:
        One child of the root, candidate 0, with q = 0.6 and p = 0.2: accepted if u < 1/3.

        >>> tree = Tree(
        ...     tokens=jnp.array([[5, 0]]),
        ...     parent=jnp.array([[0, 0]]),
        ...     depth=jnp.array([[0, 1]]),
        ...     entry=jnp.array([[0, 1]]),
        ...     score=jnp.array([[0.0, -0.5]]),
        ...     ancestors=jnp.array([[[True, False], [True, True]]]),
        ...     rank=jnp.array([[0, 0]]),
        ...     candidates=jnp.array([[[0, 1, 2], [0, 0, 0]]]),
        ...     q=jnp.array([[[0.6, 0.3, 0.1], [0.0, 0.0, 0.0]]]),
        ...     width=1,
        ... )
        >>> p = jnp.array([[[0.2, 0.4, 0.4], [0.0, 0.0, 0.0]]])
        >>> accept, left = accept_children(p, tree, u=jnp.array([[0.0, 0.3]]))
        >>> accept[0, 1].item()
        True
        >>> accept, left = accept_children(p, tree, u=jnp.array([[0.0, 0.4]]))
        >>> accept[0, 1].item(), [f"{x:.1f}" for x in left[0, 0]]
        (False, ['0.0', '0.1', '0.3'])
    """

    def try_child(trial: Trial, child: Int[Array, "batch nodes"]) -> tuple[Trial, None]:
        # child[b, i] is node i's next child, or 0. Its candidate number selects p and q at node i.
        rank = jnp.take_along_axis(tree.rank, child, axis=1)[:, :, None]
        target, target_norm = target_left(p, tree.q, trial)
        draft, draft_norm = draft_left(tree.q, trial)
        target_at = jnp.take_along_axis(target, rank, axis=-1)[:, :, 0]
        draft_at = jnp.take_along_axis(draft, rank, axis=-1)[:, :, 0]
        sure = jnp.zeros_like(child, bool)
        if tree.sure is not None:
            # Proposed with certainty, its q is 1 whatever is left of the others': it is accepted
            # with its own probability, and a rejection takes nothing but itself from p.
            sure = jnp.take_along_axis(tree.sure, child, axis=1)
            draft_at, draft_norm = (jnp.where(sure, 1.0, x) for x in (draft_at, draft_norm))
        # u < (target_at / target_norm) / (draft_at / draft_norm), without dividing.
        passes = (
            jnp.take_along_axis(u, child, axis=1) * draft_at * target_norm < target_at * draft_norm
        )
        tried = (child > 0) & (trial.accepted == 0)
        rejected = tried & ~passes
        chosen = jnp.arange(p.shape[2], dtype=jnp.int32)[None, None, :] == rank
        # target / target_norm - draft / draft_norm, times target_norm, subtracts this much of q.
        factor = target_norm / jnp.where(rejected, draft_norm, 1.0)
        return Trial(
            left=trial.left & ~(chosen & rejected[:, :, None]),
            spent=trial.spent + jnp.where(rejected & ~sure, factor, 0.0),
            accepted=jnp.where(tried & passes, child, trial.accepted),
        ), None

    nodes = tree.tokens.shape
    start = Trial(
        jnp.ones(p.shape, bool), jnp.zeros(nodes, jnp.float32), jnp.zeros(nodes, jnp.int32)
    )
    # One step per sibling, for all nodes at once: [batch, nodes, width] -> [width, batch, nodes].
    end, _ = jax.lax.scan(try_child, start, jnp.moveaxis(children(tree), 2, 0))
    own = jnp.arange(nodes[1], dtype=jnp.int32)[None, :]
    accept = jnp.take_along_axis(end.accepted, tree.parent, axis=1) == own
    rest, norm = target_left(p, tree.q, end)
    # All children rejected and nothing of p left: only rounding gets there. Then p itself is used.
    return accept, jnp.where(norm[:, :, None] < ROUNDING, p, rest)


def target_left(
    p: Float[Array, "batch nodes ids"], q: Float[Array, "batch nodes ids"], trial: Trial
) -> tuple[Float[Array, "batch nodes ids"], Float[Array, "batch nodes"]]:
    """Compute what rejections left of the target's distribution.

    Args:
        p: The target's probabilities of each node's candidates.
        q: The draft's.
        trial: What has been tried.

    Returns:
        What is left at the candidates, not normalised; and its sum over the whole vocabulary.
    """
    rest = jnp.where(trial.left, jnp.maximum(p - trial.spent[:, :, None] * q, 0.0), 0.0)
    # Other ids have q = 0, so p loses nothing there.
    outside = jnp.maximum(1.0 - jnp.sum(p, axis=-1), 0.0)
    return rest, outside + jnp.sum(rest, axis=-1)


def draft_left(
    q: Float[Array, "batch nodes ids"], trial: Trial
) -> tuple[Float[Array, "batch nodes ids"], Float[Array, "batch nodes"]]:
    """Compute what rejections left of the draft's distribution, not normalised, and its sum."""
    rest = jnp.where(trial.left, q, 0.0)
    return rest, jnp.sum(rest, axis=-1)
