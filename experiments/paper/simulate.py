"""Estimate the paper's pairs on machines that are not here: `python -m experiments.simulate`.

A round's cost is counted in the trace of the real program, and takes as long as the cost model of
`python -m easyspec_jax.plan` says. Its tokens follow from the paper's acceptance rates. The paper's
measurements on 8×A100 stand next to every estimate: the first machine shows how far the model is
from the paper's engine, and the second has kernel and collective times fitted to the paper's plain
decoding. Nothing here is measured.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
from rich.table import Table

from easyspec_jax import EasySpecError, SpeculativeConfig
from easyspec_jax.cli.command import Parser
from easyspec_jax.engine.abstract import absent_mesh
from easyspec_jax.options import DraftTensorParallelSize, Method, Platform
from easyspec_jax.plan.configurations import find_config
from easyspec_jax.plan.machines import Machine, Topology, parse_topology
from easyspec_jax.plan.report import tokens_per_second
from easyspec_jax.plan.steps import Costs, Pair, Way, costs, verification_cost
from easyspec_jax.progress import bar
from easyspec_jax.tune.drawing import INK, dress_bars, png
from experiments.lib.output import (
    RESULTS,
    prepare,
    publish,
    read_results,
    run_experiment,
    settings,
    show,
)
from experiments.lib.picture import note
from experiments.lib.tables import Rows, distinct, labelled, matching
from experiments.paper import published as paper

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHAPES = {
    "Llama-3-70B": "Llama-3.3-70B",
    "Llama-3-8B": "Llama-3.1-8B",
    "Llama-3-1B": "Llama-3.2-1B",
    "Qwen2-72B": "Qwen2.5-72B",
    "Qwen2-7B": "Qwen2.5-7B",
    "Qwen2-1.5B": "Qwen2.5-1.5B",
}
"""The paper's models, and bundled configurations of the same shapes."""

DTYPE = np.dtype("bfloat16")

METHODS: dict[str, Method] = {"+sd": "sd", "+tree": "tree", "EasySpec": "easyspec"}

REFIT = "EasySpec, refit"

THEIRS = "a100:8"
"""The paper's machine, as easyspec_jax.plan names it."""

count = cache(costs)
verification = cache(verification_cost)


@cache
def absent(platform: Platform) -> partial[Any]:
    """Return one object for each platform, so that the caches recognise it."""
    return partial(absent_mesh, platform=platform)


def share_lost(
    measured: dict[str, Any], temperature: float, tree_width: int, lp_size: int
) -> float | None:
    """Return the share of plain groups' loss that refit groups still lose.

    The loss is against an exact draft, in a file of experiments.acceptance. Sampled texts count
    with the coupled verifier, with which all drafts make the same ones. None if there is no refit,
    or if plain groups lose nothing.
    """
    rows = [
        row
        for row in measured["results"]
        if row["temperature"] == temperature
        and row["tree_width"] == tree_width
        and row["verifier"] in ("greedy", "coupled")
    ]
    exact = [row["acceptance_rate"] for row in rows if row["lp_size"] == 1]
    groups = [row for row in rows if row["lp_size"] == lp_size and row["calibration"]]
    refit = [row["acceptance_rate"] for row in groups if row.get("refit", False)]
    plain = [row["acceptance_rate"] for row in groups if not row.get("refit", False)]
    if not (exact and refit and plain and exact[0] > plain[0]):
        return None
    return (exact[0] - refit[0]) / (exact[0] - plain[0])


