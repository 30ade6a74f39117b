"""`python -m easyspec_jax.tune`: measure which way of decoding is fastest here, and store it."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

from easyspec_jax.cli.command import (
    Parser,
    cache_compilations,
    read_prompts,
    run_command,
)
from easyspec_jax.cli.flags import DEVICES, TYPES, add_shared, pair_options_of
from easyspec_jax.errors import EasySpecError
from easyspec_jax.files import check_writable, write_whole
from easyspec_jax.options import DraftTensorParallelSize
from easyspec_jax.tune.draw import draw
from easyspec_jax.tune.drawing import check_drawing
from easyspec_jax.tune.options import TuneConfig

PROGRAM = "easyspec_jax.tune"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(PROGRAM, _parser(), _run, argv)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog=f"python -m {PROGRAM}", description=__doc__, allow_abbrev=False)
    models = parser.add_argument_group("models and devices")
    models.add_argument("--target", metavar="DIR", help="default: the bundled pair")
    models.add_argument(
        "--draft",
        metavar="DIR",
        help="a smaller model of the same family; the choice is stored in it",
    )
    tries = '"8" tries its splits, "layer=4,tensor=2" only that (default: %(default)s)'
    add_shared(models, "--mesh", help=tries)
    add_shared(models, *DEVICES[1:], *TYPES, "--max-length")
    space = parser.add_argument_group("candidates")
    space.add_argument(
        "--lp-sizes",
        type=int,
        nargs="+",
        metavar="N",
        help="layers that run at once, 1 for an ordinary draft (default: those of 1 2 3 4 7 that "
        "fit, and sizes with a refit)",
    )
    space.add_argument(
        "--mlp-lp-sizes",
        type=int,
        nargs="+",
        default=[1, 2],
        metavar="M",
        help="MLPs of a group that run at once, where devices share them (default: 1 2)",
    )
    space.add_argument(
        "--tree-widths",
        type=int,
        nargs="+",
        default=[1, 4, 8],
        metavar="W",
        help="tokens drafted at each depth, 1 for a chain (default: 1 4 8)",
    )
    space.add_argument(
        "--max-levels",
        type=int,
        default=8,
        metavar="N",
        help="depth of the deepest draft of a round (default: %(default)s)",
    )
    space.add_argument(
        "--draft-tensor-parallel-sizes",
        nargs="+",
        default=["all", "1"],
        choices=get_args(DraftTensorParallelSize),
        help="default: both",
    )
    sample = parser.add_argument_group("measuring")
    sample.add_argument(
        "--prompt-file",
        metavar="FILE",
        help="one prompt a line, to measure on (default: a few of our own)",
    )
    sample.add_argument(
        "--chat", action="store_true", help="wrap each prompt of --prompt-file in the chat template"
    )
    sample.add_argument(
        "--max-new-tokens",
        type=int,
        default=64,
        metavar="M",
        help="length of each text (default: %(default)s)",
    )
    sample.add_argument(
        "--confirm",
        type=int,
        default=3,
        metavar="K",
        help="how many of the best predictions to run (default: %(default)s)",
    )
    sample.add_argument(
        "--seconds",
        type=float,
        default=150,
        metavar="S",
        help="time for measuring; what is not reached is left out (default: %(default)s)",
    )
    output = parser.add_argument_group("output")
    add_shared(output, "--json")
    output.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw step time against acceptance, as PNG"
    )
    output.add_argument(
        "--no-store", action="store_true", help="do not remember the choice for --lp-strategy auto"
    )
    return parser


def _run(args: argparse.Namespace) -> None:
    config = TuneConfig(
        mesh=args.mesh,
        max_new_tokens=args.max_new_tokens,
        lp_sizes=args.lp_sizes,
        mlp_lp_sizes=args.mlp_lp_sizes,
        tree_widths=args.tree_widths,
        max_levels=args.max_levels,
        draft_tensor_parallel_sizes=args.draft_tensor_parallel_sizes,
        confirm=args.confirm,
        seconds=args.seconds,
    )
    # After the values, which are checked already: standard input may take its time.
    if args.prompt_file is not None:
        config = replace(config, prompts=read_prompts(args.prompt_file), chat=args.chat)
    elif args.chat:
        raise EasySpecError(
            "--chat needs --prompt-file FILE; the built-in prompts use the chat template if there "
            "is one"
        )
    if args.plot is not None:
        check_drawing()
        check_writable(args.plot)

    # All of these import JAX, which a mistyped flag need not wait for.
    from rich.console import Console

    from easyspec_jax.cli.console import print_note
    from easyspec_jax.progress import bar, no_bar
    from easyspec_jax.tune.report import as_dict, print_tuned
    from easyspec_jax.tune.tuning import open_pair, store, tune

    cache_compilations()
    pair = open_pair(args.target, args.draft, max_length=args.max_length, **pair_options_of(args))
    tuned = tune(pair, config, bar=no_bar if args.json else bar)
    found = as_dict(tuned)
    if args.plot is not None:
        write_whole(args.plot, draw(found))
    if args.json:
        print(json.dumps(found))
    else:
        print_tuned(found, Console(highlight=False, width=None if sys.stdout.isatty() else 120))
    if not args.no_store:
        store(tuned, print_note)
