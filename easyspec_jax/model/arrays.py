"""Arrays of a checkpoint on a mesh, each shard of them read by itself.

`shard_plan.py` says which windows of which tensors make up a shard. Here a shard's memory is made
once, in its final layout and type, and filled in blocks of a few MiB. So no tensor is ever whole
in host memory, unless one device needs all of it.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from easyspec_jax.checkpoint.quantized import OFFSET, Dequantized, Quantized, scale_name
from easyspec_jax.checkpoint.rounding import INTEGERS
from easyspec_jax.checkpoint.tensors import Slices, TensorSource, window_blocks
from easyspec_jax.model.matrix import Matrix
from easyspec_jax.model.shard_plan import ArrayPlan, Copy, scales_of
from easyspec_jax.options import Weights
from easyspec_jax.parallel.platforms import PlatformSettings, settings_for

_READERS = 8
# Bytes. On a CPU, XLA takes over memory that starts at a multiple of this, and copies any other.
_ALIGNMENT = 64


@dataclass(frozen=True, kw_only=True)
class ArrayLoader:
    """Loads arrays, placed on the mesh in the final layout and type.

    Attributes:
        source: Tensors of the checkpoint.
        mesh: Devices.
        dtype: Type of every array but quantized matrices, their scales and offsets.
        settings: Which kernels the modules use; None for those of the mesh's devices.
        weights: Type of the matrices; None for that of the checkpoint if it is quantized, else
            `dtype`.
    """

    source: TensorSource
    mesh: Mesh
    dtype: np.dtype
    settings: PlatformSettings | None = None
    weights: Weights | None = None

    @cached_property
    def _kept(self) -> TensorSource:
        """The tensors in the types that they are kept in on the devices."""
        if self.weights is None:
            return self.source
        if self.weights in INTEGERS:
            return Quantized(self.source, self.weights)
        return Dequantized(self.source)

    @cached_property
    def _dtypes(self) -> Mapping[str, str]:
        """Types of these tensors. Some sources make a new list at every call."""
        return self._kept.dtypes()

    @property
    def platform(self) -> str:
        """Platform of the devices, as JAX names it."""
        return self.mesh.devices.flat[0].platform

    @property
    def kernels(self) -> PlatformSettings:
        """Settings that say which kernels the modules use."""
        return self.settings or settings_for(self.mesh.devices.flat[0])

    def place(self, array: np.ndarray, spec: P) -> Array:
        """Put a host array on the mesh, in the loader's type.

        Args:
            array: The whole array. Each process hands over only the shards of its own devices.
            spec: Mesh axes that each dimension is split over. They have to divide it.
        """

        def shard(bounds: Any) -> np.ndarray:
            memory = _aligned_zeros(array[bounds].shape, self.dtype)
            memory[...] = array[bounds]
            return memory

        return jax.make_array_from_callback(array.shape, NamedSharding(self.mesh, spec), shard)

    def load(
        self, plan: ArrayPlan, dtype: np.dtype | None = None, source: TensorSource | None = None
    ) -> Array:
        """Carry out a plan. Each process makes the shards of its own devices, each of them once.

        Args:
            plan: What goes where.
            dtype: Type of the array; by default the loader's.
            source: Where the tensors come from; by default the checkpoint, quantized or not.
        """
        source, dtype = source or self._kept, dtype or self.dtype
        sharding = NamedSharding(self.mesh, plan.spec)
        own = set()
        for bounds in sharding.addressable_devices_indices_map(plan.shape).values():
            own.add(plan.shard_at(bounds or ()))
        shards = {shard: _aligned_zeros(plan.shard_shape, dtype) for shard in own}

        def fill(block: tuple[np.ndarray, str, Slices]) -> None:
            out, tensor, window = block
            out[...] = source.read(tensor, window)

        # Threads take blocks rather than shards, so that a single device is filled by all of them.
        with ThreadPoolExecutor(_READERS) as pool:
            for _ in pool.map(fill, _blocks(plan.copies, shards)):
                pass
        # A CPU's devices keep this very memory, and replicas of a shard share it.
        return jax.make_array_from_callback(
            plan.shape, sharding, lambda bounds: shards[plan.shard_at(bounds or ())]
        )

    def matrix(self, plan: ArrayPlan) -> Matrix:
        """Carry out the plan of a matrix, and of its scales and offsets if it is quantized.

        Where only some of the tensors it is made of are quantized, all become floats.
        """
        dtypes, tensors = self._dtypes, {copy.tensor for copy in plan.copies}
        integers = {dtypes[tensor] for tensor in tensors} & INTEGERS.keys()
        if not all(dtypes[tensor] in INTEGERS for tensor in tensors):
            source = Dequantized(self._kept) if integers else self._kept
            dtype = jnp.dtype(jnp.bfloat16) if self.weights == "bfloat16" else self.dtype
            return Matrix(self.load(plan, dtype, source), fills=self.kernels.fills_tokens)
        # Values of four bits are values of eight bits too.
        values = self.load(plan, jnp.dtype("int8" if "int8" in integers else "int4"))
        groups = {tensor: self._group_of(tensor) for tensor in tensors}
        scale = self.load(scales_of(plan, groups), np.dtype(np.float32))
        # Where only some of the tensors have offsets, those of the others are zero.
        offsets = scales_of(plan, groups, OFFSET).only(self._kept.shapes())
        offset = self.load(offsets, np.dtype(np.float32)) if offsets.copies else None
        return Matrix(
            values,
            scale,
            offset,
            fused=self.kernels.fused_groups,
            interpret=self.platform == "cpu",
            pairs=self.kernels.pairs_tokens,
        )

    def _group_of(self, tensor: str) -> int | None:
        """Return how many columns of a tensor share a scale; None if all of a row do, or none."""
        shapes = self._kept.shapes()
        _, groups = shapes.get(scale_name(tensor), (0, 1))
        return None if groups == 1 else shapes[tensor][1] // groups

    def _bias(self, plan: ArrayPlan) -> Array | None:
        """Carry out the plan of a bias, if the checkpoint has any of its tensors."""
        # Where a layer of a stack has no bias, its part stays zero.
        plan = plan.only(self.source.shapes())
        return self.load(plan) if plan.copies else None


def _blocks(
    copies: Sequence[Copy], shards: Mapping[int, np.ndarray]
) -> Iterator[tuple[np.ndarray, str, Slices]]:
    """Split copies into blocks of a few MiB: a place in a shard, a tensor and its slices."""
    for copy in copies:
        if copy.shard in shards:
            # A view of the shard: what is put into it lands in the shard.
            out = shards[copy.shard][copy.target]
            for rows, window in window_blocks(out.shape, copy.source):
                yield out[rows], copy.tensor, window


def _aligned_zeros(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return zeros that a CPU's devices can take over. Pages are not in memory until written."""
    size = prod(shape) * dtype.itemsize
    memory = np.zeros(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)
