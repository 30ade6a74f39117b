"""The command `python -m convert`.

Heavy libraries are imported only once the arguments are known to be good.
"""

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

from convert.process import leave_accelerators_alone, share_free_memory
from easyspec_jax.cli.command import Parser, run_command
from easyspec_jax.cli.flags import add_shared, size_of
from easyspec_jax.errors import EasySpecError
from easyspec_jax.options import FLOAT_DTYPES, Weights


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code, as run_command does."""
    started = time.monotonic()
    share_free_memory()
    again = "interrupted; the same command goes on from here"
    return run_command("convert", _parser(), lambda args: _run(args, started), argv, again)


def _run(args: argparse.Namespace, started: float) -> None:
    if args.revision is not None and args.hf is None:
        raise EasySpecError("--revision is for --hf ID only; leave it out")

    # Heavy libraries wait until the arguments are known to be good.
    from convert.converting import ConvertConfig, convert_opened
    from convert.gguf import open_gguf
    from convert.hub import directory_of
    from convert.huggingface import open_huggingface

    config = ConvertConfig(
        format="orbax" if args.to_hf is None else "huggingface",
        dtype=args.dtype,
        memory=args.memory,
        verify=args.verify,
        revision=args.revision,
        allow_links=args.allow_links,
        weights=args.weights,
        group_size=args.group_size,
        calibration=args.calibration,
        calibration_tokens=args.calibration_tokens,
    )
    if args.gguf is not None:
        model = open_gguf(args.gguf, keep_blocks=args.keep_blocks)
    else:
        directory = args.to_hf or directory_of(args.hf, args.revision)
        model = open_huggingface(directory, args.allow_links)
    result = convert_opened(model, args.out, config)
    seconds = time.monotonic() - started
    notes = (
        f", {result.reused / 1e6:,.1f} MB of it from an interrupted run" if result.reused else ""
    )
    notes += f", matrices {' and '.join(result.integers)}" if result.integers else ""
    notes += ", verified" if args.verify else ""
    notes += "" if model.has_tokenizer else "; it has no tokenizer, which generating needs"
    print(
        f"{args.out}: {result.parameters / 1e6:,.1f} M parameters, {result.dtype}, "
        f"{result.size / 1e6:,.1f} MB, {seconds:.1f} s{notes}"
    )
    if result.errors:
        print(rounding_line(result.errors), file=sys.stderr)


def rounding_line(errors: Mapping[str, float]) -> str:
    """Describe what rounding to integers lost: the largest error of each kind of matrix.

    Args:
        errors: The relative error of every matrix, by name.

    Examples:
        >>> rounding_line({"a.0.q_proj.weight": 0.004, "a.1.q_proj.weight": 0.005})
        'relative rounding errors: q_proj 0.50%; the largest is that of a.1.q_proj.weight'
    """
    largest: dict[str, float] = {}
    for name, error in errors.items():
        kind = name.split(".")[-2]
        largest[kind] = max(error, largest.get(kind, 0.0))
    listed = ", ".join(f"{kind} {error:.2%}" for kind, error in largest.items())
    worst = max(errors, key=lambda name: errors[name])
    return f"relative rounding errors: {listed}; the largest is that of {worst}"


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="convert",
        description="Write an Orbax checkpoint with its configuration and tokenizer, from a model "
        "of a known family; or a Hugging Face directory from such a checkpoint.",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--hf",
        metavar="DIR|ID",
        help="a Hugging Face directory with safetensors, or a model's id on the hub",
    )
    source.add_argument(
        "--gguf",
        type=Path,
        metavar="FILE",
        help="a GGUF file of an architecture that docs/families.md lists, or one part of it",
    )
    source.add_argument(
        "--to-hf",
        type=Path,
        metavar="DIR",
        help="a checkpoint of either kind to export as a Hugging Face directory",
    )
    parser.add_argument(
        "--revision", help="commit, branch or tag of a model on the hub; by default its main branch"
    )
    add_shared(parser, "--allow-links")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", required=True, help="the directory to create"
    )
    parser.add_argument(
        "--dtype",
        choices=FLOAT_DTYPES,
        help="type to write every tensor in; by default the type the embedding is stored in, or "
        "where that is quantized the one that config.json names, or bfloat16",
    )
    parser.add_argument(
        "--weights",
        choices=get_args(Weights),
        help="type to write matrices in, with scales if it is an integer; of matrices that are "
        "stored as integers, int4 rounds int8 further, and bfloat16 makes floats",
    )
    parser.add_argument(
        "--group-size",
        type=int,
        choices=(32, 64, 128),
        help="the most columns of a row that share a scale in int4 (default: 128); fewer lose less",
    )
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="a text, in UTF-8: choose the integers of int4 so that the model's outputs on it "
        "change least, which takes minutes and loses much less (default: the nearest integers)",
    )
    parser.add_argument(
        "--calibration-tokens",
        type=int,
        metavar="N",
        help="tokens of that text to use at most (default: 16384)",
    )
    parser.add_argument(
        "--keep-blocks",
        action="store_true",
        help="keep a GGUF file's quantized matrices as integers with scales, near their size, "
        "or in 9 bits a number where they are rounded anew, as IQ1 to IQ3 are "
        "(default: write floats)",
    )
    parser.add_argument(
        "--memory",
        type=size_of,
        default="2GiB",
        metavar="SIZE",
        help="memory that the process may take, such as 700MB or 2GiB (the default); "
        "more is faster, up to a point",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read every tensor and the configuration again and compare them with the source; "
        "if --out already exists, only do this",
    )
    return parser


if __name__ == "__main__":
    leave_accelerators_alone()
    sys.exit(main())
