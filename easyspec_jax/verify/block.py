"""Block verification: a drafted chain is accepted or cut short as a whole, never token by token.

Rejection sampling decides about each token alone, so a token that the draft likes too much may be
rejected even if the target likes what comes after it better than the draft does. Block verification
(Sun et al. 2024, arXiv 2403.10444) decides about paths. With w = 1 above the first token,

    w  <-  min(1, w p(x) / q(x))

is the probability with which the path up to x is accepted. So what one token has too much of is
made good by later ones. Of all rules that see one path, this accepts the most tokens on average.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from easyspec_jax.sampling.noise import Purpose, noise_keys, numbered, uniform
from easyspec_jax.verify.distributions import ROUNDING, draw_after, target_rows
from easyspec_jax.verify.rejection import Rejection
from easyspec_jax.verify.tree import Tree
from easyspec_jax.verify.verifier import RowSampling, Verdict


@dataclass(frozen=True)
class Block(Rejection):
    """Sample chains as Rejection does; accept as much of a chain as block verification allows.

    Attributes:
        truncates: Whether some request asks for top-k or top-p.
    """

    def verify(
        self,
        target: Float[Array, "batch nodes vocab_shard"],
        tree: Tree,
        position: Int[Array, " batch"],
        request: RowSampling,
    ) -> Verdict:
        """Decide how far a chain is accepted, then draw the token after it.

        See Verifier.verify for arguments.
        """
        rows, p = target_rows(target, tree, request, self.truncates)
        key = noise_keys(request.seed, position[:, None], request.round, Purpose.ACCEPT)[:, 0]
        leaf, residual = accept_path(p, tree, uniform(numbered(key, tree.tokens.shape[1])))
        return Verdict(leaf, draw_after(leaf, residual, rows, tree, position, request))


class Walk(NamedTuple):
    """State on the way down a chain.

    Attributes:
        weight: Probability with which the path up to a node is accepted.
        leaf: The deepest node so far at which the text may leave the chain.
        residual: What is left of p at that node's candidates, not normalised.
    """

    weight: Float[Array, " batch"]
    leaf: Int[Array, " batch"]
    residual: Float[Array, "batch ids"]


def accept_path(
    p: Float[Array, "batch nodes ids"], tree: Tree, u: Float[Array, "batch nodes"]
) -> tuple[Int[Array, " batch"], Float[Array, "batch ids"]]:
    """Decide how far each chain is accepted.

    After a path of weight w, the text leaves the chain with probability r / (r + 1 - w), where r is
    the sum of max(0, w p - q), and goes on with a sample of that residual. At the end of the chain
    it does with probability w, and goes on with p. The deepest such node counts.

    Args:
        p: The target's probabilities of each node's candidates.
        tree: The drafted chains, with q for the same candidates.
        u: One uniform number in [0, 1) for each node, which decides whether the text may leave.

    Returns:
        The last accepted node; and what is left of p at its candidates, not normalised, where other
        ids keep their p.

    Examples:
        A token with q = 0.6 and p = 0.3, and then one with q = 0.2 and p = 0.8. Both are accepted
        with probability min(1, 0.3 / 0.6 * 0.8 / 0.2) = 1; by itself the first one would have been
        rejected half the time.

        >>> chain = Tree(
        ...     tokens=jnp.array([[4, 5, 7]]),
        ...     parent=jnp.array([[0, 0, 1]]),
        ...     depth=jnp.array([[0, 1, 2]]),
        ...     entry=jnp.array([[0, 1, 2]]),
        ...     score=jnp.zeros((1, 3)),
        ...     ancestors=jnp.tri(3, dtype=bool)[None],
        ...     rank=jnp.array([[0, 0, 0]]),
        ...     candidates=jnp.array([[[5, 6], [7, 8], [0, 0]]]),
        ...     q=jnp.array([[[0.6, 0.4], [0.2, 0.8], [0.0, 0.0]]]),
        ...     width=1,
        ... )
        >>> p = jnp.array([[[0.3, 0.7], [0.8, 0.2], [0.0, 0.0]]])
        >>> leaf, _ = accept_path(p, chain, u=jnp.full((1, 3), 0.99))
        >>> leaf.item()
        2
    """
    nodes = tree.tokens.shape[1]
    # Whether a node has a child, and which of its candidates that is: [batch, nodes].
    has_child = jnp.pad(tree.exists[:, 1:], ((0, 0), (0, 1)))
    child = jnp.pad(tree.rank[:, 1:], ((0, 0), (0, 1)))

    def step(walk: Walk, node: Array) -> tuple[Walk, None]:
        target, q, inner, rank = (x[:, node] for x in (p, tree.q, has_child, child))
        left = jnp.maximum(walk.weight[:, None] * target - q, 0.0)
        outside = walk.weight * jnp.maximum(1.0 - jnp.sum(target, axis=1), 0.0)
        # Nothing is proposed at the end of the chain, whose candidates mean nothing.
        rest = jnp.where(inner, outside + jnp.sum(left, axis=1), walk.weight)
        bound = jnp.where(inner, rest + 1.0 - walk.weight, 1.0)
        # u < rest / bound, without dividing. The root is accepted already.
        leaves = tree.exists[:, node] & (u[:, node] * bound < rest) | (node == 0)
        # Nothing left of p: only rounding gets there. Then p itself is used.
        is_whole = ~inner | (rest < ROUNDING)
        left = jnp.where(is_whole[:, None], target, left / walk.weight[:, None])
        p_child, q_child = (
            jnp.take_along_axis(x, rank[:, None], axis=1)[:, 0] for x in (target, q)
        )
        return Walk(
            weight=jnp.where(inner, path_weight(walk.weight, p_child, q_child), walk.weight),
            leaf=jnp.where(leaves, node, walk.leaf),
            residual=jnp.where(leaves[:, None], left, walk.residual),
        ), None

    rows = tree.tokens.shape[0]
    start = Walk(jnp.ones(rows, jnp.float32), jnp.zeros(rows, jnp.int32), p[:, 0])
    end, _ = jax.lax.scan(step, start, jnp.arange(nodes, dtype=jnp.int32))
    return end.leaf, end.residual


def path_weight(
    weight: Float[Array, " batch"], p: Float[Array, " batch"], q: Float[Array, " batch"]
) -> Float[Array, " batch"]:
    """Return the weight of a path that goes on with a token; see the module."""
    return jnp.minimum(1.0, weight * p / q)
