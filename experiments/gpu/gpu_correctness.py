"""Compare a device with a CPU: `python -m experiments.gpu_correctness --out JSON`.

In float32 every method and verifier must make the tokens that a CPU made of the same prompts, and
tiny models of every family must have the CPU's logits. The CPU's are in data/gpu_expected.json, by
--store. In bfloat16 it is only reported where texts leave plain decoding's, and how close a tie
that was. The exit code is 1 if a check fails.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from rich.table import Table

from easyspec_jax import SamplingParams, SpeculativeConfig, open_model
from easyspec_jax.checkpoint.config import read_json
from easyspec_jax.cli.command import Parser, cache_compilations, read_prompts
from easyspec_jax.options import DType
from easyspec_jax.progress import bar
from experiments.gpu import tiny_families
from experiments.lib.divergence import divergence, next_logits
from experiments.lib.machine import machine, use_whole_device
from experiments.lib.output import as_json, check_destination, run_experiment, save, show
from experiments.lib.pair import DATA

EXPECTED = DATA / "gpu_expected.json"

WAYS = {
    "vanilla": SpeculativeConfig(method="vanilla"),
    "sd": SpeculativeConfig(method="sd"),
    "tree": SpeculativeConfig(method="tree"),
    "easyspec, N = 2": SpeculativeConfig(lp_size=2, refit="none"),
    "easyspec, N = 4": SpeculativeConfig(lp_size=4, refit="none"),
    "easyspec, N = 4, MLP pairs": SpeculativeConfig(lp_size=4, mlp_lp_size=2, refit="none"),
}

SAMPLED = SamplingParams(temperature=0.8, seed=7)

LARGEST_GAP = 1e-3
"""Largest gap between two logits at which float32 may choose either token."""

LARGEST_DIFFERENCE = 1e-3
"""Between two devices' logits of a tiny model in float32."""

VERIFIERS = ("greedy", "coupled", "rejection")

Row = dict[str, Any]
Texts = dict[str, dict[str, list[list[int]]]]
"""Generated ids of each prompt, by way and verifier."""


def sampling(verifier: str, tokens: int) -> SamplingParams:
    """Return how tokens are chosen with a verifier: "greedy", "coupled" or "rejection"."""
    chosen = SamplingParams() if verifier == "greedy" else SAMPLED
    return replace(chosen, max_new_tokens=tokens)


def verifiers(way: SpeculativeConfig) -> tuple[str, ...]:
    """Name the verifiers that a way can have. Plain decoding verifies nothing, so one is enough."""
    return VERIFIERS[:2] if way.method == "vanilla" else VERIFIERS


class Pair:
    """The bundled pair in one type, and some prompts.

    Attributes:
        dtype: The type.
        prompts: The prompts.
        engine: The pair, of which other ways of decoding are variants.
    """

    def __init__(self, dtype: DType, prompts: Sequence[str]) -> None:
        self.dtype, self.prompts = dtype, prompts
        self.engine = open_model(speculative=WAYS["sd"], dtype=dtype)

    def texts(self, way: SpeculativeConfig, verifier: str, tokens: int) -> list[list[int]]:
        """Complete all prompts and return their ids."""
        named = way if verifier == "greedy" else replace(way, verifier=verifier)
        engine = self.engine.variant(named)
        completions = engine.generate(self.prompts, sampling(verifier, tokens))
        return [list(completion.token_ids) for completion in completions]


def all_texts(
    pair: Pair, ways: Sequence[str], tokens: int
) -> Iterator[tuple[str, str, list[list[int]]]]:
    """Complete all prompts in every way with every verifier, and yield their names and the ids.

    Greedy texts come first: they tell most.
    """
    combined = [(name, verifier) for verifier in VERIFIERS for name in ways]
    combined = [both for both in combined if both[1] in verifiers(WAYS[both[0]])]
    with bar("Generating", len(combined)) as advance:
        for name, verifier in combined:
            yield name, verifier, pair.texts(WAYS[name], verifier, tokens)
            advance(1)


