"""The bundled pair behind the command, in a process of its own."""

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.support.serving import DEPTH, LENGTH, ROWS

pytest.importorskip("starlette", reason="the extra `serve` is not installed")


@dataclass
class Live:
    """A server in a process of its own.

    Attributes:
        process: The process.
        url: Its address, as its log says.
        lines: Records of its log so far.
    """

    process: subprocess.Popen[str]
    url: str = ""
    lines: list[dict[str, Any]] = field(default_factory=list)

    def read_until(self, event: str) -> dict[str, Any]:
        """Read the log up to a record of an event, and return that."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            record = json.loads(line)
            self.lines.append(record)
            if record["event"] == event:
                return record
        raise AssertionError(f"the log ended without {event}: {self.lines}")

    def stop(self) -> list[dict[str, Any]]:
        """Send SIGTERM, and return the rest of the log."""
        self.process.send_signal(signal.SIGTERM)
        self.read_until("stopped")
        assert self.process.wait(30) == 0
        return self.lines

    def metric(self, name: str) -> float:
        """Return the sum of a metric's samples."""
        text = urllib.request.urlopen(f"{self.url}/metrics").read().decode()
        found = [line for line in text.splitlines() if line.startswith((name + "{", name + " "))]
        return sum(float(line.rpartition(" ")[2]) for line in found)


@contextmanager
def live(*flags: str, **environment: str) -> Iterator[Live]:
    """Run `easyspec serve` on a free port until the block ends."""
    command = [sys.executable, "-m", "easyspec_jax.serve", "--platform", "cpu", "--port", "0"]
    # The same programs as those of tests/support/serving.py, which are compiled already.
    command += ["--max-length", str(LENGTH), "--batch-size", str(ROWS), "--queue", str(DEPTH)]
    command += ["--num-speculative-tokens", "3", "--verifier", "coupled", "--adapt", "off"]
    process = subprocess.Popen(
        [*command, *flags],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )
    server = Live(process)
    try:
        server.url = server.read_until("loading")["url"]
        yield server
    finally:
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


@pytest.fixture(scope="module")
def served() -> Iterator[Live]:
    """A server of the bundled pair that is ready."""
    with live() as server:
        server.read_until("ready")
        yield server