def ways_of(
    pair: paper.PublishedPair, lost: float | None
) -> Iterator[tuple[str, float | None, Way]]:
    """Yield name, acceptance rate and way for both placements of a draft.

    lost: as share_lost() returns it.
    """
    sizes: tuple[DraftTensorParallelSize, ...] = get_args(DraftTensorParallelSize)
    for name, published in pair.ways.items():
        if published.acceptance_rate is None:
            yield name, None, Way("vanilla")
            continue
        method = METHODS[name]
        lp_size = pair.lp_size if method == "easyspec" else 1
        for size in sizes:
            yield name, published.acceptance_rate, Way(method, lp_size, size)
    exact, plain = (
        pair.ways[name].acceptance_rate if name in pair.ways else None
        for name in ("+tree", "EasySpec")
    )
    if lost is not None and exact is not None and plain is not None:
        for size in sizes:
            yield (
                REFIT,
                exact - lost * (exact - plain),
                Way("easyspec", pair.lp_size, size, refit=True),
            )


def fitted(args: argparse.Namespace, pair: paper.PublishedPair, topology: Topology) -> Topology:
    """Return the machine with the overheads that make plain decoding as slow as the paper's.

    A kernel's is fitted to the time on one device, a collective's to tensor parallelism.
    """
    plain, published = Way("vanilla"), pair.ways["TP"]
    mesh = absent(topology.machine.platform)
    alone, split = (
        count(_planned(args, pair, devices, 1), plain, mesh).round
        for devices in (1, topology.devices)
    )
    idle = replace(topology.machine, launch=0.0, latency=0.0)
    seconds = 1 / published.tokens_per_second
    launch = (published.speedup * seconds - alone.seconds(idle)) / alone.kernels
    latency = (seconds - split.seconds(replace(idle, launch=launch))) / split.collectives
    machine = replace(topology.machine, launch=launch, latency=latency)
    return replace(topology, name=f"{topology.name}, fitted", machine=machine)


def rows_of(
    args: argparse.Namespace, pair: paper.PublishedPair, topology: Topology, lost: float | None
) -> list[dict[str, Any]]:
    """Return a row for every way of a pair on a machine and every placement of its draft."""
    alone = count(_planned(args, pair, 1, 1), Way("vanilla"), absent(topology.machine.platform))
    own = 1 / alone.round.seconds(topology.machine)
    about = {"target": pair.target, "draft": pair.draft, "temperature": pair.temperature}
    about |= {"machine": topology.name, "devices": topology.devices}
    times = {"launch": topology.machine.launch, "latency": topology.machine.latency}
    rows = []
    for name, rate, way in ways_of(pair, lost):
        width = 1 if way.method in ("vanilla", "sd") else args.tree_width
        planned = _planned(args, pair, topology.devices, width)
        counted = count(planned, way, absent(topology.machine.platform))
        speeds = _speeds(planned, counted, rate, topology.machine)
        rows.append(
            about
            | {"way": name, "lp_size": way.lp_size, "acceptance_rate": rate}
            | {
                "draft_tensor_parallel_size": None
                if rate is None
                else way.draft_tensor_parallel_size
            }
            | speeds
            | {
                "speedup": speeds["tokens_per_second"] / own,
                **_beside(pair.ways.get(name)),
                **times,
            }
        )
    return rows


def estimate(args: argparse.Namespace, topologies: Sequence[Topology]) -> list[dict[str, Any]]:
    """Return all rows, machine by machine.

    Raises:
        EasySpecError: The file of acceptance is not one.
    """
    measured, rows = read_results(args.acceptance), []
    with bar("Counting", len(topologies) * len(paper.pairs())) as advance:
        for topology in topologies:
            for pair in paper.pairs():
                lost = share_lost(measured, pair.temperature, args.tree_width, pair.lp_size)
                rows.append((topology.name, rows_of(args, pair, topology, lost)))
                if topology.name == THEIRS:
                    machine = fitted(args, pair, topology)
                    rows.append((machine.name, rows_of(args, pair, machine, lost)))
                advance(1)
    order = list(dict.fromkeys(name for name, _ in rows))
    return [row for name in order for own, found in rows if own == name for row in found]


def _planned(args: argparse.Namespace, pair: paper.PublishedPair, devices: int, width: int) -> Pair:
    target, draft = (find_config(SHAPES[name], "SHAPES")[1] for name in (pair.target, pair.draft))
    length = args.prompt_length + args.max_new_tokens
    return Pair(
        target,
        draft,
        DTYPE,
        str(devices),
        args.num_speculative_tokens,
        width,
        args.prompt_length,
        length,
    )


