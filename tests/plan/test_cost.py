"""Costs of programs small enough to count by hand, and the latency model on round numbers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from easyspec_jax.engine.abstract import absent_mesh
from easyspec_jax.model.attention import Attention
from easyspec_jax.model.cache import KVCache
from easyspec_jax.parallel.mesh import ALL_AXES, MeshShape
from easyspec_jax.plan.cost import Cost, cost
from easyspec_jax.plan.machines import Machine
from easyspec_jax.plan.traffic import Collective
from tests.kernels.cases import Case

MESH = absent_mesh(MeshShape(4, 2), "tpu")
X = jax.ShapeDtypeStruct((2, 16), np.float32)
W = jax.ShapeDtypeStruct((16, 8), np.float32)
PRODUCT = 4 * (2 * 16 + 16 * 8 + 2 * 8)


def of(body: Any, *args: Any) -> Cost:
    mapped = jax.shard_map(body, mesh=MESH, in_specs=P(), out_specs=P(), check_vma=False)
    return cost(mapped, *args, mesh_shape=MESH.shape)


def test_a_product_between_element_wise_work_and_an_all_reduce():
    found = of(lambda x, w: jax.lax.psum(jnp.tanh(x * 2).T.reshape(2, 16) @ w, ALL_AXES), X, W)
    reduced = 4 * 2 * 8
    assert found == Cost(
        kernels=3,  # the stretch before the product, the product, the all-reduce
        collectives=1,
        wire_bytes=2 * reduced * 7 / 8,
        bytes=PRODUCT + reduced,
        flops=2 * 2 * 16 * 8,
    )


@pytest.mark.parametrize("tokens", [1, 6])
def test_fused_kernels_do_the_work_of_the_plain_path(tokens):
    case = Case(slots=4, hidden=128, tokens=tokens, capacity=512)
    attention, h, cache, window = case.attention(), case.h(), case.cache(), case.window()

    def plain(attention: Attention, cache: KVCache) -> Any:
        return jax.vmap(lambda one, own: one(h, own, window))(attention, cache)

    def fused(attention: Attention, cache: KVCache) -> Any:
        return attention.fused(h, cache, window)

    expected, found = (cost(run, attention, cache, mesh_shape={}) for run in (plain, fused))
    assert found.kernels < expected.kernels
    assert found.flops == pytest.approx(expected.flops, rel=0.05)
    assert found.bytes == pytest.approx(expected.bytes, rel=0.1)


def test_what_is_written_is_the_update_not_the_cache():
    def body(x: jax.Array) -> jax.Array:
        cache = jnp.zeros((1000, 16))
        return jax.lax.dynamic_update_slice_in_dim(cache, x, jnp.int32(3), 0)

    found = of(body, X)
    assert found.bytes == 2 * 4 * 2 * 16
    assert (found.collectives, found.flops) == (0, 0)


def test_a_converted_operand_counts_as_it_is_stored():
    """Through other views of it, calls and branches; a narrower copy counts by its own width."""
    w = jax.ShapeDtypeStruct((8, 16), np.int8)
    stored = PRODUCT - 3 * 16 * 8

    def multiply(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.einsum("bi,io->bo", x, w)

    def views(x: jax.Array, w: jax.Array) -> jax.Array:
        return multiply(x, w.astype(jnp.float32).T.reshape(16, 8))

    def branch(x: jax.Array, w: jax.Array) -> jax.Array:
        wide = w.astype(jnp.float32).T
        return jax.lax.cond(x[0, 0] > 0, multiply, lambda x, w: x[:, :8], x, wide)

    def computed(x: jax.Array, w: jax.Array) -> jax.Array:
        return multiply(x, 2 * w.astype(jnp.float32).T)

    def narrowed(x: jax.Array, w: jax.Array) -> jax.Array:
        return multiply(x.astype(jnp.bfloat16), w.astype(jnp.bfloat16).T)

    assert [of(body, X, w).bytes for body in (views, branch)] == [stored, stored]
    assert of(computed, X, w).bytes == PRODUCT
    assert of(narrowed, X, w).bytes == 2 * (2 * 16 + 2 * 8) + 16 * 8


@pytest.mark.parametrize("tokens", [1, 6])
def test_attention_reads_an_int8_cache_as_it_is_stored(tokens):
    case = Case(slots=1, tokens=tokens, capacity=512)
    attention = jax.tree.map(lambda x: x[0], case.attention())

    def read(attention: Attention) -> int:
        cache = attention.init_cache(1, case.capacity)
        return cost(attention, case.h(), cache, case.window(), mesh_shape={}).bytes

    floats = read(attention)
    attention.kv_dtype = "int8"
    entries = 2 * case.kv_heads * case.head_dim
    written = 4 * 2 * case.kv_heads  # scales
    saved = 3 * entries * case.capacity + 2 * (3 * entries - written) * tokens
    assert floats - read(attention) == saved


def test_loops_count_as_often_as_they_run_and_branches_by_the_costliest():
    def loop(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda carry, _: (carry, carry @ w), x, None, length=5)[1]

    def branches(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: jnp.zeros((2, 8)))

    assert (of(loop, X, W).bytes, of(loop, X, W).kernels) == (5 * PRODUCT, 5)
    assert of(branches, X, W).bytes == PRODUCT


def test_of_branches_the_one_that_moves_most_counts_however_few_its_kernels():
    def many(x: jax.Array) -> jax.Array:
        for _ in range(8):
            x = jnp.cumsum(x, axis=0)
        return x

    def large(x: jax.Array) -> jax.Array:
        return x @ jnp.ones((16, 64)) @ jnp.ones((64, 16))

    assert of(many, X).kernels > of(large, X).kernels
    for branches in ((many, large), (large, many)):
        found = of(lambda x, branches=branches: jax.lax.cond(x[0, 0] > 0, *branches, x), X)
        assert found.bytes == of(large, X).bytes > of(many, X).bytes


def test_a_product_in_a_loop_of_unknown_length_is_refused():
    def body(x: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda y: y[0, 0] < 9, lambda y: y @ jnp.ones((16, 16)), x)

    with pytest.raises(ValueError, match="unknown length"):
        of(body, X)


def test_an_axis_of_one_device_sends_nothing():
    mesh = absent_mesh(MeshShape(1, 1), "tpu")
    body = jax.shard_map(
        lambda x: jax.lax.psum(x, ALL_AXES), mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False
    )
    assert cost(body, X, mesh_shape=mesh.shape) == Cost()


def test_bytes_on_the_wire_are_those_of_a_ring():
    assert Collective("all-reduce", 800, 8).wire_bytes == 1400
    assert Collective("all-gather", 800, 8).wire_bytes == 700
    assert Collective("all-to-all", 800, 8).wire_bytes == 700


def test_the_latency_model():
    machine = Machine(
        name="toy",
        platform="tpu",
        memory=None,
        bandwidth=100.0,
        flops=1000.0,
        link_bandwidth=10.0,
        latency=0.5,
        launch=0.25,
        dimensions=0,
        source="made up",
    )
    read = Cost(kernels=4, collectives=2, wire_bytes=20.0, bytes=300, flops=1000)
    assert read.seconds(machine) == 3 + 2 + 1 + 1
    computed = Cost(flops=5000, bytes=300)
    assert computed.seconds(machine) == 5
    assert (read + computed) * 2 == Cost(8, 4, 40.0, 1200, 12000)
