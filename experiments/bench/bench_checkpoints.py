"""Measure conversion and opening: `python -m experiments.bench_checkpoints --shape 7b`.

Makes a random checkpoint, then converts and opens it with commands of their own. Their resident
memory, mapped pages included, is read from /proc over the whole process tree. Conversion alternates
with copying the same files. Each starts with nothing in the page cache and ends when all of the
copy is on disk. Linux only.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from math import ceil, prod
from pathlib import Path
from statistics import median
from typing import Any, get_args

import numpy as np

from convert.shards import SafetensorsStore
from easyspec_jax import EasySpecError, demo
from easyspec_jax.arithmetic import ceil_div, packed_width
from easyspec_jax.checkpoint.canonical import expected_shapes
from easyspec_jax.checkpoint.config import model_config
from easyspec_jax.checkpoint.directory import open_checkpoint
from easyspec_jax.cli.command import Parser
from easyspec_jax.options import Weights
from experiments.lib.machine import machine
from experiments.lib.output import RESULTS, check_destination, run_experiment, save
from experiments.lib.tables import Rows, column

_COMMON = {
    "model_type": "llama",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "dtype": "bfloat16",
}
_7B = {
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}
SHAPES: dict[str, dict[str, Any]] = {
    "7b": _COMMON | _7B,
    "7b-6-layers": _COMMON | _7B | {"num_hidden_layers": 6},
    "1b": _COMMON
    | {
        "num_hidden_layers": 16,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "0.17b": _COMMON
    | {
        "num_hidden_layers": 14,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "vocab_size": 8192,
        "tie_word_embeddings": False,
    },
}

_OPEN = """
import sys, jax
from easyspec_jax import SpeculativeConfig, open_model
options = dict(speculative=SpeculativeConfig(method="vanilla"), dtype="bfloat16")
engine = open_model(sys.argv[1], mesh=sys.argv[2], platform="cpu", **options)
jax.block_until_ready(jax.tree.leaves(engine.load()))
"""


def write_random(directory: Path, fields: dict[str, Any], shards: int) -> int:
    """Write a Hugging Face directory of random weights with a tokenizer.

    Args:
        directory: Created; must not exist.
        fields: The content of config.json.
        shards: About how many files the weights are split into.

    Returns:
        The bytes of all weights.
    """
    config = model_config(fields)
    shapes = expected_shapes(config)
    size = sum(map(prod, shapes.values())) * np.dtype(config.dtype).itemsize
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(fields))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(demo.TARGET / name, directory / name)
    store = SafetensorsStore(directory, config, largest=ceil_div(size, shards) + (size >> 6))
    # A million numbers to repeat, and a few more so that rows differ.
    block = (0.02 * np.random.default_rng(0).standard_normal(1_000_003, np.float32)).astype(
        config.dtype
    )
    for name, shape in shapes.items():
        step = max(1, (8 << 20) // prod(shape[1:]))
        for start in range(0, shape[0], step):
            store.write(name, start, np.resize(block, (min(step, shape[0] - start), *shape[1:])))
    store.finish()
    return size


@dataclass(frozen=True)
class Run:
    """The time and memory that a command took."""

    seconds: float
    peak_bytes: int


def measured(command: Sequence[str | Path], interval: float = 0.02) -> Run:
    """Run a command, sampling the resident memory of it and its children.

    Raises:
        EasySpecError: The command fails.
    """
    begun, peak = time.perf_counter(), 0
    with subprocess.Popen(
        [*map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        while process.poll() is None:
            peak = max(
                peak, sum(map(_resident, _tree(process.pid))), _resident(process.pid, "VmHWM")
            )
            time.sleep(interval)
        seconds = time.perf_counter() - begun
        if process.returncode:
            assert process.stderr is not None
            raise EasySpecError(
                f"{command[0]} failed ({process.returncode}): {process.stderr.read()[-500:]}"
            )
    return Run(seconds, peak)


def _tree(process: int) -> Iterator[int]:
    yield process
    with suppress(OSError):
        for children in Path(f"/proc/{process}/task").glob("*/children"):
            for child in children.read_text().split():
                yield from _tree(int(child))


def _resident(process: int, field: str = "VmRSS") -> int:
    with suppress(OSError):
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) * 1024
    return 0


def convert(source: Path, out: Path, *options: str) -> Run:
    """Convert once, by the command."""
    return measured([sys.executable, "-m", "convert", "--hf", source, "--out", out, *options])


def open_(directory: Path, mesh: str) -> Run:
    """Open a checkpoint on virtual CPU devices, until all weights are loaded."""
    return measured([sys.executable, "-c", _OPEN, directory, mesh])


def copy(source: Path, out: Path) -> Run:
    """Copy a directory with the system's command, and wait until it is on disk."""
    return measured(
        ["sh", "-c", 'cp -r "$0" "$1" && find "$1" -type f -exec sync {} +', source, out]
    )


