"""The `easyspec` command: `easyspec generate`, `easyspec convert` and so on."""

import sys
from collections.abc import Sequence
from importlib import import_module

from easyspec_jax import __version__

COMMANDS = {
    "generate": (
        "easyspec_jax.cli.generate",
        "generate text with a target model and a draft",
    ),
    "serve": (
        "easyspec_jax.cli.serve",
        "serve a pair by OpenAI's protocol, with a chat page",
    ),
    "convert": (
        "convert.__main__",
        "convert a checkpoint into one that opens straight into shards, or back",
    ),
    "pair": ("convert.pair", "fetch a known pair of models with pip, and convert it"),
    "tune": ("easyspec_jax.cli.tune", "measure which way of speculating is the fastest"),
    "refit": ("easyspec_jax.cli.refit", "fit a draft's projections to layers that run at once"),
    "plan": ("easyspec_jax.cli.plan", "estimate what a pair would need and gain on a topology"),
}
"""Module and purpose of each command."""

USAGE = "usage: easyspec COMMAND [flags] | --version; each command has --help\n" + "".join(
    f"  {name:10}{purpose}\n" for name, (_, purpose) in COMMANDS.items()
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; 2 if no command has that name."""
    name, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if name == "--version":
        print(f"easyspec_jax {__version__}")
        return 0
    if name not in COMMANDS:
        print(
            f"easyspec: error: unknown command {name!r}; choose from {', '.join(COMMANDS)}",
            file=sys.stderr,
        )
        return 2
    module = import_module(COMMANDS[name][0])
    # With argv None the whole process is this command.
    if name in ("convert", "pair") and argv is None:
        module.leave_accelerators_alone()
    return module.main(rest)


if __name__ == "__main__":
    sys.exit(main())
