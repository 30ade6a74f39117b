"""Tables of what targets accept, and of what groups keep of a draft."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from experiments.lib.passages.reading import read, short
from experiments.lib.tables import Rows, distinct, markdown, matching

SIZES = (1, 2, 4, 6, 7, 12)
"""The numbers of layers at once for which the README has the acceptance."""


SAMPLED = {"greedy": "greedy", "coupled": "T = 0.8, coupled", "rejection": "T = 0.8, rejection"}
"""Ways of sampling in a file of acceptance, by the verifier."""


def acceptance(results: Path) -> str:
    """Tabulate what the target accepts of the drafts of both pairs that the README shows."""
    pairs = {
        "bundled pair": chains(results, "acceptance_demo"),
        "SmolLM2": chains(results, "acceptance"),
        "Qwen2.5-Coder": chains(results, "acceptance_qwen"),
    }
    found = {draft: row for rows in pairs.values() for draft, row in rows.items()}
    drafts = [draft for draft, row in found.items() if row["lp_size"] in SIZES]
    table = []
    for draft in sorted(drafts, key=lambda draft: _order(found[draft])):
        shown = {"draft": draft if draft == "exact" else f"fuzzy, {draft}"}
        for pair, rows in pairs.items():
            shown[pair] = f"{rows[draft]['acceptance_rate']:.3f}" if draft in rows else ""
        table.append(shown)
    return markdown(table)


def chains(results: Path, name: str) -> dict[str, dict[str, Any]]:
    """Read the greedy rows of width 1 in a file of acceptance, by the draft's name."""
    rows = read(results, name)
    return {row["draft"]: row for row in rows if row["temperature"] == 0 and row["tree_width"] == 1}


def _order(row: Mapping[str, Any]) -> tuple[int, bool, bool]:
    """Sort drafts by size: plain ones, then those without calibration, then refit ones."""
    return row["lp_size"], row.get("refit", False), not row["calibration"]


def card(results: Path) -> str:
    """Tabulate the acceptance of the bundled pair for its model card."""
    rows = [
        {
            "draft": draft,
            "acceptance rate": f"{row['acceptance_rate']:.3f}",
            "tokens a round": f"{row['mean_acceptance_length']:.2f}",
        }
        for draft, row in chains(results, "acceptance_demo").items()
    ]
    return markdown(rows)


def kept(results: Path) -> str:
    """Tabulate how much of the draft's distribution groups keep, with and without refits."""
    sets = {"A": read(results, "table4_smollm2"), "unseen": read(results, "table4_smollm2_unseen")}
    table: dict[int, dict[str, Any]] = {}
    for label, rows in sets.items():
        for row in rows:
            column = f"{label}, refit" if row["refit"] else label
            shown = table.setdefault(row["lp_size"], {"N": row["lp_size"]})
            shown[column] = short(row["overlap"])
    return markdown(list(table.values()))


def acceptance_refit(results: Path) -> str:
    """Tabulate the acceptance of SmolLM2's groups, plain and refit, where texts are the same."""
    table = []
    for width, verifier, rows in _same_texts(read(results, "acceptance")):
        groups = [row for row in rows if row["lp_size"] > 1 and row["calibration"]]
        sizes = distinct(groups, "lp_size")
        shown: dict[str, Any] = {"sampling": SAMPLED[verifier], "tree width": width}
        for refit in (False, True):
            for size in sizes:
                (own,) = (r for r in groups if (r["lp_size"], r["refit"]) == (size, refit))
                name = f"N = {size}, refit" if refit else f"N = {size}"
                shown[name] = short([own["acceptance_rate"]])
        table.append(shown)
    return markdown(table)


def acceptance_qwen(results: Path) -> str:
    """Tabulate the acceptance of the real draft by the turns that its attentions take."""
    greedy, sampled = (read(results, f"acceptance_qwen{name}") for name in ("", "_sampled"))
    table = []
    for rows in _by_draft([*greedy, *sampled]):
        shown: dict[str, Any] = {"draft": rows[0]["draft"], "turns of attention": _turns(rows)}
        table.append(shown | _rates(rows, "width {tree_width}"))
    return markdown(table)


