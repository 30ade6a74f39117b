"""Time a server until it is ready: `python -m experiments.ready`.

A server of the bundled pair starts with an empty cache of compiled programs, and then again with
the cache that it has left. The time is that from the start of its process to the line of its log
that says `ready`, after which nothing is compiled for ordinary requests.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from easyspec_jax.cli.command import Parser
from easyspec_jax.options import check_whole
from easyspec_jax.progress import bar
from experiments.endurance.load import served
from experiments.lib.machine import machine
from experiments.lib.output import (
    RESULTS,
    as_json,
    check_destination,
    run_experiment,
    save,
    settings,
)
from experiments.lib.tables import Rows


def measure(batch_size: int, repeats: int) -> list[dict[str, Any]]:
    """Start servers in turns with an empty and with a full cache.

    Args:
        batch_size: Texts that each decodes together.
        repeats: How many of each.

    Returns:
        A row for each server.
    """
    rows = []
    with bar("Starting", 2 * repeats) as advance:
        for _ in range(repeats):
            with tempfile.TemporaryDirectory() as directory:
                for cache in ("empty", "full"):
                    rows.append({"cache": cache} | _start(batch_size, directory))
                    advance(1)
    return rows


def _start(batch_size: int, directory: str) -> dict[str, float]:
    variables = {"XDG_CACHE_HOME": directory, "JAX_COMPILATION_CACHE_DIR": f"{directory}/xla"}
    begun = time.perf_counter()
    with served(batch_size, variables) as server:
        return {
            "seconds": time.perf_counter() - begun,
            "loading_seconds": server.ready["loading_seconds"],
            "compiling_seconds": server.ready["compiling_seconds"],
        }


def tabulate(measured: Mapping[str, Any]) -> Rows:
    """Tabulate medians with an empty and with a full cache."""
    rows = measured["results"]
    return [
        {
            "cache of compiled programs": cache,
            "ready after, s": _median(rows, cache, "seconds"),
            "loading, s": _median(rows, cache, "loading_seconds"),
            "compiling, s": _median(rows, cache, "compiling_seconds"),
            "starts": sum(row["cache"] == cache for row in rows),
        }
        for cache in ("empty", "full")
    ]


def _median(rows: Sequence[Mapping[str, Any]], cache: str, name: str) -> float:
    return median(row[name] for row in rows if row["cache"] == cache)


def run(args: argparse.Namespace) -> None:
    """Start the servers and write the JSON."""
    check_whole("batch-size", args.batch_size, 1)
    check_whole("repeats", args.repeats, 1)
    check_destination(args.out)
    rows = measure(args.batch_size, args.repeats)
    save(args.out, as_json(settings(args) | {"machine": machine("cpu"), "results": rows}))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = Parser(prog="python -m experiments.ready", description=__doc__)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3, help="starts with each cache")
    parser.add_argument("--out", type=Path, default=RESULTS / "ready.json")
    return run_experiment("experiments.ready", parser, run, argv)


if __name__ == "__main__":
    sys.exit(main())
