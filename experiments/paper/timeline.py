"""Read from a jax.profiler trace when each device computes, is in collectives, or is idle.

An accelerator has a plane of its own in a trace. On a CPU the operations of all virtual devices are
events of worker threads, each labelled with its device; a device's operations may be spread over
several threads.
"""

import re
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.profiler import ProfileData
from jaxtyping import Float

from easyspec_jax import EasySpecError
from easyspec_jax.decode.timing import Case

ROUND = "easyspec_round"
"""The name under which the host marks a round."""

CONTAINERS = ("while", "conditional", "call")
"""Operations that last as long as those inside them, which have events of their own."""

COLLECTIVES = (
    "psum",
    "pmax",
    "pmin",
    "ppermute",
    "all-reduce",
    "all-gather",
    "all-to-all",
    "reduce-scatter",
    "collective-permute",
    "collective-broadcast",
    "nccl",
)
"""Beginnings of collectives' names: JAX's and XLA's operations, and NCCL's kernels."""

Spans = Float[np.ndarray, "spans 2"]
"""Begin and end, in nanoseconds."""


@dataclass(frozen=True)
class Operation:
    """One execution on a device; times in nanoseconds."""

    name: str
    device: int
    begin: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """The spans of a trace.

    Attributes:
        rounds: From dispatch to the end of the wait.
        computing: By device; all operations but collectives.
        collectives: By device; the wait for other devices included.
    """

    rounds: Spans
    computing: dict[int, Spans]
    collectives: dict[int, Spans]

    @property
    def devices(self) -> list[int]:
        return sorted({*self.computing, *self.collectives})


def recorded(case: Case, rounds: int) -> Any:
    """Return a ProfileData of that many rounds of a case that is warm; each is waited for."""
    options = jax.profiler.ProfileOptions()
    # Events for every Python call would slow the dispatch down.
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory, profiler_options=options):
            for _ in range(rounds):
                with jax.profiler.TraceAnnotation(ROUND):
                    case.state = case.step(case.state)
                    jax.block_until_ready(case.state)
        return read_profile(Path(directory))


def read_profile(directory: Path) -> Any:
    """Return the only trace in a directory, as a ProfileData.

    Raises:
        EasySpecError: There is not exactly one.
    """
    found = list(directory.rglob("*.xplane.pb"))
    if len(found) != 1:
        raise EasySpecError(f"{directory} holds {len(found)} traces, not one")
    return ProfileData.from_file(str(found[0]))


def timeline_of(profile: Any) -> Timeline:
    """Return the timeline of a ProfileData.

    Raises:
        EasySpecError: It has no rounds, or no operations of devices.
    """
    rounds = rounds_of(profile)
    sorts: dict[bool, dict[int, list[tuple[float, float]]]] = {
        True: defaultdict(list),
        False: defaultdict(list),
    }
    for operation in all_operations(profile):
        sorts[is_collective(operation.name)][operation.device].append(
            (operation.begin, operation.end)
        )
    if not len(rounds) or not sorts[False]:
        raise EasySpecError(
            f"the trace shows {len(rounds)} rounds and operations of {len(sorts[False])} devices"
        )
    computing = {device: spans(own) for device, own in sorts[False].items()}
    collectives = {device: spans(own) for device, own in sorts[True].items()}
    return Timeline(rounds, computing, collectives)


def rounds_of(profile: Any) -> Spans:
    """Return when the rounds of a ProfileData began and ended."""
    return spans(
        (event.start_ns, event.end_ns)
        for plane in profile.planes
        if plane.name == "/host:CPU"
        for line in plane.lines
        for event in line.events
        if event.name == ROUND
    )


def all_operations(profile: Any) -> Iterator[Operation]:
    """Yield the operations of all planes of a ProfileData, except CONTAINERS."""
    for plane in profile.planes:
        yield from (own for own in operations(plane) if kind(own.name) not in CONTAINERS)


