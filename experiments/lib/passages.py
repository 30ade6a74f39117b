"""The generated passages of documents: tables, and figures within a sentence."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from statistics import fmean, median
from typing import Any

from easyspec_jax.checkpoint.config import read_json
from easyspec_jax.checkpoint.families import FAMILIES, SINKS, Family
from experiments.lib.sections import sections
from experiments.lib.tables import Rows, distinct, markdown, matching
from experiments.registry import SCRIPTS, known

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

SIZES = (1, 2, 4, 6, 7, 12)
"""The numbers of layers at once for which the README has the acceptance."""

SAMPLED = {"greedy": "greedy", "coupled": "T = 0.8, coupled", "rejection": "T = 0.8, rejection"}
"""Ways of sampling in a file of acceptance, by the verifier."""


def scripts(results: Path) -> str:
    """List every script in one line, folder by folder."""
    lines = []
    for folder in dict.fromkeys(script.folder for script in SCRIPTS):
        rows = [script for script in SCRIPTS if script.folder == folder]
        names: Rows = [
            {f"`{folder or 'experiments'}/`": f"`{script.name}`", "what it does": script.about}
            for script in rows
        ]
        lines.append(markdown(names))
    return "\n\n".join(lines)


def supported_models(results: Path) -> str:
    """Tabulate the models of every family."""
    rows: list[dict[str, str]] = []
    for model_type, family in sorted(FAMILIES.items(), key=lambda entry: entry[1].models):
        rows.append({"models": family.models, "`model_type`": f"`{model_type}`"})
    return markdown(rows)


def families(results: Path) -> str:
    """Tabulate the supported families, and how each differs from Llama."""
    rows: list[dict[str, str]] = []
    for model_type, family in sorted(FAMILIES.items(), key=lambda entry: entry[1].models):
        gguf = f"`{family.gguf}`" if family.gguf else ""
        rows.append(
            {
                "models": family.models,
                "`model_type`": f"`{model_type}`",
                "GGUF": gguf,
                "besides what Llama has": "; ".join(_traits(family)),
            }
        )
    return markdown(rows)


def _traits(family: Family) -> Iterator[str]:
    """Say how a family differs from Llama without biases, by its table and its own fields."""
    if any(tensor.name.endswith("q_proj.bias") and not tensor.when for tensor in family.tensors):
        yield "biases on queries, keys and values"
    norms = {"head": "of each query and key head", "full": "over all queries, and over all keys"}
    if family.qk_norm in norms:
        yield f"norms {norms[family.qk_norm]}"
    if family.has("self_attn.output_norm.weight"):
        before = "before and after" if family.has("input_layernorm.weight") else "only after"
        yield f"norms {before} attention and MLP"
    if family.has(SINKS):
        yield "attention sinks"
    if family.has_experts:
        yield "mixtures of experts"
    if any(tensor.after for tensor in family.tensors):
        yield "joined tensors"
    if family.fields:
        yield ", ".join(f"`{field}`" for field in family.fields)


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


def chains(results: Path, name: str) -> dict[str, dict[str, Any]]:
    """Read the greedy rows of width 1 in a file of acceptance, by the draft's name."""
    rows = read(results, name)
    return {row["draft"]: row for row in rows if row["temperature"] == 0 and row["tree_width"] == 1}


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
        # "0,1-4,5-13" -> 3
        turns = rows[0]["groups"].count(",") + 1
        shown: dict[str, Any] = {"draft": rows[0]["draft"], "turns of attention": turns}
        table.append(shown | _rates(rows, "width {tree_width}"))
    return markdown(table)


def acceptance_qwen_tasks(results: Path) -> str:
    """Tabulate the acceptance of the real draft on prompts for code and for prose."""
    kinds = {kind: read(results, f"acceptance_qwen_{kind}") for kind in ("code", "prose")}
    table: dict[str, dict[str, Any]] = {}
    for kind, rows in kinds.items():
        for own in _by_draft(rows):
            shown = table.setdefault(own[0]["draft"], {"draft": own[0]["draft"]})
            shown |= _rates(own, f"{kind}, width {{tree_width}}")
    return markdown(list(table.values()))


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


def tabulated(name: str) -> Callable[[Path], str]:
    """Return a passage that is a file of results as its own script tabulates it."""

    def passage(results: Path) -> str:
        about = known(name)
        assert about is not None, f"the registry lists {name}"
        measured = read_json(results / f"{name}.json")
        return markdown(about[0].function("tabulate")(measured))

    return passage


def lookup_speeds(results: Path) -> str:
    """Tabulate the speeds of looked-up drafts over plain decoding."""
    return _of_lookup(results, "speeds_by_kind")


def lookup_finders(results: Path) -> str:
    """Tabulate what ways to look up drafts reach."""
    return _of_lookup(results, "reached_by_kind")


def _of_lookup(results: Path, function: str) -> str:
    about = known("lookup_smollm2")
    assert about is not None
    return markdown(about[0].function(function)(read_json(results / "lookup_smollm2.json")))


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


def read(results: Path, name: str) -> Rows:
    """Read the rows of a file of results.

    Raises:
        EasySpecError: It is missing, or is not JSON.
    """
    return read_json(results / f"{name}.json")["results"]


def short(values: Iterable[float]) -> str:
    """Write shares with three digits and without the leading zero.

    Example:
        >>> short([0.8941, 0.871])
        '.894 .871'
    """
    return " ".join(f"{value:.3f}".removeprefix("0") for value in values)


PASSAGES: dict[str, Callable[[Path], str]] = {
    "scripts": scripts,
    "results": lambda results: sections(results).strip(),
    "peers": peers,
    "real_pair": real_pair,
    "acceptance": acceptance,
    "card": card,
    "kept": kept,
    "acceptance_refit": acceptance_refit,
    "acceptance_qwen": acceptance_qwen,
    "acceptance_qwen_tasks": acceptance_qwen_tasks,
    "acceptance_demo_refit": acceptance_demo_refit,
    "trees": trees,
    "checkpoints": checkpoints,
    "roofline_terms": tabulated("roofline_terms"),
    "dry_compile": tabulated("dry_compile_h100"),
    "quantization": tabulated("quantization"),
    "quantization_qwen": tabulated("quantization_qwen"),
    "adapt_qwen": tabulated("adapt_qwen"),
    "adapt_qwen_sampled": tabulated("adapt_qwen_sampled"),
    "adapt_qwen_processes": tabulated("adapt_qwen_processes"),
    "bench_lookup": tabulated("bench_lookup"),
    "adapt_qwen_ngram": tabulated("adapt_qwen_ngram"),
    "context_length": tabulated("context_length"),
    "lookup_speeds": lookup_speeds,
    "lookup_finders": lookup_finders,
    "tune_share": tune_share,
    "peers_smollm2": peers_smollm2,
    "peers_smollm2_transformers": peers_smollm2_transformers,
    "peers_qwen": peers_qwen,
    "peers_qwen_transformers": peers_qwen_transformers,
    "peers_qwen_gguf": peers_qwen_gguf,
    "models": supported_models,
    "families": families,
}
"""By the names in the documents' markers. Each gets the directory of results."""
