"""The engine's round, compiled for devices that need not be there."""

import re
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from easyspec_jax.decode.programs import Programs
from easyspec_jax.engine.abstract import abstract_state
from easyspec_jax.errors import EasySpecError, first_line
from easyspec_jax.parallel.mesh import ALL_AXES, MeshShape, open_mesh
from easyspec_jax.plan.machines import Topology, target_config
from easyspec_jax.plan.traffic import in_jaxpr

COLLECTIVE = re.compile(
    r" (all-reduce|all-gather|all-to-all|reduce-scatter|collective-\w+)(?:-start)?\("
)
"""A collective in the text of a compiled program.

A line of that text is "%sum.3 = f32[2048]{0} all-reduce(f32[2048]{0} %all-reduce.1), …": the blank
before and the parenthesis after keep the names of values from counting. A collective that overlaps
other work is a pair, `all-reduce-start(…)` and `all-reduce-done(…)`, of which the start counts.
"""


class CannotCompile(Exception):
    """This installation cannot compile for a topology that may well exist; the message says why."""


@dataclass(frozen=True)
class Compiled:
    """XLA's figures for a program. Bytes are per device.

    Attributes:
        arguments: Bytes of the weights and the state.
        donated: Bytes of the state that is handed over and comes back as results, in place.
        results: Bytes of all results, donated ones included.
        temporaries: Bytes of everything else while the program runs.
        code: Bytes of the program itself.
        collectives: Collectives in the program's text, by kind. Those in a loop count once.
        traced_collectives: The same of the program's trace.
        optimal_seconds: XLA's own estimate, which charges collectives no latency, or None if XLA
            has none.
    """

    arguments: int
    donated: int
    results: int
    temporaries: int
    code: int
    collectives: dict[str, int]
    traced_collectives: dict[str, int]
    trace_seconds: float
    compile_seconds: float
    optimal_seconds: float | None

    @property
    def memory(self) -> int:
        """Bytes at the program's peak."""
        # Donated bytes are in both arguments and results but exist once.
        return self.arguments + self.results - self.donated + self.temporaries + self.code


@dataclass(frozen=True)
class TooLarge:
    """XLA's message for a program that needs more memory than the devices have."""

    reason: str


def topology_mesh(topology: Topology, shape: MeshShape) -> Mesh:
    """Make a mesh of a topology's devices, in the order that JAX has on the machine itself.

    Args:
        topology: The devices. Those of a CPU are this host's.
        shape: Devices along each axis.

    Raises:
        EasySpecError: The topology is unknown.
        CannotCompile: A compiler is missing or does not start.
    """
    machine = topology.machine
    if machine.platform == "cpu":
        return open_mesh(shape, "cpu")
    if machine.platform == "tpu":
        devices = _absent_devices(topology.name, "tpu", ("libtpu",), "plan")
    else:
        # "1x1x8": one slice of one host with eight devices.
        options = {"target_config": target_config(machine), "topology": f"1x1x{topology.devices}"}
        plugins = ("jax_cuda12_plugin", "jax_cuda13_plugin")
        devices = _absent_devices("", "cuda", plugins, "cuda12", **options)
    # [devices] -> [layer, tensor]: consecutive devices share a row.
    grid = np.asarray(devices, object).reshape(shape.layer, shape.tensor)
    return Mesh(grid, ALL_AXES, axis_types=(jax.sharding.AxisType.Auto,) * 2)


def _absent_devices(
    name: str, platform: str, modules: tuple[str, ...], extra: str, **options: str
) -> list[Any]:
    """Return devices to compile for.

    One of the modules has to be installed: the compiler, which an extra of this package brings.
    """
    if not any(find_spec(module) for module in modules):
        raise CannotCompile(f"memory and compile time need a compiler: pip install '.[{extra}]'")
    try:
        return list(topologies.get_topology_desc(name, platform=platform, **options).devices)
    except Exception as error:  # JAX passes the compiler's own errors on as various types
        reason = first_line(error)[:200]
        if "INVALID_ARGUMENT" in str(error):
            raise EasySpecError(
                f"`topology` {name}: such a slice does not exist ({reason})"
            ) from None
        raise CannotCompile(f"the compiler for {platform} does not start: {reason}") from None


def compile_round(programs: Programs, max_length: int) -> Compiled | TooLarge:
    """Compile the round of these programs for one row.

    Args:
        programs: Programs on a mesh of a topology's devices.
        max_length: Most tokens of the row.

    Returns:
        XLA's figures, or its message if the round does not fit the devices.
    """
    # Shapes with shardings are all that JAX needs to compile; there are no arrays.
    state = abstract_state(programs, 1, programs.sizes.capacity(max_length))
    begun = time.perf_counter()
    jitted: Any = programs.compiled.round  # declared as a mere callable
    traced = jitted.trace(programs.leaves, state)
    lowered = traced.lower()
    lowered_at = time.perf_counter()
    compiled = compile_lowered(lowered)
    if isinstance(compiled, TooLarge):
        return compiled
    done = time.perf_counter()
    memory = compiled.memory_analysis()
    # A loop is counted once, because its body stands once in XLA's text, too.
    sent = in_jaxpr(traced.jaxpr.jaxpr, programs.mesh.shape, once=True)
    return Compiled(
        arguments=memory.argument_size_in_bytes,
        donated=memory.alias_size_in_bytes,
        results=memory.output_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        collectives=dict(Counter(COLLECTIVE.findall(compiled.as_text()))),
        traced_collectives=dict(Counter(collective.kind for collective in sent)),
        trace_seconds=lowered_at - begun,
        compile_seconds=done - lowered_at,
        optimal_seconds=_optimal_seconds(compiled),
    )


def compile_lowered(lowered: Any) -> Any:
    """Compile a `jax.stages.Lowered`.

    Returns:
        The `jax.stages.Compiled`; or a TooLarge if the program does not fit the devices.
    """
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return TooLarge(_memory_line(str(error)))


def _optimal_seconds(compiled: Any) -> float | None:
    # Not every backend has this analysis, and not every one that has it estimates a time.
    with suppress(NotImplementedError):
        seconds = (compiled.cost_analysis() or {}).get("optimal_seconds", 0.0)
        return seconds if seconds > 0 else None
    return None


def _memory_line(message: str) -> str:
    """Return the sentence with the sizes from a page of XLA's.

    Examples:
        >>> _memory_line("Ran out of memory. Used 27.49G of 15.75G hbm. Exceeded …")
        'Used 27.49G of 15.75G hbm'
    """
    found = re.search(r"Used [\d.]+\w+ of [\d.]+\w+ \w+", message)
    return found[0] if found else message.partition("\n")[0][:200]
