"""Estimate what each pass of a round costs, term by term: `python -m experiments.roofline_terms`.

Counts are read off traces of the engine's own programs, and data sheets turn them into times; no
device is needed. All times are estimates.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from easyspec_jax.cli.command import Parser
from easyspec_jax.plan import PlanConfig, plan
from easyspec_jax.plan.cost import Cost
from easyspec_jax.plan.machines import Machine
from easyspec_jax.plan.planning import Plan
from easyspec_jax.plan.steps import Costs
from easyspec_jax.progress import bar
from experiments.lib.output import RESULTS, as_json, check_destination, run_experiment, save
from experiments.lib.tables import Rows

LABELS = {
    "topology": "devices",
    "pass": "pass",
    "gigabytes": "GB",
    "memory_ms": "memory, ms",
    "collectives": "collectives",
    "collectives_ms": "collectives, ms",
    "kernels": "kernels",
    "launch_ms": "launches, ms",
    "total_ms": "in all, ms",
}
"""Fields of a row, and their columns."""


def tabulate(measured: Mapping[str, Any]) -> Rows:
    """Tabulate the terms of each pass."""
    table = []
    for row in measured["results"]:
        table.append({label: row[name] for name, label in LABELS.items()})
    return table


def passes(found: Plan, lp_size: int) -> Iterator[tuple[str, Cost]]:
    """Yield each pass of a round, and whole rounds, with what they cost a device."""
    vanilla, ordinary, grouped = (
        _way(found, method, size)
        for method, size in (("vanilla", 1), ("sd", 1), ("easyspec", lp_size))
    )
    assert grouped.calibration is not None, "layer-parallel drafts are calibrated"
    levels = found.pair.num_speculative_tokens
    yield "plain step", vanilla.round
    yield "draft step, exact", ordinary.step
    yield f"draft step, N = {lp_size}", grouped.step
    yield "calibration", grouped.calibration
    yield f"verification of {levels + 1}", found.verification
    yield f"round, N = {lp_size}", grouped.round


def _way(found: Plan, method: str, lp_size: int) -> Costs:
    """Return the costs of a way whose draft is split over all devices."""
    (only,) = (
        own
        for own in found.costs
        if (own.way.method, own.way.lp_size) == (method, lp_size)
        and own.way.draft_tensor_parallel_size == "all"
    )
    return only


def terms(cost: Cost, machine: Machine) -> dict[str, Any]:
    """Turn counts into milliseconds, each term by itself."""
    wire = cost.wire_bytes / machine.link_bandwidth
    return {
        "gigabytes": cost.bytes / 1e9,
        "memory_ms": 1e3 * cost.bytes / machine.bandwidth,
        "collectives": cost.collectives,
        "collectives_ms": 1e3 * (wire + cost.collectives * machine.latency),
        "kernels": cost.kernels,
        "launch_ms": 1e3 * cost.kernels * machine.launch,
        "total_ms": 1e3 * cost.seconds(machine),
    }


def run(args: argparse.Namespace) -> None:
    """Count for every topology and write the rows."""
    check_destination(args.out)
    rows: list[dict[str, Any]] = []
    with bar("Counting", len(args.topologies)) as advance:
        for topology in args.topologies:
            config = PlanConfig(
                topology, max_length=args.max_length, lp_size=args.lp_size, compile=False
            )
            found = plan(args.target, args.draft, config)
            for name, cost in passes(found, args.lp_size):
                rows.append(
                    {"topology": topology, "pass": name} | terms(cost, found.topology.machine)
                )
            advance(1)
    about = {"command": args.command, "estimates": True, "target": args.target, "draft": args.draft}
    save(args.out, as_json(about | {"results": rows}))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = Parser(prog="python -m experiments.roofline_terms", description=__doc__)
    parser.add_argument("--topologies", nargs="+", default=["h100:1", "h100:8", "v5p:2x2x1"])
    parser.add_argument("--target", default="Llama-3.1-8B", help="a bundled configuration")
    parser.add_argument("--draft", default="Llama-3.2-1B", help="a bundled configuration")
    parser.add_argument("--lp-size", type=int, default=4, help="layers of the draft at once")
    parser.add_argument("--max-length", type=int, default=3072, help="most tokens of a text")
    parser.add_argument("--out", type=Path, default=RESULTS / "roofline_terms.json")
    return run_experiment("experiments.roofline_terms", parser, run, argv)


if __name__ == "__main__":
    sys.exit(main())
