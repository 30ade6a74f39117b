"""Kill a batch job again and again and look for traces: `python -m experiments.kill_check`.

A job of the bundled pair runs once undisturbed. It runs once more, killed with SIGKILL at random
moments, during start-up and while its output grows, and continued by the same command each time.
Both outputs must hold every id exactly once and, sorted by id and without timings, be equal byte
for byte. The exit code is 1 if they are not.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

from easyspec_jax import EasySpecError
from easyspec_jax.cli.command import Parser
from easyspec_jax.options import check_whole
from experiments.lib.machine import machine
from experiments.lib.output import (
    RESULTS,
    as_json,
    check_destination,
    run_experiment,
    save,
    settings,
)
from experiments.lib.requests import WAYS, piece, sampling
from experiments.lib.tables import Rows

TIMINGS = ("prefill_seconds", "decode_seconds", "tokens_per_second")

STARTING = 0.25
"""The share of the kills that come before a run has added anything."""

POLL_SECONDS = 0.002


def write_job(path: Path, lines: int, random: Random) -> list[str]:
    """Write prompts of all lengths, each with its own sampling, and return their ids."""
    ids = [f"request-{number}" for number in range(lines)]
    with path.open("w", encoding="utf-8") as file:
        for name in ids:
            own = sampling(random, random.randrange(len(WAYS)), 8, 24)
            fields = {
                "id": name,
                "prompt": piece(random, 6),
                "seed": own.seed,
                "max_new_tokens": own.max_new_tokens,
            }
            chosen = {"temperature": own.temperature, "top_k": own.top_k, "top_p": own.top_p}
            file.write(json.dumps(fields | chosen) + "\n")
    return ids


def without_timings(content: bytes) -> bytes:
    """Return the records sorted by id, a line each, without the fields that differ between runs."""
    found = [json.loads(line) for line in content.splitlines()]
    for record in found:
        for name in TIMINGS:
            record.get("stats", {}).pop(name, None)
    return b"".join(
        json.dumps(record).encode() + b"\n"
        for record in sorted(found, key=lambda record: record["id"])
    )


def differences(ids: Sequence[str], undisturbed: bytes, killed: bytes) -> dict[str, Any]:
    """Compare the output of a killed job with an undisturbed one.

    Returns:
        Counts of ids lost, ids doubled and records that differ, and whether all is equal.
    """
    counts = Counter(json.loads(line)["id"] for line in killed.splitlines())
    expected, found = without_timings(undisturbed), without_timings(killed)
    pairs = itertools.zip_longest(expected.splitlines(), found.splitlines())
    return {
        "lost": sum(counts[name] == 0 for name in ids),
        "doubled": sum(count > 1 for count in counts.values()),
        "different": sum(one != other for one, other in pairs),
        "equal": expected == found and sorted(counts.elements()) == sorted(ids),
    }


class Job:
    """A command, and the file that it appends to."""

    def __init__(self, prompts: Path, out: Path, batch_size: int) -> None:
        self.out = out
        program = [
            sys.executable,
            "-m",
            "easyspec_jax.generate",
            "--platform",
            "cpu",
            "--batch-size",
            str(batch_size),
            # Counts of rounds are compared, too, and must not depend on the clock.
            "--adapt",
            "off",
        ]
        self._command = [*program, "--prompts", str(prompts), "--out", str(out)]

    def run(self) -> float:
        """Run to the end, and return the seconds until the output has a record.

        Raises:
            EasySpecError: The job fails.
        """
        begun = time.perf_counter()
        with self._started() as process:
            self._wait(process, lambda: self.records > 0)
            started = time.perf_counter()
            if process.wait():
                raise EasySpecError(f"the job ended with exit code {process.returncode}")
        return started - begun

    def kill_starting(self, seconds: float) -> float:
        """Start, and kill after that many seconds or at the first record.

        Returns:
            The seconds that it ran.
        """
        begun, before = time.perf_counter(), self.records
        with self._started() as process:
            self._wait(
                process, lambda: time.perf_counter() - begun >= seconds or self.records > before
            )
            return self._killed(process, begun)

    def kill_growing(self, records: float) -> float:
        """Start, and kill after that many records; a fraction is a share of the time one takes.

        Returns:
            The seconds that it ran.
        """
        begun, before = time.perf_counter(), self.records
        whole = int(records)
        with self._started() as process:
            self._wait(process, lambda: self.records > before)
            first = time.perf_counter()
            self._wait(process, lambda: self.records > before + whole)
            end = time.perf_counter()
            end += (records - whole) * (end - first) / max(1, whole)
            self._wait(process, lambda: time.perf_counter() >= end)
            return self._killed(process, begun)

    @property
    def records(self) -> int:
        """The number of whole lines in the output."""
        return self.out.read_bytes().count(b"\n") if self.out.exists() else 0

    @staticmethod
    def _killed(process: subprocess.Popen[bytes], begun: float) -> float:
        process.kill()
        if process.wait() >= 0:
            raise EasySpecError(
                "the job was done before it was killed often enough: give more --lines"
            )
        return time.perf_counter() - begun

    def _started(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    @staticmethod
    def _wait(process: subprocess.Popen[bytes], over: Callable[[], bool]) -> None:
        while process.poll() is None and not over():
            time.sleep(POLL_SECONDS)


def moments(kills: int, random: Random) -> list[tuple[float, bool]]:
    """Draw when to kill: how far into a phase, from 0 to 1, and whether the output then grows."""
    early = round(STARTING * kills)
    found = [(random.random(), number >= early) for number in range(kills)]
    random.shuffle(found)
    return found


def waits(
    kills: Sequence[tuple[float, bool]], start: float, left: Callable[[], int]
) -> Iterator[float]:
    """Yield how long to wait before each kill, in seconds of start-up or in records.

    Records left to write are shared among the kills to come and one more, so that the job is not
    done before the last kill.

    Args:
        kills: As moments() draws them.
        start: Seconds of a start-up.
        left: Counts the records to be written.
    """
    growing = sum(grows for _, grows in kills)
    for share, grows in kills:
        yield share * (left() / (growing + 1) if grows else start)
        growing -= grows


def measure(
    args: argparse.Namespace, directory: Path
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run the job both ways, and return the comparison and a row for every run."""
    random, begun = Random(args.seed), time.perf_counter()
    ids = write_job(directory / "in.jsonl", args.lines, random)
    undisturbed = Job(directory / "in.jsonl", directory / "undisturbed.jsonl", args.batch_size)
    killed = Job(directory / "in.jsonl", directory / "killed.jsonl", args.batch_size)
    start = undisturbed.run()
    print(f"undisturbed: {start:.1f} s to the first record", flush=True)
    rows = []
    kills = moments(args.kills, random)
    planned = waits(kills, start, lambda: args.lines - killed.records)
    for number, ((_, growing), wait) in enumerate(zip(kills, planned, strict=True), 1):
        before = killed.records
        seconds = killed.kill_growing(wait) if growing else killed.kill_starting(wait)
        moment = "while the output grew" if growing else "during start-up"
        rows.append(
            {
                "run": number,
                "killed": moment,
                "after_seconds": seconds,
                "added": killed.records - before,
            }
        )
        print(f"kill {number} {moment}: {killed.records} records", flush=True)
    before = killed.records
    killed.run()
    rows.append(
        {
            "run": len(rows) + 1,
            "killed": "never",
            "after_seconds": None,
            "added": killed.records - before,
        }
    )
    found = differences(ids, undisturbed.out.read_bytes(), killed.out.read_bytes())
    return {"seconds": time.perf_counter() - begun} | found, rows


