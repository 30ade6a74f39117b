import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from easyspec_jax.parallel.collectives import (
    all_reduce,
    from_first_device,
    shard_count,
    shard_index,
)
from easyspec_jax.parallel.mesh import ALL_AXES, LAYER, TENSOR, MeshShape, open_mesh


def everywhere(body):
    """body's value on each device of a 4×2 mesh, one row a device."""

    def on_device():
        return jax.tree.map(lambda x: x[None], body())

    mesh = open_mesh(MeshShape(4, 2))
    mapped = jax.shard_map(
        on_device, mesh=mesh, in_specs=(), out_specs=P(ALL_AXES), check_vma=False
    )
    return jax.device_get(jax.jit(mapped)())


@pytest.mark.parametrize(
    ("axes", "index"),
    [
        (ALL_AXES, range(8)),
        ((LAYER,), [0, 0, 1, 1, 2, 2, 3, 3]),
        ((TENSOR,), [0, 1] * 4),
        ((), [0] * 8),
    ],
)
def test_shard_index_counts_the_last_axis_fastest(axes, index):
    assert everywhere(lambda: shard_index(axes)).tolist() == list(index)
    assert everywhere(lambda: jnp.asarray(shard_count(axes)))[0] == max(index) + 1


def test_sums_go_over_the_named_axes_only():
    assert everywhere(lambda: all_reduce(shard_index(ALL_AXES), (TENSOR,))).tolist() == [
        1,
        1,
        5,
        5,
        9,
        9,
        13,
        13,
    ]
    assert everywhere(lambda: all_reduce(shard_index(ALL_AXES), ())).tolist() == list(range(8))


def test_devices_that_disagree_follow_the_first():
    assert (
        everywhere(lambda: from_first_device(7 + shard_index(ALL_AXES), ALL_AXES)).tolist()
        == [7] * 8
    )


@pytest.mark.parametrize("axes", [ALL_AXES, ()], ids=["all", "none"])
def test_following_the_first_keeps_every_dtype(axes):
    """A tree of a draft has all of them, and scores of -inf."""

    def body():
        index = shard_index(ALL_AXES)
        number = index.astype(jnp.float32)
        score = jnp.where(index == 0, -jnp.inf, number)
        leaves = (index == 0, index > 0, index - 7, index.astype(jnp.uint32), number + 0.1, score)
        return leaves, from_first_device(leaves, axes)

    for before, after in zip(*everywhere(body), strict=True):
        assert len(np.unique(before)) > 1, "the devices disagree"
        assert after.dtype == before.dtype
        np.testing.assert_array_equal(after, np.full_like(before, before[0]) if axes else before)
