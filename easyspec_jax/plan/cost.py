"""Cost of a program on each device, read off its trace, and its time by an explicit model.

The model is simple enough to follow by hand:

    seconds = max(bytes / bandwidth, flops / peak)
              + wire bytes / link bandwidth + collectives x latency + kernels x launch

Nothing overlaps. Bytes are those that matrix products read and write (weights once, and a cache's
whole capacity) and that gathers, scatters, sorts and the like move. An operand that was converted
from a narrower type, as int8 is before a product of floats, counts as it is stored. Kernels are
those operations, the collectives, and one more for each stretch of element-wise work and reductions
between two of them, in the order of the trace, because compilers fuse such a stretch.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from math import prod
from typing import Any, Self

import jax
from jax.extend.core import Jaxpr, JaxprEqn, Var

from easyspec_jax.arithmetic import packed_width
from easyspec_jax.plan.machines import Machine
from easyspec_jax.plan.traffic import KINDS, in_jaxpr, inner, total_bytes

FREE = {
    "reshape",
    "squeeze",
    "expand_dims",
    "broadcast_in_dim",
    "transpose",
    "slice",
    "split",
    "iota",
    "axis_index",
    "copy",
    "stop_gradient",
    "convert_element_type",
}
"""Primitives without a kernel: another view of the same numbers, or part of whatever reads it."""

MOVES = {"gather", "dynamic_update_slice", "sort", "top_k", "cumsum", "cummax", "cumlogsumexp"}
"""Primitives with a kernel of their own, in addition to products, collectives and scatters."""


@dataclass(frozen=True)
class Cost:
    """Cost of a program per device. Costs can be added, and multiplied by a number of calls.

    Attributes:
        kernels: Kernels that are launched, collectives included.
        collectives: Collectives among them.
        wire_bytes: Bytes that the device sends.
        bytes: The least that it must read and write in memory.
        flops: Of matrix products; a multiplication and an addition count as two.

    Examples:
        >>> Cost(kernels=2, bytes=100) + Cost(kernels=1, flops=7) * 3
        Cost(kernels=5, collectives=0, wire_bytes=0.0, bytes=100, flops=21)
    """

    kernels: int = 0
    collectives: int = 0
    wire_bytes: float = 0.0
    bytes: int = 0
    flops: int = 0

    def __add__(self, other: Self) -> Self:
        return type(self)(
            kernels=self.kernels + other.kernels,
            collectives=self.collectives + other.collectives,
            wire_bytes=self.wire_bytes + other.wire_bytes,
            bytes=self.bytes + other.bytes,
            flops=self.flops + other.flops,
        )

    def __mul__(self, times: int) -> Self:
        return type(self)(*(times * value for value in astuple(self)))

    def towards(self, other: Self, share: float) -> Self:
        """Return the cost that lies a share of the way to another one, in whole numbers.

        Examples:
            >>> Cost(kernels=10, bytes=100).towards(Cost(kernels=30, bytes=500), 0.25)
            Cost(kernels=15, collectives=0, wire_bytes=0, bytes=200, flops=0)
        """
        pairs = zip(astuple(self), astuple(other), strict=True)
        return type(self)(*(round(here + (there - here) * share) for here, there in pairs))

    def seconds(self, machine: Machine) -> float:
        """Estimate the time by the model of this module.

        Examples:
            A step that reads 16.4 GB from 819 GB/s takes 20 ms, and 300 kernels of 1 µs add 0.3 ms.
            Its 1 TFLOP at 197 TFLOP/s takes 5 ms, which the reading hides.

            >>> from easyspec_jax.plan.machines import parse_topology
            >>> v5e = parse_topology("v5e:2x4").machine
            >>> step = Cost(kernels=300, bytes=16_380_000_000, flops=10**12)
            >>> f"{step.seconds(v5e) * 1e3:.1f} ms"
            '20.3 ms'
        """
        # A roofline: memory and arithmetic units work at the same time, so the slower one counts.
        work = max(self.bytes / machine.bandwidth, self.flops / machine.flops)
        wire = self.wire_bytes / machine.link_bandwidth
        return work + wire + self.collectives * machine.latency + self.kernels * machine.launch


Widths = Mapping[Any, float]
"""Bytes of a number of some of a trace's variables, as stored before it was converted."""

Work = tuple[int, int] | None
"""Bytes and flops of an operation that is a kernel of its own; None for element-wise work."""


def cost(function: Callable[..., Any], *args: Any, mesh_shape: Mapping[str, int]) -> Cost:
    """Count the cost of one call without compiling it.

    Of several branches the costliest counts, because the other devices wait for the one that takes
    it.

    Args:
        function: The program.
        args: Its arguments, arrays or jax.ShapeDtypeStruct.
        mesh_shape: Devices along each axis of the mesh.

    Raises:
        ValueError: A loop does more than element-wise work and its number of iterations is unknown.

    Examples:
        [2, 16] times [16, 8] in float32 is 2 x 2 x 16 x 8 flops and 4 x (32 + 128 + 16) bytes.

        >>> import jax.numpy as jnp
        >>> product = cost(jnp.matmul, jnp.ones((2, 16)), jnp.ones((16, 8)), mesh_shape={})
        >>> product.flops, product.bytes, product.kernels
        (512, 704, 1)
    """
    jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    sent = list(in_jaxpr(jaxpr, mesh_shape))
    work = list(_work(jaxpr, mesh_shape))
    moved, flops = _total(work)
    return Cost(
        kernels=_kernels(work),
        collectives=len(sent),
        wire_bytes=sum(collective.wire_bytes for collective in sent),
        bytes=moved,
        flops=flops,
    )


