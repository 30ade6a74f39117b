"""Token trees: drafts that share prefixes, verified in one pass under a mask.

The idea is SpecInfer's (arXiv 2305.09781). A chain is a tree of width 1.
"""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

_ARRAYS = ["tokens", "parent", "depth", "entry", "score", "ancestors", "rank", "candidates", "q"]


@partial(jax.tree_util.register_dataclass, data_fields=_ARRAYS, meta_fields=["width"])
@dataclass(frozen=True)
class Tree:
    """Drafted tokens below a root, one tree per row of the batch.

    Node 0 is the root: the last token of the text, which needs no verification. Every other node
    comes after its parent, and siblings come in the order in which they were drawn.

    Attributes:
        tokens: Token id of each node.
        parent: Node that each node follows; the root's own is 0.
        depth: Levels below the root.
        entry: Number that the node had when it was drafted, before any pruning. The draft's cache
            holds the node's keys and values at the root's entry plus this number.
        score: Worth of verifying the node, never above its parent's; -inf for a missing node.
        ancestors: `ancestors[b, i, j]` says that node j is node i or above it.
        rank: Which of its parent's candidates the node is; 0 for the root.
        candidates: Token ids among which the node's children were drawn, [batch, nodes, ids].
        q: The draft's probabilities of these candidates; all 0 for nodes of the last level.
        width: Most nodes of any level; 0 for a bare root.

    Examples:
        Two levels of width 2 below the token 10. Both nodes of level 2 follow node 1:

            10 ─┬─ 11 ─┬─ 13        nodes  0 ─┬─ 1 ─┬─ 3
                │      └─ 14                  │     └─ 4
                └─ 12                         └─ 2

        >>> none = jnp.zeros((1, 5), jnp.int32)
        >>> tree = Tree(
        ...     tokens=jnp.array([[10, 11, 12, 13, 14]]),
        ...     parent=jnp.array([[0, 0, 0, 1, 1]]),
        ...     depth=jnp.array([[0, 1, 1, 2, 2]]),
        ...     entry=jnp.arange(5)[None],
        ...     score=jnp.array([[0.0, -0.2, -1.5, -0.9, -1.6]]),
        ...     ancestors=jnp.array(
        ...         [
        ...             [
        ...                 [True, False, False, False, False],
        ...                 [True, True, False, False, False],
        ...                 [True, False, True, False, False],
        ...                 [True, True, False, True, False],
        ...                 [True, True, False, False, True],
        ...             ]
        ...         ]
        ...     ),
        ...     rank=none,
        ...     candidates=none[:, :, None],
        ...     q=none[:, :, None].astype(jnp.float32),
        ...     width=2,
        ... )
        >>> children(tree)[0].tolist()
        [[1, 2], [3, 4], [0, 0], [0, 0], [0, 0]]
        >>> leaf = deepest(tree, accept=jnp.array([[True, True, False, False, True]]))
        >>> leaf.tolist(), path_to(tree, leaf, levels=2).tolist()
        ([4], [[0, 1, 4]])
        >>> pruned = prune(tree, nodes=2)
        >>> pruned.tokens.tolist(), pruned.parent.tolist(), pruned.entry.tolist()
        ([[10, 11, 13]], [[0, 0, 1]], [[0, 1, 3]])
    """

    tokens: Int[Array, "batch nodes"]
    parent: Int[Array, "batch nodes"]
    depth: Int[Array, "batch nodes"]
    entry: Int[Array, "batch nodes"]
    score: Float[Array, "batch nodes"]
    ancestors: Bool[Array, "batch nodes nodes"]
    rank: Int[Array, "batch nodes"]
    candidates: Int[Array, "batch nodes ids"]
    q: Float[Array, "batch nodes ids"]
    width: int

    @property
    def exists(self) -> Bool[Array, "batch nodes"]:
        """Which nodes exist: a draft may find fewer possible tokens than a level has places."""
        return self.score > -jnp.inf


