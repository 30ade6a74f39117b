"""Compare speed with memory bandwidth: `python -m experiments.bench_roofline --shape cpu`.

Weights are made on the spot, so nothing is downloaded. A pass of a model takes at least its floor:
the bytes of its weights, keys and values over the bandwidth measured in the same run. Cases that
are compared alternate within one part of a run, transformers' among them. Parts can run one by one
(--only), and each replaces its own results.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from easyspec_jax import EasySpecError
from easyspec_jax.checkpoint.config import read_json
from easyspec_jax.cli.command import Parser, cache_compilations
from easyspec_jax.options import resolve_dtype
from experiments.bench.roofline_models import SHAPES
from experiments.bench.roofline_parts import PARTS, Bench, Row
from experiments.lib.machine import machine as here
from experiments.lib.machine import torch_device, use_whole_device
from experiments.lib.output import RESULTS, check_destination, run_experiment, save, settings
from experiments.lib.tables import Rows, labelled

MILLISECONDS = {
    "seconds": "ms",
    "floor_seconds": "floor, ms",
    "traced_seconds": "profiled, ms",
    "gaps_seconds": "gaps, ms",
    "median_gap_seconds": "median gap, ms",
    "first_seconds": "to the first kernel, ms",
}
"""Fields that a printed table shows in milliseconds, and their columns."""


def tabulate(measured: Mapping[str, Any]) -> Rows:
    """Tabulate all parts, a row for each case."""
    milliseconds = {"seconds": "ms", "floor_seconds": "its bytes take, ms"}
    figures = {
        "share_of_bandwidth": "share of bandwidth",
        "GB_per_second": "GB/s",
        "tokens_per_second": "tokens/s",
        "tokens_per_pass": "tokens a pass",
        "acceptance_rate": "α",
        "over_plain": "over plain",
    }
    further = {
        "kernels": "kernels",
        "busy_share": "busy",
        "over_default": "over default options",
        "over_floats": "over floats",
        "failed": "failed",
    }
    table = []
    for part, of_part in measured["parts"].items():
        for row in of_part["results"]:
            shown = {"part": part, "what": row["name"]}
            for name, label in milliseconds.items():
                shown[label] = 1e3 * row[name] if name in row else None
            present = {name: label for name, label in further.items() if name in row}
            table.append(shown | labelled(row, figures) | labelled(row, present))
    return table


def run(args: argparse.Namespace) -> None:
    """Measure part after part, printing and saving each as soon as it is done."""
    cache_compilations()
    check(args)
    out = args.out or RESULTS / f"bench_roofline_{args.shape}.json"
    parts = saved(out, args.shape)
    bench = opened(args)
    chosen = settings(args, "only", "shape", "command")
    about = {
        "command": args.command,
        "machine": machine(bench),
        "dtype": bench.dtype.name,
        "settings": chosen,
    }
    Console().print(", ".join(f"{name} {value}" for name, value in about["machine"].items()))
    for name in (name for name in PARTS if name in args.only):
        rows: list[Row] = []
        for row in PARTS[name](bench):
            rows.append(row)
            parts[name] = about | {"results": rows}
            save(out, json.dumps({"shape": args.shape, "parts": parts}, indent=1) + "\n")
        print_table(f"{args.shape}, {name}", rows)


def check(args: argparse.Namespace) -> None:
    """Check the flags.

    Raises:
        EasySpecError: They ask for something that cannot be measured.
    """
    for name in ("repeats", "calls", "context", "max_new_tokens", "memory_mib"):
        if getattr(args, name) < 1:
            raise EasySpecError(
                f"--{name.replace('_', '-')} {getattr(args, name)} must be at least 1"
            )
    for name, shares in (
        ("synthetic-acceptance", args.synthetic_acceptance),
        ("agreement", [args.agreement]),
    ):
        for share in shares:
            if not 0 <= share <= 1:
                raise EasySpecError(f"--{name} {share} must be from 0 to 1")
    positions = min(fields["max_position_embeddings"] for fields in SHAPES[args.shape])
    if args.context + args.max_new_tokens > positions:
        raise EasySpecError(
            f"--context and --max-new-tokens exceed the {positions} positions of --shape "
            f"{args.shape}"
        )


def saved(out: Path, shape: str) -> dict[str, Any]:
    """Read the parts that a file of results already holds, if it exists.

    Raises:
        EasySpecError: It holds results of something else, or its directory is missing.
    """
    check_destination(out)
    if not out.exists():
        return {}
    held = read_json(out)
    if held.get("shape") != shape or not isinstance(held.get("parts"), dict):
        raise EasySpecError(
            f"--out {out} has no results of --shape {shape}; remove it or choose another"
        )
    return held["parts"]


def opened(args: argparse.Namespace) -> Bench:
    """Open the devices and choose the type to compute in.

    Raises:
        EasySpecError: Memory, torch or a device is missing.
    """
    bench = Bench(args, np.dtype(np.float32), "cpu")
    platform = bench.mesh().devices.flat[0].platform
    bench = Bench(args, np.dtype(resolve_dtype("auto", platform, bench.configs[0].dtype)), platform)
    bench.check_memory()
    if "peers" in args.only:
        torch_device(platform)
    return bench


def machine(bench: Bench) -> dict[str, Any]:
    """Describe the machine and the versions of the other engines."""
    packages = {}
    for name in ("torch", "transformers"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "absent"
    return here(bench.platform) | {"devices": bench.mesh().devices.size} | packages


def print_table(title: str, rows: Sequence[Row]) -> None:
    """Print one line for each row with its medians; times are in milliseconds."""
    hidden = {"name", "bytes", "repeats", "alternating", "longest"}
    columns = list(dict.fromkeys(key for row in rows for key in row if key not in hidden))
    table = Table(title=title)
    table.add_column(no_wrap=True)
    for column in columns:
        table.add_column(MILLISECONDS.get(column, column.replace("_", " ")))
    for row in rows:
        table.add_row(row["name"], *(shown(column, row.get(column)) for column in columns))
    Console().print(table)


def shown(column: str, value: float | None) -> str:
    """Write a cell."""
    if value is None:
        return ""
    if column in MILLISECONDS:
        return f"{1e3 * value:.{4 if 'gap' in column else 2}f}"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = Parser(prog="python -m experiments.bench_roofline", description=__doc__)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="cpu", help="of target and draft")
    parser.add_argument("--mesh", default="1")
    parser.add_argument(
        "--only", nargs="+", choices=tuple(PARTS), default=tuple(PARTS), help="some of the parts"
    )
    parser.add_argument(
        "--repeats", type=int, default=7, help="samples of each case, and texts of each way"
    )
    parser.add_argument("--calls", type=int, default=8, help="calls in a row for a sample")
    parser.add_argument("--context", type=int, default=256, help="tokens of the text so far")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="of each text")
    parser.add_argument(
        "--synthetic-acceptance",
        type=float,
        nargs="+",
        default=[0.6, 0.8],
        metavar="A",
        help="probabilities with which a drafted level passes if the one above it does",
    )
    parser.add_argument(
        "--agreement", type=float, default=0.8, help="share of ids that drafts get right"
    )
    parser.add_argument(
        "--memory-mib",
        type=int,
        default=1024,
        help="read to measure bandwidth; far above any cache",
    )
    parser.add_argument("--out", type=Path, help="default: results/bench_roofline_<shape>.json")
    use_whole_device()
    return run_experiment("experiments.bench_roofline", parser, run, argv)


if __name__ == "__main__":
    sys.exit(main())