def compared(
    pair: Pair, made: Sequence[Sequence[int]], expected: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """Count equal texts, and find where the others first differ and by what gap of logits."""
    differences = []
    logits = next_logits(pair.engine)
    for number, (own, other) in enumerate(zip(made, expected, strict=True)):
        found = divergence(logits, pair.engine.encode(pair.prompts[number]), own, other)
        if found is not None:
            differences.append({"prompt": number} | asdict(found))
    return {"texts": len(made), "equal": len(made) - len(differences), "differences": differences}


def check_texts(pair: Pair, expected: Texts, ways: Sequence[str], tokens: int) -> Iterator[Row]:
    """Check every way and verifier against a CPU's texts, of which the first tokens are made.

    A greedy text may leave the CPU's where two logits nearly tie. A sampled one may not: the noise
    makes ties unlikely, and a gap of logits says nothing about it.
    """
    for way, verifier, texts in all_texts(pair, ways, tokens):
        first = [text[:tokens] for text in expected[way][verifier]]
        row = compared(pair, texts, first)
        tied = all(found["logit_gap"] < LARGEST_GAP for found in row["differences"])
        passed = not row["differences"] or (verifier == "greedy" and tied)
        yield {"check": f"{way}, {verifier}", "passed": passed} | row


def check_families(mesh: Mesh, expected: dict[str, Any]) -> Iterator[Row]:
    """Check the logits of tiny models against a CPU's."""
    for family, stored in expected.items():
        for kind, found in tiny_families.logits(family, mesh).items():
            # A group that runs in order computes what its layers do.
            reference = np.asarray(stored["fuzzy" if kind == "fuzzy" else "exact"], np.float32)
            difference = float(np.max(np.abs(found - reference)))
            passed = difference <= LARGEST_DIFFERENCE
            yield {
                "check": f"{family}, {kind}",
                "passed": passed,
                "largest_difference": difference,
            }


def report_narrow(pair: Pair, ways: Sequence[str], tokens: int) -> Iterator[Row]:
    """Report where greedy texts in bfloat16 leave plain decoding's. Nothing can fail."""
    plain = pair.texts(WAYS["vanilla"], "greedy", tokens)
    for name in ways:
        if name != "vanilla":
            row = compared(pair, pair.texts(WAYS[name], "greedy", tokens), plain)
            yield {"check": f"{name}, greedy, {pair.dtype}", "passed": True} | row


def stored(tokens: int) -> dict[str, Any]:
    """Make, on this machine, what other machines are compared with."""
    pair = Pair("float32", prompts())
    families = {}
    for family in tiny_families.FAMILIES:
        found = tiny_families.logits(family, pair.engine.mesh)
        del found["grouped"]
        families[family] = {
            kind: [[float(f"{value:.6g}") for value in token] for token in of_kind.tolist()]
            for kind, of_kind in found.items()
        }
    texts: Texts = {name: {} for name in WAYS}
    for name, verifier, made in all_texts(pair, tuple(WAYS), tokens):
        texts[name][verifier] = made
    return {
        "machine": machine(),
        "tokens": tokens,
        "texts": texts,
        "families": families,
    }


def prompts() -> list[str]:
    """Return the prompts: a few beginnings of programs."""
    return read_prompts(DATA / "code_prompts.txt")[:3]


def print_table(rows: Sequence[Row]) -> None:
    """Print one line for each check."""
    table = Table("check", "", "equal texts", "first differences", "largest difference of logits")
    for row in rows:
        differences = ", ".join(
            f"token {found['place']} (gap {found['logit_gap']:.2g})"
            for found in row.get("differences", ())
        )
        table.add_row(
            row["check"],
            "passed" if row["passed"] else "FAILED",
            f"{row['equal']} of {row['texts']}" if "equal" in row else "",
            differences,
            f"{row['largest_difference']:.1e}" if "largest_difference" in row else "",
        )
    show(table)


def run(args: argparse.Namespace) -> int:
    """Run all checks, print and write them; return 1 if one fails."""
    check_destination(args.out)
    use_whole_device()
    cache_compilations()
    if args.store:
        save(args.out, _lines(stored(args.max_new_tokens)))
        return 0
    expected = read_json(EXPECTED)
    about = {"command": args.command, "machine": machine(), "expected": expected["machine"]}
    rows: list[Row] = []
    for row in checks(args.ways, min(args.max_new_tokens, expected["tokens"]), expected):
        rows.append(row)
        save(args.out, as_json(about | {"results": rows}))
    print_table(rows)
    return 0 if all(row["passed"] for row in rows) else 1


def checks(ways: Sequence[str], tokens: int, expected: dict[str, Any]) -> Iterator[Row]:
    """Make all checks, one after the other."""
    pair = Pair("float32", prompts())
    yield from check_families(pair.engine.mesh, expected["families"])
    yield from check_texts(pair, expected["texts"], ways, tokens)
    yield from report_narrow(Pair("bfloat16", prompts()), ways, tokens)


def _lines(expected: dict[str, Any]) -> str:
    """Write JSON with a line for each way and each family."""
    parts = {name: expected[name] for name in ("machine", "tokens")}
    text = ",\n".join(f" {json.dumps(name)}: {json.dumps(value)}" for name, value in parts.items())
    for name in ("texts", "families"):
        lines = [f"  {json.dumps(key)}: {json.dumps(own)}" for key, own in expected[name].items()]
        text += f",\n {json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n }"
    return f"{{\n{text}\n}}\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = Parser(prog="python -m experiments.gpu_correctness", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="JSON")
    parser.add_argument(
        "--ways", nargs="+", choices=tuple(WAYS), default=tuple(WAYS), help="default: all"
    )
    parser.add_argument("--max-new-tokens", type=int, default=48, help="of each text")
    parser.add_argument(
        "--store", action="store_true", help="write what this machine makes, as expected elsewhere"
    )
    return run_experiment("experiments.gpu_correctness", parser, run, argv)


if __name__ == "__main__":
    sys.exit(main())
