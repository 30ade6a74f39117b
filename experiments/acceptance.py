"""Acceptance of exact, fuzzy and uncalibrated drafts: `python -m experiments.acceptance`.

Prints a table and writes JSON. No figure here is a time.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from easyspec_jax import EasySpecError, SamplingParams, SpeculativeConfig, demo, open_model
from easyspec_jax.command import Parser, read_prompts
from easyspec_jax.draft.grouping import format_groups

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Variant:
    """A way to draft; lp_size 1 is the exact draft, whose KV needs no calibration."""

    lp_size: int
    calibration: bool

    @property
    def name(self) -> str:
        if self.lp_size == 1:
            return "exact"
        return f"N = {self.lp_size}" + ("" if self.calibration else ", no calibration")


def variants(lp_sizes: list[int]) -> list[Variant]:
    """Each size with and without calibration."""
    return [Variant(n, calibration) for n in lp_sizes for calibration in ((True, False) if n > 1 else (True,))]


def measure(args: argparse.Namespace, variant: Variant, prompts: list[str]) -> dict[str, Any]:
    """Acceptance of one variant over all prompts."""
    speculative = SpeculativeConfig(
        method="easyspec",
        num_speculative_tokens=args.num_speculative_tokens,
        lp_size=variant.lp_size,
        calibration=variant.calibration,
    )
    engine = open_model(args.target, args.draft, mesh=args.mesh, platform=args.platform, speculative=speculative)
    sampling = SamplingParams(temperature=args.temperature, seed=args.seed, max_new_tokens=args.max_new_tokens)
    completions = list(engine.generate(prompts, sampling, chat=args.chat))
    stats = sum((completion.stats for completion in completions[1:]), completions[0].stats)
    return {
        "draft": variant.name,
        "groups": format_groups(engine.groups),
        "rounds": stats.rounds,
        "drafted": stats.drafted,
        "accepted": stats.accepted,
        "acceptance_rate": stats.acceptance_rate,
        "mean_acceptance_length": stats.mean_acceptance_length,
        "accepted_per_position": stats.accepted_per_position,
    }


def main() -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--target", help="default: the bundled pair")
    parser.add_argument("--draft")
    parser.add_argument("--mesh", default="1")
    parser.add_argument("--platform")
    parser.add_argument("--lp-sizes", type=int, nargs="+", default=[1, 2, 3, 4, 5, 6])
    parser.add_argument("--num-speculative-tokens", type=int, default=5)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--chat", action="store_true")
    parser.add_argument("--prompt-file", type=Path, help="default: questions, or code for the bundled pair")
    parser.add_argument(
        "--out", type=Path, help="default: results/acceptance.json, or …_demo.json for the bundled pair"
    )
    try:
        run(parser.parse_args())
    except (EasySpecError, OSError) as error:
        print(f"experiments.acceptance: error: {error}", file=sys.stderr)
        return 2
    return 0


def run(args: argparse.Namespace) -> None:
    """Measures every variant, prints the table and writes the JSON."""
    prompt_file = args.prompt_file or HERE / ("prompts.txt" if args.target else "code_prompts.txt")
    prompts = read_prompts(prompt_file)
    table = Table("draft", "accepted / drafted", "acceptance rate", "tokens a round", "accepted per position")
    rows = []
    for variant in variants(args.lp_sizes):
        rows.append(row := measure(args, variant, prompts))
        table.add_row(
            row["draft"],
            f"{row['accepted']} / {row['drafted']}",
            f"{row['acceptance_rate']:.3f}",
            f"{row['mean_acceptance_length']:.2f}",
            " ".join(map(str, row["accepted_per_position"])),
        )
    Console().print(table)
    settings = {
        name: value for name, value in vars(args).items() if name not in ("target", "draft", "out", "prompt_file")
    }
    bundled = {"target": demo.TARGET, "draft": demo.DRAFT}
    models = {name: Path(getattr(args, name) or path).name for name, path in bundled.items()}
    out = args.out or HERE / "results" / ("acceptance.json" if args.target else "acceptance_demo.json")
    out.write_text(json.dumps({**models, **settings, "prompts": prompts, "results": rows}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
