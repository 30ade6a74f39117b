"""Measure speed by the size of tensor parallelism, Table 6: `python -m experiments.table6`.

The paper's table has a step of plain decoding. This one adds a draft's step in every way to split
it over the same devices: one copy on each, tensor parallelism, layer-parallel groups. Where there
are several accelerators, or with --measure, steps of --target and --draft are timed, alternating.
Elsewhere they are estimates by the cost model of `python -m easyspec_jax.plan` from traces of the
real programs.
"""

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import jax
import numpy as np
from rich.table import Table

from easyspec_jax import EasySpecError, SpeculativeConfig
from easyspec_jax.checkpoint.config import ModelConfig
from easyspec_jax.cli.command import Parser, cache_compilations
from easyspec_jax.decode.timing import Case, alone, alternate, pass_case
from easyspec_jax.draft.layer_group import run_fuzzy
from easyspec_jax.engine.abstract import absent_mesh, abstract_state, bytes_per_device
from easyspec_jax.model.transformer import run_exact
from easyspec_jax.options import DraftTensorParallelSize, Platform, resolve_dtype
from easyspec_jax.parallel.mesh import parse_mesh
from easyspec_jax.plan.configurations import find_config
from easyspec_jax.plan.cost import Cost
from easyspec_jax.plan.machines import MACHINES, Machine, parse_topology
from easyspec_jax.plan.steps import Pair, Way, pass_cost, programs
from easyspec_jax.progress import bar
from easyspec_jax.tune.drawing import INK, SOFT, png
from experiments.lib.output import (
    RESULTS,
    align_right,
    prepare,
    publish,
    run_experiment,
    settings,
    show,
)
from experiments.lib.pair import add_flags, names, open_pair
from experiments.lib.tables import Rows
from experiments.paper import published as paper

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PLAIN = "plain decoding"
ESTIMATES = (
    "Estimates of the cost model for machines that were not here; the paper's figures were "
    "measured."
)


def draft_ways(lp_sizes: Iterable[int], devices: int) -> list[Way]:
    """List how a draft's step may use that many devices; on one there is nothing to split."""
    sizes: tuple[DraftTensorParallelSize, ...] = (
        get_args(DraftTensorParallelSize) if devices > 1 else ("all",)
    )
    ordinary = [Way("sd", 1, size) for size in sizes]
    return [
        *ordinary,
        *(Way("easyspec", n, size) for n in lp_sizes if n > 1 < devices for size in sizes),
    ]


def name_of(way: Way) -> str:
    """Name the way of a draft's step."""
    split = "TP" if way.draft_tensor_parallel_size == "all" else "a copy on each"
    return split if way.method == "sd" else f"N = {way.lp_size}, {split}"


def row(model: str, way: str, devices: int, seconds: float, **fields: Any) -> dict[str, Any]:
    """Return the row of one kind of step: one token of text, or one drafted level."""
    times = {"step_seconds": seconds, "steps_per_second": 1 / seconds}
    return {"model": model, "way": way, "devices": devices} | times | fields


