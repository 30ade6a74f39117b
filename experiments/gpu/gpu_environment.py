"""Describe an accelerator and its software: `python -m experiments.gpu_environment --out JSON`."""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from easyspec_jax.cli.command import Parser
from experiments.lib.machine import host_memory, machine, use_whole_device
from experiments.lib.output import check_destination, run_experiment, save

PACKAGES = (
    "jax",
    "jaxlib",
    "jax-cuda12-plugin",
    "jax-cuda13-plugin",
    "flax",
    "numpy",
    "transformers",
    "torch",
)

VARIABLES = ("JAX_", "XLA_", "CUDA_", "NVIDIA_TF32")
"""Beginnings of the environment variables that change what is measured."""

SMI = (
    "name",
    "driver_version",
    "memory.total",
    "memory.used",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "clocks.max.mem",
    "power.limit",
    "power.draw",
    "temperature.gpu",
    "mig.mode.current",
)
"""What nvidia-smi is asked for."""


def environment() -> dict[str, Any]:
    """Describe the machine, its first device's memory, its clocks and the versions of packages."""
    import jax

    here = machine()
    stats = jax.devices()[0].memory_stats() or {}
    return {
        "machine": here,
        "host_memory_bytes": host_memory(),
        # What JAX may take, nearly all of it; None where devices share the host's memory.
        "device_memory_bytes": stats.get("bytes_limit"),
        "memory_stats": stats,
        "nvidia_smi": nvidia_smi() if here["platform"] == "gpu" else [],
        "python": platform.python_version(),
        "packages": {name: package_version(name) for name in PACKAGES},
        "variables": {
            name: value for name, value in os.environ.items() if name.startswith(VARIABLES)
        },
    }


def nvidia_smi() -> list[dict[str, str]]:
    """Return what nvidia-smi says of each card; nothing where it is missing or fails."""
    command = ["nvidia-smi", f"--query-gpu={','.join(SMI)}", "--format=csv,noheader"]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    lines = [line.split(", ") for line in ran.stdout.splitlines() if line]
    return [dict(zip(SMI, line, strict=False)) for line in lines]


def package_version(name: str) -> str:
    """Return the version of an installed package, or "absent"."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def run(args: argparse.Namespace) -> None:
    """Print the description and write it."""
    check_destination(args.out)
    use_whole_device()
    found = environment() | {"command": args.command}
    save(args.out, json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = Parser(prog="python -m experiments.gpu_environment", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="JSON")
    return run_experiment("experiments.gpu_environment", parser, run, argv)


if __name__ == "__main__":
    sys.exit(main())
