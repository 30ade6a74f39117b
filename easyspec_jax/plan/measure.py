"""A machine's figures, measured on this host's devices."""

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
from easyspec_jax.parallel.spmd import spmd
from easyspec_jax.plan.machines import Machine

SIDE = {"cpu": 4096, "gpu": 16384, "tpu": 16384}
"""Side of the square matrix that each device reads, by platform: larger than its caches.

In float32 4096 x 4096 takes 64 MiB, in bfloat16 16384 x 16384 takes 512 MiB.
"""

SMALL, LARGE = 2**12, 2**22
"""Elements of an all-reduce that measures latency, and of one that measures bandwidth."""


def measured(machine: Machine, mesh: Mesh, dtype: np.dtype) -> Machine:
    """Measure what the devices of a mesh reach, all of them working at once.

    Args:
        machine: The table's figures.
        mesh: Devices of this host.
        dtype: Type to compute in.

    Returns:
        The machine with measured figures. Its memory stays the table's, and so does the bandwidth
        of links if there is only one device.
    """
    put, side = partial(_on_every_device, mesh, dtype), SIDE[machine.platform]
    matrix, square = put(side, side), put(side // 4, side // 4)
    # A matrix times a vector, [S, S] x [S], reads memory as decoding reads weights. A copy would
    # measure how fast a CPU's pages are made.
    read = _seconds(_mapped(mesh, lambda x: x @ jnp.ones(side, dtype)), matrix)
    product = _seconds(_mapped(mesh, lambda x: x @ x), square)
    # 32 x 32 is next to no work, so what is left is what a kernel costs.
    launch = _each(mesh, lambda x: x @ x, put(32, 32))
    latency, link = 0.0, machine.link_bandwidth
    if mesh.size > 1:
        small = _each(mesh, _all_reduce, put(SMALL))
        # Bytes of a ring, see Collective.wire_bytes. The model charges launch and latency
        # separately, so neither is part of the time on the wire, and the latency has no launch.
        sent = 2 * LARGE * dtype.itemsize * (mesh.size - 1) / mesh.size
        seconds = _each(mesh, _all_reduce, put(LARGE), lengths=(2, 10))
        link = sent / max(seconds - small, 1e-9)
        latency = max(small - launch, 0.0)
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
    """Return zeros of this shape on each device, as one array split along its first axis."""
    # 8 devices, (32, 32) each -> one array [256, 32], made where it stays.
    sharding = NamedSharding(mesh, P(ALL_AXES))
    whole = (mesh.size * shape[0], *shape[1:])
    return jax.jit(lambda: jnp.zeros(whole, dtype), out_shardings=sharding)()


def _mapped(mesh: Mesh, body: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    specs = P(ALL_AXES)
    return jax.jit(spmd(body, mesh, specs, specs))


def _all_reduce(x: jax.Array) -> jax.Array:
    return jax.lax.psum(x, ALL_AXES)


def _each(
    mesh: Mesh,
    operation: Callable[[jax.Array], jax.Array],
    x: jax.Array,
    lengths: tuple[int, int] = (16, 144),
) -> float:
    """Return seconds of one operation in a chain in which each waits for the one before."""

    def chain(length: int, x: jax.Array) -> jax.Array:
        for _ in range(length):
            x = operation(x)
        return x

    # The difference of two lengths has no part of the call's own cost in it:
    # (144 operations + call) - (16 operations + call) = 128 operations.
    short = _seconds(_mapped(mesh, partial(chain, lengths[0])), x)
    long = _seconds(_mapped(mesh, partial(chain, lengths[1])), x)
    return max(long - short, 0.0) / (lengths[1] - lengths[0])


def _seconds(program: Callable[[jax.Array], jax.Array], x: jax.Array, repeats: int = 7) -> float:
    """Return seconds of the fastest of several calls."""

    def call() -> float:
        begun = time.perf_counter()
        jax.block_until_ready(program(x))
        return time.perf_counter() - begun

    call()  # compiles
    return min(call() for _ in range(repeats))
