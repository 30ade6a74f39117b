"""The real round, compiled for devices that need not be there."""

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


class CannotCompile(Exception):
    """Nothing is wrong with what was asked, but this installation cannot compile for it; the message says why."""


@dataclass(frozen=True)
class Compiled:
    """XLA's figures for a program; bytes are per device.

    arguments: the weights and the state, which is donated: `donated` bytes of it come back as results. temporaries:
    everything else while it runs. collectives: those in the text of the program and of its trace, where a loop's count
    once. optimal_seconds: XLA's own estimate, which does not charge collectives their latency; None where it has none.
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
        """At the program's peak."""
        return self.arguments + self.results - self.donated + self.temporaries + self.code


@dataclass(frozen=True)
class TooLarge:
    """XLA's message for a program that needs more memory than the devices have."""

    reason: str


def topology_mesh(topology: Topology, shape: MeshShape) -> Mesh:
    """A mesh of the topology's devices in JAX's order, as open_mesh would make it on the machine.

    Raises EasySpecError for a topology that does not exist, and CannotCompile.
    """
    machine = topology.machine
    if machine.platform == "cpu":
        return open_mesh(shape, "cpu")
    if machine.platform == "tpu":
        devices = _absent_devices(topology.name, "tpu", ("libtpu",), "plan")
    else:
        options = {"target_config": target_config(machine), "topology": f"1x1x{topology.devices}"}
        devices = _absent_devices(
            "", "cuda", ("jax_cuda12_plugin", "jax_cuda13_plugin"), "cuda12", **options
        )
    grid = np.asarray(devices, object).reshape(shape.layer, shape.tensor)
    return Mesh(grid, ALL_AXES, axis_types=(jax.sharding.AxisType.Auto,) * 2)


def _absent_devices(
    name: str, platform: str, modules: tuple[str, ...], extra: str, **options: str
) -> list[Any]:
    """Devices to compile for, if one of the modules, a compiler, is there; an extra of this package installs it."""
    if not any(find_spec(module) for module in modules):
        raise CannotCompile(f"memory and compile time need a compiler: pip install '.[{extra}]'")
    try:
        return list(topologies.get_topology_desc(name, platform=platform, **options).devices)
    except Exception as error:  # the compiler's own reasons, as whatever JAX makes of them
        if "INVALID_ARGUMENT" in str(error):
            raise EasySpecError(
                f"--topology {name}: there is no such slice ({first_line(error)[:200]})"
            ) from None
        raise CannotCompile(
            f"the compiler for {platform} does not start: {first_line(error)[:200]}"
        ) from None


def compile_round(programs: Programs, max_length: int) -> Compiled | TooLarge:
    """The round of these programs, whose mesh is of a topology's devices, for one row of up to max_length tokens."""
    state = abstract_state(programs, 1, programs.capacity(max_length))
    begun = time.perf_counter()
    traced = programs._round.trace(programs.leaves, state)  # pyright: ignore[reportFunctionMemberAccess]
    lowered = traced.lower()
    lowered_at = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return TooLarge(_memory_line(str(error)))
    done = time.perf_counter()
    memory = compiled.memory_analysis()
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


def _optimal_seconds(compiled: Any) -> float | None:
    with suppress(NotImplementedError):
        seconds = (compiled.cost_analysis() or {}).get("optimal_seconds", 0.0)
        return seconds if seconds > 0 else None
    return None


def _memory_line(message: str) -> str:
    """The sentence with the sizes, out of a page."""
    found = re.search(r"Used [\d.]+\w+ of [\d.]+\w+ \w+", message)
    return found[0] if found else message.partition("\n")[0][:200]