def _speeds(pair: Pair, counted: Costs, rate: float | None, machine: Machine) -> dict[str, Any]:
    """Estimate speeds; `drafting` is all of a round but its verification."""
    speed = tokens_per_second(counted, pair.num_speculative_tokens, rate or 0.0, machine)
    seconds = counted.round.seconds(machine)
    fields = {
        "round_seconds": seconds,
        "tokens_per_second": speed,
        "drafting": None,
        "verification": None,
    }
    if rate is not None:
        share = (
            verification(pair, absent(machine.platform), counted.capacity).seconds(machine)
            / seconds
        )
        fields |= {"drafting": (1 - share) * 100 / speed, "verification": share * 100 / speed}
    held = {
        "collectives": counted.round.collectives,
        "kernels": counted.round.kernels,
        "bytes": counted.memory,
    }
    return fields | held | {"fits": machine.memory is None or counted.memory <= machine.memory}


def _beside(published: paper.Published | None) -> dict[str, Any]:
    """Return what the paper measured on 8×A100."""
    names = ("tokens_per_second", "speedup", "drafting", "verification")
    return {
        f"paper_{name}": None if published is None else getattr(published, name) for name in names
    }


def assumptions(
    args: argparse.Namespace, topologies: Sequence[Topology], rows: Sequence[dict[str, Any]]
) -> list[str]:
    """List all that an estimate takes for granted."""
    machines = {topology.machine.name: topology.machine for topology in topologies}
    shapes = ", ".join(f"{name} as {shape}" for name, shape in SHAPES.items())
    return [
        "Estimates by a cost model; nothing was measured on these machines. seconds = max(bytes "
        "/ bandwidth, flops / peak) + wire bytes / link bandwidth + collectives × latency + "
        "kernels × launch; nothing overlaps, and bandwidth and peak are reached. The host costs "
        "nothing: rounds are single compiled programs.",
        *(
            f"{name}: {own.bandwidth / 1e9:.0f} GB/s of memory, {own.flops / 1e12:.0f} TFLOP/s, "
            f"{own.link_bandwidth / 1e9:.0f} GB/s of links ({own.source}); "
            f"{own.latency * 1e6:.0f} µs a collective and {own.launch * 1e6:.0f} µs a kernel, "
            "which are estimates that no vendor states."
            for name, own in machines.items()
        ),
        *_fits(rows),
        "v5p:2x2x1 is what Google calls v5p-8: 8 TensorCores, 4 chips. v5p:2x2x2 has 8 chips.",
        f"Models by the shapes of bundled configurations: {shapes}. Pairs of the paper whose "
        "acceptance it does not give are left out.",
        f"Batch 1, {DTYPE}, a prompt of {args.prompt_length} tokens and {args.max_new_tokens} new "
        "ones, caches read whole; prefill is not counted. Rounds are counted as those of greedy "
        "decoding, also where they sample.",
        f"A round drafts {args.num_speculative_tokens} levels, trees of {args.tree_width} nodes a "
        "level (the paper does not state the width of its table), and yields 1 + α × levels "
        "tokens.",
        "α is the paper's, measured with its own engine, its trees and its prompts; the same on "
        "every machine and for every placement of the draft.",
        "Speed-up is over plain decoding on one such device, as if the target fitted: layers "
        "spread over devices that work one after another take that long.",
        "The draft is on every device (draft TP 1, as in the paper) or split over all of them "
        "(draft TP all); groups of N run on N devices either way.",
        "The paper's tokens/s are 100 over its seconds for 100 tokens; those of TP, and "
        "speed-ups of Table 5, are by Table 2's time on one device.",
        _refit(args, rows),
    ]


