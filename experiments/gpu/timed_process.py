"""A command in a process group of its own, with a limit on its time."""

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

GRACE = 10.0
"""Seconds that a process has to end after SIGTERM, before SIGKILL."""


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        code: Its exit code, or None if its time was over.
        seconds: How long it took.
        output: What it wrote to stdout.
    """

    code: int | None
    seconds: float
    output: bytes


def run_timed(
    command: Sequence[str], log: Path, seconds: float, environment: Mapping[str, str]
) -> Ended:
    """Run a command and end it, with all processes that it started, after a time.

    Args:
        command: The command.
        log: File for what it writes to stdout and stderr; replaced.
        seconds: The time.
        environment: All of its environment variables.
    """
    begun = time.monotonic()
    # stdout may be the results, so it is kept apart at first. A pipe that is not read fills up.
    with log.open("wb") as errors, tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=errors, env=dict(environment), start_new_session=True
        )
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            # Also after Ctrl-C, and for what a process that ended well has left behind.
            end_group(process)
            output.seek(0)
            made = output.read()
            errors.write(made)
    return Ended(code, time.monotonic() - begun, made)


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a process and all others of its group, first politely."""
    _signal(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=GRACE)
    _signal(process.pid, signal.SIGKILL)
    process.wait()


def _signal(group: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, number)
