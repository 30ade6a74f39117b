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

from easyspec_jax.mesh import ALL_AXES
from easyspec_jax.plan.machines import Machine

COPIED = {"cpu": 2**26, "gpu": 2**30, "tpu": 2**30}
"""Bytes that each device copies: more than its caches hold."""

SIDE = {"cpu": 1024, "gpu": 8192, "tpu": 8192}
"""Of the square matrices that are multiplied."""

SHORT, LONG = 16, 144
"""Dependent operations in a program: what one costs is the difference over their number."""

SMALL, LARGE = 2**12, 2**22
"""Elements that are all-reduced, for latency and for bandwidth."""


def measured(machine: Machine, mesh: Mesh, dtype: np.dtype) -> Machine:
    """The machine with what its devices, all at once, reach here. memory stays what the table says."""
    put = partial(_on_every_device, mesh, dtype)
    copied, side = COPIED[machine.platform] // dtype.itemsize, SIDE[machine.platform]
    copy = _seconds(_mapped(mesh, lambda x: x * 2), put(copied))
    product = _seconds(_mapped(mesh, lambda x: x.reshape(side, side) @ x.reshape(side, side)), put(side * side))
    launch = _each(mesh, lambda x: x @ x, put(128, 128))
    latency, link = 0.0, machine.link_bandwidth
    if mesh.size > 1:
        latency = _each(mesh, _all_reduce, put(SMALL))
        sent = 2 * LARGE * dtype.itemsize * (mesh.size - 1) / mesh.size
        link = sent / max(_each(mesh, _all_reduce, put(LARGE)) - latency, 1e-9)
    return replace(
        machine,
        bandwidth=2 * copied * dtype.itemsize / copy,
        flops=2 * side**3 / product,
        link_bandwidth=link,
        latency=latency,
        launch=launch,
        source="measured",
        origin="measured",
    )


def _on_every_device(mesh: Mesh, dtype: np.dtype, *shape: int) -> jax.Array:
    """Zeros of this shape on each device."""
    sharding = NamedSharding(mesh, P(ALL_AXES))
    return jax.jit(lambda: jnp.zeros((mesh.size * shape[0], *shape[1:]), dtype), out_shardings=sharding)()


def _mapped(mesh: Mesh, body: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    specs = P(ALL_AXES)
    return jax.jit(jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=specs, check_vma=False))


def _all_reduce(x: jax.Array) -> jax.Array:
    return jax.lax.psum(x, ALL_AXES)


def _each(mesh: Mesh, operation: Callable[[jax.Array], jax.Array], x: jax.Array) -> float:
    """Seconds of one operation among many that wait for each other."""

    def chain(length: int, x: jax.Array) -> jax.Array:
        for _ in range(length):
            x = operation(x)
        return x

    short, long = (_seconds(_mapped(mesh, partial(chain, length)), x) for length in (SHORT, LONG))
    return max(long - short, 0.0) / (LONG - SHORT)


def _seconds(program: Callable[[jax.Array], jax.Array], x: jax.Array, repeats: int = 7) -> float:
    """Of the fastest of several calls."""

    def call() -> float:
        begun = time.perf_counter()
        jax.block_until_ready(program(x))
        return time.perf_counter() - begun

    call()  # compiles
    return min(call() for _ in range(repeats))
