"""Compare drafts of several sizes, the paper's Table 8: `python -m experiments.table8`.

How much of a target's text each draft guesses, and what that is worth as an ordinary draft (sd), as
one that grows trees (tree), and layer-parallel (easyspec). By default the bundled target is drafted
for by the bundled draft, by itself, and by its own first layers, which were not trained to end
there. Greedy; all ways complete the same prompts, alternating.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from easyspec_jax import EasySpecError, SamplingParams, SpeculativeConfig, demo, open_model
from easyspec_jax.checkpoint.config import read_json
from easyspec_jax.checkpoint.directory import open_checkpoint
from easyspec_jax.cli.command import Parser, cache_compilations, read_prompts
from easyspec_jax.cli.flags import add_shared
from easyspec_jax.parallel.mesh import parse_mesh
from easyspec_jax.tune.drawing import INK, WHITE, dress_bars, png
from experiments.lib.output import RESULTS, prepare, publish, run_experiment, settings, show
from experiments.lib.pair import DATA
from experiments.lib.picture import note
from experiments.lib.questions import Question, code_questions, read_questions
from experiments.lib.tables import column, matching, speeds
from experiments.paper.table2 import Way, complete, rows_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Pair = tuple[Path, Path]
"""The directories of a target and of a draft."""


def truncated(source: Path, layers: int, directory: Path) -> Path:
    """Write the first layers of a Hugging Face directory as another one."""
    from safetensors.numpy import load_file, save_file

    directory.mkdir()
    config = read_json(source / "config.json") | {"num_hidden_layers": layers}
    (directory / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes((source / name).read_bytes())
    tensors = load_file(source / "model.safetensors")
    kept = {name: value for name, value in tensors.items() if _layer(name) < layers}
    save_file(kept, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def _layer(name: str) -> int:
    """Return the layer of a tensor "model.layers.3.…", -1 for others."""
    parts = name.split(".")
    return int(parts[2]) if parts[:2] == ["model", "layers"] else -1


def pairs_of(args: argparse.Namespace, directory: Path) -> list[Pair]:
    """Return the pairs of the flags, or the bundled ones.

    Args:
        args: The flags.
        directory: Where truncated drafts go.

    Raises:
        EasySpecError: --pairs has an odd number of directories.
    """
    if args.pairs is None:
        layers = open_checkpoint(demo.TARGET).config.num_hidden_layers
        short = [
            truncated(demo.TARGET, kept, directory / f"target-{kept}-layers")
            for kept in range(3, layers)
        ]
        return [(demo.TARGET, draft) for draft in (demo.DRAFT, demo.TARGET, *reversed(short))]
    if len(args.pairs) % 2:
        raise EasySpecError(
            "--pairs takes a target and a draft for each pair; one directory is left over"
        )
    return list(zip(args.pairs[::2], args.pairs[1::2], strict=True))


def measure(
    args: argparse.Namespace, pairs: Sequence[Pair], questions: Sequence[Question]
) -> list[dict[str, Any]]:
    """Return a row for every way, pair by pair."""
    rows, sampling = [], SamplingParams(max_new_tokens=args.max_new_tokens)
    levels = {"num_speculative_tokens": args.num_speculative_tokens}
    for target, draft in pairs:
        layers = open_checkpoint(draft, allow_links=args.allow_links).config.num_hidden_layers
        chain = open_model(
            target,
            draft,
            mesh=args.mesh,
            platform=args.platform,
            dtype=args.dtype,
            speculative=SpeculativeConfig(method="sd", **levels),
            allow_links=args.allow_links,
        )
        tree = SpeculativeConfig(method="tree", tree_width=args.tree_width, **levels)
        size = min(args.lp_size, layers)
        fuzzy = SpeculativeConfig(tree_width=args.tree_width, lp_size=size, refit="none", **levels)
        ways = [
            Way("TP" if chain.mesh.size > 1 else "one device", chain.baseline()),
            Way("sd", chain),
            Way("tree", chain.variant(tree)),
            Way("easyspec", chain.variant(fuzzy, parse_mesh(args.mesh, group_size=size))),
        ]
        about = {
            "target": target.name,
            "draft": draft.name,
            "draft_layers": layers,
            "lp_size": size,
        }
        rows += [about | row for row in rows_of("all", 0.0, complete(ways, questions, sampling))]
    return rows


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Print the rows."""
    table = Table(
        "target", "draft", "layers", "", "α", "tokens/s", "speed-up", box=None, pad_edge=False
    )
    for row in rows:
        rate = row["acceptance_rate"]
        table.add_row(
            row["target"],
            row["draft"],
            str(row["draft_layers"]),
            row["way"],
            "" if rate is None else f"{rate:.3f}",
            f"{100 / row['seconds_per_100_tokens']:.1f}",
            f"{row['speedup']:.2f} ± {row['speedup_deviation']:.2f}",
        )
    show(table)


