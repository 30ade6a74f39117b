"""`python -m easyspec_jax.refit`: projections that keep a layer-parallel draft faithful, in closed form."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from easyspec_jax import demo
from easyspec_jax.cli.command import (
    Parser,
    cache_compilations,
    read_prompts,
    run_command,
)
from easyspec_jax.cli.flags import DEVICES, add_shared
from easyspec_jax.errors import EasySpecError
from easyspec_jax.options import SamplingParams, SpeculativeConfig, check_whole

PROGRAM = "easyspec_jax.refit"
TOKENS = 30_000
TEMPERATURE = 0.8
RIDGE = 0.03


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return run_command(PROGRAM, _parser(), _run, argv)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog=f"python -m {PROGRAM}", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--draft", type=Path, default=demo.DRAFT, metavar="DIR", help="default: the bundled one"
    )
    parser.add_argument("--out", type=Path, metavar="DIR",
                        help="where to keep it (default: refit/ in the draft's directory)")  # fmt: skip
    add_shared(parser, *DEVICES)
    groups = parser.add_argument_group("groups")
    add_shared(groups, "--lp-size", "--lp-strategy")
    groups.add_argument("--borders", default="measured", choices=("measured", "paper"),
                        help="which groups of --lp-size: those that cost least without more collectives or MLPs in a "
                        "row than by the paper's rule, or that rule (default: %(default)s)")  # fmt: skip
    add_shared(
        groups,
        "--mlp-lp-size",
        help="MLPs that run at once; on average, if borders are measured (default: %(default)s)",
    )
    texts = parser.add_argument_group("what to fit on")
    given = texts.add_mutually_exclusive_group()
    given.add_argument(
        "--text", type=Path, metavar="FILE", help="default: what the draft itself writes"
    )
    given.add_argument("--prompt-file", type=Path, metavar="FILE",
                       help="prompts, one a line, with what the draft answers; best are such as will come")  # fmt: skip
    texts.add_argument(
        "--chat", action="store_true", help="wrap each of them in the draft's chat template"
    )
    texts.add_argument(
        "--tokens", type=int, default=TOKENS, metavar="T", help="default: %(default)s"
    )
    texts.add_argument("--temperature", type=float, default=TEMPERATURE, metavar="T",
                       help="of what the draft writes (default: %(default)s)")  # fmt: skip
    texts.add_argument("--seed", type=int, default=0)
    fit = parser.add_argument_group("what to make of them")
    fit.add_argument("--ridge", type=float, default=RIDGE, metavar="R",
                     help="how strongly to hold on to the plain projections (default: %(default)s)")  # fmt: skip
    fit.add_argument("--distill", type=int, default=0, metavar="STEPS",
                     help="of gradient descent from there on, towards the exact draft's distribution "
                     "(default: %(default)s)")  # fmt: skip
    fit.add_argument("--resume", action="store_true",
                     help="begin with the refit that is there, not a fit; another --seed: other texts")  # fmt: skip
    return parser


def _run(args: argparse.Namespace) -> None:
    speculative = SpeculativeConfig(
        lp_size=args.lp_size, lp_strategy=args.lp_strategy, mlp_lp_size=args.mlp_lp_size
    )
    sampling = SamplingParams(args.temperature, seed=args.seed)
    check_whole("tokens", args.tokens, 1000)
    check_whole("distill", args.distill, 0)
    if args.chat and args.prompt_file is None:
        raise EasySpecError("--chat needs --prompt-file FILE; texts are taken as they are")
    if args.resume and not args.distill:
        raise EasySpecError("--resume goes on with a distillation: give --distill STEPS")
    if not 0 < args.ridge < float("inf"):
        raise EasySpecError(f"--ridge {args.ridge} must be a number above 0")

    prompts = None if args.prompt_file is None else read_prompts(args.prompt_file)

    # Imports JAX, which a mistyped flag need not wait for.
    from easyspec_jax.refit.refitting import refit

    cache_compilations()
    refit(args, speculative, sampling, prompts)
