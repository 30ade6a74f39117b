"""Greedy decoding: a drafted token passes if it is the target's arg-max."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from easyspec_jax.parallel.mesh import ALL_AXES, Axes
from easyspec_jax.sampling.vocabulary import choice, shard_ids
from easyspec_jax.verify.tree import Tree, deepest
from easyspec_jax.verify.verifier import CANDIDATES, Branches, RowSampling, Verdict


@dataclass(frozen=True)
class Greedy:
    """The draft keeps the likeliest paths (a beam). The target's arg-max stays on shards; no row of logits moves."""

    def candidates(self, width: int) -> int:
        """A chain takes the best; to compare paths, their probabilities must be known."""
        return 1 if width == 1 else max(width, CANDIDATES)

    def branch(
        self,
        logits: Float[Array, "batch frontier ids"],
        ids: Int[Array, "batch frontier ids"],
        score: Float[Array, "batch frontier"],
        log_prob: Float[Array, "batch frontier"],
        position: Int[Array, " batch"],
        request: RowSampling,
    ) -> Branches:
        """A path's score is the log-probability that it agrees with the target if the draft is right."""
        positions = jnp.broadcast_to(position[:, None], logits.shape[:2])
        own = jax.nn.log_softmax(self.preference(logits, ids, positions, request, ()), axis=-1)
        paths = score[:, :, None] + jnp.minimum(own, 0.0)
        return Branches(paths, paths, jnp.exp(own))

    def verify(
        self,
        target: Float[Array, "batch nodes vocab_shard"],
        tree: Tree,
        position: Int[Array, " batch"],
        request: RowSampling,
    ) -> Verdict:
        """Accepts what the target prefers, wherever it is in the tree."""
        rows = target.reshape(-1, target.shape[-1])
        ids = shard_ids(rows, ALL_AXES).reshape(target.shape)
        preferred = self.preference(target, ids, position[:, None] + tree.depth, request, ALL_AXES)
        tokens = choice(preferred.reshape(rows.shape), ALL_AXES).reshape(tree.tokens.shape)
        leaf = deepest(tree, tree.tokens == jnp.take_along_axis(tokens, tree.parent, axis=1))
        return Verdict(leaf, jnp.take_along_axis(tokens, leaf[:, None], axis=1)[:, 0])

    def preference(
        self,
        logits: Float[Array, "batch some ids"],
        ids: Int[Array, "batch some ids"],
        position: Int[Array, "batch some"],
        request: RowSampling,
        axes: Axes,
    ) -> Float[Array, "batch some ids"]:
        """Scores whose arg-max is a model's choice at absolute positions; axes: the mesh axes that split the ids."""
        return logits