COLORS = {"sd": "#e2e2e2", "tree": "#e69f00", "easyspec": "#0072b2"}
"""From the palette of Okabe and Ito, far apart in grey."""


def draw(measured: dict[str, Any]) -> bytes:
    """Draw the speed-up over plain decoding as PNG, a bar for each pair and way.

    Raises:
        EasySpecError: matplotlib is missing.
    """
    return png(lambda: _figure(measured))


def _figure(measured: dict[str, Any]) -> "Figure":
    from matplotlib.figure import Figure

    rows = [row for row in measured["results"] if row["way"] in COLORS]
    pairs = list(dict.fromkeys((row["target"], row["draft"]) for row in rows))
    figure = Figure(figsize=(9, 1.6 + 0.95 * len(pairs)), dpi=120, layout="constrained")
    figure.suptitle(
        f"Speed over plain decoding by pair, --mesh {measured['mesh']}", weight="bold", size=13
    )
    axes = figure.subplots()
    height = 0.8 / len(COLORS)
    for index, (way, color) in enumerate(COLORS.items()):
        own = matching(rows, way=way)
        places = [pairs.index((row["target"], row["draft"])) + (index - 1) * height for row in own]
        axes.barh(places, column(own, "speedup"), color=color, height=0.9 * height, label=way)
        for place, row in zip(places, own, strict=True):
            text = f"{row['speedup']:.2f} ×, α {row['acceptance_rate']:.2f}"
            box = {"facecolor": WHITE, "edgecolor": "none", "pad": 1}  # over the line at 1
            note(axes, text, row["speedup"], place, bbox=box)
    axes.axvline(1, color=INK, linewidth=1)
    axes.set_yticks(
        range(len(pairs)), [f"{target},\ndrafted by {draft}" for target, draft in pairs]
    )
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.set_xlabel("times plain decoding")
    dress_bars(axes)
    figure.legend(loc="outside lower center", ncols=len(COLORS))
    return figure


tabulate = speeds
"""Rows for the page of results."""


def run(args: argparse.Namespace) -> None:
    """Measure, print, write the JSON and draw it."""
    cache_compilations()
    prepare(args.out)
    if args.questions is None and args.pairs is None:
        questions = code_questions(read_prompts(DATA / "code_prompts.txt"))
    else:
        questions = read_questions(args.questions or DATA / "questions.jsonl")
    with tempfile.TemporaryDirectory() as directory:
        rows = measure(args, pairs_of(args, Path(directory)), questions)
    print_table(rows)
    publish(args.out, settings(args, "questions", "pairs"), rows, draw)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    default = SpeculativeConfig()
    parser = Parser(prog="python -m experiments.table8", description=__doc__)
    parser.add_argument(
        "--pairs", type=Path, nargs="+", metavar="DIR", help="a target and a draft for each pair"
    )
    add_shared(parser, "--allow-links")
    parser.add_argument("--mesh", default="1")
    parser.add_argument("--platform")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--questions", type=Path, help="in Spec-Bench's form")
    parser.add_argument(
        "--num-speculative-tokens", type=int, default=default.num_speculative_tokens
    )
    parser.add_argument("--tree-width", type=int, default=4)
    parser.add_argument("--lp-size", type=int, default=default.lp_size)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--out", type=Path, default=RESULTS / "table8.json")
    return run_experiment("experiments.table8", parser, run, argv)


if __name__ == "__main__":
    sys.exit(main())
