"""The page of results: a section for each file in results/.

A section says what was typed and on which machine, and has the table, the picture and, where there
are any, the paper's figures.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from easyspec_jax.checkpoint.config import read_json
from easyspec_jax.errors import EasySpecError
from experiments.lib.tables import flat, markdown
from experiments.paper import published
from experiments.registry import SCRIPTS, known

MACHINE = {"platform", "cores", "devices", "device_kind"}
"""The fields of a machine without which the page does not name it."""


def sections(results: Path) -> str:
    """Write the sections of all files in a directory, first those that the registry lists.

    Raises:
        EasySpecError: A file is not JSON.
    """
    found = {path.stem: path for path in sorted(results.glob("*.json"))}
    listed = [result.name for script in SCRIPTS for result in script.results]
    first = [name for name in listed if name in found]
    others = [name for name in found if name not in listed]
    return "\n".join(section(found[name]) for name in [*first, *others])


def section(path: Path) -> str:
    """Write the section of one file."""
    measured = read_json(path)
    about = known(path.stem)
    title, tabulate = path.stem, flat
    if about is not None:
        title, tabulate = about[1].title, about[0].function("tabulate")
    if "{subject}" in title:
        title = title.format(subject=subject(measured))
    parts = [f"### {title}", source(path, measured)]
    for name in ("assumptions", "notes"):
        parts += [f"*{line}*" for line in measured.get(name, [])]
    if measured.get("refit") is True:
        parts.append("*Drafted with the refit that was next to the draft.*")
    try:
        rows = tabulate(measured)
    except KeyError as missing:
        raise EasySpecError(f"{path} has no {missing}") from None
    if rows:
        parts.append(markdown(rows))
    if path.with_suffix(".png").exists():
        parts.append(f"![{title}](results/{path.stem}.png)")
    for heading, theirs in published.BESIDE.get(path.stem, {}).items():
        parts += [f"The paper, on 8×A100: {heading}.", markdown(theirs)]
    return "\n\n".join(parts) + "\n"


def subject(measured: Mapping[str, Any]) -> str:
    """Say whose drafts a file of acceptance is about."""
    if measured["target"] != measured["draft"]:
        return f"{measured['target']}, drafted by {measured['draft']}"
    refit = " and refit" if any(row.get("refit") for row in measured["results"]) else ""
    return f"{measured['target']} as its own exact draft against fuzzy{refit} drafts"


def source(path: Path, measured: Mapping[str, Any]) -> str:
    """Name the commands, the machines and the file, as far as the file knows them."""
    sources = [measured, *measured.get("parts", {}).values()]
    commands = dict.fromkeys(own["command"] for own in sources if "command" in own)
    parts = [f"`{command}`" for command in commands]
    machines = [own["machine"] for own in sources if "machine" in own]
    parts += dict.fromkeys(machine_line(own) for own in machines if own.keys() >= MACHINE)
    return "; ".join([*parts, f"[JSON](results/{path.name})"]) + "."


def machine_line(machine: Mapping[str, Any]) -> str:
    """Describe a machine in a few words."""
    if machine["platform"] != "cpu":
        return f"{machine['devices']} × {machine['device_kind']}"
    virtual = f", {machine['devices']} virtual devices" if machine["devices"] > 1 else ""
    return f"{machine['cores']}-core CPU{virtual}"
