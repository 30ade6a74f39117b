"""Compile what gpu_hour runs for an absent GPU: `python -m experiments.dry_compile h100`.

JAX's CUDA plugin compiles without a GPU. Without one, XLA does not try out which kernel of a
product is fastest, so on a GPU the products, what is fused with them and their working memory can
differ.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.table import Table

from easyspec_jax.checkpoint.config import ModelConfig, model_config
from easyspec_jax.cli.command import Parser
from easyspec_jax.decode.programs import Programs
from easyspec_jax.decode.state import RoundConfig, State
from easyspec_jax.decode.timing import alone, pass_program
from easyspec_jax.draft.grouping import Layout, paper_groups
from easyspec_jax.draft.layer_group import run_fuzzy
from easyspec_jax.engine.abstract import abstract_pair, abstract_state
from easyspec_jax.errors import EasySpecError
from easyspec_jax.model.transformer import Decoder, run_exact
from easyspec_jax.parallel.mesh import ALL_AXES, MeshShape
from easyspec_jax.parallel.platforms import PlatformSettings
from easyspec_jax.plan.ahead import CannotCompile, TooLarge, compile_lowered, topology_mesh
from easyspec_jax.plan.compiled_text import CompiledText, Kernel
from easyspec_jax.plan.machines import parse_topology
from easyspec_jax.progress import bar
from easyspec_jax.verify import Greedy
from experiments.bench.roofline_models import SHAPES
from experiments.bench.roofline_parts import FUSED, LEVELS
from experiments.lib.output import (
    align_right,
    as_json,
    check_destination,
    run_experiment,
    save,
    show,
)
from experiments.lib.tables import Rows

CAPACITY, LONG = 4096, 32768

Lower = Callable[[], jax.stages.Lowered]
Sides = tuple[int, ...]


@dataclass(frozen=True)
class Task:
    """A program to compile.

    Attributes:
        name: What it computes.
        lower: Traces it.
        weights: Sides of the matrices that it reads, the smaller first.
        caches: Sides of each layer's keys: entries and channels, the smaller first.
    """

    name: str
    lower: Lower
    weights: frozenset[Sides]
    caches: frozenset[Sides]


@dataclass(frozen=True)
class Reading:
    """Figures of a compiled program.

    Attributes:
        name: What it computes.
        kernels: Launches of an execution.
        step_kernels: Launches of one drafting step, if the program loops over such steps.
        peak: Bytes of memory in all.
        temporaries: Bytes of it that are neither arguments nor results.
        weight_copies: Kernels that copy a weight, or write all terms of a product's sums.
        cache_copies: Kernels that copy a whole layer's cache.
        host_waits: Instructions for which the device may wait for the host.
        seconds: How long it took to compile.
        refusal: XLA's message, if the program does not fit.
    """

    name: str
    kernels: int = 0
    step_kernels: int = 0
    peak: int = 0
    temporaries: int = 0
    weight_copies: tuple[str, ...] = ()
    cache_copies: tuple[str, ...] = ()
    host_waits: tuple[str, ...] = ()
    seconds: float = 0.0
    refusal: str = ""

    @property
    def at_fault(self) -> bool:
        """Whether it does not fit, copies a weight, or waits for the host."""
        return bool(self.refusal or self.weight_copies or self.host_waits)


@dataclass(frozen=True)
class AbsentPair:
    """A pair of models without weights, on a GPU that need not be there."""

    configs: tuple[ModelConfig, ModelConfig]
    mesh: Mesh
    dtype: np.dtype

    def models(
        self, lp_size: int, mlp_lp_size: int = 1, settings: PlatformSettings | None = None
    ) -> tuple[Decoder, Decoder]:
        """Return target and draft, whose layers are grouped by the paper's rule."""
        target, draft = self.configs
        groups = paper_groups(draft.num_hidden_layers, lp_size)
        layout = Layout.uniform(groups, min(mlp_lp_size, lp_size))
        axes, dtype = ALL_AXES, self.dtype
        pair = abstract_pair(target, draft, self.mesh, layout, False, axes, dtype, settings)
        assert pair[1] is not None
        return pair[0], pair[1]

    @cached_property
    def target(self) -> Decoder:
        """The target."""
        return self.models(1)[0]

    def pass_task(
        self, name: str, model: Decoder, tokens: int, run: Any, *, loops: int = 1
    ) -> Task:
        """Return the task of a pass; see timing.pass_case()."""
        programs = alone(self.mesh, model)
        state = abstract_state(programs, 1, CAPACITY)

        def lower() -> jax.stages.Lowered:
            step = pass_program(programs, tokens, run, loops=loops)
            everywhere = NamedSharding(self.mesh, P())
            ids, at = (
                jax.ShapeDtypeStruct(shape, np.int32, sharding=everywhere)
                for shape in ((1, tokens), (1,))
            )
            return step.trace(programs.leaves, (state.target, ids), at).lower()

        return Task(name, lower, *self.sizes(programs, state))

    def round_task(
        self,
        name: str,
        lp_size: int | None,
        width: int = 1,
        *,
        capacity: int = CAPACITY,
        settings: PlatformSettings | None = None,
    ) -> Task:
        """Return the task of a round; without lp_size, of plain decoding."""
        if lp_size is None:
            programs = alone(self.mesh, self.target)
        else:
            config = RoundConfig(LEVELS, True, Greedy(), (), width=width)
            programs = Programs(self.mesh, *self.models(lp_size, settings=settings), config)
        state = abstract_state(programs, 1, capacity)

        def lower() -> jax.stages.Lowered:
            jitted: Any = programs.compiled.round  # declared as a mere callable
            return jitted.trace(programs.leaves, state).lower()

        return Task(name, lower, *self.sizes(programs, state))

    def sizes(self, programs: Programs, state: State) -> tuple[frozenset[Sides], frozenset[Sides]]:
        """Return the sides of all matrices, and of all layers' keys."""
        caches = jax.tree.leaves((state.target, state.draft))
        # Stacked norms, [slots, hidden], are as small as a hidden state and do not count.
        weights = [leaf.shape for leaf in programs.leaves if min(leaf.shape[-2:]) >= 64]
        return frozenset(map(_sides, weights)), frozenset(_sides(leaf.shape) for leaf in caches)


