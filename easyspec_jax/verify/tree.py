"""Token trees: drafts that share prefixes, verified in one pass under a mask.

The idea is SpecInfer's (arXiv 2305.09781). A chain is a tree of width 1.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from easyspec_jax.sampling.vocabulary import NO_TOKEN

_ARRAYS = [
    *("tokens", "parent", "depth", "entry", "score", "ancestors", "rank", "candidates", "q"),
    "sure",
]


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
        sure: Nodes that were proposed with certainty instead of being drawn from q. They come after
            their siblings. None if there are no such nodes.

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
    sure: Bool[Array, "batch nodes"] | None = None

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


def without_nodes(shapes: Tree, root: Int[Array, " batch"]) -> Tree:
    """Make trees of given shapes in which all nodes but the roots are missing.

    Args:
        shapes: A tree of arrays, or of jax.ShapeDtypeStructs.
        root: Each row's root.
    """
    batch, nodes = shapes.tokens.shape
    is_root = np.arange(nodes) == 0
    return replace(
        jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes),
        tokens=jnp.where(is_root[None], root[:, None], 0),
        score=jnp.broadcast_to(np.where(is_root, 0, -np.inf).astype(np.float32), (batch, nodes)),
        ancestors=jnp.broadcast_to(np.eye(nodes, dtype=bool), (batch, nodes, nodes)),
        candidates=jnp.full(shapes.candidates.shape, NO_TOKEN, jnp.int32),
    )


def sure_chain(
    root: Int[Array, " batch"], tokens: Int[Array, "batch levels"], exists: Bool[Array, " batch"]
) -> Tree:
    """Make trees of one path each, whose tokens were proposed with certainty rather than drawn.

    Args:
        root: Each row's root.
        tokens: The tokens below it, one a level.
        exists: Whether a row has that path, or nothing but a root.

    Examples:
        >>> tree = sure_chain(jnp.array([5]), jnp.array([[6, 7]]), jnp.array([True]))
        >>> tree.tokens.tolist(), tree.parent.tolist(), tree.depth.tolist()
        ([[5, 6, 7]], [[0, 0, 1]], [[0, 1, 2]])
        >>> tree.candidates[0, :, 0].tolist(), tree.q[0, :, 0].tolist()
        ([6, 7, 0], [1.0, 1.0, 0.0])
    """
    batch, levels = tokens.shape
    nodes = np.arange(levels + 1, dtype=np.int32)
    shape = (batch, levels + 1)
    missing = (nodes > 0)[None, :] & ~exists[:, None]
    # A node's only candidate is the token of the next node; the last one has none.
    next_token = jnp.pad(tokens, ((0, 0), (0, 1)))
    q = jnp.where(exists[:, None] & (nodes < levels)[None, :], np.float32(1), np.float32(0))
    return Tree(
        tokens=jnp.concatenate([root[:, None], tokens], axis=1),
        parent=jnp.broadcast_to(np.maximum(nodes - 1, 0), shape),
        depth=jnp.broadcast_to(nodes, shape),
        entry=jnp.broadcast_to(nodes, shape),
        score=jnp.where(missing, -np.float32(np.inf), np.float32(0)),
        ancestors=jnp.broadcast_to(np.tri(levels + 1, dtype=bool), (*shape, levels + 1)),
        rank=jnp.zeros(shape, jnp.int32),
        candidates=next_token[:, :, None],
        q=q[:, :, None],
        width=1,
    )


def graft(tree: Tree, tokens: Int[Array, "batch levels"], exists: Bool[Array, " batch"]) -> Tree:
    """Add to each tree a path of tokens that were proposed with certainty.

    A path shares the nodes with which it begins, if the tree has them. The rest hangs below the
    last of these, behind the children that were drawn there. With the path 11, 13, 14:

        10 ─── 11 ─── 12        becomes     10 ─── 11 ─┬─ 12
                                                       └─ 13 ─── 14

    Args:
        tree: The trees, of as many levels as the paths have tokens, or fewer.
        tokens: Each row's path, below the root.
        exists: Whether a row has a path.

    Returns:
        Trees with one more node for each token of a path, behind the others. Those of shared tokens
        do not exist. Candidates have one more column.

    Examples:
        >>> tree = sure_chain(jnp.array([10]), jnp.array([[11, 12]]), jnp.array([True]))
        >>> grafted = graft(tree, jnp.array([[11, 13]]), jnp.array([True]))
        >>> grafted.tokens.tolist(), grafted.exists.astype(int).tolist()
        ([[10, 11, 12, 11, 13]], [[1, 1, 1, 0, 1]])
        >>> grafted.parent[0, 4].item()
        1
        >>> grafted.candidates[0].tolist()
        [[11, -1], [12, 13], [0, -1], [-1, 13], [-1, -1]]
    """
    batch, levels = tokens.shape
    old = tree.tokens.shape[1]
    column = tree.candidates.shape[2]
    steps = np.arange(levels, dtype=np.int32)[None, :]  # of the path; node old + i has depth i + 1

    # The path's token at the depth of each node, and the deepest node that the path shares.
    padded = jnp.pad(tokens, ((0, 0), (1, 0)), constant_values=NO_TOKEN)
    shared = deepest(tree, tree.tokens == jnp.take_along_axis(padded, tree.depth, axis=1))[:, None]
    depth = jnp.take_along_axis(tree.depth, shared, axis=1)
    new = exists[:, None] & (steps >= depth)
    is_first = steps == depth

    # Below the last shared node the path's token gets a column of its own, unless it is among the
    # candidates there already.
    of_shared = jnp.take_along_axis(tree.candidates, shared[:, :, None], axis=1)[:, 0]
    first = jnp.take_along_axis(padded, jnp.minimum(depth + 1, levels), axis=1)
    known = of_shared == first
    is_known = jnp.any(known, axis=1, keepdims=True)
    place = jnp.argmax(known, axis=1).astype(jnp.int32)[:, None]
    rank = jnp.where(is_first & is_known, place, column)
    has_child = exists[:, None] & (depth < levels) & ~is_known
    at_shared = has_child & (np.arange(old, dtype=np.int32)[None, :] == shared)
    # A new node's only candidate is the token of the next one.
    behind = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)), constant_values=NO_TOKEN)
    own = jnp.concatenate([jnp.where(at_shared, first, NO_TOKEN), behind], axis=1)
    candidates = jnp.pad(tree.candidates, ((0, 0), (0, levels), (0, 0)), constant_values=NO_TOKEN)
    q = jnp.pad(tree.q, ((0, 0), (0, levels), (0, 1)))
    certain = np.zeros(q.shape[1:], np.float32)
    certain[old : old + levels - 1, column] = 1

    # Ancestors of a new node: those of the shared one, and the new nodes up to itself. A missing
    # one has itself as well, so that no path to it is accepted.
    above = jnp.take_along_axis(tree.ancestors, shared[:, :, None], axis=1)
    above = jnp.broadcast_to(above, (batch, levels, old))
    among = new[:, None, :] & np.tri(levels, dtype=bool)[None] | np.eye(levels, dtype=bool)[None]
    score = jnp.where(new, jnp.take_along_axis(tree.score, shared, axis=1), -jnp.inf)
    entry = jnp.broadcast_to(old + steps, tokens.shape)

    def joined(x: Array, y: Array) -> Array:
        return jnp.concatenate([x, y], axis=1)

    return Tree(
        tokens=joined(tree.tokens, tokens),
        parent=joined(tree.parent, jnp.where(is_first, shared, np.maximum(old + steps - 1, 0))),
        depth=joined(tree.depth, jnp.broadcast_to(steps + 1, tokens.shape)),
        entry=joined(tree.entry, entry),
        score=joined(tree.score, score),
        ancestors=joined(
            jnp.pad(tree.ancestors, ((0, 0), (0, 0), (0, levels))),
            jnp.concatenate([above, among], axis=2),
        ),
        rank=joined(tree.rank, rank),
        candidates=jnp.concatenate([candidates, own[:, :, None]], axis=2),
        q=q + certain[None],
        width=tree.width + 1,
        sure=joined(jnp.zeros(tree.tokens.shape, bool), new),
    )


def hang(
    tree: Tree,
    root: Int[Array, " batch"],
    tokens: Int[Array, "batch most"],
    count: Int[Array, " batch"],
) -> Tree:
    """Hang each tree below a path of tokens that were proposed with certainty.

    A tree's root is the last token of its path. With the path 11, 12 below the root 10:

        12 ─┬─ 13        becomes     10 ─── 11 ─── 12 ─┬─ 13
            └─ 14                                      └─ 14

    Args:
        tree: The trees.
        root: Each row's root.
        tokens: The tokens below it, one a level; only the first `count` mean anything.
        count: How many a row has. With none, the tree stays.

    Returns:
        Trees with `most` nodes more. The path comes first, and nodes that do not exist last. A node
        lies `count` entries further in the draft's cache.

    Examples:
        >>> tree = sure_chain(jnp.array([12]), jnp.array([[13]]), jnp.array([True]))
        >>> below = hang(tree, jnp.array([10]), jnp.array([[11, 12, 99]]), jnp.array([2]))
        >>> below.tokens[0, :4].tolist(), below.parent[0, :4].tolist(), below.depth[0, :4].tolist()
        ([10, 11, 12, 13], [0, 0, 1, 2], [0, 1, 2, 3])
        >>> below.candidates[0, :, 0].tolist(), below.exists[0].tolist()
        ([11, 12, 13, 0, -1], [True, True, True, True, False])
    """
    old, most = tree.tokens.shape[1], tokens.shape[1]
    number = np.arange(old + most, dtype=np.int32)[None, :]
    end = count[:, None]  # number of the tree's root
    # A path of 1, and trees of 3 nodes, with room for paths of 2:
    #   number       0     1     2     3     4
    #   of the tree        0     1     2
    #   on_path      yes   yes
    #   missing                              yes
    of_tree = jnp.clip(number - end, 0, old - 1)
    on_path, missing = number <= end, number - end >= old

    def take(x: Array, of_path: Any, nothing: Any) -> Array:
        """Take the tree's values, and others on the path down to the tree's root and behind."""
        values = jax.vmap(lambda row, i: row[i])(x, of_tree)
        wide = [y.reshape(*y.shape, *[1] * (x.ndim - 2)) for y in (on_path, missing)]
        return jnp.where(wide[0], of_path, jnp.where(wide[1], nothing, values)).astype(x.dtype)

    ids = jnp.pad(jnp.concatenate([root[:, None], tokens], axis=1), ((0, 0), (0, old)))
    # The tree's root keeps its candidates; a node above it has the next token for its only one.
    above = (number < end)[:, :, None]
    first = np.arange(tree.q.shape[2]) == 0
    only = jnp.where(first, ids[:, 1:, None], NO_TOKEN)
    at_root = tree.candidates[:, :1], tree.q[:, :1]
    column, line = number[0][None, None, :], number[0][None, :, None]
    taken = jax.vmap(lambda row, i: row[i][:, i])(tree.ancestors, of_tree)
    inherited = jnp.where(column <= end[:, :, None], column <= line, taken & ~missing[:, None, :])
    return Tree(
        tokens=take(tree.tokens, ids[:, :-1], 0),
        parent=take(tree.parent + end, np.maximum(number - 1, 0), 0),
        depth=take(tree.depth + end, number, 0),
        entry=take(tree.entry + end, number, 0),
        score=take(tree.score, np.float32(0), -np.float32(np.inf)),
        ancestors=jnp.where(missing[:, :, None], column == line, inherited),
        rank=take(tree.rank, 0, 0),
        candidates=take(tree.candidates, jnp.where(above, only, at_root[0]), NO_TOKEN),
        q=take(tree.q, jnp.where(above, first.astype(np.float32), at_root[1]), np.float32(0)),
        width=max(tree.width, 1),
        sure=None if tree.sure is None else take(tree.sure, False, False),
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


def first_nodes(tree: Tree, count: int) -> Tree:
    """Leave out all nodes but the first ones.

    Args:
        tree: The trees.
        count: Nodes to take, the root among them.

    Examples:
        >>> chain = sure_chain(jnp.array([5]), jnp.array([[6, 7]]), jnp.array([True]))
        >>> first_nodes(chain, 2).tokens.tolist()
        [[5, 6]]
    """
    fewer: Tree = jax.tree.map(lambda x: x[:, :count], tree)
    width = min(tree.width, count - 1)
    return replace(fewer, ancestors=fewer.ancestors[:, :, :count], width=width)


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


def drafted_tokens(tree: Tree, levels: int) -> Int[Array, "batch nodes levels"]:
    """List the tokens from each node up to the root, which is left out; then NO_TOKEN.

    Args:
        tree: The trees.
        levels: Levels below the root that the result has room for.

    Examples:
        A chain of two tokens below the root:

        >>> chain = replace(
        ...     bare_root(jnp.array([5])),
        ...     tokens=jnp.array([[5, 6, 7]]),
        ...     parent=jnp.array([[0, 0, 1]]),
        ... )
        >>> drafted_tokens(chain, levels=2).tolist()
        [[[-1, -1], [6, -1], [7, 6]]]
    """
    number = jnp.arange(tree.parent.shape[1], dtype=jnp.int32)
    node = jnp.broadcast_to(number, tree.parent.shape)
    columns = []
    for _ in range(levels):
        token = jnp.take_along_axis(tree.tokens, node, axis=1)
        columns.append(jnp.where(node > 0, token, NO_TOKEN))
        node = jnp.take_along_axis(tree.parent, node, axis=1)  # the root's own parent is the root
    empty = jnp.zeros((*tree.parent.shape, 0), jnp.int32)
    return jnp.stack(columns, axis=2) if columns else empty


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
