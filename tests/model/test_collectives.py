import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from easyspec_jax.mesh import ALL_AXES, LAYER, TENSOR, MeshShape, open_mesh
from easyspec_jax.model.collectives import all_reduce, from_first_device, shard_count, shard_index


def everywhere(body):
    """body's value on each device of a 4×2 mesh, one row a device."""
    mesh = open_mesh(MeshShape(4, 2))
    mapped = jax.shard_map(lambda: body()[None], mesh=mesh, in_specs=(), out_specs=P(ALL_AXES), check_vma=False)
    return np.asarray(jax.jit(mapped)())


@pytest.mark.parametrize(
    ("axes", "index"),
    [(ALL_AXES, range(8)), ((LAYER,), [0, 0, 1, 1, 2, 2, 3, 3]), ((TENSOR,), [0, 1] * 4), ((), [0] * 8)],
)
def test_shard_index_counts_the_last_axis_fastest(axes, index):
    assert everywhere(lambda: shard_index(axes)).tolist() == list(index)
    assert everywhere(lambda: jnp.asarray(shard_count(axes)))[0] == max(index) + 1


def test_sums_go_over_the_named_axes_only():
    assert everywhere(lambda: all_reduce(shard_index(ALL_AXES), (TENSOR,))).tolist() == [1, 1, 5, 5, 9, 9, 13, 13]
    assert everywhere(lambda: all_reduce(shard_index(ALL_AXES), ())).tolist() == list(range(8))


def test_devices_that_disagree_follow_the_first():
    assert everywhere(lambda: from_first_device(7 + shard_index(ALL_AXES), ALL_AXES)).tolist() == [7] * 8
