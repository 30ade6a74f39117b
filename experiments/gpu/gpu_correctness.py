"""Compare a device with a CPU: `python -m experiments.gpu_correctness --out JSON`.

In float32 every method and verifier must make the tokens that a CPU made of the same prompts, and
tiny models of every family must have the CPU's logits. The CPU's are in data/gpu_expected.json, by
--store. In bfloat16 it is only reported where texts leave plain decoding's, and how close a tie
that was. The exit code is 1 if a check fails.
"""

import argparse
import json
import sys
from collections.abc import Sequence
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
"""Of the logits of two tokens between which float32 may choose differently."""

LARGEST_DIFFERENCE = 1e-3
"""Between two devices' logits of a tiny model in float32."""

Row = dict[str, Any]
Texts = dict[str, dict[str, list[list[int]]]]
"""Generated ids of each prompt, by way and verifier."""


def sampling(verifier: str, tokens: int) -> SamplingParams:
    """Return how tokens are chosen with a verifier: "greedy", "coupled" or "rejection"."""
    chosen = SamplingParams() if verifier == "greedy" else SAMPLED
    return replace(chosen, max_new_tokens=tokens)


def verifiers(way: SpeculativeConfig) -> tuple[str, ...]:
    """Name the verifiers that a way can have. Plain decoding verifies nothing, so one is enough."""
    return ("greedy", "coupled") if way.method == "vanilla" else ("greedy", "coupled", "rejection")


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


def all_texts(pair: Pair, ways: Sequence[str], tokens: int) -> Texts:
    """Complete all prompts in every way with every verifier."""
    found: Texts = {}
    with bar("Generating", sum(len(verifiers(WAYS[name])) for name in ways)) as advance:
        for name in ways:
            found[name] = {}
            for verifier in verifiers(WAYS[name]):
                found[name][verifier] = pair.texts(WAYS[name], verifier, tokens)
                advance(1)
    return found


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


def check_texts(pair: Pair, expected: Texts, ways: Sequence[str], tokens: int) -> list[Row]:
    """Check every way and verifier against a CPU's texts, of which the first tokens are made.

    A greedy text may leave the CPU's where two logits nearly tie. A sampled one may not: the noise
    makes ties unlikely, and a gap of logits says nothing about it.
    """
    rows = []
    for way, by_verifier in all_texts(pair, ways, tokens).items():
        for verifier, texts in by_verifier.items():
            first = [text[:tokens] for text in expected[way][verifier]]
            row = compared(pair, texts, first)
            tied = all(found["logit_gap"] < LARGEST_GAP for found in row["differences"])
            passed = not row["differences"] or (verifier == "greedy" and tied)
            rows.append({"check": f"{way}, {verifier}", "passed": passed} | row)
    return rows


def check_families(mesh: Mesh, expected: dict[str, Any]) -> list[Row]:
    """Check the logits of tiny models against a CPU's."""
    rows = []
    for family, stored in expected.items():
        for kind, found in tiny_families.logits(family, mesh).items():
            # A group that runs in order computes what its layers do.
            reference = np.asarray(stored["fuzzy" if kind == "fuzzy" else "exact"], np.float32)
            difference = float(np.max(np.abs(found - reference)))
            passed = difference <= LARGEST_DIFFERENCE
            rows.append(
                {"check": f"{family}, {kind}", "passed": passed, "largest_difference": difference}
            )
    return rows


def report_narrow(pair: Pair, ways: Sequence[str], tokens: int) -> list[Row]:
    """Report where greedy texts in bfloat16 leave plain decoding's. Nothing can fail."""
    plain = pair.texts(WAYS["vanilla"], "greedy", tokens)
    rows = []
    for name in ways:
        if name != "vanilla":
            row = compared(pair, pair.texts(WAYS[name], "greedy", tokens), plain)
            rows.append({"check": f"{name}, greedy, {pair.dtype}", "passed": True} | row)
    return rows


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
    return {
        "machine": machine(),
        "tokens": tokens,
        "texts": all_texts(pair, tuple(WAYS), tokens),
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
    tokens = min(args.max_new_tokens, expected["tokens"])
    pair = Pair("float32", prompts())
    rows = check_families(pair.engine.mesh, expected["families"])
    rows += check_texts(pair, expected["texts"], args.ways, tokens)
    rows += report_narrow(Pair("bfloat16", prompts()), args.ways, tokens)
    print_table(rows)
    about = {"command": args.command, "machine": machine(), "expected": expected["machine"]}
    save(args.out, as_json(about | {"results": rows}))
    return 0 if all(row["passed"] for row in rows) else 1


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
