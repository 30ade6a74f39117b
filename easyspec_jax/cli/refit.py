"""`python -m easyspec_jax.refit`: fit projections that keep a layer-parallel draft faithful."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from easyspec_jax import demo
from easyspec_jax.cli.command import (
    Parser,
    cache_compilations,
    read_prompts,
    run_command,
)
from easyspec_jax.cli.flags import DEVICES, add_shared, devices_of
from easyspec_jax.draft.grouping import format_layout
from easyspec_jax.errors import EasySpecError
from easyspec_jax.options import SpeculativeConfig
from easyspec_jax.progress import bar
from easyspec_jax.refit import RefitConfig
from easyspec_jax.refit.options import Borders

if TYPE_CHECKING:
    from easyspec_jax.engine.engine import Engine
    from easyspec_jax.refit import Refitted

PROGRAM = "easyspec_jax.refit"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command on its arguments and return its exit code."""
    return run_command(PROGRAM, _parser(), _run, argv)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog=f"python -m {PROGRAM}", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--draft", type=Path, default=demo.DRAFT, metavar="DIR", help="default: the bundled one"
    )
    parser.add_argument(
        "--target",
        type=Path,
        metavar="DIR",
        help="the target, to answer the prompts of --prompt-file instead of the draft",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="where to keep the refit (default: refit/ in the draft's directory)",
    )
    add_shared(parser, *DEVICES)
    _add_groups(parser.add_argument_group("groups"))
    _add_texts(parser.add_argument_group("texts to fit on"))
    _add_method(parser.add_argument_group("method"))
    return parser


def _add_groups(groups: argparse._ArgumentGroup) -> None:
    add_shared(groups, "--lp-size", "--lp-strategy")
    groups.add_argument(
        "--borders",
        default=RefitConfig.borders,
        choices=get_args(Borders),
        help="measured: choose the groups that cost least, with no more collectives and no more "
        "MLPs in a row than the paper's rule has; paper: keep that rule (default: %(default)s)",
    )
    add_shared(
        groups,
        "--mlp-lp-size",
        help="MLPs that run at once; on average, if borders are measured (default: %(default)s)",
    )


def _add_texts(texts: argparse._ArgumentGroup) -> None:
    given = texts.add_mutually_exclusive_group()
    given.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help="a file to cut texts from (default: the draft writes them)",
    )
    given.add_argument(
        "--prompt-file",
        type=Path,
        metavar="FILE",
        help="one prompt a line, for the draft or --target to answer; ideally like those you will "
        "ask",
    )
    texts.add_argument(
        "--chat", action="store_true", help="wrap each prompt in the draft's chat template"
    )
    texts.add_argument(
        "--tokens",
        type=int,
        default=RefitConfig.tokens,
        metavar="T",
        help="tokens of all texts together (default: %(default)s)",
    )
    texts.add_argument(
        "--temperature",
        type=float,
        default=RefitConfig.temperature,
        metavar="T",
        help="at which texts are written or prompts answered (default: %(default)s)",
    )
    texts.add_argument("--seed", type=int, default=RefitConfig.seed)


def _add_method(method: argparse._ArgumentGroup) -> None:
    method.add_argument(
        "--ridge",
        type=float,
        default=RefitConfig.ridge,
        metavar="R",
        help="how strongly to hold on to the plain projections (default: %(default)s)",
    )
    method.add_argument(
        "--distill",
        type=int,
        default=RefitConfig.distill,
        metavar="STEPS",
        help="steps of gradient descent after the fit, towards the exact draft's distribution "
        "(default: %(default)s)",
    )
    method.add_argument(
        "--resume",
        action="store_true",
        help="begin with the refit on disk instead of a fit; give another --seed for other texts",
    )


def _run(args: argparse.Namespace) -> None:
    # RefitConfig takes prompts, so only the command can name the flag of their file.
    if args.chat and args.prompt_file is None:
        raise EasySpecError("--chat needs --prompt-file FILE; texts are taken as they are")
    if args.target is not None and args.prompt_file is None:
        raise EasySpecError("--target needs --prompt-file FILE with the prompts to answer")
    config = RefitConfig(
        lp_size=args.lp_size,
        lp_strategy=args.lp_strategy,
        mlp_lp_size=args.mlp_lp_size,
        borders=args.borders,
        text=args.text,
        tokens=args.tokens,
        temperature=args.temperature,
        seed=args.seed,
        ridge=args.ridge,
        distill=args.distill,
        resume=args.resume,
        out=args.out,
    )
    # After the values, which are checked already: standard input may take its time.
    if args.prompt_file is not None:
        prompts = read_prompts(args.prompt_file)
        answered_by = "draft" if args.target is None else "target"
        config = replace(config, prompts=prompts, answered_by=answered_by, chat=args.chat)

    # Imports JAX, which a mistyped flag need not wait for.
    from easyspec_jax.refit import refit

    cache_compilations()
    _print(refit(_open(args, config), config, bar=bar))


def _open(args: argparse.Namespace, config: RefitConfig) -> "Engine":
    """Open the draft on the mesh on which it will draft, with its target if that is given."""
    from easyspec_jax.checkpoint.directory import open_checkpoint
    from easyspec_jax.engine.pair import open_model
    from easyspec_jax.parallel.mesh import parse_mesh

    draft = open_checkpoint(args.draft, allow_links=args.allow_links)
    layout = config.layout(draft.config.num_hidden_layers)
    # A bare number is split for these groups; plain decoding would split it for single layers.
    shape = parse_mesh(args.mesh, group_size=layout.lp_size)
    devices = devices_of(args)
    devices["mesh"] = f"layer={shape.layer},tensor={shape.tensor}"
    if args.target is not None:
        speculative = replace(config.speculative_config(), refit="none")
        return open_model(args.target, args.draft, speculative=speculative, **devices)
    return open_model(args.draft, speculative=SpeculativeConfig(method="vanilla"), **devices)


def _print(fitted: "Refitted") -> None:
    """Print a table of the overlaps, the groups and the file on stderr."""
    from rich.console import Console
    from rich.table import Table

    depths = len(fitted.overlaps["refit"])
    headings = [f"depth {depth}" for depth in range(1, depths + 1)]
    table = Table("draft", *headings, box=None, pad_edge=False)
    for name, overlaps in fitted.overlaps.items():
        table.add_row(name, *(f"{overlap:.3f}" for overlap in overlaps))
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print("Σ min(p fuzzy, p exact) on texts that were not fitted on")
    console.print(table)
    before, after = format_layout(fitted.before), format_layout(fitted.after)
    console.print(f"[dim]—[/] groups {before}, now {after}")
    console.print(f"[dim]—[/] {fitted.path}: {fitted.nbytes / 2**20:.1f} MiB")
