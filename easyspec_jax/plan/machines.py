"""Machines as the latency model sees them: a table of devices, and names of topologies."""

import re
from dataclasses import dataclass, replace
from math import prod
from typing import Literal

from easyspec_jax.errors import EasySpecError
from easyspec_jax.options import Platform

Origin = Literal["table", "measured"]


@dataclass(frozen=True)
class Machine:
    """One device and its links.

    Attributes:
        memory: Bytes; for a GPU as its driver reports them, None for a CPU, which uses its host's.
        bandwidth: Of the memory, bytes per second.
        flops: Peak, per second, in bfloat16 (on a CPU in float32).
        link_bandwidth: Bytes per second that a device sends to all its neighbours together.
        latency: Seconds of an all-reduce of next to nothing, beyond its launch.
        launch: Seconds that a kernel costs in addition to its work.
        dimensions: Of the torus that names a TPU topology; 0 for other devices.
        source: Where the figures are from.
    """

    name: str
    platform: Platform
    memory: int | None
    bandwidth: float
    flops: float
    link_bandwidth: float
    latency: float
    launch: float
    dimensions: int
    source: str
    origin: Origin = "table"

    def fits(self, size: int) -> bool | None:
        """Return whether bytes fit its memory, or None for a CPU, whose memory it does not know."""
        return None if self.memory is None else size <= self.memory


# Latency and launch are estimates in the whole table: no vendor states them, and --measure replaces
# them. A TPU's collective crosses a few hops of about a microsecond. A GPU's is NCCL's all-reduce
# of a small message over NVLink, and its launches are those of captured graphs.


def _tpu(
    name: str, gibibytes: int, bandwidth: float, flops: float, links: float, dimensions: int
) -> Machine:
    # Google states the bandwidth of links in both directions together; a device sends at half.
    source = (
        f"docs.cloud.google.com/tpu/docs/{name}; "
        "link_bandwidth is half of the bidirectional ICI figure"
    )
    memory = gibibytes * 2**30
    return Machine(
        name, "tpu", memory, bandwidth, flops, links, 5e-6, 1e-6, dimensions, source=source
    )


def _gpu(
    name: str, memory: int, bandwidth: float, flops: float, links: float, source: str
) -> Machine:
    return Machine(name, "gpu", memory, bandwidth, flops, links, 10e-6, 2e-6, 0, source=source)


_TABLE = (
    _tpu("v5e", 16, bandwidth=819e9, flops=197e12, links=200e9, dimensions=2),
    _tpu("v5p", 95, bandwidth=2765e9, flops=459e12, links=600e9, dimensions=3),
    _tpu("v6e", 32, bandwidth=1638e9, flops=918e12, links=400e9, dimensions=2),
    _gpu(
        "h100",
        84942979072,
        bandwidth=3350e9,
        flops=989e12,
        links=450e9,
        source="NVIDIA H100 data sheet, SXM, dense; NVLink 4",
    ),
    _gpu(
        "h200",
        150110011392,
        bandwidth=4800e9,
        flops=989e12,
        links=450e9,
        source="NVIDIA H200 data sheet, SXM, dense; NVLink 4",
    ),
    _gpu(
        "a100",
        85097971712,
        bandwidth=2039e9,
        flops=312e12,
        links=300e9,
        source="NVIDIA A100 data sheet, 80 GB SXM, dense; NVLink 3",
    ),
    # Estimates throughout; the figures are a whole host's, which its virtual devices share.
    Machine("cpu", "cpu", None, 30e9, 100e9, 10e9, 100e-6, 5e-6, 0, "a small desktop, roughly"),
)
MACHINES = {machine.name: machine for machine in _TABLE}
"""Machines by the name that begins a topology's."""


@dataclass(frozen=True)
class Topology:
    """A number of connected devices of one machine.

    Attributes:
        name: JAX's name of it, such as "v5e:2x4".
    """

    name: str
    machine: Machine
    devices: int


