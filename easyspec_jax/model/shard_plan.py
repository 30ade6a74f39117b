"""Shard plans: which windows of which stored tensors make up the shards of an array, as plain data.

Plans follow from sizes alone. Making one reads nothing and needs no devices; `model/arrays.py`
carries it out. In a tensor's name, {} stands for a layer's number: all layers have the same plan.
"""

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import gcd, prod
from typing import TypeVar

import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Int

from easyspec_jax.arithmetic import ceil_div
from easyspec_jax.checkpoint.tensors import Slices
from easyspec_jax.model.sharding import Entries
from easyspec_jax.parallel.mesh import LAYER, Axes

T = TypeVar("T")

Index = tuple[int | slice, ...]
"""A place in a shard: a slice for each dimension, and before them the slot in a stack."""


@dataclass(frozen=True)
class Copy:
    """A window of a stored tensor, and the place in a shard that it fills.

    Attributes:
        tensor: Name of the tensor.
        source: Slices of the tensor.
        shard: Number of the shard.
        target: The place in the shard.
    """

    tensor: str
    source: Slices
    shard: int
    target: Index

    def __str__(self) -> str:
        return f"{self.tensor}{_text(self.source)} -> {_text(self.target)} of shard {self.shard}"


@dataclass(frozen=True)
class ArrayPlan:
    """The copies that fill an array. Elements that none of them fills are zero.

    Attributes:
        shard_shape: Shape of every shard.
        grid: Number of shards along each dimension. Shards are numbered in row-major order.
        spec: Mesh axes that each dimension is split over.
        copies: What is copied into all shards.

    Examples:
        >>> from easyspec_jax.model.sharding import even_entries
        >>> columns = even_entries(size=3, width=2, shards=2)
        >>> print(matrix({"layers.{}.down": columns}, 4, ("tensor",), dimension=1).for_layer(7))
        [4, 4] as a [1, 2] grid of [4, 2] shards
        layers.7.down[0:4, 0:2] -> [0:4, 0:2] of shard 0
        layers.7.down[0:4, 2:3] -> [0:4, 0:1] of shard 1
    """

    shard_shape: tuple[int, ...]
    grid: tuple[int, ...]
    spec: P
    copies: tuple[Copy, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole array."""
        return tuple(np.multiply(self.grid, self.shard_shape).tolist())

    def shard_at(self, bounds: Slices) -> int:
        """Return the number of the shard that has these bounds in the array."""
        # On a [2, 1, 4] grid the shard in the second row and the last column is 1 * 4 + 3 = 7.
        number = 0
        for part, size, count in zip(bounds, self.shard_shape, self.grid, strict=True):
            number = number * count + (part.start or 0) // size
        return number

    def by_shard(self) -> list[list[Copy]]:
        """Return the copies of each shard."""
        shards: list[list[Copy]] = [[] for _ in range(prod(self.grid))]
        for copy in self.copies:
            shards[copy.shard].append(copy)
        return shards

    def only(self, tensors: Container[str]) -> "ArrayPlan":
        """Return the plan without its copies of other tensors."""
        return replace(self, copies=tuple(copy for copy in self.copies if copy.tensor in tensors))

    def for_layer(self, layer: int) -> "ArrayPlan":
        """Return the plan of one layer."""
        named = []
        for copy in self.copies:
            named.append(replace(copy, tensor=copy.tensor.format(layer)))
        return replace(self, copies=tuple(named))

    def for_experts(
        self, layer: int, experts: int, axes: Axes = (), devices: int = 1
    ) -> "ArrayPlan":
        """Return the plan of one array for all experts of a layer.

        A tensor's second {} stands for the expert's number.

        Args:
            layer: The layer's number.
            experts: How many there are.
            axes: Mesh axes over which whole experts are dealt out; () if every device has its share
                of all.
            devices: How many devices that is.
        """
        # 5 experts on 2 devices: [[0, 1, 2], [3, 4, zeros]]
        each = ceil_div(experts, devices)
        copies = []
        for expert in range(experts):
            device, place = divmod(expert, each)
            first_shard = device * prod(self.grid)
            for copy in self.copies:
                tensor, target = copy.tensor.format(layer, expert), (place, *copy.target)
                shard = first_shard + copy.shard
                copies.append(replace(copy, tensor=tensor, shard=shard, target=target))
        return ArrayPlan(
            shard_shape=(each, *self.shard_shape),
            grid=(devices, *self.grid),
            spec=P(axes or None, *self.spec),
            copies=tuple(copies),
        )

    def stacked(self, layers: Sequence[int], slots: int, devices: int) -> "ArrayPlan":
        """Return the plan of one array for several layers.

        Args:
            layers: Numbers of the layers that fill the first slots.
            slots: Length of the new leading axis.
            devices: Size of the mesh axis "layer", over which the new axis is split.
        """
        # Layers 4, 5 and 6 in 4 slots on 2 devices: [[4, 5], [6, zeros]]
        per_device = slots // devices
        stack = []
        for number, layer in enumerate(layers):
            device, slot = divmod(number, per_device)
            first_shard = device * prod(self.grid)
            for copy in self.for_layer(layer).copies:
                target = (slot, *copy.target)
                stack.append(replace(copy, shard=first_shard + copy.shard, target=target))
        return ArrayPlan(
            shard_shape=(per_device, *self.shard_shape),
            grid=(devices, *self.grid),
            spec=P(LAYER, *self.spec),
            copies=tuple(stack),
        )

    def __str__(self) -> str:
        shape, grid, shard = list(self.shape), list(self.grid), list(self.shard_shape)
        lines = [f"{shape} as a {grid} grid of {shard} shards"]
        for copies in self.by_shard():
            lines += map(str, copies)
        return "\n".join(lines)


def vector(tensor: str, size: int) -> ArrayPlan:
    """Plan a vector that every device holds."""
    whole = (slice(0, size),)
    return ArrayPlan((size,), (1,), P(None), (Copy(tensor, whole, shard=0, target=whole),))


def matrix(
    tensors: Mapping[str, Entries],
    across: int,
    axes: Axes,
    *,
    dimension: int,
) -> ArrayPlan:
    """Plan a matrix whose shards have entries of several tensors, one tensor after another.

    Args:
        tensors: Entries of each tensor by its name: rows or columns, which the shards have in full.
        across: Length of such a row or column.
        axes: Mesh axes that the matrix is split over.
        dimension: Dimension of the matrix along which the entries lie: 0 for rows, 1 for columns.
    """
    # {q: [[0, 1], [2, -1]], k: [[0], [1]]} is two shards of width 3: [q0, q1, k0] and [q2, 0, k1].
    copies: list[Copy] = []
    shards, width = 0, 0
    for tensor, entries in tensors.items():
        shards = len(entries)
        for shard in range(shards):
            for position, entry, count in _runs(entries[shard]):
                at, everything = width + position, slice(0, across)
                source = _ordered(slice(entry, entry + count), everything, dimension)
                target = _ordered(slice(at, at + count), everything, dimension)
                copies.append(Copy(tensor, source, shard, target))
        width += entries.shape[1]
    return ArrayPlan(
        shard_shape=_ordered(width, across, dimension),
        grid=_ordered(shards, 1, dimension),
        spec=P(*_ordered(axes or None, None, dimension)),
        copies=tuple(copies),
    )


def split_vector(tensor: str, entries: Entries, axes: Axes) -> ArrayPlan:
    """Plan a vector whose shards have these entries."""
    return _first_dimension(matrix({tensor: entries}, 1, axes, dimension=0))


def bias_of(weight: ArrayPlan) -> ArrayPlan:
    """Plan the bias [out] of a weight [out, in], whose outputs are split."""
    copies = []
    for copy in weight.copies:
        copies.append(replace(copy, tensor=copy.tensor.removesuffix("weight") + "bias"))
    return _first_dimension(replace(weight, copies=tuple(copies)))


def bias_once(tensor: str, size: int, axes: Axes, shards: int) -> ArrayPlan:
    """Plan a bias that is added to outputs that are sums over shards: the first shard has it.

    Args:
        tensor: Name of the bias.
        size: Its length.
        axes: Mesh axes of the shards.
        shards: Number of shards.

    Examples:
        >>> print(bias_once("o_proj.bias", 4, ("tensor",), shards=2))
        [8] as a [2] grid of [4] shards
        o_proj.bias[0:4] -> [0:4] of shard 0
    """
    whole = (slice(0, size),)
    return ArrayPlan((size,), (shards,), P(axes or None), (Copy(tensor, whole, 0, whole),))


def _first_dimension(plan: ArrayPlan) -> ArrayPlan:
    """Plan vectors with one entry for each row of a matrix."""
    # w[8:12, 0:72] -> [4:8, 0:72] gives b[8:12] -> [4:8].
    copies = []
    for copy in plan.copies:
        copies.append(replace(copy, source=copy.source[:1], target=copy.target[:1]))
    return ArrayPlan(plan.shard_shape[:1], plan.grid[:1], P(plan.spec[0]), tuple(copies))


def scales_of(
    weight: ArrayPlan, groups: Mapping[str, int | None], suffix: str = "_scale"
) -> ArrayPlan:
    """Plan the scales [out, groups], or the offsets, of a quantized weight [out, in].

    Each column of the scales is for as many consecutive columns of a shard as can share one: those
    of a stored group or, where the shards' borders cut groups, of a smaller part. So a stored scale
    may come several times.

    Args:
        weight: The weight.
        groups: Columns that share a scale in each stored tensor; None if all of a row do.
        suffix: What the names of scales, or of offsets, add to the weight's.

    Examples:
        Two shards of three columns, which are stored in groups of two:

        >>> from easyspec_jax.model.sharding import even_entries
        >>> columns = even_entries(size=6, width=3, shards=2)
        >>> plan = matrix({"down.weight": columns}, 4, ("tensor",), dimension=1)
        >>> print(scales_of(plan, {"down.weight": 2}))
        [4, 6] as a [1, 2] grid of [4, 3] shards
        down.weight_scale[0:4, 0:1] -> [0:4, 0:1] of shard 0
        down.weight_scale[0:4, 0:1] -> [0:4, 1:2] of shard 0
        down.weight_scale[0:4, 1:2] -> [0:4, 2:3] of shard 0
        down.weight_scale[0:4, 1:2] -> [0:4, 0:1] of shard 1
        down.weight_scale[0:4, 2:3] -> [0:4, 1:2] of shard 1
        down.weight_scale[0:4, 2:3] -> [0:4, 2:3] of shard 1

        One scale a row serves a whole shard:

        >>> print(scales_of(plan, {"down.weight": None}))
        [4, 2] as a [1, 2] grid of [4, 1] shards
        down.weight_scale[0:4, 0:1] -> [0:4, 0:1] of shard 0
        down.weight_scale[0:4, 0:1] -> [0:4, 0:1] of shard 1
    """
    *outer, width = weight.shard_shape
    size = _shared(weight, groups)
    copies: list[Copy] = []
    for copy in weight.copies:
        group = groups[copy.tensor]
        tensor, (rows, columns) = copy.tensor + suffix, copy.source
        *place, into = copy.target
        assert isinstance(into, slice), "columns are always a slice"
        if group == size:
            # Whole groups, whose scales follow each other here as they do in the file.
            source = slice(columns.start // size, columns.stop // size)
            target = slice(into.start // size, into.stop // size)
            copies.append(Copy(tensor, (rows, source), copy.shard, (*place, target)))
            continue
        # A shard's columns 64 to 192, in parts of 64, are its scales 1 and 2.
        for part in range(into.start // size, ceil_div(into.stop, size)):
            column = columns.start + part * size - into.start
            number = 0 if group is None else column // group
            source, target = slice(number, number + 1), slice(part, part + 1)
            found = Copy(tensor, (rows, source), copy.shard, (*place, target))
            # One scale a row would come again with every run of columns.
            if found not in copies[-1:]:
                copies.append(found)
    return replace(weight, shard_shape=(*outer, width // size), copies=tuple(copies))


def _shared(weight: ArrayPlan, groups: Mapping[str, int | None]) -> int:
    """Return how many consecutive columns of every shard share a scale, whatever the shard."""
    width = weight.shard_shape[-1]
    if all(groups[copy.tensor] is None for copy in weight.copies):
        return width
    size = width
    for copy in weight.copies:
        into = copy.target[-1]
        assert isinstance(into, slice), "columns are always a slice"
        # Parts must not reach over the border of a group, of the copy or of the shard.
        borders = copy.source[1].start, into.start, into.stop - into.start
        size = gcd(size, groups[copy.tensor] or 0, *borders)
    return size


def _runs(entries: Int[np.ndarray, " entries"]) -> Iterator[tuple[int, int, int]]:
    """Find the runs of consecutive entries; yield each one's position, first entry and length."""
    # [4, 5, -1, 7] -> (0, 4, 2) and (3, 7, 1): in a run, entry - position stays the same.
    shift = np.where(entries < 0, -1 - len(entries), entries - np.arange(len(entries)))
    ends = np.flatnonzero(np.diff(shift)) + 1
    for start, stop in pairwise([0, *ends.tolist(), len(entries)]):
        if entries[start] >= 0:
            yield start, int(entries[start]), stop - start


def _ordered(along: T, across: T, dimension: int) -> tuple[T, T]:
    """Return (along, across) for dimension 0 and (across, along) for dimension 1."""
    return (across, along) if dimension else (along, across)


def _text(index: Index) -> str:
    parts = []
    for part in index:
        parts.append(f"{part.start}:{part.stop}" if isinstance(part, slice) else str(part))
    return f"[{', '.join(parts)}]"
