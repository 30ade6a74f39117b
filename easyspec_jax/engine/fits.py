"""Check that a pair fits its devices before a weight is read or a program compiled."""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from jax.sharding import Mesh

from easyspec_jax.engine.abstract import absent_mesh
from easyspec_jax.engine.needs import Workload, needed, platform_of
from easyspec_jax.errors import EasySpecError
from easyspec_jax.parallel.mesh import MAX_VIRTUAL_DEVICES, parse_mesh

GIB = 2**30


def free_memory(mesh: Mesh) -> int | None:
    """Return the free bytes of the fullest device, or of a CPU's machine; None if unknown."""
    if platform_of(mesh) == "cpu":
        return _free_on_host()
    free = []
    for device in mesh.local_devices:
        stats = device.memory_stats() or {}
        if "bytes_limit" in stats:
            free.append(stats["bytes_limit"] - stats.get("bytes_in_use", 0))
    return min(free, default=None)


def _free_on_host() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    except (OSError, ValueError):  # not Linux
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None


def check_memory(job: Workload, free: int | None) -> None:
    """Raise EasySpecError, with numbers and with options that would help, unless a workload fits.

    Args:
        job: The workload.
        free: Bytes available, or None if unknown.
    """
    need = needed(job)
    if free is None or need.total <= free:
        return
    where = "of this machine's memory" if platform_of(job.mesh) == "cpu" else "on each device"
    parts = (
        f"weights {_gib(need.weights)}, caches {_gib(need.caches)}, "
        f"intermediate results {_gib(need.working)}"
    )
    if need.prefixes:
        parts += f", kept prefixes {_gib(need.prefixes)}"
    helping = " or ".join(_options_that_help(job, free))
    advice = "use a machine with more memory, or smaller models"
    if helping:
        advice = f"it would fit with {helping}"
    raise EasySpecError(
        f"the models need {_gib(need.total)} GiB {where} ({parts}) and {_gib(free)} GiB are free; "
        f"{advice}"
    )


def _options_that_help(job: Workload, free: int) -> Iterator[str]:
    """Yield options that would make the workload fit, each by itself."""

    def fits(changed: Workload) -> bool:
        return needed(changed).total <= free

    if platform_of(job.mesh) != "cpu":
        # Twice to 32 times the devices, as far as a mesh may go.
        devices = 2 * job.mesh.size
        while devices <= min(32 * job.mesh.size, MAX_VIRTUAL_DEVICES):
            if fits(replace(job, mesh=_mesh_of(devices, job))):
                yield f"`mesh` {devices}"
                break
            devices *= 2
    unread = not (job.target_held or job.draft_held)
    if job.dtype == "float32" and unread and fits(replace(job, dtype="bfloat16")):
        yield "`dtype` bfloat16"
    # On a CPU integers would be slow, and int4 no smaller than int8.
    has_floats = job.target_weights is None and not job.target_stored
    if unread and has_floats and platform_of(job.mesh) != "cpu":
        for weights in ("int8", "int4"):
            if fits(replace(job, target_weights=weights)):
                yield f"`weights` {weights}"
                break
    # A shorter max_length caps the caches, and a smaller batch has fewer of them.
    tokens = _largest(
        lambda tokens: fits(replace(job, tokens=tokens, max_length=tokens)), job.tokens
    )
    if tokens > job.prompt:
        yield f"`max_length` {tokens}"
    slides = any(config is not None and config.has_windows for config in (job.target, job.draft))
    without = replace(job.round, keeps_windows=slides and not job.round.rows)
    if job.prefixes and fits(replace(job, prefixes=0, round=without)):
        yield "`prefix_cache` 0"
    if rows := _largest(lambda rows: fits(replace(job, rows=rows)), job.rows):
        yield f"`batch_size` {rows}"


def _largest(fits: Callable[[int], bool], limit: int) -> int:
    """Return the largest number below the limit that fits, by bisection; 0 if none does.

    Every number below one that fits is assumed to fit too.
    """
    fitting, too_many = 0, limit
    while too_many - fitting > 1:
        middle = (fitting + too_many) // 2
        if fits(middle):
            fitting = middle
        else:
            too_many = middle
    return fitting


def _mesh_of(devices: int, job: Workload) -> Mesh:
    return absent_mesh(
        parse_mesh(str(devices), group_size=job.layout.lp_size), platform_of(job.mesh)
    )


def _gib(size: int) -> str:
    return f"{size / GIB:.3g}" if size < GIB else f"{size / GIB:,.1f}"
