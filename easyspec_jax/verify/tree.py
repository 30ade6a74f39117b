"""Token trees: drafts that share prefixes, verified by one pass under a mask (SpecInfer, arXiv 2305.09781)."""

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
    """Drafted tokens below the root, node 0, which is the last token of the text. A chain is a tree of width 1.

    A node comes behind its parent, siblings in the order in which they were drawn. depth: levels below the root.
    entry: the node's number when it was drafted, and its place in the draft's cache, counted from the root's.
    score: the greater, the better worth verifying, never above the parent's; -inf where there is no node.
    ancestors[b, i, j]: j is i or above it. candidates[b, i]: ids among which i's children were drawn, with
    probabilities q (0 for leaves); rank[b, i]: which of its parent's candidates i is. width: the most nodes of a level.
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
        """Which of the nodes were drawn at all: a draft may like fewer tokens than there is room for."""
        return self.score > -jnp.inf


def bare_root(tokens: Int[Array, " batch"]) -> Tree:
    """The tree of plain decoding."""
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
    """The root and the `nodes` best of the others, in their old order."""
    score = tree.score.at[:, 0].set(jnp.inf)
    _, kept = jax.lax.top_k(score, nodes + 1)  # equal scores: the parent comes first
    kept = jnp.sort(kept, axis=1)

    def of_row(tree: Tree, kept: Int[Array, " kept"]) -> Tree:
        fewer = jax.tree.map(lambda x: x[kept], tree)
        parent = jnp.searchsorted(kept, fewer.parent).astype(jnp.int32)
        return replace(fewer, parent=parent, ancestors=fewer.ancestors[:, kept])

    return jax.vmap(of_row)(tree, kept)


def children(tree: Tree) -> Int[Array, "batch nodes width"]:
    """Each node's children in the order drawn; 0, the root, stands for none."""
    nodes, width = tree.parent.shape[1], tree.width
    is_child = tree.exists & (jnp.arange(nodes) > 0)[None, :]

    def of_row(
        parent: Int[Array, " nodes"], is_child: Bool[Array, " nodes"]
    ) -> Int[Array, "nodes width"]:
        sibling = (parent[:, None] == parent[None, :]) & is_child[None, :]
        place = jnp.sum(jnp.tril(sibling, -1), axis=1, dtype=jnp.int32)
        place = jnp.where(is_child, place, width)
        empty = jnp.zeros((nodes, width), jnp.int32)
        return empty.at[parent, place].set(jnp.arange(nodes, dtype=jnp.int32), mode="drop")

    return jax.vmap(of_row)(tree.parent, is_child)


def deepest(tree: Tree, accept: Bool[Array, "batch nodes"]) -> Int[Array, " batch"]:
    """The deepest node that passes with everything above it. accept: passes if its parent does, the root always."""
    accept = (accept & tree.exists).at[:, 0].set(True)
    passed = jnp.all(accept[:, None, :] | ~tree.ancestors, axis=2)
    return jnp.argmax(jnp.where(passed, tree.depth, -1), axis=1).astype(jnp.int32)


def path_to(tree: Tree, leaf: Int[Array, " batch"], levels: int) -> Int[Array, "batch levels+1"]:
    """The nodes from the root to a leaf; what follows it is arbitrary."""
    above = jnp.take_along_axis(tree.ancestors, leaf[:, None, None], axis=1)
    depths = np.arange(levels + 1, dtype=np.int32)[None, :, None]
    return jnp.argmax(above & (tree.depth[:, None, :] == depths), axis=2).astype(jnp.int32)
