"""Decode without pause and watch for growth: `python -m experiments.soak`.

Requests of every length and way of sampling go through one engine in a batch that is refilled.
Resident memory, throughput and compilations are noted every 1,000 rounds. Some of the texts are
decoded once more, alone and plainly; the coupled verifier must give the same tokens at any
temperature. The exit code is 1 if memory or compilations grow after the warm-up, if throughput
falls by more than its noise, or if a text differs.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from easyspec_jax import EasySpecError, Engine, SpeculativeConfig, open_model
from easyspec_jax.arithmetic import ceil_div
from easyspec_jax.cli.command import Parser, cache_compilations
from easyspec_jax.options import check_whole
from easyspec_jax.tune.drawing import FAINT, INK, SOFT, png
from experiments.lib.output import RESULTS, prepare, publish, run_experiment, settings
from experiments.lib.requests import RowSampling, blocks
from experiments.lib.tables import Rows, column

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EVENT = "/jax/core/compile/jaxpr_to_mlir_module_duration"
"""JAX's event for every program that it lowers, whether or not a cache on disk has it compiled."""

BLOCK = 96
"""Requests of one way of sampling in a row."""

MOST_GROWTH = 2.0
"""The growth of resident memory that is allowed, in per cent."""

NOISES = 3.0
"""The fall of throughput that is allowed, in standard deviations of a window."""


