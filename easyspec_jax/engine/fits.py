"""Whether a pair fits its devices, told before a weight is read or a program compiled.

What is counted are the engine's own modules and state with shapes where arrays would be, as `plan` counts them.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from easyspec_jax.checkpoint.config import ModelConfig
from easyspec_jax.decode.programs import PREFILL_CHUNK, Programs
from easyspec_jax.decode.round import RoundConfig
from easyspec_jax.draft.grouping import Layout
from easyspec_jax.engine.abstract import (
    absent_mesh,
    abstract_pair,
    abstract_state,
    bytes_per_device,
)
from easyspec_jax.errors import EasySpecError
from easyspec_jax.model.transformer import Decoder
from easyspec_jax.parallel.mesh import MAX_VIRTUAL_DEVICES, TENSOR, Axes, axes_size, parse_mesh

GIB = 2**30


@dataclass(frozen=True)
class Workload:
    """Models and texts that are about to be loaded and decoded.

    layout, refit, draft_axes: how the draft is laid out. tokens: the longest text, prompt included; prompt: its
    prompt; rows: texts decoded together. target_held, draft_held: whether these weights lie on the devices already.
    max_length: no text is ever longer.
    """

    target: ModelConfig
    draft: ModelConfig | None
    layout: Layout
    refit: bool
    draft_axes: Axes
    mesh: Mesh
    dtype: str
    round: RoundConfig
    tokens: int
    prompt: int
    rows: int
    target_held: bool = False
    draft_held: bool = False
    max_length: int | None = None


@dataclass(frozen=True)
class Need:
    """Bytes of one memory: a device's own, or the machine's, which all virtual devices of a CPU share.

    weights: those that are still to be read. working: the largest intermediate results of one pass.
    """

    weights: int
    caches: int
    working: int

    @property
    def total(self) -> int:
        return self.weights + self.caches + self.working


def needed(job: Workload) -> Need:
    """The most that a job will take. Replicas of a CPU's weights are one array, those of anything else are several."""
    models, weights, entry = _of_models(replace(job, tokens=0, prompt=0, rows=0, max_length=None))
    programs = Programs(job.mesh, *models, job.round, job.max_length)
    # While caches grow, the smaller ones are still there.
    sizes = programs.capacities(job.prompt, job.tokens - job.prompt)[-2:]
    caches = job.rows * sum(sizes) * entry
    working = max(_working(model, programs, job) for model in models if model is not None)
    shared = job.mesh.size if _platform(job.mesh) == "cpu" else 1
    return Need(weights, shared * caches, shared * working)


@lru_cache(maxsize=64)  # the flags that would help are found by trying many
def _of_models(job: Workload) -> tuple[tuple[Decoder, Decoder | None], int, int]:
    """Sizes independent of the texts: the models, bytes of their weights, and bytes of a row's cache entry."""
    models = abstract_pair(
        job.target, job.draft, job.mesh, job.layout, job.refit, job.draft_axes, np.dtype(job.dtype)
    )
    missing = [
        model
        for model, held in zip(models, (job.target_held, job.draft_held), strict=True)
        if not held
    ]
    state = abstract_state(Programs(job.mesh, *models, job.round), 1, PREFILL_CHUNK)
    entry = bytes_per_device((state.target, state.draft)) // PREFILL_CHUNK
    if _platform(job.mesh) != "cpu":
        return models, bytes_per_device(missing), entry
    return models, sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(missing)), entry


def _working(model: Decoder, programs: Programs, job: Workload) -> int:
    """Bytes of one pass on one device: scores, mask and softmax in float32, an MLP's insides, logits of all nodes."""
    config, split = model.config, axes_size(job.mesh, model.axes)
    nodes = 1 + (job.round.nodes or job.round.levels * job.round.width)
    capacity = programs.capacity(job.tokens)
    # The exact pass of a group computes one layer at a time, split over "tensor" alone.
    heads = -(
        -config.num_attention_heads
        // (split if model is programs.target else job.mesh.shape[TENSOR])
    )
    inner = -(-config.intermediate_size // split)
    vocabulary = model.embedding.shape[0] // split
    for_each_token = 4 * ((2 * heads + 1) * capacity + 3 * inner + 6 * config.hidden_size)
    return job.rows * (max(PREFILL_CHUNK, nodes) * for_each_token + 3 * 4 * nodes * vocabulary)


def free_memory(mesh: Mesh) -> int | None:
    """Bytes that the fullest device, or the machine of a CPU, still has; None where nobody says."""
    if _platform(mesh) == "cpu":
        return _free_on_host()
    told = [device.memory_stats() for device in mesh.local_devices]
    limits = [
        stats["bytes_limit"] - stats.get("bytes_in_use", 0)
        for stats in told
        if stats and "bytes_limit" in stats
    ]
    return min(limits, default=None)


def _free_on_host() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(
            1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")
        )
    except (OSError, ValueError, StopIteration):  # no Linux
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None


def check_memory(job: Workload, free: int | None) -> None:
    """Raises EasySpecError, with the numbers and the flags that would help, if a job does not fit into free bytes."""
    need = needed(job)
    if free is None or need.total <= free:
        return
    where = "of this machine's memory" if _platform(job.mesh) == "cpu" else "on each device"
    parts = f"weights {_gib(need.weights)}, caches {_gib(need.caches)}, intermediate results {_gib(need.working)}"
    helping = list(_flags_that_help(job, free))
    advice = (
        f"it would fit with {' or '.join(helping)}"
        if helping
        else "use a machine with more memory, or smaller models"
    )
    raise EasySpecError(
        f"the models need {_gib(need.total)} GiB {where} ({parts}) and {_gib(free)} GiB are free; {advice}"
    )


def _flags_that_help(job: Workload, free: int) -> Iterator[str]:
    """Each alone."""

    def fits(changed: Workload) -> bool:
        return needed(changed).total <= free

    if _platform(job.mesh) != "cpu":
        for devices in (job.mesh.size << doublings for doublings in range(1, 6)):
            if devices <= MAX_VIRTUAL_DEVICES and fits(replace(job, mesh=_mesh_of(devices, job))):
                yield f"--mesh {devices}"
                break
    if (
        job.dtype == "float32"
        and not (job.target_held or job.draft_held)
        and fits(replace(job, dtype="bfloat16"))
    ):
        yield "--dtype bfloat16"
    tokens = _largest(
        lambda tokens: fits(replace(job, tokens=tokens, max_length=tokens)), job.tokens
    )
    if tokens > job.prompt:
        yield f"--max-length {tokens}"
    if rows := _largest(lambda rows: fits(replace(job, rows=rows)), job.rows):
        yield f"--batch-size {rows}"


def _largest(fits: Callable[[int], bool], limit: int) -> int:
    """The largest number below the limit that fits, where all below one that does fit too; 0 if none does."""
    fitting, too_many = 0, limit
    while too_many - fitting > 1:
        middle = (fitting + too_many) // 2
        fitting, too_many = (middle, too_many) if fits(middle) else (fitting, middle)
    return fitting


def _mesh_of(devices: int, job: Workload) -> Mesh:
    return absent_mesh(parse_mesh(str(devices), group_size=job.layout.lp_size), _platform(job.mesh))


def _platform(mesh: Mesh) -> Any:
    return mesh.devices.flat[0].platform


def _gib(size: int) -> str:
    return f"{size / GIB:.3g}" if size < GIB else f"{size / GIB:,.1f}"
