"""What the page of results shows of each kind of file: from what was measured to rows of named cells."""

from collections.abc import Mapping
from statistics import median
from typing import Any

Table = list[dict[str, Any]]


def speeds(measured: Mapping[str, Any]) -> Table:
    """Of table2, table5 and table8: a row for every way, whatever of these figures it has, ± over prompts."""
    columns = {
        "temperature": "T", "set": "set", "target": "target", "draft": "draft", "way": "way", "acceptance_rate": "α",
        "step_seconds": "ms a draft step", "seconds_per_100_tokens": "s/100 tokens", "drafting": "drafting",
        "verification": "verification", "speedup": "speed-up", "phases_over_round": "phases/round",
    }  # fmt: skip
    named = [name for name in columns if any(name in row for row in measured["results"])]
    return [
        {columns[name]: _with_deviation(row, name) for name in named}
        | {"T": f"{row['temperature']:g}"}
        for row in measured["results"]
    ]


def _with_deviation(row: Mapping[str, Any], name: str) -> Any:
    """A figure of a row, with how far prompts are apart if the row says so; in milliseconds if far below a second."""
    value, deviation = row.get(name), row.get(f"{name}_deviation")
    if value is not None and deviation is not None:
        return f"{value:.3f} ± {deviation:.3f}"
    return 1e3 * value if name == "step_seconds" and value is not None else value


def by_category(measured: Mapping[str, Any]) -> Table:
    """Of spec_bench."""
    return [
        {
            "category": row["category"],
            "questions": row["questions"],
            "tokens/s": row["tokens_per_second"],
            "over plain": f"{row['speedup']:.2f} ± {row['speedup_deviation']:.2f}",
            "tokens a round": row["mean_acceptance_length"],
            "α": row["acceptance_rate"],
            "same answers": row["same"],
            "largest logit gap": row["largest_logit_gap"],
        }
        for row in measured["results"]
    ]


def cosines(measured: Mapping[str, Any]) -> Table:
    """Of table4."""
    return [
        {"N": row["lp_size"], "refit": "yes" if row["refit"] else "no"}
        | {
            name.replace("attn_out", "attention output"): value
            for name, value in row["cosine"].items()
        }
        | {f"overlap at depth {depth}": value for depth, value in enumerate(row["overlap"], 1)}
        for row in measured["results"]
    ]


def choices(measured: Mapping[str, Any]) -> Table:
    """Of tune_check: a row a mesh."""
    names = {"mesh": "mesh", "seconds": "seconds of tuning", "choice": "choice", "choice_over_plain": "over plain",
             "candidates": "candidates swept", "fastest": "the fastest", "fastest_over_plain": "its gain over plain",
             "share_of_fastest": "choice over the fastest"}  # fmt: skip
    return [{label: row[name] for name, label in names.items()} for row in measured["results"]]


def frontier(measured: Mapping[str, Any]) -> Table:
    """Of frontier."""
    return [
        {"collectives": row["collectives"], "MLPs in a row": row["sequential_mlps"]}
        | {"refit": "yes" if row["refit"] else "no"}
        | {f"overlap at depth {depth}": value for depth, value in enumerate(row["overlap"], 1)}
        | {"layout": row["groups"]}
        for row in measured["results"]
    ]


def losses(measured: Mapping[str, Any]) -> Table:
    """Of acceptance: α at temperature 0 by width and N for each kind of draft, and the loss against the exact draft."""
    greedy = [row for row in measured["results"] if row["temperature"] == 0]
    kinds, sizes, widths = (
        list(dict.fromkeys(values))
        for values in (
            map(kind, greedy),
            (row["lp_size"] for row in greedy),
            (row["tree_width"] for row in greedy),
        )
    )
    table = []
    for width in widths:
        rows = [row for row in greedy if row["tree_width"] == width]
        exact = next((row["acceptance_rate"] for row in rows if row["lp_size"] == 1), None)
        for size in sizes:
            own = {kind(row): row["acceptance_rate"] for row in rows if row["lp_size"] == size}
            shown: dict[str, Any] = {"width": width, "N": "1, exact" if size == 1 else size}
            for name in kinds:
                shown[f"α, {name}"] = own.get(name)
                if size > 1 and exact is not None and name in own:
                    shown[f"loss, {name}"] = exact - own[name]
            table.append(shown)
    names = list(dict.fromkeys(name for row in table for name in row))
    return [{name: row.get(name) for name in names} for row in table]


def kind(row: Mapping[str, Any]) -> str:
    """Of a draft in a file of acceptance."""
    return "refit" if row.get("refit") else "calibrated" if row["calibration"] else "no calibration"


def predictions(measured: Mapping[str, Any]) -> Table:
    """Of simulate: a row a pair, temperature, way and placement of the draft; tokens/s and speed-up by machine."""
    rows = [row for row in measured["results"] if row["fits"]]
    shared = {"target": "target", "draft": "draft", "temperature": "T", "way": "way", "lp_size": "N",
              "draft_tensor_parallel_size": "draft TP", "acceptance_rate": "α"}  # fmt: skip
    table: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        named = {column: row[name] for name, column in shared.items()} | {
            "T": f"{row['temperature']:g}"
        }
        shown = table.setdefault(tuple(row[name] for name in shared), named)
        shown[row["machine"]] = f"{row['tokens_per_second']:.1f} ({row['speedup']:.2f} ×)"
    for key, shown in table.items():
        row = next(row for row in rows if tuple(row[name] for name in shared) == key)
        if row["paper_speedup"] is not None:
            shown["the paper, 8×A100"] = (
                f"{row['paper_tokens_per_second']:.1f} ({row['paper_speedup']:.2f} ×)"
            )
    return list(table.values())


