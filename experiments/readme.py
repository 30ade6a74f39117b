"""Writes experiments/README.md from the files in results/, and from nothing else: `python -m experiments.readme`.

A section a file: what was typed, on which machine, the table, the picture, and the paper's figures where it has them.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from easyspec_jax.command import Parser, run_command
from easyspec_jax.config import read_json
from easyspec_jax.files import write_whole
from experiments import paper
from experiments.output import RESULTS

Table = list[dict[str, Any]]

INTRODUCTION = """# Results

Written by `python -m experiments.readme` out of the files in [results](results); `python -m experiments.run --quick`
measures all that its steps name and writes this page anew. α is the share of drafted positions that the target accepts.
"""


def speeds(measured: Mapping[str, Any]) -> Table:
    """Of table2 and table8: a row for every way, whatever of these figures it has."""
    columns = {
        "temperature": "T", "set": "set", "target": "target", "draft": "draft", "way": "way", "acceptance_rate": "α",
        "step_seconds": "seconds a draft step", "seconds_per_100_tokens": "s/100 tokens", "drafting": "drafting",
        "verification": "verification", "speedup": "speed-up", "speedup_deviation": "± over prompts",
        "phases_over_round": "phases/round",
    }  # fmt: skip
    named = [name for name in columns if any(name in row for row in measured["results"])]
    return [{columns[name]: row.get(name) for name in named} for row in measured["results"]]


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
        | {name.replace("attn_out", "attention output"): value for name, value in row["cosine"].items()}
        | {f"overlap at depth {depth}": value for depth, value in enumerate(row["overlap"], 1)}
        for row in measured["results"]
    ]


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
    """Of acceptance: greedy chains, α by N for each kind of draft, and what is lost against the exact draft."""
    chains = [row for row in measured["results"] if row["temperature"] == 0 and row["tree_width"] == 1]
    exact = next((row["acceptance_rate"] for row in chains if row["lp_size"] == 1), None)
    table = []
    for size in dict.fromkeys(row["lp_size"] for row in chains):
        own = {kind(row): row["acceptance_rate"] for row in chains if row["lp_size"] == size}
        shown: dict[str, Any] = {"N": "1, exact" if size == 1 else size}
        for name in dict.fromkeys(map(kind, chains)):
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
    """Of simulate: a row a pair, way and placement of the draft; tokens/s and speed-up by machine."""
    rows = [row for row in measured["results"] if row["fits"]]
    shared = {"target": "target", "draft": "draft", "way": "way", "lp_size": "N",
              "draft_tensor_parallel_size": "draft TP", "acceptance_rate": "α"}  # fmt: skip
    table: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        shown = table.setdefault(
            tuple(row[name] for name in shared), {column: row[name] for name, column in shared.items()}
        )
        shown[row["machine"]] = f"{row['tokens_per_second']:.1f} ({row['speedup']:.2f} ×)"
    for key, shown in table.items():
        row = next(row for row in rows if tuple(row[name] for name in shared) == key)
        if row["paper_speedup"] is not None:
            shown["the paper, 8×A100"] = f"{row['paper_tokens_per_second']:.1f} ({row['paper_speedup']:.2f} ×)"
    return list(table.values())


def by_devices(measured: Mapping[str, Any]) -> Table:
    """Of table6: steps a second by the number of devices, a row a machine, model and way."""
    table: dict[tuple[str, str, str], dict[str, Any]] = {}
    for row in measured["results"]:
        machine = row.get("machine", "here")
        shown = table.setdefault(
            (machine, row["model"], row["way"]), {"machine": machine, "model": row["model"], "way": row["way"]}
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
        gaps = [place["logit_gap"] for place in row["divergences"] if place["logit_gap"] is not None]
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
    return [{name: value for name, value in row.items() if not isinstance(value, dict | list)} for row in rows]


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


def soaked(measured: Mapping[str, Any]) -> Table:
    """Of soak: its verdict in one row."""
    names = {
        "memory_growth_percent": "memory after warm-up, %", "compilations_after_warm_up": "compilations after warm-up",
        "throughput_change_percent": "throughput, %", "throughput_noise_percent": "noise of a window, %",
        "checked": "texts checked", "mismatches": "that differ",
    }  # fmt: skip
    return [{"rounds": measured["results"][-1]["rounds"]} | {label: measured[name] for name, label in names.items()}]


Tabulate = Callable[[Mapping[str, Any]], Table]

SECTIONS: dict[str, tuple[str, Tabulate]] = {
    "table2": ("Table 2: ways of decoding", speeds),
    "spec_bench": ("Table 3: questions in Spec-Bench's form", by_category),
    "spec_bench_smollm2": ("Table 3: SmolLM2-135M-Instruct as its own draft", by_category),
    "table4": ("Table 4: what groups approximate", cosines),
    "frontier": ("Fidelity against collectives", frontier),
    "table5": ("Table 5: attentions or whole layers at once", speeds),
    "table6": ("Table 6: steps a second by the number of devices", by_devices),
    "table8": ("Table 8: other pairs", speeds),
    "figure2": ("Figure 2: what the devices do in a round", timelines),
    "figure4": ("Figure 4: acceptance by N and width", losses),
    "acceptance_demo": ("Acceptance: the bundled pair", losses),
    "acceptance_demo_refit": ("Acceptance with a refit: the bundled pair", losses),
    "acceptance": ("Acceptance", losses),
    "acceptance_refit": ("Acceptance with a refit: SmolLM2-135M-Instruct as its own draft", losses),
    "simulate": ("Simulation: machines that are not here (estimates)", predictions),
    "two_processes": ("Two processes, a core each", flat),
    "two_processes_smollm2": ("Two processes, a core each: SmolLM2-135M-Instruct", flat),
    "peers": ("Other engines in the same run", engines),
    "peers_smollm2": ("Other engines in the same run: SmolLM2-135M-Instruct as its own draft", engines),
    "kill_check": ("A job of 500 prompts, killed at random moments", kills),
    "soak": ("A soak: memory, programs and speed over many rounds", soaked),
}
"""By file, in the order of the page; other files follow with what `flat` makes of them."""

PAPER: dict[str, dict[str, Table]] = {
    "table2": {
        f"{target}, drafted by {draft}, temperature {temperature:g}": paper.table_2(pair, temperature)
        for pair, (target, draft) in enumerate(paper.PAIRS)
        for temperature in (0, 0.8)
    },
    "table4": {"Llama-3-8B on MMLU, cosines": paper.TABLE_4},
    "table5": {"MMLU": paper.TABLE_5},
    "table6": {"tokens/s of plain decoding by the number of devices": paper.TABLE_6},
    "table8": {"tokens/s, temperature 0": paper.TABLE_8},
}


def page(results: Path) -> str:
    """The whole document. results: the directory with the files. Raises EasySpecError for one that is no JSON."""
    found = {path.stem: path for path in sorted(results.glob("*.json"))}
    order = [name for name in SECTIONS if name in found] + [name for name in found if name not in SECTIONS]
    return "\n".join([INTRODUCTION, *(section(found[name]) for name in order)])


def section(path: Path) -> str:
    """Of one file."""
    measured = read_json(path)
    name, tabulate = SECTIONS.get(path.stem, (path.stem, flat))
    if path.stem == "acceptance":
        name = subject(measured)
    parts = [f"## {name}", told(path, measured)]
    parts += [f"*{line}*" for name in ("assumptions", "notes") for line in measured.get(name, [])]
    if table := tabulate(measured):
        parts.append(markdown(table))
    if path.with_suffix(".png").exists():
        parts.append(f"![{name}](results/{path.stem}.png)")
    for title, theirs in PAPER.get(path.stem, {}).items():
        parts += [f"The paper, on 8×A100: {title}.", markdown(theirs)]
    return "\n\n".join(parts) + "\n"


def subject(measured: Mapping[str, Any]) -> str:
    """A heading that says whose drafts those are."""
    if measured["target"] != measured["draft"]:
        return f"{measured['target']}, drafted by {measured['draft']}"
    refit = " and refit" if any(row.get("refit") for row in measured["results"]) else ""
    return f"{measured['target']} as its own exact draft against fuzzy{refit} drafts"


def told(path: Path, measured: Mapping[str, Any]) -> str:
    """The command, the machine and the file, as far as the file knows them."""
    machine = measured.get("machine")
    parts = [f"`{measured['command']}`"] if "command" in measured else []
    if machine is not None and {"cores", "platform", "devices", "device_kind"} <= set(machine):
        parts.append(machine_line(machine))
    return "; ".join([*parts, f"[JSON](results/{path.name})"]) + "."


def machine_line(machine: Mapping[str, Any]) -> str:
    """Of a file's `machine`."""
    if machine["platform"] != "cpu":
        return f"{machine['devices']} × {machine['device_kind']}"
    virtual = f", {machine['devices']} virtual devices" if machine["devices"] > 1 else ""
    return f"{machine['cores']}-core CPU{virtual}"


def markdown(table: Table) -> str:
    """A table whose columns are those of all its rows."""
    names = list(dict.fromkeys(name for row in table for name in row))
    lines = [names, ["-"] * len(names), *([_cell(row.get(name)) for name in names] for row in table)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 1 else f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"
    return str(value).replace("|", "\\|")


def run(args: argparse.Namespace) -> None:
    """Writes the page beside the directory of results."""
    write_whole(args.results.parent / "README.md", page(args.results).encode())


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m experiments.readme", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="the page comes into the directory above it")
    return run_command("experiments.readme", parser, run, argv)


if __name__ == "__main__":
    sys.exit(main())
