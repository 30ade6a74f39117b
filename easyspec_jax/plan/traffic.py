"""Traffic of a program between devices, read off its trace: nothing is compiled and no device is needed."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

KINDS = {
    "psum": "all-reduce",
    "psum_invariant": "all-reduce",
    "all_gather": "all-gather",
    "all_to_all": "all-to-all",
}


@dataclass(frozen=True)
class Collective:
    """One operation, perhaps of several arrays. bytes: of its results on one device; devices: that take part."""

    kind: str
    bytes: int
    devices: int

    @property
    def wire_bytes(self) -> float:
        """That each device sends, in a ring."""
        times = 2 if self.kind == "all-reduce" else 1
        return times * self.bytes * (self.devices - 1) / self.devices


def collectives(
    function: Callable[..., Any], *args: Any, mesh_shape: Mapping[str, int]
) -> list[Collective]:
    """Those that one call issues, in order; a loop's as often as it runs. args may be jax.ShapeDtypeStruct.

    Axes of size 1 need no communication. Raises ValueError where the number of iterations is not known.
    """
    return list(in_jaxpr(jax.make_jaxpr(function)(*args).jaxpr, mesh_shape))


def in_jaxpr(jaxpr: Jaxpr, sizes: Mapping[str, int], once: bool = False) -> Iterator[Collective]:
    """Those of a trace; sizes: of the mesh's axes; once: a loop's count as if it ran once, as in a program's text."""
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name in KINDS:
            yield from _of(equation, sizes)
        elif name == "scan":
            times = 1 if once else equation.params["length"]
            yield from times * list(in_jaxpr(equation.params["jaxpr"].jaxpr, sizes, once))
        else:
            parts = [list(in_jaxpr(part, sizes, once)) for part in inner(equation)]
            if name == "while" and any(parts):
                raise ValueError("a loop of unknown length communicates")
            # Branches never communicate: devices take different ones.
            yield from (collective for part in parts for collective in part)


def _of(equation: JaxprEqn, sizes: Mapping[str, int]) -> Iterator[Collective]:
    axes: Any = equation.params["axes" if "axes" in equation.params else "axis_name"]
    devices = prod(sizes[axis] for axis in (axes if isinstance(axes, tuple) else (axes,)))
    results: list[Any] = [result.aval for result in equation.outvars]
    if devices > 1:
        size = sum(result.size * result.dtype.itemsize for result in results)
        yield Collective(KINDS[equation.primitive.name], size, devices)


def inner(equation: JaxprEqn) -> Iterator[Jaxpr]:
    """The traces within an equation: a call's, a loop's, all branches."""
    for value in equation.params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            if isinstance(one, ClosedJaxpr):
                yield one.jaxpr
            elif isinstance(one, Jaxpr):
                yield one