def by_devices(measured: Mapping[str, Any]) -> Table:
    """Of table6: steps a second by the number of devices, a row a machine, model and way."""
    table: dict[tuple[str, str, str], dict[str, Any]] = {}
    for row in measured["results"]:
        machine = row.get("machine", "here")
        shown = table.setdefault(
            (machine, row["model"], row["way"]),
            {"machine": machine, "model": row["model"], "way": row["way"]},
        )
        fits = row.get("fits") is not False
        shown[f"{row['devices']}"] = f"{row['steps_per_second']:.1f}" if fits else "does not fit"
    return list(table.values())


def engines(measured: Mapping[str, Any]) -> Table:
    """Of peers; speeds are medians over the repeats."""
    table = []
    for row in measured["results"]:
        if "missing" in row:
            table.append({"engine": row["name"], "weights": f"not measured: {row['missing']}"})
            continue
        gaps = [
            place["logit_gap"] for place in row["divergences"] if place["logit_gap"] is not None
        ]
        table.append({
            "engine": row["name"],
            "tokens/s": median(row["tokens_per_second"]),
            "over plain": median(row["over_plain"]),
            "identical": f"{row['identical']:.1%}",
            "largest logit gap": max(gaps, default=None),
            "weights": row["weights"],
            "version": row["version"],
        })  # fmt: skip
    names = list(dict.fromkeys(name for row in table for name in row if name != "weights"))
    return [{name: row.get(name) for name in [*names, "weights"]} for row in table]


def flat(measured: Mapping[str, Any]) -> Table:
    """What of any rows are single figures and words."""
    rows = measured.get("results")
    if not isinstance(rows, list):
        return []
    return [
        {name: value for name, value in row.items() if not isinstance(value, dict | list)}
        for row in rows
    ]


def timelines(measured: Mapping[str, Any]) -> Table:
    """Of figure2: shares of the round under the profiler, means over devices."""
    return [
        {
            "way": row["way"],
            "mesh": " × ".join(f"{size} {axis}" for axis, size in row["mesh"].items()),
            "ms a round": 1e3 * row["round_seconds"],
            "ms under the profiler": 1e3 * row["traced_round_seconds"],
            "computing": row["computing"],
            "in collectives": row["in_collectives"],
            "idle": row["idle"],
            "tokens a round": row["tokens_per_round"],
        }
        for row in measured["results"]
    ]


def kills(measured: Mapping[str, Any]) -> Table:
    """Of kill_check: all that it found in one row."""
    names = {
        "lines": "lines", "kills": "kills with SIGKILL", "lost": "ids lost", "doubled": "ids doubled",
        "different": "records that differ", "equal": "equal byte for byte",
    }  # fmt: skip
    row: dict[str, Any] = {label: measured[name] for name, label in names.items()}
    return [row | {"equal byte for byte": "yes" if measured["equal"] else "no"}]


def collectives(measured: Mapping[str, Any]) -> Table:
    """Of two_processes: a draft step by the way of splitting it."""
    return [
        {
            "processes": row["processes"],
            "way": row["way"],
            "collectives": row["collectives"],
            "ms a draft step": 1e3 * row["step_seconds"],
            "±": 1e3 * row["deviation"],
            "over TP": row["time_of_tp"],
        }
        for row in measured["results"]
    ]


def bookkeeping(measured: Mapping[str, Any]) -> Table:
    """Of bench_round; shares are medians over pairs of a round and its passes."""
    return [
        {
            "verifier": row["verifier"],
            "T": f"{row['temperature']:g}",
            "ms a round": 1e3 * median(row["round"]),
            "ms its passes": 1e3 * median(row["passes"]),
            "bookkeeping": f"{row['bookkeeping']:.1%}",
        }
        for row in measured["results"]
    ]


def passes(measured: Mapping[str, Any]) -> Table:
    """Of bench_roofline: all parts, a row for what each of them timed."""
    milliseconds = {"seconds": "ms", "floor_seconds": "its bytes take, ms"}
    figures = {
        "share_of_bandwidth": "share of bandwidth", "GB_per_second": "GB/s", "tokens_per_second": "tokens/s",
        "tokens_per_pass": "tokens a pass", "acceptance_rate": "α", "over_plain": "over plain",
    }  # fmt: skip
    return [
        {"part": part, "what": row["name"]}
        | {label: 1e3 * row[name] if name in row else None for name, label in milliseconds.items()}
        | {label: row.get(name) for name, label in figures.items()}
        for part, of_part in measured["parts"].items()
        for row in of_part["results"]
    ]


def checkpoints(measured: Mapping[str, Any]) -> Table:
    """Of bench_checkpoints: medians of the rounds."""
    ways = {"conversion": measured["convert"], "copy of the files": measured["copy"]}
    ways |= {f"opening, {name}": [run] for name, run in measured["open"].items()}
    return [
        {
            "what": name,
            "GB": measured["bytes"] / 1e9,
            "seconds": median(run["seconds"] for run in runs),
            "GiB held at most": max(run["peak_bytes"] for run in runs) / 2**30,
        }
        for name, runs in ways.items()
    ]


def soaked(measured: Mapping[str, Any]) -> Table:
    """Of soak: its verdict in one row."""
    names = {
        "memory_growth_percent": "memory after warm-up, %", "compilations_after_warm_up": "compilations after warm-up",
        "throughput_change_percent": "throughput, %", "throughput_noise_percent": "noise of a window, %",
        "checked": "texts checked", "mismatches": "that differ",
    }  # fmt: skip
    return [
        {"rounds": measured["results"][-1]["rounds"]}
        | {label: measured[name] for name, label in names.items()}
    ]