def tasks(pair: AbsentPair) -> Iterator[Task]:
    """List the programs of a pair that gpu_hour runs."""
    exact = partial(pair.pass_task, run=run_exact)
    yield pair.round_task("plain step", None)
    for tokens in (6, 21, 32, 64):
        yield exact(f"verification of {tokens}", pair.target, tokens)
    loops = LEVELS - 1
    ordinary = pair.models(1)[1]
    yield exact("exact draft step", ordinary, 1, loops=loops)
    for lp_size in (2, 4, 7):
        for mlps in (1, 2):
            draft = pair.models(lp_size, mlps)[1]
            name = f"fuzzy draft step, N = {lp_size}" + (", MLP pairs" if mlps > 1 else "")
            yield pair.pass_task(name, draft, 1, run_fuzzy, loops=loops)
    grouped = pair.models(4)[1]
    yield exact("calibration, N = 4", grouped, LEVELS + 1)
    yield exact("128 tokens of a prompt", pair.target, 128)
    for width in (1, 4, 8):
        yield pair.round_task(f"round, N = 4, width {width}", 4, width)
    yield pair.round_task(f"round, N = 4, {LONG} tokens", 4, capacity=LONG)
    fused = pair.models(4, settings=FUSED)[1]
    yield pair.pass_task("fused kernels: fuzzy draft step, N = 4", fused, 1, run_fuzzy, loops=loops)
    yield exact("fused kernels: calibration, N = 4", fused, LEVELS + 1)
    yield pair.round_task("fused kernels: round, N = 4, width 1", 4, settings=FUSED)
    name = f"fused kernels: round, N = 4, {LONG} tokens"
    yield pair.round_task(name, 4, capacity=LONG, settings=FUSED)


def read(task: Task, memory: int) -> Reading:
    """Compile a program and read it.

    Args:
        task: The program.
        memory: Bytes that the device has.
    """
    begun = time.perf_counter()
    compiled = compile_lowered(task.lower())
    seconds = time.perf_counter() - begun
    if isinstance(compiled, TooLarge):
        return Reading(task.name, seconds=seconds, refusal=compiled.reason)
    text = CompiledText.read(compiled.as_text())
    stats: Any = compiled.memory_analysis()
    results = stats.output_size_in_bytes - stats.alias_size_in_bytes
    peak = stats.argument_size_in_bytes + results + stats.temp_size_in_bytes
    # A matrix that is written out again is a copy, or a product whose sums are another kernel's.
    again = [k for k in (*text.copies, *text.spilled) if _sides(k.dimensions) in task.weights]
    return Reading(
        task.name,
        text.launches,
        text.looped,
        peak,
        stats.temp_size_in_bytes,
        _described(again),
        _described([k for k in text.copies if _sides(k.dimensions) in task.caches]),
        text.host_waits,
        seconds,
        "" if peak <= memory else f"needs {peak / 2**30:.1f} GiB of {memory / 2**30:.1f}",
    )


