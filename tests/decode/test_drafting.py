"""A greedy tree is a beam, a sampled one a sample without replacement; the mesh changes neither."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from easyspec_jax.decode.drafting import draft_tree
from easyspec_jax.decode.state import RoundConfig
from easyspec_jax.model.windows import Nodes
from easyspec_jax.parallel.collectives import shard_index
from easyspec_jax.parallel.mesh import ALL_AXES, Axes, MeshShape
from easyspec_jax.verify import Branches, Greedy, Rejection, RowSampling, Verifier
from easyspec_jax.verify.tree import Tree
from tests.support.helpers import goodness_of_fit, on_mesh
from tests.verify.markov import make_request, softmax

ONE, EIGHT = MeshShape(1, 1), MeshShape(4, 2)
VOCAB = 16
TOKENS = np.setdiff1d(np.arange(VOCAB), [0, 5, 6, 11, 15])
"""Ids with a finite logit; no others have one."""
POSITIONS = np.asarray([0, 3, 9, 4], np.int32)
ROOTS = np.asarray([1, 14, 5, 7], np.int32)
SCRATCH = 999
"""Content of cache entries before anything is written."""


@partial(jax.tree_util.register_dataclass, data_fields=["table"], meta_fields=["axes"])
@dataclass(frozen=True)
class Table:
    """Stand-in for a Decoder: logits are a row of a table, chosen by whole path and depth.

    A node finds its path's tokens where a real draft does: in the cache, through its ancestors.
    """

    table: Any
    axes: Axes = ALL_AXES

    def __call__(
        self, tokens: jax.Array, caches: Any, where: Nodes, run: Any, committed: Any
    ) -> tuple[jax.Array, Any]:
        cache = jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice(row, new, (at,)))(
            caches, tokens, where.start
        )
        size = where.ancestors.shape[2]
        entries = jax.vmap(lambda row, at: jax.lax.dynamic_slice(row, (at,), (size,)))(
            cache, where.root
        )
        path = jnp.sum(jnp.where(where.ancestors, entries[:, None, :], 0), axis=-1)
        return (path + 3 * where.depth)[..., None].astype(jnp.float32), cache

    def logits(self, h: jax.Array) -> jax.Array:
        return self.table[h[..., 0].astype(jnp.int32) % VOCAB]


def logits_after(table: np.ndarray, path: tuple[int, ...]) -> np.ndarray:
    """Look up Table's logits after a path from the root."""
    return table[(sum(path) + 3 * (len(path) - 1)) % VOCAB]


def make_table(tokens: np.ndarray = TOKENS) -> np.ndarray:
    table = np.full((VOCAB, VOCAB), -np.inf, np.float32)
    table[:, tokens] = np.random.default_rng(0).normal(size=(VOCAB, len(tokens))) * 1.5
    return table


TABLE = make_table()


@cache
def program(
    verifier: Verifier,
    levels: int,
    width: int,
    mesh: MeshShape,
    axes: Axes,
    disagree: bool,
    threshold: float,
    learns: bool,
) -> Any:
    """Compile draft_tree on a mesh, once for all tests that need it."""

    def body(
        draft: Any,
        cache: Any,
        root: jax.Array,
        position: jax.Array,
        request: RowSampling,
        live: jax.Array,
    ) -> Any:
        if disagree:
            draft = Table(jnp.roll(draft.table, shard_index(ALL_AXES), axis=0), draft.axes)
        h = root[:, None].astype(jnp.float32)
        config = RoundConfig(
            levels,
            True,
            verifier,
            stop_ids=(),
            width=width,
            confidence_threshold=0.0 if learns else threshold,
            learns_threshold=learns,
        )
        least = jnp.float32(threshold) if learns else None
        tree, confidence, cache = draft_tree(
            *(draft, h, cache, root, position, request, config), live=live, threshold=least
        )
        grown = (tree, confidence, cache) if learns else (tree, cache)
        return jax.tree.map(lambda x: x[None], grown)

    split: Any = Table(P(None, axes or None), axes)
    return on_mesh(mesh, body, (split, P(), P(), P(), P(), P()), P(ALL_AXES))


def grow(
    verifier: Verifier,
    levels: int,
    width: int,
    mesh: MeshShape = ONE,
    axes: Axes = ALL_AXES,
    disagree: bool = False,
    table: np.ndarray = TABLE,
    roots: np.ndarray = ROOTS,
    positions: np.ndarray = POSITIONS,
    threshold: float = 0.0,
    live: bool | np.ndarray = True,
    learns: bool = False,
) -> Any:
    """Grow trees; return each device's trees and cache, on a leading axis.

    disagree: all devices but the first have other tables. live: rows that need a draft. learns: the
    threshold is an array; then the confidence is returned as well, between the two.
    """
    entries = np.full((len(roots), int(positions.max()) + 1 + levels * width), SCRATCH, np.int32)
    entries[np.arange(len(roots)), positions] = roots
    run = program(verifier, levels, width, mesh, axes, disagree, threshold, learns)
    request = make_request(np.arange(len(roots)), 0.7)
    live = np.broadcast_to(live, roots.shape)
    return jax.device_get(run(Table(table, axes), entries, roots, positions, request, live))


