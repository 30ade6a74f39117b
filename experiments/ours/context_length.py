"""Time steps by the length of the text: `python -m experiments.context_length`.

Models of the bundled pair's shapes, with random weights and room for long texts, decode texts of
many lengths in caches of several capacities: a step of plain decoding, and a round with a fuzzy
draft. Each is timed as it is, where a pass reads only as large a part of the caches as the text
needs, and with passes that read all of them, alternating. The memory that the arrays and the round
take is compared with what is predicted before anything is loaded.
"""

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from easyspec_jax import SamplingParams, demo
from easyspec_jax.checkpoint.config import read_json
from easyspec_jax.cli.command import Parser, cache_compilations
from easyspec_jax.decode.programs import Programs
from easyspec_jax.decode.state import RoundConfig, State
from easyspec_jax.draft.grouping import Layout, paper_groups
from easyspec_jax.engine.needs import Workload, needed
from easyspec_jax.parallel.mesh import ALL_AXES, MeshShape, open_mesh, replicated
from easyspec_jax.parallel.platforms import settings_of
from easyspec_jax.progress import bar
from easyspec_jax.tune.drawing import INK, SOFT, png
from easyspec_jax.verify import Greedy
from experiments.bench import roofline_models as models
from experiments.lib.output import RESULTS, prepare, publish, run_experiment, settings
from experiments.lib.tables import Rows
from experiments.ours.lookup import print_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEVELS, GROUP = 5, 4
WARM_UP = 1
STEPS = {"step": "a step of plain decoding", "round": "a round of five levels"}


@dataclass(frozen=True)
class Bench:
    """The programs of both ways to read caches, on models of the same shapes.

    Attributes:
        parts: Those that read as much as texts need.
        whole: Those that read everything.
        job: What is predicted of them.
    """

    parts: Programs
    whole: Programs
    job: Workload


def bench(levels: int, capacity: int) -> Bench:
    """Load the models for caches of some capacity.

    Args:
        levels: Levels of a round; 0 for plain decoding.
        capacity: Cache entries.
    """
    mesh = open_mesh(MeshShape(1, 1))
    longer = {"max_position_embeddings": 2 * capacity, "eos_token_id": None}
    of_target, of_draft = (
        models.random_source(read_json(directory / "config.json") | longer, "float32")
        for directory in (demo.TARGET, demo.DRAFT)
    )
    groups = tuple(paper_groups(of_draft.config.num_hidden_layers, GROUP))
    round_config = RoundConfig(levels, calibration=True, verifier=Greedy(), stop_ids=())
    # The longest text for which there is room: of a capacity of 4096, a round writes the last few.
    tokens = capacity - round_config.scratch - 1

    def programs(reads_parts: bool) -> Programs:
        own = replace(settings_of("cpu"), reads_parts=reads_parts)
        target = models.load(of_target, mesh, settings=own)
        draft = models.load(of_draft, mesh, groups, settings=own) if levels else None
        return Programs(mesh, target, draft, round_config, max_length=tokens)

    job = Workload(
        of_target.config,
        of_draft.config if levels else None,
        Layout.uniform(groups),
        refit=False,
        draft_axes=ALL_AXES,
        mesh=mesh,
        dtype="float32",
        round=round_config,
        tokens=tokens,
        prompt=tokens,
        rows=1,
        max_length=tokens,
    )
    return Bench(programs(True), programs(False), job)


def at_length(programs: Programs, capacity: int, tokens: int) -> State:
    """Make a state whose text has some tokens; what they are does not matter for time."""
    state = programs.start(SamplingParams(), [capacity], capacity)
    # Two arrays, as a round takes over both.
    length, draft_length = (
        replicated(np.full(1, tokens, np.int32), programs.mesh) for _ in range(2)
    )
    return replace(state, length=length, draft_length=draft_length)


def timed(programs: Programs, capacity: int, tokens: int) -> float:
    """Return the seconds of one round at a length."""
    state = jax.block_until_ready(at_length(programs, capacity, tokens))
    begun = time.perf_counter()
    jax.block_until_ready(programs.round(state))
    return time.perf_counter() - begun


def rows_of(kind: str, own: Bench, args: argparse.Namespace, capacity: int) -> list[dict[str, Any]]:
    """Measure one kind of round at every length that fits."""
    rows = []
    for tokens in (*(length for length in args.lengths if length < own.job.tokens), own.job.tokens):
        seconds: dict[str, list[float]] = {"parts": [], "whole": []}
        for repeat in range(args.repeats + WARM_UP):
            for way in ("parts", "whole"):
                spent = timed(getattr(own, way), capacity, tokens)
                if repeat >= WARM_UP:
                    seconds[way].append(spent)
        rows.append({"kind": kind, "capacity": capacity, "tokens": tokens} | seconds)
    return rows