def _sides(shape: Sequence[int]) -> Sides:
    """Return the last two dimensions, the smaller first: [4, 3072, 2048] -> (2048, 3072)."""
    return tuple(sorted(shape[-2:]))


def _described(kernels: Sequence[Kernel]) -> tuple[str, ...]:
    return tuple(f"{k.times} x {k.name} {k.shape}" for k in kernels)


def tabulate(measured: Mapping[str, Any]) -> Rows:
    """Tabulate the programs, a row for each."""
    table = []
    for row in measured["results"]:
        table.append(
            {
                "program": row["name"],
                "kernels": row["kernels"],
                "of them a step": row["step_kernels"] or None,
                "GiB in all": row["peak"] / 2**30,
                "temporary MiB": row["temporaries"] / 2**20,
                "copies of weights": len(row["weight_copies"]),
                "copies of caches": len(row["cache_copies"]),
                "waits for the host": len(row["host_waits"]),
            }
        )
    return table


def dry_compile(machine: str, out: Path | None) -> int:
    """Compile every program for one device of a machine, print a table and write the readings.

    Args:
        machine: A GPU of plan.machines, such as "h100".
        out: The file to write; None prints only.

    Returns:
        The exit code: 1 if a program is at fault, else 0.

    Raises:
        EasySpecError: The machine is not a GPU, or JAX has no CUDA plugin.
    """
    # Here there may be no GPU, or another one.
    jax.config.update("jax_platforms", "cpu")
    if out is not None:
        check_destination(out)
    topology = parse_topology(f"{machine}:1")
    memory = topology.machine.memory
    if topology.machine.platform != "gpu" or memory is None:
        raise EasySpecError(f"{machine} must be a GPU, such as h100")
    try:
        mesh = topology_mesh(topology, MeshShape(1, 1))
    except CannotCompile as missing:
        raise EasySpecError(f"{machine}: {missing}") from None
    target, draft = map(model_config, SHAPES["h200-8b-1b"])
    pair = AbsentPair((target, draft), mesh, np.dtype("bfloat16"))
    chosen, readings = list(tasks(pair)), []
    with bar("Compiling", len(chosen)) as advance:
        for task in chosen:
            readings.append(read(task, memory))
            advance(1)
    measured = {
        "command": f"python -m experiments.dry_compile {machine}",
        "compiled_for": machine,
        "jax": jax.__version__,
        "dtype": pair.dtype.name,
        "capacity": CAPACITY,
        "results": [asdict(reading) for reading in readings],
    }
    _print(measured, readings)
    if out is not None:
        save(out, as_json(measured))
    return int(any(reading.at_fault for reading in readings))


def _print(measured: Mapping[str, Any], readings: Sequence[Reading]) -> None:
    """Print the table, and every fault in a line of its own."""
    rows = tabulate(measured)
    title = f"Llama-3.1-8B and Llama-3.2-1B in bfloat16, compiled for {measured['compiled_for']}"
    table = Table(*rows[0], title=title)
    align_right(table.columns[1:])
    for row in rows:
        cells = [
            f"{cell:.2f}" if isinstance(cell, float) else str(cell or "") for cell in row.values()
        ]
        table.add_row(*cells)
    show(table)
    for reading in readings:
        for what in (reading.refusal, *reading.weight_copies, *reading.host_waits):
            if what:
                print(f"{reading.name}: {what}")


def run(args: argparse.Namespace) -> int:
    """Compile for the machine that was asked for."""
    return dry_compile(args.machine, args.out)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = Parser(prog="python -m experiments.dry_compile", description=__doc__)
    parser.add_argument("machine", help='a GPU that `easyspec plan` knows, such as "h100"')
    parser.add_argument("--out", type=Path, help="a .json file (default: print only)")
    return run_experiment("experiments.dry_compile", parser, run, argv)


if __name__ == "__main__":
    sys.exit(main())
