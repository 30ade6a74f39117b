"""Functions of token trees agree with plain walks, on trees made by hand and at random."""

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.typing import ArrayLike

from easyspec_jax.verify.tree import (
    NO_TOKEN,
    Tree,
    bare_root,
    children,
    deepest,
    first_nodes,
    graft,
    hang,
    path_to,
    prune,
    sure_chain,
)

BATCH, LEVELS, WIDTH = 24, 4, 3

# Jitted, as in decoding.
find_children, find_deepest = jax.jit(children), jax.jit(deepest)
find_path, cut = jax.jit(path_to, static_argnums=2), jax.jit(prune, static_argnums=1)


def make_tree(
    parents: ArrayLike, score: ArrayLike | None = None, tokens: ArrayLike | None = None
) -> Tree:
    """Make a tree for each row of parents, which come before their children.

    Fields that are not given differ from node to node, so that mixing them up is noticed.
    """
    parent = np.asarray(parents, np.int32)
    rows, nodes = np.arange(len(parent)), parent.shape[1]
    depth, ancestors = np.zeros_like(parent), np.zeros((*parent.shape, nodes), bool)
    ancestors[:, 0, 0] = True
    for node in range(1, nodes):
        depth[:, node] = depth[rows, parent[:, node]] + 1
        ancestors[:, node] = ancestors[rows, parent[:, node]]
        ancestors[:, node, node] = True
    numbers = np.arange(parent.size, dtype=np.int32).reshape(parent.shape)
    arrays: dict[str, Any] = {
        "tokens": numbers if tokens is None else np.asarray(tokens, np.int32),
        "parent": parent,
        "depth": depth,
        "entry": np.broadcast_to(np.arange(nodes, dtype=np.int32), parent.shape),
        "score": -depth.astype(np.float32) if score is None else np.asarray(score, np.float32),
        "ancestors": ancestors,
        "rank": numbers + 1000,
        "candidates": np.stack([numbers, -numbers], axis=-1),
        "q": np.stack([numbers, -numbers], axis=-1).astype(np.float32),
    }
    width = max(int(np.bincount(row[1:]).max()) for row in depth) if nodes > 1 else 0
    return Tree(**arrays, width=width)


def random_tree(seed: int, batch: int = BATCH, levels: int = LEVELS, width: int = WIDTH) -> Tree:
    """Make trees as drafted, level by level, with many equal scores and some missing branches."""
    random = np.random.default_rng(seed)
    first = [0, *range(1, 2 + levels * width, width)]
    parent = np.zeros((batch, first[-1]), np.int32)
    for above, here, below in zip(first, first[1:], first[2:], strict=False):
        parent[:, here:below] = random.integers(above, here, size=(batch, width))
    score = np.zeros(parent.shape)
    below_parent = random.choice([0, 0.5, 1, np.inf], p=[0.4, 0.25, 0.25, 0.1], size=parent.shape)
    for node in range(1, parent.shape[1]):
        score[:, node] = score[np.arange(batch), parent[:, node]] - below_parent[:, node]
    return make_tree(parent, score)


@pytest.fixture(scope="module", params=["whole", "pruned"])
def tree(request) -> Tree:
    """Trees with nodes of every kind: inner ones and leaves, existing or not."""
    tree = random_tree(0)
    return tree if request.param == "whole" else cut(tree, 8)


def by_row(*arrays: ArrayLike) -> zip:
    """Iterate over the rows of several arrays together, as lists."""
    return zip(*(np.asarray(x).tolist() for x in arrays), strict=True)


def test_children_by_hand():
    parents = [[0, 0, 0, 1, 1, 2, 5], [0, 0, 0, 2, 1, 2, 3]]
    score = np.zeros((2, 7))
    assert find_children(make_tree(parents)).tolist() == [
        [[1, 2, 0], [3, 4, 0], [5, 0, 0], [0, 0, 0], [0, 0, 0], [6, 0, 0], [0, 0, 0]],
        [[1, 2, 0], [4, 0, 0], [3, 5, 0], [6, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]],
    ]
    score[:, [3, 6]] = -np.inf
    assert find_children(make_tree(parents, score)).tolist() == [
        [[1, 2, 0], [4, 0, 0], [5, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]],
        [[1, 2, 0], [4, 0, 0], [5, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]],
    ]


def test_children_are_those_that_exist_in_their_order(tree):
    found = find_children(tree)
    assert found.shape == (*tree.parent.shape, WIDTH)
    assert found.dtype == jnp.int32
    for row, parent, exists in by_row(found, tree.parent, tree.exists):
        for node, ids in enumerate(row):
            own = [i for i in range(1, len(parent)) if parent[i] == node and exists[i]]
            assert ids == own + [0] * (WIDTH - len(own))