def operations(plane: Any) -> Iterator[Operation]:
    """Yield the operations of one plane of a trace.

    XLA for CPUs marks the end of NAME with an event `end: NAME`, which is skipped.
    """
    lines, name = list(plane.lines), str(plane.name)
    if re.match(r"/device:\w+:\d+$", name):
        # A TPU has a line for operations and others for what they are parts of; a GPU has streams.
        chosen = [line for line in lines if line.name == "XLA Ops"]
        device = int(name.rpartition(":")[2])
        for line in chosen or [line for line in lines if line.name.startswith("Stream")]:
            yield from (
                Operation(event.name, device, event.start_ns, event.end_ns) for event in line.events
            )
    elif name == "/host:CPU":
        for event in (event for line in lines for event in line.events):
            stats = dict(event.stats)
            if "hlo_op" in stats and "device_ordinal" in stats:
                yield Operation(
                    str(stats["hlo_op"]), int(stats["device_ordinal"]), event.start_ns, event.end_ns
                )


def kind(name: str) -> str:
    """Return an operation's name without its number; of an instruction %NAME = …, that name.

    Example:
        >>> kind("%all-reduce.12 = f32[8] all-reduce(…)")
        'all-reduce'
    """
    return re.split(r"[.\s(]", name.removeprefix("%"), maxsplit=1)[0].lower().replace("_", "-")


def is_collective(name: str) -> bool:
    own = kind(name)
    return own.startswith(COLLECTIVES) and not own.endswith("fusion")


def spans(pairs: Iterable[tuple[float, float]]) -> Spans:
    return np.array(sorted(pairs), np.float64).reshape(-1, 2)


def union(own: Spans) -> Spans:
    """Merge spans into ones that do not touch."""
    own = own[np.argsort(own[:, 0], kind="stable")]
    reach = np.maximum.accumulate(own[:, 1])
    first = np.append(True, own[1:, 0] > reach[:-1])[: len(own)]
    last = np.append(first[1:], True)[: len(own)]
    return np.stack([own[first, 0], reach[last]], axis=1)


def covered(own: Spans, edges: Float[np.ndarray, "edges"]) -> Float[np.ndarray, "bins"]:
    """Return how much of every bin the spans cover, in nanoseconds; overlaps count once."""
    apart = union(own)
    if not len(apart):
        return np.zeros(len(edges) - 1)
    sums = np.repeat(np.append(0, np.cumsum(apart[:, 1] - apart[:, 0])), 2)[1:-1]
    return np.diff(np.interp(edges, apart.ravel(), sums))


def by_bin(
    own: Timeline, device: int, edges: Float[np.ndarray, "edges"]
) -> Float[np.ndarray, "3 bins"]:
    """Return the nanoseconds that a device computes, is in collectives and is idle, by bin."""
    nothing = np.empty((0, 2))
    computing, collectives = (
        own.computing.get(device, nothing),
        own.collectives.get(device, nothing),
    )
    busy = covered(np.concatenate([computing, collectives]), edges)
    computed = covered(computing, edges)
    return np.stack([computed, busy - computed, np.diff(edges) - busy])


def middle(rounds: Spans) -> tuple[float, float]:
    """Return the round of median duration (of two the longer), in nanoseconds."""
    begin, end = sorted(rounds.tolist(), key=lambda own: own[1] - own[0])[len(rounds) // 2]
    return begin, end


LETTERS = "cx."
"""A lane's bins in results: computing, in collectives, neither."""


def lane(parts: Float[np.ndarray, "3 bins"]) -> str:
    """Return a letter for each bin, for what fills most of it."""
    return "".join(LETTERS[index] for index in np.argmax(parts, axis=0))


def runs(lane: str, letters: str) -> list[tuple[int, int]]:
    """Find runs of these letters in a lane: the first bin and the number of bins of each.

    Example:
        >>> runs("cc..xc", "cx")
        [(0, 2), (4, 2)]
    """
    return [
        (own.start(), own.end() - own.start())
        for own in re.finditer(f"[{re.escape(letters)}]+", lane)
    ]
