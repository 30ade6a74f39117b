"""The dry compilation finds what is planted, and what the real programs have."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easyspec_jax.checkpoint.config import model_config
from easyspec_jax.errors import EasySpecError
from easyspec_jax.parallel.mesh import MeshShape
from easyspec_jax.plan.ahead import topology_mesh
from easyspec_jax.plan.machines import parse_topology
from experiments.bench.roofline_models import SMALL
from experiments.gpu.dry_compile import AbsentPair, Reading, Task, dry_compile, read

MEMORY = 2**40
SIDES = (1024, 2048)


@pytest.fixture(scope="module")
def pair() -> AbsentPair:
    """A small pair on one CPU device."""
    config = replace(model_config(SMALL), num_hidden_layers=5)
    mesh = topology_mesh(parse_topology("cpu:1"), MeshShape(1, 1))
    return AbsentPair((config, config), mesh, np.dtype(np.float32))


def planted(program) -> Task:
    """A program of one matrix, which counts as a weight."""
    matrix = jax.ShapeDtypeStruct(SIDES, jnp.float32)
    return Task("planted", lambda: jax.jit(program).lower(matrix), frozenset({SIDES}), frozenset())


def test_a_round_of_a_small_pair_is_read(pair):
    reading = read(pair.round_task("round", 4, capacity=256), MEMORY)
    assert reading.kernels > reading.step_kernels > 0
    assert reading.peak > reading.temporaries > 0
    assert not reading.weight_copies and not reading.host_waits and not reading.at_fault


def test_a_weight_that_is_copied_is_found():
    reading = read(planted(lambda matrix: matrix.T), MEMORY)
    assert len(reading.weight_copies) == 1 and "f32[2048,1024]" in reading.weight_copies[0]
    assert reading.at_fault


def test_a_product_that_writes_its_terms_is_found():
    reading = read(planted(lambda matrix: matrix * matrix), MEMORY)
    assert len(reading.weight_copies) == 1 and reading.at_fault


def test_a_cache_that_is_copied_is_named_apart(pair):
    task = replace(planted(lambda matrix: matrix.T), weights=frozenset(), caches=frozenset({SIDES}))
    reading = read(task, MEMORY)
    assert len(reading.cache_copies) == 1 and not reading.at_fault


def test_a_program_that_needs_more_than_the_device_has_is_refused(pair):
    reading = read(pair.round_task("round", None, capacity=256), 2**20)
    assert "GiB of 0.0" in reading.refusal and reading.at_fault
    assert not Reading("nothing").at_fault


@pytest.mark.parametrize(
    ("machine", "complaint"),
    [
        ("v5p", "does not say how many|sides of the torus"),
        ("cpu", "must be a GPU"),
        ("abacus", "no machine"),
    ],
)
def test_a_machine_without_cuda_is_refused(machine, complaint):
    with pytest.raises(EasySpecError, match=complaint):
        dry_compile(machine, None)