def modelled(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return rows by the cost model, machine by machine and model by model.

    A step that does not fit the memory says so.

    Raises:
        EasySpecError: A machine or model is unknown, or the context is too long.
    """
    models = {
        name: config for text in args.models for name, config in [find_config(text, "models")]
    }
    drafts = {
        name: config for text in args.drafts for name, config in [find_config(text, "drafts")]
    }
    for name, config in (models | drafts).items():
        if args.context >= config.max_position_embeddings:
            raise EasySpecError(
                f"--context {args.context} must be less than the "
                f"{config.max_position_embeddings} positions of {name}"
            )
    for machine in args.machines:
        describe(machine, 1)
    rows: list[dict[str, Any]] = []
    with bar("Counting", len(args.machines) * len(args.devices)) as advance:
        for machine in args.machines:
            for devices in args.devices:
                for name, config in models.items():
                    rows.append(estimate(args, machine, devices, name, config, Way("vanilla")))
                for name, config in drafts.items():
                    sizes = [n for n in args.lp_sizes if n <= config.num_hidden_layers]
                    rows += [
                        estimate(args, machine, devices, name, config, way)
                        for way in draft_ways(sizes, devices)
                    ]
                advance(1)
    return rows


def estimate(
    args: argparse.Namespace, machine: str, devices: int, name: str, config: ModelConfig, way: Way
) -> dict[str, Any]:
    """Return the row of a model's step on that many devices of a machine."""
    described = describe(machine, devices)
    dtype = np.dtype(resolve_dtype(args.dtype, described.platform, config.dtype))
    pair = Pair(config, config, dtype, str(devices), 1, 1, args.context, args.context + 1)
    step, held = step_cost(pair, way, described.platform)
    fits = None if described.memory is None else held <= described.memory
    label = PLAIN if way.method == "vanilla" else name_of(way)
    fields = {"collectives": step.collectives, "kernels": step.kernels, "bytes": held, "fits": fits}
    return row(name, label, devices, step.seconds(described), machine=machine, **fields)


def describe(name: str, devices: int) -> Machine:
    """Return that many devices of a machine.

    Raises:
        EasySpecError: The machine is unknown.
    """
    if name not in MACHINES:
        raise EasySpecError(f"--machines {name}: there are {', '.join(MACHINES)}")
    line = [1] * (MACHINES[name].dimensions - 1) + [devices]  # a torus with one long side
    return parse_topology(f"{name}:{'x'.join(map(str, line))}").machine


def step_cost(pair: Pair, way: Way, platform: Platform) -> tuple[Cost, int]:
    """Return the cost of a step over one token, and the bytes that each device holds.

    The step is of the target in plain decoding, else of the draft.
    """
    run = programs(pair, way, partial(absent_mesh, platform=platform))
    state = abstract_state(run, 1, run.sizes.capacity(pair.max_length))
    if run.draft is None:
        return pass_cost(run, state, "target", 1), bytes_per_device((run.target, state.target))
    return pass_cost(run, state, "draft", 1, fuzzy=True), bytes_per_device((run.draft, state.draft))


def measured(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time the pair of the flags on meshes of as many devices as are asked for."""
    rows: list[dict[str, Any]] = []
    called = names(args)
    for devices in args.devices:
        cases = list(timed_cases(args, devices))
        seconds = alternate(cases, args.repeats, args.calls)
        for case in cases:
            model = called["target" if case.name == PLAIN else "draft"]
            fields = {"deviation": float(np.std(seconds[case.name]))}
            rows.append(
                row(model, case.name, devices, float(np.median(seconds[case.name])), **fields)
            )
    return rows


def timed_cases(args: argparse.Namespace, devices: int) -> Iterable[Case]:
    """Yield a step of the target, and one of the draft in every way."""
    for way in [Way("vanilla"), *draft_ways(args.lp_sizes, devices)]:
        speculative = SpeculativeConfig(
            method=way.method,
            num_speculative_tokens=1,
            lp_size=way.lp_size,
            draft_tensor_parallel_size=way.draft_tensor_parallel_size,
            refit="none",
        )
        engine = open_pair(args, speculative, mesh=str(devices))
        target, draft = engine.load()
        model = alone(engine.mesh, draft or target)
        run, label = (run_exact, PLAIN) if draft is None else (run_fuzzy, name_of(way))
        yield pass_case(label, model, 1, run, context=args.context, capacity=args.context + 1)


def print_table(rows: Sequence[dict[str, Any]], devices: Sequence[int]) -> None:
    """Print a line for each machine, model and way: steps a second by the number of devices."""
    table = Table(
        "machine", "model", "", *(f"{count}" for count in devices), box=None, pad_edge=False
    )
    align_right(table.columns[3:])
    kinds = dict.fromkeys((row.get("machine", "here"), row["model"], row["way"]) for row in rows)
    for kind in kinds:
        own = {
            row["devices"]: row
            for row in rows
            if (row.get("machine", "here"), row["model"], row["way"]) == kind
        }
        table.add_row(*kind, *(_cell(own.get(count)) for count in devices))
    show(table)


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    return "does not fit" if row.get("fits") is False else f"{row['steps_per_second']:.1f}"


def several_accelerators() -> bool:
    """Tell whether JAX sees several devices that are not CPUs."""
    return jax.default_backend() != "cpu" and jax.device_count() > 1


COLORS = ("#0072b2", "#d55e00", "#009e73", "#000000", "#cc79a7", "#e69f00")
MARKERS = "osD^vP"
LINES: tuple[Any, ...] = (
    "-",
    (0, (5, 2)),
    (0, (1, 1.5)),
    (0, (5, 1, 1, 1)),
    (0, (8, 2, 2, 2)),
    (0, (2, 3)),
)
"""By the way of decoding, distinct without the colors too; these are Okabe and Ito's."""

HERE, PAPER = "here", "the paper, A100"

Series = dict[str, dict[int, float]]
"""Steps a second by the number of devices, line by line."""


def draw(measured: dict[str, Any]) -> bytes:
    """Draw steps a second by the number of devices as PNG, a panel for each machine and kind.

    Plain decoding is above, drafting below; the last panel of plain decoding has the paper's
    figures. Steps that do not fit the memory are left out.

    Raises:
        EasySpecError: matplotlib is missing.
    """
    return png(lambda: _figure(measured))


def panels(measured: Mapping[str, Any]) -> tuple[dict[str, Series], dict[str, Series]]:
    """Return the series of plain decoding and of drafting, by the title of a panel."""
    plain: dict[str, Series] = {}
    drafts: dict[str, Series] = {}
    for row in measured["results"]:
        if row.get("fits") is False:
            continue
        machine = row.get("machine", HERE)
        if row["way"] == PLAIN:
            lines = plain.setdefault(machine, {}).setdefault(row["model"], {})
        else:
            lines = drafts.setdefault(f"{machine}, {row['model']}", {}).setdefault(row["way"], {})
        lines[row["devices"]] = row["steps_per_second"]
    if "paper" in measured:
        for name, line in measured["paper"].items():
            speeds = {int(size): speed for size, speed in line.items()}
            plain.setdefault(PAPER, {})[name] = speeds
    return plain, drafts


def _figure(measured: dict[str, Any]) -> "Figure":
    from matplotlib.figure import Figure

    plain, drafts = panels(measured)
    columns = min(4, max(len(plain), len(drafts)))
    rows = [
        list(of.items())[at : at + columns]
        for of in (plain, drafts)
        for at in range(0, len(of), columns)
    ]
    figure = Figure(
        figsize=(1.5 + 3.6 * columns, 0.8 + 3.4 * len(rows)), dpi=110, layout="constrained"
    )
    source = "measured" if measured["measured"] else "estimated by the cost model"
    figure.suptitle(f"Steps a second by the number of devices, {source}", weight="bold", size=13)
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for line, own in zip(grid, rows, strict=True):
        for axes in line[len(own) :]:
            axes.set_visible(False)
        for axes, (title, series) in zip(line, own, strict=False):
            drafted = title in drafts
            _draw_panel(
                axes,
                series,
                f"drafting: {title}" if drafted else f"{PLAIN}: {title}",
                measured["devices"],
            )
            axes.set_ylabel("draft steps/s" if drafted else "tokens/s")
            if not drafted:
                axes.set_ylim(0, 1.45 * axes.get_ylim()[1])  # room for the legend
                axes.legend(
                    fontsize=7.5, loc="upper left", ncols=2, handlelength=2.6, columnspacing=1
                )
    lines = {line.get_label(): line for axes in grid[-1] for line in axes.get_lines()}
    figure.legend(
        handles=list(lines.values()), loc="outside lower center", ncols=len(lines), title="drafting"
    )
    return figure


def _draw_panel(axes: Any, series: Series, title: str, devices: Sequence[int]) -> None:
    looks = zip(cycle(COLORS), cycle(MARKERS), cycle(LINES), strict=False)
    for (name, points), (color, marker, style) in zip(series.items(), looks, strict=False):
        places = sorted(points)
        speeds = [points[place] for place in places]
        axes.plot(
            places, speeds, color=color, marker=marker, linestyle=style, markersize=5, label=name
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(devices, [str(size) for size in devices])
    axes.minorticks_off()
    axes.set_xlabel("devices")
    axes.set_ylim(
        0, 1.08 * max((speed for points in series.values() for speed in points.values()), default=1)
    )
    axes.set_title(title, size=10)
    axes.tick_params(colors=SOFT, labelcolor=INK)


def tabulate(measured: Mapping[str, Any]) -> Rows:
    """Tabulate steps a second by the number of devices."""
    table: dict[tuple[str, str, str], dict[str, Any]] = {}
    for row in measured["results"]:
        machine = row.get("machine", "here")
        shown = table.setdefault(
            (machine, row["model"], row["way"]),
            {"machine": machine, "model": row["model"], "way": row["way"]},
        )
        fits = row.get("fits") is not False
        shown[f"{row['devices']}"] = f"{row['steps_per_second']:.1f}" if fits else "does not fit"
    return list(table.values())


def run(args: argparse.Namespace) -> None:
    """Measure or estimate, print, write the JSON and draw it."""
    for devices in args.devices:
        parse_mesh(str(devices))
    if min(args.repeats, args.calls, args.context) < 1:
        raise EasySpecError("--repeats, --calls and --context must be at least 1")
    prepare(args.out)
    here = several_accelerators() if args.measure is None else args.measure
    if here:
        cache_compilations()
    rows = measured(args) if here else modelled(args)
    print_table(rows, args.devices)
    fields = settings(args, "questions", "measure", "target", "draft") | {"measured": here}
    fields |= names(args) if here else {"paper": paper.SPEEDS, "notes": [ESTIMATES]}
    publish(args.out, fields, rows, draw)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = Parser(prog="python -m experiments.table6", description=__doc__)
    add_flags(parser)
    parser.add_argument(
        "--measure",
        action=argparse.BooleanOptionalAction,
        help="time the pair on this machine's devices (default: if there are several)",
    )
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--lp-sizes", type=int, nargs="+", default=[2, 4])
    parser.add_argument(
        "--machines", nargs="+", default=["a100", "h100", "v5p"], help="machines to estimate for"
    )
    parser.add_argument(
        "--models",
        nargs="+",
        default=["Llama-3.3-70B", "Llama-3.1-8B", "Qwen2.5-7B"],
        help="for estimates of plain decoding: names as in easyspec_jax.plan",
    )
    parser.add_argument(
        "--drafts",
        nargs="+",
        default=["Llama-3.1-8B", "Llama-3.2-1B"],
        help="for estimates of drafting: names as in easyspec_jax.plan",
    )
    parser.add_argument(
        "--context", type=int, default=256, help="tokens before the step (default: %(default)s)"
    )
    parser.add_argument(
        "--repeats", type=int, default=15, help="samples of each step that is timed"
    )
    parser.add_argument("--calls", type=int, default=8, help="calls of a step for one sample")
    parser.add_argument("--out", type=Path, default=RESULTS / "table6.json")
    return run_experiment("experiments.table6", parser, run, argv)


if __name__ == "__main__":
    sys.exit(main())