def bare_root(tokens: Int[Array, " batch"]) -> Tree:
    """Make trees that have nothing but a root, as plain decoding verifies them.

    Examples:
        >>> tree = bare_root(jnp.array([5, 7]))
        >>> tree.tokens.tolist(), tree.width
        ([[5], [7]], 0)
    """
    zero = jnp.zeros((tokens.shape[0], 1), jnp.int32)
    return Tree(
        tokens=tokens[:, None],
        parent=zero,
        depth=zero,
        entry=zero,
        score=zero.astype(jnp.float32),
        ancestors=jnp.ones((tokens.shape[0], 1, 1), bool),
        rank=zero,
        candidates=zero[:, :, None],
        q=zero[:, :, None].astype(jnp.float32),
        width=0,
    )


def prune(tree: Tree, nodes: int) -> Tree:
    """Keep the root and the best other nodes, in their old order.

    Args:
        tree: Trees of at least nodes + 1 nodes.
        nodes: How many nodes to keep besides the root.

    Returns:
        Smaller trees. A kept node's ancestors are kept too. See Tree for an example.
    """
    score = tree.score.at[:, 0].set(jnp.inf)
    # A parent's score is at least its child's, and of equal scores top_k takes the earlier node,
    # which the parent is: no node is kept without its parent.
    _, kept = jax.lax.top_k(score, nodes + 1)
    kept = jnp.sort(kept, axis=1)

    def prune_row(tree: Tree, kept: Int[Array, " kept"]) -> Tree:
        fewer = jax.tree.map(lambda x: x[kept], tree)
        # Parents are still old numbers. With kept = [0, 1, 3], the parent 3 becomes 2.
        parent = jnp.searchsorted(kept, fewer.parent).astype(jnp.int32)
        # Rows of ancestors are selected already; select the columns: [kept, nodes] -> [kept, kept].
        return replace(fewer, parent=parent, ancestors=fewer.ancestors[:, kept])

    return jax.vmap(prune_row)(tree, kept)


def children(tree: Tree) -> Int[Array, "batch nodes width"]:
    """List each node's children in the order drawn, padded with 0.

    The root is never a child, so 0 stands for "no child". See Tree for an example.
    """
    nodes, width = tree.parent.shape[1], tree.width
    is_child = tree.exists & (jnp.arange(nodes) > 0)[None, :]

    def of_row(
        parent: Int[Array, " nodes"], is_child: Bool[Array, " nodes"]
    ) -> Int[Array, "nodes width"]:
        # A node's column is the number of its earlier siblings. With parent = [0, 0, 0, 1, 1]:
        #   column    -  0  1  0  1      ("-": the root, and whatever does not exist, are dropped)
        sibling = (parent[:, None] == parent[None, :]) & is_child[None, :]
        column = jnp.sum(jnp.tril(sibling, -1), axis=1, dtype=jnp.int32)
        column = jnp.where(is_child, column, width)  # out of bounds, hence dropped
        empty = jnp.zeros((nodes, width), jnp.int32)
        return empty.at[parent, column].set(jnp.arange(nodes, dtype=jnp.int32), mode="drop")

    return jax.vmap(of_row)(tree.parent, is_child)


def deepest(tree: Tree, accept: Bool[Array, "batch nodes"]) -> Int[Array, " batch"]:
    """Find the deepest node that is accepted together with everything above it.

    Args:
        tree: The trees.
        accept: Whether each node is accepted, given that its parent is. The root always is.

    Returns:
        One node per row; of several as deep, the first. See Tree for an example.
    """
    accept = (accept & tree.exists).at[:, 0].set(True)
    # [batch, 1, nodes] | [batch, nodes, nodes]: every j is accepted, or not on the path to i.
    accepted_path = jnp.all(accept[:, None, :] | ~tree.ancestors, axis=2)
    return jnp.argmax(jnp.where(accepted_path, tree.depth, -1), axis=1).astype(jnp.int32)


def path_to(tree: Tree, leaf: Int[Array, " batch"], levels: int) -> Int[Array, "batch levels+1"]:
    """List the nodes from the root to a leaf.

    Args:
        tree: The trees.
        leaf: One node per row.
        levels: Levels below the root that the result has room for.

    Returns:
        The node of each depth on the path; 0 beyond the leaf. See Tree for an example.
    """
    above = jnp.take_along_axis(tree.ancestors, leaf[:, None, None], axis=1)
    depths = np.arange(levels + 1, dtype=np.int32)[None, :, None]
    # [batch, levels + 1, nodes]: at most one node of each depth is on the path; arg-max finds it.
    return jnp.argmax(above & (tree.depth[:, None, :] == depths), axis=2).astype(jnp.int32)
