"""At temperature 0 a drafted token is accepted if it is the target's arg-max, on any mesh."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from easyspec_jax.options import SamplingParams
from easyspec_jax.parallel.mesh import ALL_AXES, MeshShape
from easyspec_jax.verify import Coupled, Greedy, Rejection, RowSampling, Verdict, choose
from easyspec_jax.verify.tree import Tree, bare_root
from tests.support.helpers import on_mesh
from tests.verify.markov import make_request
from tests.verify.test_tree import random_tree

BATCH, VOCAB = 48, 48


def with_tokens(tree: Tree, best: np.ndarray) -> Tree:
    """Give nodes tokens, all siblings different; most try the target's best after the parent."""
    random = np.random.default_rng(0)
    tokens = np.zeros_like(tree.tokens)
    for row, parents in enumerate(np.asarray(tree.parent).tolist()):
        taken = set()
        for node, parent in enumerate(parents[1:], 1):
            token = best[row, parent] if random.random() < 0.6 else random.integers(VOCAB)
            while (parent, token) in taken:
                token = random.integers(VOCAB)
            taken.add((parent, token))
            tokens[row, node] = token
    return replace(tree, tokens=tokens)


def walk(tree: Tree, best: np.ndarray, row: int) -> int:
    """Follow the target's choices from the root; return the last node they reach."""
    node = 0
    while True:
        steps = (
            (tree.parent[row] == node) & (tree.tokens[row] == best[row, node]) & tree.exists[row]
        )
        following = [i for i in np.flatnonzero(steps).tolist() if i > 0]
        if not following:
            return node
        (node,) = following


@pytest.mark.parametrize("mesh", [MeshShape(1, 1), MeshShape(4, 2)], ids=str)
@pytest.mark.parametrize("width", [0, 1, 3])
def test_the_targets_argmax_passes_wherever_it_is(mesh, width):
    levels = 4 if width else 0
    tree = random_tree(0, BATCH, levels, width) if width else bare_root(jnp.zeros(BATCH, jnp.int32))
    # Small whole numbers make many ties.
    target = np.random.default_rng(1).integers(-9, 3, size=(*tree.parent.shape, VOCAB))
    target = target.astype(np.float32)
    best = np.argmax(target, axis=-1)
    tree = with_tokens(tree, best)

    def body(target: jax.Array, tree: Tree, request: RowSampling) -> Verdict:
        return Greedy().verify(target, tree, request.round, request)

    request = make_request(np.arange(BATCH), 0.0)
    verdict = on_mesh(mesh, body, (P(None, None, ALL_AXES), P(), P()), P())(target, tree, request)
    expected = [walk(tree, best, row) for row in range(BATCH)]
    assert verdict.leaf.dtype == verdict.token.dtype == np.int32
    assert verdict.leaf.tolist() == expected
    assert verdict.token.tolist() == best[np.arange(BATCH), expected].tolist()
    assert set(tree.depth[np.arange(BATCH), expected].tolist()) == set(range(levels + 1))


def test_name_and_sampling_choose_the_verifier():
    for name, sampled in (("rejection", Rejection), ("coupled", Coupled)):
        assert choose(name, SamplingParams(top_k=5)) == Greedy()
        assert (
            choose(name, SamplingParams(temperature=0.7))
            == choose(name, SamplingParams(temperature=1))
            == sampled()
        )
        assert choose(name, SamplingParams(temperature=1, top_k=5)) == sampled(truncates=True)
        assert choose(name, SamplingParams(temperature=1, top_p=0.5)) == sampled(truncates=True)
    # Static arguments: equal ones must not compile again, different ones must not be confused.
    assert (
        len(
            {
                Greedy(),
                Greedy(),
                Rejection(),
                Rejection(),
                Coupled(),
                Coupled(True),
                Rejection(True),
            }
        )
        == 5
    )
