"""The generated passages of documents: tables, and figures within a sentence."""

from collections.abc import Callable
from pathlib import Path

from experiments.lib.passages import acceptance, models, speeds
from experiments.lib.passages.reading import tabulated
from experiments.lib.sections import sections

PASSAGES: dict[str, Callable[[Path], str]] = {
    "scripts": models.scripts,
    "results": lambda results: sections(results).strip(),
    "peers": speeds.peers,
    "real_pair": speeds.real_pair,
    "acceptance": acceptance.acceptance,
    "card": acceptance.card,
    "kept": acceptance.kept,
    "acceptance_refit": acceptance.acceptance_refit,
    "acceptance_qwen": acceptance.acceptance_qwen,
    "losses_qwen": acceptance.losses_qwen,
    "acceptance_qwen_tasks": acceptance.acceptance_qwen_tasks,
    "table5_qwen": acceptance.table5_qwen,
    "acceptance_demo_refit": acceptance.acceptance_demo_refit,
    "trees": acceptance.trees,
    "checkpoints": speeds.checkpoints,
    "roofline_terms": tabulated("roofline_terms"),
    "dry_compile": tabulated("dry_compile_h100"),
    "quantization": tabulated("quantization"),
    "quantization_qwen": tabulated("quantization_qwen"),
    "quantization_qwen_code": tabulated("quantization_qwen_code"),
    "quantization_smollm2": tabulated("quantization_smollm2"),
    "adapt_qwen": tabulated("adapt_qwen"),
    "adapt_qwen_sampled": tabulated("adapt_qwen_sampled"),
    "adapt_qwen_auto": tabulated("adapt_qwen_auto"),
    "adapt_qwen_processes": tabulated("adapt_qwen_processes"),
    "adapt_qwen_processes_sampled": tabulated("adapt_qwen_processes_sampled"),
    "bench_lookup": tabulated("bench_lookup"),
    "adapt_qwen_ngram": tabulated("adapt_qwen_ngram"),
    "adapt_qwen_lookup": tabulated("adapt_qwen_lookup"),
    "context_length": tabulated("context_length"),
    "lookup_speeds": speeds.lookup_speeds,
    "lookup_finders": speeds.lookup_finders,
    "tune_share": speeds.tune_share,
    "peers_smollm2": speeds.peers_smollm2,
    "peers_smollm2_transformers": speeds.peers_smollm2_transformers,
    "peers_qwen": speeds.peers_qwen,
    "peers_qwen_transformers": speeds.peers_qwen_transformers,
    "peers_qwen_gguf": speeds.peers_qwen_gguf,
    "models": models.supported_models,
    "families": models.families,
}
"""By the names in the documents' markers. Each gets the directory of results."""
