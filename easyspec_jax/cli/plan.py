"""`python -m easyspec_jax.plan`: will a pair of models fit a machine, and what will it gain?

No weights, no devices.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from easyspec_jax.cli.command import Parser, run_command
from easyspec_jax.cli.flags import add_shared
from easyspec_jax.errors import EasySpecError
from easyspec_jax.plan.machines import MACHINES
from easyspec_jax.plan.options import LP_SIZES, PlanConfig
from easyspec_jax.progress import bar, no_bar

PROGRAM = "easyspec_jax.plan"

WIDTH = 120
"""Columns of the tables if the output is not a terminal."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(PROGRAM, _parser(), _run, argv)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog=f"python -m {PROGRAM}", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--topology",
        required=True,
        metavar="T",
        help=f"v5e:2x4, v5p:2x2x2, h100:8, …; machines: {', '.join(MACHINES)}",
    )
    _add_models(parser.add_argument_group("models"))
    _add_decoding(parser.add_argument_group("decoding"))
    parser.add_argument(
        "--measure",
        action="store_true",
        help="measure the machine's figures on the devices that are here",
    )
    parser.add_argument(
        "--acceptance",
        type=Path,
        metavar="FILE",
        help="also find the best levels, width, groups and placement, by acceptance that "
        "experiments.acceptance or tune --json measured",
    )
    parser.add_argument(
        "--no-compile",
        dest="compile",
        action="store_false",
        help="count only: no memory of temporaries",
    )
    add_shared(parser, "--json")
    return parser


def _add_models(group: argparse._ArgumentGroup) -> None:
    for flag in ("--target-config", "--draft-config"):
        group.add_argument(
            flag,
            required=True,
            metavar="NAME|FILE|DIR",
            help="a bundled configuration such as Llama-3.3-70B (a wrong name lists them), a "
            "config.json, or a checkpoint directory, of which no weight is read",
        )
    add_shared(group, "--dtype", help="default: float32 on a CPU, else the target's")
    add_shared(group, "--weights", help="type to keep the target's matrices in (default: --dtype)")
    add_shared(group, "--draft-weights", help="likewise for the draft (default: --dtype)")
    add_shared(group, "--kv-dtype")
    add_shared(
        group,
        "--max-length",
        default=PlanConfig.max_length,
        help="the most tokens of a text, its prompt included (default: %(default)s)",
    )


def _add_decoding(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--mesh", help='"layer=4,tensor=2" (default: all devices, split for the groups)'
    )
    add_shared(group, "--num-speculative-tokens")
    add_shared(
        group,
        "--tree-width",
        default=PlanConfig.tree_width,
        help="tokens drafted at each depth (default: %(default)s, a chain)",
    )
    sizes = ", ".join(map(str, LP_SIZES))
    add_shared(
        group,
        "--lp-size",
        help="layers that run at once in the round that is compiled; the tables show it next to "
        f"{sizes} (default: %(default)s)",
    )
    add_shared(
        group,
        "--draft-tensor-parallel-size",
        help="draft parallelism of the round that is compiled; the tables show both "
        "(default: %(default)s)",
    )
    add_shared(group, "--mlp-lp-size")
    group.add_argument(
        "--refit",
        action="store_true",
        help="count a refit's projections in addition to the draft's own",
    )


def _run(args: argparse.Namespace) -> None:
    # Every field has a flag of its name.
    config = PlanConfig(**{field.name: getattr(args, field.name) for field in fields(PlanConfig)})
    if not config.measure:
        _hide_accelerators()

    # Not before the environment is ready: JAX reads it on import. And importing JAX takes a
    # second, which --help and a mistyped flag need not wait for.
    from rich.console import Console

    from easyspec_jax.plan.planning import plan
    from easyspec_jax.plan.report import as_dict, print_plan

    try:
        found = plan(
            args.target_config, args.draft_config, config, bar=no_bar if args.json else bar
        )
    except EasySpecError as error:
        # The flags of `target` and `draft` are --target-config and --draft-config.
        message = re.sub(r"`(target|draft)`", r"`\1_config`", str(error))
        raise EasySpecError(message) from None
    printed = as_dict(found)
    if args.json:
        print(json.dumps(printed))
    else:
        print_plan(printed, Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH))


def _hide_accelerators() -> None:
    """Configure JAX before it starts, so that planning for absent devices does not look for any."""
    quiet = {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_HOST_BOUNDS": "1,1,1",
        "TPU_LOG_DIR": "disabled",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        # Otherwise two commands at once would fight over a lock of a TPU that neither has.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
