"""Flags that several commands share, each declared once."""

import argparse
import re
from collections.abc import Sequence
from typing import Any, get_args

from easyspec_jax.options import (
    DraftTensorParallelSize,
    DType,
    KVDType,
    Platform,
    SpeculativeConfig,
    Weights,
)

_DEFAULT = SpeculativeConfig()

SHARED: dict[str, dict[str, Any]] = {
    "--mesh": {
        "default": "1",
        "help": 'devices: "8", or "layer=4,tensor=2" (default: %(default)s)',
    },
    "--platform": {"choices": get_args(Platform), "help": "default: the fastest one present"},
    "--dtype": {
        "default": "auto",
        "choices": get_args(DType),
        "help": "default: float32 on a CPU, else the checkpoint's",
    },
    "--weights": {
        "choices": get_args(Weights),
        "help": "type to keep the target's matrices in, rounded if need be (default: the "
        "checkpoint's if it is quantized, else --dtype)",
    },
    "--draft-weights": {
        "choices": get_args(Weights),
        "help": "likewise for the draft, which changes the speed but not the text",
    },
    "--kv-dtype": {
        "default": "auto",
        "choices": get_args(KVDType),
        "help": "type that caches are kept in; int8 takes about half the memory of 16 bits "
        "(default: the one that is computed in)",
    },
    "--max-length": {
        "type": int,
        "metavar": "L",
        "help": "the most tokens of a text, its prompt included",
    },
    "--allow-links": {
        "action": "store_true",
        "help": "follow links that lead out of a checkpoint's directory",
    },
    "--num-speculative-tokens": {
        "type": int,
        "default": _DEFAULT.num_speculative_tokens,
        "metavar": "N",
        "help": "depth of a round's draft (default: %(default)s)",
    },
    "--tree-width": {
        "type": int,
        "metavar": "W",
        "help": "tokens drafted at each depth (default: 1, a chain; 4 for --method tree)",
    },
    "--lp-size": {
        "type": int,
        "default": _DEFAULT.lp_size,
        "metavar": "N",
        "help": "layers that run at once (default: %(default)s)",
    },
    "--lp-strategy": {
        "metavar": "S",
        "help": 'explicit groups, such as "0,1-3,4-7x2,8", where x2 runs two MLPs at a time',
    },
    "--mlp-lp-size": {
        "type": int,
        "default": _DEFAULT.mlp_lp_size,
        "metavar": "M",
        "help": "MLPs of a group that run at once (default: %(default)s)",
    },
    "--draft-tensor-parallel-size": {
        "default": _DEFAULT.draft_tensor_parallel_size,
        "choices": get_args(DraftTensorParallelSize),
        "help": "replicate or split over all devices the parts of the draft that are not "
        "layer-parallel (default: %(default)s)",
    },
    "--json": {"action": "store_true", "help": "print one JSON object"},
}
"""Arguments of argparse's `add_argument`, by flag."""

DEVICES = ("--mesh", "--platform", "--dtype", "--allow-links")
"""Flags that say where and in what type a checkpoint is opened."""


TYPES = ("--weights", "--draft-weights", "--kv-dtype")
"""Flags that say in what types a pair's matrices and caches are kept."""


def add_shared(
    parser: argparse.ArgumentParser | argparse._ArgumentGroup, *flags: str, **changes: Any
) -> None:
    """Add shared flags to a parser or to an argument group.

    Args:
        parser: The parser.
        flags: Names in SHARED.
        changes: Arguments of `add_argument` that take the place of the shared ones.
    """
    for flag in flags:
        parser.add_argument(flag, **SHARED[flag] | changes)


def size_of(text: str) -> int:
    """Return the bytes that a size names, as argparse's `type`.

    Raises:
        ArgumentTypeError: The text is not a size.

    Examples:
        >>> size_of("512MiB"), size_of("1.5GB"), size_of("64")
        (536870912, 1500000000, 64)
    """
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?) ?(?:([kMGT]?)(i?)B)?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a size such as 700MB or 2GiB")
    number, prefix, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** " kMGT".index(prefix or " "))


def devices_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return the values of the DEVICES flags as keyword arguments of `open_model`."""
    return _values(args, DEVICES)


def pair_options_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return the values of the DEVICES and TYPES flags as keyword arguments of `open_model`."""
    return _values(args, DEVICES + TYPES)


def _values(args: argparse.Namespace, flags: Sequence[str]) -> dict[str, Any]:
    names = [flag.removeprefix("--").replace("-", "_") for flag in flags]
    return {name: getattr(args, name) for name in names}
