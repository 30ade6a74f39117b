"""The flags of `python -m easyspec_jax.generate`, their conflicts, and their options."""

import argparse
import re
from typing import get_args

from easyspec_jax import demo
from easyspec_jax.cli.command import Parser, read_prompts
from easyspec_jax.cli.flags import DEVICES, TYPES, add_shared
from easyspec_jax.errors import EasySpecError
from easyspec_jax.options import Method, SamplingParams, SpeculativeConfig, Verifier

AUTO = "auto"
TUNED = (
    "--method", "--num-speculative-tokens", "--tree-width", "--tree-nodes", "--lp-size",
    "--mlp-lp-size", "--refit", "--no-refit", "--no-calibration", "--draft-tensor-parallel-size",
)  # fmt: skip
"""Flags that --lp-strategy auto sets itself and that conflict with it."""


def generate_parser(program: str, description: str) -> Parser:
    """Return a parser of all flags. `check_flags` finds those that do not go together."""
    parser = Parser(prog=f"python -m {program}", description=description, allow_abbrev=False)
    _add_models(parser)
    _add_hosts(parser)
    _add_prompts(parser)
    _add_speculation(parser)
    _add_sampling(parser)
    _add_output(parser)
    return parser


def sampling_of(args: argparse.Namespace) -> SamplingParams:
    """Build SamplingParams from the flags. Raises EasySpecError for invalid values."""
    stop = tuple(_unescaped(text) for text in args.stop)
    return SamplingParams(
        args.temperature, args.top_k, args.top_p, args.seed, args.max_new_tokens, stop
    )


def _unescaped(text: str) -> str:
    r"""Replace \n, \t, \r and \\ by a new line, a tab, a carriage return and a backslash."""
    # Shells pass a backslash and an n as two characters.
    meant = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}
    return re.sub(r"\\([ntr\\])", lambda found: meant[found[1]], text)


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
    )


def prompts_of(args: argparse.Namespace) -> list[str]:
    """Return the prompts to complete; none for a conversation.

    Raises:
        EasySpecError: No prompt is given, or its file cannot be read.
    """
    if args.prompt is not None:
        return args.prompt
    if args.prompt_file is None:
        # --chat without a prompt is a conversation, unless output that is not one is asked for.
        if args.chat and not (args.json or args.compare or args.no_stream):
            return []
        if args.target is None:
            return [demo.PROMPT]
        raise EasySpecError(
            "no prompt; give --prompt TEXT or --prompt-file FILE, or only --chat for a conversation"
        )
    return read_prompts(args.prompt_file)


def check_flags(args: argparse.Namespace, given: set[str]) -> None:
    """Refuse flags that do not go together.

    Args:
        args: All values, defaults included.
        given: The flags that the command line spells out, see `flags_in`.

    Raises:
        EasySpecError: Two of them conflict, or one needs another.
    """
    # Tuning chooses these flags itself, so that giving one as well is a contradiction.
    contrary = [flag for flag in TUNED if flag in given]
    if args.lp_strategy == AUTO and contrary:
        raise EasySpecError(
            f"--lp-strategy auto chooses {contrary[0]} itself: leave out one of the two"
        )
    if (args.prompts is None) != (args.out is None):
        raise EasySpecError("--prompts FILE and --out FILE go together")
    if args.system is not None and not args.chat:
        raise EasySpecError("--system needs --chat")
    printing = [flag for flag in ("--compare", "--json", "--no-stream") if flag in given]
    if args.prompts is not None and printing:
        raise EasySpecError(f"a job prints no texts: leave out {printing[0]} or --prompts")
    # Alone these flags would be ignored, and every process would decode by itself.
    needy = [flag for flag in ("--coordinator", "--num-processes", "--process-id") if flag in given]
    if needy and not args.distributed:
        raise EasySpecError(f"{needy[0]} needs --distributed")
    # Each process would time differently and choose for itself.
    if args.distributed and args.lp_strategy == AUTO:
        raise EasySpecError(
            "--lp-strategy auto measures, and --distributed processes would choose differently: "
            "give the drafting flags"
        )
    if args.distributed and args.prompts is not None:
        raise EasySpecError(
            "--distributed runs no jobs: give --prompt TEXT or --prompt-file FILE instead of "
            "--prompts"
        )