def test_deepest_is_that_of_a_walk(tree):
    """Of several nodes as deep, it is the first. A node that does not exist is never accepted."""
    accept = np.random.default_rng(1).random(tree.parent.shape) < 0.7
    found = find_deepest(tree, accept)
    assert found.dtype == jnp.int32
    depths = set()
    for leaf, row, parent, depth, exists in by_row(
        found, accept, tree.parent, tree.depth, tree.exists
    ):
        passed = [0]
        for node in range(1, len(parent)):
            passed += [node] if row[node] and exists[node] and parent[node] in passed else []
        assert leaf == max(passed, key=lambda node: (depth[node], -node))
        depths.add(depth[leaf])
    assert depths >= {0, 1, 2, 3}


def test_path_to_every_node(tree):
    for leaf in range(tree.parent.shape[1]):
        found = find_path(tree, np.full(BATCH, leaf, np.int32), LEVELS)
        assert found.shape == (BATCH, LEVELS + 1)
        for path, parent, depth in by_row(found, tree.parent, tree.depth):
            node, expected = leaf, [leaf]
            while node:
                node = parent[node]
                expected.insert(0, node)
            assert path[: depth[leaf] + 1] == expected


def best(score: Sequence[float], nodes: int) -> list[int]:
    """Number the root and the best others in their old order; of equals, take the first."""
    return [0, *sorted(sorted(range(1, len(score)), key=lambda i: (-score[i], i))[:nodes])]


@pytest.mark.parametrize("nodes", [0, 1, 5, LEVELS * WIDTH])
def test_pruning_keeps_the_best_with_all_that_is_above_them(nodes):
    tree = random_tree(2)
    tree, pruned = jax.device_get((tree, cut(tree, nodes)))
    for row, score in enumerate(tree.score.tolist()):
        kept = best(score, nodes)
        assert pruned.parent[row].tolist() == [
            kept.index(parent) for parent in tree.parent[row, kept].tolist()
        ]
        for name in {field.name for field in fields(Tree)} - {
            "parent",
            "ancestors",
            "width",
            "sure",
        }:
            np.testing.assert_array_equal(
                getattr(pruned, name)[row], getattr(tree, name)[row, kept]
            )
    anew = make_tree(pruned.parent)
    np.testing.assert_array_equal(pruned.ancestors, anew.ancestors)
    np.testing.assert_array_equal(pruned.depth, anew.depth)
    assert pruned.width == tree.width


def test_pruning_twice_is_pruning_once():
    """In particular, `entry` keeps the numbers of the tree as drafted."""
    tree = random_tree(3)
    jax.tree.map(np.testing.assert_array_equal, cut(cut(tree, 8), 4), cut(tree, 4))


def test_a_bare_root_is_a_tree_of_one_node():
    tree = jax.jit(bare_root)(np.asarray([5, 7], np.int32))
    anew = make_tree([[0], [0]], tokens=[[5], [7]])
    for name in ("tokens", "parent", "depth", "entry", "score", "ancestors", "width"):
        np.testing.assert_array_equal(getattr(tree, name), getattr(anew, name))
    assert not np.any(tree.q)
    zeros = np.zeros((2, 1), np.int32)
    assert find_children(tree).shape == (2, 1, 0)
    assert find_deepest(tree, zeros.astype(bool)).tolist() == [0, 0]
    assert find_path(tree, zeros[:, 0], 0).tolist() == [[0], [0]]
    jax.tree.map(np.testing.assert_array_equal, cut(tree, 0), tree)


def test_a_grafted_path_shares_the_nodes_with_which_it_begins():
    """A walk from the root finds the path, and whatever is not on it is as before."""
    random, tree = np.random.default_rng(4), random_tree(4)
    # Siblings have different tokens, as drafted: their numbers among siblings.
    place = np.asarray(find_children(tree))
    tokens = np.zeros(tree.tokens.shape, np.int32)
    for row in range(BATCH):
        for node, column in np.argwhere(place[row] > 0):
            tokens[row, place[row, node, column]] = column
    tree = replace(tree, tokens=jnp.asarray(tokens))
    paths = random.integers(0, WIDTH, (BATCH, LEVELS)).astype(np.int32)
    exists = random.random(BATCH) < 0.9
    grafted = jax.jit(graft)(tree, paths, exists)
    below, old, shared = jax.jit(children)(grafted), tree.tokens.shape[1], set()
    for row in range(BATCH):
        node = 0
        for depth, token in enumerate(paths[row].tolist() if exists[row] else [], 1):
            found = [child for child in below[row, node].tolist() if child]
            (child,) = [child for child in found if grafted.tokens[row, child] == token]
            assert child in (found[-1], *range(old)), "the path comes last"
            assert grafted.depth[row, child] == depth
            expected = np.array(grafted.ancestors[row, node])
            expected[child] = True
            np.testing.assert_array_equal(grafted.ancestors[row, child], expected)
            assert grafted.sure[row, child] == (child >= old)
            if child >= old:
                rank = grafted.rank[row, child]
                assert grafted.candidates[row, node, rank] == token
                assert (np.asarray(grafted.candidates[row, node]) == token).sum() == 1
            else:
                shared.add(depth)
            node = child
        assert exists[row] or not grafted.exists[row, old:].any()
        assert np.diagonal(grafted.ancestors[row]).all()
    assert shared >= {1, 2}
    for name in ("tokens", "parent", "depth", "score", "rank"):
        np.testing.assert_array_equal(getattr(grafted, name)[:, :old], getattr(tree, name))
    np.testing.assert_array_equal(grafted.ancestors[:, :old, :old], tree.ancestors)
    np.testing.assert_array_equal(grafted.q[:, :old, :-1], tree.q)
    assert not grafted.ancestors[:, :old, old:].any()
    assert not grafted.sure[:, :old].any()


