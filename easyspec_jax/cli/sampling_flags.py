"""The flags that say how tokens are chosen, and their SamplingParams."""

import argparse
import re

from easyspec_jax.cli.command import Parser
from easyspec_jax.errors import EasySpecError, first_line
from easyspec_jax.options import MAX_GRAMMAR, SamplingParams


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


def add_sampling(parser: Parser) -> None:
    """Add the flags that say how tokens are chosen."""
    sampling = parser.add_argument_group("sampling")
    _add_choices(sampling)
    _add_endings(sampling)
    _add_constraints(sampling)
    _add_penalties(sampling)


def _add_choices(sampling: argparse._ArgumentGroup) -> None:
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
        help="texts for each prompt; text j of prompt i uses seed + i * N + j (in a job, seeds "
        "that are far apart)",
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
        action="extend",
        default=[],
        metavar="ID:BIAS",
        help="add this, from -100 to 100, to the logits of ids",
    )


def _add_endings(sampling: argparse._ArgumentGroup) -> None:
    default = SamplingParams()
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
        action="extend",
        default=[],
        metavar="ID",
        help="end the text at these ids as well",
    )


def _add_constraints(sampling: argparse._ArgumentGroup) -> None:
    sampling.add_argument(
        "--bad-words",
        nargs="+",
        action="extend",
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


def _add_penalties(sampling: argparse._ArgumentGroup) -> None:
    default = SamplingParams()
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


def _id_and_bias(text: str) -> tuple[int, float]:
    """Read an id and what to add to its logit, as --logit-bias has them: "50256:-100"."""
    number, _, bias = text.partition(":")
    try:
        return int(number), float(bias)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not ID:BIAS, such as 50256:-100") from None


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
