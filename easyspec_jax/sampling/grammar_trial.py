"""Compile a grammar in a process that may take only so much time and memory.

llguidance bounds most of what it does, but not all: intersections of patterns can take hours and
all of the memory. So each new grammar is tried where that harms nothing. This file is the process,
too, and imports nothing of this package then, since JAX would take longer to import than a trial.
"""

import json
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

SECONDS = 5
"""Most seconds of a core that a trial takes."""

MEMORY = 1 << 30
"""Most bytes of address space that it takes."""

_PATIENCE = 12
"""How many times as long it may run, on a machine with other work."""


def complaint(grammar: str, limits: Mapping[str, Any]) -> str | None:
    """Compile a grammar in another process and return what is wrong with it.

    Args:
        grammar: The grammar, in llguidance's own format.
        limits: Arguments of llguidance's LLParserLimits.

    Returns:
        llguidance's message; "" if there is nothing to say; None if it takes too long or too much
        memory to say so.
    """
    # -P keeps this file's directory out of the paths of modules.
    command = [sys.executable, "-P", __file__, json.dumps(limits)]
    try:
        done = subprocess.run(
            command,
            input=grammar.encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=SECONDS * _PATIENCE,
            check=True,
        )
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError, OSError):
        return None
    return done.stdout.decode()


def _limit_process() -> None:
    # Windows has no such module; there only the time is limited, by complaint().
    with suppress(ImportError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        # macOS refuses a limit of the address space.
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def _main() -> None:
    _limit_process()
    import llguidance

    limits = llguidance.LLParserLimits(**json.loads(sys.argv[1]))
    # What takes long is the same whatever the tokens are. This vocabulary needs no file.
    vocabulary = llguidance.LLTokenizer("byte")
    grammar = sys.stdin.buffer.read().decode()
    matcher = llguidance.LLMatcher(vocabulary, grammar, log_level=0, limits=limits)
    matcher.compute_bitmask()
    sys.stdout.buffer.write(matcher.get_error().encode())


if __name__ == "__main__":
    _main()
