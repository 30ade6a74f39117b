"""The flags that say how to draft and verify, and their SpeculativeConfig."""

import argparse
from typing import Literal, get_args

from easyspec_jax.cli.command import Parser
from easyspec_jax.cli.flags import add_shared
from easyspec_jax.errors import EasySpecError
from easyspec_jax.options import Method, SpeculativeConfig, Verifier

AUTO = "auto"
TUNED = (
    "--method", "--num-speculative-tokens", "--tree-width", "--tree-nodes", "--lp-size",
    "--mlp-lp-size", "--refit", "--no-refit", "--no-calibration", "--draft-tensor-parallel-size",
    "--prompt-lookup", "--prompt-lookup-max", "--prompt-lookup-min", "--prompt-lookup-corpus",
    "--confidence-threshold",
)  # fmt: skip
"""Flags that --lp-strategy auto sets itself and that conflict with it."""


def speculative_of(args: argparse.Namespace) -> SpeculativeConfig:
    """Build a SpeculativeConfig from the flags. Raises EasySpecError for invalid values."""
    return SpeculativeConfig(
        method=args.method,
        num_speculative_tokens=args.num_speculative_tokens,
        tree_width=args.tree_width,
        tree_nodes=args.tree_nodes,
        lp_size=args.lp_size,
        lp_strategy=args.lp_strategy,
        mlp_lp_size=args.mlp_lp_size,
        refit=args.refit,
        calibration=not args.no_calibration,
        draft_tensor_parallel_size=args.draft_tensor_parallel_size,
        verifier=args.verifier,
        bit_stable=args.bit_stable,
        prompt_lookup=args.prompt_lookup,
        prompt_lookup_max=args.prompt_lookup_max,
        prompt_lookup_min=args.prompt_lookup_min,
        prompt_lookup_corpus=args.prompt_lookup_corpus,
        adapt={"on": True, "off": False}.get(args.adapt, "auto"),
        confidence_threshold=args.confidence_threshold,
    )


def check_tuned(args: argparse.Namespace, given: set[str]) -> None:
    """Refuse flags that --lp-strategy auto sets itself; arguments and errors as check_flags."""
    # Tuning chooses these flags, so that giving one as well is a contradiction.
    contrary = [flag for flag in TUNED if flag in given]
    if args.lp_strategy == AUTO and contrary:
        raise EasySpecError(
            f"--lp-strategy auto chooses {contrary[0]} itself: leave out one of the two"
        )


def add_speculation(parser: Parser) -> None:
    """Add the flags that say how to draft and verify."""
    default = SpeculativeConfig()
    drafting = parser.add_argument_group("speculation")
    drafting.add_argument(
        "--method",
        default=default.method,
        choices=get_args(Method),
        help="default: %(default)s",
    )
    add_shared(drafting, "--num-speculative-tokens", "--tree-width")
    drafting.add_argument(
        "--tree-nodes",
        type=int,
        metavar="M",
        help="drafted nodes that the target verifies, the likeliest (default: all)",
    )
    strategy = (
        'explicit groups, such as "0,1-3,4-7x2,8", where x2 runs two MLPs at a time; or "auto": '
        "whatever easyspec_jax.tune found fastest, which runs first if it has not yet"
    )
    add_shared(drafting, "--lp-size")
    add_shared(drafting, "--lp-strategy", help=strategy)
    add_shared(
        drafting,
        "--mlp-lp-size",
        help="MLPs of a group that run at once, unless --lp-strategy says so (default: "
        "%(default)s)",
    )
    refit = drafting.add_mutually_exclusive_group()
    refit.add_argument(
        "--refit",
        default=default.refit,
        metavar="DIR",
        help="projections fitted to these groups (default: the draft directory's, if any)",
    )
    refit.add_argument(
        "--no-refit", dest="refit", action="store_const", const="none", help="use none"
    )
    drafting.add_argument(
        "--no-calibration", action="store_true", help="keep the fuzzy KV of accepted tokens"
    )
    add_shared(drafting, "--draft-tensor-parallel-size")
    drafting.add_argument(
        "--prompt-lookup",
        action="store_true",
        help="draft what followed the text's last tokens where they stood before, in addition to "
        "the draft model",
    )
    drafting.add_argument(
        "--prompt-lookup-max",
        type=int,
        default=default.prompt_lookup_max,
        metavar="N",
        help="tokens at the end of the text that this, or --method ngram, looks for at most "
        "(default: %(default)s)",
    )
    drafting.add_argument(
        "--prompt-lookup-min",
        type=int,
        default=default.prompt_lookup_min,
        metavar="N",
        help="tokens that must stand there at least (default: %(default)s)",
    )
    drafting.add_argument(
        "--prompt-lookup-corpus",
        metavar="FILE",
        help="text in which this, or --method ngram, looks as well, such as the code of a project",
    )
    drafting.add_argument(
        "--adapt",
        choices=("auto", "on", "off"),
        help="choose for every round whether to draft, and how many levels, by what was accepted "
        "lately; on also samples coupled (default: auto, where the text stays the same, or as "
        "tuned)",
    )
    drafting.add_argument(
        "--confidence-threshold",
        type=_probability_or_auto,
        default=default.confidence_threshold,
        metavar="P",
        help="draft no further where no path has this probability under the draft; auto learns it "
        "while decoding, and samples coupled (default: %(default)g, all levels)",
    )
    drafting.add_argument(
        "--verifier",
        choices=get_args(Verifier),
        help="default: rejection for chains, coupled for trees, --method ngram, --adapt on and "
        "--confidence-threshold auto",
    )
    drafting.add_argument(
        "--bit-stable",
        action="store_true",
        help="in any type, the greedy and coupled texts of plain decoding with this flag; chains",
    )


def _probability_or_auto(text: str) -> float | Literal["auto"]:
    """Read a confidence threshold."""
    if text == "auto":
        return "auto"
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor auto") from None