def memory_of(programs: Programs, capacity: int, prompt: int) -> int:
    """Return the bytes of all arrays, and of what XLA sets aside for a round or a prompt's chunk.

    Args:
        programs: The programs.
        capacity: Cache entries.
        prompt: Tokens of the longest prompt.
    """
    state = programs.start(SamplingParams(), [capacity], capacity)
    chunk = max(programs.sizes.chunks(prompt, capacity))
    of_chunk = [
        jax.ShapeDtypeStruct(*one) for one in (((1, chunk), "i4"), ((1,), "i4"), ((1,), "bool"))
    ]
    own: Any = programs.compiled  # whose steps are declared as mere callables
    steps = [(own.round, ()), (own.prefill, of_chunk)]
    if programs.draft is not None:
        steps.append((own.prefill_draft, of_chunk[:2]))
    taken = []
    for step, arguments in steps:
        compiled = step.lower(programs.leaves, state, *arguments).compile()
        taken.append(compiled.memory_analysis().temp_size_in_bytes)
    held = sum(array.nbytes for array in (*programs.leaves, *jax.tree.leaves(state)))
    return held + max(taken)


def run(args: argparse.Namespace) -> None:
    """Measure, print, and write the JSON and the picture."""
    prepare(args.out)
    cache_compilations()
    rows, memory = [], []
    with bar("Measuring", len(STEPS) * len(args.capacities)) as advance:
        for kind in STEPS:
            for capacity in args.capacities:
                own = bench(LEVELS if kind == "round" else 0, capacity)
                rows += rows_of(kind, own, args, capacity)
                taken = memory_of(own.parts, capacity, own.job.tokens)
                predicted = needed(own.job).total
                memory.append(
                    {"kind": kind, "capacity": capacity, "bytes": taken, "predicted": predicted}
                )
                advance(1)
    fields = settings(args) | {"memory": memory}
    print_table(tabulate({"results": rows}))
    for one in memory:
        share = one["predicted"] / one["bytes"]
        print(f"memory, {one['kind']}, {one['capacity']} entries: predicted {share:.3f} of it")
    publish(args.out, fields, rows, draw)


def tabulate(measured: Mapping[str, Any]) -> Rows:
    """Tabulate medians; ratios are medians over pairs of neighbors in time."""
    table = []
    for row in measured["results"]:
        pairs = zip(row["parts"], row["whole"], strict=True)
        table.append(
            {
                "": STEPS[row["kind"]],
                "capacity": f"{row['capacity']:,}",
                "text": f"{row['tokens']:,}",
                "ms": f"{1e3 * median(row['parts']):.2f}",
                "over reading all": f"{median(own / all_of_it for own, all_of_it in pairs):.2f}",
            }
        )
    return table


def draw(measured: dict[str, Any]) -> bytes:
    """Draw the time of steps by the length of the text, as PNG.

    Raises:
        EasySpecError: matplotlib is missing.
    """
    return png(lambda: _figure(measured))


def _figure(measured: dict[str, Any]) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), dpi=120, layout="constrained")
    colors = ("#0072b2", "#e69f00", "#009e73")
    for axes, (kind, label) in zip(figure.subplots(1, 2), STEPS.items(), strict=True):
        for capacity, color in zip(measured["capacities"], colors, strict=False):
            rows = [
                r for r in measured["results"] if (r["kind"], r["capacity"]) == (kind, capacity)
            ]
            lengths = [row["tokens"] for row in rows]
            for way, style in (("parts", "o-"), ("whole", ":")):
                times = [1e3 * median(row[way]) for row in rows]
                name = f"{capacity:,} entries" + ("" if way == "parts" else ", all read")
                axes.plot(lengths, times, style, color=color, linewidth=2, label=name)
        axes.set(title=label, xlabel="tokens of the text", ylabel="ms", xscale="log", yscale="log")
        axes.tick_params(colors=SOFT, labelcolor=INK)
        axes.legend(fontsize=8)
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = Parser(prog="python -m experiments.context_length", description=__doc__)
    parser.add_argument("--capacities", type=int, nargs="+", default=[4096, 32768])
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[100, 1000, 2000, 4000, 8000, 16000]
    )
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULTS / "context_length.json")
    return run_experiment("experiments.context_length", parser, run, argv)


if __name__ == "__main__":
    sys.exit(main())
