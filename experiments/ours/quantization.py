"""Measure what rounding costs: `python -m experiments.quantization`.

Perplexity of the target on a held-out text, with its matrices or its caches in narrower types; and
acceptance of a draft whose types are narrower, under the target as it is. Greedy texts are compared
with plain decoding of the same target. None of the figures is a time.
"""

import argparse
import gc
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int
from rich.table import Table

from easyspec_jax import Completion, EasySpecError, Engine, SamplingParams, SpeculativeConfig
from easyspec_jax.checkpoint.directory import Checkpoint, open_checkpoint
from easyspec_jax.checkpoint.quantized import Dequantized, Quantized
from easyspec_jax.checkpoint.rounding import INTEGERS
from easyspec_jax.cli.command import Parser, cache_compilations, read_prompts
from easyspec_jax.model.transformer import Caches, Decoder
from easyspec_jax.options import KVDType, Weights
from easyspec_jax.parallel.collectives import all_reduce
from easyspec_jax.parallel.spmd import partition_specs, spmd
from easyspec_jax.progress import bar
from easyspec_jax.sampling.vocabulary import normaliser
from easyspec_jax.tokenizer import encode
from experiments.lib.machine import machine
from experiments.lib.output import (
    RESULTS,
    align_right,
    as_json,
    check_destination,
    measured_before,
    run_experiment,
    save,
    settings,
    show,
)
from experiments.lib.pair import DATA, add_models, names, open_pair
from experiments.lib.tables import Rows
from experiments.ours.acceptance import complete, figures_of, texts_of

CHUNK = 128
"""Tokens of the held-out text that are read at a time."""

HELD_OUT = DATA / "held_out.txt"
"""Prose and code that were written for this measurement. The file never changes."""


@dataclass(frozen=True)
class Types:
    """Types that a model keeps its matrices and caches in.

    Attributes:
        weights: Type of the matrices; None is float32.
        kv_dtype: Type of the caches; "auto" is float32.
        calibrated: Whether matrices are those of `--calibrated`.
    """

    weights: Weights | None = None
    kv_dtype: KVDType = "auto"
    calibrated: bool = False

    @property
    def label(self) -> str:
        calibrated = ", calibrated" if self.calibrated else ""
        caches = "" if self.kv_dtype == "auto" else f", {self.kv_dtype} caches"
        return f"{self.weights or 'as they are'}{calibrated}{caches}"


KINDS = (
    Types(),
    Types("bfloat16"),
    Types("int8"),
    Types("int4"),
    Types("int4", calibrated=True),
    Types(None, "int8"),
    Types("int8", "int8"),
    Types("int4", "int8"),
)


