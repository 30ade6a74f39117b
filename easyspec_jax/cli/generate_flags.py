"""The flags of `python -m easyspec_jax.generate`, their conflicts, and their options."""

import argparse
import re
from typing import Literal, get_args

from easyspec_jax import demo
from easyspec_jax.cli.command import Parser, read_prompts
from easyspec_jax.cli.flags import DEVICES, TYPES, add_shared, size_of
from easyspec_jax.errors import EasySpecError, first_line
from easyspec_jax.options import MAX_GRAMMAR, Method, SamplingParams, SpeculativeConfig, Verifier

AUTO = "auto"
TUNED = (
    "--method", "--num-speculative-tokens", "--tree-width", "--tree-nodes", "--lp-size",
    "--mlp-lp-size", "--refit", "--no-refit", "--no-calibration", "--draft-tensor-parallel-size",
    "--prompt-lookup", "--prompt-lookup-max", "--prompt-lookup-min", "--prompt-lookup-corpus",
    "--confidence-threshold",
)  # fmt: skip
"""Flags that --lp-strategy auto sets itself and that conflict with it."""

CONVERSATION_PREFIXES = 512 << 20
"""Default of --prefix-cache for a conversation."""


def generate_parser(program: str, description: str) -> Parser:
    """Return a parser of all flags. `check_flags` finds those that do not go together."""
    parser = Parser(prog=f"python -m {program}", description=description, allow_abbrev=False)
    add_models(parser)
    _add_hosts(parser)
    _add_prompts(parser)
    add_speculation(parser)
    _add_sampling(parser)
    _add_output(parser)
    return parser


def sampling_of(args: argparse.Namespace) -> SamplingParams:
    """Build SamplingParams from the flags. Raises EasySpecError for invalid values."""
    return SamplingParams(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        max_new_tokens=args.max_new_tokens,
        stop=tuple(_unescaped(text) for text in args.stop),
        min_p=args.min_p,
        logit_bias=args.logit_bias,
        min_new_tokens=args.min_new_tokens,
        ignore_eos=args.ignore_eos,
        stop_token_ids=tuple(args.stop_token_ids),
        presence_penalty=args.presence_penalty,
        frequency_penalty=args.frequency_penalty,
        repetition_penalty=args.repetition_penalty,
        bad_words=tuple(_unescaped(text) for text in args.bad_words),
        json_schema=None if args.json_schema is None else _schema(args.json_schema),
        regex=args.regex,
        choice=tuple(_unescaped(text) for text in args.choice),
        n=args.n,
        logprobs=args.logprobs,
        prompt_logprobs=args.prompt_logprobs,
    )


def _id_and_bias(text: str) -> tuple[int, float]:
    """Read an id and what to add to its logit, as --logit-bias has them: "50256:-100"."""
    number, _, bias = text.partition(":")
    try:
        return int(number), float(bias)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not ID:BIAS, such as 50256:-100") from None


def _probability_or_auto(text: str) -> float | Literal["auto"]:
    """Read a confidence threshold."""
    if text == "auto":
        return "auto"
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor auto") from None


def _schema(given: str) -> str:
    """Return a JSON schema that is given as text or by the name of a file."""
    if given.lstrip().startswith("{"):
        return given
    try:
        with open(given, "rb") as file:
            # One byte more than is allowed is refused for its length.
            return file.read(MAX_GRAMMAR + 1).decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise EasySpecError(
            f"`json_schema` {given[:40]!r} is neither a schema nor a file that can be read "
            f"({first_line(error)[:80]})"
        ) from None


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
        bit_stable=args.bit_stable,
        prompt_lookup=args.prompt_lookup,
        prompt_lookup_max=args.prompt_lookup_max,
        prompt_lookup_min=args.prompt_lookup_min,
        prompt_lookup_corpus=args.prompt_lookup_corpus,
        adapt=args.adapt == "on",
        confidence_threshold=args.confidence_threshold,
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
    check_tuned(args, given)
    if (args.prompts is None) != (args.out is None):
        raise EasySpecError("--prompts FILE and --out FILE go together")
    if args.system is not None and not args.chat:
        raise EasySpecError("--system needs --chat")
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


def check_tuned(args: argparse.Namespace, given: set[str]) -> None:
    """Refuse flags that --lp-strategy auto sets itself; arguments and errors as check_flags."""
    # Tuning chooses these flags, so that giving one as well is a contradiction.
    contrary = [flag for flag in TUNED if flag in given]
    if args.lp_strategy == AUTO and contrary:
        raise EasySpecError(
            f"--lp-strategy auto chooses {contrary[0]} itself: leave out one of the two"
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
        choices=("on", "off"),
        help="choose for every round whether to draft, and how many levels, by what was accepted "
        "lately; samples coupled (default: off, or as tuned)",
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
        "--n",
        type=int,
        default=default.n,
        metavar="N",
        help="texts for each prompt; text j of prompt i uses seed + i * N + j",
    )
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
    sampling.add_argument(
        "--min-p",
        type=float,
        default=default.min_p,
        metavar="P",
        help="keep the tokens at least P times as likely as the likeliest one",
    )
    sampling.add_argument(
        "--logit-bias",
        type=_id_and_bias,
        nargs="+",
        default=[],
        metavar="ID:BIAS",
        help="add this, from -100 to 100, to the logits of ids",
    )
    sampling.add_argument(
        "--min-new-tokens",
        type=int,
        default=default.min_new_tokens,
        metavar="M",
        help="tokens before which no stop token can come",
    )
    sampling.add_argument(
        "--ignore-eos", action="store_true", help="go on after the checkpoint's stop tokens"
    )
    sampling.add_argument(
        "--stop-token-ids",
        type=int,
        nargs="+",
        default=[],
        metavar="ID",
        help="end the text at these ids as well",
    )
    sampling.add_argument(
        "--bad-words",
        nargs="+",
        default=[],
        metavar="TEXT",
        help="texts that the output may not contain",
    )
    sampling.add_argument(
        "--json-schema",
        metavar="FILE",
        help="allow only JSON of this schema, which can be given as text, too",
    )
    sampling.add_argument(
        "--regex", metavar="PATTERN", help="allow only texts that this matches as a whole"
    )
    sampling.add_argument(
        "--choice",
        action="append",
        default=[],
        metavar="TEXT",
        help="allow only this text; repeated, one of several",
    )
    for name, help in (
        ("presence", "take this from the logits of tokens that the output contains"),
        ("frequency", "take this from a token's logit each time that the output contains it"),
        ("repetition", "divide positive logits of tokens in prompt or output (default: 1.0)"),
    ):
        sampling.add_argument(
            f"--{name}-penalty",
            type=float,
            default=getattr(default, f"{name}_penalty"),
            metavar="X",
            help=help,
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
