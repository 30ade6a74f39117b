"""The device mesh: axes ("layer", "tensor"), virtual CPU devices where there is no accelerator."""

import math
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from numpy.typing import ArrayLike

from easyspec_jax.errors import EasySpecError
from easyspec_jax.options import Platform
from easyspec_jax.parallel import hosts

LAYER, TENSOR = "layer", "tensor"
ALL_AXES = (LAYER, TENSOR)

Axes = tuple[str, ...]
"""Mesh axes that a dimension is split over; empty: replicated."""

MAX_VIRTUAL_DEVICES = 256
"""Of a CPU; each takes memory and threads, used or not."""


@dataclass(frozen=True)
class MeshShape:
    """Devices along each axis."""

    layer: int
    tensor: int

    @property
    def size(self) -> int:
        return self.layer * self.tensor


def parse_mesh(text: str, group_size: int = 1) -> MeshShape:
    """The shape named by "8" or "layer=4,tensor=2".

    A bare number is split so that a group of group_size layers fills the layer axis: its length is the largest divisor
    of the number that is at most group_size. Raises EasySpecError for anything else.
    """
    if re.fullmatch(r"[1-9]\d{0,5}", text):
        devices = int(text)
        layer = max(n for n in range(1, min(group_size, devices) + 1) if devices % n == 0)
        return MeshShape(layer, devices // layer)
    axes = dict(re.findall(r"(?<![^,])(\w+)=([1-9]\d{0,5})(?:,|\Z)", text))
    if set(axes) == set(ALL_AXES) and text.count(",") == 1:
        return MeshShape(int(axes[LAYER]), int(axes[TENSOR]))
    raise EasySpecError(
        f'--mesh {text[:40]!r} is neither a number of devices such as "8" nor "layer=4,tensor=2"'
    )


def open_mesh(shape: MeshShape, platform: Platform | None = None, or_cpu: bool = False) -> Mesh:
    """A mesh over the first devices of a platform (default: the fastest that JAX finds).

    On a CPU they are virtual, made here if JAX has not started yet. or_cpu: take a CPU's if the default platform has
    too few. Several processes have equal parts of it; see spread(). Raises EasySpecError if the platform is absent or
    has too few, or if they do not divide.
    """
    processes = hosts.count()
    if shape.size % processes:
        raise EasySpecError(
            f"--mesh asks for {shape.size} devices, which {processes} processes cannot share equally"
        )
    if shape.size <= MAX_VIRTUAL_DEVICES:
        _request_cpu_devices(shape.size // processes)
    devices = _devices(platform)
    if len(devices) < shape.size and or_cpu and platform is None:
        devices = _devices("cpu")
    if len(devices) < shape.size:
        kind = devices[0].platform
        advice = f"use --mesh {len(devices)}" + (
            "" if kind == "cpu" else " or --platform cpu (virtual devices)"
        )
        raise EasySpecError(
            f"--mesh asks for {shape.size} devices but there are {len(devices)} of platform {kind}; {advice}"
        )
    return Mesh(
        spread(devices, shape, processes), ALL_AXES, axis_types=(jax.sharding.AxisType.Auto,) * 2
    )


def spread(devices: Sequence[Any], shape: MeshShape, processes: int) -> np.ndarray:
    """[layer, tensor] devices, equally many of each process, the layer axis inside a process as far as it fits.

    Raises EasySpecError if a process has too few.
    """
    each = shape.size // processes
    own: list[list[Any]] = []
    for process in range(processes) if processes > 1 else ():
        own.append([device for device in devices if device.process_index == process])
        if len(own[-1]) < each:
            raise EasySpecError(
                f"--mesh asks for {each} devices a process, and process {process} has {len(own[-1])}"
            )
    chosen = np.asarray(
        [of_process[:each] for of_process in own] or [devices[: shape.size]], object
    )
    layer = math.gcd(shape.layer, each)  # of one process
    blocks = chosen.reshape(
        shape.layer // layer, shape.tensor * layer // each, layer, each // layer
    )
    return blocks.transpose(0, 2, 1, 3).reshape(shape.layer, shape.tensor)


@cache
def connect(mesh: Mesh) -> None:
    """Makes every group of devices' first collective; for several processes, to be called when all have just met.

    Gloo gives the first collective of a group 30 s to be joined by all, who may compile for longer than each other.
    """
    if hosts.count() == 1:
        return
    for axes in (ALL_AXES, (LAYER,), (TENSOR,)):
        total = jax.shard_map(
            partial(jax.lax.psum, axis_name=axes), mesh=mesh, in_specs=P(), out_specs=P()
        )
        jax.block_until_ready(jax.jit(total)(replicated(np.ones(1, np.float32), mesh)))


def replicated(x: ArrayLike, mesh: Mesh) -> jax.Array:
    """The same array on every device; every process has to have it."""
    array = np.asarray(x)
    # device_put would have all processes compare it first.
    return jax.make_array_from_callback(
        array.shape, NamedSharding(mesh, P()), lambda index: array[index]
    )


def _devices(platform: Platform | None) -> list[Any]:
    try:
        return jax.devices(platform)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise EasySpecError(
            f"--platform {platform or '(default)'}: JAX finds no such device here ({reason})"
        ) from None


def _request_cpu_devices(count: int) -> None:
    """Too late once JAX has started; open_mesh then counts what there is."""
    if jax.config.jax_num_cpu_devices < count:  # pyright: ignore[reportAttributeAccessIssue]
        with suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", count)


def axes_size(mesh: Mesh, axes: Axes) -> int:
    """Number of shards that a dimension split over axes has."""
    return math.prod(mesh.shape[axis] for axis in axes)