def parse_topology(text: str) -> Topology:
    """Parse the name of a topology.

    Args:
        text: A machine of MACHINES, a colon, and the sides of a TPU's torus or the number of other
            devices: "v5e:2x4", "v5p:2x2x2", "h100:8", "cpu:4". Case does not matter.

    Raises:
        EasySpecError: The machine is unknown, or the sides do not suit it.

    Examples:
        >>> topology = parse_topology("v5p:2x2x4")
        >>> topology.devices, topology.machine.platform
        (16, 'tpu')
    """
    name, _, shape = text.lower().partition(":")
    if name not in MACHINES:
        raise EasySpecError(
            f"`topology` {text!r}: no machine {name!r}; there are {', '.join(MACHINES)}"
        )
    machine = MACHINES[name]
    if not re.fullmatch(r"[1-9]\d{0,2}(x[1-9]\d{0,2})*", shape):
        raise EasySpecError(
            f"`topology` {text!r} does not say how many devices; for example {_example(machine)}"
        )
    # "2x4" is [2, 4], two sides of a torus; "8" is [8], a plain number of devices.
    sides = [int(side) for side in shape.split("x")]
    if len(sides) != max(machine.dimensions, 1):
        raise EasySpecError(
            f"`topology` {text!r}: give {_named_by(machine)} of {name}, such as {_example(machine)}"
        )
    devices = prod(sides)
    if machine.platform == "cpu":
        # Virtual devices share their host's memory and cores: each gets an equal part.
        bandwidth, flops = machine.bandwidth / devices, machine.flops / devices
        machine = replace(machine, bandwidth=bandwidth, flops=flops)
    return Topology(f"{name}:{shape}", machine, devices)


def _named_by(machine: Machine) -> str:
    return f"the {machine.dimensions} sides of the torus" if machine.dimensions else "the number"


def _example(machine: Machine) -> str:
    shape = {0: "8", 2: "2x4", 3: "2x2x2"}[machine.dimensions]
    return f"{machine.name}:{shape}"


@dataclass(frozen=True)
class Chip:
    """Properties of a GPU, as CUDA reports them, that XLA needs to compile for it.

    Attributes:
        capability: Compute capability, major and minor.
        cores: Streaming multiprocessors.
        lanes: Units for float32 per core.
        shared_memory: Bytes per core.
        level_2: Bytes of the level 2 cache.
        clock: GHz.
    """

    name: str
    capability: tuple[int, int]
    cores: int
    lanes: int
    shared_memory: int
    level_2: int
    clock: float


# From NVIDIA's tuning guides (shared memory, level 2) and data sheets.
CHIPS = {
    "h100": Chip("NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 233472, 50 * 2**20, 1.98),
    "h200": Chip("NVIDIA H200", (9, 0), 132, 128, 233472, 50 * 2**20, 1.98),
    "a100": Chip("NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 167936, 40 * 2**20, 1.41),
}


def target_config(machine: Machine) -> str:
    """Describe a GPU of MACHINES as XLA's GpuTargetConfig, in protocol buffers' text format."""
    chip = CHIPS[machine.name]
    device = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 48 * 2**10,
        "shared_memory_per_core": chip.shared_memory,
        # CUDA reserves 1 KiB for each block.
        "shared_memory_per_block_optin": chip.shared_memory - 2**10,
        "threads_per_core_limit": 2048,
        "core_count": chip.cores,
        "fpus_per_core": chip.lanes,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 2**16 - 1,
        "block_dim_limit_z": 2**16 - 1,
        "registers_per_core_limit": 2**16,
        "registers_per_block_limit": 2**16,
        "memory_bandwidth": int(machine.bandwidth),
        "l2_cache_size": chip.level_2,
        "clock_rate_ghz": chip.clock,
        "device_memory_size": machine.memory,
    }
    fields = " ".join(f"{name}: {value}" for name, value in device.items())
    major, minor = chip.capability
    capability = f"cuda_compute_capability {{ major: {major} minor: {minor} }}"
    return (
        f"gpu_device_info {{ {fields} {capability} }} "
        f'platform_name: "CUDA" dnn_version_info {{ major: 9 }} '
        f'device_description_str: "{chip.name}"'
    )
