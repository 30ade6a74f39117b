"""Traffic of a program between devices, read off its trace.

Nothing is compiled and no device is needed. A trace (a "jaxpr") is a list of equations, each with
the primitive that it applies; loops, branches and calls hold traces of their own.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import ceil, prod
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from easyspec_jax.arithmetic import packed_width

KINDS = {
    "psum": "all-reduce",
    "psum_invariant": "all-reduce",
    "all_gather": "all-gather",
    "all_to_all": "all-to-all",
}
"""XLA's names of the collectives, by JAX's primitive."""


@dataclass(frozen=True)
class Collective:
    """One collective operation, possibly on several arrays at once.

    Attributes:
        kind: XLA's name.
        bytes: Size of its results on one device.
        devices: How many take part.
    """

    kind: str
    bytes: int
    devices: int

    @property
    def wire_bytes(self) -> float:
        """Bytes that each device sends, in a ring.

        Examples:
            >>> Collective("all-reduce", bytes=800, devices=8).wire_bytes
            1400.0
            >>> Collective("all-gather", bytes=800, devices=8).wire_bytes
            700.0
        """
        # n devices cut S bytes into n pieces of S / n. Gathering passes n - 1 pieces on to the next
        # device, and so does all-to-all, which keeps one piece. All-reduce goes around twice: once
        # adding the pieces up, once gathering the sums.
        times = 2 if self.kind == "all-reduce" else 1
        return times * self.bytes * (self.devices - 1) / self.devices


def collectives(
    function: Callable[..., Any], *args: Any, mesh_shape: Mapping[str, int]
) -> list[Collective]:
    """List the collectives that one call issues, in order.

    Args:
        function: The program.
        args: Its arguments, arrays or jax.ShapeDtypeStruct.
        mesh_shape: Devices along each axis. An axis of size 1 needs no communication.

    Returns:
        The collectives; those in a loop as often as it runs.

    Raises:
        ValueError: A loop communicates and its number of iterations is unknown.
    """
    return list(in_jaxpr(jax.make_jaxpr(function)(*args).jaxpr, mesh_shape))


def in_jaxpr(jaxpr: Jaxpr, sizes: Mapping[str, int], once: bool = False) -> Iterator[Collective]:
    """Yield the collectives of a trace, in order.

    Args:
        jaxpr: The trace.
        sizes: Devices along each axis of the mesh.
        once: Count a loop as if it ran once, as it stands in a program's text.

    Raises:
        ValueError: A loop communicates and its number of iterations is unknown.
    """
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name in KINDS:
            yield from _collective(equation, sizes)
        elif name == "scan":
            times = 1 if once else equation.params["length"]
            yield from times * list(in_jaxpr(equation.params["jaxpr"].jaxpr, sizes, once))
        else:
            # A call, a while loop or all branches of a condition. At most one branch communicates:
            # that of prefill which all devices take together. So nothing is counted twice.
            for part in inner(equation):
                for collective in in_jaxpr(part, sizes, once):
                    if name == "while":
                        raise ValueError("a loop of unknown length communicates")
                    yield collective


def _collective(equation: JaxprEqn, sizes: Mapping[str, int]) -> Iterator[Collective]:
    """Yield an equation's collective, or nothing if its axes have one device."""
    # psum names its axes "axes", the others "axis_name", which may be a bare name.
    params = equation.params
    axes: Any = params["axes" if "axes" in params else "axis_name"]
    devices = prod(sizes[axis] for axis in (axes if isinstance(axes, tuple) else (axes,)))
    if devices > 1:
        size = total_bytes(*equation.outvars)
        yield Collective(KINDS[equation.primitive.name], size, devices)


def inner(equation: JaxprEqn) -> Iterator[Jaxpr]:
    """Yield the traces inside an equation: a call's, a loop's, those of all branches."""
    # A call has {"jaxpr": closed}, a while loop {"cond_jaxpr": …, "body_jaxpr": …}, and a condition
    # {"branches": (closed, closed)}; `shard_map` has an open trace.
    for value in equation.params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            if isinstance(one, ClosedJaxpr):
                yield one.jaxpr
            elif isinstance(one, Jaxpr):
                yield one


def total_bytes(*values: Any) -> int:
    """Add up the sizes of a trace's values; inside `shard_map` each is one device's part."""
    return sum(map(value_bytes, values))


def value_bytes(value: Any) -> int:
    """Return the size of a trace's value; two int4 elements share a byte."""
    return ceil(value.aval.size * packed_width(value.aval.dtype))