def _fits(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Describe the overheads that fitted() found."""
    own = [row for row in rows if row["machine"] == f"{THEIRS}, fitted" and row["way"] == "TP"]
    times = (
        f"{row['launch'] * 1e6:.0f} and {row['latency'] * 1e6:.0f} µs for {row['target']} drafted "
        f"by {row['draft']} at T = {row['temperature']:g}"
        for row in own
    )
    line = (
        f"{THEIRS}, fitted: a kernel and a collective take what makes plain decoding, on one "
        f"device and TP, as slow as the paper's: {', '.join(times)}. Its TP rows therefore agree; "
        "the others are predictions."
    )
    return [line] if own else []


def _refit(args: argparse.Namespace, rows: Sequence[dict[str, Any]]) -> str:
    """Say where a refit draft's acceptance comes from."""
    if not any(row["way"] == REFIT for row in rows):
        return (
            f"{args.acceptance.name} has no acceptance of refit drafts at this width, "
            "so that no row is for them."
        )
    return (
        "Refit: α is the paper's of +tree less a share of what it loses from there to EasySpec: "
        "the share that refit groups of another model still lost of what its plain ones lost "
        f"against its exact draft, in {args.acceptance.name}."
    )


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Print the rows."""
    table = Table(
        "machine",
        "target",
        "draft",
        "T",
        "",
        "draft TP",
        "α",
        "tokens/s",
        "speed-up",
        "the paper's",
        box=None,
        pad_edge=False,
    )
    for row in rows:
        rate, published = row["acceptance_rate"], row["paper_speedup"]
        table.add_row(
            *(row[name] for name in ("machine", "target", "draft")),
            f"{row['temperature']:g}",
            row["way"],
            row["draft_tensor_parallel_size"],
            "" if rate is None else f"{rate:.2f}",
            f"{row['tokens_per_second']:.1f}" if row["fits"] else "does not fit",
            f"{row['speedup']:.2f}",
            "" if published is None else f"{published:.2f}",
        )
    show(table)


COLORS = {None: "#bdbdbd", "1": "#0072b2", "all": "#e69f00"}
"""By draft TP; from the palette of Okabe and Ito, far apart in grey."""

LABELS = {None: "no draft", "1": "draft on every device", "all": "draft split over all"}


def draw(measured: dict[str, Any]) -> bytes:
    """Draw a panel for each pair and machine as PNG: the predicted speed-up by way of decoding.

    Marks show what the paper measured. Only temperature 0 is drawn: others differ in their
    acceptance alone.

    Raises:
        EasySpecError: matplotlib is missing.
    """
    return png(lambda: _figure(measured))


def _figure(measured: dict[str, Any]) -> "Figure":
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    rows = [row for row in measured["results"] if row["fits"] and row["temperature"] == 0]
    pairs = list(dict.fromkeys((row["target"], row["draft"]) for row in rows))
    machines = distinct(rows, "machine")
    of = {(target, draft): matching(rows, target=target, draft=draft) for target, draft in pairs}
    ways = {pair: distinct(own, "way") for pair, own in of.items()}
    heights = [0.8 + len(names) for names in ways.values()]
    figure = Figure(
        figsize=(2 + 3.2 * len(machines), 1.6 + 0.62 * sum(heights)), dpi=110, layout="constrained"
    )
    figure.suptitle(
        "Predicted speed-up over plain decoding on one device, greedily (estimates)",
        weight="bold",
        size=13,
    )
    grid = figure.subplots(
        len(pairs),
        len(machines),
        squeeze=False,
        sharex=True,
        sharey="row",
        gridspec_kw={"height_ratios": heights},
    )
    for line, pair in zip(grid, pairs, strict=True):
        for axes, machine in zip(line, machines, strict=True):
            _draw_panel(axes, matching(of[pair], machine=machine), ways[pair])
            axes.set_title(f"{machine}: {pair[0]}, {pair[1]}", size=9)
    for axes in grid[-1]:
        axes.set_xlabel("× one device")
    handles: list[Any] = [Patch(color=color, label=LABELS[size]) for size, color in COLORS.items()]
    marker = Line2D(
        [], [], color=INK, marker="D", linestyle="none", label="the paper, measured on 8×A100"
    )
    figure.legend(handles=[*handles, marker], loc="outside lower center", ncols=4)
    return figure


def _draw_panel(axes: Any, rows: Sequence[dict[str, Any]], ways: Sequence[str]) -> None:
    for row in rows:
        size = row["draft_tensor_parallel_size"]
        place = ways.index(row["way"]) + {None: 0, "1": -0.2, "all": 0.2}[size]
        axes.barh(place, row["speedup"], height=0.64 if size is None else 0.36, color=COLORS[size])
        end = max(row["speedup"], row["paper_speedup"] or 0)  # the paper's mark included
        note(axes, f"{row['speedup']:.1f}", end, place, gap=6, size=8)
        if row["paper_speedup"] is not None:
            axes.plot(
                row["paper_speedup"],
                ways.index(row["way"]),
                marker="D",
                color=INK,
                markersize=6,
                markeredgecolor="white",
            )
    axes.margins(x=0.16)
    axes.set_yticks(range(len(ways)), ways)
    axes.set_ylim(len(ways) - 0.5, -0.5)
    dress_bars(axes)


def tabulate(measured: Mapping[str, Any]) -> Rows:
    """Tabulate tokens/s and speed-ups by machine.

    There is a row for each pair, temperature, way and placement of the draft.
    """
    rows = [row for row in measured["results"] if row["fits"]]
    shared = {
        "target": "target",
        "draft": "draft",
        "temperature": "T",
        "way": "way",
        "lp_size": "N",
        "draft_tensor_parallel_size": "draft TP",
        "acceptance_rate": "α",
    }
    table: dict[tuple[Any, ...], dict[str, Any]] = {}
    published: dict[tuple[Any, ...], str] = {}
    for row in rows:
        key = tuple(row[name] for name in shared)
        shown = table.setdefault(key, labelled(row, shared) | {"T": f"{row['temperature']:g}"})
        shown[row["machine"]] = f"{row['tokens_per_second']:.1f} ({row['speedup']:.2f} ×)"
        if row["paper_speedup"] is not None:
            speed = f"{row['paper_tokens_per_second']:.1f} ({row['paper_speedup']:.2f} ×)"
            published.setdefault(key, speed)
    for key, speed in published.items():
        table[key]["the paper, 8×A100"] = speed
    return list(table.values())


def run(args: argparse.Namespace) -> None:
    """Estimate, print, write the JSON and draw it."""
    prepare(args.out)
    SpeculativeConfig(
        method="tree",
        num_speculative_tokens=args.num_speculative_tokens,
        tree_width=args.tree_width,
    )  # checks the values
    if min(args.prompt_length, args.max_new_tokens) < 1:
        raise EasySpecError("--prompt-length and --max-new-tokens must be at least 1")
    topologies = [parse_topology(name) for name in args.topologies]
    rows = estimate(args, topologies)
    print_table(rows)
    fields = settings(args) | {"assumptions": assumptions(args, topologies, rows)}
    publish(args.out, fields, rows, draw)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    default = SpeculativeConfig()
    parser = Parser(prog="python -m experiments.simulate", description=__doc__)
    parser.add_argument(
        "--topologies",
        nargs="+",
        default=["a100:8", "h100:8", "v5p:2x2x1", "v5p:2x2x2"],
        help="as in easyspec_jax.plan",
    )
    parser.add_argument(
        "--num-speculative-tokens", type=int, default=default.num_speculative_tokens
    )
    parser.add_argument("--tree-width", type=int, default=4)
    parser.add_argument("--prompt-length", type=int, default=256)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument(
        "--acceptance",
        type=Path,
        default=RESULTS / "acceptance.json",
        help="a file of experiments.acceptance, for what refit drafts lose",
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "simulate.json")
    return run_experiment("experiments.simulate", parser, run, argv)


if __name__ == "__main__":
    sys.exit(main())