def losses_qwen(results: Path) -> str:
    """Tabulate what groups lose of the real draft's acceptance, by widths, with and without refits.

    Sizes without a refit are left out.
    """
    table: dict[int, dict[str, Any]] = {}
    for column, name in {"greedy": "", "T = 0.8": "_sampled"}.items():
        exact, *drafts = _by_draft(read(results, f"acceptance_qwen{name}"))
        whole = {row["tree_width"]: row["acceptance_rate"] for row in exact}
        refits = {rows[0]["lp_size"] for rows in drafts if rows[0]["refit"]}
        for rows in drafts:
            size = rows[0]["lp_size"]
            if size not in refits:
                continue
            turns = f"{_turns(rows)} of {_turns(exact)}"
            shown = table.setdefault(size, {"N": size, "turns of attention": turns})
            lost = [whole[row["tree_width"]] - row["acceptance_rate"] for row in rows]
            shown[f"{column}, refit" if rows[0]["refit"] else column] = short(lost)
    return markdown(list(table.values()))


def acceptance_qwen_tasks(results: Path) -> str:
    """Tabulate the acceptance of the real draft on prompts for code and for prose."""
    kinds = {kind: read(results, f"acceptance_qwen_{kind}") for kind in ("code", "prose")}
    table: dict[str, dict[str, Any]] = {}
    for kind, rows in kinds.items():
        for own in _by_draft(rows):
            shown = table.setdefault(own[0]["draft"], {"draft": own[0]["draft"]})
            shown |= _rates(own, f"{kind}, width {{tree_width}}")
    return markdown(list(table.values()))


def table5_qwen(results: Path) -> str:
    """Tabulate the acceptance of the real draft with attentions or whole layers at once."""
    table: dict[int, dict[str, Any]] = {}
    for row in read(results, "table5_qwen"):
        if row["acceptance_rate"] is None:
            continue
        size, way = row["lp_size"], row["at_once"]
        shown = table.setdefault(size, {"N": f"{size}, in order" if size == 1 else size})
        column = "whole layers at once" if way == "whole layers" else "attentions at once"
        shown[column] = short([row["acceptance_rate"]])
    return markdown(list(table.values()))


def _turns(rows: Rows) -> int:
    """Count the turns that a draft's attentions take: "0,1-4,5-13" are 3."""
    return rows[0]["groups"].count(",") + 1


def _rates(rows: Rows, column: str) -> dict[str, str]:
    """Name the acceptance of each row by its width, and its temperature if it is not 0."""
    shown = {}
    for row in rows:
        sampled = f", T = {row['temperature']:g}" if row["temperature"] else ""
        shown[column.format_map(row) + sampled] = short([row["acceptance_rate"]])
    return shown


def _by_draft(rows: Rows) -> Iterator[Rows]:
    """Group calibrated rows by draft, the exact one first."""
    calibrated = [row for row in rows if row["calibration"]]
    drafts = {row["draft"]: row for row in calibrated}
    for draft in sorted(drafts, key=lambda draft: _order(drafts[draft])):
        yield matching(calibrated, draft=draft)


def acceptance_demo_refit(results: Path) -> str:
    """Tabulate the acceptance of the bundled draft: exact, in groups of four, and these refit."""
    table = []
    rows = read(results, "acceptance_demo_refit")
    for width, verifier, own in [*_same_texts(rows), *_same_texts(rows, ("rejection",))]:
        shown: dict[str, Any] = {"sampling": SAMPLED[verifier], "tree width": width}
        for row in own:
            if row["draft"] in ("exact", "N = 4", "N = 4, refit"):
                shown[row["draft"]] = short([row["acceptance_rate"]])
        table.append(shown)
    return markdown(table)


def _same_texts(
    rows: Rows, verifiers: tuple[str, ...] = ("greedy", "coupled")
) -> Iterable[tuple[int, str, Rows]]:
    """Group the rows of a file of acceptance by verifier and tree width."""
    for verifier in verifiers:
        chosen = matching(rows, verifier=verifier)
        for width in distinct(chosen, "tree_width"):
            yield width, verifier, matching(chosen, tree_width=width)


def trees(results: Path) -> str:
    """Tabulate the bundled pair's acceptance at temperature 0.8 by verifier and tree width.

    Means over all calibrated groups.
    """
    rows = [row for row in read(results, "acceptance_demo") if row["temperature"] == 0.8]
    groups = [row for row in rows if row["lp_size"] > 1 and row["calibration"]]
    table = []
    for verifier in ("rejection", "coupled"):
        shown = {"": verifier}
        for width in distinct(groups, "tree_width"):
            rates = [
                row["acceptance_rate"]
                for row in groups
                if (row["verifier"], row["tree_width"]) == (verifier, width)
            ]
            shown[f"width {width}"] = short([fmean(rates)])
        table.append(shown)
    return markdown(table)
