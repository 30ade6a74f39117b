"""Compare a layer-parallel draft with itself run exactly: `python -m experiments.fidelity`.

Teacher-forced on the draft's own greedy continuations: at every position the last 1, 2, … tokens
are drafted, and everything before them is exact. Besides the distributions, cosines show what a
group approximates (the paper's Table 4), at depth 1, over the layers whose input is stale.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from easyspec_jax import EasySpecError, Engine, SamplingParams, SpeculativeConfig, demo, open_model
from easyspec_jax.cli.command import (
    Parser,
    cache_compilations,
    read_prompts,
    run_command,
)
from easyspec_jax.cli.flags import add_shared
from easyspec_jax.draft.grouping import format_layout
from easyspec_jax.draft.layer_group import LayerGroup, load_draft, run_fuzzy
from easyspec_jax.draft.refit_file import choose_layout
from easyspec_jax.model.cache import KVCache
from easyspec_jax.model.transformer import Decoder, Hidden
from easyspec_jax.model.windows import Windows
from easyspec_jax.parallel.mesh import ALL_AXES
from easyspec_jax.parallel.spmd import partition_specs, spmd
from easyspec_jax.progress import bar
from easyspec_jax.refit.fidelity import DEPTHS, fidelity
from easyspec_jax.refit.teacher import drafted_window, exact_window
from experiments.lib.pair import DATA, open_draft

PROGRAM = "experiments.fidelity"

Texts = Int[np.ndarray, "texts tokens"]
Counted = Bool[np.ndarray, "texts tokens"]
Cosines = dict[str, list[Float[Array, " tokens"]]]
"""By what is approximated, then by stale layer."""


def continuations(
    engine: Engine, prompts: Sequence[str], chat: bool, new_tokens: int
) -> tuple[Texts, Counted]:
    """Let the model continue the prompts greedily.

    Returns:
        The texts, int32 [texts, tokens], and the positions that predict a continuation's tokens,
        bool [texts, tokens].
    """
    completions = list(
        engine.generate(prompts, SamplingParams(max_new_tokens=new_tokens), chat=chat)
    )
    ids = [completion.prompt_ids + completion.token_ids for completion in completions]
    texts = np.zeros((len(ids), max(map(len, ids))), np.int32)
    counted = np.zeros(texts.shape, bool)
    for row, (text, completion) in enumerate(zip(ids, completions, strict=True)):
        texts[row, : len(text)] = text
        counted[row, len(completion.prompt_ids) - 1 : len(text) - 1] = True
    return texts, counted


def cosines(draft: Decoder, mesh: Any, texts: Texts, counted: Counted) -> dict[str, float]:
    """Return mean cosines over stale layers and counted positions, on a mesh of one device.

    Empty if no layer is stale.
    """

    def body(draft: Decoder, ids: Int[Array, "1 tokens"]) -> Cosines:
        with jax.default_matmul_precision("highest"):
            return _through_blocks(draft, ids)

    program: Any = jax.jit(spmd(body, mesh, (partition_specs(draft), P()), P()))
    results = [program(draft, ids[None]) for ids in texts]
    names = [name for name, layers in results[0].items() if layers]
    means = {}
    for name in names:
        # [layers, tokens] of each text -> [layers, texts, tokens]
        by_text = np.stack([np.asarray(found[name]) for found in results], axis=1)
        means[name] = float(by_text[:, counted].mean())
    return means


def _through_blocks(draft: Decoder, ids: Int[Array, "1 tokens"]) -> Cosines:
    tokens = ids.shape[1]
    exact_at, fuzzy_at = (
        exact_window(1, tokens, 2 * tokens, draft.config),
        drafted_window(1, 1, tokens, 2 * tokens, draft.config),
    )
    found: Cosines = {name: [] for name in ("h", "q", "k", "v", "attn_out")}
    exact = fuzzy = draft.embed(ids)
    for block in draft.blocks:
        cache = block.init_cache(1, 2 * tokens)
        if isinstance(block, LayerGroup):
            after, cache, fed = block.trace_exact(exact, cache, exact_at)
            for slot in range(1, len(fed)):
                for name, value in _of_layer(
                    block, slot, fed[slot], fuzzy, cache, fuzzy_at
                ).items():
                    found[name].append(value)
            exact = after
        else:
            exact, cache = block(exact, cache, exact_at)
        fuzzy, _ = run_fuzzy(block, fuzzy, cache, fuzzy_at)
    return found


def _of_layer(
    block: LayerGroup,
    slot: int,
    fed: tuple[Hidden, Hidden],
    fuzzy: Hidden,
    cache: KVCache,
    windows: Windows,
) -> dict[str, Float[Array, " tokens"]]:
    attention, own = (
        jax.tree.map(lambda w: w[slot], part)
        for part in (
            block.attention,
            block.attention.qkv if block.refit is None else block.refit.qkv,
        )
    )
    heads = zip(attention.heads(attention.qkv(fed[0])), attention.heads(own(fuzzy)), strict=True)
    attended = attention(fuzzy, cache, windows[block.kinds[slot]], slot, qkv=own)[0]
    pairs = {"h": (fed[0], fuzzy), "attn_out": (fed[1] - fed[0], attended)}
    for name, (exact, got) in zip("qkv", heads, strict=True):
        pairs[name] = tuple(
            x.transpose(0, 2, 1, 3).reshape(1, x.shape[2], -1) for x in (exact, got)
        )
    return {name: _cosine(exact[0], got[0]) for name, (exact, got) in pairs.items()}


def _cosine(
    a: Float[Array, "tokens size"], b: Float[Array, "tokens size"]
) -> Float[Array, " tokens"]:
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    lengths = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
    return jnp.sum(a * b, axis=-1) / jnp.maximum(lengths, jnp.finfo(jnp.float32).tiny)


def prepare(
    args: argparse.Namespace, speculations: Sequence[SpeculativeConfig]
) -> tuple[Engine, Texts, Counted]:
    """Open the draft as a model of its own and let it continue the prompts; flags as add_flags().

    Raises:
        EasySpecError: No group would be fuzzy, which is known before anything is computed.
    """
    prompts = read_prompts(
        args.prompts or DATA / ("code_prompts.txt" if args.draft == demo.DRAFT else "prompts.txt")
    )
    draft = open_draft(args)
    if any(choose_layout(speculative, draft)[0].lp_size == 1 for speculative in speculations):
        raise EasySpecError(
            "in groups of one layer nothing is fuzzy; give an --lp-size of at least 2"
        )
    engine = open_model(
        args.draft,
        speculative=SpeculativeConfig(method="vanilla"),
        dtype="float32",
        allow_links=args.allow_links,
    )
    return engine, *continuations(engine, prompts, args.chat, args.max_new_tokens)


def measured(
    engine: Engine, speculative: SpeculativeConfig, texts: Texts, counted: Counted
) -> dict[str, Any]:
    """Measure how faithful one way to draft is."""
    layout, refit = choose_layout(speculative, engine.target)
    model = load_draft(engine.loader(engine.target, ALL_AXES), layout, refit)
    overlap, agree = fidelity(model, engine.mesh, texts, counted)
    return {
        "lp_size": speculative.lp_size if speculative.lp_strategy is None else layout.lp_size,
        "groups": format_layout(layout),
        "mlp_lp_size": max(layout.mlp_lp_sizes),
        "collectives": layout.collectives,
        "sequential_mlps": layout.sequential_mlps,
        "refit": refit is not None,
        "positions": int(counted.sum()),
        "overlap": overlap,
        "agree": agree,
        "cosine": cosines(model, engine.mesh, texts, counted),
    }


def measure_all(
    args: argparse.Namespace, speculations: Sequence[SpeculativeConfig]
) -> list[dict[str, Any]]:
    """Measure every way to draft on the same texts and return a row for each; flags as add_flags().

    Raises:
        EasySpecError: As prepare().
    """
    engine, texts, counted = prepare(args, speculations)
    rows = []
    with bar("Measuring", len(speculations)) as advance:
        for speculative in speculations:
            rows.append(measured(engine, speculative, texts, counted))
            advance(1)
    return rows


def add_flags(parser: Parser) -> None:
    """Add the flags of the draft and of what it is measured on."""
    parser.add_argument("--draft", type=Path, default=demo.DRAFT, help="default: the bundled one")
    add_shared(parser, "--allow-links")
    parser.add_argument(
        "--prompts",
        type=Path,
        help="one a line (default: questions, or code for the bundled draft)",
    )
    parser.add_argument(
        "--chat", action="store_true", help="wrap each prompt in the draft's chat template"
    )
    parser.add_argument("--max-new-tokens", type=int, default=128)


def _parser() -> argparse.ArgumentParser:
    default = SpeculativeConfig()
    parser = Parser(prog=f"python -m {PROGRAM}", description=__doc__)
    add_flags(parser)
    parser.add_argument("--lp-size", type=int, default=default.lp_size, metavar="N")
    parser.add_argument("--lp-strategy", metavar="S", help="explicit groups")
    parser.add_argument("--mlp-lp-size", type=int, default=default.mlp_lp_size, metavar="M")
    parser.add_argument(
        "--refit", default="none", metavar="DIR", help='"auto": the one next to the draft, if any'
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def run(args: argparse.Namespace) -> None:
    """Measure and print."""
    speculative = SpeculativeConfig(
        lp_size=args.lp_size,
        lp_strategy=args.lp_strategy,
        mlp_lp_size=args.mlp_lp_size,
        refit=args.refit,
    )
    cache_compilations()
    engine, texts, counted = prepare(args, [speculative])
    result = measured(engine, speculative, texts, counted)
    print(json.dumps(result) if args.json else _described(result))


def _described(result: dict[str, Any]) -> str:
    columns = range(1, DEPTHS + 1)
    lines = [f"{'depth':8}" + "".join(f"{depth:8}" for depth in columns)]
    for name in ("overlap", "agree"):
        lines.append(f"{name:8}" + "".join(f"{value:8.3f}" for value in result[name]))
    cosines = "  ".join(f"{name} {value:.3f}" for name, value in result["cosine"].items())
    return "\n".join([*lines, f"cosine  {cosines}"])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(PROGRAM, _parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