def _kernels(work: Sequence[Work]) -> int:
    """Count kernels: one for each operation with its own, one for each stretch of the others.

    Examples:
        A product, a bias and an activation, another product: the two in the middle are fused.

        >>> _kernels([(704, 512), None, None, (704, 512)])
        3
    """
    count, in_stretch = 0, False
    for one in work:
        if one is not None or not in_stretch:
            count += 1
        in_stretch = one is None
    return count


def _total(work: Sequence[Work]) -> tuple[int, int]:
    """Add up bytes and flops."""
    moved = flops = 0
    for one in work:
        if one is not None:
            moved += one[0]
            flops += one[1]
    return moved, flops


def _work(jaxpr: Jaxpr, sizes: Mapping[str, int], stored: Widths | None = None) -> Iterator[Work]:
    """Yield the operations of a trace in order, those of a loop as often as it runs.

    Args:
        jaxpr: The trace.
        sizes: Devices along each axis of the mesh.
        stored: What is known of the trace's arguments; see Widths.
    """
    stored = dict(stored or {})
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name in FREE:
            _look_through(equation, stored)
            continue
        if name == "dot_general":
            left, right = (_stored_bytes(value, stored) for value in equation.invars)
            moved = left + right + total_bytes(*equation.outvars)
            yield moved, _product_flops(equation)
        elif name == "pallas_call":
            # The trace inside is that of one of many programs; our kernels say what all of them do.
            estimate = equation.params["cost_estimate"]
            yield estimate.bytes_accessed, estimate.flops
        elif name in KINDS:
            # Over axes of one device nothing is sent, and no kernel runs.
            if next(in_jaxpr(jaxpr.replace(eqns=[equation]), sizes), None):
                yield total_bytes(*equation.outvars), 0
        elif name in MOVES or name.startswith("scatter"):
            yield 2 * _moved(equation), 0  # read and written
        elif name == "scan":
            # The trace has the body once, and it runs `length` times.
            body = list(_work(equation.params["jaxpr"].jaxpr, sizes))
            yield from equation.params["length"] * body
        elif name == "cond":
            branches = []
            for branch in equation.params["branches"]:
                branches.append(list(_work(branch.jaxpr, sizes, _passed(equation, branch, stored))))
            yield from max(branches, key=_weight)
        else:
            yield from _within(equation, sizes, stored)


def _look_through(equation: JaxprEqn, stored: dict[Any, float]) -> None:
    """Note how wide the numbers are stored that a free operation shows in another form."""
    # int8 [8, 4] -> convert to float32 -> transpose to [4, 8]: both results are stored in 1 byte.
    for source in equation.invars[:1]:
        for result in equation.outvars:
            stored[result] = min(_width(source, stored), _width(result, {}))


def _width(value: Any, stored: Widths) -> float:
    """Return the bytes that a number of a traced value takes where it is stored."""
    dtype: Any = value.aval.dtype
    known = stored.get(value) if isinstance(value, Var) else None
    return known or packed_width(dtype)


def _stored_bytes(value: Any, stored: Widths) -> int:
    return round(value.aval.size * _width(value, stored))


def _passed(equation: JaxprEqn, trace: Any, stored: Widths) -> Widths:
    """Return what is known of a call's or a branch's arguments."""
    # A branch lacks the first operand of its condition, the index; a call has all operands.
    names = getattr(trace, "jaxpr", trace).invars
    operands = equation.invars[len(equation.invars) - len(names) :]
    return {name: _width(operand, stored) for name, operand in zip(names, operands, strict=True)}


def _within(equation: JaxprEqn, sizes: Mapping[str, int], stored: Widths) -> Iterator[Work]:
    """Yield the work of a call or a while loop, or of one element-wise operation."""
    traces = list(inner(equation))
    if not traces:
        yield None
    for trace in traces:
        # What a loop carries changes its type of storage after the first time round.
        known = {} if equation.primitive.name == "while" else _passed(equation, trace, stored)
        for one in _work(trace, sizes, known):
            if one is not None and equation.primitive.name == "while":
                raise ValueError("a loop of unknown length does more than element-wise work")
            yield one


def _weight(work: Sequence[Work]) -> tuple[int, int]:
    """Order branches by their bytes, then by their operations."""
    return _total(work)[0], len(work)


def _moved(equation: JaxprEqn) -> int:
    """Return the bytes that an operation really moves: a cache's update, not the cache."""
    # dynamic_update_slice takes (operand, update, *start); scatter takes (operand, indices,
    # updates). XLA updates the operand in place, so only the update is read and written. Of a
    # gather or a sort, everything in the result is.
    name = equation.primitive.name
    if name == "dynamic_update_slice":
        return total_bytes(equation.invars[1])
    if name.startswith("scatter"):
        return total_bytes(equation.invars[2])
    return total_bytes(*equation.outvars)


def _product_flops(equation: JaxprEqn) -> int:
    # [B, M, K] x [B, K, N] -> [B, M, N]: each of the B M N results adds up K products, so the
    # contracted axes of the left operand say how long each sum is.
    (contracted, _), _ = equation.params["dimension_numbers"]
    left: Any = equation.invars[0].aval
    result: Any = equation.outvars[0].aval
    return 2 * result.size * prod(left.shape[axis] for axis in contracted)
