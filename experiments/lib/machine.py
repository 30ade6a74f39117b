"""The machine that figures are measured on, as JAX, the host and torch see it."""

import os
from typing import Any

from easyspec_jax import EasySpecError


def machine(platform: str | None = None) -> dict[str, Any]:
    """Describe the machine for a file of results; `cores` are those that this process may use."""
    import jax

    devices = jax.devices(platform)
    return {
        "platform": devices[0].platform,
        "device_kind": devices[0].device_kind,
        "devices": len(devices),
        "cores": cores(),
        "jax": jax.__version__,
    }


def use_whole_device() -> None:
    """Let JAX take nearly all of an accelerator's memory, bit by bit; call it before JAX starts."""
    # Torch needs memory too, and a large target needs more than JAX's usual three quarters.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    # The older name of the variable excludes the newer one.
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.95")


def cores() -> int:
    """Count the CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def host_memory() -> int:
    """Return the bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def torch_device(platform: str) -> str:
    """Return torch's name for the device that JAX runs on.

    Raises:
        EasySpecError: torch, transformers or that device is missing.
    """
    try:
        import torch
        import transformers
    except ImportError as missing:
        raise EasySpecError(
            f"peers need torch and transformers ({missing}); install .[test], or leave out peers"
        ) from None
    transformers.utils.logging.set_verbosity_error()
    if platform == "cpu":
        return "cpu"
    if platform == "gpu" and torch.cuda.is_available():
        return "cuda"
    raise EasySpecError(
        f"torch {torch.__version__} cannot use the {platform} that JAX runs on; leave out peers"
    )
