"""The device mesh: axes ("layer", "tensor"), on virtual CPU devices where accelerators are missing.

Layers of one fuzzy group are spread over "layer", so that they run at once; the heads of their
attentions are split over "tensor". Everything else (single layers, all MLPs, embedding and head) is
split over both axes, or replicated.
"""

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
from easyspec_jax.parallel.spmd import spmd

LAYER, TENSOR = "layer", "tensor"
ALL_AXES = (LAYER, TENSOR)

Axes = tuple[str, ...]
"""Mesh axes that a dimension is split over; () is replicated."""

MAX_VIRTUAL_DEVICES = 256
"""Virtual devices of a CPU at most; each takes memory and threads even if it is not used."""


@dataclass(frozen=True)
class MeshShape:
    """Devices along each axis."""

    layer: int
    tensor: int

    @property
    def size(self) -> int:
        """Number of devices."""
        return self.layer * self.tensor

    @property
    def name(self) -> str:
        """The shape as parse_mesh() reads it: "layer=4,tensor=2"."""
        return f"{LAYER}={self.layer},{TENSOR}={self.tensor}"


def parse_mesh(text: str, group_size: int = 1) -> MeshShape:
    """Return the shape that "8" or "layer=4,tensor=2" names.

    Args:
        text: The shape. A bare number of devices gets the longest layer axis that divides it and is
            no longer than a group, so that no device idles while a group runs.
        group_size: Layers of a group.

    Raises:
        EasySpecError: The text is neither.

    Examples:
        >>> parse_mesh("8", group_size=5)
        MeshShape(layer=4, tensor=2)
    """
    if re.fullmatch(r"[1-9]\d{0,5}", text):
        devices = int(text)
        # 8 devices and groups of 5: divisors up to 5 are 1, 2 and 4, so layer = 4 and tensor = 2.
        layer = max(n for n in range(1, min(group_size, devices) + 1) if devices % n == 0)
        return MeshShape(layer, devices // layer)
    axes = dict(re.findall(r"(?<![^,])(\w+)=([1-9]\d{0,5})(?:,|\Z)", text))
    if set(axes) == set(ALL_AXES) and text.count(",") == 1:
        return MeshShape(int(axes[LAYER]), int(axes[TENSOR]))
    raise EasySpecError(
        f'`mesh` {text[:40]!r} is neither a number of devices such as "8" nor "layer=4,tensor=2"'
    )


def open_mesh(shape: MeshShape, platform: Platform | None = None, or_cpu: bool = False) -> Mesh:
    """Return a mesh over the first devices of a platform.

    A CPU's devices are virtual, and made here if JAX has not started yet. Several processes get
    equal parts of the mesh; see spread().

    Args:
        shape: Devices along each axis.
        platform: By default the fastest that JAX finds.
        or_cpu: Use a CPU's virtual devices if the default platform has too few.

    Raises:
        EasySpecError: The platform is absent or has too few devices, or the processes cannot share
            them equally.
    """
    processes = hosts.count()
    if shape.size % processes:
        raise EasySpecError(
            f"`mesh` asks for {shape.size} devices, which {processes} processes cannot share "
            "equally"
        )
    # Virtual devices must be requested before JAX starts, which is before we can find out
    # whether there is an accelerator.
    if shape.size <= MAX_VIRTUAL_DEVICES:
        _request_cpu_devices(shape.size // processes)
    devices = _devices(platform)
    if len(devices) < shape.size and or_cpu and platform is None:
        devices = _devices("cpu")
    if len(devices) < shape.size:
        kind = devices[0].platform
        advice = f"use `mesh` {len(devices)}"
        if kind != "cpu":
            advice += " or `platform` cpu (virtual devices)"
        raise EasySpecError(
            f"`mesh` asks for {shape.size} devices but there are {len(devices)} of platform "
            f"{kind}; {advice}"
        )
    return Mesh(
        spread(devices, shape, processes), ALL_AXES, axis_types=(jax.sharding.AxisType.Auto,) * 2
    )


def spread(devices: Sequence[Any], shape: MeshShape, processes: int) -> np.ndarray:
    """Arrange devices, equally many of each process, with layer groups inside one if possible.

    Args:
        devices: All devices of the platform.
        shape: Devices along each axis.
        processes: Number of processes.

    Returns:
        Devices [layer, tensor]. The layer axis runs inside a process as far as that goes, because a
        fuzzy group communicates most often.

    Raises:
        EasySpecError: A process has too few devices.
    """
    each = shape.size // processes
    if processes == 1:
        chosen = np.asarray([devices[: shape.size]], object)
    else:
        chosen = np.empty((processes, each), object)
        for process in range(processes):
            own = [device for device in devices if device.process_index == process]
            if len(own) < each:
                raise EasySpecError(
                    f"`mesh` asks for {each} devices a process, and process {process} has "
                    f"{len(own)}"
                )
            chosen[process] = own[:each]
    # Two processes of 4 devices, layer=8 tensor=1: the axis inside a process is gcd(8, 4) = 4 long,
    # and [2, 4] becomes blocks [2, 1, 4, 1] -> [layer 2·4, tensor 1].
    layer = math.gcd(shape.layer, each)
    blocks = chosen.reshape(
        shape.layer // layer, shape.tensor * layer // each, layer, each // layer
    )
    return blocks.transpose(0, 2, 1, 3).reshape(shape.layer, shape.tensor)


@cache
def connect(mesh: Mesh) -> None:
    """Run the first collective of every group of devices, if there are several processes.

    Gloo waits only 30 s for all processes to join the first collective of a group. One process may
    well compile for longer than another, so this is called right after all have met.
    """
    if hosts.count() == 1:
        return
    for axes in (ALL_AXES, (LAYER,), (TENSOR,)):
        total = spmd(partial(jax.lax.psum, axis_name=axes), mesh, P(), P())
        jax.block_until_ready(jax.jit(total)(replicated(np.ones(1, np.float32), mesh)))


def replicated(x: ArrayLike, mesh: Mesh) -> jax.Array:
    """Return an array that every device holds whole. Every process must call this with the same."""
    return placed(x, mesh, P())


def placed(x: ArrayLike, mesh: Mesh, spec: P) -> jax.Array:
    """Return an array that is split over a mesh. Every process must call this with the same.

    Args:
        x: The whole array.
        mesh: The devices.
        spec: How to split it.
    """
    array = np.asarray(x)
    # device_put would make all processes compare the array first.
    return jax.make_array_from_callback(
        array.shape, NamedSharding(mesh, spec), lambda index: array[index]
    )


def _devices(platform: Platform | None) -> list[Any]:
    try:
        return jax.devices(platform)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise EasySpecError(
            f"`platform` {platform or '(default)'}: JAX finds no such device here ({reason})"
        ) from None


def _request_cpu_devices(count: int) -> None:
    """Ask JAX for virtual devices. It refuses once it has started, and open_mesh() counts again."""
    if jax.config.jax_num_cpu_devices < count:  # pyright: ignore[reportAttributeAccessIssue]
        with suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", count)


def axes_size(mesh: Mesh, axes: Axes) -> int:
    """Return the number of shards of a dimension that is split over axes."""
    return math.prod(mesh.shape[axis] for axis in axes)