class Node(NamedTuple):
    path: tuple[int, ...]
    score: float
    parent: int


def beam(table: np.ndarray, root: int, levels: int, width: int) -> list[list[Node]]:
    """Find the likeliest `width` paths of every length; a chain's only candidate is certain."""
    result = [[Node((root,), 0.0, 0)]]
    for level in range(levels):
        first, grown = max(1 + (level - 1) * width, 0), []
        for number, node in enumerate(result[-1], first):
            logits = logits_after(table, node.path).astype(np.float64)
            ids = np.argsort(-logits, kind="stable")[: 1 if width == 1 else VOCAB]
            log_q = np.log(softmax(logits)[ids]) if width > 1 else [0.0]
            grown += [
                Node((*node.path, int(i)), node.score + own, number)
                for i, own in zip(ids, log_q, strict=True)
            ]
        possible = [node for node in grown if node.score > -np.inf]
        result.append(sorted(possible, key=lambda node: -node.score)[:width])
    return result


def paths(tree: Tree, row: int) -> Iterator[tuple[int, tuple[int, ...]]]:
    """List each existing node's number and its path, by way of its parents."""
    found: dict[int, tuple[int, ...]] = {0: (int(tree.tokens[row, 0]),)}
    for node in np.flatnonzero(tree.exists[row])[1:].tolist():
        found[node] = (*found[int(tree.parent[row, node])], int(tree.tokens[row, node]))
    yield from found.items()


@pytest.fixture(autouse=True)
def quiet_logarithms() -> Iterator[None]:
    """Let the references take logarithms of zero."""
    with np.errstate(divide="ignore"):
        yield


@pytest.mark.parametrize(("width", "levels"), [(1, 1), (1, 4), (3, 1), (3, 4), (5, 2), (13, 2)])
def test_a_greedy_tree_is_a_beam(width, levels):
    """With 13 nodes per level, only as many exist as there are possible tokens."""
    tree, cache = grow(Greedy(), levels, width)
    tree, cache = jax.tree.map(lambda x: x[0], (tree, cache))
    assert tree.width == width
    np.testing.assert_array_equal(
        tree.depth, [[0] + [1 + i // width for i in range(levels * width)]] * len(ROOTS)
    )
    np.testing.assert_array_equal(tree.entry, [range(1 + levels * width)] * len(ROOTS))
    for row, (root, position) in enumerate(zip(ROOTS.tolist(), POSITIONS.tolist(), strict=True)):
        expected = beam(TABLE, root, levels, width)
        for level, nodes in enumerate(expected):
            first = max(1 + (level - 1) * width, 0)
            here = slice(first, first + len(nodes))
            assert tree.tokens[row, here].tolist() == [node.path[-1] for node in nodes]
            assert tree.parent[row, here].tolist() == [node.parent for node in nodes]
            np.testing.assert_allclose(
                tree.score[row, here], [node.score for node in nodes], rtol=1e-5
            )
            assert not tree.exists[row, here.stop : 1 + level * width].any()
        # The cache holds all levels but the last, and nothing else was written.
        written = tree.tokens[row, : 1 + (levels - 1) * width]
        behind = cache.shape[1] - position - len(written)
        np.testing.assert_array_equal(
            cache[row], [*[SCRATCH] * position, *written, *[SCRATCH] * behind]
        )
    assert np.all(tree.exists) == (width <= len(TOKENS))


@pytest.mark.parametrize("verifier", [Greedy(), Rejection()], ids=str)
def test_a_tree_agrees_with_itself(verifier):
    """Parents, ancestors and ranks mean the same paths; candidates and q fit those paths."""
    levels, width = 3, 4
    tree: Tree = jax.tree.map(lambda x: x[0], grow(verifier, levels, width)[0])
    temperature = 0.7 if verifier == Rejection() else 1.0
    assert tree.candidates.shape[2] == min(verifier.candidates(width), VOCAB)
    assert not tree.q[:, 1 + (levels - 1) * width :].any()
    for row in range(len(ROOTS)):
        above: dict[int, set[int]] = {0: {0}}
        for node, path in paths(tree, row):
            parent = int(tree.parent[row, node])
            if node:
                above[node] = above[parent] | {node}
                assert tree.depth[row, node] == tree.depth[row, parent] + 1 == len(path) - 1
                assert tree.score[row, node] <= tree.score[row, parent]
                assert tree.candidates[row, parent, tree.rank[row, node]] == tree.tokens[row, node]
                assert tree.q[row, parent, tree.rank[row, node]] > 0
            assert set(np.flatnonzero(tree.ancestors[row, node])) == above[node]
            if len(path) <= levels:
                ids = tree.candidates[row, node]
                logits = logits_after(TABLE, path)[ids]
                assert len(set(ids.tolist())) == len(ids)
                assert np.all(logits[:-1] >= logits[1:])
                np.testing.assert_allclose(
                    tree.q[row, node], softmax(logits / temperature), rtol=1e-5
                )
        pairs = [path for _, path in paths(tree, row)]
        assert len(set(pairs)) == len(pairs), "no path is drafted twice"
        for scores in np.split(tree.score[row, 1:], levels):
            assert np.all(scores[:-1] >= scores[1:])


def same_everywhere(eight: Any, one: Any) -> None:
    """Check that each of eight devices has what one device has by itself."""
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y.repeat(8, axis=0), rtol=1e-5), eight, one
    )


