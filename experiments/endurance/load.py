"""Load a server and check every text: `python -m experiments.load`.

A server of the bundled pair runs in a process of its own. One, 8 and 32 clients at a time send
requests of all lengths and ways of sampling, streamed and whole. One in ten is left in the middle,
and malformed bodies come between. Every text that comes is compared with a lone run. At the end the
server gets SIGTERM with answers under way. The exit code is 1 if a text differs, an answer has
status 5xx, a row stays taken, memory grows, or SIGTERM loses an answer.
"""

import argparse
import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np

from easyspec_jax import EasySpecError, SamplingParams, SpeculativeConfig, open_model
from easyspec_jax.cli.command import Parser, cache_compilations
from easyspec_jax.options import check_whole
from easyspec_jax.tune.drawing import INK, SOFT, png
from experiments.lib.output import RESULTS, prepare, publish, run_experiment, settings
from experiments.lib.requests import WAYS, RowSampling, piece, sampling
from experiments.lib.tables import Rows, column

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LENGTH = 384
"""Longest text of the server, in tokens."""

GROWTH = 1.05
"""Most resident memory after the last level of load, over that after the first."""

MALFORMED = (
    b"{",
    b"[]",
    b'{"prompt": 5}',
    b'{"prompt": "a", "temperature": -1}',
    b'{"prompt": "a", "max_tokens": 1e9}',
    b'{"prompt": "a", "n": 1000}',
    b'{"prompt": "\\ud800"}',
    b'{"messages": []}',
    b'{"prompt": ' + b"[" * 5000,
)
"""Bodies that must be refused."""


