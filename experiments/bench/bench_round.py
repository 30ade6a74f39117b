"""Measure a round's bookkeeping: `python -m experiments.bench_round --tree-width 8`.

The same passes of both models with nothing between them (no choice of nodes, no verdict, no commit)
alternate with whole rounds from the same state. Whatever a round takes beyond its passes is
bookkeeping.
"""

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, get_args

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.table import Table

from easyspec_jax import SamplingParams, SpeculativeConfig, demo
from easyspec_jax.cli.command import Parser
from easyspec_jax.decode.prefilling import prefill_all
from easyspec_jax.decode.programs import Programs
from easyspec_jax.decode.state import RoundConfig, State
from easyspec_jax.draft.layer_group import run_fuzzy
from easyspec_jax.model.transformer import Decoder, run_exact
from easyspec_jax.model.windows import Nodes
from easyspec_jax.options import Verifier
from easyspec_jax.parallel.mesh import ALL_AXES
from experiments.lib.machine import machine
from experiments.lib.output import (
    RESULTS,
    as_json,
    check_destination,
    run_experiment,
    save,
    settings,
)
from experiments.lib.pair import add_models, names, open_pair
from experiments.lib.tables import Rows

WARM_UP = 3


def passes(target: Decoder, draft: Decoder, state: State, config: RoundConfig) -> Any:
    """Run a round's passes over arbitrary tokens, and return the state and the logits."""
    h, caches = draft(
        state.pending(config.pending_size),
        state.draft,
        state.draft_length,
        run_exact if config.calibration else run_fuzzy,
    )
    batch, width, nodes = (
        h.shape[0],
        config.width,
        1 + (config.nodes or config.levels * config.width),
    )
    first = draft.logits(h[:, :1])

    def deepen(carry: Any, depth: jax.Array) -> Any:
        caches, tokens = carry
        ancestors = jnp.ones((batch, width, 1 + config.levels * width), bool)
        depths = jnp.broadcast_to(depth, tokens.shape)
        at = Nodes(state.length + 1 + (depth - 1) * width, state.length, depths, ancestors)
        h, caches = draft(tokens, caches, at, run_fuzzy)
        # XLA must not see that these are the same tokens: it would hoist the embedding.
        return (caches, tokens + (h[..., 0] > 1e30).astype(jnp.int32)), draft.logits(h)

    start = (caches, jnp.broadcast_to(state.root[:, None], (batch, width)))
    (caches, _), later = jax.lax.scan(deepen, start, jnp.arange(1, config.levels, dtype=jnp.int32))
    tree = Nodes(
        state.length,
        state.length,
        jnp.zeros((batch, nodes), jnp.int32),
        jnp.ones((batch, nodes, nodes), bool),
    )
    h, target_caches = target(
        jnp.broadcast_to(state.root[:, None], (batch, nodes)), state.target, tree
    )
    return replace(state, target=target_caches, draft=caches), (first, later, target.logits(h))


def compiled_passes(programs: Programs) -> Any:
    """Compile passes() as a program of its own that, like a round, donates its state."""
    draft = programs.draft
    assert draft is not None, "rounds without a draft have no bookkeeping to speak of"
    spec, split = programs.compiled.state_spec, draft.axes or None
    logits = (P(None, None, split), P(None, None, None, split), P(None, None, ALL_AXES))
    body = programs.compiled.mapped(
        partial(passes, config=programs.config), (spec,), (spec, logits)
    )
    return jax.jit(body, donate_argnums=1)


def measure(
    programs: Programs, prompt: list[int], sampling: SamplingParams, repeats: int
) -> dict[str, list[float]]:
    """Time passes and rounds alternately, in seconds; the first few of each are not counted."""
    bare = compiled_passes(programs)
    capacity = programs.sizes.capacity(len(prompt) + sampling.max_new_tokens)
    state, _ = prefill_all(
        programs, programs.start(sampling, [sampling.max_new_tokens], capacity), [prompt]
    )
    spare = jax.tree.map(jnp.copy, state)
    seconds: dict[str, list[float]] = {"passes": [], "round": []}
    for _ in range(repeats + WARM_UP):
        (spare, _), spent = timed(partial(bare, programs.leaves), spare)
        seconds["passes"].append(spent)
        (state, _), spent = timed(programs.round, state)
        seconds["round"].append(spent)
    return {name: times[WARM_UP:] for name, times in seconds.items()}


def timed(run: Callable[[State], Any], state: State) -> tuple[Any, float]:
    """Run a program on a state, and return what it makes and the seconds it took."""
    jax.block_until_ready(state)
    begun = time.perf_counter()
    result = jax.block_until_ready(run(state))
    return result, time.perf_counter() - begun


def tabulate(measured: Mapping[str, Any]) -> Rows:
    """Tabulate medians; shares are medians over pairs of a round and its passes."""
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = Parser(prog="python -m experiments.bench_round", description=__doc__)
    add_models(parser)
    parser.add_argument("--mesh", default="1")
    parser.add_argument("--lp-size", type=int, default=4)
    parser.add_argument("--num-speculative-tokens", type=int, default=5)
    parser.add_argument("--tree-width", type=int, default=8)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.8])
    parser.add_argument(
        "--verifiers", nargs="+", choices=get_args(Verifier), default=get_args(Verifier)
    )
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--out", type=Path, default=RESULTS / "bench_round.json")
    return run_experiment("experiments.bench_round", parser, report, argv)


def report(args: argparse.Namespace) -> None:
    """Measure each way of sampling, print the table and write the JSON."""
    check_destination(args.out)
    ways: list[tuple[Verifier | None, float]] = [(None, 0.0)] if 0.0 in args.temperatures else []
    ways += [(verifier, t) for t in args.temperatures if t > 0 for verifier in args.verifiers]
    table = Table("verifier", "T", "round, ms", "passes, ms", "bookkeeping")
    rows = []
    for verifier, temperature in ways:
        speculative = SpeculativeConfig(
            num_speculative_tokens=args.num_speculative_tokens,
            tree_width=args.tree_width,
            lp_size=args.lp_size,
            verifier=verifier,
        )
        engine = open_pair(args, speculative)
        sampling = SamplingParams(
            temperature=temperature,
            max_new_tokens=(args.num_speculative_tokens + 1) * (args.repeats + WARM_UP),
        )
        prompt = engine.encode(demo.PROMPT)
        seconds = measure(engine.programs(sampling), prompt, sampling, args.repeats)
        # Ratios within each pair, because a shared machine drifts.
        shares = [
            1 - bare / whole
            for bare, whole in zip(seconds["passes"], seconds["round"], strict=True)
        ]
        name = verifier or "greedy"
        rows.append(
            {"verifier": name, "temperature": temperature, "bookkeeping": median(shares)} | seconds
        )
        figures = (f"{1e3 * median(seconds[part]):.1f}" for part in ("round", "passes"))
        table.add_row(name, f"{temperature:g}", *figures, f"{100 * median(shares):.1f} %")
    Console().print(table)
    save(args.out, as_json(settings(args) | names(args) | {"machine": machine(), "results": rows}))


if __name__ == "__main__":
    sys.exit(main())