def measure(args: argparse.Namespace, prompts: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Measure kinds of types, and yield a row of each.

    Raises:
        EasySpecError: The text is too short, or as open_model.
    """
    ids = held_out(open_as(args, Types(), "vanilla"), args.text, args.tokens)
    plain = dict[KVDType, list[Completion]]()
    chosen = [types for types in KINDS if args.only is None or types.label in args.only]
    if args.calibrated is None:
        chosen = [types for types in chosen if not types.calibrated]
    with bar("Measuring", 2 * len(chosen)) as advance:
        for types in chosen:
            value = perplexity(open_as(args, types, "vanilla"), ids)
            advance(1)
            if types.kv_dtype not in plain:
                # No draft changes a greedy text, but caches are of one type for both models.
                floats = Types(None, types.kv_dtype)
                plain[types.kv_dtype], _ = complete_as(args, floats, "vanilla", prompts)
            row = asdict(types) | {"label": types.label, "perplexity": value}
            for role in ("draft", "both"):
                if role == "both" and types.weights is None:
                    continue
                both = role == "both"
                made, figures = complete_as(args, types, "easyspec", prompts, both)
                for name in ("acceptance_rate", "mean_acceptance_length"):
                    row[f"{role}_{name}"] = figures[name]
                if role == "draft":
                    row["equals_plain"] = texts_of(made) == texts_of(plain[types.kv_dtype])
                else:
                    alone, _ = complete_as(args, types, "vanilla", prompts)
                    row["both_equals_plain"] = texts_of(made) == texts_of(alone)
            yield row
            advance(1)


def open_as(args: argparse.Namespace, types: Types, method: Any, both: bool = True) -> Engine:
    """Open the pair, or with "vanilla" its target, in certain types, and no engine besides it.

    Args:
        args: The flags.
        types: The types.
        method: "vanilla" or "easyspec".
        both: Round the target's matrices too.
    """
    speculative = SpeculativeConfig(
        method=method,
        lp_size=args.lp_size,
        tree_width=None if method == "vanilla" else args.tree_width,
        refit="none",
    )
    # One that is used no more may be part of a cycle, and its weights may fill half the memory.
    gc.collect()
    weights = types.weights if both else None, types.weights
    as_stored = args.dequantize or types.calibrated
    kept = [None if as_stored and kind in INTEGERS else kind for kind in weights]
    engine = open_pair(
        args,
        speculative,
        "1",
        weights=kept[0],
        draft_weights=kept[1],
        kv_dtype=types.kv_dtype,
    )
    if types.calibrated:
        target, draft = (
            open_checkpoint(path, allow_links=args.allow_links) for path in args.calibrated
        )
        engine.target = target if both else engine.target
        engine.draft = engine.draft and draft
    if args.dequantize:
        engine.target = _as_floats(engine.target, weights[0])
        engine.draft = engine.draft and _as_floats(engine.draft, weights[1])
    return engine


def _as_floats(checkpoint: Checkpoint, weights: Weights | None) -> Checkpoint:
    """Return a checkpoint whose matrices are rounded and are floats again."""
    source = checkpoint.source
    if weights in INTEGERS:
        source = Quantized(source, weights)  # integers that are stored stay
    return replace(checkpoint, source=Dequantized(source))


def complete_as(
    args: argparse.Namespace, types: Types, method: Any, prompts: Sequence[str], both: bool = True
) -> tuple[list[Completion], dict[str, Any]]:
    """Complete the prompts greedily with an engine of open_as(), and return its figures too."""
    engine = open_as(args, types, method, both)
    made = complete(engine, SamplingParams(max_new_tokens=args.max_new_tokens), prompts, args)
    return made, figures_of(engine, made) if method == "easyspec" else {}


def held_out(engine: Engine, text: Path, tokens: int) -> Int[np.ndarray, " tokens"]:
    """Tokenise the beginning of a text: a multiple of CHUNK tokens, and one more.

    Raises:
        EasySpecError: It cannot be read or is too short.
    """
    try:
        content = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EasySpecError(f"--text {text} cannot be read: {error}") from None
    ids = encode(engine.tokenizer, content)[: tokens + 1]
    whole = (len(ids) - 1) // CHUNK * CHUNK
    if whole < CHUNK:
        raise EasySpecError(f"--text {text} has {len(ids)} tokens; give more than {CHUNK}")
    return np.asarray(ids[: whole + 1], np.int32)


def perplexity(engine: Engine, ids: Int[np.ndarray, " tokens"]) -> float:
    """Compute exp of the mean negative log-probability of every token but the first."""
    model, _ = engine.load()
    capacity = len(ids) - 1

    def body(
        model: Decoder, caches: Caches, read: Int[Array, "1 chunk"], following: Array, at: Array
    ) -> tuple[Caches, Float[Array, " chunk"]]:
        with jax.default_matmul_precision("highest"):
            h, caches = model(read, caches, at)
            logits = model.logits(h)[0]
        greatest, total = normaliser(logits, model.axes)
        of_next = jnp.take_along_axis(logits, following[:, None], axis=-1)
        log_probability = of_next - greatest - jnp.log(total)
        return caches, all_reduce(log_probability[:, 0], ())

    specs = partition_specs(model)
    state = model.cache_specs()
    program: Any = jax.jit(
        spmd(body, engine.mesh, (specs, state, P(), P(), P()), (state, P())), donate_argnums=1
    )
    caches: Any = jax.jit(
        spmd(lambda model: model.init_caches(1, capacity), engine.mesh, (specs,), state)
    )(model)
    found = []
    for start in range(0, capacity, CHUNK):
        read, following = ids[start : start + CHUNK], ids[start + 1 : start + CHUNK + 1]
        at = np.full(1, start, np.int32)
        caches, log_probabilities = program(model, caches, read[None], following, at)
        found.append(np.asarray(log_probabilities))
    return float(np.exp(-np.concatenate(found).mean()))


def tabulate(measured: Mapping[str, Any]) -> Rows:
    """Tabulate every kind of types."""
    table = []
    for row in measured["results"]:
        same = row["equals_plain"] and row.get("both_equals_plain", True)
        table.append(
            {
                "matrices, caches": row["label"],
                "perplexity": row["perplexity"],
                "over floats": row["over_floats"],
                "α, draft alone": row["draft_acceptance_rate"],
                "α, both": row.get("both_acceptance_rate"),
                "same text as plain": "yes" if same else "no",
            }
        )
    return table


def print_table(rows: Rows) -> None:
    """Print the rows."""
    table = Table(*rows[0], box=None, pad_edge=False)
    align_right(table.columns[1:])
    for row in rows:
        table.add_row(*(f"{x:.3f}" if isinstance(x, float) else str(x or "") for x in row.values()))
    show(table)


def run(args: argparse.Namespace) -> None:
    """Measure, print and write the JSON."""
    cache_compilations()
    prompts = read_prompts(
        args.prompt_file or DATA / ("prompts.txt" if args.target else "code_prompts.txt")
    )
    check_destination(args.out)
    for types in KINDS:
        if types.calibrated and args.calibrated is None and types.label in (args.only or ()):
            raise EasySpecError(f"--only {types.label!r} needs --calibrated")
    fields = settings(args, "prompt_file", "text", "only", "calibrated") | names(args)
    # Rows of several runs with --only are those of one run without it.
    fields["command"] = re.sub(r" --only .*?(?= --|$)", "", args.command)
    fields |= {"text": args.text.name, "machine": machine(None)}
    if not args.dequantize:
        del fields["dequantize"]
    before = []
    if args.only is not None:
        before = measured_before(args.out, fields, "--only", ("command", "machine"))
    rows = {row["label"]: row for row in before}
    for row in measure(args, prompts):
        rows[row["label"]] = row
        found = [rows[types.label] for types in KINDS if types.label in rows]
        floats = rows.get(KINDS[0].label, {}).get("perplexity")
        for each in found:
            each["over_floats"] = floats and each["perplexity"] / floats
        save(args.out, as_json(fields | {"results": found}))
    print_table(tabulate({"results": list(rows.values())}))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = Parser(prog="python -m experiments.quantization", description=__doc__)
    add_models(parser)
    parser.add_argument("--lp-size", type=int, default=SpeculativeConfig.lp_size)
    parser.add_argument("--tree-width", type=int, default=1)
    parser.add_argument("--text", type=Path, default=HELD_OUT, help="default: held_out.txt")
    parser.add_argument("--tokens", type=int, default=2048, help="of the text (default: 2048)")
    parser.add_argument("--prompt-file", type=Path, help="default: questions, or code")
    parser.add_argument("--chat", action="store_true")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=8, help="prompts decoded together")
    parser.add_argument(
        "--dequantize",
        action="store_true",
        help="round matrices and multiply them as floats: the same but for float32's rounding, and "
        "several times as fast on a CPU",
    )
    parser.add_argument(
        "--calibrated",
        nargs=2,
        type=Path,
        metavar=("TARGET", "DRAFT"),
        help="the pair as `convert --weights int4 --calibration` wrote it, for a row of its own",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=[types.label for types in KINDS],
        help="measure only these, and keep the other rows of --out",
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "quantization.json")
    return run_experiment("experiments.quantization", parser, run, argv)


if __name__ == "__main__":
    sys.exit(main())
