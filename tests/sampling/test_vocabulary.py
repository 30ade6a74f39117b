"""Vocabulary shards give the results of whole rows, on every mesh."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from easyspec_jax.parallel.mesh import ALL_AXES, LAYER, TENSOR, Axes, MeshShape
from easyspec_jax.sampling.vocabulary import (
    argmax,
    gather_rows,
    normaliser,
    own_rows,
    padded_rows,
    shard_ids,
    take,
    top,
    whole_rows,
)
from tests.support.helpers import on_mesh

MESHES = [MeshShape(*shape) for shape in ((1, 1), (1, 3), (4, 2), (8, 1))]
SPLITS = [(), (LAYER,), (TENSOR,), ALL_AXES]
VOCAB = 48  # a multiple of every mesh's devices
ROWS = [1, 2, 7, 8, 13]

meshes = pytest.mark.parametrize("mesh", MESHES, ids=lambda mesh: f"{mesh.layer}x{mesh.tensor}")


def scores_with_ties(vocab: int) -> np.ndarray:
    """Make rows on which a search for the greatest score could go wrong."""
    random = np.random.default_rng(0)
    scores = random.normal(size=(64, vocab)).astype(np.float32)
    # Ties within and across shards: the lowest id wins.
    scores[:16] = random.integers(-3, 3, size=(16, vocab))
    # Whole shards without a finite score.
    scores[16:32][random.random((16, vocab)) < 0.9] = -np.inf
    scores[32] = -np.inf
    scores[33] = 0.0
    scores[34] = -np.inf
    scores[34, -1] = -1e38
    # A tie across the border between two shards.
    scores[35] = np.where(np.isin(np.arange(vocab), [vocab // 2 - 1, vocab // 2]), 5.0, -5.0)
    return scores


def on_every_split(
    mesh: MeshShape, body: Callable[[jax.Array, Axes], Any], x: np.ndarray
) -> list[Any]:
    """Run body on x, split over each choice of mesh axes in SPLITS."""
    return on_mesh(
        mesh,
        lambda *shards: [body(shard, axes) for shard, axes in zip(shards, SPLITS, strict=True)],
        tuple(P(None, axes or None) for axes in SPLITS),
        P(),
    )(*[x] * len(SPLITS))


@meshes
def test_argmax_is_numpys(mesh):
    scores = scores_with_ties(VOCAB)
    scores[36] = np.where(np.arange(VOCAB) < 20, -0.0, 0.0)  # equal, though their bits differ
    for found in on_every_split(mesh, argmax, scores):
        assert found.dtype == jnp.int32
        np.testing.assert_array_equal(found, np.argmax(scores, axis=1))


@pytest.mark.parametrize("vocab", [1, 2, 130, 256, 384])
def test_argmax_is_numpys_in_blocks_of_any_size(vocab):
    scores = scores_with_ties(vocab)
    np.testing.assert_array_equal(
        jax.jit(argmax, static_argnums=1)(scores, ()), np.argmax(scores, axis=1)
    )


@meshes
def test_top_is_a_stable_sort(mesh):
    ks = [1, 5, 20, VOCAB + 2]  # from fewer than the smallest shard has to more than there are
    scores = scores_with_ties(VOCAB)
    order = np.argsort(-scores, axis=1, kind="stable")
    for results in on_every_split(mesh, lambda x, axes: [top(x, k, axes) for k in ks], scores):
        for k, (best, ids) in zip(ks, results, strict=True):
            assert (best.dtype, ids.dtype) == (jnp.float32, jnp.int32)
            np.testing.assert_array_equal(ids, order[:, :k])
            np.testing.assert_array_equal(best, np.take_along_axis(scores, order[:, :k], axis=1))


@meshes
def test_take_finds_ids_wherever_they_are(mesh):
    x = scores_with_ties(VOCAB)  # -inf among them
    ids = np.random.default_rng(1).integers(0, VOCAB, size=(len(x), 7)).astype(np.int32)
    ids[:, :2] = 0, VOCAB - 1
    for found in on_every_split(mesh, lambda x, axes: take(x, jnp.asarray(ids), axes), x):
        np.testing.assert_array_equal(found, np.take_along_axis(x, ids, axis=1))


@meshes
def test_probabilities_are_those_of_double_precision(mesh):
    """Far from zero, too, where float32 rounds the logarithm of the sum to about a thousandth."""
    random = np.random.default_rng(0)
    x = (3 * random.normal(size=(32, VOCAB))).astype(np.float32)
    x[8:16][random.random((8, VOCAB)) < 0.9] = -np.inf
    x[16:24, : VOCAB // 2] = -np.inf  # whole shards
    x[24, 1:] = -np.inf
    x = np.concatenate([x, x + np.float32(1e4), x - np.float32(1e4)])
    exact = x.astype(np.float64)
    weights = np.exp(exact - exact.max(axis=1, keepdims=True))
    for greatest, total in on_every_split(mesh, normaliser, x):
        np.testing.assert_array_equal(greatest, x.max(axis=1, keepdims=True))
        np.testing.assert_allclose(total, weights.sum(axis=1, keepdims=True), rtol=1e-6)


@meshes
def test_shard_ids_number_the_whole_vocabulary(mesh):
    x = np.zeros((2, VOCAB), np.float32)
    splits = [P(None, axes or None) for axes in SPLITS]

    def body(*shards: jax.Array) -> list[jax.Array]:
        return [shard_ids(shard, axes) for shard, axes in zip(shards, SPLITS, strict=True)]

    for ids in on_mesh(mesh, body, tuple(splits), splits)(*[x] * len(SPLITS)):
        assert ids.dtype == jnp.int32
        np.testing.assert_array_equal(ids, np.broadcast_to(np.arange(VOCAB), x.shape))


@meshes
def test_rows_are_dealt_out_whole_and_come_back_in_order(mesh):
    random = np.random.default_rng(0)
    xs = [random.normal(size=(rows, VOCAB)).astype(np.float32) for rows in ROWS]
    numbers = [np.arange(rows, dtype=np.int32) for rows in ROWS]

    def body(xs: list[jax.Array], numbers: list[jax.Array]) -> tuple[list[jax.Array], ...]:
        whole = [whole_rows(x, ALL_AXES) for x in xs]
        own = [own_rows(number, ALL_AXES) for number in numbers]
        return (
            whole,
            own,
            *(
                [gather_rows(x, n, ALL_AXES) for x, n in zip(y, ROWS, strict=True)]
                for y in (whole, own)
            ),
        )

    run = on_mesh(mesh, body, (P(None, ALL_AXES), P()), (P(ALL_AXES), P(ALL_AXES), P(), P()))
    for x, number, dealt, dealt_number, x_back, number_back in zip(
        xs, numbers, *run(xs, numbers), strict=True
    ):
        np.testing.assert_array_equal(x_back, x)
        np.testing.assert_array_equal(number_back, number)
        # Row r and number r are on the same device. Padding repeats row 0.
        filling = -len(x) % mesh.size
        np.testing.assert_array_equal(
            dealt_number, np.concatenate([number, np.zeros(filling, np.int32)])
        )
        np.testing.assert_array_equal(dealt, x[np.asarray(dealt_number)])


def test_rows_are_padded_to_whole_devices():
    def body(x: jax.Array) -> jax.Array:
        assert [padded_rows(rows, ALL_AXES) for rows in (1, 7, 8, 9, 16)] == [8, 8, 8, 16, 16]
        assert padded_rows(7, (TENSOR,)) == 8
        assert padded_rows(7, ()) == 7
        return x

    on_mesh(MeshShape(4, 2), body, P(), P())(0)
