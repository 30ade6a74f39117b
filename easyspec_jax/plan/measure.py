"""A machine's figures, measured on the devices that are here."""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from easyspec_jax.parallel.mesh import ALL_AXES
from easyspec_jax.plan.machines import Machine

SIDE = {"cpu": 4096, "gpu": 16384, "tpu": 16384}
"""Of the square matrix that is read, one on each device: more than its caches hold."""

SMALL, LARGE = 2**12, 2**22
"""Elements that are all-reduced, for latency and for bandwidth."""


def measured(machine: Machine, mesh: Mesh, dtype: np.dtype) -> Machine:
    """The machine with what its devices, all at once, reach here. memory stays what the table says."""
    put, side = partial(_on_every_device, mesh, dtype), SIDE[machine.platform]
    matrix, square = put(side, side), put(side // 4, side // 4)
    # As decoding reads weights. A copy would measure how fast a CPU's pages are made.
    read = _seconds(_mapped(mesh, lambda x: x @ jnp.ones(side, dtype)), matrix)
    product = _seconds(_mapped(mesh, lambda x: x @ x), square)
    launch = _each(mesh, lambda x: x @ x, put(32, 32))
    latency, link = 0.0, machine.link_bandwidth
    if mesh.size > 1:
        latency = _each(mesh, _all_reduce, put(SMALL))
        sent = 2 * LARGE * dtype.itemsize * (mesh.size - 1) / mesh.size
        link = sent / max(_each(mesh, _all_reduce, put(LARGE), lengths=(2, 10)) - latency, 1e-9)
    return replace(
        machine,
        bandwidth=matrix.nbytes / mesh.size / read,
        flops=2 * (side // 4) ** 3 / product,
        link_bandwidth=link,
        latency=latency,
        launch=launch,
        source="measured",
        origin="measured",
    )


def _on_every_device(mesh: Mesh, dtype: np.dtype, *shape: int) -> jax.Array:
    """Zeros of this shape on each device."""
    sharding = NamedSharding(mesh, P(ALL_AXES))
    return jax.jit(
        lambda: jnp.zeros((mesh.size * shape[0], *shape[1:]), dtype), out_shardings=sharding
    )()


def _mapped(mesh: Mesh, body: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    specs = P(ALL_AXES)
    return jax.jit(jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=specs, check_vma=False))


def _all_reduce(x: jax.Array) -> jax.Array:
    return jax.lax.psum(x, ALL_AXES)


def _each(
    mesh: Mesh,
    operation: Callable[[jax.Array], jax.Array],
    x: jax.Array,
    lengths: tuple[int, int] = (16, 144),
) -> float:
    """Seconds of one operation among others that wait for each other: what a longer chain of them takes more."""

    def chain(length: int, x: jax.Array) -> jax.Array:
        for _ in range(length):
            x = operation(x)
        return x

    short, long = (_seconds(_mapped(mesh, partial(chain, length)), x) for length in lengths)
    return max(long - short, 0.0) / (lengths[1] - lengths[0])


def _seconds(program: Callable[[jax.Array], jax.Array], x: jax.Array, repeats: int = 7) -> float:
    """Seconds of the fastest of several calls."""

    def call() -> float:
        begun = time.perf_counter()
        jax.block_until_ready(program(x))
        return time.perf_counter() - begun

    call()  # compiles
    return min(call() for _ in range(repeats))