def forget(directory: Path) -> None:
    """Drop these files from the page cache."""
    for path in filter(Path.is_file, directory.rglob("*")):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def alternately(
    rounds: int, source: Path, out: Path, *ways: Callable[[Path, Path], Run]
) -> list[list[Run]]:
    """Run all ways alternately, from a cold cache to a path that is free again afterwards."""
    runs: list[list[Run]] = [[] for _ in ways]
    for _ in range(rounds):
        for way, done in zip(ways, runs, strict=True):
            forget(source)
            done.append(way(source, out))
            shutil.rmtree(out)
    return runs


def bench(
    shape: str,
    shards: int,
    rounds: int,
    meshes: Sequence[str],
    memory: str,
    directory: Path,
    weights: Weights | None = None,
) -> dict[str, Any]:
    """Measure all figures of a shape. The disk holds at most three times its bytes."""
    source, out = directory / "hf", directory / "orbax"
    try:
        size = write_random(source, SHAPES[shape], shards)
        options = ("--memory", memory, *(() if weights is None else ("--weights", weights)))
        converted, copied = alternately(
            rounds, source, out, lambda a, b: convert(a, b, *options), copy
        )
        convert(source, out, *options)
        forget(out)
        written = size if weights is None else weights_in(out)
        opened = {}
        for kind, place, held in (("huggingface", source, size), ("orbax", out, written)):
            for mesh in meshes:
                run = open_(place, mesh)
                over = {"over_weights": run.peak_bytes / held}
                opened[f"{kind}, mesh {mesh}"] = asdict(run) | over
    finally:
        shutil.rmtree(source, ignore_errors=True)
        shutil.rmtree(out, ignore_errors=True)
    return {
        "shape": shape,
        "bytes": size,
        "shards": shards,
        "memory": memory,
        "weights": weights,
        "convert": [asdict(run) for run in converted],
        "copy": [asdict(run) for run in copied],
        "open": opened,
        "convert_peak_bytes": max(run.peak_bytes for run in converted),
        "speed_over_copy": median(
            b.seconds / a.seconds for a, b in zip(converted, copied, strict=True)
        ),
    }


def weights_in(directory: Path) -> int:
    """Return the bytes of the tensors of a converted checkpoint, as they are stored."""
    source = open_checkpoint(directory).source
    dtypes, size = source.dtypes(), 0
    for name, shape in source.shapes().items():
        size += ceil(prod(shape) * packed_width(np.dtype(dtypes[name])))
    return size


def tabulate(measured: Mapping[str, Any]) -> Rows:
    """Tabulate medians of time and maxima of memory."""
    ways = {"conversion": measured["convert"], "copy of the files": measured["copy"]}
    ways |= {f"opening, {name}": [run] for name, run in measured["open"].items()}
    return [
        {
            "what": name,
            "GB": measured["bytes"] / 1e9,
            "seconds": median(column(runs, "seconds")),
            "GiB held at most": max(column(runs, "peak_bytes")) / 2**30,
        }
        for name, runs in ways.items()
    ]


def run(args: argparse.Namespace) -> None:
    """Measure and write the JSON."""
    out = args.out or RESULTS / f"bench_checkpoints_{args.shape}.json"
    check_destination(out)
    with tempfile.TemporaryDirectory(dir=args.directory) as directory:
        report = bench(
            args.shape,
            args.shards,
            args.rounds,
            args.mesh,
            args.memory,
            Path(directory),
            args.weights,
        )
    save(
        out,
        json.dumps({"command": args.command, "machine": machine("cpu"), **report}, indent=2) + "\n",
    )
    print(
        f"{out}: {report['convert_peak_bytes'] / 2**30:.2f} GiB at most, "
        f"{report['speed_over_copy']:.2f} of a copy"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = Parser(prog="python -m experiments.bench_checkpoints", description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--shards", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mesh", nargs="+", default=["8"])
    parser.add_argument("--memory", default="2GiB", help="as for convert")
    parser.add_argument(
        "--weights", choices=get_args(Weights), help="as for convert (default: as they are)"
    )
    parser.add_argument(
        "--directory", type=Path, help="where there is room (default: a temporary directory)"
    )
    parser.add_argument("--out", type=Path, help="default: results/bench_checkpoints_SHAPE.json")
    return run_experiment("experiments.bench_checkpoints", parser, run, argv)


if __name__ == "__main__":
    sys.exit(main())
