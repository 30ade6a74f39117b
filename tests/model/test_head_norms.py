"""Norms over all heads count each of them once, however the heads are dealt out."""

import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from easyspec_jax.model.head_norms import FullNorms
from easyspec_jax.model.sharding import head_layout
from easyspec_jax.parallel.mesh import ALL_AXES, MeshShape
from tests.support.helpers import on_mesh


def test_copies_and_padding_do_not_count():
    layout = head_layout(num_heads=6, num_kv_heads=3, shards=8)
    assert layout.kv_index[:, 0].tolist() == [0, 0, 1, 1, 2, 2, -1, -1]
    assert norms(layout).counted == ((1.0,), (0.0,), (1.0,), (0.0,), (1.0,), (0.0,), (0.0,), (0.0,))


def test_each_token_has_one_scale():
    layout = head_layout(num_heads=6, num_kv_heads=3, shards=8)
    random = np.random.default_rng(0)
    q, k = (random.normal(size=(2, heads, 5, 4)).astype(np.float32) for heads in (6, 3))
    # Heads of zeros pad the others; each shard has one query head and one key head.
    padded = [
        np.where((index >= 0)[None, :, None, None], x[:, index], np.float32(0))
        for x, index in ((q, layout.query_index.ravel()), (k, layout.kv_index.ravel()))
    ]
    specs = P(None, ALL_AXES, None, None)
    found = on_mesh(MeshShape(4, 2), norms(layout), (specs, specs), (specs, specs))(*padded)
    for index, x, got in zip((layout.query_index, layout.kv_index), (q, k), found, strict=True):
        scale = np.sqrt(np.mean(np.square(x), axis=(1, 3), keepdims=True) + 1e-6)
        real = index.ravel() >= 0
        expected = (x / scale)[:, index.ravel()[real]]
        np.testing.assert_allclose(np.asarray(got)[:, real], expected, atol=1e-5)


def norms(layout) -> FullNorms:
    """Make norms with weights of 1, the same on every shard."""
    return FullNorms(
        jnp.ones(4), jnp.ones(4), kv_index=layout.kv_index, eps=1e-6, sizes=(6, 3), axes=ALL_AXES
    )
