"""Settings of a process that only converts."""

import ctypes
import os
from contextlib import suppress


def share_free_memory() -> None:
    """Let all threads allocate from one arena, so that a limit of memory holds."""
    # glibc gives each thread an arena of its own, and memory freed into one is not reused by the
    # threads of another: eight workers would keep eight times what one needs.
    arena_max = -8  # M_ARENA_MAX of <malloc.h>
    with suppress(AttributeError, OSError):  # other C libraries have no mallopt
        ctypes.CDLL(None).mallopt(arena_max, 1)


def leave_accelerators_alone() -> None:
    """Restrict this process to the CPU. Orbax starts JAX when it commits a checkpoint."""
    os.environ["JAX_PLATFORMS"] = "cpu"
