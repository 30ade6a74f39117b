"""Greedy decoding: a drafted token is accepted if it is the target's arg-max."""

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
    """Accept what the target prefers; draft the likeliest paths (a beam).

    Whatever the tree holds, the text is the target's own choice token by token, so exactness asks
    nothing of the draft. The target's arg-max is found on vocabulary shards, so logits stay there.
    """

    def candidates(self, width: int) -> int:
        """Return 1 for a chain, else CANDIDATES or width, whichever is more.

        A chain takes the draft's best token. To compare paths, a tree needs their probabilities.
        """
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
        """Score each path by the log-softmax of the draft's preferences along it.

        That is how sure the draft is that this very path wins. See Verifier.branch for arguments.
        """
        positions = jnp.broadcast_to(position[:, None], logits.shape[:2])
        own = jax.nn.log_softmax(self.preference(logits, ids, positions, request, ()), axis=-1)
        # [batch, frontier, 1] + [batch, frontier, ids]. The minimum keeps rounding from lifting a
        # child above its parent.
        paths = score[:, :, None] + jnp.minimum(own, 0.0)
        return Branches(paths, paths, jnp.exp(own))

    def verify(
        self,
        target: Float[Array, "batch nodes vocab_shard"],
        tree: Tree,
        position: Int[Array, " batch"],
        request: RowSampling,
    ) -> Verdict:
        """Accept the nodes that the target prefers after their parents, wherever they are.

        See Verifier.verify for arguments.
        """
        rows = target.reshape(-1, target.shape[-1])
        ids = shard_ids(rows, ALL_AXES).reshape(target.shape)
        # The token after a node of depth d has the position of the token after the root, plus d.
        preferred = self.preference(target, ids, position[:, None] + tree.depth, request, ALL_AXES)
        tokens = choice(preferred.reshape(rows.shape), ALL_AXES).reshape(tree.tokens.shape)
        # tokens[b, i] is the target's choice after node i. Node i itself is accepted if it is the
        # choice after its parent:
        #   node      0    1    2    3        after  0    1    2    3
        #   parent    0    0    0    1        choice cat  sat  .    on
        #   token     the  cat  dog  sat      -> 1 and 3 are accepted, and "on" follows 3
        leaf = deepest(tree, tree.tokens == jnp.take_along_axis(tokens, tree.parent, axis=1))
        return Verdict(leaf, jnp.take_along_axis(tokens, leaf[:, None], axis=1)[:, 0])

    def preference(
        self,
        logits: Float[Array, "batch nodes ids"],
        ids: Int[Array, "batch nodes ids"],
        position: Int[Array, "batch nodes"],
        request: RowSampling,
        axes: Axes,
    ) -> Float[Array, "batch nodes ids"]:
        """Return scores whose arg-max is a model's choice after each node: here, the logits.

        Args:
            logits: A model's logits after each node.
            ids: Their token ids.
            position: Absolute position of the token after each node.
            request: Each row's noise and distribution.
            axes: Mesh axes that split the ids; () where every device has all that are given.
        """
        return logits