def tabulate(measured: Mapping[str, Any]) -> Rows:
    """Tabulate the comparison in one row."""
    names = {
        "lines": "lines",
        "kills": "kills with SIGKILL",
        "lost": "ids lost",
        "doubled": "ids doubled",
        "different": "records that differ",
        "equal": "equal byte for byte",
    }
    row: dict[str, Any] = {label: measured[name] for name, label in names.items()}
    return [row | {"equal byte for byte": "yes" if measured["equal"] else "no"}]


def run(args: argparse.Namespace) -> Mapping[str, Any]:
    """Kill, compare, print and write the JSON; return the comparison."""
    for name in ("lines", "kills", "batch_size"):
        check_whole(name.replace("_", "-"), getattr(args, name), 1)
    check_destination(args.out)
    with tempfile.TemporaryDirectory() as directory:
        found, rows = measure(args, Path(directory))
    save(args.out, as_json(settings(args) | found | {"machine": machine("cpu"), "results": rows}))
    print(", ".join(f"{name} {value}" for name, value in found.items()))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = Parser(prog="python -m experiments.kill_check", description=__doc__)
    parser.add_argument("--lines", type=int, default=500)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "kill_check.json")
    found: dict[str, Any] = {"equal": True}
    return run_experiment(
        "experiments.kill_check", parser, lambda args: found.update(run(args)), argv
    ) or int(not found["equal"])


if __name__ == "__main__":
    sys.exit(main())