def test_without_a_tree_a_grafted_path_is_a_chain():
    """It begins at the root."""
    paths, root = jnp.asarray([[7, 8, 9], [4, 5, 6]]), jnp.asarray([1, 2])
    exists = jnp.asarray([True, False])
    chain, bare = sure_chain(root, paths, exists), bare_root(root)
    grafted = graft(bare, paths, exists)
    for name in ("tokens", "parent", "depth", "exists", "ancestors"):
        found, expected = np.asarray(getattr(grafted, name)), np.asarray(getattr(chain, name))
        np.testing.assert_array_equal(found[0], expected[0])
    assert not grafted.exists[1, 1:].any()
    assert grafted.candidates[0, :, 1].tolist() == [7, 8, 9, NO_TOKEN]
    assert grafted.q[0, :, 1].tolist() == [0, 1, 1, 0]


def test_the_first_nodes_of_a_tree_are_as_they_were():
    """Those of a tree that a path was grafted to are the tree's own, with what they may draw."""
    tree = random_tree(0, BATCH, LEVELS, WIDTH)
    nodes = tree.tokens.shape[1]
    paths = jnp.full((BATCH, LEVELS), 7, jnp.int32)
    again = first_nodes(graft(tree, paths, jnp.zeros(BATCH, bool)), nodes)
    for name in ("tokens", "parent", "depth", "entry", "score", "ancestors", "rank"):
        np.testing.assert_array_equal(getattr(again, name), getattr(tree, name))
    np.testing.assert_array_equal(again.q[:, :, :-1], tree.q)
    np.testing.assert_array_equal(again.candidates[:, :, :-1], tree.candidates)
    assert again.sure is not None and not again.sure.any()
    assert not again.q[:, :, -1].any()
    assert children(again).shape == (BATCH, nodes, WIDTH + 1)
    assert first_nodes(tree, 1).width == 0


def test_below_a_path_a_tree_is_what_it_was():
    """Every node keeps what it has, further down, and the path's tokens are certain."""
    rng = np.random.default_rng(0)
    nodes, most = 1 + LEVELS * WIDTH, 3
    parents = [[0, *(int(rng.integers(i)) for i in range(1, nodes))] for _ in range(BATCH)]
    score = -rng.random((BATCH, nodes)).astype(np.float32)
    score[:, 0], score[:, -2:] = 0, -np.inf  # the last two are missing
    tree = make_tree(parents, score)
    root, count = np.arange(BATCH, dtype=np.int32) + 5000, rng.integers(0, most + 1, BATCH)
    path = rng.integers(6000, 7000, (BATCH, most)).astype(np.int32)
    # A tree's root is the last token of its path.
    ends = np.where(count > 0, path[np.arange(BATCH), count - 1], root)
    tree = replace(tree, tokens=jnp.asarray(tree.tokens).at[:, 0].set(ends))
    found = jax.jit(hang)(tree, root, path, count.astype(np.int32))
    assert found.tokens.shape == (BATCH, nodes + most)
    for row, end in enumerate(count.tolist()):
        ids = [root[row], *path[row, :end]]
        new = jax.tree.map(lambda x, row=row: np.asarray(x[row]), found)
        old = jax.tree.map(lambda x, row=row: np.asarray(x[row]), tree)
        np.testing.assert_array_equal(new.tokens[: end + 1], ids)
        np.testing.assert_array_equal(new.parent[: end + 1], [0, *range(end)])
        np.testing.assert_array_equal(new.depth[: end + 1], np.arange(end + 1))
        np.testing.assert_array_equal(new.candidates[:end, 0], ids[1:])
        np.testing.assert_array_equal(new.q[:end], np.tile([1, 0], (end, 1)))
        assert not new.exists[end + nodes :].any()
        own = slice(end, end + nodes)
        for name in ("tokens", "score", "candidates", "q"):
            np.testing.assert_array_equal(getattr(new, name)[own], getattr(old, name))
        below = slice(end + 1, end + nodes)
        for name, more in (("rank", 0), ("parent", end), ("depth", end), ("entry", end)):
            np.testing.assert_array_equal(getattr(new, name)[below], getattr(old, name)[1:] + more)
        np.testing.assert_array_equal(new.ancestors[own, own], old.ancestors)
        assert new.ancestors[own, :end].all()
        np.testing.assert_array_equal(new.ancestors[:end, :end], np.tri(end, dtype=bool))
        assert not new.ancestors[: end + nodes, end + nodes :].any()
        assert not new.ancestors[:end, end:].any()
    assert found.exists[0].sum() == count[0] + nodes - 2
