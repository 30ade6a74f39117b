"""Machines as a latency model knows them: one table, and the names of topologies."""

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

    memory: bytes (a GPU's as its driver reports them), None where it is the host's. bandwidth: of memory, bytes a
    second. flops: a second, in bfloat16 (on a CPU float32). link_bandwidth: bytes a second that a device sends to all
    its neighbours together. latency: seconds of an all-reduce of next to nothing. launch: seconds that a kernel costs
    besides its work. dimensions: of the torus that names a TPU topology, 0 elsewhere. source: of the figures.
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


_TPU = "docs.cloud.google.com/tpu/docs/{}; link_bandwidth is half of the bidirectional ICI figure"

MACHINES = {
    machine.name: machine
    for machine in (
        # Everywhere latency and launch are estimates: no vendor states them, and --measure replaces them. A TPU's
        # collective crosses a few hops of about a microsecond; a GPU's is NCCL's small-message all-reduce over NVLink,
        # its launches are those of captured graphs.
        Machine("v5e", "tpu", 16 * 2**30, 819e9, 197e12, 200e9, 5e-6, 1e-6, 2, _TPU.format("v5e")),
        Machine("v5p", "tpu", 95 * 2**30, 2765e9, 459e12, 600e9, 5e-6, 1e-6, 3, _TPU.format("v5p")),
        Machine("v6e", "tpu", 32 * 2**30, 1638e9, 918e12, 400e9, 5e-6, 1e-6, 2, _TPU.format("v6e")),
        Machine("h100", "gpu", 84942979072, 3350e9, 989e12, 450e9, 10e-6, 2e-6, 0,
                "NVIDIA H100 data sheet, SXM, dense; NVLink 4"),
        Machine("h200", "gpu", 150110011392, 4800e9, 989e12, 450e9, 10e-6, 2e-6, 0,
                "NVIDIA H200 data sheet, SXM, dense; NVLink 4"),
        Machine("a100", "gpu", 85097971712, 2039e9, 312e12, 300e9, 10e-6, 2e-6, 0,
                "NVIDIA A100 data sheet, 80 GB SXM, dense; NVLink 3"),
        # All of it an estimate; the figures are a host's, which its virtual devices share.
        Machine("cpu", "cpu", None, 30e9, 100e9, 10e9, 100e-6, 5e-6, 0, "a small desktop, roughly"),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Topology:
    """So many devices of a machine. name: as JAX names it, "v5e:2x4"."""

    name: str
    machine: Machine
    devices: int


def parse_topology(text: str) -> Topology:
    """Parse "v5e:2x4" (TPUs, by the shape of their torus) or "h100:8".

    Raises EasySpecError, listing what there is, for anything else.
    """
    name, _, shape = text.lower().partition(":")
    if name not in MACHINES:
        raise EasySpecError(
            f"--topology {text!r}: no machine {name!r}; there are {', '.join(MACHINES)}"
        )
    machine = MACHINES[name]
    if not re.fullmatch(r"[1-9]\d{0,2}(x[1-9]\d{0,2})*", shape):
        raise EasySpecError(
            f"--topology {text!r} does not say how many devices; such as {_example(machine)}"
        )
    sizes = [int(size) for size in shape.split("x")]
    if len(sizes) != max(machine.dimensions, 1):
        raise EasySpecError(
            f"--topology {text!r}: give {_named_by(machine)} of {name}, such as {_example(machine)}"
        )
    devices = prod(sizes)
    if machine.platform == "cpu":  # a host's devices share it
        machine = replace(
            machine, bandwidth=machine.bandwidth / devices, flops=machine.flops / devices
        )
    return Topology(f"{name}:{shape}", machine, devices)


def _named_by(machine: Machine) -> str:
    return f"the {machine.dimensions} sides of the torus" if machine.dimensions else "the number"


def _example(machine: Machine) -> str:
    return f"{machine.name}:{ {0: '8', 2: '2x4', 3: '2x2x2'}[machine.dimensions] }"


@dataclass(frozen=True)
class Chip:
    """Description of a GPU that XLA needs to compile for it: CUDA's device properties, bytes and GHz."""

    name: str
    capability: tuple[int, int]
    cores: int
    lanes: int
    shared_memory: int
    level_2: int
    clock: float


# NVIDIA's tuning guides (shared memory, level 2) and data sheets.
CHIPS = {
    "h100": Chip("NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 233472, 50 * 2**20, 1.98),
    "h200": Chip("NVIDIA H200", (9, 0), 132, 128, 233472, 50 * 2**20, 1.98),
    "a100": Chip("NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 167936, 40 * 2**20, 1.41),
}


def target_config(machine: Machine) -> str:
    """A GPU as XLA's GpuTargetConfig, in protocol buffers' text format."""
    chip = CHIPS[machine.name]
    device = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 48 * 2**10,
        "shared_memory_per_core": chip.shared_memory,
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
    return (
        f"gpu_device_info {{ {fields} cuda_compute_capability {{ major: {major} minor: {minor} }} }} "
        f'platform_name: "CUDA" dnn_version_info {{ major: 9 }} device_description_str: "{chip.name}"'
    )