class Compilations:
    """Counts the programs that this process lowers."""

    def __init__(self) -> None:
        import jax

        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._heard)

    def _heard(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        self.count += event == EVENT


def resident_bytes() -> int:
    """Return the resident memory of this process.

    Raises:
        EasySpecError: The system has no /proc.
    """
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        raise EasySpecError("resident memory is read from /proc, which Linux alone has") from None


class Soak:
    """An engine at work.

    Attributes:
        kept: Every check_every-th request, with the tokens that it became.
    """

    def __init__(self, engine: Engine, batch_size: int, check_every: int, seed: int) -> None:
        self.engine, self.batch_size, self.check_every = engine, batch_size, check_every
        self.kept: list[tuple[RowSampling, list[int]]] = []
        self._requests, self._compilations = blocks(seed, batch_size, BLOCK), Compilations()
        self._asked: dict[int, RowSampling] = {}

    def windows(self, rounds: int, window: int, seconds: float) -> Iterator[dict[str, Any]]:
        """Yield the figures of each window of rounds, until `rounds` or `seconds` are over.

        A round here is one of a full batch: the rounds of all rows divided by their number. At
        least as many were decoded.
        """
        row_rounds = tokens = texts = 0
        end, begun, cpu = window, time.perf_counter(), time.process_time()
        deadline = begun + seconds
        for number, completion in self.engine.complete_each(self._rows(), self.batch_size):
            request, texts = self._asked.pop(number), texts + 1
            if texts % self.check_every == 0:
                self.kept.append((request, completion.token_ids))
            tokens += len(completion.token_ids)
            row_rounds += len(completion.tokens_per_round)
            if row_rounds < end * self.batch_size:
                continue
            now, now_cpu = time.perf_counter(), time.process_time()
            yield {
                "rounds": row_rounds // self.batch_size,
                "texts": texts,
                "resident_bytes": resident_bytes(),
                "compilations": self._compilations.count,
                "tokens_per_second": tokens / (now - begun),
                "tokens_per_cpu_second": tokens / (now_cpu - cpu),
            }
            if end >= rounds or now > deadline:
                return
            end, begun, cpu, tokens = end + window, now, now_cpu, 0

    def _rows(self) -> Iterator[Any]:
        for number, request in enumerate(self._requests):
            self._asked[number] = request
            yield self.engine.row(*request)


def mismatches(engine: Engine, kept: Iterable[tuple[RowSampling, list[int]]]) -> int:
    """Count the texts that plain decoding does not reproduce."""
    plain = engine.baseline()
    different = 0
    for request, token_ids in kept:
        (completion,) = plain.generate([request.prompt], request.sampling)
        different += completion.token_ids != token_ids
    return different


def verdict(
    windows: Sequence[Mapping[str, Any]], warm_up: int, checked: int, different: int
) -> dict[str, Any]:
    """Judge memory, programs and speed after the warm-up, in per cent; `flat` if all is well.

    First and last are the medians of the first and the last tenth of the windows. Throughput is
    judged by tokens per second of this process's CPU time, which other work on the machine changes
    less. Its noise is the standard deviation of a window, estimated from neighbouring ones.

    Raises:
        EasySpecError: Too few windows are left after the warm-up.
    """
    warm = [window for window in windows if window["rounds"] > warm_up]
    if len(warm) < 3:
        raise EasySpecError(
            "too few rounds after --warm-up: give more --rounds or --minutes, or a smaller --window"
        )
    speeds = np.array([window["tokens_per_cpu_second"] for window in warm])
    noise = (
        100 * float(np.median(np.abs(np.diff(speeds)))) / 0.6745 / 2**0.5 / float(np.median(speeds))
    )
    found = {
        "memory_growth_percent": _change([window["resident_bytes"] for window in warm]),
        "compilations_after_warm_up": warm[-1]["compilations"] - warm[0]["compilations"],
        "throughput_change_percent": _change(speeds),
        "throughput_noise_percent": noise,
        "checked": checked,
        "mismatches": different,
    }
    flat = (
        found["memory_growth_percent"] <= MOST_GROWTH
        and found["compilations_after_warm_up"] == 0
        and found["throughput_change_percent"] >= -NOISES * noise
        and checked > 0
        and different == 0
    )
    return found | {"flat": flat}


def _change(values: Sequence[float] | np.ndarray) -> float:
    part = ceil_div(len(values), 10)
    first, last = (float(np.median(some)) for some in (values[:part], values[-part:]))
    return 100 * (last / first - 1)


BLUE, ORANGE = "#0072b2", "#e69f00"
"""From the palette of Okabe and Ito."""


def draw(measured: dict[str, Any]) -> bytes:
    """Draw memory and throughput over rounds as PNG, both from zero; the warm-up is grey.

    Raises:
        EasySpecError: matplotlib is missing.
    """
    return png(lambda: _figure(measured))


def _figure(measured: dict[str, Any]) -> "Figure":
    from matplotlib.figure import Figure

    rows = measured["results"]
    rounds = column(rows, "rounds")
    memory = [row["resident_bytes"] / 2**20 for row in rows]
    figure = Figure(figsize=(9, 5.6), dpi=120, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    figure.suptitle(
        f"{rounds[-1]:,} rounds, --batch-size {measured['batch_size']}: "
        f"memory {measured['memory_growth_percent']:+.2f} %, "
        f"{measured['compilations_after_warm_up']} compilations after warm-up, "
        f"{measured['mismatches']} of {measured['checked']} texts differ",
        weight="bold",
        size=11,
    )
    upper.plot(rounds, memory, color=BLUE, linewidth=2)
    upper.set_ylabel("resident memory, MiB")
    for name, label, color in (
        ("tokens_per_second", "of wall time", BLUE),
        ("tokens_per_cpu_second", "of this process's CPU time", ORANGE),
    ):
        lower.plot(rounds, [row[name] for row in rows], color=color, linewidth=2, label=label)
    lower.set_ylabel("tokens a second")
    lower.set_xlabel("rounds")
    lower.legend(loc="lower right")
    for axes in (upper, lower):
        axes.axvspan(0, measured["warm_up"], color=FAINT, zorder=0)
        axes.set_xlim(0, rounds[-1])
        axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
        axes.tick_params(colors=SOFT, labelcolor=INK)
    return figure


def tabulate(measured: Mapping[str, Any]) -> Rows:
    """Tabulate the verdict in one row."""
    names = {
        "memory_growth_percent": "memory after warm-up, %",
        "compilations_after_warm_up": "compilations after warm-up",
        "throughput_change_percent": "throughput, %",
        "throughput_noise_percent": "noise of a window, %",
        "checked": "texts checked",
        "mismatches": "that differ",
    }
    return [
        {"rounds": measured["results"][-1]["rounds"]}
        | {label: measured[name] for name, label in names.items()}
    ]


def run(args: argparse.Namespace) -> Mapping[str, Any]:
    """Soak, check, print, write the JSON and draw it; return the verdict."""
    for name in ("rounds", "warm_up", "window", "batch_size", "check_every"):
        check_whole(name.replace("_", "-"), getattr(args, name), 1)
    if args.rounds < args.warm_up + 4 * args.window:
        raise EasySpecError(
            f"--rounds {args.rounds} must be at least --warm-up {args.warm_up} and four windows"
        )
    cache_compilations()
    prepare(args.out)
    resident_bytes()
    engine = open_model(platform="cpu", speculative=SpeculativeConfig(verifier="coupled"))
    soak, rows, begun = (
        Soak(engine, args.batch_size, args.check_every, args.seed),
        [],
        time.perf_counter(),
    )
    for row in soak.windows(args.rounds, args.window, 60 * args.minutes):
        rows.append(row)
        print(
            f"{row['rounds']} rounds: {row['resident_bytes'] / 2**20:.0f} MiB, "
            f"{row['compilations']} compilations, {row['tokens_per_second']:.0f} tokens/s",
            flush=True,
        )
    seconds = time.perf_counter() - begun
    found = verdict(rows, args.warm_up, len(soak.kept), mismatches(engine, soak.kept))
    publish(args.out, settings(args) | {"seconds": seconds, **found}, rows, draw)
    print(", ".join(f"{name} {value}" for name, value in found.items()))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = Parser(prog="python -m experiments.soak", description=__doc__)
    parser.add_argument("--rounds", type=int, default=50000)
    parser.add_argument(
        "--minutes", type=float, default=120, help="rounds that do not fit are left out"
    )
    parser.add_argument("--warm-up", type=int, default=3000, help="rounds that are not judged")
    parser.add_argument("--window", type=int, default=1000, help="rounds between two samples")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument(
        "--check-every", type=int, default=100, help="texts between two that are checked"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "soak.json")
    found: dict[str, Any] = {"flat": True}
    return run_experiment(
        "experiments.soak", parser, lambda args: found.update(run(args)), argv
    ) or int(not found["flat"])


if __name__ == "__main__":
    sys.exit(main())