@dataclass
class Server:
    """The server's process.

    Attributes:
        process: The process.
        port: Where it listens, at 127.0.0.1.
        ready: The record of its log that says that it is ready.
    """

    process: subprocess.Popen[str]
    port: int
    ready: Mapping[str, Any]

    def gauge(self, name: str) -> float:
        """Return the value of a metric."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics") as answer:
            for line in answer.read().decode().splitlines():
                if line.startswith(name + "{"):
                    return float(line.rpartition(" ")[2])
        raise EasySpecError(f"the server has no metric {name}")

    def resident_bytes(self) -> int:
        """Return its resident memory."""
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def served(batch_size: int, environment: Mapping[str, str] | None = None) -> Iterator[Server]:
    """Run a server, and give it to the block once it is ready.

    Args:
        batch_size: Texts that it decodes together.
        environment: Variables that it has besides this process's.

    Raises:
        EasySpecError: It ends before it is ready.
    """
    command = [sys.executable, "-m", "easyspec_jax.serve", "--platform", "cpu", "--port", "0"]
    command += ["--batch-size", str(batch_size), "--max-length", str(LENGTH), "--queue", "64"]
    # One seed is one text, so that a lone run must give the same.
    command += ["--verifier", "coupled"]
    variables = os.environ | dict(environment or {})
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=variables) as process:
        try:
            assert process.stderr is not None
            lines = iter(process.stderr)
            port = int(json.loads(next(lines))["url"].rpartition(":")[2])
            records = map(json.loads, lines)
            ready = next((one for one in records if one["event"] == "ready"), None)
            if ready is None:
                raise EasySpecError("the server ended before it was ready")
            # Its log must be read, or it would wait for a reader.
            threading.Thread(target=list, args=(lines,), daemon=True).start()
            yield Server(process, port, ready)
        finally:
            process.kill()


@dataclass
class Tally:
    """What the clients of one level of load saw.

    Attributes:
        counts: Answers by what became of them.
        first: Seconds to the first token of each streamed answer.
        tokens: Tokens of finished answers.
        lock: Guards all of it.
    """

    counts: Counter[str] = field(default_factory=Counter)
    first: list[float] = field(default_factory=list)
    tokens: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, what: str, tokens: int = 0, first: float | None = None) -> None:
        """Count an answer."""
        with self.lock:
            self.counts[what] += 1
            self.tokens += tokens
            if first is not None:
                self.first.append(first)


@dataclass(frozen=True)
class Known:
    """A request and its text, as a lone run gives it."""

    request: RowSampling
    text: str
    tokens: int

    def body(self, stream: bool) -> bytes:
        """Return the request as a body."""
        own = self.request.sampling
        fields = {
            "prompt": self.request.prompt,
            "temperature": own.temperature,
            "top_k": own.top_k,
            "top_p": own.top_p,
            "seed": own.seed,
            "max_tokens": own.max_new_tokens,
            "stream": stream,
        }
        return json.dumps(fields).encode()


def known_requests(count: int, seed: int) -> list[Known]:
    """Make requests of all lengths and ways of sampling, and decode each alone."""
    engine = open_model(platform="cpu", speculative=SpeculativeConfig(verifier="coupled"))
    random = Random(seed)
    known = []
    for number in range(count):
        longest = 160 if number % 8 == 0 else 48
        own: SamplingParams = sampling(random, number % len(WAYS), 4, longest)
        request = RowSampling(piece(random, 1 if longest > 48 else 10), own)
        (completion,) = engine.generate([request.prompt], own)
        known.append(Known(request, completion.text, len(completion.token_ids)))
    return known


class Client(threading.Thread):
    """Sends requests, one after the other, until a time."""

    def __init__(
        self, port: int, known: Sequence[Known], tally: Tally, until: float, seed: int
    ) -> None:
        super().__init__(daemon=True)
        self._port, self._known, self._tally, self._until = port, known, tally, until
        self._random = Random(seed)

    def run(self) -> None:
        while time.monotonic() < self._until:
            chance = self._random.random()
            if chance < 0.05:
                self._send_malformed()
            else:
                self.ask(leave=chance < 0.15)

    def _send_malformed(self) -> None:
        response = self._post(self._random.choice(MALFORMED))
        response.read()
        self._tally.note("refused" if response.status == 400 else f"status {response.status}")

    def ask(self, leave: bool) -> None:
        """Send a request and check its answer; with leave, close the connection in the middle."""
        known = self._random.choice(self._known)
        stream = leave or self._random.random() < 0.7
        begun = time.monotonic()
        try:
            response = self._post(known.body(stream))
            if response.status != 200:
                self._refused(response)
                return
            if not stream:
                text = json.loads(response.read())["choices"][0]["text"]
                self._check(known, text, None)
                return
            self._read(response, known, begun, leave)
        except (OSError, http.client.HTTPException) as error:
            self._tally.note(f"no answer: {type(error).__name__}")

    def _read(
        self, response: http.client.HTTPResponse, known: Known, begun: float, leave: bool
    ) -> None:
        text, first = "", None
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            first = first or time.monotonic() - begun
            text += json.loads(line[6:])["choices"][0]["text"]
            if leave and len(text) > 8:
                response.close()
                self._tally.note("left")
                return
        self._check(known, text, first)

    def _refused(self, response: http.client.HTTPResponse) -> None:
        response.read()
        self._tally.note(f"status {response.status}")
        if response.status == 429:
            time.sleep(float(response.headers["retry-after"]))

    def _check(self, known: Known, text: str, first: float | None) -> None:
        self._tally.note("right" if text == known.text else "wrong", known.tokens, first)

    def _post(self, body: bytes) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=300)
        headers = {"Content-Type": "application/json", "Connection": "close"}
        connection.request("POST", "/v1/completions", body, headers)
        return connection.getresponse()


def load(server: Server, known: Sequence[Known], clients: int, seconds: float) -> dict[str, Any]:
    """Let some clients send requests for some time, and return what they saw."""
    tally = Tally()
    begun = time.monotonic()
    run_clients(server, known, tally, clients, begun + seconds)
    took = time.monotonic() - begun
    time.sleep(1.0)  # for rows that were left last
    first = tally.first or [float("nan")]
    return {
        "clients": clients,
        "seconds": took,
        "answers": dict(sorted(tally.counts.items())),
        "tokens_per_second": tally.tokens / took,
        "first_token_median": float(np.median(first)),
        "first_token_p95": float(np.quantile(first, 0.95)),
        "rows_taken_after": server.gauge("vllm:num_requests_running"),
        "resident_bytes": server.resident_bytes(),
    }


def run_clients(
    server: Server, known: Sequence[Known], tally: Tally, clients: int, until: float
) -> None:
    """Run clients until a time, and until their last answers have come."""
    threads = [Client(server.port, known, tally, until, seed) for seed in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def terminate(server: Server, known: Sequence[Known], batch_size: int) -> dict[str, Any]:
    """Send SIGTERM while a full batch and as many waiting requests are under way."""
    tally, wanted = Tally(), 2 * batch_size
    long = [one for one in known if one.tokens > 48] or list(known)
    clients = [Client(server.port, long, tally, 0.0, seed) for seed in range(wanted)]
    threads = [threading.Thread(target=client.ask, args=(False,)) for client in clients]
    for thread in threads:
        thread.start()
    while sum(map(server.gauge, ("vllm:num_requests_running", "vllm:num_requests_waiting"))) == 0:
        time.sleep(0.01)
    time.sleep(0.2)
    under_way = server.gauge("vllm:num_requests_running") + server.gauge(
        "vllm:num_requests_waiting"
    )
    server.process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join()
    code = server.process.wait(120)
    return {"sent": wanted, "under_way": under_way, "right": tally.counts["right"], "exit": code}


def is_good(rows: Sequence[Mapping[str, Any]], end: Mapping[str, Any]) -> bool:
    """Whether nothing went wrong."""
    for row in rows:
        bad = [what for what in row["answers"] if what not in ("right", "left", "refused")]
        if any(what != "status 429" for what in bad) or row["rows_taken_after"]:
            return False
    memory = [row["resident_bytes"] for row in rows]
    if memory[-1] > GROWTH * memory[0]:
        return False
    return end["exit"] == 0 and end["right"] == end["sent"]


def draw(measured: dict[str, Any]) -> bytes:
    """Draw throughput and time to the first token by the number of clients, as PNG.

    Raises:
        EasySpecError: matplotlib is missing.
    """
    return png(lambda: _figure(measured))


def _figure(measured: dict[str, Any]) -> "Figure":
    from matplotlib.figure import Figure

    rows = measured["results"]
    names = [str(clients) for clients in column(rows, "clients")]
    figure = Figure(figsize=(9, 3.6), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    figure.suptitle(
        f"{measured['batch_size']} rows: {measured['texts']} texts, {measured['wrong']} of them "
        "other than alone",
        weight="bold",
        size=11,
    )
    left.bar(names, column(rows, "tokens_per_second"), color="#0072b2", width=0.6)
    left.set_ylabel("tokens a second")
    for name, label, color in (
        ("first_token_median", "median", "#0072b2"),
        ("first_token_p95", "95th percentile", "#e69f00"),
    ):
        right.plot(names, column(rows, name), "o-", color=color, linewidth=2, label=label)
    right.set_ylabel("time to the first token, s")
    right.legend(loc="upper left")
    for axes in (left, right):
        axes.set_xlabel("clients")
        axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
        axes.tick_params(colors=SOFT, labelcolor=INK)
    return figure


def tabulate(measured: Mapping[str, Any]) -> Rows:
    """Tabulate each level of load in a row."""
    return [
        {
            "clients": row["clients"],
            "tokens/s": row["tokens_per_second"],
            "first token, median s": row["first_token_median"],
            "95th percentile, s": row["first_token_p95"],
            "texts": row["answers"].get("right", 0) + row["answers"].get("wrong", 0),
            "wrong": row["answers"].get("wrong", 0),
            "left in the middle": row["answers"].get("left", 0),
            "malformed, refused": row["answers"].get("refused", 0),
            "memory, MiB": row["resident_bytes"] / 2**20,
        }
        for row in measured["results"]
    ]


def run(args: argparse.Namespace) -> bool:
    """Load the server, end it, write the JSON and draw it; return whether all was well."""
    for name in ("requests", "batch_size"):
        check_whole(name.replace("_", "-"), getattr(args, name), 1)
    cache_compilations()
    prepare(args.out)
    known = known_requests(args.requests, args.seed)
    rows = []
    with served(args.batch_size) as server:
        run_clients(server, known, Tally(), 2, time.monotonic() + 2)  # allocators warm up
        for clients in args.clients:
            rows.append(load(server, known, clients, args.seconds))
            print(rows[-1], flush=True)
        end = terminate(server, known, args.batch_size)
    print(end)
    counts = sum((Counter(row["answers"]) for row in rows), Counter[str]())
    totals = {
        "texts": counts["right"] + counts["wrong"],
        "wrong": counts["wrong"],
        "sigterm": end,
        "good": is_good(rows, end),
    }
    publish(args.out, settings(args) | totals, rows, draw)
    return totals["good"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = Parser(prog="python -m experiments.load", description=__doc__)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--seconds", type=float, default=60, help="of each number of clients")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument(
        "--requests", type=int, default=48, help="different requests, each checked alone"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "load.json")
    found = {"good": True}
    code = run_experiment(
        "experiments.load", parser, lambda args: found.update(good=run(args)), argv
    )
    return code or int(not found["good"])


if __name__ == "__main__":
    sys.exit(main())
