"""The flags that say which models an experiment is about and what they are asked."""

import argparse
import json
from pathlib import Path
from typing import Any

from convert.pairs import RECORD
from easyspec_jax import Engine, SpeculativeConfig, demo, open_model
from easyspec_jax.checkpoint.directory import Checkpoint, open_checkpoint
from easyspec_jax.cli.command import Parser, read_prompts
from easyspec_jax.cli.flags import add_shared
from experiments.lib.questions import Question, code_questions, read_questions

DATA = Path(__file__).parents[1] / "data"


def add_models(parser: Parser) -> None:
    """Add the flags of a pair, and --allow-links for its checkpoints."""
    parser.add_argument("--target", help="default: the bundled pair")
    parser.add_argument("--draft")
    add_shared(parser, "--allow-links")


def add_flags(parser: Parser) -> None:
    """Add the flags of models, devices and questions."""
    add_models(parser)
    add_shared(parser, "--mesh", "--platform", "--dtype")
    parser.add_argument(
        "--questions",
        type=Path,
        help="in Spec-Bench's form (default: a dozen of our own, or code for the bundled pair)",
    )


def open_pair(
    args: argparse.Namespace,
    speculative: SpeculativeConfig,
    mesh: str | None = None,
    **types: Any,
) -> Engine:
    """Open the models of the flags, on their mesh or another.

    Args:
        args: The flags.
        speculative: How to draft and verify.
        mesh: The other mesh.
        types: Options of open_model that say in what types matrices and caches are kept.

    Raises:
        EasySpecError: As open_model.
    """
    return open_model(
        args.target,
        args.draft,
        mesh=mesh or args.mesh,
        platform=getattr(args, "platform", None),
        dtype=getattr(args, "dtype", "auto"),
        speculative=speculative,
        allow_links=args.allow_links,
        **types,
    )


def open_draft(args: argparse.Namespace) -> Checkpoint:
    """Open the checkpoint of --draft, by default the bundled draft.

    Raises:
        EasySpecError: As open_checkpoint.
    """
    return open_checkpoint(args.draft or demo.DRAFT, allow_links=args.allow_links)


def questions_of(args: argparse.Namespace) -> list[Question]:
    """Read what is asked.

    Raises:
        EasySpecError: The file of --questions is not one.
    """
    if args.questions is None and args.target is None:
        return code_questions(read_prompts(DATA / "code_prompts.txt"))
    return read_questions(args.questions or DATA / "questions.jsonl")


def names(args: argparse.Namespace) -> dict[str, Any]:
    """Name the models, and say whether they are the bundled pair."""
    called = {}
    for role in ("target", "draft"):
        called[role] = _name(Path(getattr(args, role) or getattr(demo, role.upper())))
    return called | {"bundled": args.target is None}


def draft_name(args: argparse.Namespace) -> dict[str, Any]:
    """Name the draft of an experiment without a target, and say whether it is the bundled one."""
    return {"draft": _name(Path(args.draft)), "bundled": args.draft == demo.DRAFT}


def _name(directory: Path) -> str:
    """Return a model's name: from the pair.json that `easyspec pair` writes, or the directory's."""
    directory = directory.resolve()
    record = directory.parent / RECORD
    if not record.is_file():
        return directory.name
    roles = json.loads(record.read_text(encoding="utf-8"))
    return roles.get(directory.name, {}).get("name", directory.name)
