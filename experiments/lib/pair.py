"""The flags that say which pair of models an experiment is about, and what it is asked."""

import argparse
from pathlib import Path
from typing import Any

from easyspec_jax import Engine, SpeculativeConfig, demo, open_model
from easyspec_jax.cli.command import Parser, read_prompts
from experiments.questions import Question, code_questions, read_questions

HERE = Path(__file__).parent


def add_flags(parser: Parser) -> None:
    """Models, devices and questions."""
    parser.add_argument("--target", help="default: the bundled pair")
    parser.add_argument("--draft")
    parser.add_argument("--mesh", default="1")
    parser.add_argument("--platform")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument(
        "--questions",
        type=Path,
        help="in Spec-Bench's form (default: a dozen of our own, or code for the bundled pair)",
    )


def open_pair(
    args: argparse.Namespace, speculative: SpeculativeConfig, mesh: str | None = None
) -> Engine:
    """The models of the flags, on their mesh or another. Raises EasySpecError as open_model does."""
    return open_model(
        args.target,
        args.draft,
        mesh=mesh or args.mesh,
        platform=args.platform,
        dtype=args.dtype,
        speculative=speculative,
    )


def questions_of(args: argparse.Namespace) -> list[Question]:
    """What is asked. Raises EasySpecError for a bad file."""
    if args.questions is None and args.target is None:
        return code_questions(read_prompts(HERE / "code_prompts.txt"))
    return read_questions(args.questions or HERE / "questions.jsonl")


def names(args: argparse.Namespace) -> dict[str, Any]:
    """What the models are called, and whether they are the bundled pair."""
    called = {
        name: Path(getattr(args, name) or getattr(demo, name.upper())).name
        for name in ("target", "draft")
    }
    return called | {"bundled": args.target is None}
