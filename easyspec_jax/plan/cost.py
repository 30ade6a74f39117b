"""Cost of a program on each device, read off its trace, and its time by an explicit model.

The model is deliberately plain, so that what it says can be followed by hand:

    seconds = max(bytes / bandwidth, flops / peak) + wire bytes / link bandwidth + collectives x latency
              + kernels x launch

Nothing overlaps. Bytes are those that matrix products read and write (so weights once, and a cache's whole capacity)
and that gathers, scatters, sorts and the like move. Kernels are those operations and the collectives, and one more for
each stretch of element-wise work and reductions between two of them, in the order of the trace: what compilers fuse.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import astuple, dataclass
from itertools import groupby
from math import prod
from typing import Any, Self

import jax
from jax.extend.core import Jaxpr, JaxprEqn

from easyspec_jax.plan.machines import Machine
from easyspec_jax.plan.traffic import KINDS, in_jaxpr, inner

FREE = {"reshape", "squeeze", "expand_dims", "broadcast_in_dim", "transpose", "slice", "split", "iota", "axis_index",
        "copy", "stop_gradient", "convert_element_type"}  # fmt: skip
"""What costs no kernel: another view of the same numbers, or part of whatever reads it."""

MOVES = {"gather", "dynamic_update_slice", "sort", "top_k", "cumsum", "cummax", "cumlogsumexp"}
"""What needs a kernel of its own, besides products, collectives and scatters."""


@dataclass(frozen=True)
class Cost:
    """Cost of a program per device. wire_bytes: sent by a device; bytes: the least it must read and write in memory."""

    kernels: int = 0
    collectives: int = 0
    wire_bytes: float = 0.0
    bytes: int = 0
    flops: int = 0

    def __add__(self, other: Self) -> Self:
        return type(self)(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, times: int) -> Self:
        return type(self)(*(times * value for value in astuple(self)))

    def seconds(self, machine: Machine) -> float:
        """An estimate, by the model of this module."""
        work = max(self.bytes / machine.bandwidth, self.flops / machine.flops)
        wire = self.wire_bytes / machine.link_bandwidth
        return work + wire + self.collectives * machine.latency + self.kernels * machine.launch


def cost(function: Callable[..., Any], *args: Any, mesh_shape: Mapping[str, int]) -> Cost:
    """Cost of one call. args may be jax.ShapeDtypeStruct; nothing is compiled.

    Of several branches the costliest counts, as devices that wait for the one that took it would say. Raises ValueError
    where the number of iterations of a loop that does more than element-wise work is not known.
    """
    jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    sent = list(in_jaxpr(jaxpr, mesh_shape))
    work = list(_work(jaxpr, mesh_shape))
    kernels = sum(
        len(list(run)) if own else 1 for own, run in groupby(work, key=lambda one: one is not None)
    )
    own = [one for one in work if one is not None]
    return Cost(
        kernels=kernels,
        collectives=len(sent),
        wire_bytes=sum(collective.wire_bytes for collective in sent),
        bytes=sum(bytes for bytes, _ in own),
        flops=sum(flops for _, flops in own),
    )


Work = tuple[int, int] | None
"""Bytes and flops of an operation that is a kernel of its own; None: element-wise."""


def _work(jaxpr: Jaxpr, sizes: Mapping[str, int]) -> Iterator[Work]:
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name in FREE:
            continue
        if name == "dot_general":
            yield _size(*equation.invars, *equation.outvars), _product_flops(equation)
        elif name in KINDS:
            if next(in_jaxpr(jaxpr.replace(eqns=[equation]), sizes), None):
                yield _size(*equation.outvars), 0
        elif name in MOVES or name.startswith("scatter"):
            yield 2 * _moved(equation), 0
        elif name == "scan":
            yield from equation.params["length"] * list(
                _work(equation.params["jaxpr"].jaxpr, sizes)
            )
        elif name == "cond":
            yield from max(
                (list(_work(branch.jaxpr, sizes)) for branch in equation.params["branches"]),
                key=_weight,
            )
        else:
            parts = [list(_work(part, sizes)) for part in inner(equation)]
            if name == "while" and any(one is not None for part in parts for one in part):
                raise ValueError("a loop of unknown length does more than element-wise work")
            yield from (one for part in parts for one in part) if parts else (None,)


def _weight(work: list[Work]) -> tuple[int, int]:
    return sum(one[0] for one in work if one is not None), len(work)


def _moved(equation: JaxprEqn) -> int:
    """Bytes that an operation really moves: a cache's update, not the cache."""
    name = equation.primitive.name
    if name == "dynamic_update_slice":
        return _size(equation.invars[1])
    return _size(equation.invars[2]) if name.startswith("scatter") else _size(*equation.outvars)


def _product_flops(equation: JaxprEqn) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left: Any = equation.invars[0].aval
    result: Any = equation.outvars[0].aval
    return 2 * result.size * prod(left.shape[axis] for axis in contracted)


def _size(*values: Any) -> int:
    return sum(value.aval.size * value.aval.dtype.itemsize for value in values)
