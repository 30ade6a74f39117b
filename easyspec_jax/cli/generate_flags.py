"""The flags of `python -m easyspec_jax.generate`, and their conflicts."""

import argparse

from easyspec_jax import demo
from easyspec_jax.cli.command import Parser, read_prompts
from easyspec_jax.cli.flags import DEVICES, TYPES, add_shared, size_of
from easyspec_jax.cli.sampling_flags import add_sampling
from easyspec_jax.cli.speculation_flags import AUTO, add_speculation, check_tuned
from easyspec_jax.errors import EasySpecError
from easyspec_jax.options import check_whole

CONVERSATION_PREFIXES = 512 << 20
"""Default of --prefix-cache for a conversation."""


def generate_parser(program: str, description: str) -> Parser:
    """Return a parser of all flags. `check_flags` finds those that do not go together."""
    parser = Parser(prog=f"python -m {program}", description=description, allow_abbrev=False)
    add_models(parser)
    _add_hosts(parser)
    _add_prompts(parser)
    add_speculation(parser)
    add_sampling(parser)
    _add_output(parser)
    return parser


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
    check_tuned(args, given)
    if (args.prompts is None) != (args.out is None):
        raise EasySpecError("--prompts FILE and --out FILE go together")
    check_whole("batch_size", args.batch_size, 1)
    if args.system is not None and not args.chat:
        raise EasySpecError("--system needs --chat")
    if args.system == "":
        raise EasySpecError("--system '' is empty; leave it out")
    printing = [flag for flag in ("--compare", "--json", "--no-stream") if flag in given]
    asked = [flag for flag in ("--logprobs", "--prompt-logprobs") if flag in given]
    if asked and not args.json and args.prompts is None:
        raise EasySpecError(f"{asked[0]} needs --json or --prompts FILE")
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


def add_models(parser: Parser) -> None:
    """Add the flags that say which pair to open, where and in what types."""
    models = parser.add_argument_group("models and devices")
    models.add_argument(
        "--target",
        metavar="DIR",
        help="checkpoint of the model to decode, converted or as from Hugging Face (default: a "
        "small bundled pair that completes Python)",
    )
    models.add_argument("--draft", metavar="DIR", help="a smaller model of the same family")
    add_shared(models, *DEVICES, *TYPES, "--max-length")
    models.add_argument(
        "--prefix-cache",
        type=size_of,
        metavar="SIZE",
        help="memory, such as 2GiB, on each device for keys and values of earlier texts, so that a "
        "prompt that begins like one of them prefills only the rest; 0 keeps none (default: "
        f"{CONVERSATION_PREFIXES >> 20}MiB for a conversation or a server, else 0)",
    )


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


def _add_logprobs(output: argparse._ArgumentGroup) -> None:
    for name, whose in (("logprobs", "new tokens"), ("prompt-logprobs", "the prompt's tokens")):
        output.add_argument(
            f"--{name}",
            type=int,
            metavar="K",
            help=f"with --json: log-probabilities of {whose} under the target, and of the K "
            "likeliest ones in their places",
        )


def _add_output(parser: Parser) -> None:
    output = parser.add_argument_group("output")
    output.add_argument(
        "--no-stream", action="store_true", help="print each text when it is complete"
    )
    add_shared(output, "--json", help="print one JSON object a prompt, and no text")
    _add_logprobs(output)
    output.add_argument(
        "--compare",
        action="store_true",
        help="decode each prompt plainly too, and show what was gained",
    )
    output.add_argument(
        "--verbose", action="store_true", help="show the mesh, the groups and each device's memory"
    )
