"""XLA takes every set of options: on a GPU that is there briefly, none should be lost."""

from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from easyspec_jax.parallel.mesh import MeshShape
from easyspec_jax.plan.ahead import CannotCompile, topology_mesh
from easyspec_jax.plan.machines import parse_topology
from experiments.bench.roofline_options import CANDIDATES, candidates


@pytest.mark.slow
@pytest.mark.parametrize("platform", CANDIDATES)
def test_xla_takes_the_options(platform):
    try:
        topology = "h100:1" if platform == "gpu" else "cpu:1"
        mesh = topology_mesh(parse_topology(topology), MeshShape(1, 1))
    except CannotCompile as reason:
        pytest.skip(str(reason))
    x = jax.ShapeDtypeStruct((8, 64), np.float32, sharding=NamedSharding(mesh, PartitionSpec()))
    lowered: Any = jax.jit(lambda x: jax.numpy.tanh(x) @ x.T).lower(x)
    for options in candidates(platform).values():
        assert lowered.compile(compiler_options=dict(options))


def test_other_platforms_have_no_candidates():
    assert candidates("tpu") == {}
