"""Tables and figures of how fast something is, over something else."""

from pathlib import Path
from statistics import fmean, median
from typing import Any

from easyspec_jax.checkpoint.config import read_json
from experiments.lib.output import read_results
from experiments.lib.passages.reading import read
from experiments.lib.tables import Rows, distinct, markdown, matching
from experiments.registry import known

WAYS = {
    "easyspec, N = 4": "easyspec, N = 4",
    "sd": "an ordinary draft (`--method sd`)",
    "plain": "plain decoding",
    "transformers": "transformers, plain",
    "transformers, assisted": "transformers, assisted generation",
    "llama.cpp": "llama.cpp, plain",
    "llama.cpp, drafts of 5": "llama.cpp, drafts of five by the same draft, through its "
    "Python hook",
}
"""The engines in peers.json that the README compares, and how it calls them."""


def peers(results: Path) -> str:
    """Tabulate how fast each engine is, as a multiple of our plain decoding."""
    ratios = over_plain(results, "peers")
    rows = [
        {"": label, "speed over plain decoding": f"{ratios[way]:.2f}"}
        for way, label in WAYS.items()
    ]
    return markdown(rows)


def over_plain(results: Path, name: str) -> dict[str, float]:
    """Read the median speed of every way in a file of peers, as a multiple of plain decoding."""
    rows = read(results, name)
    return {row["name"]: median(row["over_plain"]) for row in rows if "over_plain" in row}


def real_pair(results: Path) -> str:
    """Tabulate how fast ways of drafting are over plain decoding, with a range over questions."""
    runs = [("table2_qwen", "one device", "one device")]
    runs += [(f"table2_qwen_processes{size}", "two processes", "TP") for size in ("", "_n2", "_n7")]
    table: dict[str, dict[str, Any]] = {}
    for name, column, plain in runs:
        rows = read(results, name)
        tree = matching(rows, way="+tree")
        for way in (way for way in distinct(rows, "way") if way not in ("one device", "TP")):
            drafted = matching(rows, way=way)
            gains = _gains(drafted, matching(rows, way=plain))
            figures = {
                "over plain": f"{fmean(gains):.2f} ({min(gains):.2f} to {max(gains):.2f})",
                "over the tree": f"{fmean(_gains(drafted, tree)):.2f}",
                "drafting": f"{_drafting(drafted) / _drafting(tree):.2f}",
            }
            shown = table.setdefault(way, {"draft": way.removeprefix("+")})
            for figure, value in figures.items():
                # Of several runs with two processes, the first has the ordinary drafts.
                shown.setdefault(f"{column}, {figure}", value)
    return markdown(list(table.values()))


def _gains(rows: Rows, others: Rows) -> list[float]:
    """Return how fast rows are over others of the same sets of questions."""
    seconds = {row["set"]: row["seconds_per_100_tokens"] for row in others}
    return [seconds[row["set"]] / row["seconds_per_100_tokens"] for row in rows]


def _drafting(rows: Rows) -> float:
    """Return the seconds that a round drafts, as a mean over sets of questions."""
    return fmean(row["drafting"] / row["rounds_per_100_tokens"] for row in rows)


def checkpoints(results: Path) -> str:
    """Tabulate what a conversion takes, against copying the files, and what opening one takes."""
    measured = read_json(results / "bench_checkpoints_7b.json")
    opened = [own["over_weights"] for own in measured["open"].values()]
    speeds = []
    for converted, copied in zip(measured["convert"], measured["copy"], strict=True):
        speeds.append(copied["seconds"] / converted["seconds"])
    rounds = ", ".join(f"{speed:.2f}" for speed in sorted(speeds))
    held = f"{measured['convert_peak_bytes'] / 2**30:.2f} GiB"
    median_speed = f"{measured['speed_over_copy']:.2f}, the median of {rounds}"
    rows = [
        {"": "conversion: memory held at most", "measured": held},
        {"": "conversion: speed over copying the files", "measured": median_speed},
        {"": "opened on 8 virtual devices: memory over weights", "measured": f"{max(opened):.2f}"},
    ]
    return markdown(rows)


def lookup_speeds(results: Path) -> str:
    """Tabulate the speeds of looked-up drafts over plain decoding."""
    return _of_lookup(results, "speeds_by_kind")


def lookup_finders(results: Path) -> str:
    """Tabulate what ways to look up drafts reach."""
    return _of_lookup(results, "reached_by_kind")


def _of_lookup(results: Path, function: str) -> str:
    about = known("lookup_smollm2")
    assert about is not None
    return markdown(about[0].function(function)(read_results(results / "lookup_smollm2.json")))


def tune_share(results: Path) -> str:
    """Return the least speed of tune's choice over that of the fastest candidate."""
    rows = [*read(results, "tune_check"), *read(results, "tune_check_smollm2")]
    return f"{min(row['share_of_fastest'] for row in rows):.2f}"


def peers_smollm2(results: Path) -> str:
    """Return how fast llama.cpp is with SmolLM2, over our plain decoding."""
    return f"{over_plain(results, 'peers_smollm2')['llama.cpp']:.2f}"


def peers_smollm2_transformers(results: Path) -> str:
    """Return how fast transformers is with SmolLM2, over our plain decoding."""
    return f"{over_plain(results, 'peers_smollm2')['transformers']:.2f}"


def peers_qwen(results: Path) -> str:
    """Return how fast llama.cpp is with the real pair's floats, over our plain decoding."""
    return f"{over_plain(results, 'peers_qwen')['llama.cpp']:.2f}"


def peers_qwen_transformers(results: Path) -> str:
    """Return how fast transformers is with the real pair, without and with the draft."""
    speeds = over_plain(results, "peers_qwen_transformers")
    alone, assisted = speeds["transformers"], speeds["transformers, assisted"]
    return f"{alone:.2f} times, and {assisted:.2f} times with assisted generation"


def peers_qwen_gguf(results: Path) -> str:
    """Return the same for the files of four bits, without and with a draft."""
    speeds = over_plain(results, "peers_qwen_gguf").items()
    alone, drafted = (speed for name, speed in speeds if name.startswith("llama.cpp"))
    return f"{alone:.2f} times, and {drafted:.2f} times with a draft of four bits"
