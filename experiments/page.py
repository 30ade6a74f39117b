"""Writes experiments/README.md from the files in results/, and from nothing else: `python -m experiments.readme`.

A section a file: what was typed, on which machine, the table, the picture, and the paper's figures where it has them.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from easyspec_jax.checkpoint.config import read_json
from easyspec_jax.cli.command import Parser, run_command
from easyspec_jax.files import write_whole
from experiments import paper
from experiments.output import RESULTS
from experiments.readme_tables import (
    Table,
    bookkeeping,
    by_category,
    by_devices,
    checkpoints,
    choices,
    collectives,
    cosines,
    engines,
    flat,
    frontier,
    kills,
    losses,
    passes,
    predictions,
    soaked,
    speeds,
    timelines,
)

INTRODUCTION = """# Results

Written by `python -m experiments.readme` out of the files in [results](results); `python -m experiments.run --quick`
measures all that its steps name and writes this page anew. α is the share of drafted positions that the target accepts.
A tree keeps the likeliest texts of each level, among which the target's next token may no longer be; so a model that
drafts a tree for itself stays below 1, where a chain does not. ± is the standard deviation over prompts.
"""


Tabulate = Callable[[Mapping[str, Any]], Table]

SECTIONS: dict[str, tuple[str, Tabulate]] = {
    "table2": ("Table 2: ways of decoding", speeds),
    "table2_smollm2": ("Table 2: SmolLM2-135M-Instruct as its own draft", speeds),
    "spec_bench": ("Table 3: questions in Spec-Bench's form", by_category),
    "spec_bench_smollm2": ("Table 3: SmolLM2-135M-Instruct as its own draft", by_category),
    "table4": ("Table 4: what groups approximate", cosines),
    "table4_smollm2": ("Table 4: SmolLM2-135M-Instruct, six prompts", cosines),
    "table4_smollm2_unseen": (
        "Table 4: SmolLM2-135M-Instruct, ten prompts that no fit and no choice has seen",
        cosines,
    ),
    "frontier": ("Fidelity against collectives", frontier),
    "frontier_smollm2": ("Fidelity against collectives: SmolLM2-135M-Instruct", frontier),
    "table5": ("Table 5: attentions or whole layers at once", speeds),
    "table6": ("Table 6: steps a second by the number of devices", by_devices),
    "table8": ("Table 8: other pairs", speeds),
    "figure2": ("Figure 2: what the devices do in a round", timelines),
    "figure4": ("Figure 4: acceptance by N and width", losses),
    "acceptance_demo": ("Acceptance: the bundled pair", losses),
    "acceptance_demo_refit": ("Acceptance with a refit: the bundled pair", losses),
    "acceptance": ("Acceptance", losses),
    "tune_check": ("What tune chooses, among all candidates", choices),
    "tune_check_smollm2": ("What tune chooses: SmolLM2-135M-Instruct as its own draft", choices),
    "simulate": ("Simulation: machines that are not here (estimates)", predictions),
    "two_processes": ("Two processes, a core each", collectives),
    "two_processes_smollm2": ("Two processes, a core each: SmolLM2-135M-Instruct", collectives),
    "peers": ("Other engines in the same run", engines),
    "peers_smollm2": (
        "Other engines in the same run: SmolLM2-135M-Instruct as its own draft",
        engines,
    ),
    "bench_round": ("Bookkeeping: what a round takes beyond its passes", bookkeeping),
    "kill_check": ("A job of 500 prompts, killed at random moments", kills),
    "soak": ("A soak: memory, programs and speed over many rounds", soaked),
}
"""By file, in the order of the page."""

BY_SHAPE: dict[str, tuple[str, Tabulate]] = {
    "bench_roofline": ("Passes and rounds against the machine's bandwidth", passes),
    "bench_checkpoints": ("Conversion and opening of a checkpoint", checkpoints),
}
"""By what names of files begin with, before _SHAPE. These follow, and other files with what `flat` makes of them."""

MACHINE = {"cores", "platform", "devices", "device_kind"}
"""What a file must know of its machine for the page to name it."""

PAPER: dict[str, dict[str, Table]] = {
    "table2": {
        f"{target}, drafted by {draft}, temperature {temperature:g}": paper.table_2(
            pair, temperature
        )
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
    order = [name for name in SECTIONS if name in found] + [
        name for name in found if name not in SECTIONS
    ]
    return "\n".join([INTRODUCTION, *(section(found[name]) for name in order)])


def section(path: Path) -> str:
    """Of one file."""
    measured = read_json(path)
    name, tabulate = kind_of(path.stem)
    if path.stem == "acceptance":
        name = subject(measured)
    parts = [f"## {name}", told(path, measured)]
    parts += [f"*{line}*" for name in ("assumptions", "notes") for line in measured.get(name, [])]
    if measured.get("refit") is True:
        parts.append("*Drafted with the refit that lay beside the draft.*")
    if table := tabulate(measured):
        parts.append(markdown(table))
    if path.with_suffix(".png").exists():
        parts.append(f"![{name}](results/{path.stem}.png)")
    for title, theirs in PAPER.get(path.stem, {}).items():
        parts += [f"The paper, on 8×A100: {title}.", markdown(theirs)]
    return "\n\n".join(parts) + "\n"


def kind_of(stem: str) -> tuple[str, Tabulate]:
    """The heading of a file of that name, and what tabulates it."""
    for begin, (name, tabulate) in BY_SHAPE.items():
        if stem.startswith(f"{begin}_"):
            return f"{name}: {stem.removeprefix(f'{begin}_')}", tabulate
    return SECTIONS.get(stem, (stem, flat))


def subject(measured: Mapping[str, Any]) -> str:
    """A heading that says whose drafts those are."""
    if measured["target"] != measured["draft"]:
        return f"{measured['target']}, drafted by {measured['draft']}"
    refit = " and refit" if any(row.get("refit") for row in measured["results"]) else ""
    return f"{measured['target']} as its own exact draft against fuzzy{refit} drafts"


def told(path: Path, measured: Mapping[str, Any]) -> str:
    """The command, the machine and the file, as far as the file knows them."""
    sources = [measured, *measured.get("parts", {}).values()]
    parts = [
        f"`{command}`"
        for command in dict.fromkeys(own["command"] for own in sources if "command" in own)
    ]
    machines = [own["machine"] for own in sources if "machine" in own]
    parts += dict.fromkeys(machine_line(own) for own in machines if own.keys() >= MACHINE)
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
    lines = [
        names,
        ["-"] * len(names),
        *([_cell(row.get(name)) for name in names] for row in table),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return (
            f"{value:.3f}"
            if abs(value) < 1
            else f"{value:.2f}"
            if abs(value) < 100
            else f"{value:.0f}"
        )
    return str(value).replace("|", "\\|")


def run(args: argparse.Namespace) -> None:
    """Writes the page beside the directory of results."""
    write_whole(args.results.parent / "README.md", page(args.results).encode())


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m experiments.readme", description=__doc__)
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="the page comes into the directory above it"
    )
    return run_command("experiments.readme", parser, run, argv)


if __name__ == "__main__":
    sys.exit(main())
