"""Time the search for repeats: `python -m experiments.bench_lookup`.

What a round with lookups spends on them, for one text of several lengths, alone and next to corpora
of several sizes, alternating. Tokens are random: the search compares all places, whatever is there.
"""

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from easyspec_jax import SpeculativeConfig
from easyspec_jax.cli.command import Parser, cache_compilations
from easyspec_jax.decode.lookup import Lookup, find
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
from experiments.ours.lookup import print_table

VOCABULARY = 32_000
WARM_UP = 2


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for every text and corpus, with the seconds of each search."""
    default = SpeculativeConfig()
    lookup = Lookup(default.prompt_lookup_max, default.prompt_lookup_min)
    search = jax.jit(partial(find, lookup=lookup, levels=default.num_speculative_tokens))
    random = np.random.default_rng(0)

    def tokens(*shape: int) -> jax.Array:
        return jnp.asarray(random.integers(0, VOCABULARY, shape), jnp.int32)

    corpora = [None, *map(tokens, args.corpora)]
    rows = []
    for length in args.texts:
        text, last = tokens(1, length), jnp.asarray([length - 1], jnp.int32)
        seconds: list[list[float]] = [[] for _ in corpora]
        for repeat in range(args.repeats + WARM_UP):
            for corpus, own in zip(corpora, seconds, strict=True):
                begun = time.perf_counter()
                jax.block_until_ready(search(text, last, corpus=corpus))
                if repeat >= WARM_UP:
                    own.append(time.perf_counter() - begun)
        for size, own in zip((0, *args.corpora), seconds, strict=True):
            rows.append({"text": length, "corpus": size, "seconds": own})
    return rows


def tabulate(measured: Mapping[str, Any]) -> Rows:
    """Tabulate medians, a row for every length of the text."""
    table: dict[int, dict[str, Any]] = {}
    for row in measured["results"]:
        size = f"corpus of {row['corpus']:,}" if row["corpus"] else "no corpus"
        own = table.setdefault(row["text"], {"text": f"{row['text']:,}"})
        own[f"{size}, ms"] = f"{1e3 * median(row['seconds']):.3f}"
    return list(table.values())


def run(args: argparse.Namespace) -> None:
    """Measure, print and write the JSON."""
    check_destination(args.out)
    cache_compilations()
    fields = settings(args) | {"machine": machine(None), "results": measure(args)}
    print_table(tabulate(fields))
    save(args.out, as_json(fields))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = Parser(prog="python -m experiments.bench_lookup", description=__doc__)
    parser.add_argument("--texts", type=int, nargs="+", default=[4096, 32768], help="tokens")
    parser.add_argument("--corpora", type=int, nargs="+", default=[65536, 1048576], help="tokens")
    parser.add_argument("--repeats", type=int, default=101)
    parser.add_argument("--out", type=Path, default=RESULTS / "bench_lookup.json")
    return run_experiment("experiments.bench_lookup", parser, run, argv)


if __name__ == "__main__":
    sys.exit(main())
