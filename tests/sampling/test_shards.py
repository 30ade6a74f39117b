"""Whatever the mesh, shards of a vocabulary give what the whole row gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from easyspec_jax.mesh import ALL_AXES, LAYER, TENSOR, MeshShape
from easyspec_jax.sampling.shards import argmax, gather_rows, own_rows, padded_rows, whole_rows
from tests.helpers import on_mesh

MESHES = [MeshShape(*shape) for shape in ((1, 1), (1, 3), (4, 2), (8, 1))]
SPLITS = [(), (LAYER,), (TENSOR,), ALL_AXES]
VOCAB = 48  # a multiple of every mesh's devices
ROWS = [1, 2, 7, 8, 13]

meshes = pytest.mark.parametrize("mesh", MESHES, ids=lambda mesh: f"{mesh.layer}x{mesh.tensor}")


@meshes
def test_argmax_is_numpys(mesh):
    random = np.random.default_rng(0)
    scores = random.normal(size=(64, VOCAB)).astype(np.float32)
    scores[:16] = random.integers(-3, 3, size=(16, VOCAB))  # ties within and across shards: the lowest id wins
    scores[16:32][random.random((16, VOCAB)) < 0.9] = -np.inf  # whole shards without a score
    scores[32] = -np.inf
    scores[33] = 0.0
    scores[34] = np.where(np.arange(VOCAB) < 20, -0.0, 0.0)  # equal, though their bits differ
    scores[35] = -np.inf
    scores[35, -1] = -1e38
    scores[36] = np.where(np.isin(np.arange(VOCAB), [VOCAB // 2 - 1, VOCAB // 2]), 5.0, -5.0)  # beside a border
    ids = on_mesh(
        mesh,
        lambda *shards: [argmax(shard, axes) for shard, axes in zip(shards, SPLITS, strict=True)],
        tuple(P(None, axes or None) for axes in SPLITS),
        P(),
    )(*[scores] * len(SPLITS))
    for found in ids:
        assert found.dtype == jnp.int32
        np.testing.assert_array_equal(found, np.argmax(scores, axis=1))


@meshes
@pytest.mark.parametrize("split", [True, False])
def test_rows_are_dealt_out_whole_and_come_back_in_order(mesh, split):
    random = np.random.default_rng(0)
    xs = [random.normal(size=(rows, VOCAB)).astype(np.float32) for rows in ROWS]
    numbers = [np.arange(rows, dtype=np.int32) for rows in ROWS]

    def body(xs: list[jax.Array], numbers: list[jax.Array]) -> tuple[list[jax.Array], ...]:
        whole = [whole_rows(x, ALL_AXES, split) for x in xs]
        own = [own_rows(number, ALL_AXES) for number in numbers]
        return whole, own, *([gather_rows(x, n, ALL_AXES) for x, n in zip(y, ROWS, strict=True)] for y in (whole, own))

    run = on_mesh(mesh, body, (P(None, ALL_AXES if split else None), P()), (P(ALL_AXES), P(ALL_AXES), P(), P()))
    for x, number, dealt, dealt_number, x_back, number_back in zip(xs, numbers, *run(xs, numbers), strict=True):
        np.testing.assert_array_equal(x_back, x)
        np.testing.assert_array_equal(number_back, number)
        # Row r and number r are on the same device, each device has as many, and what fills up are copies of row 0.
        filling = -len(x) % mesh.size
        np.testing.assert_array_equal(dealt_number, np.concatenate([number, np.zeros(filling, np.int32)]))
        np.testing.assert_array_equal(dealt, x[np.asarray(dealt_number)])


def test_rows_are_padded_to_whole_devices():
    def body(x: jax.Array) -> jax.Array:
        assert [padded_rows(rows, ALL_AXES) for rows in (1, 7, 8, 9, 16)] == [8, 8, 8, 16, 16]
        assert padded_rows(7, (TENSOR,)) == 8
        assert padded_rows(7, ()) == 7
        return x

    on_mesh(MeshShape(4, 2), body, P(), P())(0)
