"""The device mesh: axes ("layer", "tensor"), virtual CPU devices where there is no accelerator."""

import math
import re
from dataclasses import dataclass
from typing import Literal

import jax
import numpy as np
from jax.sharding import Mesh

from easyspec_jax.errors import EasySpecError

LAYER, TENSOR = "layer", "tensor"
ALL_AXES = (LAYER, TENSOR)

Axes = tuple[str, ...]
"""Mesh axes that a dimension is split over; empty: replicated."""

Platform = Literal["cpu", "gpu", "tpu"]


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
    if text.isdecimal() and int(text) > 0:
        devices = int(text)
        layer = max(n for n in range(1, min(group_size, devices) + 1) if devices % n == 0)
        return MeshShape(layer, devices // layer)
    axes = dict(re.findall(r"(?<![^,])(\w+)=([1-9]\d*)(?:,|\Z)", text))
    if set(axes) == set(ALL_AXES) and text.count(",") == 1:
        return MeshShape(int(axes[LAYER]), int(axes[TENSOR]))
    raise EasySpecError(f'--mesh {text!r} is neither a number of devices such as "8" nor "layer=4,tensor=2"')


def request_cpu_devices(count: int) -> None:
    """Asks for that many virtual CPU devices, which cost nothing where they are not used.

    Must come before anything starts JAX's backends (Orbax does); later it changes nothing, as open_mesh will tell.
    """
    if jax.config.jax_num_cpu_devices < count:  # pyright: ignore[reportAttributeAccessIssue]
        try:
            jax.config.update("jax_num_cpu_devices", count)
        except RuntimeError:
            return


def open_mesh(shape: MeshShape, platform: Platform | None = None) -> Mesh:
    """A mesh over the first devices of a platform (default: the fastest that JAX finds).

    On a CPU they are virtual (request_cpu_devices). Raises EasySpecError if the platform is absent or has too few.
    """
    try:
        devices = jax.devices(platform)
    except RuntimeError:
        raise EasySpecError(f"--platform {platform}: JAX finds no such device here") from None
    if len(devices) < shape.size:
        raise EasySpecError(
            f"--mesh asks for {shape.size} devices but there are {len(devices)} of platform "
            f"{devices[0].platform}; use a smaller mesh or --platform cpu (virtual devices)"
        )
    grid = np.asarray(devices[: shape.size]).reshape(shape.layer, shape.tensor)
    return Mesh(grid, ALL_AXES, axis_types=(jax.sharding.AxisType.Auto,) * 2)


def axes_size(mesh: Mesh, axes: Axes) -> int:
    """Number of shards that a dimension split over axes has."""
    return math.prod(mesh.shape[axis] for axis in axes)