def _add_models(parser: Parser) -> None:
    models = parser.add_argument_group("models and devices")
    models.add_argument(
        "--target",
        metavar="DIR",
        help="checkpoint of the model to decode, converted or as from Hugging Face (default: a "
        "small bundled pair that completes Python)",
    )
    models.add_argument("--draft", metavar="DIR", help="a smaller model of the same family")
    add_shared(models, *DEVICES, *TYPES, "--max-length")


def _add_hosts(parser: Parser) -> None:
    hosts = parser.add_argument_group("several hosts", "The same command on every one of them.")
    hosts.add_argument(
        "--distributed",
        action="store_true",
        help="be one of several processes: as the cluster says, or as the flags below do",
    )
    hosts.add_argument(
        "--coordinator", metavar="HOST:PORT", help="address of process 0 that all can reach"
    )
    hosts.add_argument("--num-processes", type=int, metavar="N")
    hosts.add_argument("--process-id", type=int, metavar="I", help="0 to N - 1; process 0 prints")


def _add_prompts(parser: Parser) -> None:
    prompts = parser.add_argument_group("prompts")
    source = prompts.add_mutually_exclusive_group()
    source.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="may be repeated (default: an example, for the bundled pair)",
    )
    source.add_argument(
        "--prompt-file", metavar="FILE", help="one prompt a line (-: standard input)"
    )
    source.add_argument(
        "--prompts",
        metavar="FILE",
        help="a job: JSON lines with id, prompt or messages, and sampling (-: standard input)",
    )
    prompts.add_argument(
        "--out",
        metavar="FILE",
        help="file for a job's results; a job that was stopped resumes from it",
    )
    prompts.add_argument(
        "--batch-size",
        type=int,
        default=1,
        metavar="B",
        help="prompts decoded together (default: %(default)s)",
    )
    prompts.add_argument(
        "--chat",
        action="store_true",
        help="wrap each prompt in the checkpoint's chat template; without a prompt, hold a "
        "conversation",
    )
    prompts.add_argument(
        "--system", metavar="TEXT", help="begin every conversation with this system message"
    )


def _add_speculation(parser: Parser) -> None:
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
        "--verifier",
        choices=get_args(Verifier),
        help="default: rejection for chains, coupled for trees",
    )


def _add_sampling(parser: Parser) -> None:
    sampling = parser.add_argument_group("sampling")
    default = SamplingParams()
    sampling.add_argument(
        "--temperature",
        type=float,
        default=default.temperature,
        metavar="T",
        help="0 is greedy (default: %(default)s)",
    )
    sampling.add_argument("--top-k", type=int, default=default.top_k, metavar="K")
    sampling.add_argument("--top-p", type=float, default=default.top_p, metavar="P")
    sampling.add_argument("--seed", type=int, default=default.seed, help="prompt i uses seed + i")
    sampling.add_argument(
        "--max-new-tokens",
        type=int,
        default=default.max_new_tokens,
        metavar="M",
        help="default: %(default)s",
    )
    sampling.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help=r"end the text before this, where \n is a new line; may be repeated",
    )


def _add_output(parser: Parser) -> None:
    output = parser.add_argument_group("output")
    output.add_argument(
        "--no-stream", action="store_true", help="print each text when it is complete"
    )
    add_shared(output, "--json", help="print one JSON object a prompt, and no text")
    output.add_argument(
        "--compare",
        action="store_true",
        help="decode each prompt plainly too, and show what was gained",
    )
    output.add_argument(
        "--verbose", action="store_true", help="show the mesh, the groups and each device's memory"
    )
