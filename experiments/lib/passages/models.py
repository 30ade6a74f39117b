"""Tables of what the code itself lists: scripts, families and models."""

from collections.abc import Iterator
from pathlib import Path

from easyspec_jax.checkpoint.families import FAMILIES, SINKS, Family
from experiments.lib.tables import Rows, markdown
from experiments.registry import SCRIPTS


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