def levels_above(threshold: float, width: int, root: int, levels: int) -> int:
    """Count a row's levels: the first one, and those below a path that is likely enough."""
    # The beam of a tree knows probabilities; a chain is the best of a tree that is 1 wide.
    nodes = [Node((root,), 0.0, 0)]
    for level in range(1, levels):
        grown = [
            Node((*node.path, i), node.score + own, 0)
            for node in nodes
            for i, own in enumerate(np.log(softmax(logits_after(TABLE, node.path))).tolist())
        ]
        nodes = sorted(grown, key=lambda node: -node.score)[:width]
        if nodes[0].score < np.log(threshold):
            return level
    return levels


@pytest.mark.parametrize("mesh, axes", [(ONE, ALL_AXES), (EIGHT, ALL_AXES), (EIGHT, ())])
@pytest.mark.parametrize("width", [1, 3])
def test_a_row_drafts_no_further_where_no_path_is_likely(mesh, axes, width):
    """Rows end at different levels, and each draws what it draws of the whole tree."""
    levels, threshold = 4, 0.2
    depths = [levels_above(threshold, width, int(root), levels) for root in ROOTS]
    assert len(set(depths)) > 1
    whole, _ = grow(Greedy(), levels, width, mesh, axes)
    tree, cache = grow(Greedy(), levels, width, mesh, axes, threshold=threshold)
    for row, depth in enumerate(depths):
        exists = whole.exists[:, row] & (whole.depth[:, row] <= depth)
        np.testing.assert_array_equal(tree.exists[:, row], exists)
        np.testing.assert_array_equal(tree.tokens[:, row][exists], whole.tokens[:, row][exists])
        np.testing.assert_array_equal(tree.parent[:, row][exists], whole.parent[:, row][exists])
        assert not tree.q[:, row][tree.depth[:, row] >= depth].any()
    longest = np.array(depths) == max(depths)
    _, own = grow(Greedy(), levels, width, mesh, axes, threshold=threshold, live=~longest)
    assert (own == SCRATCH).sum() > (cache == SCRATCH).sum(), "no pass for rows that need no draft"


@pytest.mark.parametrize("mesh, axes", [(ONE, ALL_AXES), (EIGHT, ALL_AXES), (EIGHT, ())])
@pytest.mark.parametrize("width", [1, 3])
def test_a_learned_threshold_is_an_array(mesh, axes, width):
    """It ends drafts as a fixed one does, and the confidence is that of the likeliest paths."""
    levels, threshold = 4, 0.2
    fixed, entries = grow(Greedy(), levels, width, mesh, axes, threshold=threshold)
    tree, confidence, cache = grow(
        Greedy(), levels, width, mesh, axes, threshold=threshold, learns=True
    )
    jax.tree.map(np.testing.assert_array_equal, (fixed, entries), (tree, cache))
    for row, root in enumerate(ROOTS):
        depth = levels_above(threshold, width, int(root), levels)
        assert not confidence[:, row, depth:].any()
        # A chain is the likeliest path of a beam that is 1 wide.
        nodes = beam(TABLE, int(root), depth, max(width, 2))
        likeliest = [np.exp(level[0].score) for level in nodes[1:]]
        if width > 1:
            expected = np.tile(likeliest, (len(confidence), 1))
            np.testing.assert_allclose(confidence[:, row, :depth], expected, rtol=1e-5)
        assert np.all(confidence[:, row, : depth - 1] >= threshold)
        assert depth == levels or np.all(confidence[:, row, depth - 1] < threshold)


@pytest.mark.parametrize("verifier", [Greedy(), Rejection()], ids=str)
def test_the_mesh_changes_nothing(verifier):
    same_everywhere(grow(verifier, 3, 4, EIGHT), grow(verifier, 3, 4))


def test_devices_that_draft_for_themselves_follow_the_first():
    """Replicated drafts may round differently; here all but the first have another table."""
    (eight, _), (one, _) = grow(Greedy(), 3, 4, EIGHT, (), disagree=True), grow(Greedy(), 3, 4)
    same_everywhere(eight, one)
    mine, *others = (
        beam(np.roll(TABLE, device, axis=0), int(ROOTS[0]), 1, 4) for device in range(8)
    )
    assert all(other != mine for other in others)


DRAWS, ALPHA = 40_000, 0.01 / 4
"""Number of requests, and significance level of each of the four tests of a distribution."""


def without_replacement(q: np.ndarray) -> np.ndarray:
    """Return the probability that two draws from q without replacement are a, then b: [a, b]."""
    pairs = np.outer(q, q) / (1 - q)[:, None]
    return pairs * (1 - np.eye(len(q)))


def count_pairs(first: np.ndarray, second: np.ndarray, kinds: int) -> np.ndarray:
    return np.bincount(first * kinds + second, minlength=kinds * kinds)[None]


class Branched(NamedTuple):
    """Result of Rejection.branch for three nodes, the last of which does not exist; per request."""

    q: np.ndarray
    score: np.ndarray
    branches: Branches


@pytest.fixture(scope="module")
def branched() -> Branched:
    logits = -np.sort(-TABLE[:3], axis=1)
    ids = np.argsort(-TABLE[:3], axis=1).astype(np.int32)
    score = np.tile(np.asarray([-0.5, -2.0, -np.inf], np.float32), (DRAWS, 1))
    log_prob = np.tile(np.asarray([-1.5, -0.3, -1.0], np.float32), (DRAWS, 1))
    position = np.full(DRAWS, 7, np.int32)
    many = (np.broadcast_to(x, (DRAWS, *x.shape)) for x in (logits, ids))
    branches = jax.jit(Rejection().branch)(
        *many, score, log_prob, position, make_request(np.arange(DRAWS), 0.7)
    )
    return Branched(softmax(logits / 0.7), score, jax.device_get(branches))


def test_children_are_drawn_without_replacement(branched):
    q = branched.q
    best = np.argsort(-branched.branches.score[:, :2], axis=-1, kind="stable")
    for node in range(2):
        counts = count_pairs(best[:, node, 0], best[:, node, 1], VOCAB)
        assert goodness_of_fit(counts, without_replacement(q[node]).reshape(1, -1)) > ALPHA
    counts = count_pairs(best[:, 0, 0], best[:, 1, 0], VOCAB)
    assert goodness_of_fit(counts, np.outer(q[0], q[1]).reshape(1, -1)) > ALPHA, (
        "nodes are independent"
    )


def test_scores_fall_from_parent_to_child(branched):
    _, score, branches = branched
    assert not np.isnan(branches.score).any()
    np.testing.assert_array_equal(branches.score.max(axis=-1), score)
    assert np.all(branches.score <= score[:, :, None])


def test_what_is_impossible_never_becomes_a_node(branched):
    q, score, branches = branched
    np.testing.assert_allclose(branches.q, np.broadcast_to(q, branches.q.shape), rtol=1e-5)
    np.testing.assert_array_equal(
        branches.score > -np.inf, (branches.q > 0) & (score > -np.inf)[:, :, None]
    )
    assert np.sum(q == 0) == 3 * (VOCAB - len(TOKENS))
    np.testing.assert_allclose(
        branches.log_prob[0, :2], np.log(q[:2]) + np.asarray([[-1.5], [-0.3]]), rtol=1e-4
    )


def test_paths_are_drawn_without_replacement():
    """All paths of a level, not only siblings, are a sample of the draft's paths."""
    few = TOKENS[:3]
    table = make_table(few)
    tree, _ = grow(
        Rejection(),
        2,
        2,
        table=table,
        roots=np.ones(DRAWS, np.int32),
        positions=np.zeros(DRAWS, np.int32),
    )
    tree = jax.tree.map(lambda x: x[0], tree)
    assert tree.exists.all()
    first = np.take_along_axis(tree.tokens, tree.parent, axis=1)
    number = 3 * np.searchsorted(few, first[:, 3:]) + np.searchsorted(few, tree.tokens[:, 3:])
    after_root, *after_first = (
        softmax(logits_after(table, (1, *path)) / 0.7)[few] for path in [(), *few[:, None]]
    )
    q = (after_root[:, None] * np.stack(after_first)).reshape(-1)
    counts = count_pairs(number[:, 0], number[:, 1], len(q))
    assert goodness_of_fit(counts, without_replacement(q).reshape(1, -1)) > ALPHA
